"""The gradient of the logits, of all classes or of a block of them: the kernel and its launcher."""

from __future__ import annotations

from torch import Tensor

from .. import _math, _runtime, configs
from .._runtime import kernel, launch, tl
from ._launch import Options, inputs_of, registers_for, row_stride, switches_of
from ._tiles import _SCALARS, _capped, _coefficients, _gradient, _targets


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
            *(*inputs_of(logits, target, weight, options, lse), lse),
            lse if upstream is None else upstream.resolve_neg(),
            lse if denominator is None else denominator,
            *(gradient, rows, columns, first_class, classes, logits.stride(0), target.stride(0)),
            *(row_stride(upstream), lse.stride(0), gradient.stride(0), *options.scalars(classes)),
        ),
        num_warps=config.num_warps,
        max_registers=registers_for(options),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_DENOMINATOR=denominator is not None,
        **switches_of(weight, options, upstream, logits),
    )
