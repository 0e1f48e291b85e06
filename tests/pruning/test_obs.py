"""GPTQ and SparseGPT against brute force, least squares and the papers' equations as they stand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmq.formats import codebook, uniform
from llmq.pruning import magnitude, obs, sparsegpt, wanda
from llmq.quantization import clip, gptq
from llmq.scheme import Scheme, parse_pattern, resolve_scheme
from tests.helpers import assert_equal, assert_raises, generator

W4 = Scheme(bits=4, granularity="group", group_size=8, symmetric=False)


def data(N: int, K: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, correlated inputs with channels of uneven size, and their second moments."""
    g = generator(seed)
    weight = torch.randn(N, K, generator=g)
    x = torch.randn(rows, K, generator=g) @ (torch.eye(K) + torch.randn(K, K, generator=g) / K**0.5)
    x = x * torch.logspace(-1, 1, K)[torch.randperm(K, generator=g)]
    return weight, x, x.T @ x


def loss(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float(((before - after) @ x.T).double().square().sum())


def decoded(coded: uniform.UniformWeight, K: int, bits: int = 4) -> Tensor:
    return uniform.decode(*coded, bits=bits, K=K)


def test_factor_is_of_the_inverse() -> None:
    H = data(1, 24, 100)[2]
    U = obs.inverse_factor(H).double()
    assert torch.equal(U, U.triu())
    damped = H.double() + obs.DAMPING * H.diagonal().mean() * torch.eye(24)
    # float32 U: relative rounding 2^-24 of each of 24 products, times the condition of H
    room = 24 * 2**-24 * torch.linalg.cond(damped)
    assert torch.dist(U.T @ U @ damped, torch.eye(24, dtype=torch.float64)) < room


def test_damping_grows_until_it_holds() -> None:
    # Far from positive definite, as sums in low precision may be: 1 % of the mean is not enough.
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.5
    assert torch.isfinite(obs.inverse_factor(H)).all()
    assert_raises(lambda: obs.inverse_factor(H * torch.nan), ValueError, "not finite")


def test_gptq_as_published() -> None:
    """One weight at a time by equations 2 and 3 of the paper, H⁻¹ downdated, no Cholesky."""
    N, K = 5, 16
    weight, _, H = data(N, K, 200)
    scale, zero = clip.clipped_grid(weight, W4, H.diagonal())
    assert zero is not None
    scales, zeros = (t.repeat_interleave(8, 1).double() for t in (scale, zero))
    order = H.diagonal().argsort(descending=True).tolist()
    inverse = torch.linalg.inv(
        H.double() + obs.DAMPING * H.diagonal().double().mean() * torch.eye(K)
    )
    W = weight.double().clone()
    left = list(order)
    for q in order:
        steps = (W[:, q] / scales[:, q]).round() + zeros[:, q]
        value = (steps.clamp(0, 15) - zeros[:, q]) * scales[:, q]
        error = (W[:, q] - value) / inverse[q, q]
        left.remove(q)
        for p in left:
            W[:, p] -= error * inverse[q, p]
        W[:, q] = value
        inverse = inverse - inverse[:, q : q + 1] @ inverse[q : q + 1, :] / inverse[q, q]
    actual = decoded(gptq.encode(weight, H, W4), K)
    assert torch.allclose(actual.double(), W, rtol=1e-6, atol=1e-6)


def test_gptq_beside_brute_force() -> None:
    """Of all 16³ roundings of each row none is better than GPTQ's by much, and nearest is worse."""
    N, K = 12, 3
    scheme = Scheme(bits=4, granularity="channel")
    weight, x, H = data(N, K, 64)
    x[:, 1] = 0.9 * x[:, 0] + 0.1 * x[:, 1]
    H = x.T @ x
    scale, _ = clip.clipped_grid(weight, scheme, H.diagonal())
    levels = torch.tensor(list(itertools.product(range(-8, 8), repeat=K))).float()
    pairs = zip(weight, scale, strict=True)
    errors = torch.stack([((w - levels * s) @ x.T).square().sum(1) for w, s in pairs])
    best = float(errors.amin(1).sum())
    ours = loss(x, weight, decoded(gptq.encode(weight, H, scheme), K))
    nearest = loss(x, weight, decoded(uniform.on_grid(weight, scale, None, bits=4), K))
    assert best <= ours * (1 + 1e-5)
    assert ours < 1.5 * best < nearest


@pytest.mark.parametrize("name", ["w8a8", "w8a16-quantile", "w4a16-g32", "w4a16-quantile-g32"])
def test_gptq_beats_nearest_in_every_format(name: str) -> None:
    scheme = resolve_scheme(name)
    weight, x, H = data(32, 192, 512)
    coded = gptq.encode(weight, H, scheme)
    if scheme.method == "quantile":
        assert isinstance(coded, codebook.CodebookWeight)
        shape = {"granularity": scheme.granularity, "group_size": scheme.group_size}
        plain = codebook.decode(
            *codebook.encode(weight, bits=scheme.bits, **shape), bits=scheme.bits, K=192
        )
        ours = codebook.decode(*coded, bits=scheme.bits, K=192)
    else:
        assert isinstance(coded, uniform.UniformWeight)
        shape = {"granularity": scheme.granularity, "group_size": scheme.group_size}
        nearest = uniform.encode(weight, bits=scheme.bits, **shape, symmetric=scheme.symmetric)
        plain = decoded(nearest, 192, scheme.bits)
        ours = decoded(coded, 192, scheme.bits)
    assert loss(x, weight, ours) < 0.6 * loss(x, weight, plain)
    assert_equal(gptq.encode(weight, H, scheme).weight, coded.weight, "again")


def test_dead_inputs_are_rounded_to_nearest() -> None:
    weight, x, _ = data(6, 16, 100)
    x[:, [3, 9]] = 0
    H = x.T @ x
    scale, zero = clip.clipped_grid(weight, W4, H.diagonal())
    expected = decoded(uniform.on_grid(weight, scale, zero, bits=4), 16)
    actual = decoded(gptq.encode(weight, H, W4), 16)
    assert_equal(actual[:, [3, 9]], expected[:, [3, 9]], "dead inputs")
    no_data = gptq.encode(weight, torch.zeros(16, 16), W4)
    assert torch.isfinite(no_data.weight_scale).all()


def test_clipped_grid_is_the_best_of_its_ranges() -> None:
    weight, _, H = data(7, 32, 100)
    weight[0, 0] = 30.0
    importance = H.diagonal()

    def error(grid: tuple[Tensor, Tensor | None]) -> Tensor:
        coded = uniform.on_grid(weight, *grid, bits=4)
        squares = (decoded(coded, 32) - weight).square() * importance
        return squares.reshape(7, 4, 8).sum(-1)

    best = error(clip.clipped_grid(weight, W4, importance))
    low, high = weight.reshape(7, 4, 8).aminmax(dim=-1)
    for part in torch.linspace(1, 0.5, 9):
        grid = uniform.grid(low * part, high * part, bits=4, symmetric=False)
        assert (best <= error(grid) * (1 + 1e-5)).all()
    assert best.sum() < 0.95 * error(clip.grid(weight, W4)).sum()


def test_sparsegpt_is_least_squares() -> None:
    """With one threshold for all inputs, each row's rest is what least squares would give it.

    The update of the solver sees only inputs to the right; with what goes all to the left, that
    is every one that stays.
    """
    N, K, gone = 6, 12, 5
    weight, x, H = data(N, K, 300)
    kept = torch.ones(N, K, dtype=torch.bool)
    kept[:, :gone] = False
    changed, _ = obs.solve(weight, obs.inverse_factor(H, 1e-7), kept=kept)
    fitted = torch.linalg.lstsq(x[:, gone:].double(), (x @ weight.T).double()).solution.T
    assert torch.allclose(changed[:, gone:].double(), fitted, rtol=1e-3, atol=1e-3)
    assert not changed[:, :gone].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block-4x8"])
def test_better_pruning_loses_less(pattern: str) -> None:
    parsed = parse_pattern(pattern)
    weight, x, H = data(32, 192, 600)
    masks = {
        "magnitude": magnitude.mask(weight, parsed, 0.5),
        "wanda": wanda.mask(weight, H.diagonal(), parsed, 0.5),
    }
    losses = {name: loss(x, weight, weight * mask) for name, mask in masks.items()}
    changed, mask = sparsegpt.prune(weight, H, parsed, 0.5)
    assert magnitude.pruned(mask) == magnitude.goal(weight, parsed, 0.5)
    assert not changed[~mask].any()
    losses["sparsegpt"] = loss(x, weight, changed)
    assert losses["sparsegpt"] < 0.9 * losses["wanda"] < 0.7 * losses["magnitude"]
    if pattern == "2:4":
        assert (mask.reshape(32, -1, 4).sum(2) == 2).all()
    again, same = sparsegpt.prune(changed, H, parsed, 0.5, kept=mask)
    assert_equal(same, mask, "mask of the second time")
    assert torch.allclose(again, changed, atol=1e-4)
    if pattern != "2:4":
        more = sparsegpt.prune(changed, H, parsed, 0.75, kept=mask)[1]
        assert not (more & ~mask).any()
        assert magnitude.pruned(more) == magnitude.goal(weight, parsed, 0.75)


def test_wanda_is_its_formula() -> None:
    weight, x, H = data(5, 12, 50)
    score = weight.abs() * torch.linalg.vector_norm(x, dim=0)
    kept = wanda.mask(weight, H.diagonal(), parse_pattern("unstructured"), 0.5)
    for row, mask in zip(score, kept, strict=True):
        assert set(row.argsort()[6:].tolist()) == set(mask.nonzero()[:, 0].tolist())


def test_joint_is_better_than_one_after_the_other() -> None:
    weight, x, H = data(32, 128, 512)
    scale = uniform.encode(weight, bits=8, granularity="channel").weight_scale[:, 0] * 16

    def round_to(values: Tensor, _: int) -> Tensor:
        return (values / scale).round() * scale

    pattern = parse_pattern("unstructured")
    joint, mask = sparsegpt.prune(weight, H, pattern, 0.5, round_to=round_to)
    assert torch.allclose((joint / scale[:, None]).round(), joint / scale[:, None], atol=1e-4)
    assert not joint[~mask].any()
    pruned = sparsegpt.prune(weight, H, pattern, 0.5)[0]
    rounded = (pruned / scale[:, None]).round() * scale[:, None]
    assert loss(x, weight, joint) < 0.9 * loss(x, weight, rounded)
