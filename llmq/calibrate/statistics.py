"""What reaches linear layers: largest inputs, moments and a sample, summed up as data runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.stages import Stage
from llmq.models.targets import Target

ROWS = 512  # inputs of a layer that are kept as they are, for errors that moments do not tell


@dataclass
class Statistics:
    """Of the inputs x [rows, K] of layers that share them, streamed.

    Args:
        rows: inputs seen.
        largest: max|x| of each channel, float32 [K].
        absolute: Σ|x| of each channel, float32 [K].
        moments: Σ xᵀx, float32 [K, K], or its diagonal [K] where that is all that was asked for.
        sample: some of the inputs, evenly from each batch, float32 [≤ ROWS, K].
    """

    rows: int
    largest: Tensor
    absolute: Tensor
    moments: Tensor
    sample: list[Tensor] = field(default_factory=list)

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
        """Become the statistics of x / by, `by` [K] positive."""
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
) -> list[Statistics]:
    """Run a stage's calls and return the statistics of each group's inputs.

    Args:
        stage: whose data runs.
        groups: layers that share one weight; groups that get the very same tensor (q/k/v) get the
            same object.
        full: whether to keep all second moments, not only their diagonal.
        sample: whether to keep some inputs as they are.

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
