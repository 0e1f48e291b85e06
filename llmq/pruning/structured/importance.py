"""What structured pruning loses, by data: the outputs that go with a unit, and what can make up.

A head or channel is what it adds to the output of the layer after: with W_u [N, width] that layer's
columns of unit u and H_uu the second moments of their inputs, tr(W_u H_uu W_uᵀ) = Σ‖W_u x_u‖², the
structured form of Wanda's score (Sun et al., arXiv:2306.11695, equation 1). After some have gone,
the columns k that stay are fitted by least squares to the outputs that were,

    W_k = W H_:k (H_kk + λ)⁻¹

as OBS does for one weight (Hassibi and Stork, "Second order derivatives for network pruning", 1993)
and ZipLM for whole structures (Kurtić et al., arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmq.calibrate.blockwise import still
from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call, stages
from llmq.calibrate.statistics import Statistics, gather
from llmq.models.experts import SplitExperts
from llmq.models.targets import Target
from llmq.nn import dense_weight, is_conv1d
from llmq.pruning.obs import DAMPING
from llmq.pruning.structured.heads_and_channels import PrunableBlock, split_experts
from llmq.report import relative_error


def scores(model: nn.Module, blocks: list[PrunableBlock], calls: list[Call]) -> dict[str, Tensor]:
    """Return, by a block's name, each unit's share of the outputs, float64 [units].

    Experts that are one parameter are scored each, by its name in the layers that `SplitExperts`
    makes of them. Blocks and experts that no data reached are left out.
    """
    found: dict[str, Tensor] = {}

    def score(block: PrunableBlock, statistics: Statistics) -> None:
        part = block.slices[-1]
        weight = dense_weight(part.layer).double()
        columns = part.index(torch.arange(block.units)).to(weight.device)
        if part.width == 1:
            energy = weight.square().sum(0) * statistics.squares.double()
            units = energy[columns]
        else:
            energy = (weight.T @ weight) * statistics.moments.double()
            units = torch.stack(
                [energy[c][:, c].sum() for c in columns.reshape(block.units, part.width)]
            )
        found[block.name] = (units / units.sum().clamp_min(1e-30)).cpu()

    full = any(block.slices and block.slices[-1].width > 1 for block in blocks)
    _visit(model, blocks, calls, score, full=full, what="score")
    with _split(model, blocks) as inside:
        if inside:  # apart, as all second moments of many experts would take gigabytes
            _visit(model, inside, calls, score, full=False, what="score experts")
    return found


@contextmanager
def _split(model: nn.Module, blocks: list[PrunableBlock]) -> Iterator[list[PrunableBlock]]:
    """Put layers in the place of fused experts for a while; gives each expert's block."""
    fused = {id(block.fused): block for block in blocks if block.fused is not None}
    places = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if id(child) in fused
    ]
    inside = []
    try:
        for parent, attribute, child in places:
            assert child is not None
            split = SplitExperts.from_fused(child)
            setattr(parent, attribute, split)
            inside += split_experts(fused[id(child)].name, split)
        yield inside
    finally:
        for parent, attribute, child in places:
            setattr(parent, attribute, child)


def refit(
    model: nn.Module, blocks: list[PrunableBlock], calls: list[Call], journal: Journal
) -> dict[str, float]:
    """Fit the layers after what will go to the outputs that they had; zero the columns that go.

    Args:
        model: whose weights change, block by block.
        blocks: with `keep` set.
        calls: what the model is called with.
        journal: gets the weights as they were.

    Returns:
        ‖before − after‖ / ‖before‖ of the weights that were fitted, by layer name.
    """
    errors: dict[str, float] = {}

    def fit(block: PrunableBlock, statistics: Statistics) -> None:
        part = block.slices[-1]
        if not isinstance(part.layer, nn.Linear) and not is_conv1d(part.layer):
            return  # codes and masks stay what they are
        weight = dense_weight(part.layer).double()
        kept = part.index(block.keep).to(weight.device)
        H = statistics.moments.double()
        inner = H[kept][:, kept]
        inner.diagonal().add_(DAMPING * H.diagonal().mean() + 1e-30)
        fitted = torch.linalg.solve(inner, (weight @ H[:, kept]).T).T
        after = torch.zeros_like(weight).index_copy_(1, kept, fitted).float()
        errors[part.name] = relative_error(weight, after)
        value = after.T if is_conv1d(part.layer) else after
        journal.scale(part.layer, "weight", lambda _: value.contiguous())

    _visit(model, blocks, calls, fit, full=True, what="fit")
    return errors


def _visit(
    model: nn.Module,
    blocks: list[PrunableBlock],
    calls: list[Call],
    visit: Callable[[PrunableBlock, Statistics], None],
    *,
    full: bool,
    what: str,
) -> None:
    """Call `visit` with each block and the statistics of what the layer after it gets."""
    left = [block for block in blocks if block.slices]
    with still(model):
        for stage in stages(model, calls, what):
            own = [b for b in left if b.slices[-1].name.startswith(f"{stage.name}.".lstrip("."))]
            left = [b for b in left if b not in own]
            if not own:
                continue
            readers = [[Target(b.slices[-1].name, b.slices[-1].layer, "", [])] for b in own]
            for block, statistics in zip(own, gather(stage, readers, full=full), strict=True):
                if statistics.rows:
                    visit(block, statistics)
