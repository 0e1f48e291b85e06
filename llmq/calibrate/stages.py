"""Runs data through a model block by block, and gathers what reaches its linear layers.

The calls of one block are kept at a time: those of the next are found by running the model again up
to it, with the blocks before standing for what they gave, as already compressed. So each block is
compressed for the inputs that it will get, as in GPTQ (Frantar et al., arXiv:2210.17323, section
3.3), in memory for the model and one block's activations. No model's code needs to be known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.models.blocks import blocks, constant, running
from llmq.models.targets import Target

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward


@dataclass
class Stage:
    """A part of a model that is compressed at a time, and what each batch calls it with."""

    name: str  # of a block; "" for all that is in no block, which is called with the batches
    module: nn.Module
    calls: list[Call]
    replayed: list[dict[str, Any]]  # by batch, outputs of blocks that need not run again

    def run(self) -> Iterator[Any]:
        """Give the part's output of each batch, as the part is now."""
        for call, outputs in zip(self.calls, self.replayed, strict=True):
            with _replaying(self.module, outputs):
                yield self.module(*call[0], **call[1])


def stages(model: nn.Module, batches: list[Call], what: str = "calibrate") -> Iterator[Stage]:
    """Give the parts of `model` in the order in which they run; change each before the next.

    Args:
        model: in evaluation mode; runs without gradients.
        batches: what the model is called with.
        what: on the progress bar.

    Raises:
        ValueError: if the data gives a block NaN or infinite inputs.
    """
    order = _order(model, batches[0])
    replayed: list[dict[str, Any]] = [{} for _ in batches]
    with tqdm(total=len(order) + 1, desc=what, unit="block", delay=1, leave=False) as progress:
        for i, name in enumerate(order):
            block = model.get_submodule(name)
            calls = [
                _call_of(model, block, batch, outputs)
                for batch, outputs in zip(batches, replayed, strict=True)
            ]
            if not all(_finite(call) for call in calls):
                raise ValueError(
                    f"{name} gets NaN or infinite inputs from the data; check the data, or run "
                    f"the model in float32"
                )
            stage = Stage(name, block, calls, [{}] * len(calls))
            yield stage
            stage.module = model.get_submodule(name)  # itself a layer that was replaced, perhaps
            before = order[i - 1] if i else ""
            for output, outputs in zip(stage.run(), replayed, strict=True):
                outputs[name] = output
                if before.rpartition(".")[0] == name.rpartition(".")[0]:
                    outputs[before] = _poisoned(outputs[before])
            progress.update()
        yield Stage("", model, batches, replayed)
        progress.update()


class _Reached(Exception):  # noqa: N818
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call: Call = (args, kwargs)


def _call_of(model: nn.Module, block: nn.Module, batch: Call, outputs: dict[str, Any]) -> Call:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)

    try:
        with _replaying(model, outputs), running(block, stop):
            model(*batch[0], **batch[1])
    except _Reached as reached:
        return reached.call
    raise ValueError("a batch does not reach a block that the first batch reaches")


@contextmanager
def _replaying(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, output in outputs.items():
            stack.enter_context(running(model.get_submodule(name), constant(output)))
        yield


def _order(model: nn.Module, batch: Call) -> list[str]:
    """Return the blocks in the order in which they run; none, if they cannot be told apart.

    Each must run once, and read outputs of the block before it and of the last of another list
    (an encoder) only, so that the others need not be kept.
    """
    calls: list[str] = []
    outputs: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, block in blocks(model).items():

            def note(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
                calls.append(name)
                outputs[name] = output

            stack.callback(block.register_forward_hook(note).remove)
        model(*batch[0], **batch[1])
    order = [name for name in dict.fromkeys(calls) if calls.count(name) == 1]
    known: dict[str, Any] = {}
    for i, name in enumerate(order):
        if not _finite(_call_of(model, model.get_submodule(name), batch, known)):
            genuine = i == 0 or not _finite(outputs[order[i - 1]])
            return order if genuine else []
        known[name] = outputs[name]
        if i and order[i - 1].rpartition(".")[0] == name.rpartition(".")[0]:
            known[order[i - 1]] = _poisoned(outputs[order[i - 1]])
    return order


def _poisoned(value: Any) -> Any:
    """Return `value` with its floating-point tensors as NaN that take no memory."""
    return _mapped(value, lambda t: t.new_full((), torch.nan).expand(t.shape))


def _finite(value: Any) -> bool:
    """Whether the floating-point tensors in `value` hold no NaN; infinities stand in masks."""
    bad: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        bad.append(bool(tensor.isnan().any()))
        return tensor

    _mapped(value, note)
    return not any(bad)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        made = {key: _mapped(entry, change) for key, entry in value.items()}
        return type(value)(**made) if hasattr(value, "to_tuple") else made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


# -- what reaches linear layers --------------------------------------------------------------------

ROWS = 512  # inputs of a layer that are kept as they are, for errors that moments do not tell
_BINS = 1 << 15  # of Magnitudes
_INFINITE = 0x7F80  # the bin of infinity; NaN come after it


class Magnitudes:
    """A streaming histogram of |x|, of which any percentile can be asked.

    Bins are the upper 16 bits of a float32, its sign apart: 128 a power of two, from the smallest
    subnormal to the largest number, so that no range need be known beforehand and what was counted
    is never spread again (the logarithmic bins of DDSketch: Masson et al., arXiv:1908.10693,
    section 2.1). Counts are exact, so the parts and order of a stream change nothing. 256 KiB.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.largest = torch.zeros((), device=device)

    def add(self, x: Tensor) -> None:
        """Take in inputs x of any shape, in floating point."""
        if x.numel():
            magnitude = x.detach().float().abs().flatten()
            self.largest = torch.maximum(self.largest, magnitude.amax())
            bins = magnitude.view(torch.int32) >> 16
            self.counts += torch.bincount(bins, minlength=_BINS)

    def percentile(self, percent: float) -> float:
        """Return v such that `percent` % of all |x| are at most v, exactly max|x| at 100.

        With e the exact percentile, the least |x| that has `percent` % of all at or below it,
        e <= v < e (1 + 1/128); where e is subnormal, e <= v < e + 2^-133.

        Raises:
            ValueError: if `percent` is not in (0, 100], nothing was taken in, or not all of it
                was finite.
        """
        if not 0 < percent <= 100:
            raise ValueError(f"a percentile is in (0, 100], got {percent}")
        total = int(self.counts.sum())
        if not total or bool(self.counts[_INFINITE:].any()):
            what = "NaN or infinite inputs" if total else "no inputs"
            raise ValueError(f"no percentile: {what}")
        rank = math.ceil(percent * total / 100)
        place = int((self.counts.cumsum(0) < rank).sum())
        # The largest number of the bin; above all that was seen, it would bound nothing closer.
        edge = torch.tensor((place << 16) | 0xFFFF, dtype=torch.int32).view(torch.float32)
        return min(float(edge), float(self.largest))


@dataclass
class Statistics:
    """Of the inputs x [rows, K] of layers that share them, streamed.

    Args:
        rows: inputs seen.
        largest: max|x| of each channel, float32 [K].
        absolute: Σ|x| of each channel, float32 [K].
        moments: Σ xᵀx, float32 [K, K], or its diagonal [K] where that is all that was asked for.
        sample: some of the inputs, evenly from each batch, float32 [≤ ROWS, K].
        magnitudes: of all channels together, where asked for.
    """

    rows: int
    largest: Tensor
    absolute: Tensor
    moments: Tensor
    sample: list[Tensor] = field(default_factory=list)
    magnitudes: Magnitudes | None = None

    @classmethod
    def empty(cls, K: int, device: torch.device, *, full: bool) -> Statistics:
        """Return statistics of no inputs."""
        zeros = torch.zeros(K, device=device)
        moments = torch.zeros(K, K, device=device) if full else zeros.clone()
        return cls(0, zeros, zeros.clone(), moments)

    def add(self, x: Tensor, keep: int) -> None:
        """Take in inputs x [..., K], of which `keep` are kept as they are."""
        x = x.reshape(-1, x.shape[-1]).float()
        if x.shape[0] == 0:
            return
        self.rows += x.shape[0]
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.absolute += x.abs().sum(0)
        if self.moments.dim() == 2:
            self.moments.addmm_(x.T, x)
        else:
            self.moments += x.square().sum(0)
        if self.magnitudes is not None:
            self.magnitudes.add(x)
        if keep:
            step = max(1, x.shape[0] // keep)
            self.sample.append(x[::step][:keep].clone())

    @property
    def squares(self) -> Tensor:
        """Σ x² of each channel, float32 [K]."""
        return self.moments.diagonal() if self.moments.dim() == 2 else self.moments

    def inputs(self) -> Tensor:
        """Return the sample as one tensor, float32 [≤ ROWS, K]."""
        return torch.cat(self.sample)

    def scale(self, by: Tensor) -> None:
        """Become the statistics of x / by, `by` [K] positive; `magnitudes` cannot."""
        self.magnitudes = None
        self.largest = self.largest / by
        self.absolute = self.absolute / by
        self.moments = self.moments / by / (by[:, None] if self.moments.dim() == 2 else by)
        self.sample = [x / by for x in self.sample]

    def check(self, name: str) -> None:
        """Raise `ValueError` naming the layer if an input was NaN or infinite."""
        if not bool(torch.isfinite(self.largest).all()):
            raise ValueError(
                f"{name} gets NaN or infinite inputs from the data; check the data, or run the "
                f"model in float32"
            )


def gather(
    stage: Stage,
    groups: list[list[Target]],
    *,
    full: bool,
    sample: bool = False,
    magnitudes: bool = False,
) -> list[Statistics]:
    """Run a stage's calls and return the statistics of each group's inputs.

    Args:
        stage: whose data runs.
        groups: layers that share one weight; groups that get the very same tensor (q/k/v) get the
            same object.
        full: whether to keep all second moments, not only their diagonal.
        sample: whether to keep some inputs as they are.
        magnitudes: whether to count |x|, for percentiles.

    Raises:
        ValueError: naming the layer that gets NaN or infinite inputs.
    """
    found: dict[int, Statistics] = {}
    previous: dict[str, Any] = {"x": None, "group": -1}
    keep = -(-ROWS // len(stage.calls)) if sample else 0
    alone = [len(group) == 1 for group in groups]

    def note(i: int, x: Tensor) -> None:
        # The first call tells who shares: later ones follow it, and sum up once.
        if i not in found:
            other = previous["group"]
            shares = x is previous["x"] and alone[i] and alone[other]
            K = x.shape[-1]
            found[i] = found[other] if shares else Statistics.empty(K, x.device, full=full)
            if magnitudes and not shares:
                found[i].magnitudes = Magnitudes(x.device)
        if x is not previous["x"] or found[i] is not found[previous["group"]]:
            found[i].add(x.detach(), keep)
        previous.update(x=x, group=i)

    with ExitStack() as stack:
        for i, group in enumerate(groups):
            for target in group:

                def hook(_m: nn.Module, args: Any, kwargs: dict[str, Any], i: int = i) -> None:
                    note(i, args[0] if args else next(iter(kwargs.values())))

                handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for _ in stage.run():
            previous.update(x=None)
    for i, statistics in found.items():
        statistics.check(groups[i][0].name)
    return [
        found.get(i) or Statistics.empty(0, torch.device("cpu"), full=full)
        for i in range(len(groups))
    ]
