"""Launch configurations: tables by (architecture, shape bucket), looked up by functions anyone can call.

An architecture without a table of its own uses "generic", which fits every supported one. The tables below were made
by counting bytes and registers; `tuned.json` beside this file, if there is one, holds those that `tune` measured on a
GPU, and takes their places. `python -m fastlm_kernels.tune --show sm_90` prints what an architecture uses.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WITH_TENSOR_MEMORY_ACCELERATOR = ("sm_90", "sm_100")


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows x `block_n` columns worked on by `num_warps` warps.

    num_stages  tiles in flight in a program that walks several: all but one of them in shared memory
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class ElementwiseConfig:
    """A tile of `tile_bytes` of each tensor worked on by `num_warps` warps; a power of two."""

    tile_bytes: int
    num_warps: int


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of `block_m` queries x `block_n` keys of heads of up to `head_dim` channels, on `num_warps` warps.

    num_stages  tiles of what a program walks that are in flight: all but one of them in shared memory
    loads       how the forward loads its tiles: by pointers; by descriptors, for the tensor memory accelerator of sm_90
                and later; or "specialized", by descriptors in a warp group of its own beside those that compute (of
                num_warps warps each). Only measured tables ask for descriptors: no GPU has run them yet.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loads: Literal["pointers", "descriptors", "specialized"] = "pointers"


RowTable = dict[str, tuple[RowConfig, ...]]
AttentionTable = dict[str, tuple[AttentionConfig, ...]]
AttentionTiles = dict[str, tuple[int, int]]
TUNED = Path(__file__).with_name("tuned.json")

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

# Attention, sorted by head_dim: the first that holds a head is used. The tables of fp32 are for exact products, which
# tensor cores do not make.
ATTENTION_FP32: AttentionTable = {
    "generic": (
        AttentionConfig(64, 32, 32, 4, 1),
        AttentionConfig(128, 32, 32, 8, 1),
        AttentionConfig(256, 16, 16, 8, 1),
    ),
    # twice the tile spills 1 KB in dK/dV
    "gfx942": (
        AttentionConfig(64, 32, 32, 4, 1),
        AttentionConfig(128, 16, 16, 8, 1),
        AttentionConfig(256, 16, 16, 8, 1),
    ),
}
ATTENTION_FORWARD: AttentionTable = {
    "generic": (
        AttentionConfig(64, 64, 64, 4, 2),
        AttentionConfig(128, 64, 32, 4, 1),
        AttentionConfig(256, 32, 32, 4, 1),
    ),
    "sm_80": (
        AttentionConfig(64, 128, 64, 8, 2),
        AttentionConfig(128, 128, 64, 8, 3),  # with a window 2 spill
        AttentionConfig(256, 64, 32, 8, 1),
    ),
    **dict.fromkeys(
        ("sm_86", "sm_89", "sm_120"),
        (
            AttentionConfig(64, 128, 64, 8, 2),
            AttentionConfig(128, 128, 64, 8, 2),
            AttentionConfig(256, 64, 32, 8, 1),
        ),
    ),
    **dict.fromkeys(
        ("sm_90", "sm_100"),
        (
            AttentionConfig(64, 128, 64, 8, 3),
            AttentionConfig(128, 128, 64, 8, 3),
            AttentionConfig(256, 128, 32, 8, 2),
        ),
    ),
}
ATTENTION_DKDV: AttentionTable = {
    "generic": (
        AttentionConfig(64, 32, 64, 4, 1),
        AttentionConfig(128, 16, 64, 8, 1),
        AttentionConfig(256, 16, 32, 8, 1),
    ),
    **dict.fromkeys(
        ("sm_80", "sm_86", "sm_89"),
        (
            AttentionConfig(64, 32, 128, 8, 2),
            AttentionConfig(128, 32, 64, 8, 2),
            AttentionConfig(256, 16, 32, 8, 1),
        ),
    ),
    "sm_120": (
        AttentionConfig(64, 32, 64, 8, 2),
        AttentionConfig(128, 16, 64, 8, 2),
        AttentionConfig(256, 16, 32, 8, 1),
    ),
    **dict.fromkeys(
        ("sm_90", "sm_100"),
        (
            AttentionConfig(64, 64, 128, 8, 2),
            AttentionConfig(128, 32, 128, 8, 2),
            AttentionConfig(256, 32, 64, 8, 1),
        ),
    ),
}
# dq too: as many keys as registers allow, since every tile of keys adds to all of dq. Wider heads spill whatever the
# tile: they take two passes.
ATTENTION_ONE_PASS: AttentionTable = {
    "generic": ATTENTION_DKDV["generic"][:2],
    **dict.fromkeys(
        ("sm_80", "sm_86", "sm_89"),
        (
            AttentionConfig(64, 16, 128, 8, 2),
            AttentionConfig(128, 16, 64, 8, 2),
        ),
    ),
    "sm_120": (
        AttentionConfig(64, 16, 128, 8, 2),
        AttentionConfig(128, 16, 32, 8, 2),
    ),
    **dict.fromkeys(
        ("sm_90", "sm_100"),
        (
            AttentionConfig(64, 32, 128, 8, 2),
            AttentionConfig(128, 64, 64, 8, 2),
        ),
    ),
}
ATTENTION_DQ: AttentionTable = {
    "generic": (
        AttentionConfig(64, 64, 32, 4, 1),
        AttentionConfig(128, 64, 16, 8, 1),
        AttentionConfig(256, 32, 16, 8, 1),
    ),
    **dict.fromkeys(
        ("sm_80", "sm_86", "sm_89", "sm_120"),
        (
            AttentionConfig(64, 128, 32, 8, 2),
            AttentionConfig(128, 64, 32, 8, 2),
            AttentionConfig(256, 32, 16, 8, 1),
        ),
    ),
    **dict.fromkeys(
        ("sm_90", "sm_100"),
        (
            AttentionConfig(64, 128, 64, 8, 3),
            AttentionConfig(128, 128, 64, 8, 2),
            AttentionConfig(256, 64, 32, 8, 2),
        ),
    ),
}
ATTENTION_DQ_FP32: AttentionTable = {
    "generic": (
        AttentionConfig(64, 32, 32, 4, 1),
        AttentionConfig(128, 32, 16, 8, 1),
        AttentionConfig(256, 16, 16, 8, 1),
    )
}
# Rows of one tile of the decode kernel come from the call: the power of two that holds them.
ATTENTION_DECODE: AttentionTable = {
    "generic": (
        AttentionConfig(64, 64, 64, 4, 2),
        AttentionConfig(128, 64, 32, 4, 2),
        AttentionConfig(256, 64, 16, 4, 1),
    ),
    **dict.fromkeys(
        ("sm_80", "sm_90", "sm_100"),
        (
            AttentionConfig(64, 64, 128, 4, 3),
            AttentionConfig(128, 64, 64, 4, 3),
            AttentionConfig(256, 64, 32, 8, 2),
        ),
    ),
}
# Without this the assembler stops at 80 in some fp32 binaries, at 32 in the one pass on sm_80, and spills.
ATTENTION_REGISTERS = 255
# The most (queries, keys) that a tile of wide heads may hold, by architecture, with a mask in memory, whose addresses
# take registers too; the forward with a key_mask, which is one for all queries.
ATTENTION_FORWARD_MASKED: AttentionTiles = {**dict.fromkeys(ARCHITECTURES, (64, 32)), "sm_90": (128, 32)}
ATTENTION_FORWARD_PADDED: AttentionTiles = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), (64, 64))
ATTENTION_DQ_MASKED: AttentionTiles = dict.fromkeys(ARCHITECTURES, (128, 32))
ATTENTION_ONE_PASS_MASKED: AttentionTiles = dict.fromkeys(("sm_90", "sm_100"), (32, 64))
ATTENTION_DKDV_MASKED: AttentionTiles = dict.fromkeys(("sm_86", "sm_89"), (16, 64))
# Rows (queries x heads that share keys) that one tile of the decode kernel holds; how many keys make it worth while.
ATTENTION_DECODE_ROWS = 64
ATTENTION_DECODE_KEYS = 256
# Programs a multiprocessor that its keys are split into.
ATTENTION_DECODE_PROGRAMS = 2
ATTENTION_COMBINE_ROWS = 4
ATTENTION_DELTA_ELEMENTS = 4096
# What the heads walked side by side may read in all: their keys are read from memory once and then from the L2 cache.
_ATTENTION_L2_BYTES = 16 * 2**20


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


# Linear cross-entropy: chunks of the logits as long as matrix products at full rate ask for, as small as memory does.
# Adding a chunk to the fp32 sum of the weight gradient moves 8 bytes for every 6 x rows FLOPs: on an H200 2.6 % of the
# products' time at 8192 rows, 5 % at 4096, 10 % at 2048.
_LINEAR_LEAST_ROWS, _LINEAR_MOST_ROWS = 2048, 8192
# The input's gradient is rows / 128 x hidden / 256 tiles of a product: on 132 multiprocessors 8192 rows fill their last
# round to 97 % at hidden sizes 512, 1024, 2048 and 4096, to 45 % where three tiles make a row. 11264 rows fill that.
_LINEAR_MOST_ROWS_BY_TILES = {3: 11264}
# The logits' buffer may take a GiB whatever the problem, and more where it and the fp32 sum stay within an eighth of
# what all logits and their gradient would take.
_LINEAR_BUFFER_BYTES = 1 << 30
_LINEAR_SHARE = 8
# A weight gradient larger than this in fp32 is formed class block by class block, straight in its own dtype.
_LINEAR_SUM_BYTES = 2 << 30
# Chunks and blocks end on multiples of this, whole tiles of any matrix product.
_LINEAR_MULTIPLE = 256


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """How the N x V logits of one call are walked; no more than `buffer_elements` of them exist at a time.

    mode     "tokens": chunks of `rows` tokens, loss and gradients formed in one pass
             "classes": chunks of `rows` tokens for the loss; then, their logits computed a second time, blocks of
             `classes` classes for the gradients
    """

    mode: Literal["tokens", "classes"]
    rows: int
    classes: int
    buffer_elements: int


def linear_cross_entropy_by_classes(hidden: int, classes: int, dtype: torch.dtype) -> bool:
    """Whether a weight gradient of several chunks is formed by blocks of classes; the batch's size has no say."""
    # fp16 cannot hold sums over many tokens before they are divided by their number, fp32 needs no second buffer.
    return dtype == torch.bfloat16 and classes * hidden * 4 > _LINEAR_SUM_BYTES


def linear_cross_entropy_plan(
    tokens: int, hidden: int, classes: int, dtype: torch.dtype, weight_gradient: bool = True
) -> LinearCrossEntropyPlan:
    """The plan for `tokens` x `hidden` inputs and `classes` classes: a function of these alone, so that bits repeat.

    64k tokens, hidden 768, 50304 classes, bf16: 6 chunks of 11008 rows; buffer 1108 MB and fp32 sum 155 MB, where the
    logits and their gradient take 13.2 GB.
    """
    by_classes = linear_cross_entropy_by_classes(hidden, classes, dtype)
    row_bytes = classes * dtype.itemsize
    # By blocks of classes it is the input's gradient that is summed in fp32; fp32's own sums are results.
    sum_bytes = 0 if dtype.itemsize >= 4 else (tokens if by_classes else classes) * hidden * 4
    buffer_bytes = max(_LINEAR_BUFFER_BYTES, 2 * tokens * row_bytes // _LINEAR_SHARE - sum_bytes)
    most_rows = _LINEAR_MOST_ROWS_BY_TILES.get(-(-hidden // 256), _LINEAR_MOST_ROWS)
    most = max(_LINEAR_LEAST_ROWS, min(most_rows, buffer_bytes // row_bytes))
    rows = _even_part(tokens, most)
    if not by_classes or not weight_gradient or rows >= tokens:
        return LinearCrossEntropyPlan("tokens", rows, classes, rows * classes)
    block = _even_part(classes, buffer_bytes // (tokens * dtype.itemsize))
    return LinearCrossEntropyPlan("classes", rows, block, max(rows * classes, tokens * block))


def _even_part(size: int, most: int) -> int:
    """The length of as few equal parts of `size` as `most` allows, a multiple; `size` itself if it is one part."""
    most = max(_LINEAR_MULTIPLE, most // _LINEAR_MULTIPLE * _LINEAR_MULTIPLE)
    if size <= most:
        return size
    parts = -(-size // most)
    return -(-size // (parts * _LINEAR_MULTIPLE)) * _LINEAR_MULTIPLE


# Gradients scaled after the fact: 16 elements a thread, two 16-byte loads of 16 bits or four of 32.
LINEAR_SCALE_BLOCK = 2048
LINEAR_SCALE_WARPS = 4


@dataclass(frozen=True)
class OptimConfig:
    """A program's part of a tensor: `chunk` elements, walked in tiles of `block`, worked on by `num_warps` warps."""

    chunk: int
    block: int
    num_warps: int


# Chunks do not depend on the tile, so that one map of them serves all. 8 tiles of fp32 hide what a program reads before
# the first one: its row of the table, the group's scalars, the step.
OPTIM_CHUNK = 8192
_OPTIM_THREADS = 256
# For every option at once on 16-bit tensors or with stochastic rounding, which else spill on sm_80 and sm_90; asked for
# elsewhere, it costs resident warps.
OPTIM_REGISTERS = 168
# With states of 8 bits the assembler takes up to 180 where 80 do, which hold three programs instead of one or two.
OPTIM_EIGHT_BITS_REGISTERS = 96


def optim_config(architecture: str, *itemsizes: int) -> OptimConfig:
    """For tensors of these element sizes: one 128-bit load a thread and tile of the widest.

    Fewer bits of a narrower tensor beside it: with more, its layout and the widest's differ, and each store goes
    through shared memory.
    """
    warps = _OPTIM_THREADS // (64 if architecture.startswith("gfx") else 32)
    return OptimConfig(OPTIM_CHUNK, _OPTIM_THREADS * 16 // max(itemsizes), warps)


@dataclass(frozen=True)
class SymmetricConfig:
    """Tiles of `block_n` x `block_n`, summed `block_k` columns at a time, `num_stages` - 1 such steps on their way."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# As many steps on their way as shared memory holds; elsewhere 3, which fits 99 KB.
_SYMMETRIC_STAGES = {"sm_90": 4, "sm_100": 4, "gfx942": 2}
# fp32 is summed without tensor cores: on a GPU only where the kernel is forced.
_SYMMETRIC_FP32 = SymmetricConfig(32, 32, 4, 2)
_SYMMETRIC_SMALL = SymmetricConfig(64, 64, 4, 3)


def symmetric_config(architecture: str, dtype: torch.dtype, size: int) -> SymmetricConfig:
    """For a symmetric result of `size` x `size`."""
    if dtype == torch.float32:
        return _SYMMETRIC_FP32
    if size <= 64:
        return _SYMMETRIC_SMALL
    return SymmetricConfig(128, 64, 8, _SYMMETRIC_STAGES.get(architecture, 3))


def attention_config(
    table: AttentionTable, architecture: str, head_dim: int, most: AttentionTiles | None = None
) -> AttentionConfig:
    """The configuration for heads of `head_dim` channels, the wider of keys and values.

    most  with a mask in memory: the (queries, keys) by architecture that a tile of wide heads may hold
    """
    config = next(c for c in table.get(architecture, table["generic"]) if c.head_dim >= head_dim)
    if most is None or architecture not in most or head_dim <= 64:
        return config
    queries, keys = most[architecture]
    queries, keys, stages = min(config.block_m, queries), min(config.block_n, keys), min(config.num_stages, 2)
    return replace(config, block_m=queries, block_n=keys, num_stages=stages)


def by_pointers(config: AttentionConfig) -> AttentionConfig:
    """The configuration with pointers for tensors that descriptors cannot read: tiles that then need no more registers.

    A specialized one has two warp groups that compute.
    """
    if config.loads == "pointers":
        return config
    warps = config.num_warps * (2 if config.loads == "specialized" else 1)
    return replace(config, loads="pointers", num_warps=warps, block_n=min(config.block_n, 64))


def attention_section(bytes_each: int) -> int:
    """How many heads of keys of `bytes_each` bytes are walked side by side."""
    return max(1, _ATTENTION_L2_BYTES // max(1, bytes_each))


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
