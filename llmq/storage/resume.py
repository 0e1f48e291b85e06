"""Keeps each block's compressed layers in a directory, so that an interrupted run can go on.

`NNNN.safetensors` holds the canonical tensors of a block's layers and the parameters of others that
scales were folded into; its metadata says what the layers are, and which run they belong to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call
from llmq.models.targets import Target
from llmq.nn import CompressedLayer, empty_layer
from llmq.storage.fingerprint import fingerprint

_FOLDED = "folded:"


class Block(NamedTuple):
    """What became of one block: its layers, and what `blockwise.Compressed` says of them."""

    layers: list[nn.Module]
    unreached: list[str]
    errors: dict[str, float]
    folded: list[str]  # names of layers whose inputs were scaled


class Kept:
    """What a directory holds of one run.

    Args:
        directory: is made if it is not there.
        run: what tells this run from others: `run_of`.

    Raises:
        ValueError: if the directory holds another run.
    """

    def __init__(self, directory: str | os.PathLike[str], run: str) -> None:
        self.folder = Path(directory)
        self.run = run
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a directory to keep blocks in")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("*.safetensors"))[:1]:
            if _metadata(file).get("run") != run:
                raise ValueError(
                    f"{self.folder} holds blocks of another model, data or options; name an empty "
                    f"directory, or repeat the call that was interrupted"
                )

    def load(
        self, stage: int, model: nn.Module, targets: list[Target], journal: Journal
    ) -> Block | None:
        """Return what `targets` became in an earlier run, None if that is not there."""
        from safetensors.torch import load_file

        file = self.folder / f"{stage:04}.safetensors"
        if not file.exists():
            return None
        about = json.loads(_metadata(file)["block"])
        tensors = load_file(file)
        layers: list[nn.Module] = []
        for target in targets:
            prefix = f"{target.name}."
            own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
            layer = empty_layer(about["layers"][target.name])
            device = next(target.module.parameters()).device
            layer.load_state_dict({n: t.to(device) for n, t in own.items()})
            layers.append(layer.train(target.module.training))
        for name, tensor in tensors.items():
            if name.startswith(_FOLDED):
                owner, _, parameter = name.removeprefix(_FOLDED).rpartition(".")
                module = model.get_submodule(owner)
                value = tensor.to(module.get_parameter(parameter).device)
                journal.scale(module, parameter, _constant(value))
        return Block(layers, about["unreached"], about["errors"], about["folded"])

    def save(
        self,
        stage: int,
        model: nn.Module,
        layers: dict[str, Any],  # CompressedLayer
        changed: list[tuple[nn.Module, str]],
        block: Block,
    ) -> None:
        """Keep a block's new layers, and what else of it changed; whole or not at all."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {
            f"{name}.{part}": tensor.contiguous()
            for name, layer in layers.items()
            for part, tensor in layer.canonical().items()
        }
        names = {id(module): name for name, module in model.named_modules()}
        for module, parameter in changed:
            if id(module) in names:  # others were replaced by their layers
                value = module.get_parameter(parameter).detach().contiguous()
                tensors[f"{_FOLDED}{names[id(module)]}.{parameter}"] = value
        about: dict[str, Any] = {
            "layers": {name: layer.config() for name, layer in layers.items()},
            "unreached": block.unreached,
            "errors": block.errors,
            "folded": block.folded,
        }
        file = self.folder / f"{stage:04}.safetensors"
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, {"run": self.run, "block": json.dumps(about)})
        os.replace(partial, file)


def run_of(options: str, groups: list[list[Target]], calls: list[Call]) -> str:
    """Return what tells a run from others: options, the layers' weights, and data."""
    weights = ((group[0].name, _weight(group[0].module)) for group in groups)
    return fingerprint(weights, options, calls)


def _weight(module: Any) -> Tensor:
    compressed = isinstance(module, CompressedLayer)
    weight: Tensor = module.dequantize() if compressed else module.weight.detach()
    return weight


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})
