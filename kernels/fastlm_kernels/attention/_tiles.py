"""What the kernels of attention share: which tile a program takes, what it sees, how it is loaded.

Names besides the package's: Q, K, V and OUT are heads, (positions, D or E channels) each; T queries, S keys. Query t
stands at t + shift among the keys and sees keys t + shift - left .. t + shift + right; `sight` is (S, shift, left,
right). Scores are in units of log2, so that a weight is one exp2: s = scale log2(e) q.k. Strides of heads come in units
of UNIT elements, as many as 16 bytes hold where that divides them all, so that the compiler sees aligned rows and loads
16 bytes at once; MASK_STEP is a mask's stride along the keys, 1 or 0. Of packed documents CU_Q and CU_K say where each
begins; `batch` is then a document.
"""

from __future__ import annotations

from .._math import tanh
from .._runtime import kernel, tl

# Sizes and strides of the large kernels, none of which may compile a binary of its own.
VARYING = (
    *("T", "S", "total_q", "heads", "group", "tiles", "rows_of_heads", "section", "splits", "chunk", "left", "right"),
    *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh"),
    *("stride_vs", "stride_op", "stride_ob", "stride_oh", "stride_ot", "stride_dob", "stride_doh", "stride_dot"),
    *("stride_dqb", "stride_dqh", "stride_dqt", "stride_dkb", "stride_dkh", "stride_dks", "stride_dvb", "stride_dvh"),
    *("stride_dvs", "stride_dlb", "stride_dlh", "stride_dlt", "stride_mb", "stride_mh", "stride_mt"),
    *("stride_wb", "stride_ws", "stride_seed"),
)


@kernel()
def place(program, tiles, rows, heads, section, REVERSE: tl.constexpr):
    """(tile, batch, head) of a program: all tiles of `section` heads, heavy tiles first, then the next `section`.

    The heads of a section are as many as fit the L2 cache with all their keys.
    """
    first = program // (section * tiles) * section
    inside = program % (section * tiles)
    width = tl.minimum(section, rows - first)
    tile, row = inside // width, first + inside % width
    if REVERSE:
        tile = tiles - 1 - tile
    return tile, row // heads, row % heads


@kernel()
def document(CU, batch, rows, AGAIN: tl.constexpr):
    """(begin, length) of a packed document; what malformed starts put outside the `rows` there are is left out.

    AGAIN  read once more, however lately it was read
    """
    begin = tl.load(CU + batch, volatile=AGAIN).to(tl.int64)  # type: ignore[arg-type]
    end = tl.load(CU + batch + 1, volatile=AGAIN).to(tl.int64)  # type: ignore[arg-type]
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    return begin, (tl.minimum(tl.maximum(end, begin), rows) - begin).to(tl.int32)


@kernel()
def lengths(
    CU_Q,
    CU_K,
    USED_K,
    batch,
    T,
    S,
    BOTTOM_RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    USED: tl.constexpr,
):
    """(begin_q, begin_k, at_batch, T, S, stored, shift): where this batch or document lies, and how long it is.

    Of packed documents T and S come in as the rows of all of them. at_batch is what batch strides are multiplied by: 0
    where documents are packed. `stored` keys are in memory, S of them in use.
    """
    begin_q, begin_k, at_batch = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.cast(batch, tl.int64)
    stored = S
    if PACKED:
        begin_q, T = document(CU_Q, batch, T, False)
        begin_k, S = document(CU_K, batch, S, False)
        stored = S
        if USED:
            S = tl.minimum(S, tl.load(USED_K + batch).to(tl.int32))
        at_batch = begin_k * 0
    shift = 0
    if BOTTOM_RIGHT:
        shift = S - T
    return begin_q, begin_k, at_batch, T, S, stored, shift


@kernel()
def tile_range(
    start,
    own,
    other,
    shift,
    before,
    after,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):
    """What positions start .. start + SIZE - 1 (below `own`) see of the other side, in tiles of BLOCK positions.

    Position p sees p + shift - before .. p + shift + after, below `other`. Returns (first, full, edge, stop): tiles
    from `full` to `edge` are seen whole by every position, those from `first` and those up to `stop` in part.
    """
    last = tl.minimum(start + SIZE, own) - 1
    first, full, edge, stop = 0, 0, other, other
    if HAS_BEFORE:
        first = tl.maximum(start + shift - before, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(last + shift - before, 0), BLOCK) * BLOCK
    if HAS_AFTER:
        edge = tl.minimum(edge, tl.maximum(start + shift + after + 1, 0))
        stop = tl.minimum(stop, tl.maximum(last + shift + after + 1, 0))
    # A tile past the last position sees nothing.
    edge, stop = tl.where(start < own, edge, 0), tl.where(start < own, stop, 0)
    full = tl.minimum(full, tl.cdiv(stop, BLOCK) * BLOCK)
    edge = tl.maximum(edge // BLOCK * BLOCK, full)
    return first, full, edge, stop


@kernel()
def load_tile(at, rows_ok, cols_ok, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """A tile, 0 outside; unchecked sides cost nothing."""
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(at, mask=rows_ok & cols_ok, other=0.0)
    if CHECK_ROWS:
        return tl.load(at, mask=rows_ok, other=0.0)
    if CHECK_COLS:
        return tl.load(at, mask=cols_ok, other=0.0)
    return tl.load(at)


@kernel()
def seen_by(
    rows,
    rows_ok,
    cols,
    sight,
    mask_rows,
    key_mask,
    stride_ws,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """Which of `cols` (keys) each of `rows` (queries) may see; one is a row of a tile, the other a column.

    MASKED  look at positions too: not needed in tiles that all positions see whole
    """
    S, shift, left, right = sight
    seen = cols < S
    if HAS_KEY_MASK:
        seen = seen & (tl.load(key_mask + cols * stride_ws, mask=seen, other=0) != 0)
    if MASKED:
        if HAS_LEFT:
            seen = seen & (cols >= rows + (shift - left))
        if HAS_RIGHT:
            seen = seen & (cols <= rows + (shift + right))
    if HAS_MASK:
        seen = seen & (tl.load(mask_rows + cols * MASK_STEP, mask=rows_ok & (cols < S), other=0) != 0)
    return seen


@kernel()
def capped(s, scale, softcap):
    """(softcap tanh(s scale / softcap) log2(e), that tanh)"""
    slope = tanh(s * (scale / softcap))
    return slope * (softcap * 1.4426950408889634), slope


@kernel()
def softmax_step(s, total, top, factor, MASKED: tl.constexpr):
    """(p, shrink, total, top): the weights of one more tile of scores, and how far the sums before it shrink.

    MASKED  rows may have seen nothing yet
    """
    higher = tl.maximum(top, tl.max(s, 1) * factor)
    base = higher
    if MASKED:
        # -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, total * shrink + tl.sum(p, 1), higher


@kernel()
def hash32(x):
    """Every bit of x, uint32, in every bit of the result; `dropout.hash32` in PyTorch's operators."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@kernel()
def kept_by(seed, head, rows, cols, dropout):
    """Which weights dropout keeps: a word for each (seed, head, query, key), the same in every kernel and tile.

    The seed is the batch row's own, so that no place in the batch changes what a sample drops. `kept_weights` is this
    in PyTorch's operators. One hash a weight, of one for its query and one for its key, two multiplications: Philox in
    seven rounds takes 28, and so many registers for its words that tiles spilled.
    """
    low, high = hash32(seed.to(tl.uint32)), hash32((seed >> 32).to(tl.uint32))
    row_words = hash32(hash32(low ^ tl.cast(head, tl.uint32)) ^ rows.to(tl.uint32))
    word = hash32(row_words ^ hash32(high ^ cols.to(tl.uint32)))
    return word >= (tl.cast(dropout, tl.float32) * 4294967296.0).to(tl.uint32)


@kernel()
def finite(lse):
    """+inf for the lse of a row that saw nothing or is not there: its weights 2^(s - lse) must be 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@kernel()
def weights_of(
    s,
    lse,
    rows,
    rows_ok,
    cols,
    sight,
    mask_rows,
    key_mask,
    stride_ws,
    scale,
    softcap,
    on_edge,
    POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(p, slope): p = 2^(s - lse) from q.k, 0 of keys not seen; slope is the soft-cap's tanh.

    on_edge    whether positions decide anything in this tile, or keys or queries end in it
    POSITIONS  the same where it is known when compiled, else True
    """
    slope = s
    if HAS_SOFTCAP:
        s, slope = capped(s, scale, softcap)
        p = tl.exp2(s - lse)
    else:
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse)
    if HAS_MASK or HAS_KEY_MASK or on_edge:
        seen = seen_by(
            rows,
            rows_ok,
            cols,
            sight,
            mask_rows,
            key_mask,
            stride_ws,
            POSITIONS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_MASK,
            MASK_STEP,
            HAS_KEY_MASK,
        )
        p = tl.where(seen, p, 0.0)
    return p, slope


@kernel()
def score_gradient(p, dp, delta, slope, dropout, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    """ds = p (dp - delta), without the scale: the results are scaled once. p is negative where it was dropped."""
    ds = dp - delta
    if HAS_DROPOUT:
        # -p of what is dropped: p (0 - delta) = -p delta
        ds = tl.where(p < 0.0, delta, dp * (1.0 / (1.0 - dropout)) - delta)
    ds *= p
    if HAS_SOFTCAP:
        ds *= 1.0 - slope * slope
    return ds


@kernel()
def alone(rows, sight, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which queries have one key in sight, as a causal sequence's first: dp and delta differ by rounding alone.

    Not so where delta holds the log-sum-exp's gradient.
    """
    S, shift, left, right = sight
    last = tl.zeros_like(rows) + (S - 1)
    if HAS_RIGHT:
        last = tl.minimum(rows + (shift + right), last)
    if HAS_LEFT:
        last -= tl.maximum(rows + (shift - left), 0)
    return last == 0
