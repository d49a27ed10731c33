"""Attention's backward: delta, then the gradients, by two passes over the scores or by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator
from .._runtime import kernel, tl
from ._backward_keys import launch_keys
from ._backward_queries import launch_queries
from ._launch import Extras, Options, empty_like, power_of_2, readable, stepping, strides_of
from ._tiles import VARYING, load_tile

_WIDEST_IN_ONE_PASS = 128


@kernel(do_not_specialize=VARYING)
def attention_delta_kernel(
    OUT,
    DO,
    LSE,
    DLSE,
    DELTA,
    T,
    heads,
    tiles,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dlb,
    stride_dlh,
    stride_dlt,
    BLOCK_M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """delta = rowsum(dout out) - dlse log2(e), lse being in units of log2; 0 for a row that saw nothing."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    rows_ok = rows < T
    out_at = OUT + (batch * stride_ob + head * stride_oh + rows[:, None] * stride_ot) * UNIT + e[None, :]
    do_at = DO + (batch * stride_dob + head * stride_doh + rows[:, None] * stride_dot) * UNIT + e[None, :]
    out = load_tile(out_at, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E).to(ACC)
    do = load_tile(do_at, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E).to(ACC)
    delta = tl.sum(out * do, 1)
    at = row.to(tl.int64) * T + rows
    if HAS_DLSE:
        dlse_at = DLSE + batch * stride_dlb + head * stride_dlh + rows * stride_dlt
        delta -= tl.load(dlse_at, mask=rows_ok, other=0.0) * 1.4426950408889634
        lse = tl.load(LSE + at, mask=rows_ok, other=0.0)
        delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(DELTA + at, delta, mask=rows_ok)


def launch_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), those not in `needs` empty."""
    extras, options, needs = stepping(Extras(*rest[:6])), Options(*rest[6:-1]), rest[-1]
    grads = fake_backward(do, dlse, q, k, v, out, lse, *rest)
    if q.numel() == 0 or k.numel() == 0 or extras.cu_q is not None:
        for grad in grads:
            grad.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return grads
    q, k, v, do = readable(q), readable(k), readable(v), readable(do)
    inputs = (q, k, v, do, _launch_delta(out, do, lse, dlse), lse)
    keys, has_dlse = needs[1] or needs[2], dlse is not None
    one_pass = not options.deterministic and max(q.shape[-1], v.shape[-1]) <= _WIDEST_IN_ONE_PASS
    if keys and needs[0] and one_pass:
        sums = torch.zeros(q.shape, dtype=accumulator(q.dtype)[0], device=q.device)
        launch_keys(inputs, grads, extras, options, needs, has_dlse, sums)
        grads[0].copy_(sums)
        return grads
    if keys:
        launch_keys(inputs, grads, extras, options, needs, has_dlse)
    if needs[0]:
        launch_queries(inputs, grads[0], extras, options, has_dlse)
    return grads


def _launch_delta(out: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout out) - dlse log2(e), shaped as lse."""
    (B, H, T), E = lse.shape, out.shape[-1]
    delta = torch.empty_like(lse)
    unit, strides = strides_of(out, do)
    dlse = None if dlse is None else dlse.resolve_neg()
    block_e = power_of_2(E)
    block_m = configs.ATTENTION_DELTA_ELEMENTS // block_e
    tiles = -(-T // block_m)
    _runtime.launch(
        attention_delta_kernel,
        (B * H * tiles,),
        (
            *(out, do, lse, lse if dlse is None else dlse),
            delta,
            *(T, H, tiles, *strides, *([0] * 3 if dlse is None else dlse.stride())),
        ),
        num_warps=4,
        max_registers=configs.ATTENTION_REGISTERS,
        BLOCK_M=block_m,
        E=E,
        BLOCK_E=block_e,
        UNIT=unit,
        HAS_DLSE=dlse is not None,
        ACC=accumulator(out.dtype)[1],
    )
    return delta


def fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        empty_like(x, x.shape[-1]) if need else x.new_empty(0) for x, need in zip((q, k, v), rest[-1], strict=True)
    )
    return dq, dk, dv
