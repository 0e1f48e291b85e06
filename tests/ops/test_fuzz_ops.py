"""Seeded fuzz of every native op: shapes, types, strides, groups, threads, instruction sets.

Each op runs on storage in canonical and in panel layout and is compared with its reference in
`llmq/ops`. A failure names the seed and the case; `-k OP-SEED` runs it again.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmq.formats import activation, bitmap, uniform
from llmq.ops.dense import CodebookLinear, Int8Linear, WeightOnlyLinear
from llmq.ops.sparse import BitmapSparseLinear
from tests.cpu.isas import DTYPES, ISA_FLAGS, available, float_tolerance, stored_tolerance
from tests.helpers import assert_within

ops = torch.ops.llmq
SEEDS = range(12)
CASES = 8  # a seed and op


class Draw(random.Random):
    """Choices of one case, so that every case follows from its seed alone."""

    def size(self, *tiles: int) -> int:
        """0 to 3, anything to 100, or one around a multiple of a tile."""
        near = self.choice(tiles) * self.randint(1, 3) + self.randint(-1, 1)
        return self.choice([self.randint(0, 3), self.randint(1, 100), near])

    def divisor(self, K: int) -> int:
        return self.choice([g for g in range(1, K + 1) if K % g == 0] or [0])

    def tensor(self, *shape: int) -> Tensor:
        """Normal values: contiguous, strided, transposed, offset or expanded."""
        layout = self.choice(["contiguous", "strided", "transposed", "offset", "expanded"])
        *rest, last = shape
        if layout == "strided":
            return torch.randn(*rest, 2 * last)[..., ::2]
        if layout == "transposed" and rest:
            return torch.randn(*rest[:-1], last, rest[-1]).mT
        if layout == "offset":
            return torch.randn(*rest, last + 1)[..., 1:]
        if layout == "expanded" and rest:
            return torch.randn(1, *rest[1:], last).expand(shape)
        return torch.randn(shape)

    def x(self, K: int) -> Tensor:
        leading = self.choice([(), (self.size(6, 12),), (self.size(6, 12),), (2, 3), (1, 2, 1)])
        rows = torch.tensor(10.0 ** self.uniform(-3, 1))
        return (self.tensor(*leading, K) * rows).to(self.choice(DTYPES))

    def bias(self, N: int) -> Tensor | None:
        return self.choice([None, self.tensor(N).to(self.choice(DTYPES))])

    def codes(self, N: int, K: int, low: int = -128, high: int = 128) -> Tensor:
        return torch.randint(low, high, (N, K), dtype=torch.int16).to(torch.int8)

    def scale(self, N: int, G: int) -> Tensor:
        return torch.rand(N, G) * 0.01 + 1e-4

    def static(self, group: int | None) -> Tensor | None:
        """A scale for all inputs, of much more than they are or much less; or None."""
        if group != 0:
            return None
        return self.choice([None, torch.tensor([10.0 ** self.uniform(-6, 2)])])


class Case(NamedTuple):
    """Arguments of an op in both layouts, and how its sums are scaled."""

    x: Tensor
    canonical: tuple[Any, ...]  # all arguments but x
    panels: tuple[Any, ...]
    steps: int | None  # groups that are added in float32 where activations are int8; else None


def _int8(draw: Draw) -> Case:
    N, K = draw.size(16, 64), draw.size(4, 8, 64)
    group = draw.choice([0, draw.divisor(K)])
    weight, scale, bias = draw.codes(N, K), draw.scale(N, 1), draw.bias(N)
    panels = ops.pack_panels(weight, 8)
    rest = (scale, bias, group, draw.static(group))
    return Case(draw.x(K), (weight, *rest), (panels, *rest), K // max(group, 1))


def _weight_only(draw: Draw) -> Case:
    N, K, bits = draw.size(16, 64), max(1, draw.size(4, 8, 64)), draw.choice([4, 8])
    G = K // draw.choice([K, draw.divisor(K)])
    group = draw.choice([None, 0, draw.divisor(K)])
    if bits == 8:
        weight, low, high = draw.codes(N, K), -128, 128
    else:
        weight, low, high = uniform.pack_int4(draw.codes(N, K, 0, 16).to(torch.uint8)), 0, 16
    zero_point = draw.choice([None, draw.codes(N, G, low, high)])
    rest = (draw.scale(N, G), zero_point, draw.bias(N), bits, group)
    panels = ops.pack_panels(weight, bits)
    steps = None if group is None else K
    return Case(draw.x(K), (weight, *rest), (panels, *rest), steps)


def _codebook(draw: Draw) -> Case:
    N, K, bits = draw.size(16, 64), max(1, draw.size(4, 8, 64)), draw.choice([4, 8])
    G = K // draw.choice([K, draw.divisor(K)])
    indices = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    weight = indices.view(torch.int8) if bits == 8 else uniform.pack_int4(indices)
    codebook = torch.randn(draw.choice([1, N]) if N else 1, 2**bits).sort().values
    rest = (codebook, draw.scale(N, G), draw.bias(N), bits)
    return Case(draw.x(K), (weight, *rest), (ops.pack_panels(weight, bits), *rest), None)


def _bitmap(draw: Draw) -> Case:
    N, K = draw.size(16, 64), draw.size(4, 8, 64)
    mask = torch.rand(N, K) >= draw.choice([0.0, 0.5, 0.9, 1.0])
    bias, group = draw.bias(N), draw.choice([None, 0, draw.divisor(K)])
    if draw.random() < 0.2:
        values = torch.randn(N, K).to(draw.choice(DTYPES))
        stored = (*bitmap.encode(values, mask), None, bias, None)
        return Case(draw.x(K), stored, stored, None)
    canonical = bitmap.encode(draw.codes(N, K), mask)
    panels = ops.pack_bitmap_panels(*canonical, K)
    rest = (draw.scale(N, 1), bias, group, draw.static(group))
    steps = None if group is None else K // max(group, 1)
    return Case(draw.x(K), (*canonical, *rest), (*panels, *rest), steps)


OPS: dict[str, tuple[Callable[[Draw], Case], Any]] = {
    "int8_linear": (_int8, Int8Linear),
    "weight_only_linear": (_weight_only, WeightOnlyLinear),
    "codebook_linear": (_codebook, CodebookLinear),
    "bitmap_sparse_linear": (_bitmap, BitmapSparseLinear),
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    isa, threads = ops.cpu_isa(), torch.get_num_threads()
    yield
    ops.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def test_every_instruction_set_that_the_library_runs_is_tested() -> None:
    runs = []
    for isa in ISA_FLAGS:
        with contextlib.suppress(ValueError):
            ops.set_cpu_isa(isa)
            runs.append(isa)
    assert runs == available()


def _describe(case: Case) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            return f"{kind}{list(value.shape)}/{list(value.stride())}"
        return repr(value)

    return ", ".join(text(value) for value in (case.x, *case.canonical))


def _tolerance(case: Case, reference: Any, expected: Tensor) -> Tensor:
    x, dense, bias = torch.atleast_2d(case.x), reference.dense(), reference.bias
    rows, flat = x.flatten(0, -2), torch.atleast_2d(expected).flatten(0, -2)
    if case.steps is None:
        tolerance = float_tolerance(rows, dense, bias, flat)
    else:
        # The dots are exact; each group's is rounded, scaled twice and added, then bias is. Codes
        # are within half a step of x: 2⁻⁷ of a row's largest value covers what rounding up adds.
        # Half a step of a scale that is given, likewise, which may be more than the row has.
        static = getattr(reference, "activation_scale", None)
        largest = rows.double().abs().amax(-1, keepdim=True) if rows.shape[1] else 0.0
        if static is not None:
            largest = (largest + 127 * static.double()).expand(len(rows), 1)
        magnitude = (rows.double().abs() + 2**-7 * largest) @ dense.double().abs().T
        magnitude = magnitude + (0 if bias is None else bias.double().abs())
        tolerance = (case.steps + 6) * 2**-24 * magnitude
        tolerance = stored_tolerance(tolerance, flat, x.dtype)
    return 2 * tolerance.reshape(expected.shape)  # the reference rounds as well


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", OPS)
def test_linear(op: str, seed: int) -> None:
    make, reference_class = OPS[op]
    for number in range(CASES):
        draw = Draw(f"{op} {seed} {number}")
        torch.manual_seed(draw.randrange(2**31))
        case = make(draw)
        reference = reference_class(case.x, *case.canonical)
        reference.check()
        expected = reference.reference()
        tolerance = _tolerance(case, reference, expected)
        for isa in available():
            ops.set_cpu_isa(isa)
            torch.set_num_threads(draw.randint(1, 2))
            for layout in ("canonical", "panels"):
                y = getattr(ops, op)(case.x, *getattr(case, layout))
                what = f"case {number} ({_describe(case)}), {isa}, {layout}"
                assert y.dtype == case.x.dtype, what
                assert_within(y, expected.double(), tolerance, what)


@pytest.mark.parametrize("seed", SEEDS)
def test_quantize_activation(seed: int) -> None:
    for number in range(4 * CASES):
        draw = Draw(f"quantize {seed} {number}")
        torch.manual_seed(draw.randrange(2**31))
        K = draw.size(4, 16, 64)
        x, group = draw.x(K), draw.choice([0, draw.divisor(K)])
        given = draw.static(group)
        if x.numel() and draw.random() < 0.3:
            x = x.contiguous()
            special = draw.choice([float("nan"), float("inf"), 1e-31, 6e4, -0.0])
            x.view(-1)[draw.randrange(x.numel())] = special
        codes, scale = activation.quantize_activation(x, group, given)
        for isa in available():
            ops.set_cpu_isa(isa)
            torch.set_num_threads(draw.randint(1, 2))
            what = f"case {number}: {x.dtype} {list(x.shape)}/{list(x.stride())} by {group}, {isa}"
            native_codes, native_scale = ops.quantize_activation(x, group, given)
            assert torch.equal(native_codes, codes), what
            assert torch.equal(native_scale.nan_to_num(-1), scale.nan_to_num(-1)), what


@pytest.mark.parametrize("seed", SEEDS)
def test_large_enough_for_threads(seed: int) -> None:
    """Past 2¹⁸ products, where work is cut among threads: one thread and two agree bit for bit."""
    draw = Draw(f"threads {seed}")
    torch.manual_seed(seed)
    M, N, K = draw.randint(1, 90), draw.randint(100, 300), 8 * draw.randint(20, 60)
    x = torch.randn(M, K).to(draw.choice(DTYPES))
    codes, scale = draw.codes(N, K), draw.scale(N, 1)
    kept = bitmap.encode(codes, torch.rand(N, K) > 0.5)
    panels, nibbles = ops.pack_panels(codes, 8), ops.pack_panels(codes[:, : K // 2], 4)
    calls: dict[str, Callable[[], Tensor]] = {
        "int8": lambda: ops.int8_linear(x, panels, scale),
        "weight-only": lambda: ops.weight_only_linear(x, panels, scale),
        "nibbles": lambda: ops.weight_only_linear(x, nibbles, scale, bits=4),
        "nibbles, codes": lambda: ops.weight_only_linear(
            x, nibbles, scale, bits=4, activation_group_size=8
        ),
        "codebook": lambda: ops.codebook_linear(x, panels, torch.linspace(-1, 1, 256)[None], scale),
        "bitmap": lambda: ops.bitmap_sparse_linear(
            x, *ops.pack_bitmap_panels(*kept, K), scale, None, 0
        ),
        "bitmap, static": lambda: ops.bitmap_sparse_linear(
            x, *ops.pack_bitmap_panels(*kept, K), scale, None, 0, torch.tensor([0.02])
        ),
        "bitmap, floats": lambda: ops.bitmap_sparse_linear(x, *kept, scale),
    }
    for isa in available():
        ops.set_cpu_isa(isa)
        for name, call in calls.items():
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(call())
            assert torch.equal(*results), f"{name}, {isa}, M={M} N={N} K={K} {x.dtype}"
