"""Where the inputs of linear layers can be scaled without changing what a block computes.

Readers get W s for W [N, K] and their input comes as x / s, s [K] being folded into what makes it:
a norm's weight and bias, or the rows of a linear layer (v_proj for o_proj, up_proj for down_proj).
Norms are found by watching one call, linear layers by the names in `models/layouts.py`; a
place counts only if the block gives the same output with trial scales of 1/4 to 4 folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.stages import Call
from llmq.models import layouts
from llmq.models.targets import Target
from llmq.nn import is_conv1d


class Journal:
    """Parameters that were replaced, to put them back."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, nn.Parameter]] = []

    def scale(self, module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace parameter `name` of `module` by what `change` makes of it in float32."""
        parameter = module._parameters.get(name)
        if parameter is None:
            return
        self._before.append((module, name, parameter))
        value = change(parameter.detach().float()).to(parameter.dtype)
        module._parameters[name] = nn.Parameter(value, parameter.requires_grad)

    def undo(self, to: int = 0) -> None:
        """Put back the parameters, the last first, but for the first `to`."""
        while len(self._before) > to:
            module, name, parameter = self._before.pop()
            module._parameters[name] = parameter

    def changed(self, since: int) -> list[tuple[nn.Module, str]]:
        """Return the modules and names of the parameters replaced after the first `since`."""
        return [(module, name) for module, name, _ in self._before[since:]]

    def __len__(self) -> int:
        return len(self._before)


@dataclass
class Fold:
    """Layers that read one input, and what makes it.

    Args:
        writer: a norm, or a linear layer of which `rows` are the input.
        readers: of that input, all of them.
        heads: (key-value heads, queries of each, size of a head) where the input is attention's:
            queries of one key-value head share the scale of its rows.
    """

    writer: nn.Module
    readers: list[Target]
    rows: slice | None = None
    heads: tuple[int, int, int] | None = None
    offset: float = 0.0  # what a norm adds to its weight: Gemma's multiply by 1 + weight

    def shared(self, scale: Tensor) -> Tensor:
        """Return scales [K] like `scale` that the writer can take: queries share the largest."""
        if self.heads is None:
            return scale
        return scale.reshape(self.heads).amax(1, keepdim=True).expand(self.heads).flatten()

    def divisor(self, scale: Tensor) -> Tensor:
        """Return by what to divide the writer: one number for each entry, or row, that it has."""
        if self.rows is None:
            return scale
        by = scale.new_ones(_outputs(self.writer))
        by[self.rows] = scale if self.heads is None else scale.view(self.heads)[:, 0].flatten()
        return by

    def apply(self, scale: Tensor, journal: Journal) -> None:
        """Fold scales [K], which `shared` has made, into writer and readers."""
        for target in self.readers:
            by = scale[:, None] if is_conv1d(target.module) else scale
            journal.scale(target.module, "weight", by.mul)
        writer, by = self.writer, self.divisor(scale)
        journal.scale(writer, "weight", lambda weight: divided(writer, weight, by, self.offset))
        journal.scale(writer, "bias", lambda bias: divided(writer, bias, by))


def divided(writer: nn.Module, value: Tensor, by: Tensor, offset: float = 0.0) -> Tensor:
    """Return the weight or bias of a norm or linear layer, each entry or row divided by its own.

    `offset` is what a norm adds to its weight.
    """
    if value.dim() == 2 and not is_conv1d(writer):
        by = by[:, None]
    return (value + offset) / by - offset


def find_folds(block: nn.Module, call: Call, groups: list[list[Target]]) -> list[Fold]:
    """Return where the inputs of layers of `block` can be scaled, each tried with trial scales.

    Args:
        block: that runs without gradients.
        call: what it is called with.
        groups: the layers whose inputs may be scaled, by shared weight.
    """
    plain = {
        id(g[0].module): g[0]
        for g in groups
        if len(g) == 1 and (isinstance(g[0].module, nn.Linear) or is_conv1d(g[0].module))
    }
    before = _tensors(block(*call[0], **call[1]))
    folds = _between_linears(block, plain) + _after_norms(block, call, plain)
    return [fold for fold in folds if _holds(fold, block, call, before)]


def _holds(fold: Fold, block: nn.Module, call: Call, before: list[Tensor]) -> bool:
    K = _inputs(fold.readers[0].module)
    # Powers of two, so that a right fold changes no bit but where a norm adds to its weight.
    trial = 2.0 ** (torch.arange(K) * 7 % 5 - 2).float()
    for offset in (0.0, 1.0) if fold.rows is None else (0.0,):
        fold.offset = offset
        journal = Journal()
        try:
            fold.apply(fold.shared(trial.to(before[0].device)), journal)
            after = _tensors(block(*call[0], **call[1]))
        finally:
            journal.undo()
        if all(_same(a, b) for a, b in zip(after, before, strict=True)):
            return True
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    error, size = (a.double() - b.double()).norm(), b.double().norm()
    return bool(error <= size * torch.finfo(b.dtype).eps ** 0.5)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for entry in output for tensor in _tensors(entry)]
    return []


def _inputs(linear: nn.Module) -> int:
    weight = linear.get_parameter("weight")
    return weight.shape[0] if is_conv1d(linear) else weight.shape[1]


def _outputs(linear: nn.Module) -> int:
    weight = linear.get_parameter("weight")
    return weight.shape[1] if is_conv1d(linear) else weight.shape[0]


def _after_norms(block: nn.Module, call: Call, plain: dict[int, Target]) -> list[Fold]:
    """Return the norms whose output is, as the same tensor, the input of linear layers."""
    made: list[tuple[Tensor, nn.Module]] = []
    read: list[tuple[Tensor, Target]] = []

    def note_norm(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((output, module))

    with ExitStack() as stack:
        for module in block.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1 and not module._modules:
                stack.callback(module.register_forward_hook(note_norm).remove)
            target = plain.get(id(module))
            if target is not None:

                def note(_m: nn.Module, args: Any, target: Target = target) -> None:
                    read.append((args[0], target))

                stack.callback(module.register_forward_pre_hook(note).remove)
        block(*call[0], **call[1])
    folds = []
    for output, norm in made:
        readers = [target for x, target in read if x is output]
        if readers and sum(m is norm for _, m in made) == 1:
            folds.append(Fold(norm, readers))
    return folds


def _between_linears(block: nn.Module, plain: dict[int, Target]) -> list[Fold]:
    folds: dict[int, Fold] = {}
    for module in block.modules():
        for mlp in layouts.MLP:
            path, copies = mlp.up[-1]
            up, down = layouts.child(module, path), layouts.child(module, mlp.down)
            if id(up) in plain and id(down) in plain and up is not None and down is not None:
                K = _inputs(down)
                if _outputs(up) == K * copies:
                    rows = slice(K * (copies - 1), K * copies)
                    folds.setdefault(id(down), Fold(up, [plain[id(down)]], rows))
        for attention in layouts.ATTENTION:
            fold = _attention(module, attention, plain)
            if fold is not None:
                folds.setdefault(id(fold.readers[0].module), fold)
    return list(folds.values())


def _attention(
    module: nn.Module, layout: layouts.AttentionLayout, plain: dict[int, Target]
) -> Fold | None:
    path, kinds = next((path, kinds) for path, kinds in layout.projections if "v" in kinds)
    value, output = layouts.child(module, path), layouts.child(module, layout.output)
    if value is None or output is None or id(value) not in plain or id(output) not in plain:
        return None
    K = _inputs(output)
    queries = kinds.count("q")
    size = (_outputs(value) - queries * K) // (len(kinds) - queries)
    before = sum(K if kind == "q" else size for kind in kinds[: kinds.index("v")])
    if size <= 0 or K % size or _outputs(value) != queries * K + size * (len(kinds) - queries):
        return None
    owner = layouts.child(module, path.rpartition(".")[0]) if "." in path else module
    dims = [d for a in layouts.HEAD_DIM if isinstance(d := getattr(owner, a, None), int)]
    head = dims[0] if dims else size if size == K else 0
    if not head or size % head:
        return None
    heads = (size // head, K // size, head)
    return Fold(value, [plain[id(output)]], slice(before, before + size), heads)
