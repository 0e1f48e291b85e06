"""What may be tuned of each kernel, the choice that needs no tuning, and tuned choices from JSON.

`choose` takes what was measured for this GPU, by `llmq tune` (a file of the user's) or in
`configs/<gpu>.json` here, and otherwise what follows from the sizes. It never measures.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class RowsConfig:
    """Of `quantize_rows`: rows and inputs of a row that a program holds at once."""

    ROWS: int
    BLOCK: int
    num_warps: int


def rows_config(size: int) -> RowsConfig:
    """Return the choice for rows (or groups) of `size` inputs.

    32 inputs a thread fill the registers that loads of 16 bytes can use; up to 16 warps.
    """
    BLOCK = min(1 << max(size - 1, 0).bit_length(), 1 << 15)
    ROWS = max(4096 // BLOCK, 1)
    return RowsConfig(ROWS, BLOCK, min(max(ROWS * BLOCK // 1024, 1), 16))


@dataclass(frozen=True)
class Config:
    """Of a GEMM kernel.

    Args:
        BLOCK_M, BLOCK_N, BLOCK_K: tokens, outputs and inputs of a tile.
        num_warps, num_stages: of a program; stages of K in flight.
        SPLITS: programs that share a tile's K.
        GROUP_M: rows of tiles that are walked together, so that they share weights in L2.
        TMA: whether tiles come by descriptors, where the tensors allow it.
        SPECIALIZE: whether loads and products run in warps of their own.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    SPLITS: int = 1
    GROUP_M: int = 8
    TMA: bool = False
    SPECIALIZE: bool = False

    def programs(self, M: int, N: int) -> int:
        """Tiles of y [M, N], times splits."""
        return -(-M // self.BLOCK_M) * -(-N // self.BLOCK_N) * self.SPLITS

    def grid(self, M: int, N: int, persistent: torch.device | None = None) -> tuple[int]:
        """One program a tile and split; no more than the GPU `persistent` has multiprocessors."""
        programs = self.programs(M, N)
        return (programs if persistent is None else min(programs, gpu(persistent)[1]),)

    def launch(self) -> dict[str, Any]:
        """Return what every GEMM kernel takes of this, by name.

        No fused multiply-add: the reference rounds products before it adds them.
        """
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "GROUP_M", "num_warps", "num_stages")
        fixed = {"SPLIT": self.SPLITS > 1, "enable_fp_fusion": False}
        return {name: getattr(self, name) for name in names} | fixed


# By family and generation of GPUs, from small tiles to large: (tokens from, to, tile). sm_90 and
# sm_100 have 227 KiB of shared memory; the rest is held to 99 KiB, which every GPU since sm_80 has.
# For few tokens a tile is deep rather than wide: 64 KB of weights in flight on a multiprocessor are
# what memory needs. Not yet measured.
_MANY = 1 << 62
TILES: dict[str, dict[int, tuple[tuple[int, int, Config], ...]]] = {
    "int8_gemm": {
        80: (
            (1, 16, Config(16, 64, 256, 4, 4)),
            (17, _MANY, Config(64, 64, 128, 4, 4)),
            (65, _MANY, Config(128, 128, 128, 8, 3)),
        ),
        90: (
            (1, 16, Config(16, 64, 256, 4, 4)),
            (17, _MANY, Config(64, 128, 128, 4, 4, TMA=True)),
            (65, _MANY, Config(128, 256, 128, 8, 4, TMA=True)),
        ),
        100: (
            (1, 16, Config(16, 64, 256, 4, 4)),
            (17, _MANY, Config(64, 128, 128, 4, 4)),
            (65, _MANY, Config(128, 128, 128, 4, 4, TMA=True, SPECIALIZE=True)),
        ),
    },
    "grouped_int8_gemm": {
        80: (
            (1, 16, Config(16, 64, 128, 4, 4)),
            (17, _MANY, Config(64, 64, 128, 4, 4)),
        ),
        90: (
            (1, 16, Config(16, 64, 128, 4, 4)),
            (17, _MANY, Config(64, 128, 128, 4, 4)),
            (65, _MANY, Config(128, 128, 128, 8, 4)),
        ),
    },
    "weight_only_gemm": {
        80: (
            (1, 16, Config(16, 32, 256, 2, 4)),
            (17, _MANY, Config(64, 64, 64, 4, 4)),
        ),
        90: (
            (1, 16, Config(16, 32, 256, 2, 4)),
            (17, _MANY, Config(64, 64, 128, 4, 4)),
            (65, _MANY, Config(128, 128, 64, 8, 4)),
        ),
    },
}
TILES["block_sparse_gemm"] = {
    80: ((1, 16, Config(16, 64, 128, 4, 4)), (17, _MANY, Config(128, 128, 64, 8, 3))),
    90: ((1, 16, Config(16, 64, 128, 4, 4)), (17, _MANY, Config(128, 128, 128, 8, 3))),
    100: ((1, 16, Config(16, 64, 128, 4, 4)), (17, _MANY, Config(128, 128, 64, 8, 3))),
}
TILES["bitmap_gemm"] = {
    column: ((1, 16, Config(16, 32, 128, 4, 2)), (17, _MANY, Config(64, 64, 64, 4, 2)))
    for column in (80, 90, 100)
}
TILES["weight_only_gemm"][100] = TILES["weight_only_gemm"][90]
TILES["grouped_int8_gemm"][100] = TILES["grouped_int8_gemm"][90][:2]  # the third one spills
SPLITTING = ("int8_gemm", "grouped_int8_gemm", "weight_only_gemm")  # those that can split K
LEAST_K = 32  # of a tile: what one int8 instruction takes
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def generation(capability: tuple[int, int]) -> int:
    """Return the column of the table: 80 (and what is like it, sm_120 too), 90 or 100."""
    return {9: 90, 10: 100}.get(capability[0], 80)


def within_group(config: Config, group: int) -> Config:
    """Return the config with BLOCK_K inside a group; 0 is no group."""
    if not group:
        return config
    divisor = group & -group  # the largest power of two that divides it
    if divisor < LEAST_K:  # masked steps
        divisor = 1 << max(group - 1, LEAST_K - 1).bit_length()
    return _thick_loads(replace(config, BLOCK_K=min(config.BLOCK_K, divisor)))


def _thick_loads(config: Config) -> Config:
    """Return the config with so few warps that each thread still loads 16 bytes of nibbles."""
    weights = config.BLOCK_N * config.BLOCK_K
    if config.BLOCK_M > 16:
        return config
    return replace(config, num_warps=min(config.num_warps, max(weights // 1024, 1)))


def for_float32(config: Config) -> Config:
    """Return the config for float32 inputs: three TF32 products hold their operands twice."""
    return replace(
        config,
        BLOCK_M=min(config.BLOCK_M, 32),
        BLOCK_N=min(config.BLOCK_N, 64),
        BLOCK_K=min(config.BLOCK_K, LEAST_K),
        num_warps=min(config.num_warps, 4),
        num_stages=min(config.num_stages, 3),
    )


def within_block(config: Config, R: int, C: int, group: int) -> Config:
    """Return the config with a tile inside an R × C block, and BLOCK_K inside a group where it can.

    The tile holds 16 rows and 32 inputs at least, part of them masked in smaller blocks.
    """
    BLOCK_N = min(config.BLOCK_N, 1 << max(R - 1, 15).bit_length())
    divisor = C & -C  # the largest power of two that divides it
    if divisor < LEAST_K:  # masked steps
        divisor = 1 << max(C - 1, LEAST_K - 1).bit_length()
    BLOCK_K = min(config.BLOCK_K, divisor)
    while group % BLOCK_K and BLOCK_K > LEAST_K:
        BLOCK_K //= 2
    return replace(config, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)


def heuristic(
    family: str, M: int, N: int, K: int, capability: tuple[int, int], sms: int, group: int = 0
) -> Config:
    """Return the choice that needs no tuning: the largest tile that leaves no multiprocessor idle.

    Where even the smallest for M does, K is split, each part 4 steps or more.
    """
    fitting = [c for low, high, c in TILES[family][generation(capability)] if low <= M <= high]
    full = [c for c in fitting if c.programs(M, N) >= sms]
    config = within_group((full or fitting[:1])[-1], group)
    if family not in SPLITTING:
        return config
    steps = (K // group if group else 1) * -(-(group or K) // config.BLOCK_K)
    splits = 1
    while splits < 16 and config.programs(M, N) * splits < sms and steps >= 8 * splits:
        splits *= 2
    return replace(config, SPLITS=splits)


def candidates(
    family: str, M: int, N: int, K: int, capability: tuple[int, int], group: int = 0
) -> list[Config]:
    """Return what `llmq tune` tries: every tile for M, one stage more or less, and splits of K."""
    found: list[Config] = []
    for low, high, tile in TILES[family][generation(capability)]:
        if not low <= M <= high:
            continue
        config = within_group(tile, group)
        splits = (1, 2, 4, 8) if M <= 64 and family in SPLITTING else (1,)
        deep = [n for n in splits if n == 1 or 2 * n * config.BLOCK_K <= K]
        found += [
            replace(config, num_stages=config.num_stages + more, SPLITS=n)
            for more in (-1, 0, 1)
            for n in deep
        ]
    return found


@functools.cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int, str]:
    """Return compute capability, multiprocessors and name; a small stand-in where interpreted."""
    if device.type != "cuda":
        return (8, 0), 4, "interpreter"
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count, found.name


@functools.lru_cache(4096)
def choose(family: str, M: int, N: int, K: int, device: torch.device, group: int = 0) -> Config:
    """Return the tuned choice for this GPU and size where there is one, else `heuristic`'s."""
    capability, sms, name = gpu(device)
    for tuned in _tuned(name):
        same = (tuned["family"], tuned["N"], tuned["K"], tuned["group"]) == (family, N, K, group)
        if same and tuned["M"] >= M:
            return Config(**tuned["config"])
    return heuristic(family, M, N, K, capability, sms, group)


def tuned_file(name: str) -> Path:
    """Return where `llmq tune` keeps what it found for a GPU of that name."""
    cache = Path(os.environ.get("LLMQ_CACHE") or Path.home() / ".cache" / "llmq")
    return cache / "tuned" / _file_name(name)


def _file_name(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


@functools.cache
def _tuned(name: str) -> tuple[dict[str, Any], ...]:
    """Return what was tuned, by ascending M: the user's file, or else the one that comes along."""
    for file in (tuned_file(name), Path(__file__).parent / "configs" / _file_name(name)):
        if file.exists():
            entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
            return tuple(sorted(entries, key=lambda entry: entry["M"]))
    return ()


def save_tuned(name: str, entries: list[dict[str, Any]], record: dict[str, Any]) -> Path:
    """Write the choices tuned for a GPU, with a `record` of how, and use them from now on."""
    file = tuned_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**record, "gpu": name, "entries": entries}, indent=1) + "\n")
    os.replace(partial, file)
    _tuned.cache_clear()
    choose.cache_clear()
    return file


def as_json(config: Config) -> dict[str, Any]:
    """Return the fields of a config."""
    return asdict(config)
