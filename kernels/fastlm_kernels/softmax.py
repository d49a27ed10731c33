"""Softmax and its logarithm along the last dimension.

    softmax      y = e^(x - max x) / sum e^(x - max x)           dx = y (dy - sum(dy y))
    log_softmax  y = x - max x - log sum e^(x - max x)           dx = dy - e^y sum(dy)

with maxima and sums over a row of N elements, in fp32. One kernel pair serves both (IS_LOG). A row of nothing but -inf
gives NaN, as PyTorch's does: the rule "fully masked rows give 0" is attention's alone.

Memory traffic per element, s bytes each (2 in bf16): forward reads x and writes y, 2 s; backward reads y and dy and
writes dx, 3 s. `dtype=` and autocast change what is written, and cost no cast. Saved for backward: y.

A program keeps whole rows in registers, up to 16384 elements forward and 8192 backward: one read, one write. Longer
rows are walked in blocks and read twice; the sum follows the running maximum, lane by lane, and the lanes meet once, at
the end. With four programs on each of an H200's multiprocessors, rows of up to 45,000 bf16 elements are still in its L2
cache (50 MB) when they are read again.

Other dimensions, no dimension, and a `dtype` that rounds the input take PyTorch's op.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime, configs
from ._rows import accumulator, as_rows
from ._runtime import Operator, kernel, launch, tl, with_kernel

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# The reference is PyTorch's own function.

# Kernels.


@kernel()
def _normalise(x, maximum, total, IS_LOG: tl.constexpr):
    """y of one tile, from its rows' maxima and sums of e^(x - maximum)."""
    shifted = x - maximum[:, None]
    if IS_LOG:
        # In this order: the maximum may be large, and the logarithm of the sum lost beside it.
        y = shifted - tl.log(total)[:, None]
    else:
        y = tl.exp(shifted) * (1.0 / total)[:, None]
    return y


@kernel(do_not_specialize=("M",))
def softmax_forward_kernel(
    X,
    Y,
    M,
    N,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    IS_LOG: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64 from the start: M x N may pass 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    x_rows, y_rows = rows[:, None] * stride_x, rows[:, None] * N
    if WHOLE_ROW:
        mask = row_ok[:, None] & (cols < N)[None, :]
        x = tl.load(X + x_rows + cols[None, :], mask=mask, other=-float("inf")).to(ACC)
        # Rows past M hold nothing but -inf: they must not meet -inf - -inf and 0 / 0.
        maximum = tl.where(row_ok, tl.max(x, axis=1), 0.0)
        total = tl.where(row_ok, tl.sum(tl.exp(x - maximum[:, None]), axis=1), 1.0)
        y = _normalise(x, maximum, total, IS_LOG)
        tl.store(Y + y_rows + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)
    else:
        # The lowest finite number, so that lanes that have seen nothing but -inf add 0 and not NaN.
        top = tl.full([BLOCK_M, BLOCK_N], -3.4028234663852886e38, dtype=ACC)
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            x = tl.load(X + x_rows + at[None, :], mask=mask, other=-float("inf")).to(ACC)
            # sums e^(top - new) + e^(x - new), new = max(top, x): one of the two powers is 1
            step = tl.exp(-tl.abs(x - top))
            sums = tl.where(x > top, sums * step + 1.0, sums + step)
            top = tl.maximum(top, x)
        maximum = tl.max(top, axis=1)
        total = tl.where(row_ok, tl.sum(sums * tl.exp(top - maximum[:, None]), axis=1), 1.0)
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            x = tl.load(X + x_rows + at[None, :], mask=mask, other=-float("inf")).to(ACC)
            y = _normalise(x, maximum, total, IS_LOG)
            tl.store(Y + y_rows + at[None, :], y.to(Y.dtype.element_ty), mask=mask)


@kernel()
def _load_backward(DY, Y, dy_at, y_at, mask, ACC: tl.constexpr):
    """dy and y of one tile, 0 outside the mask."""
    dy = tl.load(DY + dy_at, mask=mask, other=0.0).to(ACC)
    return dy, tl.load(Y + y_at, mask=mask, other=0.0).to(ACC)


@kernel()
def _input_gradient(dy, y, total, IS_LOG: tl.constexpr):
    """dx of one tile, from its rows' sums of dy or, for softmax, of dy y."""
    if IS_LOG:
        dx = dy - tl.exp(y) * total[:, None]
    else:
        dx = y * (dy - total[:, None])
    return dx


@kernel(do_not_specialize=("M",))
def softmax_backward_kernel(
    DY,
    Y,
    DX,
    M,
    N,
    stride_dy,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    IS_LOG: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    dy_rows, y_rows, dx_rows = rows[:, None] * stride_dy, rows[:, None] * stride_y, rows[:, None] * N
    if WHOLE_ROW:
        mask = row_ok[:, None] & (cols < N)[None, :]
        dy, y = _load_backward(DY, Y, dy_rows + cols[None, :], y_rows + cols[None, :], mask, ACC)
        total = tl.sum(dy if IS_LOG else dy * y, axis=1)
        dx = _input_gradient(dy, y, total, IS_LOG)
        tl.store(DX + dx_rows + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            dy, y = _load_backward(DY, Y, dy_rows + at[None, :], y_rows + at[None, :], mask, ACC)
            sums += dy if IS_LOG else dy * y
        total = tl.sum(sums, axis=1)
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = row_ok[:, None] & (at < N)[None, :]
            dy, y = _load_backward(DY, Y, dy_rows + at[None, :], y_rows + at[None, :], mask, ACC)
            dx = _input_gradient(dy, y, total, IS_LOG)
            tl.store(DX + dx_rows + at[None, :], dx.to(DX.dtype.element_ty), mask=mask)


# Launchers.


def _run(
    kernel_function: Any, table: configs.RowTable, inputs: tuple[Tensor, ...], output: Tensor, is_log: bool
) -> Tensor:
    """Launch over the rows of `inputs`, into the contiguous `output`."""
    if output.numel() == 0:
        return output
    columns = output.shape[-1]
    rows = output.numel() // columns
    inputs = tuple(as_rows(t, columns) for t in inputs)
    config = configs.row_config(table, _runtime.architecture(output.device), columns)
    launch(
        kernel_function,
        (-(-rows // config.block_m),),
        (*inputs, output, rows, columns, *(t.stride(0) for t in inputs)),
        num_warps=config.num_warps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WHOLE_ROW=columns <= config.block_n,
        IS_LOG=is_log,
        ACC=accumulator(inputs[0].dtype)[1],
    )
    return output


def _fake_forward(x: Tensor, is_log: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _launch_forward(x: Tensor, is_log: bool, dtype: torch.dtype) -> Tensor:
    return _run(softmax_forward_kernel, configs.SOFTMAX_FORWARD, (x,), _fake_forward(x, is_log, dtype), is_log)


def _fake_backward(dy: Tensor, y: Tensor, is_log: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device)


def _launch_backward(dy: Tensor, y: Tensor, is_log: bool, dtype: torch.dtype) -> Tensor:
    dx = _fake_backward(dy, y, is_log, dtype)
    return _run(softmax_backward_kernel, configs.SOFTMAX_BACKWARD, (dy.resolve_neg(), y), dx, is_log)


# Operators and autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.is_log, _ = inputs
    ctx.input_dtype = x.dtype
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return softmax_backward(dy, *ctx.saved_tensors, ctx.is_log, ctx.input_dtype), None, None


softmax_forward = Operator(
    "softmax_forward(Tensor x, bool is_log, ScalarType dtype) -> Tensor",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
softmax_backward = Operator(
    "softmax_backward(Tensor dy, Tensor y, bool is_log, ScalarType dtype) -> Tensor",
    _launch_backward,
    _fake_backward,
)


def _obstacle(input: Any, dim: Any, dtype: Any) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    if not isinstance(input, Tensor):
        return "an argument is not a tensor"
    if input.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {input.dtype}"
    if not isinstance(dim, int) or isinstance(dim, bool):
        return f"dim={dim!r} is not an int"
    if input.dim() == 0 or dim not in (-1, input.dim() - 1):
        # Without its number, which the compiler may hold as a symbol that no text can show.
        return "dim is not the last dimension"
    if input.shape[-1] == 0:
        return "rows of zero elements"
    # PyTorch rounds the input to `dtype` first; to a wider one that changes nothing.
    if dtype not in (None, input.dtype, torch.float32):
        return f"the input would be rounded to {dtype}"
    return None


def _result_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if _runtime.autocast_to_fp32(input) else input.dtype


# Public functions.


@with_kernel
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.nn.functional.softmax` over `dim`: any shape; the result in `dtype`, else in input's.

    Under CUDA autocast the result is fp32, as PyTorch's. The kernel takes the last dimension, up to 2^31 elements long.
    """
    if not _runtime.choose(input, obstacle=_obstacle(input, dim, dtype)):
        # One more frame stands between the caller and PyTorch's warning about a missing `dim`.
        return F.softmax(input, dim, _stacklevel + 1, dtype)  # pyright: ignore[reportArgumentType]
    return softmax_forward(input, False, _result_dtype(input, dtype))


@with_kernel
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.log_softmax` over `dim`: as `softmax`."""
    if not _runtime.choose(input, obstacle=_obstacle(input, dim, dtype)):
        return F.log_softmax(input, dim, _stacklevel + 1, dtype)  # pyright: ignore[reportArgumentType]
    return softmax_forward(input, True, _result_dtype(input, dtype))
