"""Launch configurations: tables by (architecture, shape bucket), looked up by functions anyone can call.

An architecture without a table of its own uses "generic", which fits every supported one.
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows x `block_n` columns worked on by `num_warps` warps."""

    block_m: int
    block_n: int
    num_warps: int


RowTable = dict[str, tuple[RowConfig, ...]]

# Sorted by block_n: the first that holds a whole row is used, so that the row stays in registers; longer rows
# are walked in blocks of the last. 8 to 32 elements a thread keep 16-byte loads in flight without spilling.
NORM_FORWARD: RowTable = {
    "generic": (
        RowConfig(32, 64, 4),
        RowConfig(16, 128, 4),
        RowConfig(8, 256, 4),
        RowConfig(4, 512, 4),
        RowConfig(2, 1024, 4),
        RowConfig(1, 2048, 4),
        RowConfig(1, 4096, 8),
        RowConfig(1, 8192, 16),
        RowConfig(1, 16384, 16),
    ),
}

# The backward holds four such tiles (input, upstream gradient, weight, weight-gradient sum), hence fewer
# elements a thread and an earlier end of the whole-row sizes.
NORM_BACKWARD: RowTable = {
    "generic": (
        RowConfig(32, 64, 4),
        RowConfig(16, 128, 4),
        RowConfig(8, 256, 4),
        RowConfig(4, 512, 4),
        RowConfig(2, 1024, 4),
        RowConfig(1, 2048, 4),
        RowConfig(1, 4096, 8),
        RowConfig(1, 8192, 16),
    ),
}

# Weight gradients of rows longer than NORM_BACKWARD's: a strip of columns, summed over a group of rows.
NORM_WEIGHT_GRADIENT = RowConfig(16, 128, 4)
# Sum of the partial weight gradients over the programs that made them.
SUM_PARTIALS = RowConfig(32, 64, 4)


def row_config(table: RowTable, architecture: str, columns: int) -> RowConfig:
    """The configuration for rows of `columns` elements on `architecture` ("sm_90", "gfx942", "generic")."""
    rows = table.get(architecture, table["generic"])
    return next((config for config in rows if config.block_n >= columns), rows[-1])


def programs_per_multiprocessor(config: RowConfig) -> int:
    """How many programs a multiprocessor should hold: 16 warps, at least two programs to hide latency."""
    return max(2, 16 // config.num_warps)
