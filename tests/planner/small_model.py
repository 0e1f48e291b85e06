"""A small model, text and formats that the planner's tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.planner import costs as planning
from llmq.planner.calibrated_layers import CalibratedLayers
from tests import families
from tests.helpers import generator

tf = pytest.importorskip("transformers")
FORMATS = ("w8a8", "w8a16", "w4a16-g32", "sparse 50 % w8a8")
CODED = ("w8a8 smoothquant", "w8a8 smoothquant+gptq", "w4a8-g32 gptq", "w4a16-g32 gptq")


def tokens(count: int = 1024, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, (count,), generator=generator(0))


def replaced(calibrated: CalibratedLayers, taken: list[Any]) -> Any:
    return planning.parted(planning.replacement(taken, {}, calibrated))


def model(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    made = families.CAUSAL[family]().eval()
    with torch.no_grad():  # so that outputs depend on the layers
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def state(module: nn.Module) -> dict[str, list]:
    return {name: tensor.flatten()[:50].tolist() for name, tensor in module.state_dict().items()}


def pairs(a: nn.Module, b: nn.Module) -> Any:
    return zip(a.state_dict().values(), b.state_dict().values(), strict=True)
