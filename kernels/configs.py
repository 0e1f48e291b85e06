"""What may be tuned of each kernel, and the choice that needs no tuning."""

from __future__ import annotations

from dataclasses import dataclass


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
