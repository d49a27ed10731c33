"""Products with a symmetric result, one triangle computed and mirrored: the Gram matrices of Newton-Schulz.

    OUT = alpha X X^T + beta ADD        for a batch of X (N, K); ADD, if given, symmetric (N, N)

Half the FLOPs of a plain product: N^2 K instead of 2 N^2 K. A program computes one tile of the lower triangle, diagonal
included, in fp32, and writes it twice. X may have any strides; N and K need not be multiples of the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _runtime, configs
from .._runtime import kernel, launch, tl


@kernel(do_not_specialize=("tiles",))
def symmetric_kernel(
    X,
    ADD,
    OUT,
    N,
    K,
    tiles,
    stride_xb,
    stride_xn,
    stride_xk,
    alpha,
    beta,
    HAS_ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    triangle = tiles * (tiles + 1) // 2
    batch, tile = (tl.program_id(0) // triangle).to(tl.int64), tl.program_id(0) % triangle
    # tile = i (i + 1) / 2 + j with j <= i; the root is rounded, so that i may be one off
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    rows, cols = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    left = X + batch * stride_xb + rows[:, None].to(tl.int64) * stride_xn + ks[None, :] * stride_xk
    right = X + batch * stride_xb + cols[None, :].to(tl.int64) * stride_xn + ks[:, None] * stride_xk
    total = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = tl.load(left, mask=(rows < N)[:, None] & (start + ks < K)[None, :], other=0.0)
        y = tl.load(right, mask=(cols < N)[None, :] & (start + ks < K)[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += BLOCK_K * stride_xk
        right += BLOCK_K * stride_xk
    total *= alpha
    mask = (rows < N)[:, None] & (cols < N)[None, :]
    base = batch * N * N
    at = base + rows[:, None].to(tl.int64) * N + cols[None, :]
    if HAS_ADD:
        total += beta * tl.load(ADD + at, mask=mask, other=0.0).to(tl.float32)
    result = total.to(OUT.dtype.element_ty)
    tl.store(OUT + at, result, mask=mask)
    if i != j:
        mirrored = base + cols[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(OUT + mirrored, result, mask=mask)


def symmetric_product(x: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha x x^T + beta add for a batch x (B, N, K) and contiguous, symmetric add (B, N, N); contiguous, x's dtype."""
    batch, n, k = x.shape
    out = torch.empty((batch, n, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = configs.symmetric_config(_runtime.architecture(x.device), x.dtype, n)
    tiles = -(-n // config.block_n)
    launch(
        symmetric_kernel,
        (batch * tiles * (tiles + 1) // 2,),
        (x, x if add is None else add, out, n, k, tiles, *x.stride(), float(alpha), float(beta)),
        num_warps=config.num_warps,
        HAS_ADD=add is not None,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
    )
    return out
