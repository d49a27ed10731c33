"""LayerNorm and RMSNorm, alone or with the residual addition that comes before them.

    RMSNorm     rstd = 1 / sqrt(mean(x^2) + eps)              x^ = x rstd            y = x^ (w + weight_offset)
    LayerNorm   rstd = 1 / sqrt(mean((x - mean)^2) + eps)     x^ = (x - mean) rstd   y = x^ w + b

with means over a row of N elements. One kernel serves both (SUBTRACT_MEAN). With a residual r the row is
h = round(x + r), rounded to r's dtype because that is what the rest of the model will read.

Backward, with g = dy w the gradient of x^, w including its offset:

    dx = rstd (g - x^ mean(g x^) - mean(g) if LayerNorm)  + dh if h was used elsewhere
    dw = sum over rows of dy x^                             db = sum over rows of dy

Memory traffic per element, s bytes each (2 in bf16): forward reads x and writes y, 2 s; backward reads x and dy and
writes dx, 3 s. With a residual: reads x, r and writes h, y, 4 s; backward reads h, dy, dh and writes one gradient that
serves x and r, 4 s. Saved for backward: x (or h), the weight, and one or two fp32 numbers a row.

A program keeps whole rows in registers: one read, one write. Rows longer than the last tile of the tables (8192, or
4096 for the backward with a bias on some architectures) are walked in blocks: read twice in the forward, three times in
the backward with weight gradients. Statistics and sums are fp32.

Weight gradients are summed in registers over the rows that one program walks, written to a partial buffer
(programs x N) and added up in a second small pass in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime, configs
from ._rows import accumulator, as_rows, sum_partials
from ._runtime import Operator, kernel, launch, tl, with_kernel

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Reference: plain PyTorch.


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`; weight and bias may have another floating dtype than the input."""
    wide = _wide_dtype(input, weight, bias)
    if wide is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(input.to(wide), normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    return y.to(_result_dtype(input))


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """`F.rms_norm` with the weight `weight + weight_offset`, added before any rounding to 16 bits."""
    wide = _wide_dtype(input, weight, force=weight_offset != 0.0)
    if wide is None or weight is None:
        return F.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    eps = _default_eps(input) if eps is None else eps
    weight = weight.to(wide) + weight_offset
    y = F.rms_norm(input.to(wide), normalized_shape, weight, eps)  # type: ignore[arg-type]
    return y.to(_result_dtype(input))


def add_layer_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """h = input + residual in the residual's dtype; y = layer norm of h in the input's dtype; (y, h)."""
    h = (input + residual).to(residual.dtype)
    rows = h.to(torch.promote_types(h.dtype, input.dtype))
    return layer_norm_reference(rows, normalized_shape, weight, bias, eps).to(input.dtype), h


def add_rms_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """h = input + residual in the residual's dtype; y = RMS norm of h in the input's dtype; (y, h)."""
    h = (input + residual).to(residual.dtype)
    rows = h.to(torch.promote_types(h.dtype, input.dtype))
    return rms_norm_reference(rows, normalized_shape, weight, eps).to(input.dtype), h


def _wide_dtype(input: Tensor, *parameters: Tensor | None, force: bool = False) -> torch.dtype | None:
    """The dtype to compute in where PyTorch's op would reject or warn of these dtypes, else None."""
    present = [p for p in parameters if isinstance(p, Tensor)]
    if not isinstance(input, Tensor) or not all(t.is_floating_point() for t in (input, *present)):
        return None
    if not force and all(p.dtype == input.dtype for p in present):
        return None
    wide = torch.promote_types(input.dtype, torch.float32)
    for parameter in present:
        wide = torch.promote_types(wide, parameter.dtype)
    return wide


def _result_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if _runtime.autocast_to_fp32(input) else input.dtype


def _default_eps(input: Tensor) -> float:
    # PyTorch takes the machine epsilon of the dtype it computes in, which is fp32 for 16-bit inputs.
    return torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps


# Kernels.


@kernel()
def _load_row(X, R, H, x_at, r_at, mask, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr):
    x = tl.load(X + x_at, mask=mask, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        x += tl.load(R + r_at, mask=mask, other=0.0).to(ACC)
        # Rounded before the statistics: y must be the norm of the h that is stored.
        x = x.to(H.dtype.element_ty).to(ACC)
    return x


@kernel()
def _scale_and_shift(
    xhat,
    W,
    B,
    weight_offset,
    cols,
    col_ok,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    y = xhat
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=col_ok, other=0.0).to(ACC) + weight_offset
        y = y * w[None, :]
    if HAS_BIAS:
        y += tl.load(B + cols, mask=col_ok, other=0.0).to(ACC)[None, :]
    return y


@kernel(do_not_specialize=("M",))
def norm_forward_kernel(
    X,
    R,
    W,
    B,
    Y,
    H,
    STATS,
    M,
    N,
    stride_x,
    stride_r,
    eps,
    weight_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_STATS: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64 from the start: M x N may pass 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    x_rows, r_rows, y_rows = rows[:, None] * stride_x, rows[:, None] * stride_r, rows[:, None] * N
    mean = tl.zeros([BLOCK_M], dtype=ACC)

    if WHOLE_ROW:
        col_ok = cols < N
        mask = row_ok[:, None] & col_ok[None, :]
        x = _load_row(X, R, H, x_rows + cols[None, :], r_rows + cols[None, :], mask, HAS_RESIDUAL, ACC)
        if HAS_RESIDUAL:
            tl.store(H + y_rows + cols[None, :], x.to(H.dtype.element_ty), mask=mask)
        if SUBTRACT_MEAN:
            mean = tl.sum(x, axis=1) / N
            # Columns past N hold 0, not the mean: they must not enter the variance.
            x = tl.where(mask, x - mean[:, None], 0.0)
        # rstd = 1 / sqrt(mean(x^2) + eps); rows past M hold zeros, which eps = 0 would divide by
        rstd = tl.rsqrt(tl.where(row_ok, tl.sum(x * x, axis=1) / N + eps, 1.0))
        y = _scale_and_shift(x * rstd[:, None], W, B, weight_offset, cols, col_ok, HAS_WEIGHT, HAS_BIAS, ACC)
        tl.store(Y + y_rows + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)
    else:
        # Sum of squared deviations, block by block, merged exactly (Chan): no cancellation as in E[x^2] -
        # mean^2.
        squares = tl.zeros([BLOCK_M], dtype=ACC)
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            x = _load_row(X, R, H, x_rows + at[None, :], r_rows + at[None, :], mask, HAS_RESIDUAL, ACC)
            if HAS_RESIDUAL:
                tl.store(H + y_rows + at[None, :], x.to(H.dtype.element_ty), mask=mask)
            if SUBTRACT_MEAN:
                width = tl.minimum(N - start, BLOCK_N)
                block_mean = tl.sum(x, axis=1) / width
                x = tl.where(mask, x - block_mean[:, None], 0.0)
                step = block_mean - mean
                mean += step * width / (start + width)
                squares += step * step * start * width / (start + width)
            squares += tl.sum(x * x, axis=1)
        rstd = tl.rsqrt(tl.where(row_ok, squares / N + eps, 1.0))
        for start in range(0, N, BLOCK_N):
            at = start + cols
            col_ok = at < N
            mask = row_ok[:, None] & col_ok[None, :]
            # From X and R again, not from H: other threads of this program may not see H's stores yet.
            x = _load_row(X, R, H, x_rows + at[None, :], r_rows + at[None, :], mask, HAS_RESIDUAL, ACC)
            xhat = (x - mean[:, None]) * rstd[:, None]
            y = _scale_and_shift(xhat, W, B, weight_offset, at, col_ok, HAS_WEIGHT, HAS_BIAS, ACC)
            tl.store(Y + y_rows + at[None, :], y.to(Y.dtype.element_ty), mask=mask)

    if SAVE_STATS:
        tl.store(STATS + rows, rstd, mask=row_ok)
        if SUBTRACT_MEAN:
            tl.store(STATS + M + rows, mean, mask=row_ok)


@kernel()
def _load_weight(W, weight_offset, cols, N, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    w = tl.full(cols.shape, 1.0, ACC)
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=cols < N, other=0.0).to(ACC) + weight_offset
    return w


@kernel()
def _load_backward(X, DY, w, x_at, dy_at, mask, mean, rstd, ACC: tl.constexpr):
    """x^, dy and g = dy w of one tile; dy and g are 0 outside the mask."""
    dy = tl.load(DY + dy_at, mask=mask, other=0.0).to(ACC)
    xhat = (tl.load(X + x_at, mask=mask, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
    return xhat, dy, dy * w[None, :]


@kernel()
def _store_dx(dx, DH, DX, DR, h_at, x_at, mask, HAS_DH: tl.constexpr, HAS_DR: tl.constexpr, ACC: tl.constexpr):
    if HAS_DH:
        dx += tl.load(DH + h_at, mask=mask, other=0.0).to(ACC)
    tl.store(DX + x_at, dx.to(DX.dtype.element_ty), mask=mask)
    if HAS_DR:
        tl.store(DR + x_at, dx.to(DR.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=("M", "steps"))
def norm_backward_kernel(
    DY,
    DH,
    X,
    W,
    STATS,
    DX,
    DR,
    DW,
    DB,
    M,
    N,
    steps,
    stride_dy,
    stride_dh,
    stride_x,
    weight_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DR: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    # The widest tile has no registers to keep it in.
    KEEP_WEIGHT: tl.constexpr = WHOLE_ROW and STAGES > 1
    if KEEP_WEIGHT:
        w = _load_weight(W, weight_offset, cols, N, HAS_WEIGHT, ACC)
    # Program p takes tiles p, p + programs, p + 2 programs, ...: a fixed order, whatever runs first. STAGES - 1 tiles
    # are on their way while one is summed: a row's sums alone would leave memory idle.
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = (step * tl.num_programs(0) + program).to(tl.int64)
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < M
        dy_rows, dh_rows = rows[:, None] * stride_dy, rows[:, None] * stride_dh
        x_rows, dx_rows = rows[:, None] * stride_x, rows[:, None] * N
        rstd = tl.load(STATS + rows, mask=row_ok, other=0.0)
        mean = tl.zeros([BLOCK_M], dtype=ACC)
        if SUBTRACT_MEAN:
            mean = tl.load(STATS + M + rows, mask=row_ok, other=0.0)
        if WHOLE_ROW:
            mask = row_ok[:, None] & (cols < N)[None, :]
            x_at, dy_at = x_rows + cols[None, :], dy_rows + cols[None, :]
            if not KEEP_WEIGHT:
                w = _load_weight(W, weight_offset, cols, N, HAS_WEIGHT, ACC)
            xhat, dy, g = _load_backward(X, DY, w, x_at, dy_at, mask, mean, rstd, ACC)
            # dw = sum over rows of dy x^, db = sum over rows of dy
            if HAS_DW:
                dw += dy * xhat
            if HAS_DB:
                db += dy
            if HAS_DX:
                # dx = rstd (g - x^ mean(g x^) - mean(g))
                dx = g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None]
                if SUBTRACT_MEAN:
                    dx -= (tl.sum(g, axis=1) / N)[:, None]
                dx *= rstd[:, None]
                h_at, dx_at = dh_rows + cols[None, :], dx_rows + cols[None, :]
                _store_dx(dx, DH, DX, DR, h_at, dx_at, mask, HAS_DH, HAS_DR, ACC)
        else:
            sum_gx = tl.zeros([BLOCK_M], dtype=ACC)
            sum_g = tl.zeros([BLOCK_M], dtype=ACC)
            for start in range(0, N, BLOCK_N):
                at = start + cols
                mask = row_ok[:, None] & (at < N)[None, :]
                x_at, dy_at = x_rows + at[None, :], dy_rows + at[None, :]
                w_block = _load_weight(W, weight_offset, at, N, HAS_WEIGHT, ACC)
                xhat, dy, g = _load_backward(X, DY, w_block, x_at, dy_at, mask, mean, rstd, ACC)
                sum_gx += tl.sum(g * xhat, axis=1)
                if SUBTRACT_MEAN:
                    sum_g += tl.sum(g, axis=1)
            for start in range(0, N, BLOCK_N):
                at = start + cols
                mask = row_ok[:, None] & (at < N)[None, :]
                x_at, dy_at = x_rows + at[None, :], dy_rows + at[None, :]
                w_block = _load_weight(W, weight_offset, at, N, HAS_WEIGHT, ACC)
                xhat, dy, g = _load_backward(X, DY, w_block, x_at, dy_at, mask, mean, rstd, ACC)
                dx = (g - xhat * (sum_gx / N)[:, None] - (sum_g / N)[:, None]) * rstd[:, None]
                h_at, dx_at = dh_rows + at[None, :], dx_rows + at[None, :]
                _store_dx(dx, DH, DX, DR, h_at, dx_at, mask, HAS_DH, HAS_DR, ACC)
    if HAS_DW:
        tl.store(DW + program.to(tl.int64) * N + cols, tl.sum(dw, axis=0), mask=cols < N)
    if HAS_DB:
        tl.store(DB + program.to(tl.int64) * N + cols, tl.sum(db, axis=0), mask=cols < N)


@kernel(do_not_specialize=("M", "steps"))
def norm_weight_gradient_kernel(
    DY,
    X,
    STATS,
    DW,
    DB,
    M,
    N,
    steps,
    stride_dy,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    ACC: tl.constexpr,
):
    """dw and db alone, for rows too long to stay in registers: program = row group x column strip."""
    strips = tl.cdiv(N, BLOCK_N)
    group, groups = tl.program_id(0) // strips, tl.num_programs(0) // strips
    cols = (tl.program_id(0) % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    db = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for step in range(steps):
        rows = (step * groups + group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < M
        mask = row_ok[:, None] & (cols < N)[None, :]
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_DW:
            x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(ACC)
            if SUBTRACT_MEAN:
                x -= tl.load(STATS + M + rows, mask=row_ok, other=0.0)[:, None]
            dw += dy * x * tl.load(STATS + rows, mask=row_ok, other=0.0)[:, None]
        if HAS_DB:
            db += dy
    at = group.to(tl.int64) * N + cols
    if HAS_DW:
        tl.store(DW + at, tl.sum(dw, axis=0), mask=cols < N)
    if HAS_DB:
        tl.store(DB + at, tl.sum(db, axis=0), mask=cols < N)


# Launchers.


def _one_dtype(*tensors: Tensor | None) -> bool:
    return len({tensor.dtype for tensor in tensors if tensor is not None}) == 1


def _backward_table(need_db: bool, *tensors: Tensor | None) -> configs.RowTable:
    if not need_db:
        return configs.NORM_BACKWARD
    return configs.NORM_BACKWARD_BIAS if _one_dtype(*tensors) else configs.NORM_BACKWARD_BIAS_MIXED


class _ForwardOptions(NamedTuple):
    """What norm_forward takes besides tensors, in the order of its schema."""

    columns: int
    eps: float
    weight_offset: float
    subtract_mean: bool
    y_dtype: torch.dtype
    save_stats: bool


class _BackwardOptions(NamedTuple):
    """What norm_backward takes besides tensors, in the order of its schema; needs: which of dx, dr, dw, db."""

    columns: int
    weight_offset: float
    subtract_mean: bool
    dx_dtype: torch.dtype
    dr_dtype: torch.dtype
    dw_dtype: torch.dtype
    db_dtype: torch.dtype
    needs: Sequence[bool]


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, stats): h is empty without a residual; stats (rstd, or rstd and mean) x rows, empty if not saved."""
    options = _ForwardOptions(*rest)
    y, h, stats = _fake_forward(x, residual, weight, bias, *rest)
    columns = options.columns
    x2 = as_rows(x, columns)
    rows = x2.shape[0]
    if rows == 0:
        return y, h, stats
    r2 = x2 if residual is None else as_rows(residual, columns)
    config = configs.row_config(configs.NORM_FORWARD, _runtime.architecture(x.device), columns)
    launch(
        norm_forward_kernel,
        (-(-rows // config.block_m),),
        (
            *(x2, r2, x2 if weight is None else weight.contiguous(), x2 if bias is None else bias.contiguous()),
            *(y, h, stats),
            *(rows, columns, x2.stride(0), r2.stride(0), options.eps, options.weight_offset),
        ),
        num_warps=config.num_warps,
        max_registers=None if _one_dtype(x, residual, weight, bias) else configs.NORM_REGISTERS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WHOLE_ROW=columns <= config.block_n,
        SUBTRACT_MEAN=options.subtract_mean,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SAVE_STATS=options.save_stats,
        ACC=accumulator(x.dtype)[1],
    )
    return y, h, stats


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = _ForwardOptions(*rest)
    y = torch.empty(x.shape, dtype=options.y_dtype, device=x.device)
    h_like = x if residual is None else residual
    h = torch.empty((0,) if residual is None else x.shape, dtype=h_like.dtype, device=x.device)
    rows = x.numel() // options.columns if options.save_stats else 0
    stats = torch.empty((1 + options.subtract_mean, rows), dtype=accumulator(x.dtype)[0], device=x.device)
    return y, h, stats


def _launch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor | None, stats: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dr, dw, db), those not in `needs` empty. x is what was normalised: the input, or h."""
    options = _BackwardOptions(*rest)
    dx, dr, dw, db = grads = _fake_backward(dy, dh, x, weight, stats, *rest)
    columns, needs = options.columns, options.needs
    x2, dy2 = as_rows(x, columns), as_rows(dy.resolve_neg(), columns)
    if x2.shape[0] == 0:
        return dx, dr, dw.zero_(), db.zero_()
    dh2 = None if dh is None else as_rows(dh.resolve_neg(), columns)
    given = _Given(dy2, dh2, x2, weight, stats)
    table = _backward_table(needs[3], dy, dh, x, weight)
    config = configs.row_config(table, _runtime.architecture(x.device), columns)
    whole_row, partials = columns <= config.block_n, ()
    if whole_row or needs[0]:
        partials = _launch_rows(config, given, dx, dr, options)
    if not whole_row and any(needs[2:]):
        partials = _launch_long_weight_gradient(given, options)
    sums = zip(partials, (dw, db), needs[2:], strict=False)
    sum_partials(*[(partial, total) for partial, total, need in sums if need])
    return grads


class _Given(NamedTuple):
    """What the backward reads, as rows of adjacent columns; x is what was normalised."""

    dy: Tensor
    dh: Tensor | None
    x: Tensor
    weight: Tensor | None
    stats: Tensor


def _launch_rows(
    config: configs.RowConfig, given: _Given, dx: Tensor, dr: Tensor, options: _BackwardOptions
) -> tuple[Tensor, Tensor]:
    """Fill dx and dr; and give partial dw and db, (programs, columns) each, empty where no row fits the registers."""
    dy, dh, x, weight, stats = given
    rows, columns = x.shape
    whole_row = columns <= config.block_n
    tiles = -(-rows // config.block_m)
    # Programs that stay resident, each walking many tiles: as few partial sums as keep the device busy.
    programs = min(tiles, _runtime.multiprocessors(x.device) * configs.programs_per_multiprocessor(config))
    need_dx, need_dr, need_dw, need_db = options.needs
    # Two buffers, not one cut in two: both start aligned, whatever the sizes.
    dw, db = (stats.new_empty((programs if need and whole_row else 0, columns)) for need in (need_dw, need_db))
    dh_read = dy if dh is None else dh
    launch(
        norm_backward_kernel,
        (programs,),
        (
            *(dy, dh_read, x, x if weight is None else weight.contiguous(), stats),
            *(dx, dr, dw, db),
            *(rows, columns, -(-tiles // programs)),
            *(dy.stride(0), dh_read.stride(0), x.stride(0), options.weight_offset),
        ),
        num_warps=config.num_warps,
        max_registers=configs.NORM_REGISTERS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WHOLE_ROW=whole_row,
        SUBTRACT_MEAN=options.subtract_mean,
        HAS_WEIGHT=weight is not None,
        HAS_DH=dh is not None,
        HAS_DX=need_dx,
        HAS_DR=need_dr,
        HAS_DW=need_dw and whole_row,
        HAS_DB=need_db and whole_row,
        STAGES=config.num_stages,
        ACC=accumulator(x.dtype)[1],
    )
    return dw, db


def _launch_long_weight_gradient(given: _Given, options: _BackwardOptions) -> tuple[Tensor, Tensor]:
    """Partial dw and db of rows that do not fit a program's registers, (row groups, columns) each."""
    dy, _, x, _, stats = given
    rows, columns = x.shape
    need_dw, need_db = options.needs[2:]
    config = configs.only_config(configs.NORM_WEIGHT_GRADIENT, _runtime.architecture(x.device))
    tiles, strips = -(-rows // config.block_m), -(-columns // config.block_n)
    resident = _runtime.multiprocessors(x.device) * configs.programs_per_multiprocessor(config)
    groups = min(tiles, max(1, -(-resident // strips)))
    dw, db = (stats.new_empty((groups if need else 0, columns)) for need in (need_dw, need_db))
    launch(
        norm_weight_gradient_kernel,
        (groups * strips,),
        (
            *(dy, x, stats, dw, db),
            *(rows, columns, -(-tiles // groups), dy.stride(0), x.stride(0)),
        ),
        num_warps=config.num_warps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SUBTRACT_MEAN=options.subtract_mean,
        HAS_DW=need_dw,
        HAS_DB=need_db,
        ACC=accumulator(x.dtype)[1],
    )
    return dw, db


def _fake_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor | None, stats: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _BackwardOptions(*rest)
    shapes = (x.shape, x.shape, (options.columns,), (options.columns,))
    dtypes = (options.dx_dtype, options.dr_dtype, options.dw_dtype, options.db_dtype)
    dx, dr, dw, db = (
        torch.empty(shape if need else (0,), dtype=dtype, device=x.device)
        for shape, dtype, need in zip(shapes, dtypes, options.needs, strict=True)
    )
    return dx, dr, dw, db


# Operators and autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, columns, _, weight_offset, subtract_mean, _, _ = inputs
    _, h, stats = output
    ctx.set_materialize_grads(False)
    # h does not depend on the weight or the bias.
    h_trains = residual is not None and any(ctx.needs_input_grad[:2])
    ctx.mark_non_differentiable(*((stats,) if h_trains else (h, stats)))
    ctx.save_for_backward(x if residual is None else h, weight, stats)
    ctx.columns, ctx.weight_offset, ctx.subtract_mean = columns, weight_offset, subtract_mean
    ctx.dtypes = [(like if like is not None else x).dtype for like in (x, residual, weight, bias)]
    ctx.parameter_shapes = [None if p is None else p.shape for p in (weight, bias)]


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    rows, weight, stats = ctx.saved_tensors
    x_dtype, r_dtype, _, _ = ctx.dtypes
    need_x, need_r, need_w, need_b = ctx.needs_input_grad[:4]
    rest = (None,) * 6
    if dy is None:
        # Only h was used: its gradient passes through the addition.
        dx = None if dh is None or not need_x else dh.to(x_dtype)
        return (dx, dh if need_r else None, None, None, *rest)
    two_dtypes = need_r and r_dtype != x_dtype
    needs = [need_x or need_r, two_dtypes, need_w, need_b]
    dx, dr, dw, db = norm_backward(
        dy, dh, rows, weight, stats, ctx.columns, ctx.weight_offset, ctx.subtract_mean, *ctx.dtypes, needs
    )
    w_shape, b_shape = ctx.parameter_shapes
    return (
        dx if need_x else None,
        (dr if two_dtypes else dx) if need_r else None,
        dw.view(w_shape) if need_w else None,
        db.view(b_shape) if need_b else None,
        *rest,
    )


norm_forward = Operator(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, SymInt columns, float eps,"
    " float weight_offset, bool subtract_mean, ScalarType y_dtype, bool save_stats)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
norm_backward = Operator(
    "norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor? weight, Tensor stats, SymInt columns,"
    " float weight_offset, bool subtract_mean, ScalarType dx_dtype, ScalarType dr_dtype, ScalarType dw_dtype,"
    " ScalarType db_dtype, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _obstacle(input: Any, residual: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    tensors = [t for t in (input, residual, weight, bias) if t is not None]
    if not isinstance(input, Tensor) or not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    for tensor in tensors:
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
    if not isinstance(normalized_shape, (tuple, list)) or not normalized_shape:
        return "normalized_shape is not a list of sizes"
    if not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in normalized_shape):
        return "a size in normalized_shape is not an int"
    shape = tuple(normalized_shape)
    if input.dim() < len(shape) or tuple(input.shape[-len(shape) :]) != shape:
        return f"the input's shape {tuple(input.shape)} does not end in {shape}"
    if any(p is not None and tuple(p.shape) != shape for p in (weight, bias)):
        return f"weight or bias is not of shape {shape}"
    if math.prod(shape) == 0:
        return "rows of zero elements"
    if residual is not None and residual.shape != input.shape:
        return "input and residual are broadcast"
    if eps is not None and not isinstance(eps, (int, float)):
        return "eps is not a number"
    return None


def _norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    subtract_mean: bool,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tensors = (input, residual, weight, bias)
    save_stats = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, h, _ = norm_forward(
        *tensors, math.prod(normalized_shape), float(eps), weight_offset, subtract_mean, y_dtype, save_stats
    )
    return y, h


# Public functions.


@with_kernel
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`, the same arguments, values, dtypes and errors.

    input (*, *normalized_shape), fp32, fp16 or bf16 for the kernel; weight, bias (*normalized_shape), of any
    of these dtypes whatever the input's. Result: the input's shape and dtype, fp32 under CUDA autocast. Ba,
    Kiros, Hinton 2016.
    """
    obstacle = _obstacle(input, None, normalized_shape, weight, bias, eps)
    if obstacle is None and eps is None:
        obstacle = "eps is None"
    if not _runtime.choose(input, weight, bias, obstacle=obstacle):
        return layer_norm_reference(input, normalized_shape, weight, bias, eps)
    return _norm(input, None, normalized_shape, weight, bias, eps, 0.0, True, _result_dtype(input))[0]


@with_kernel
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """`F.rms_norm`, the same arguments, values, dtypes and errors; the weight may carry an offset.

    input (*, *normalized_shape), fp32, fp16 or bf16 for the kernel; weight (*normalized_shape), of any of
    these dtypes whatever the input's; eps None is PyTorch's default. Result: the input's shape and dtype,
    fp32 under CUDA autocast. Raises ValueError for a weight_offset that is not finite or has no weight.
    Zhang, Sennrich 2019.
    """
    _check_weight_offset(weight_offset, weight)
    obstacle = _obstacle(input, None, normalized_shape, weight, None, eps)
    if not _runtime.choose(input, weight, obstacle=obstacle):
        return rms_norm_reference(input, normalized_shape, weight, eps, weight_offset=weight_offset)
    eps = _default_eps(input) if eps is None else eps
    dtype = _result_dtype(input)
    return _norm(input, None, normalized_shape, weight, None, eps, float(weight_offset), False, dtype)[0]


@with_kernel
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(y, h): h = input + residual in the residual's dtype, y = `layer_norm` of h in the input's dtype.

    Shapes and dtypes as in `layer_norm`; the residual has the input's shape. y has the input's dtype under
    autocast too.
    """
    obstacle = _obstacle(input, residual, normalized_shape, weight, bias, eps)
    if obstacle is None and eps is None:
        obstacle = "eps is None"
    if not _runtime.choose(input, residual, weight, bias, obstacle=obstacle):
        return add_layer_norm_reference(input, residual, normalized_shape, weight, bias, eps)
    return _norm(input, residual, normalized_shape, weight, bias, eps, 0.0, True, input.dtype)


@with_kernel
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h): h = input + residual in the residual's dtype, y = `rms_norm` of h in the input's dtype.

    Shapes and dtypes as in `rms_norm`; the residual has the input's shape. y has the input's dtype under
    autocast too.
    """
    obstacle = _obstacle(input, residual, normalized_shape, weight, None, eps)
    if not _runtime.choose(input, residual, weight, obstacle=obstacle):
        return add_rms_norm_reference(input, residual, normalized_shape, weight, eps)
    eps = _default_eps(residual) if eps is None else eps
    return _norm(input, residual, normalized_shape, weight, None, eps, 0.0, False, input.dtype)


def _check_weight_offset(weight_offset: Any, weight: Any) -> None:
    # Compared, not asked math.isfinite: the compiler traces a number that varies from call to call.
    if not isinstance(weight_offset, (int, float)) or not -math.inf < weight_offset < math.inf:
        raise ValueError(f"weight_offset: got {weight_offset!r}; pass a finite number")
    if weight_offset != 0.0 and weight is None:
        raise ValueError(f"weight_offset: got {weight_offset!r} with weight=None; pass a weight, or weight_offset=0.0")
