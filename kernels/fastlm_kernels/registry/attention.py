"""Attention: heads of queries, keys and values, windows, masks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import attention
from ._kernel import Arguments, Case, Draw, Kernel, drawn

# Left out of the arguments where a case does not ask for more.
_OFF = {
    "causal_align": "top_left",
    "window_size": (-1, -1),
    "softcap": None,
    "scale": None,
    "return_lse": False,
    "deterministic": True,
}


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    keys: int | None = None,
    values: int | None = None,
    causal: bool = True,
    align: str = "top_left",
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    scale: float | None = None,
    padded: bool = False,
    masked: tuple[int, ...] | None = None,
    lse: bool = False,
    one_pass: bool = False,
    dropout: float = 0.0,
) -> Arguments:
    """Arguments of scaled_dot_product_attention: `rows` queries of heads of `columns` channels, `keys` keys.

    Tensors are (batch, positions, heads, channels) in memory. `padded` gives a key_mask; `masked` names the axes over
    which a bool mask is broadcast, and its first query sees nothing. `one_pass` gives deterministic=False. `dropout`
    comes with seeds, so that every path drops the same.
    """
    S = rows if keys is None else keys
    shapes = {"query": (heads, rows, columns), "key": (kv_heads, S, columns), "value": (kv_heads, S, values or columns)}
    arguments: Arguments = {name: _heads(draw, batch, *shape) for name, shape in shapes.items()}
    arguments |= {"is_causal": causal, "enable_gqa": heads != kv_heads}
    options = {"causal_align": align, "window_size": window, "softcap": softcap, "scale": scale, "return_lse": lse}
    options |= {"deterministic": not one_pass}
    arguments |= {name: value for name, value in options.items() if value != _OFF[name]}
    if padded:
        arguments["key_mask"] = _random_mask(draw, batch, S)
    if masked is not None:
        shape = (1 if axis in masked else size for axis, size in enumerate((batch, heads, rows, S)))
        arguments["attn_mask"] = mask = _random_mask(draw, *shape)
        mask[..., :1, :] &= 2 in masked
    if dropout:
        arguments |= {"dropout_p": dropout, "dropout_seed": torch.arange(5, 5 + batch, device=draw.device)}
    return arguments


def _heads(draw: Draw, batch: int, heads: int, positions: int, channels: int) -> Tensor:
    """(batch, heads, positions, channels), with heads inside positions in memory."""
    memory = draw(batch, positions, heads, channels, scale=1.2, shift=0.2)
    return memory.detach().transpose(1, 2).requires_grad_()


def _random_mask(draw: Draw, *shape: int) -> Tensor:
    if draw.empty:
        return torch.empty(shape, dtype=torch.bool, device=draw.device)
    mask = torch.rand(shape, generator=draw.generator, device=draw.generator.device) < 0.7
    # Two keys stay visible: of one alone the gradient of a query is 0, which PyTorch misses by its rounding too.
    mask[..., :2] = True
    return mask.to(draw.device)


def _pairs(case: Case) -> int:
    """How many (query, key) pairs the positions of one head leave visible."""
    rows, keys = case["rows"], case.get("keys") or case["rows"]
    left, right = case.get("window", (-1, -1))
    right = 0 if case.get("causal", True) else right
    shift = keys - rows if case.get("align") == "bottom_right" else 0
    pairs = 0
    for at in range(shift, shift + rows):
        first = 0 if left < 0 else max(0, at - left)
        stop = keys if right < 0 else min(keys, at + right + 1)
        pairs += max(0, stop - first)
    return pairs


def _traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: q, k, v in, out out. Backward: those and the upstream gradient in, dq, dk, dv out.
    D, E = case["columns"], case.get("values") or case["columns"]
    rows, keys = case["rows"], case.get("keys") or case["rows"]
    queries = rows * case.get("heads", 2)
    key_rows = keys * case.get("kv_heads", 1)
    elements = queries * (D + E) + key_rows * (D + E)
    if backward:
        elements = queries * 2 * (D + E) + key_rows * 2 * (D + E)
    return case.get("batch", 1) * elements * dtype.itemsize


def _flops(case: Case, backward: bool) -> int:
    # Two products forward; backward five, of which three are over the channels of queries and keys.
    D, E = case["columns"], case.get("values") or case["columns"]
    products = 3 * D + 2 * E if backward else D + E
    return 2 * products * case.get("batch", 1) * case.get("heads", 2) * _pairs(case)


_SMALL: tuple[Case, ...] = (
    {"rows": 1, "columns": 8},
    {"rows": 37, "columns": 16, "batch": 2, "heads": 4, "kv_heads": 2},
    {"rows": 70, "columns": 64, "heads": 1, "causal": False},
    {"rows": 33, "columns": 40, "values": 24, "keys": 50, "heads": 1, "window": (7, 3), "causal": False},
    {"rows": 20, "columns": 16, "keys": 70, "align": "bottom_right", "window": (40, -1), "lse": True},
    {"rows": 40, "columns": 16, "keys": 20, "align": "bottom_right"},
    {"rows": 33, "columns": 16, "heads": 2, "lse": True},
    {"rows": 33, "columns": 16, "heads": 2, "lse": True, "one_pass": True},
    {"rows": 19, "columns": 20, "keys": 40, "softcap": 3.0, "padded": True, "batch": 2, "causal": False},
    {"rows": 33, "columns": 16, "keys": 67, "masked": (), "batch": 2, "causal": False, "scale": 0.4},
    {"rows": 33, "columns": 16, "keys": 67, "masked": (0, 1), "window": (-1, 40), "causal": False, "softcap": 2.0},
    {"rows": 2, "columns": 16, "keys": 300, "heads": 4, "align": "bottom_right", "lse": True},
    {"rows": 9, "columns": 160, "heads": 1, "keys": 34, "masked": (1, 2), "padded": True, "causal": False},
    {"rows": 67, "columns": 24, "keys": 131, "heads": 4, "kv_heads": 2, "align": "bottom_right", "one_pass": True},
    {"rows": 67, "columns": 16, "keys": 80, "heads": 4, "kv_heads": 2, "batch": 2, "dropout": 0.3},
)
_QUICK: tuple[Case, ...] = (
    {"rows": 64, "columns": 64, "heads": 2, "kv_heads": 2},
    {"rows": 128, "columns": 64, "heads": 4, "kv_heads": 4},
)
# 16k tokens of a model of width 2048; then one case a feature, and one token a sequence against a long cache.
_16K: Case = {"rows": 4096, "columns": 128, "batch": 4, "heads": 16, "kv_heads": 16}
_LARGE: tuple[Case, ...] = (
    *(
        {
            "rows": rows,
            "columns": columns,
            "batch": 16384 // rows,
            "heads": 2048 // columns,
            "kv_heads": 2048 // columns,
            "causal": causal,
        }
        for causal in (True, False)
        for columns in (64, 128)
        for rows in (1024, 2048, 4096, 8192, 16384)
    ),
    *(
        _16K | feature
        for feature in (
            {"kv_heads": 4},
            {"window": (1023, -1)},
            {"softcap": 30.0},
            {"padded": True, "causal": False},
            {"masked": (0, 1), "causal": False},
            {"lse": True},
            {"one_pass": True},
            {"one_pass": True, "columns": 64, "heads": 32, "kv_heads": 32},
            {"columns": 80},
            {"columns": 256, "heads": 8, "kv_heads": 8},
            {"padded": True},
            {"rows": 2048, "keys": 4096, "align": "bottom_right"},
        )
    ),
    {"rows": 1, "columns": 128, "batch": 8, "heads": 32, "kv_heads": 8, "keys": 32768, "causal": False},
)
# What changes a binary: each alone, and the most that a call may ask for at once without a mask in memory.
_COMPILED_SWITCHES: tuple[Case, ...] = (
    {"window": (1023, -1)},
    {"softcap": 30.0},
    {"padded": True, "causal": False},
    {"masked": (0, 1), "causal": False},
    {"dropout": 0.1},
    {"keys": 8192, "align": "bottom_right"},
    {"lse": True},
    {"padded": True, "window": (1023, -1), "softcap": 30.0, "dropout": 0.1},
)
_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": columns, "kv_heads": 2} for columns in (16, 32, 64, 80, 96, 128, 192, 256)),
    *(
        {"rows": 4096, "columns": columns, "kv_heads": 2, **switches}
        for columns in (64, 128)
        for switches in ({"causal": False}, *_COMPILED_SWITCHES)
    ),
    *(
        {"rows": 4096, "columns": columns, "kv_heads": 2, "one_pass": True, **switches}
        for columns in (64, 128)
        for switches in ({}, *_COMPILED_SWITCHES)
    ),
    {"rows": 1, "columns": 128, "heads": 8, "kv_heads": 2, "keys": 32768, "causal": False},
)


KERNELS = (
    Kernel(
        attention.scaled_dot_product_attention,
        attention.scaled_dot_product_attention_reference,
        _inputs,
        _SMALL,
        _QUICK,
        _LARGE,
        _COMPILED,
        _traffic,
        _flops,
        realigns=True,
    ),
)

# Packed documents, by the same kernels: outside of the list, whose every entry has kernels of its own.


def _document_lengths(rows: int, documents: int) -> list[int]:
    """Lengths of growing documents, `rows` tokens together."""
    ends = [rows * i * (i + 1) // (documents * (documents + 1)) for i in range(documents + 1)]
    return [end - start for start, end in pairwise(ends)]


@drawn
def _packed_inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    heads: int = 2,
    documents: int = 4,
    one_pass: bool = False,
    window: int = -1,
    softcap: float | None = None,
) -> Arguments:
    """Arguments of varlen_attn: `rows` tokens in causal documents of different lengths, heads of `columns` channels."""
    q, k, v = (draw(rows, heads, columns, scale=1.2, shift=0.2) for _ in range(3))
    lengths = _document_lengths(rows, documents)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(draw.device, torch.int32)
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    values = (q, k, v, starts, starts, max(lengths), max(lengths))
    arguments = dict(zip(names, values, strict=True)) | {"window_size": (window, 0)}
    options = {"softcap": softcap, "deterministic": False if one_pass else None}
    return arguments | {name: value for name, value in options.items() if value is not None}


def _packed_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: q, k, v in, out out. Backward: those four and the upstream gradient in, three gradients out.
    return case["rows"] * case.get("heads", 2) * case["columns"] * (8 if backward else 4) * dtype.itemsize


def _packed_flops(case: Case, backward: bool) -> int:
    lengths = _document_lengths(case["rows"], case.get("documents", 4))
    seen = case.get("window", -1)
    unseen = (max(0, length - 1 - seen) if seen >= 0 else 0 for length in lengths)
    pairs = sum(n * (n + 1) // 2 - m * (m + 1) // 2 for n, m in zip(lengths, unseen, strict=True))
    return 2 * (5 if backward else 2) * case["columns"] * case.get("heads", 2) * pairs


_PACKED_QUICK: tuple[Case, ...] = ({"rows": 96, "columns": 32},)
_PACKED_SMALL: tuple[Case, ...] = (
    {"rows": 70, "columns": 16, "heads": 1, "documents": 3},
    {"rows": 75, "columns": 24, "heads": 1, "documents": 3, "one_pass": True},
)
_PACKED_LARGE: tuple[Case, ...] = (
    *(
        {"rows": 16384, "columns": columns, "heads": 2048 // columns, "documents": documents}
        for columns in (64, 128)
        for documents in (8, 64)
    ),
    *(
        {"rows": 16384, "columns": 128, "heads": 16, "documents": 8, **feature}
        for feature in ({"one_pass": True}, {"window": 1023}, {"softcap": 30.0})
    ),
)
_PACKED_COMPILED: tuple[Case, ...] = tuple(
    {"rows": 4096, "columns": columns, **passes} for columns in (64, 128) for passes in ({}, {"one_pass": True})
)
PACKED = Kernel(
    attention.varlen_attn,
    attention.varlen_attn_reference,
    _packed_inputs,
    _PACKED_SMALL,
    _PACKED_QUICK,
    _PACKED_LARGE,
    _PACKED_COMPILED,
    _packed_traffic,
    _packed_flops,
    realigns=True,
)
