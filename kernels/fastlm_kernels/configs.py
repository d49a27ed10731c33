"""Launch configurations: tables by (architecture, shape bucket), looked up by functions anyone can call.

An architecture without a table of its own uses "generic", which fits every supported one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows x `block_n` columns worked on by `num_warps` warps.

    num_stages  tiles in flight in a program that walks several: all but one of them in shared memory
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


RowTable = dict[str, tuple[RowConfig, ...]]

# Sorted by block_n: the first that holds a whole row is used, so that the row is read once and stays in registers.
# 8 elements a thread are one 16-byte load in 16 bits and two in 32; 16 a thread spill in several binaries.
_WHOLE_ROWS = (
    RowConfig(16, 64, 4),
    RowConfig(8, 128, 4),
    RowConfig(4, 256, 4),
    RowConfig(2, 512, 4),
    RowConfig(1, 1024, 4),
    RowConfig(1, 2048, 8),
    RowConfig(1, 4096, 16),
    RowConfig(1, 8192, 32),
)
# A wavefront has 64 lanes there: half as many make the same threads, and 1024 threads are the limit.
_WHOLE_ROWS_GFX942 = tuple(RowConfig(c.block_m, c.block_n, c.num_warps // 2) for c in _WHOLE_ROWS)


def _in_flight(rows: tuple[RowConfig, ...]) -> tuple[RowConfig, ...]:
    """The same tiles for a program that walks many rows, two more of them on their way, one more of the widest.

    A multiprocessor of an H200 must have 26 KB in flight to read at full speed; 16 warps at one row of 768 each,
    x and dy in 16 bits, have 12 KB.
    """
    return tuple(replace(c, num_stages=3 if c.block_n <= 2048 else 2 if c.block_n <= 4096 else 1) for c in rows)


NORM_FORWARD: RowTable = {"generic": _WHOLE_ROWS, "gfx942": _WHOLE_ROWS_GFX942}
NORM_BACKWARD: RowTable = {"generic": _in_flight(_WHOLE_ROWS), "gfx942": _in_flight(_WHOLE_ROWS_GFX942)}
# A bias gradient is one more sum to hold: at 8192 columns 64 registers a thread are too few on sm_100 and sm_120, and
# with tensors of two dtypes, whose loads differ in width, on every NVIDIA architecture.
NORM_BACKWARD_BIAS: RowTable = {
    "generic": NORM_BACKWARD["generic"][:-1],
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90"), NORM_BACKWARD["generic"]),
    "gfx942": NORM_BACKWARD["gfx942"],
}
NORM_BACKWARD_BIAS_MIXED: RowTable = {
    "generic": NORM_BACKWARD["generic"][:-1],
    "gfx942": NORM_BACKWARD["gfx942"],
}
# Without this the assembler stops at 32 to 96 and spills 8 or 16 bytes in some binaries; none of them needs more.
NORM_REGISTERS = 128

# Rows longer than any table's are walked in blocks of this many columns.
LONG_ROW = RowConfig(1, 4096, 16)
# Weight gradients of such rows: a strip of columns, summed over a group of rows.
NORM_WEIGHT_GRADIENT = RowConfig(8, 128, 4)
# Sum of the partial weight gradients over the programs that made them.
SUM_PARTIALS = RowConfig(16, 64, 4)


def row_config(table: RowTable, architecture: str, columns: int) -> RowConfig:
    """The configuration for rows of `columns` elements on `architecture` ("sm_90", "gfx942", "generic")."""
    rows = table.get(architecture, table["generic"])
    return next((config for config in rows if config.block_n >= columns), LONG_ROW)


def programs_per_multiprocessor(config: RowConfig) -> int:
    """How many programs a multiprocessor should hold: 16 warps, at least two programs to hide latency."""
    return max(2, 16 // config.num_warps)
