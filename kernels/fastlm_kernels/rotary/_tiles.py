"""What both kernels do with a block of positions of one head: pairs of channels, table entries, weights."""

from __future__ import annotations

from .._runtime import kernel, tl

_VARYING = ("positions", "heads_q", "heads_k", "groups_q", "groups_k", "group_heads", "stride_cb", "stride_ct")


@kernel()
def _load_pairs(X, rows, step, t_ok, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr, ACC):
    """The first and the second channel of each pair, (BLOCK_T, BLOCK_P) each; channels lie `step` apart."""
    if INTERLEAVED:
        # Neighbours in one wide load, parted in registers.
        cols = tl.arange(0, 2 * BLOCK_P)
        mask = t_ok[:, None] & (cols < 2 * PAIRS)[None, :]
        x = tl.load(X + rows[:, None] + cols[None, :] * step, mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_P, 2]))
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        at = X + rows[:, None] + cols[None, :] * step
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + PAIRS * step, mask=mask, other=0.0)
    return a.to(ACC), b.to(ACC)


@kernel()
def _store_pairs(Y, rows, a, b, t_ok, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    a, b = a.to(Y.dtype.element_ty), b.to(Y.dtype.element_ty)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)
        mask = t_ok[:, None] & (cols < 2 * PAIRS)[None, :]
        y = tl.reshape(tl.join(a, b), [a.shape[0], 2 * BLOCK_P])
        tl.store(Y + rows[:, None] + cols[None, :], y, mask=mask)
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        at = Y + rows[:, None] + cols[None, :]
        tl.store(at, a, mask=mask)
        tl.store(at + PAIRS, b, mask=mask)


@kernel()
def _load_table(
    TABLE,
    rows,
    step,
    t_ok,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    ACC: tl.constexpr,
):
    """The entries of each pair's two channels: the same where the table has one a pair."""
    if FULL:
        first, second = _load_pairs(TABLE, rows, step, t_ok, PAIRS, BLOCK_P, INTERLEAVED, ACC)
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        first = tl.load(TABLE + rows[:, None] + cols[None, :] * step, mask=mask, other=0.0).to(ACC)
        second = first
    return first, second


@kernel()
def _rest(t_ok, PAIRS: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr):
    """(channels past R, mask)"""
    cols = 2 * PAIRS + tl.arange(0, BLOCK_REST)
    return cols, t_ok[:, None] & (cols < D)[None, :]


@kernel()
def _load_weight(
    W,
    weighted,
    weight_offset,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):
    """weight_offset + w for the channels of pairs, (1, BLOCK_P) twice, and the rest; ones unless `weighted`."""
    one = tl.zeros([1], dtype=tl.int32)
    a, b = _load_pairs(W, one, 1, one == 0, PAIRS, BLOCK_P, INTERLEAVED, ACC)
    a, b = tl.where(weighted, a + weight_offset, 1.0), tl.where(weighted, b + weight_offset, 1.0)
    rest = a
    if BLOCK_REST > 0:
        cols, mask = _rest(one == 0, PAIRS, D, BLOCK_REST)
        rest = tl.load(W + cols[None, :], mask=mask, other=0.0).to(ACC)
        rest = tl.where(weighted, rest + weight_offset, 1.0)
    return a, b, rest


@kernel()
def _turn(a, b, cos_a, cos_b, sin_a, sin_b, INVERSE: tl.constexpr):
    """The rotation, or its transpose."""
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b
