"""Cross-entropy: softmax over the classes and the negative log-likelihood of the target, in one function.

With c = softcap, x the logits of one token, y its target, w the class weights:

    l   = c * tanh(x / c)                                     (l = x without a cap)
    lse = log sum_v exp(l_v)
    nll = w_y * (lse - l_y)                                   label smoothing mixes in mean_v w_v * (lse - l_v)
    loss_token = nll + z_loss * lse**2
    dloss/dl_v = w_y * (exp(l_v - lse) - [v = y]) + 2 * z_loss * lse * exp(l_v - lse)
    dl/dx      = 1 - (l / c)**2

"mean" divides the sum over the counted tokens by sum w_y (by the number of counted tokens without weights, by the
number of rows with probability targets); `num_items` replaces that denominator.

Bytes per logit, s each (2 in bf16): forward reads it, s; backward reads it and writes its gradient, 2 s. Saved: the
logits themselves, and two fp32 numbers a row. (PyTorch reads the logits, writes log-probabilities and saves them.)
Forward is two launches, rows and then their sum, a third past 32,768 rows, one under "none"; backward is one. (Label
smoothing adds the sum of the class weights to both, if there are any.) Nothing is copied but logits whose classes are
not adjacent, and (N, C, d1, ...), which becomes rows.

Forward: a row is one block, or walked in blocks with the log-sum-exp built up as it goes: every thread keeps the
largest of its logits and the sum of their powers, so that threads meet once a row. A thread's next 32 bytes in 16 bits
(64 in 32) are requested while it works on the last: 2 programs of 512 threads and 47 registers on a multiprocessor of
sm_90 have 32 KB on the way, in plain bf16, and a single one, where rows are few, 16 KB. About 9 instructions and one
power of two a logit; an H200's bandwidth leaves time for 12. The soft-cap takes two powers or reciprocals more, and is
then no longer bound by memory alone. Rows whose distance 16 does not divide (50257 classes) are read element by
element.

Backward, dl_v summed up with e = label_smoothing, C classes, W = sum_v w_v:

    dl_v = (1 - e) w_y (p_v - [v = y]) + (e / C) (W p_v - w_v) + 2 z_loss lse p_v,    p_v = exp(l_v - lse)

The loss is computed in fp32 and so is p - 1, from log(1 + the other classes' share): a token so confident that p rounds
to 1 keeps its loss and gradient to all digits. lse is saved as a sum of two numbers for that. Rows past 32,768 are
summed by several programs, then by one, always in the same order.

Ignored rows: their gradient is 0, without reading their logits; where those made lse NaN or infinite it is NaN, as
PyTorch's is. A target outside [0, C) is never an address: IndexError on a CPU, NaN loss and gradient on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from . import _math, _runtime, configs
from ._arguments import check_coefficient, check_num_items, check_softcap, soft_cap
from ._rows import accumulator, as_rows
from ._runtime import Operator, kernel, launch, tl, with_kernel

_HALF = (torch.float16, torch.bfloat16)
_KERNEL_DTYPES = (torch.float32, *_HALF)
_SECOND_BACKWARD = (
    "cross_entropy(inplace_backward=True): second backward through one loss; the first may have overwritten the logits "
    "with their gradient. Use inplace_backward=False to keep the graph"
)
# Blocks of rows that one program sums; more are summed by one program each first.
_ONE_PROGRAM = 4


# Reference: plain PyTorch.


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What PyTorch's old pair of arguments stands for, with PyTorch's warning."""
    return legacy_get_string(size_average, reduce)


# Dynamo calls it while it traces, as torch.compiler.assume_constant_result would have it: a string in its graph it
# refuses. That function itself loads the compiler.
_legacy_reduction._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _BackwardOnce(torch.autograd.Function):
    """Identity whose backward may run a single time: what in-place backward promises, whoever computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.used = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.used:
            raise RuntimeError(_SECOND_BACKWARD)
        ctx.used = True
        return grads[0]


def _in_fp32(input: Any, target: Any, weight: Any) -> tuple[Any, Any]:
    """Half-precision logits and weights as fp32; anything PyTorch is going to refuse is left for it to refuse."""
    if not isinstance(input, Tensor) or input.dtype not in _HALF:
        return input, weight
    if not isinstance(weight, Tensor):
        return input.float(), weight
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    same = weight.dtype == input.dtype
    if not same and not probabilities and not torch.is_autocast_enabled(input.device.type):
        return input, weight
    return input.float(), weight.float() if same else weight


def _z_tokens(logits: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor | None]:
    """z_loss * lse**2 of every token, 0 where ignored; and which tokens count (None: all, probability targets)."""
    lse = logits.logsumexp(1 if logits.dim() > 1 else 0)
    if target.shape == logits.shape:
        return z_loss * lse.square(), None
    # uint8 would take -100 for 156.
    counted = target.long() != ignore_index
    # `where` last: an ignored token's gradient is an exact 0 even under an infinite upstream (0 tokens counted).
    return torch.where(counted, z_loss * lse.square(), 0.0), counted


def _denominator(tokens: Tensor, counted: Tensor | None, target: Tensor, weight: Tensor | None) -> Tensor | int:
    """What "mean" divides by: see the module's text."""
    if counted is None:
        return tokens.numel()
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[torch.where(counted, target, 0).long()], 0.0).sum()


def _z_part(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    num_items: int | Tensor | None,
) -> Tensor:
    """The z term, reduced as the loss is."""
    tokens, counted = _z_tokens(logits, target, ignore_index, z_loss)
    if reduction == "none":
        return tokens
    total = tokens.sum()
    if num_items is not None:
        return _over_items(total, num_items)
    return total if reduction == "sum" else total / _denominator(tokens, counted, target, weight)


def _over_items(total: Tensor, num_items: int | Tensor) -> Tensor:
    """total / num_items; no items means nothing was counted: 0, not NaN."""
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
) -> Any:
    """`cross_entropy` in PyTorch's operators: the definition, and the path where no kernel runs."""
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    check_coefficient("z_loss", z_loss)
    check_softcap(softcap)
    check_num_items(num_items, reduction)
    input, weight = _in_fp32(input, target, weight)
    if inplace_backward and input.requires_grad and not torch.compiler.is_compiling():
        input = _BackwardOnce.apply(input)  # pyright: ignore[reportAssignmentType]
    logits = soft_cap(input, softcap)
    # Whatever is no reduction stays, and PyTorch says so.
    torch_reduction = "sum" if num_items is not None and reduction == "mean" else reduction
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=torch_reduction,
        label_smoothing=label_smoothing,
    )
    if num_items is not None:
        loss = _over_items(loss, num_items)
    if not z_loss and not return_z_loss:
        return loss
    z = _z_part(logits, target, weight, ignore_index, reduction, z_loss, num_items)
    loss = loss + z if z_loss else loss
    return (loss, z.detach()) if return_z_loss else loss


# Kernels.


@kernel()
def _targets(T, W, rows, row_ok, stride_t, classes, ignore_index, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """(y, counted, w) of each row: target, whether it counts, weight: 0 if ignored, NaN outside [0, classes).

    Outside, y becomes 0: it is an address next.
    """
    y = tl.load(T + rows * stride_t, mask=row_ok, other=0).to(tl.int64)
    counted = row_ok & (y != ignore_index)
    inside = (y >= 0) & (y < classes)
    y = tl.where(inside, y, 0).to(tl.int32)
    w = tl.full(y.shape, 1.0, ACC)
    if HAS_WEIGHT:
        w = tl.load(W + y, mask=row_ok, other=0.0).to(ACC)
    return y, counted, tl.where(counted, tl.where(inside, w, float("nan")), 0.0)


@kernel()
def _capped(x, mask, softcap, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """l = c tanh(x / c), or x itself; -inf outside the mask."""
    l = x.to(ACC)
    if HAS_SOFTCAP:
        l = tl.where(mask, softcap * _math.tanh(l * (1.0 / softcap)), float("-inf"))
    return l


@kernel()
def _finite(top):
    """0 for -inf, of rows with nothing else in them so far: their powers are 0 then, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@kernel()
def _log_sum(others, target, top, top2, ACC: tl.constexpr):
    """(origin, rest) with lse = origin + rest, from the powers of the other classes and the target's logit.

    Where the target has at least half of the sum, rest = log(1 + others / own) is nll itself, to all its digits.
    """
    log2_e = tl.full(top.shape, 1.4426950408889634, ACC)
    own = tl.exp2(tl.fma(target, log2_e, -top2))
    likely = (others <= own) & (own > 0.0)
    ratio = others / tl.where(likely, own, 1.0)
    one_more = 1.0 + ratio
    taken = one_more - 1.0
    # log(1 + r) = r log(1 + r) / ((1 + r) - 1), both with the same rounding
    log1p = tl.where(taken > 0.0, tl.log(one_more) * (ratio / tl.where(taken > 0.0, taken, 1.0)), ratio)
    # What rounding top2 took from every exponent comes back here.
    rounding = tl.fma(top, log2_e, -top2)
    log = (tl.log2(tl.where(likely, 1.0, others + own)) - rounding) * 0.6931471805599453
    return tl.where(likely, target, top), tl.where(likely, log1p, log)


@kernel()
def _two_sum(a, b):
    """(a + b, what rounding took from it)."""
    total = a + b
    kept = total - a
    return total, (a - (total - kept)) + (b - kept)


@kernel()
def _log2_power(x, ACC: tl.constexpr):
    """log2 of e^x, rounded: a plain product would be merged, unrounded, with the subtraction that follows it."""
    return tl.fma(x, tl.full(x.shape, 1.4426950408889634, ACC), tl.zeros(x.shape, ACC))


@kernel()
def _powers(l, top2, ACC: tl.constexpr):
    """e^l / 2^top2: one multiply-add and one power of two a logit."""
    return tl.exp2(tl.fma(l, tl.full(l.shape, 1.4426950408889634, ACC), tl.broadcast_to(-top2, l.shape)))


@kernel()
def _by_lane(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A tile as (rows, loads, lanes, VECTOR): what a thread holds of a row, if it loads VECTOR elements at a time."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // (LANES * VECTOR), LANES, VECTOR])


@kernel()
def _lane_sums(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.sum(tl.sum(_by_lane(x, LANES, VECTOR), axis=3), axis=1)


@kernel()
def _add_powers(l, top, s, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """(top, s) of each lane with those of l added: sum_v e^l_v = s 2^(log2(e) top), the exponent as it is rounded."""
    l = _by_lane(l, LANES, VECTOR)
    before = _log2_power(top, ACC)
    top = tl.maximum(top, tl.max(tl.max(l, axis=3), axis=1))
    top2 = _log2_power(_finite(top), ACC)
    powers = _powers(l, top2[:, None, :, None], ACC)
    return top, s * tl.exp2(before - top2) + tl.sum(tl.sum(powers, axis=3), axis=1)


@kernel()
def _deviations(l, W, cols, col_ok, mask, base, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """w_v (l_v - base), 0 outside the mask."""
    d = tl.where(mask, l, base[:, None]) - base[:, None]
    if HAS_WEIGHT:
        d *= tl.load(W + cols, mask=col_ok, other=0.0).to(ACC)[None, :]
    return d


@kernel()
def _coefficients(w, counted, scale, lse, weight_sum, on_one, on_each, z_loss):
    """(a, b, c) in scale * dloss/dl_v = a (p_v - [v = y]) + b p_v - c w_v; 0 for rows that do not count."""
    a = scale * (on_one * w)
    b = scale * (on_each * weight_sum + 2.0 * z_loss * lse)
    return tl.where(counted, a, 0.0), tl.where(counted, b, 0.0), tl.where(counted, scale * on_each, 0.0)


@kernel()
def _gradient(
    x,
    l,
    W,
    v,
    col_ok,
    y,
    miss,
    high,
    low,
    a,
    b,
    c,
    softcap,
    HAS_SMOOTHED_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx of the classes v of every row.

    miss is p_y - 1 of the target, where p_y rounded to fp32 would lose digits: a confident token has no others.
    """
    p = tl.exp((l - high[:, None]) - low[:, None])
    each = tl.broadcast_to(c[:, None], l.shape)
    if HAS_SMOOTHED_WEIGHT:
        each *= tl.load(W + v, mask=col_ok, other=0.0).to(ACC)[None, :]
    dx = a[:, None] * tl.where(v[None, :] == y[:, None], miss[:, None], p) + (b[:, None] * p - each)
    if HAS_SOFTCAP:
        # dl/dx = 1 - t^2 = e (1 + |t|)^2 with t = l / c, e = exp(-2 |x / c|): nothing cancels near the cap
        inverse = 1.0 / softcap
        one_and_t = 1.0 + tl.minimum(tl.abs(l) * inverse, 1.0)
        dx *= tl.exp(-2.0 * tl.abs(x.to(ACC) * inverse)) * (one_and_t * one_and_t)
    return dx


# Read and written a number at a time, so that their alignment makes no difference.
_SCALARS = ("T", "M", "stride_t", "ignore_index")


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


@kernel(do_not_specialize=("LOSS", "Z", "COUNT", "ITEMS", "LOSS_SUM", "Z_SUM", "DENOMINATOR", "M", "steps"))
def cross_entropy_reduce_kernel(
    LOSS,
    Z,
    COUNT,
    ITEMS,
    LOSS_SUM,
    Z_SUM,
    DENOMINATOR,
    M,
    steps,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums over the rows, always in the same order; the last pass, of one program, divides."""
    program = tl.program_id(0)
    loss, z, count = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
    for step in range(steps):
        rows = (program * steps + step).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        loss += tl.load(LOSS + rows, mask=rows < M, other=0.0)
        z += tl.load(Z + rows, mask=rows < M, other=0.0)
        count += tl.load(COUNT + rows, mask=rows < M, other=0.0)
    loss, z, denominator = tl.sum(loss, axis=0), tl.sum(z, axis=0), tl.sum(count, axis=0)
    if LAST:
        if HAS_ITEMS:
            items = tl.load(ITEMS).to(ACC)
            denominator = tl.where(items < 1.0, 1.0, items)
        elif not MEAN:
            denominator = tl.full((), 1.0, ACC)
        # Nothing counted, or weights of 0 alone: NaN, as 0 / 0 is.
        divisor = tl.where(denominator == 0.0, float("nan"), denominator)
        loss, z = loss / divisor, z / divisor
    tl.store(LOSS_SUM + program, loss)
    tl.store(Z_SUM + program, z)
    tl.store(DENOMINATOR + program, denominator)


@kernel(
    do_not_specialize=(
        *(*_SCALARS, "LSE", "UPSTREAM", "DENOMINATOR", "stride_upstream", "stride_lse"),
        *("first_class", "classes"),
    )
)
def cross_entropy_backward_kernel(
    X,
    T,
    W,
    WEIGHT_SUM,
    LSE,
    UPSTREAM,
    DENOMINATOR,
    DX,
    M,
    N,
    first_class,
    classes,
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
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of the gradient of classes [first_class, first_class + N), of `classes` in all."""
    tiles = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    row_ok, col_ok = rows < M, cols < N
    mask = row_ok[:, None] & col_ok[None, :]
    y, counted, w = _targets(T, W, rows, row_ok, stride_t, classes, ignore_index, HAS_WEIGHT, ACC)
    # Logits of ignored rows are not read: their gradient is 0 x p, and p is 0, or NaN where lse is, as PyTorch's.
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask & counted[:, None], other=float("-inf"))
    high = tl.load(LSE + rows, mask=row_ok, other=0.0)
    low = tl.load(LSE + stride_lse + rows, mask=row_ok, other=0.0)
    scale = tl.full(w.shape, 1.0, ACC)
    if HAS_UPSTREAM:
        scale = tl.load(UPSTREAM + rows * stride_upstream, mask=row_ok, other=0.0).to(ACC)
    if HAS_DENOMINATOR:
        denominator = tl.load(DENOMINATOR)
        scale /= tl.where(denominator == 0.0, float("nan"), denominator)
    weight_sum = tl.load(WEIGHT_SUM) if HAS_SMOOTHING and HAS_WEIGHT else classes
    a, b, c = _coefficients(w, counted, scale, high, weight_sum, on_one, on_each, z_loss)
    l = _capped(x, mask & counted[:, None], softcap, HAS_SOFTCAP, ACC)
    v = first_class + cols
    # Another thread may have put the gradient there already: only the one whose element it is uses what it read.
    at = y - first_class
    mine = counted & (at >= start) & (at < tl.minimum(start + BLOCK_N, N))
    target = tl.load(X + rows * stride_x + at, mask=mine, other=0.0)
    target = _capped(target, mine, softcap, HAS_SOFTCAP, ACC)
    miss = _math.expm1(tl.where(mine, (target - high) - low, 0.0))
    dx = _gradient(
        x, l, W, v, col_ok, y, miss, high, low, a, b, c, softcap, HAS_SMOOTHING and HAS_WEIGHT, HAS_SOFTCAP, ACC
    )
    tl.store(DX + rows[:, None] * stride_dx + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)


# Launchers. linear_cross_entropy uses them on chunks of logits.


@dataclass(frozen=True)
class Options:
    """What the kernels of one loss agree on; see the module's text."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def scalars(self, classes: int) -> tuple[int | float, ...]:
        """ignore_index, what label smoothing leaves to the target and gives to each class, z_loss, softcap."""
        e = self.label_smoothing
        return self.ignore_index, 1.0 - e, e / classes, self.z_loss, self.softcap or 1.0


# Numbers a row, fp32: loss (z included), z, lse, what rounding took from lse, weight in the denominator.
ROW_VALUES = 5
LSE = slice(2, 4)


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
    _launch_forward_kernel(logits, target, weight, options, (loss, z, rows[LSE], count), gradient, upstream)


def _launch_forward_kernel(
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
            *_inputs(logits, target, weight, options, lse),
            lse if upstream is None else upstream.resolve_neg(),
            *(*outputs, dx, rows, classes, logits.stride(0), target.stride(0)),
            *(_row_stride(upstream), lse.stride(0), dx.stride(0), *options.scalars(classes)),
        ),
        num_warps=config.num_warps,
        max_registers=_registers(options),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **_lanes(config, logits),
        WHOLE_ROW=classes <= config.block_n,
        HAS_GRADIENT=gradient is not None,
        **_switches(weight, options, upstream, logits),
    )


def launch_reduce(rows: Tensor, reduction: str, num_items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, z, denominator), 0-d, of rows (ROW_VALUES, M) under "mean" or "sum"; num_items 0-d, on their device."""
    return _launch_reduce_kernel((rows[0], rows[1], rows[4]), reduction, num_items)


def _launch_reduce_kernel(
    values: Sequence[Tensor], reduction: str, num_items: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_reduce` of loss, z, count, (M,) each."""
    loss = values[0]
    config = configs.CROSS_ENTROPY_REDUCE
    if loss.numel() > _ONE_PROGRAM * config.block_n:
        partial = loss.new_empty((3, -(-loss.numel() // config.block_n))).unbind(0)
        _reduce(config, values, partial, reduction, None, last=False)
        values = partial
    totals = loss.new_empty(()), loss.new_empty(()), loss.new_empty(())
    _reduce(config, values, totals, reduction, num_items, last=True)
    return totals


def _reduce(
    config: configs.RowConfig,
    values: Sequence[Tensor],
    sums: Sequence[Tensor],
    reduction: str,
    num_items: Tensor | None,
    last: bool,
) -> None:
    """One pass: sums of the values, by as many programs as the sums have elements."""
    programs = sums[0].numel()
    launch(
        cross_entropy_reduce_kernel,
        (programs,),
        (
            *(*values, values[0] if num_items is None else num_items, *sums),
            *(values[0].numel(), -(-values[0].numel() // (config.block_n * programs))),
        ),
        num_warps=config.num_warps,
        BLOCK=config.block_n,
        MEAN=reduction == "mean",
        HAS_ITEMS=num_items is not None,
        LAST=last,
        ACC=accumulator(values[0].dtype)[1],
    )


def launch_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    lse: Tensor,
    gradient: Tensor,
    upstream: Tensor | None = None,
    denominator: Tensor | None = None,
    first_class: int = 0,
    classes: int | None = None,
) -> None:
    """gradient (M, n) = upstream / denominator * dloss/dlogits, of the classes [first_class, first_class + n).

    logits (M, n) holds those classes alone, of `classes` in all (None: n). weight (classes,); lse (2, M) is
    rows[LSE]; upstream 0-d or (M,) of any stride, denominator 0-d, 1 where None. gradient may be the logits' memory.
    """
    rows, columns = logits.shape
    classes = columns if classes is None else classes
    if rows == 0 or columns == 0:
        return
    config = configs.row_config(
        configs.CROSS_ENTROPY, _runtime.architecture(logits.device), columns, configs.CROSS_ENTROPY_LONG
    )
    launch(
        cross_entropy_backward_kernel,
        (-(-rows // config.block_m) * -(-columns // config.block_n),),
        (
            *(*_inputs(logits, target, weight, options, lse), lse),
            lse if upstream is None else upstream.resolve_neg(),
            lse if denominator is None else denominator,
            *(gradient, rows, columns, first_class, classes, logits.stride(0), target.stride(0)),
            *(_row_stride(upstream), lse.stride(0), gradient.stride(0), *options.scalars(classes)),
        ),
        num_warps=config.num_warps,
        max_registers=_registers(options),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_DENOMINATOR=denominator is not None,
        **_switches(weight, options, upstream, logits),
    )


def _inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, T, W, WEIGHT_SUM."""
    if weight is None:
        return logits, target, unused, unused
    # One small launch, for the one combination that needs the sum.
    total = weight.sum(dtype=unused.dtype) if options.label_smoothing else unused
    return logits, target, weight.contiguous(), total


def _switches(weight: Tensor | None, options: Options, upstream: Tensor | None, logits: Tensor) -> dict[str, Any]:
    return {
        "HAS_WEIGHT": weight is not None,
        "HAS_SMOOTHING": options.label_smoothing != 0.0,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_UPSTREAM": upstream is not None,
        "ACC": accumulator(logits.dtype)[1],
    }


def _lanes(config: configs.RowConfig, logits: Tensor) -> dict[str, int]:
    """How Triton deals a tile out: 16 bytes a thread where the rows' distance allows such loads, then along the row.

    It decides what stays in one thread and so the speed, never the result's meaning.
    """
    vector = min(16 // logits.element_size() if logits.stride(0) % 16 == 0 else 1, config.block_n)
    threads = config.num_warps * (64 if _runtime.architecture(logits.device).startswith("gfx") else 32)
    return {"LANES": min(threads, config.block_n // vector), "VECTOR": vector}


def _registers(options: Options) -> int | None:
    return configs.CROSS_ENTROPY_REGISTERS if options.softcap is not None or options.label_smoothing else None


def _row_stride(upstream: Tensor | None) -> int:
    return 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """PyTorch's IndexError. On a CPU alone: on a GPU it would wait for the device, and the kernels answer NaN."""
    if target.device.type != "cpu":
        return
    wanted = target.long()
    bad = (wanted != ignore_index) & ((wanted < 0) | (wanted >= classes))
    if bad.any():
        raise IndexError(f"Target {wanted[bad][0].item()} is out of bounds.")


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    num_items: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, z, lse, denominator): lse (2, rows) as in `launch_rows`; no denominator under "none"."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    rows, classes = logits.shape
    loss, z, lse, denominator = _fake_forward(logits, target, weight, num_items, reduction)
    whole = reduction == "none"
    values = (loss, z, lse.new_empty(rows)) if whole else lse.new_empty((3, rows)).unbind(0)
    outputs = (values[0], values[1], lse, values[2])
    _launch_forward_kernel(as_rows(logits, classes), target, weight, options, outputs)
    if not whole:
        loss, z, denominator = _launch_reduce_kernel(values, reduction, num_items)
    return loss, z, lse, denominator


def _fake_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None, reduction: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulator(logits.dtype)[0]
    none = reduction == "none"
    shapes: tuple[Any, ...] = ((rows,), (rows,), (2, rows), (0,)) if none else ((), (), (2, rows), ())
    loss, z, lse, denominator = (torch.empty(shape, dtype=dtype, device=logits.device) for shape in shapes)
    return loss, z, lse, denominator


def _backward_launch(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> Tensor:
    """The logits' gradient: in their memory if `inplace` and no two of them share an element, else in its own."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    rows, classes = logits.shape
    x = as_rows(logits, classes)
    inplace = inplace and (rows <= 1 or x.stride(0) >= classes)
    # A copy made for its strides is nobody else's.
    ours = x.data_ptr() != logits.data_ptr()
    gradient = x if inplace or ours else _fake_backward(dloss, logits)
    launch_gradient(x, target, weight, options, lse, gradient, dloss, denominator)
    if inplace and not ours:
        torch.autograd.graph.increment_version(logits)
    return gradient


def _fake_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# Operators and autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, reduction, *ctx.options, ctx.inplace = inputs
    _, z, lse, denominator = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, lse, denominator)
    ctx.save_for_backward(logits, target, weight, lse, None if reduction == "none" else denominator)
    ctx.used = False


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 9
    if dloss is None:
        return None, *rest
    if ctx.inplace and ctx.used:
        raise RuntimeError(_SECOND_BACKWARD)
    ctx.used = True
    logits, target, weight, lse, denominator = ctx.saved_tensors
    # A captured operator writes to none of its inputs.
    inplace = ctx.inplace and not _runtime.capturing(logits)
    return cross_entropy_backward(dloss, logits, target, weight, lse, denominator, *ctx.options, inplace), *rest


cross_entropy_forward = Operator(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items, str reduction,"
    " SymInt ignore_index, float label_smoothing, float z_loss, float? softcap, bool inplace)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
)
cross_entropy_backward = Operator(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor lse,"
    " Tensor? denominator, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap, bool inplace)"
    " -> Tensor",
    _backward_launch,
    _fake_backward,
)


# Public function.


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on where this tensor lies; asking that of a device without autocast is an error."""
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


def _obstacle(input: Any, target: Any, weight: Any, *rest: Any) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or not isinstance(weight, (Tensor, type(None))):
        return "an argument is not a tensor"
    if input.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {input.dtype}"
    if input.dim() == 0 or target.shape != (*input.shape[:1], *input.shape[2:])[input.dim() == 1 :]:
        same = target.shape == input.shape
        return "targets are probabilities" if same else "the target's shape is not the input's without its classes"
    classes = input.shape[min(1, input.dim() - 1)]
    if classes == 0:
        return "no classes"
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or input.dim() > 2):
        return f"no kernel for targets of {target.dtype}"
    return loss_obstacle(classes, input, target, weight, *rest)


def loss_obstacle(
    classes: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    num_items: Any,
) -> str | None:
    """What both losses ask of their arguments; input is of a dtype with a kernel, target of int64 or uint8."""
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        return "ignore_index is not an int"
    if not -(2**63) <= ignore_index < 2**63:
        return "ignore_index is no int64"
    if reduction not in ("none", "mean", "sum"):
        return f"reduction is {reduction!r}"
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing is {label_smoothing!r}"
    if label_smoothing and target.dtype == torch.uint8:
        # It takes ignore_index -100 for class 156, and with weights raises.
        return "PyTorch's label smoothing has answers of its own for uint8 targets"
    if isinstance(num_items, Tensor) and num_items.requires_grad:
        return "num_items requires a gradient"
    return _weight_obstacle(classes, input, weight)


def _weight_obstacle(classes: int, input: Tensor, weight: Tensor | None) -> str | None:
    if weight is None:
        return None
    if weight.shape != (classes,):
        return f"weight of shape {tuple(weight.shape)} for {classes} classes"
    if weight.requires_grad:
        return "weight requires a gradient"
    # Autocast brings both to fp32; without it PyTorch refuses.
    if weight.dtype != input.dtype and not (weight.dtype in _KERNEL_DTYPES and autocast_is_on(input)):
        return f"weight is {weight.dtype}, input {input.dtype}"
    return None


def items_on_device(num_items: int | Tensor | None, device: torch.device) -> Tensor | None:
    """num_items as a tensor beside the loss, without waiting: an int would compile a new graph for every batch."""
    if num_items is None or isinstance(num_items, Tensor):
        return num_items if num_items is None else num_items.to(device, non_blocking=True)
    return torch.full((), num_items, dtype=torch.int64, device=device)


@with_kernel
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
) -> Any:
    """`torch.nn.functional.cross_entropy`, with the options of language-model training.

    input (C,), (N, C) or (N, C, d1, ...), any floating dtype; target class indices (), (N,), (N, d1, ...) of int64 or
    uint8, or probabilities of input's shape; weight (C,). Result: 0-d, or target's shape under reduction "none", in
    fp32 for fp16 and bf16 input (PyTorch: in input's dtype), else in input's dtype.

    z_loss: adds z_loss * lse**2 for each counted token (not scaled by `weight`), under the loss's own denominator.
    return_z_loss: returns (loss, z); z is the part of loss that z_loss added, detached, reduced as loss is.
    softcap: logits become softcap * tanh(input / softcap) first.
    num_items: the sum over the counted tokens is divided by it, under "mean" and "sum" alike; int or 0-d tensor. 0
        counts as 1, so that a batch with nothing to count gives 0. Accumulation passes the whole update's count.
    inplace_backward: allows backward to overwrite `input` with its gradient, which saves their memory once; a second
        backward raises RuntimeError. Used in eager mode, by the kernels, for rows without gaps between their classes
        and without shared memory; PyTorch's operators bring the error alone, compiled code neither.

    Unlike PyTorch's, the kernels' backward reads `input` again: changing it in place between forward and backward
    raises RuntimeError; and a backward of the backward raises, where PyTorch's operators compute it.

    All targets ignored, or no rows: "mean" gives NaN, as PyTorch does, with gradients of exactly 0; with num_items 0.
    A target outside [0, C) raises IndexError on a CPU. Our options raise ValueError, the others PyTorch's errors.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    check_coefficient("z_loss", z_loss)
    check_softcap(softcap)
    check_num_items(num_items, reduction)
    obstacle = _obstacle(input, target, weight, ignore_index, reduction, label_smoothing, num_items)
    if not _runtime.choose(input, target, weight, obstacle=obstacle):
        return cross_entropy_reference(
            *(input, target, weight, None, ignore_index, None, reduction, label_smoothing),
            z_loss=z_loss,
            return_z_loss=return_z_loss,
            softcap=softcap,
            num_items=num_items,
            inplace_backward=inplace_backward,
        )
    logits = input.movedim(1, -1).flatten(0, -2) if input.dim() > 2 else input.view(-1, input.shape[-1])
    loss, z, _, _ = cross_entropy_forward(
        *(logits, target.reshape(-1), weight, items_on_device(num_items, input.device), reduction, ignore_index),
        *(float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)),
        inplace_backward and not _runtime.capturing(input),
    )
    if reduction == "none":
        loss, z = loss.view(target.shape), z.view(target.shape)
    return (loss, z) if return_z_loss else loss
