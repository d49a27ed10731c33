"""Loss, log-sum-exp and, if asked for, the gradient of each row: the kernel and its launchers."""

from __future__ import annotations

from torch import Tensor

from .. import _math, _runtime, configs
from .._runtime import kernel, launch, tl
from ._launch import LSE, Options, inputs_of, registers_for, row_stride, switches_of
from ._tiles import (
    _SCALARS,
    _add_powers,
    _capped,
    _coefficients,
    _deviations,
    _finite,
    _gradient,
    _lane_sums,
    _log2_power,
    _log_sum,
    _powers,
    _targets,
    _two_sum,
)


@kernel(do_not_specialize=(*_SCALARS, "UPSTREAM", "LOSS", "Z", "LSE", "COUNT", "stride_upstream", "stride_lse"))
def cross_entropy_forward_kernel(
    X,
    T,
    W,
    WEIGHT_SUM,
    UPSTREAM,
    LOSS,
    Z,
    LSE,
    COUNT,
    DX,
    M,
    N,
    stride_x,
    stride_t,
    stride_upstream,
    stride_lse,
    stride_dx,
    ignore_index,
    on_one,
    on_each,
    z_loss,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64 from the start: M x N may pass 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    x_rows = X + rows[:, None] * stride_x
    mask = row_ok[:, None] & (cols < N)[None, :]
    x = tl.load(x_rows + cols[None, :], mask=mask, other=float("-inf"))
    y, counted, w = _targets(T, W, rows, row_ok, stride_t, N, ignore_index, HAS_WEIGHT, ACC)
    # Before any gradient is written: it may take the logits' place.
    target = tl.load(X + rows * stride_x + y, mask=row_ok, other=0.0)
    target = _capped(target, rows >= 0, softcap, HAS_SOFTCAP, ACC)
    base = tl.where(tl.abs(target) < float("inf"), target, 0.0)
    l = _capped(x, mask, softcap, HAS_SOFTCAP, ACC)

    # The target's own power stays out of the sum of powers: next to 1, that of a confident token, the others would
    # lose their digits.
    others = tl.where(cols[None, :] == y[:, None], float("-inf"), l)
    if HAS_SMOOTHING:
        deviations = _deviations(l, W, cols, cols < N, mask, base, HAS_WEIGHT, ACC)
    if WHOLE_ROW:
        row_top = _finite(tl.maximum(tl.max(others, axis=1), target))
        row_top2 = _log2_power(row_top, ACC)
        s = tl.sum(_powers(others, row_top2[:, None], ACC), axis=1)
        if HAS_SMOOTHING:
            deviation = tl.sum(deviations, axis=1)
    else:
        # Each thread has the largest of its logits in `top` and the sum of their powers in `s`: no thread waits for
        # another before the whole row is read.
        top = tl.full([BLOCK_M, LANES], float("-inf"), ACC)
        s = tl.zeros([BLOCK_M, LANES], dtype=ACC)
        top, s = _add_powers(others, top, s, LANES, VECTOR, ACC)
        if HAS_SMOOTHING:
            lane_deviation = _lane_sums(deviations, LANES, VECTOR)
        # The next block is always on its way while one is summed.
        at = BLOCK_N + cols
        x = tl.load(x_rows + at[None, :], mask=row_ok[:, None] & (at < N)[None, :], other=float("-inf"))
        for start in range(BLOCK_N, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            l = _capped(x, mask, softcap, HAS_SOFTCAP, ACC)
            ahead = at + BLOCK_N
            x = tl.load(x_rows + ahead[None, :], mask=row_ok[:, None] & (ahead < N)[None, :], other=float("-inf"))
            if HAS_SMOOTHING:
                deviations = _deviations(l, W, at, at < N, mask, base, HAS_WEIGHT, ACC)
                lane_deviation += _lane_sums(deviations, LANES, VECTOR)
            # A branch: two more instructions for every logit would cost time.
            if tl.max(((y >= start) & (y < start + BLOCK_N)).to(tl.int32), axis=0) > 0:
                l = tl.where(at[None, :] == y[:, None], float("-inf"), l)
            top, s = _add_powers(l, top, s, LANES, VECTOR, ACC)
        row_top = _finite(tl.maximum(tl.max(top, axis=1), target))
        row_top2 = _log2_power(row_top, ACC)
        s = tl.sum(s * tl.exp2(_log2_power(top, ACC) - row_top2[:, None]), axis=1)
        if HAS_SMOOTHING:
            deviation = tl.sum(lane_deviation, axis=1)
    origin, rest = _log_sum(s, target, row_top, row_top2, ACC)
    high, low = _two_sum(origin, rest)
    nll = (origin - target) + rest
    loss = on_one * w * nll
    weight_sum = tl.load(WEIGHT_SUM) if HAS_SMOOTHING and HAS_WEIGHT else N
    if HAS_SMOOTHING:
        # sum_v w_v (lse - l_v)
        loss += on_each * (weight_sum * ((origin - base) + rest) - deviation)
    z = tl.where(counted, z_loss * high * high, 0.0)
    tl.store(LOSS + rows, tl.where(counted, loss + z, 0.0), mask=row_ok)
    tl.store(Z + rows, z, mask=row_ok)
    tl.store(LSE + rows, high, mask=row_ok)
    tl.store(LSE + stride_lse + rows, low, mask=row_ok)
    tl.store(COUNT + rows, w, mask=row_ok)

    if HAS_GRADIENT:
        scale = tl.full(w.shape, 1.0, ACC)
        if HAS_UPSTREAM:
            scale = tl.load(UPSTREAM + rows * stride_upstream, mask=row_ok, other=0.0).to(ACC)
        a, b, c = _coefficients(w, counted, scale, high, weight_sum, on_one, on_each, z_loss)
        miss = _math.expm1(-nll)
        dx_rows = DX + rows[:, None] * stride_dx
        # A whole row is there still. Blocks come from the end, which was read last and is still in the cache.
        blocks = 1 if WHOLE_ROW else tl.cdiv(N, BLOCK_N)
        for block in range(blocks):
            at = (blocks - 1 - block) * BLOCK_N + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            if not WHOLE_ROW:
                x = tl.load(x_rows + at[None, :], mask=mask, other=float("-inf"))
                l = _capped(x, mask, softcap, HAS_SOFTCAP, ACC)
            dx = _gradient(
                x,
                l,
                W,
                at,
                at < N,
                y,
                miss,
                high,
                low,
                a,
                b,
                c,
                softcap,
                HAS_SMOOTHING and HAS_WEIGHT,
                HAS_SOFTCAP,
                ACC,
            )
            tl.store(dx_rows + at[None, :], dx.to(DX.dtype.element_ty), mask=mask)


def launch_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    rows: Tensor,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """Fill rows (ROW_VALUES, M) from logits (M, C) of adjacent columns; and gradient (M, C), if one is given.

    target (M,) int64 or uint8; weight (C,). `rows` may be a slice of a larger buffer, [:, first : first + M], its
    columns adjacent. The gradient is that of each row's loss by its logits, times `upstream` (M,) or 0-d if given and
    divided by nothing; it may be the logits' own memory. On a CPU a target outside [0, C) raises IndexError.
    """
    loss, z, _, _, count = rows.unbind(0)
    launch_forward(logits, target, weight, options, (loss, z, rows[LSE], count), gradient, upstream)


def launch_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """`launch_rows` with loss, z, lse (2, M), count in tensors of their own."""
    rows, classes = logits.shape
    _check_targets(target, options.ignore_index, classes)
    if rows == 0:
        return
    lse = outputs[2]
    table = configs.CROSS_ENTROPY_LONG if gradient is None else configs.CROSS_ENTROPY_LONG_GRADIENT
    config = configs.row_config(configs.CROSS_ENTROPY, _runtime.architecture(logits.device), classes, table)
    dx = logits if gradient is None else gradient
    launch(
        cross_entropy_forward_kernel,
        (-(-rows // config.block_m),),
        (
            *inputs_of(logits, target, weight, options, lse),
            lse if upstream is None else upstream.resolve_neg(),
            *(*outputs, dx, rows, classes, logits.stride(0), target.stride(0)),
            *(row_stride(upstream), lse.stride(0), dx.stride(0), *options.scalars(classes)),
        ),
        num_warps=config.num_warps,
        max_registers=registers_for(options),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **_lanes(config, logits),
        WHOLE_ROW=classes <= config.block_n,
        HAS_GRADIENT=gradient is not None,
        **switches_of(weight, options, upstream, logits),
    )


def _lanes(config: configs.RowConfig, logits: Tensor) -> dict[str, int]:
    """How Triton deals a tile out: 16 bytes a thread where the rows' distance allows such loads, then along the row.

    It decides what stays in one thread and so the speed, never the result's meaning.
    """
    vector = min(16 // logits.element_size() if logits.stride(0) % 16 == 0 else 1, config.block_n)
    threads = config.num_warps * (64 if _runtime.architecture(logits.device).startswith("gfx") else 32)
    return {"LANES": min(threads, config.block_n // vector), "VECTOR": vector}


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """PyTorch's IndexError. On a CPU alone: on a GPU it would wait for the device, and the kernels answer NaN."""
    if target.device.type != "cpu":
        return
    wanted = target.long()
    bad = (wanted != ignore_index) & ((wanted < 0) | (wanted >= classes))
    if bad.any():
        raise IndexError(f"Target {wanted[bad][0].item()} is out of bounds.")
