"""What the families that work on rows share: views as rows, the dtype of sums, and the last pass of a sum over rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configs
from ._runtime import kernel, launch, tl


def as_rows(tensor: Tensor, columns: int) -> Tensor:
    """A (rows, columns) view with adjacent columns; a copy where strides allow no such view."""
    try:
        rows = tensor.view(-1, columns)
    except RuntimeError:
        return tensor.reshape(-1, columns)
    return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """The dtype of sums, for PyTorch and Triton; fp64 only to check the kernels by finite differences."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


@kernel(do_not_specialize=("P", "SECOND_P"))
def sum_partials_kernel(
    PARTIAL,
    SECOND_PARTIAL,
    TOTAL,
    SECOND_TOTAL,
    P,
    SECOND_P,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """TOTAL[n] = sum over p of PARTIAL[p, n], always in the same order; and the second sum, by the programs after."""
    strips = tl.cdiv(N, BLOCK_N)
    strip = tl.program_id(0)
    if strip >= strips:
        PARTIAL, TOTAL, P, strip = SECOND_PARTIAL, SECOND_TOTAL, SECOND_P, strip - strips
    cols = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, P, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(PARTIAL + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(TOTAL + cols, tl.sum(total, axis=0).to(TOTAL.dtype.element_ty), mask=cols < N)


def sum_partials(*sums: tuple[Tensor, Tensor]) -> None:
    """For each (partial, total): total (N,) = partial (P, N).sum(0), rounded to total's dtype.

    At most two, with one N; partials in the dtype of sums. Two totals of one dtype are summed in one launch.
    """
    if len(sums) == 2 and sums[0][1].dtype != sums[1][1].dtype:
        for each in sums:
            sum_partials(each)
    elif sums:
        (partial, total), (second_partial, second_total) = sums[0], sums[-1]
        columns = total.numel()
        config = configs.SUM_PARTIALS
        launch(
            sum_partials_kernel,
            (-(-columns // config.block_n) * len(sums),),
            (partial, second_partial, total, second_total, partial.shape[0], second_partial.shape[0], columns),
            num_warps=config.num_warps,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            ACC=accumulator(partial.dtype)[1],
        )
