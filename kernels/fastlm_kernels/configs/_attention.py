"""Attention's tables, and the adjustments that a call makes to their entries."""

from __future__ import annotations

from dataclasses import replace

from ._forms import ARCHITECTURES, AttentionConfig

AttentionTable = dict[str, tuple[AttentionConfig, ...]]
AttentionTiles = dict[str, tuple[int, int, int]]
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
# What `tune` and the bench try on sm_90 beside the table above: heads of 64 and 128 channels; fits 227 KB. 256 queries
# x 64 keys spill with a window.
ATTENTION_GLUON = tuple(
    AttentionConfig(head_dim, queries, keys, 4, stages, loads)
    for loads in ("gluon-resident", "gluon")
    for head_dim, queries, keys, stages in (
        (128, 128, 128, 2),
        (128, 128, 64, 4),
        (64, 128, 128, 3),
        (64, 128, 64, 4),
    )
)
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
# The most (queries, keys, stages) that a tile of wide heads may have, by architecture, with a mask in memory, whose
# addresses take registers too; the forward with a key_mask, which is one for all queries; one pass that draws dropout;
# dk and dv of packed documents, whose lengths lie in registers.
ATTENTION_FORWARD_MASKED: AttentionTiles = {**dict.fromkeys(ARCHITECTURES, (64, 32, 2)), "sm_90": (128, 32, 2)}
ATTENTION_FORWARD_PADDED: AttentionTiles = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), (64, 64, 2))
ATTENTION_DQ_MASKED: AttentionTiles = dict.fromkeys(ARCHITECTURES, (128, 32, 2))
ATTENTION_ONE_PASS_MASKED: AttentionTiles = dict.fromkeys(("sm_90", "sm_100"), (32, 64, 2))
ATTENTION_ONE_PASS_DROPOUT: AttentionTiles = {"sm_120": (16, 32, 1)}
ATTENTION_DKDV_MASKED: AttentionTiles = dict.fromkeys(("sm_86", "sm_89"), (16, 64, 2))
ATTENTION_DKDV_PACKED: AttentionTiles = {"sm_120": (16, 64, 1)}
# Rows (queries x heads that share keys) that one tile of the decode kernel holds; how many keys make it worth while.
ATTENTION_DECODE_ROWS = 64
ATTENTION_DECODE_KEYS = 256
# Programs a multiprocessor that its keys are split into.
ATTENTION_DECODE_PROGRAMS = 2
ATTENTION_COMBINE_ROWS = 4
ATTENTION_DELTA_ELEMENTS = 4096
# What the heads walked side by side may read in all: their keys are read from memory once and then from the L2 cache.
_L2_BYTES = 16 * 2**20


def attention_config(
    table: AttentionTable, architecture: str, head_dim: int, most: AttentionTiles | None = None
) -> AttentionConfig:
    """The configuration for heads of `head_dim` channels, the wider of keys and values.

    most  what else is in use: the (queries, keys, stages) by architecture that a tile of wide heads may then have
    """
    config = next(c for c in table.get(architecture, table["generic"]) if c.head_dim >= head_dim)
    if most is None or architecture not in most or head_dim <= 64:
        return config
    present = (config.block_m, config.block_n, config.num_stages)
    queries, keys, stages = map(min, present, most[architecture])
    return replace(config, block_m=queries, block_n=keys, num_stages=stages)


def by_pointers(config: AttentionConfig) -> AttentionConfig:
    """The configuration with pointers for tensors that descriptors cannot read: tiles that then need no more registers.

    A specialized one, and Gluon's, has two warp groups that compute.
    """
    if config.loads == "pointers":
        return config
    warps = config.num_warps * (1 if config.loads == "descriptors" else 2)
    queries, keys, stages = min(config.block_m, 128), min(config.block_n, 64), min(config.num_stages, 3)
    return replace(config, loads="pointers", num_warps=warps, block_m=queries, block_n=keys, num_stages=stages)


def attention_section(bytes_each: int) -> int:
    """How many heads of keys of `bytes_each` bytes are walked side by side."""
    return max(1, _L2_BYTES // max(1, bytes_each))
