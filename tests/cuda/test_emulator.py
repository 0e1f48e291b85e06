"""The emulator of CUDA: it catches what it says, in small kernels and in ours with planted bugs."""

from __future__ import annotations

import ctypes
import functools
import shutil
from pathlib import Path

import pytest
import torch

from llmq.formats import semi_structured
from tests.cuda_emulator import emulator
from tests.helpers import generator

PROBES = {
    "fine": None,
    "divergent": "lanes diverge: sync_warp here, lane 0 at sync_warp",
    "lonely_barrier": "threads wait for others that never come",
    "unwritten": "shared memory is read that was never written",
    "warp_race": "no barrier between a write of thread",
    "odd_address": "global address is odd",
}


@functools.cache
def probes() -> ctypes.CDLL:
    loaded = emulator.load(
        [emulator.HERE / "probes.cu"], emulator.ROOT / "build/cuda_emulator_probes/probes.so"
    )
    loaded.run_probe.restype = loaded.run_strided.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("name", PROBES)
def test_what_is_luck_on_a_gpu_is_an_error(name: str) -> None:
    memory = {"in": torch.arange(64, dtype=torch.int32), "out": torch.zeros(64, dtype=torch.int32)}
    arguments = (
        list(PROBES).index(name),
        *(ctypes.c_void_p(t.data_ptr()) for t in memory.values()),
    )
    if PROBES[name] is None:
        emulator.launch(probes(), "run_probe", *arguments, memory=memory)
        assert torch.equal(memory["out"], memory["in"] & ~1)
        return
    with pytest.raises(RuntimeError, match=PROBES[name]):
        emulator.launch(probes(), "run_probe", *arguments, memory=memory)


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(1, 4, 1), (2, 8, 2), (32, 32, 32)])
def test_conflicts_and_uncoalesced_loads_are_counted(
    stride: int, sectors: int, wavefronts: int
) -> None:
    memory = {"in": torch.arange(32 * stride, dtype=torch.int32)}
    # Sectors are 32 bytes from a multiple of 32: torch's memory begins at one of 64.
    memory["out"] = torch.zeros(32, dtype=torch.int32)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in memory.values())
    counters = emulator.launch(probes(), "run_strided", stride, *pointers, memory=memory)
    assert torch.equal(memory["out"], memory["in"][::stride])
    assert counters.global_requests == 2
    assert counters.global_sectors == sectors + 4
    assert counters.shared_wavefronts == 2 * wavefronts
    assert counters.shared_ideal_wavefronts == 2


# What is replaced in the kernels' source, by what, and what the emulator says.
BUGS = {
    "none": ("", "", None),
    "a barrier is dropped": (
        "ptx::barrier();  // the chunk is there for all, and all have read the one before",
        "",
        "no barrier between|never written",
    ),
    "the tail is one too long": (
        "return token_of(i) < g.M &&",
        "return token_of(i) <= g.M &&",
        "out of bounds: .* past x_scale",
    ),
    "one group too few is waited for": (
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        "shared memory is read before cp.async was waited for",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, tmp_path: Path) -> None:
    old, new, message = BUGS[bug]
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(emulator.CUDA, folder)
    changed = 0
    for path in folder.glob("*.cuh"):
        text = path.read_text()
        if old and old in text:
            path.write_text(text.replace(old, new))
            changed += 1
    assert changed == (1 if old else 0), "the line that this test breaks is no longer there"
    loaded = emulator.load([folder / "int8_linear.cu"], tmp_path / "kernels.so", "-O0")

    M, N, K = 3, 16, 448
    codes = torch.randint(-127, 128, (M, K), generator=generator(1), dtype=torch.int8)
    weight = torch.randint(-127, 128, (N, K), generator=generator(2), dtype=torch.int8)
    memory = {"weight": weight}
    memory |= {"scale": torch.ones(N, 1), "x_scale": torch.ones(M, 1)}
    shape = {"N": N, "K": K, "dtype": torch.float32, "loaded": loaded}
    if message is None:
        y, _ = emulator.small_gemm("run_int8", codes, memory, **shape)
        assert torch.equal(y, (codes.int() @ weight.int().T).float())
        return
    with pytest.raises(RuntimeError, match=message):
        emulator.small_gemm("run_int8", codes, memory, **shape)


# What is replaced in the 2:4 kernels, by what, with which plan, and what the emulator says: "" is
# nothing, while the result is wrong. Plan 5 multiplies with wgmma.
SPARSE_BUGS = {
    "none": ("", "", 0, None),
    "lanes are mixed up": (
        *("+ lane % 2 * 8) + lane % 4 / 2", "+ lane % 4 / 2 * 8) + lane % 2", 0, ""),
    ),
    "steps are swapped": ("meta[r].word[step]", "meta[r].word[step ^ 1]", 0, ""),
    "none with wgmma": ("", "", 5, None),
    "lanes are mixed up with wgmma": (
        *("+ lane % 2 * 8) + lane % 4 / 2", "+ lane % 4 / 2 * 8) + lane % 2", 5, ""),
    ),
    "units are not side by side": ("kWgmma ? unit % 2 * 2 + unit / 2 : unit", "unit", 5, ""),
    "units are not swizzled": (
        *("row * kValueBytes + (unit ^ row / 2 % 4) * 16", "row * kValueBytes + unit * 16", 5, ""),
    ),
    "wgmma is not told of copies": (
        *("ptx::fence_proxy_async();", "", 5, "no fence.proxy.async and barrier between a write"),
    ),
    "wgmma is not fenced": ("ptx::wgmma_fence();", "", 5, "wgmma without wgmma.fence"),
    "copies come too early": (
        *(
            "copy(chunk + kStages - 1);\n      ptx::wgmma_wait",
            "copy(chunk + kStages);\n      ptx::wgmma_wait",
        ),
        *(5, "written while wgmma reads it"),
    ),
    "products are not waited for": (
        *("ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();", 5, "written while wgmma reads it"),
    ),
    "warpgroups read another's values": (
        *("stage + group_row * kValueBytes", "stage + row * kValueBytes", 5),
        "warps of a warpgroup issue different wgmma",
    ),
}


@pytest.mark.parametrize("bug", SPARSE_BUGS)
def test_planted_bugs_of_the_sparse_kernels_are_caught(bug: str, tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(emulator.CUDA, folder)
    source = folder / "semi_structured_linear.cu"
    old, new, plan, message = SPARSE_BUGS[bug]
    assert old in source.read_text(), "the line that this test breaks is no longer there"
    if old:
        source.write_text(source.read_text().replace(old, new))
    loaded = emulator.load([source], tmp_path / "kernels.so", "-O0")

    M, N, K = 3, 16, 768
    codes = torch.randint(-127, 128, (M, K), generator=generator(1), dtype=torch.int8)
    dense = torch.randint(1, 128, (N, K), generator=generator(2), dtype=torch.int8)
    ranks = torch.rand(N, K // 4, 4, generator=generator(3)).argsort(-1).argsort(-1)
    dense *= (ranks < 2).flatten(1)
    stored = semi_structured.encode(dense)
    memory = {"weight": stored.weight, "meta": stored.weight_meta}
    memory |= {"scale": torch.ones(N, 1), "x_scale": torch.ones(M, 1)}
    shape = {"dtype": torch.float32, "plan": plan, "loaded": loaded}
    if message:
        with pytest.raises(RuntimeError, match=message):
            emulator.semi_structured(codes, memory, **shape)
        return
    y, _ = emulator.semi_structured(codes, memory, **shape)
    assert torch.equal(y, (codes.int() @ dense.int().T).float()) == (message is None)
