"""Names that attention and MLP layers go by in transformers, for structured pruning and scaling.

To teach `prune(pattern="structured")` another model, add a row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class AttentionLayout(NamedTuple):
    """Attention as linear layers of one module.

    `projections` are (path, kinds): the rows of the layer at `path` are the heads of `kinds`, one
    after the other (`"qkv"` for one fused layer). `output` is the layer that mixes the heads.
    """

    projections: tuple[tuple[str, str], ...]
    output: str
    # The embedding whose columns are heads; layers that share it prune the same heads.
    position_bias: str | None = None
    # Whether a configuration can tell the head count without changing the size of a head.
    in_config: bool = False
    # Whether the attention reads its head count from the configuration as it runs.
    needs_config: bool = False


class MLPLayout(NamedTuple):
    """An MLP as linear layers of one module: `up` layers (path, channels' copies), and `down`."""

    up: tuple[tuple[str, int], ...]
    down: str


_QKV_PROJ = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"))

ATTENTION = (
    # BERT, RoBERTa, Electra
    AttentionLayout((("self.query", "q"), ("self.key", "k"), ("self.value", "v")), "output.dense"),
    # ALBERT
    AttentionLayout((("query", "q"), ("key", "k"), ("value", "v")), "dense"),
    # DistilBERT
    AttentionLayout((("q_lin", "q"), ("k_lin", "k"), ("v_lin", "v")), "out_lin"),
    # GPT-2: cross attention, then self attention
    AttentionLayout((("q_attn", "q"), ("c_attn", "kv")), "c_proj"),
    AttentionLayout((("c_attn", "qkv"),), "c_proj"),
    # Llama, Mistral, Mixtral, Qwen, Gemma
    AttentionLayout(_QKV_PROJ, "o_proj", in_config=True),
    # Phi-3
    AttentionLayout((("qkv_proj", "qkv"),), "o_proj", in_config=True, needs_config=True),
    # OPT, BART, Marian
    AttentionLayout(_QKV_PROJ, "out_proj"),
    # T5, Switch
    AttentionLayout(
        (("q", "q"), ("k", "k"), ("v", "v")), "o", "relative_attention_bias", in_config=True
    ),
)

MLP = (
    MLPLayout((("intermediate.dense", 1),), "output.dense"),  # BERT
    MLPLayout((("ffn", 1),), "ffn_output"),  # ALBERT
    MLPLayout((("lin1", 1),), "lin2"),  # DistilBERT
    MLPLayout((("c_fc", 1),), "c_proj"),  # GPT-2
    MLPLayout((("gate_proj", 1), ("up_proj", 1)), "down_proj"),  # Llama
    MLPLayout((("gate_up_proj", 2),), "down_proj"),  # Phi-3
    MLPLayout((("fc1", 1),), "fc2"),  # OPT, BART
    MLPLayout((("wi_0", 1), ("wi_1", 1)), "wo"),  # T5 1.1
    MLPLayout((("wi", 1),), "wo"),  # T5
    MLPLayout((("dense_h_to_4h", 1),), "dense_4h_to_h"),  # GPT-NeoX, Bloom
    MLPLayout((("linear1", 1),), "linear2"),  # torch.nn.TransformerEncoderLayer
)

# Attributes of attention modules, by what they count.
HEADS = ("num_heads", "n_heads", "num_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTH = ("all_head_size", "inner_dim", "split_size")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
CHANNELS = ("intermediate_size", "intermediate_dim")
# A norm over all heads together: its statistics would change with the heads.
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")

# Fields of configurations, by what they count.
CONFIG_CHANNELS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "hidden_dim",
    "n_inner",
)


def child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a dotted path, None if there is none."""
    for part in path.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module
