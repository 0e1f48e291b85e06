"""Tiny randomly initialised models of the families in transformers, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

tf = pytest.importorskip("transformers")

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
_LLAMA = {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

CAUSAL: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, **_IDS)
    ),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**_SMALL, intermediate_size=128, **_IDS)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_SMALL, ffn_dim=128, word_embed_proj_dim=64, **_IDS)
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128, **_IDS)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, **_IDS)),
    "llama-tied": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True, **_IDS)
    ),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA, **_IDS)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA, **_IDS)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=16, **_IDS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA, head_dim=16, **_IDS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_LLAMA, **_IDS)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_LLAMA, num_local_experts=4, **_IDS)
    ),
    "qwen2-moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **_LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=96,
            **_IDS,
        )
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**_LLAMA, num_experts=4, num_experts_per_tok=2, **_IDS)
    ),
}

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**_SMALL, intermediate_size=128)),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SMALL, intermediate_size=128)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**_SMALL, intermediate_size=128)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=128, dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    ),
    "albert": lambda: tf.AlbertModel(
        tf.AlbertConfig(**_SMALL, intermediate_size=128, embedding_size=32)
    ),
}

SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5-gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            **_T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **_IDS,
        )
    ),
}

ALL = {**CAUSAL, **ENCODERS, **SEQ2SEQ}


def make(name: str) -> Any:
    """Return the model of family `name`, the same at each call, in evaluation mode.

    Biases and norms are drawn too: transformers starts them at 0 and 1, which hides mistakes; and
    its small initial weights would let the embeddings pass through almost untouched.
    """
    torch.manual_seed(0)
    model = ALL[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.03:
                parameter.mul_(4)
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return token ids of two sentences for family `name`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (2, 13), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in SEQ2SEQ:
        given["decoder_input_ids"] = torch.randint(3, 128, (2, 7), generator=generator)
    return given


@torch.no_grad()
def output(model: Any, name: str) -> torch.Tensor:
    """Return logits or last hidden states of family `name` for `inputs(name)`."""
    result: torch.Tensor = model(**inputs(name))[0]
    return result


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine similarity of two outputs."""
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def tiny_tokenizer() -> Any:
    """One token a byte of ASCII: enough to read and write text with a vocabulary of 128."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = {chr(i): i for i in range(128)}
    plain = Tokenizer(models.WordLevel(letters, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?", eos_token="\x02")


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    """Two batches of other sentences than `inputs`, one of them shorter."""
    given = inputs(name)
    first = {k: v.roll(1, 0) if k != "attention_mask" else v for k, v in given.items()}
    return [first, {k: v[:, :5] for k, v in given.items()}]
