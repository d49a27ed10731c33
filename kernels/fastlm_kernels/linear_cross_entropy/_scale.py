"""Finished sums times what only the backward knows: the kernel and its launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import configs
from .._rows import accumulator
from .._runtime import kernel, launch, tl


@kernel(do_not_specialize=("UPSTREAM", "DENOMINATOR", "M"))
def linear_cross_entropy_scale_kernel(X, UPSTREAM, DENOMINATOR, Y, M, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Y = X upstream / denominator, (M, N) without gaps; 0 where nothing was counted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < M.to(tl.int64) * N
    denominator = tl.load(DENOMINATOR).to(ACC)
    # No token counted: X is 0 throughout, and 0 / 0 must not make it NaN.
    counted = denominator != 0.0
    scale = tl.where(counted, tl.load(UPSTREAM).to(ACC) / tl.where(counted, denominator, 1.0), 0.0)
    x = tl.load(X + at, mask=mask, other=0.0).to(ACC)
    tl.store(Y + at, (x * scale).to(Y.dtype.element_ty), mask=mask)


def launch_scale(
    grad: Tensor, denominator: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db) times grad / denominator, in `dtype`."""
    grad = grad.resolve_neg()
    scaled = fake_scale(grad, denominator, dx, dw, db, dtype)
    for source, result in zip((dx, dw, db), scaled, strict=True):
        if source.numel() == 0:
            continue
        rows, columns = source.shape if source.dim() == 2 else (1, source.shape[0])
        launch(
            linear_cross_entropy_scale_kernel,
            (-(-source.numel() // configs.LINEAR_SCALE_BLOCK),),
            (source, grad, denominator, result, rows, columns),
            num_warps=configs.LINEAR_SCALE_WARPS,
            BLOCK=configs.LINEAR_SCALE_BLOCK,
            ACC=accumulator(denominator.dtype)[1],
        )
    return scaled


def fake_scale(
    grad: Tensor, denominator: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(source, dtype=dtype) for source in (dx, dw, db))  # type: ignore[return-value]
