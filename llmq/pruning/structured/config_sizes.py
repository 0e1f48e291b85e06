"""What a model's configurations must say once it has fewer heads and channels."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from llmq.models import layouts
from llmq.models import transformers as hf
from llmq.pruning.structured.heads_and_channels import PrunableBlock


def config_values(
    model: nn.Module, blocks: list[PrunableBlock], whole: set[tuple[str, int]]
) -> list[tuple[Any, dict[str, int]]]:
    """Return what the model's configurations must say now, where they can say it.

    A head count is told only where the size of a head has a field of its own and the
    configuration finds the new count valid; else the modules' own integers tell it.
    """
    channels = {
        block.size: len(block.keep) * (block.size // block.units)
        for block in blocks
        if block.kind == "channels" and ("channels", block.size) not in whole
    }
    heads = [block for block in blocks if block.kind == "heads"]
    told = heads and all(block.in_config for block in heads)
    told = told and not any(kind == "heads" for kind, _ in whole)
    result = []
    for config in hf.configs(model):
        values = {}
        for attribute in layouts.CONFIG_CHANNELS:
            value = getattr(config, attribute, None)
            if attribute == "n_inner" and hasattr(config, attribute) and value is None:
                value = 4 * config.hidden_size  # GPT-2's default
            if value in channels:
                values[attribute] = channels[value]
        if told and getattr(config, "num_attention_heads", None) == heads[0].size:
            first = heads[0]
            count = {"num_attention_heads": len(first.keep) * (first.size // first.units)}
            if hasattr(config, "num_key_value_heads"):
                count["num_key_value_heads"] = (
                    len(first.keep) * first.key_value_heads // first.units
                )
            if not hasattr(config, "d_kv"):
                count["head_dim"] = first.head_dim
            if _is_valid(config, values | count):
                values |= count
            elif first.needs_config:
                raise ValueError(
                    f"{type(config).__name__} does not take {count}; choose another pruning_rate, "
                    f"or name the attention layers in skip"
                )
        result.append((config, values))
    return result


def _is_valid(config: Any, values: dict[str, int]) -> bool:
    trial = copy.deepcopy(config)
    try:
        for attribute, value in values.items():
            setattr(trial, attribute, value)
        if hasattr(trial, "validate"):
            trial.validate()
    except Exception:
        return False
    return True
