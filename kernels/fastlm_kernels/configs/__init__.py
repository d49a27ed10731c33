"""Launch configurations: tables by (architecture, shape bucket), looked up by functions anyone can call.

An architecture without a table of its own uses "generic", which fits every supported one. The tables were made by
counting bytes and registers; `tuned.json` beside this folder, if there is one, holds those that `tune` measured on a
GPU, and takes their places. `python -m fastlm_kernels.tune --show sm_90` prints what an architecture uses.

Functions of rows stand here; attention, linear cross-entropy and the optimizers in modules of their own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# All of their names are public: kernels read every table, wherever it stands, as `configs.NAME`.
from ._attention import *  # noqa: F403
from ._forms import *  # noqa: F403
from ._forms import ElementwiseConfig, RowConfig
from ._linear_cross_entropy import *  # noqa: F403
from ._optim import *  # noqa: F403

RowTable = dict[str, tuple[RowConfig, ...]]
TUNED = Path(__file__).parent.with_name("tuned.json")

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


def _gfx942(rows: tuple[RowConfig, ...]) -> tuple[RowConfig, ...]:
    """A wavefront has 64 lanes there: half as many make the same threads, and 1024 threads are the limit."""
    return tuple(replace(c, num_warps=c.num_warps // 2) for c in rows)


_WHOLE_ROWS_GFX942 = _gfx942(_WHOLE_ROWS)


def _in_flight(rows: tuple[RowConfig, ...]) -> tuple[RowConfig, ...]:
    """The tiles of a program that walks many rows, two more of them on their way, none of the widest.

    A multiprocessor of an H200 must have 26 KB in flight to read at full speed; 16 warps at one row of 768 each,
    x and dy in 16 bits, have 12 KB.
    """
    return tuple(replace(c, num_stages=1 if c.block_n > 4096 else 3) for c in rows)


_IN_FLIGHT = _in_flight(_WHOLE_ROWS)
# Rows of 8192 with one more on its way want 16 elements a thread, for which sm_100 and sm_120 lack registers. A bias
# gradient is one more sum to hold: there, such rows are walked in blocks.
_IN_FLIGHT_TO_8192 = (*_IN_FLIGHT[:-1], RowConfig(1, 8192, 16, 2))
_BEFORE_SM_100 = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90"), _IN_FLIGHT_TO_8192)
_IN_FLIGHT_GFX942 = (*_in_flight(_WHOLE_ROWS_GFX942)[:-1], RowConfig(1, 8192, 8, 2))

NORM_FORWARD: RowTable = {"generic": _WHOLE_ROWS, "gfx942": _WHOLE_ROWS_GFX942}
NORM_BACKWARD: RowTable = {"generic": _IN_FLIGHT, **_BEFORE_SM_100, "gfx942": _IN_FLIGHT_GFX942}
NORM_BACKWARD_BIAS: RowTable = {"generic": _IN_FLIGHT[:-1], **_BEFORE_SM_100, "gfx942": _IN_FLIGHT_GFX942}
# Tensors of two dtypes, whose loads differ in width, need more registers yet.
NORM_BACKWARD_BIAS_MIXED: RowTable = {"generic": _IN_FLIGHT[:-1], "gfx942": _IN_FLIGHT_GFX942}
# Without this the assembler stops at 32 to 96 and spills 8 or 16 bytes in some binaries; none of them needs more.
NORM_REGISTERS = 144

# Rotary embedding: block_m positions of heads of up to block_n padded channels. 16 elements a thread, two 16-byte loads
# in 16 bits: one for each half of the head.
_HEADS = (
    RowConfig(256, 8, 4),
    RowConfig(128, 16, 4),
    RowConfig(64, 32, 4),
    RowConfig(32, 64, 4),
    RowConfig(16, 128, 4),
    RowConfig(8, 256, 4),
    RowConfig(4, 512, 4),
    RowConfig(2, 1024, 4),
    RowConfig(1, 2048, 4),
)
# Interleaved pairs come in one wide load: 8 elements a thread are enough for 16 bytes.
_HEADS_INTERLEAVED = tuple(RowConfig(c.block_m, c.block_n, 2 * c.num_warps) for c in _HEADS)

ROTARY: RowTable = {"generic": _HEADS, "gfx942": _gfx942(_HEADS)}
ROTARY_INTERLEAVED: RowTable = {"generic": _HEADS_INTERLEAVED, "gfx942": _gfx942(_HEADS_INTERLEAVED)}
# With weight gradients the assembler, left alone, stops at 128 registers and spills 8 bytes of unaligned rows' masks.
ROTARY_SUM_REGISTERS = 255
# Programs a multiprocessor holds in the backward of a partial rotation after the norm: 8 warps, 125 registers a thread.
ROTARY_PARTIAL_PROGRAMS = 2
_ROTARY_GROUP_HEADS = 4

# A forward that holds one tile, not two: 16 elements a thread for wide rows, two 16-byte loads in 16 bits.
_WHOLE_ROWS_OF_ONE_TILE = (
    *_WHOLE_ROWS[:5],
    RowConfig(1, 2048, 4),
    RowConfig(1, 4096, 8),
    RowConfig(1, 8192, 16),
    RowConfig(1, 16384, 32),
)
SOFTMAX_FORWARD: RowTable = {
    "generic": _WHOLE_ROWS_OF_ONE_TILE,
    "gfx942": _gfx942(_WHOLE_ROWS_OF_ONE_TILE),
}
SOFTMAX_BACKWARD: RowTable = {"generic": _WHOLE_ROWS, "gfx942": _WHOLE_ROWS_GFX942}

# Elementwise functions: 32 bytes of each tensor a thread, two 16-byte loads. Tiles do not depend on how many elements
# there are: a binary for each size would be compiled in the middle of training.
ELEMENTWISE: dict[str, tuple[ElementwiseConfig]] = {
    "generic": (ElementwiseConfig(tile_bytes=4096, num_warps=4),),
    "gfx942": (ElementwiseConfig(tile_bytes=4096, num_warps=2),),
}
# Columns of a tile of rows, where their number has no larger power of two as a factor.
_NARROWEST_TILE = 64

# Rows longer than any table's are walked in blocks of this many columns.
LONG_ROW: RowTable = {"generic": (RowConfig(1, 4096, 16),)}
# Weight gradients of such rows: a strip of columns, summed over a group of rows.
NORM_WEIGHT_GRADIENT: RowTable = {"generic": (RowConfig(8, 128, 4),)}
# Sum of the partial weight gradients over the programs that made them.
# Many rows a step and many programs: a chain of dependent loads on few multiprocessors would take longer than all else.
SUM_PARTIALS = RowConfig(128, 16, 8)

# Cross-entropy: 16 logits a thread, two 16-byte loads in 16 bits; 8 programs of 128 threads have 32 KB on the way.
CROSS_ENTROPY: RowTable = {
    "generic": (
        RowConfig(64, 16, 4),
        RowConfig(32, 32, 4),
        RowConfig(16, 64, 4),
        RowConfig(8, 128, 4),
        RowConfig(4, 256, 4),
        RowConfig(4, 512, 4),
        RowConfig(2, 1024, 4),
        RowConfig(1, 2048, 4),
        RowConfig(1, 4096, 8),
    )
}
# Twice as wide has 16 KB a program on the way for few rows, but 32 KB a multiprocessor instead of 48 KB for many.
CROSS_ENTROPY_LONG: RowTable = {"generic": (RowConfig(1, 4096, 8),)}
# A second walk over the row should find it in the L2 cache: few rows at a time.
# With every option, Triton 3.6 wants more than 128 registers for it on sm_120.
CROSS_ENTROPY_LONG_GRADIENT: RowTable = {"generic": (RowConfig(1, 8192, 16),), "sm_120": (RowConfig(1, 4096, 8),)}
# With the soft-cap: else the assembler stops at 64 and spills 8 bytes.
CROSS_ENTROPY_REGISTERS = 160
# Sum of the rows' losses: block_n rows a step.
CROSS_ENTROPY_REDUCE = RowConfig(1, 8192, 16)


def row_config(table: RowTable, architecture: str, columns: int, longer: RowTable | None = None) -> RowConfig:
    """The configuration for rows of `columns` elements on `architecture` ("sm_90", "gfx942", "generic").

    longer  for rows longer than any of the table's; None is LONG_ROW
    """
    rows = table.get(architecture, table["generic"])
    return next((c for c in rows if c.block_n >= columns), None) or only_config(longer or LONG_ROW, architecture)


def only_config(table: RowTable, architecture: str) -> RowConfig:
    """The configuration of a table whose only bucket holds every shape."""
    return table.get(architecture, table["generic"])[0]


def registers_asked_for(architecture: str) -> int | None:
    """What to ask for where nothing is known to need more: on sm_120 Triton 3.6 stops at 64 in places, and spills."""
    return 128 if architecture == "sm_120" else None


def programs_per_multiprocessor(config: RowConfig) -> int:
    """How many programs a multiprocessor should hold: 16 warps, as many as the registers of the largest tiles allow."""
    return max(1, 16 // config.num_warps)


def rotary_group_heads(tiles: int, resident: int) -> int:
    """How many heads share one load of cos and sin: as many as leave 8 programs a resident one, 4 at most.

    In fp32 the tables are as many bytes as one head in 16 bits, read and written: 4 heads bring them down to a quarter
    of x's traffic, and that from L2.
    """
    return max(1, min(_ROTARY_GROUP_HEADS, tiles // (8 * resident)))


def elementwise_config(architecture: str, itemsize: int, rows: int, columns: int) -> RowConfig:
    """The tile for `rows` rows of `columns` elements of `itemsize` bytes; dense tensors are one row of everything."""
    (config,) = ELEMENTWISE.get(architecture, ELEMENTWISE["generic"])
    elements = config.tile_bytes // itemsize
    # In rows as many columns as divide them, so that no tile is partly empty and every load is wide.
    width = columns & -columns
    if width < _NARROWEST_TILE:
        width = 1 << (columns - 1).bit_length()
    width = elements if rows == 1 else min(width, elements)
    return RowConfig(elements // width, width, config.num_warps)


# Tables by name, for `tune`.


def rows_of(name: str, architecture: str) -> tuple[Any, ...]:
    """The configurations, a bucket each, that `architecture` uses of the table called `name`."""
    table = globals()[name]
    return table.get(architecture, table["generic"])


@contextlib.contextmanager
def trying(name: str, architecture: str, rows: tuple[Any, ...]) -> Iterator[None]:
    """With these configurations in the place of the table's own."""
    table = globals()[name]
    before = table.get(architecture)
    table[architecture] = rows
    try:
        yield
    finally:
        del table[architecture]
        if before is not None:
            table[architecture] = before


def save(name: str, architecture: str, rows: tuple[Any, ...], measured_on: str) -> None:
    """Put measured configurations into the table and into `tuned.json`, with the machine they were measured on."""
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    entry = tuned.setdefault(architecture, {})
    entry["measured_on"] = measured_on
    entry.setdefault("tables", {})[name] = [asdict(row) for row in rows]
    TUNED.write_text(json.dumps(tuned, indent=1) + "\n")
    globals()[name][architecture] = rows


def read_tuned(path: Path) -> None:
    """Take the tables that a tuning run wrote; ones that are gone meanwhile are left out."""
    for architecture, entry in json.loads(path.read_text()).items():
        for name, rows in entry["tables"].items():
            table = globals().get(name)
            if table is not None:
                kind = type(table["generic"][0])
                table[architecture] = tuple(kind(**row) for row in rows)


def describe(architecture: str) -> str:
    """Every table as `architecture` uses it, one bucket a line."""
    lines = []
    for name, table in globals().items():
        if isinstance(table, dict) and "generic" in table:
            lines.append(f"{name}{'' if architecture in table else ' (generic)'}")
            lines += [f"    {row}" for row in rows_of(name, architecture)]
    return "\n".join(lines) + "\n"


if TUNED.exists():
    read_tuned(TUNED)
