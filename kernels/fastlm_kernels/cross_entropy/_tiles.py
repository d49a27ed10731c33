"""What the kernels do with a tile of logits, a block of rows by a block of classes; see the package's text."""

from __future__ import annotations

from .. import _math
from .._runtime import kernel, tl

# Read and written a number at a time, so that their alignment makes no difference.
_SCALARS = ("T", "M", "stride_t", "ignore_index")


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
def _two_sum(a, b):
    """(a + b, what rounding took from it)."""
    total = a + b
    kept = total - a
    return total, (a - (total - kept)) + (b - kept)


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
