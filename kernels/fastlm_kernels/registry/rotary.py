"""Rotary embedding: heads of queries and keys, tables by position, the norm before the rotation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import configs, rotary
from ._kernel import Arguments, Case, Draw, Kernel, drawn
from ._rows import OTHER_DTYPE


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    head_dim_axis: int = 1,
    apart: bool = False,
    plain: bool = False,
    unweighted: bool = False,
    mixed: bool = False,
    eps: float = 1e-5,
    weight_offset: float = 0.5,
    full_tables: bool = False,
    batched_tables: bool = False,
    table_dtype: torch.dtype | None = None,
) -> Arguments:
    """Arguments of rotary_embedding: `rows` positions of heads of `columns` channels.

    q and k are views of one projection, (batch, rows, heads, columns) in memory, or two tensors `apart`; `plain` is
    without the norm; `mixed` gives the weights another dtype.
    """
    rotated = columns - columns % 2 if rotary_dim is None else rotary_dim
    both = draw(batch, rows, heads + kv_heads, columns, shift=0.5)
    parts = (both.transpose(1, 2) if head_dim_axis == 1 else both).split([heads, kv_heads], head_dim_axis)
    q, k = ((x.contiguous() if apart else x).detach().requires_grad_() for x in parts)
    tables = ((batch,) if batched_tables else ()) + (rows, rotated if full_tables else rotated // 2)
    cos, sin = (_table(draw, tables, table_dtype or torch.float32) for _ in range(2))
    arguments: Arguments = {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": interleaved}
    arguments |= {"head_dim_axis": head_dim_axis, "rotary_dim": rotated}
    if not plain:
        arguments["qk_norm_eps"] = eps
    if not (plain or unweighted):
        other = OTHER_DTYPE[draw.dtype] if mixed else draw.dtype
        weight_q, weight_k = (draw(columns, shift=0.3, dtype=other) for _ in range(2))
        arguments |= {"q_weight": weight_q, "k_weight": weight_k, "weight_offset": weight_offset}
    return arguments


def _table(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """cos or sin. No cosines: a kernel that took one for another, or a channel for its partner, shows."""
    table = draw(*shape, dtype=dtype).detach()
    return table.double() if draw.dtype == torch.float64 else table


def _elements(case: Case) -> int:
    heads = case.get("heads", 2) + case.get("kv_heads", 1)
    return math.prod((case.get("batch", 1), case["rows"], heads, case["columns"]))


def _traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x in, y out. Backward: dy in, dx out, and x in where it was normed. Both: cos and sin once.
    passes = 3 if backward and not case.get("plain") else 2
    rotated = case.get("rotary_dim") or case["columns"]
    positions = case["rows"] * (case.get("batch", 1) if case.get("batched_tables") else 1)
    table = positions * rotated * (2 if case.get("full_tables") else 1)
    return _elements(case) * passes * dtype.itemsize + table * case.get("table_dtype", torch.float32).itemsize


def _flops(case: Case, backward: bool) -> int:
    # A rotation is 3 a channel; the norm 4 more, its backward 9.
    norm = 0 if case.get("plain") else (9 if backward else 4)
    return _elements(case) * (3 + norm)


_SMALL: tuple[Case, ...] = (
    {"rows": 1, "columns": 2},
    {"rows": 5, "columns": 12, "batch": 2, "heads": 3},
    {"rows": 37, "columns": 64, "batch": 2},
    {"rows": 3, "columns": 80, "unweighted": True},
    {"rows": 9, "columns": 40, "plain": True},
    {"rows": 4, "columns": 256, "apart": True},
    {"rows": 7, "columns": 24, "rotary_dim": 10, "heads": 2, "kv_heads": 2, "batch": 2, "batched_tables": True},
    {"rows": 7, "columns": 24, "rotary_dim": 8, "plain": True, "full_tables": True, "table_dtype": torch.bfloat16},
    {
        "rows": 6,
        "columns": 20,
        "interleaved": True,
        "full_tables": True,
        "batch": 2,
        "batched_tables": True,
        "eps": 0.1,
    },
    {"rows": 6, "columns": 20, "interleaved": True, "rotary_dim": 12, "head_dim_axis": 2, "mixed": True},
    {"rows": 6, "columns": 20, "interleaved": True, "plain": True, "heads": 1, "batch": 2},
    {"rows": 5, "columns": 16, "full_tables": True, "head_dim_axis": 2, "apart": True, "batch": 3, "heads": 1},
)
_QUICK: tuple[Case, ...] = ({"rows": 128, "columns": 128, "plain": True}, {"rows": 128, "columns": 64})
# 32k tokens: 12 heads of 64 as in the 124M class, 32 over 8 of 128 as in larger ones; and one token a sequence.
_SHAPES = (
    *(
        {"rows": rows, "columns": columns, "batch": 32768 // rows, "heads": heads, "kv_heads": kv_heads}
        for rows in (1024, 4096, 16384)
        for columns, heads, kv_heads in ((64, 12, 12), (128, 32, 8))
    ),
    {"rows": 1, "columns": 128, "batch": 32, "heads": 32, "kv_heads": 8},
)
_LARGE: tuple[Case, ...] = tuple(
    {**shape, **norm} for shape in _SHAPES for norm in ({"unweighted": True}, {"plain": True}, {})
)
# Each tile; at the common widths each switch too.
_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": config.block_n} for config in configs.ROTARY["generic"][:-1]),
    {"rows": 4096, "columns": 1024, "rotary_dim": 514},
    *({"rows": 4096, "columns": columns, "unweighted": True} for columns in (40, 64, 80, 96, 128, 160, 192)),
    *(
        {"rows": 4096, "columns": columns, **switches}
        for columns in (64, 128)
        for switches in (
            {"plain": True},
            {"plain": True, "interleaved": True},
            {"plain": True, "full_tables": True},
            {"interleaved": True},
            {"rotary_dim": columns // 2},
            {"rotary_dim": columns // 2, "interleaved": True},
            {"full_tables": True, "table_dtype": torch.bfloat16},
            {"full_tables": True, "interleaved": True},
            {"mixed": True},
        )
    ),
)


KERNELS = (
    Kernel(
        rotary.rotary_embedding,
        rotary.rotary_embedding_reference,
        _inputs,
        _SMALL,
        _QUICK,
        _LARGE,
        _COMPILED,
        _traffic,
        _flops,
    ),
)
