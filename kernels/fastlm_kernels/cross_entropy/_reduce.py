"""The sum of the rows' losses, always in the same order, and what it is divided by: the kernel and its launcher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import configs
from .._rows import accumulator
from .._runtime import kernel, launch, tl

# Blocks of rows that one program sums; more are summed by one program each first.
_ONE_PROGRAM = 4


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


def launch_reduce(rows: Tensor, reduction: str, num_items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, z, denominator), 0-d, of rows (ROW_VALUES, M) under "mean" or "sum"; num_items 0-d, on their device."""
    return launch_sums((rows[0], rows[1], rows[4]), reduction, num_items)


def launch_sums(values: Sequence[Tensor], reduction: str, num_items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
