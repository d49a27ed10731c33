"""Activations, elementwise; the gated ones are a product of two inputs.

    gelu(x)         = x Phi(x),  tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    silu(x)         = x sigmoid(x)
    relu_squared(x) = max(x, 0)^2
    swiglu(g, u)    = silu(g) u
    geglu(g, u)     = gelu(g) u

Backward: dx = dy f'(x), and for f(g) u, in one launch, dg = dy u f'(g) and du = dy f(g). Saved for backward: the
inputs; the output instead for sigmoid, f' = y (1 - y), and tanh, f' = 1 - y^2.

Memory traffic per element, s bytes each (2 in bf16): forward reads x and writes y, 2 s; backward reads x and dy and
writes dx, 3 s. Gated: 3 s and 5 s; PyTorch's two operators take 5 s and 9 s. Arithmetic is fp32
with one rounding, at the end.

Tensors that share one dense layout are read as a single row of all their elements, whatever the axes' order. Rows at a
stride (`gate` and `up` as the two halves of one projection's output) are read where they lie. Only other layouts are
copied first.

Do they wait for memory? A multiprocessor of an H200 gets 18 bytes a clock and issues instructions for 128 elements: a
bf16 element that moves 4 bytes may cost 28 instructions, 6 bytes (a backward, or a gated forward) 42, 10 bytes (a gated
backward) 71. sm_90's code, loads and stores included, has

    forward     relu_squared 6   sigmoid 15   silu 16   gelu 19   gelu tanh 22   tanh 26
    backward    relu_squared 10  sigmoid 8    silu 21   gelu 29   gelu tanh 31   tanh 7
    gated       swiglu 19, backward 26        geglu 21, backward 35        geglu tanh 25, backward 35

and at most two exponentials or reciprocals, of 16 a clock. All wait for memory; with the library's erf, 36 in its
forward, gelu would not. fp32 has twice the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _math, _runtime, configs
from ._rows import accumulator
from ._runtime import Operator, kernel, launch, tl, with_kernel

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
# These save their output for backward, the others their input.
_FROM_OUTPUT = ("sigmoid", "tanh")


# Reference: plain PyTorch. `gelu`, `silu`, `sigmoid` and `tanh` are PyTorch's own.


def relu_squared_reference(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up."""
    return F.gelu(gate, approximate=approximate) * up


# Kernels.


@kernel()
def _value_and_slope(x, FUNCTION: tl.constexpr):
    """f(x) and f'(x); the one that the caller drops costs nothing."""
    if FUNCTION == "gelu":
        # f = x Phi(x)   f' = Phi(x) + x e^(-x^2/2) / sqrt(2 pi)
        cdf = _math.normal_cdf(x)
        value = x * cdf
        slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh(v / 2)) / 2 = sigmoid(v), which does not cancel: f = x s   f' = s + x s (1 - s) v'
        v = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        # Below -36.7, 1 + tanh is 0 in any precision, and PyTorch's result with it.
        s = _math.sigmoid(tl.where(v < -36.7, -float("inf"), v))
        value = x * s
        slope = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif FUNCTION == "silu":
        # f = x s   f' = s (1 + x (1 - s))
        s = _math.sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif FUNCTION == "relu_squared":
        # Not the maximum with 0, which would lose NaN.
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    elif FUNCTION == "sigmoid":
        value = _math.sigmoid(x)
        slope = value * (1.0 - value)
    else:
        value = _math.tanh(x)
        slope = 1.0 - value * value
    return value, slope


@kernel()
def _gradient(saved, dy, FUNCTION: tl.constexpr):
    """dy f'(x), from x or, for sigmoid and tanh, from y."""
    if FUNCTION == "sigmoid":
        dx = dy * (saved * (1.0 - saved))
    elif FUNCTION == "tanh":
        dx = dy * (1.0 - saved * saved)
    else:
        _, slope = _value_and_slope(saved, FUNCTION)
        dx = dy * slope
        if FUNCTION == "relu_squared":
            # An infinite dy stops at the threshold.
            dx = tl.where(saved <= 0.0, 0.0, dx)
    return dx


@kernel()
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows, first column, columns from there, mask, and whether the mask is all true."""
    strips = (N - 1) // BLOCK_N + 1  # not cdiv, whose N + BLOCK_N - 1 may pass 2^31
    # int64 from the start: both a row's elements and their offsets may pass 2^31; columns within a tile may not.
    first_row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M
    first_col = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_N
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    width = tl.minimum(N - first_col, BLOCK_N).to(tl.int32)
    whole = (first_row + BLOCK_M <= M) & (width == BLOCK_N)
    return rows, first_col, cols, (rows < M) & (cols < width), whole


# N may be any number and is not specialised, so a mask on it makes loads one element wide: whole tiles go without one.


@kernel()
def _load(at, mask, WHOLE: tl.constexpr, ACC: tl.constexpr):
    if WHOLE:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value.to(ACC)


@kernel()
def _store(at, value, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, value.to(at.dtype.element_ty))
    else:
        tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@kernel()
def _unary_forward_tile(x_at, y_at, mask, WHOLE: tl.constexpr, FUNCTION: tl.constexpr, ACC: tl.constexpr):
    value, _ = _value_and_slope(_load(x_at, mask, WHOLE, ACC), FUNCTION)
    _store(y_at, value, mask, WHOLE)


@kernel(do_not_specialize=("M", "N"))
def unary_forward_kernel(
    X,
    Y,
    M,
    N,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
):
    rows, first_col, cols, mask, whole = _tile(M, N, BLOCK_M, BLOCK_N)
    x_at = X + (rows * stride_x + first_col) + cols
    y_at = Y + (rows * stride_y + first_col) + cols
    if whole:
        _unary_forward_tile(x_at, y_at, mask, True, FUNCTION, ACC)
    else:
        _unary_forward_tile(x_at, y_at, mask, False, FUNCTION, ACC)


@kernel()
def _unary_backward_tile(dy_at, s_at, dx_at, mask, WHOLE: tl.constexpr, FUNCTION: tl.constexpr, ACC: tl.constexpr):
    saved, dy = _load(s_at, mask, WHOLE, ACC), _load(dy_at, mask, WHOLE, ACC)
    _store(dx_at, _gradient(saved, dy, FUNCTION), mask, WHOLE)


@kernel(do_not_specialize=("M", "N"))
def unary_backward_kernel(
    DY,
    S,
    DX,
    M,
    N,
    stride_dy,
    stride_s,
    stride_dx,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """S is what was saved: the input, or the output."""
    rows, first_col, cols, mask, whole = _tile(M, N, BLOCK_M, BLOCK_N)
    dy_at = DY + (rows * stride_dy + first_col) + cols
    s_at = S + (rows * stride_s + first_col) + cols
    dx_at = DX + (rows * stride_dx + first_col) + cols
    if whole:
        _unary_backward_tile(dy_at, s_at, dx_at, mask, True, FUNCTION, ACC)
    else:
        _unary_backward_tile(dy_at, s_at, dx_at, mask, False, FUNCTION, ACC)


@kernel()
def _gated_forward_tile(g_at, u_at, y_at, mask, WHOLE: tl.constexpr, FUNCTION: tl.constexpr, ACC: tl.constexpr):
    value, _ = _value_and_slope(_load(g_at, mask, WHOLE, ACC), FUNCTION)
    _store(y_at, value * _load(u_at, mask, WHOLE, ACC), mask, WHOLE)


@kernel(do_not_specialize=("M", "N"))
def gated_forward_kernel(
    G,
    U,
    Y,
    M,
    N,
    stride_g,
    stride_u,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = f(g) u."""
    rows, first_col, cols, mask, whole = _tile(M, N, BLOCK_M, BLOCK_N)
    g_at = G + (rows * stride_g + first_col) + cols
    u_at = U + (rows * stride_u + first_col) + cols
    y_at = Y + (rows * stride_y + first_col) + cols
    if whole:
        _gated_forward_tile(g_at, u_at, y_at, mask, True, FUNCTION, ACC)
    else:
        _gated_forward_tile(g_at, u_at, y_at, mask, False, FUNCTION, ACC)


@kernel()
def _gated_backward_tile(
    dy_at,
    g_at,
    u_at,
    dg_at,
    du_at,
    mask,
    WHOLE: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_DG: tl.constexpr,
    HAS_DU: tl.constexpr,
    ACC: tl.constexpr,
):
    # dg = dy u f'(g)   du = dy f(g)
    dy = _load(dy_at, mask, WHOLE, ACC)
    value, slope = _value_and_slope(_load(g_at, mask, WHOLE, ACC), FUNCTION)
    if HAS_DG:
        _store(dg_at, dy * _load(u_at, mask, WHOLE, ACC) * slope, mask, WHOLE)
    if HAS_DU:
        _store(du_at, dy * value, mask, WHOLE)


@kernel(do_not_specialize=("M", "N"))
def gated_backward_kernel(
    DY,
    G,
    U,
    DG,
    DU,
    M,
    N,
    stride_dy,
    stride_g,
    stride_u,
    stride_dg,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_DG: tl.constexpr,
    HAS_DU: tl.constexpr,
    ACC: tl.constexpr,
):
    """DG and DU share their layout."""
    rows, first_col, cols, mask, whole = _tile(M, N, BLOCK_M, BLOCK_N)
    dy_at = DY + (rows * stride_dy + first_col) + cols
    g_at = G + (rows * stride_g + first_col) + cols
    u_at = U + (rows * stride_u + first_col) + cols
    dg_at = DG + (rows * stride_dg + first_col) + cols
    du_at = DU + (rows * stride_dg + first_col) + cols
    if whole:
        _gated_backward_tile(dy_at, g_at, u_at, dg_at, du_at, mask, True, FUNCTION, HAS_DG, HAS_DU, ACC)
    else:
        _gated_backward_tile(dy_at, g_at, u_at, dg_at, du_at, mask, False, FUNCTION, HAS_DG, HAS_DU, ACC)


# Launchers.


def _common_rows(output: Tensor, *inputs: Tensor) -> tuple[int, int, list[int], tuple[Tensor, ...]]:
    """(rows, columns, row strides of output and inputs, inputs) that name every element once.

    One row of everything where all share one dense layout; inputs of a layout that allows no rows come back as copies.
    """
    tensors = (output, *inputs)
    if all(t.is_contiguous() for t in tensors) or all(t.stride() == output.stride() for t in inputs):
        return 1, output.numel(), [0] * len(tensors), inputs
    axes = _merged_axes(tensors)
    inner = [1] * len(tensors)
    if len(axes) == 1 and axes[0][1] == inner:
        return 1, output.numel(), [0] * len(tensors), inputs
    if len(axes) == 2 and axes[0][1] == inner:
        return axes[1][0], axes[0][0], axes[1][1], inputs
    inputs = tuple(t if t.stride() == output.stride() else torch.empty_like(output).copy_(t) for t in inputs)
    return 1, output.numel(), [0] * len(tensors), inputs


def _merged_axes(tensors: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """(size, strides of each tensor) of the fewest axes that describe all tensors, the first one's innermost first."""
    first, merged = tensors[0], []
    for axis in sorted((a for a in range(first.dim()) if first.shape[a] != 1), key=first.stride):
        size, strides = first.shape[axis], [t.stride(axis) for t in tensors]
        if merged and strides == [merged[-1][0] * stride for stride in merged[-1][1]]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, strides))
    return merged


def _run(kernel_function: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **constexprs: Any) -> None:
    """Launch over all elements; `outputs` are of one layout, those of no elements not wanted."""
    like = next(t for t in outputs if t.numel() != 0)
    rows, columns, strides, inputs = _common_rows(like, *inputs)
    config = configs.elementwise_config(_runtime.architecture(like.device), like.itemsize, rows, columns)
    launch(
        kernel_function,
        (-(-rows // config.block_m) * -(-columns // config.block_n),),
        (*inputs, *outputs, rows, columns, *strides[1:], strides[0]),
        num_warps=config.num_warps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ACC=accumulator(like.dtype)[1],
        **constexprs,
    )


def _launch_unary_forward(x: Tensor, function: str) -> Tensor:
    # As PyTorch does: the input's layout if it is dense, its order of axes if not.
    y = torch.empty_like(x)
    if y.numel() != 0:
        _run(unary_forward_kernel, (x,), (y,), FUNCTION=function)
    return y


def _launch_unary_backward(dy: Tensor, saved: Tensor, function: str) -> Tensor:
    dx = torch.empty_like(saved)
    if dx.numel() != 0:
        _run(unary_backward_kernel, (dy.resolve_neg(), saved), (dx,), FUNCTION=function)
    return dx


def _launch_gated_forward(gate: Tensor, up: Tensor, function: str) -> Tensor:
    y = torch.empty_like(gate)
    if y.numel() != 0:
        _run(gated_forward_kernel, (gate, up), (y,), FUNCTION=function)
    return y


def _launch_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, function: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """(dgate, dup), those not in `needs` empty."""
    dg, du = grads = _fake_gated_backward(dy, gate, up, function, needs)
    if gate.numel() != 0:
        inputs, (need_dg, need_du) = (dy.resolve_neg(), gate, up), needs
        _run(gated_backward_kernel, inputs, (dg, du), FUNCTION=function, HAS_DG=need_dg, HAS_DU=need_du)
    return grads


def _fake_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, function: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dg, du = (torch.empty_like(gate) if need else gate.new_empty((0,)) for need in needs)
    return dg, du


# Operators and autograd.


def _setup_unary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.function = inputs
    ctx.save_for_backward(output if ctx.function in _FROM_OUTPUT else x)


def _unary_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return unary_backward(dy, *ctx.saved_tensors, ctx.function), None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.function = inputs
    ctx.save_for_backward(*tensors)


def _gated_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = gated_backward(dy, *ctx.saved_tensors, ctx.function, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None)


unary_forward = Operator(
    "unary_forward(Tensor x, str function) -> Tensor",
    _launch_unary_forward,
    lambda x, function: torch.empty_like(x),
    _setup_unary,
    _unary_gradient,
)
unary_backward = Operator(
    "unary_backward(Tensor dy, Tensor saved, str function) -> Tensor",
    _launch_unary_backward,
    lambda dy, saved, function: torch.empty_like(saved),
)
gated_forward = Operator(
    "gated_forward(Tensor gate, Tensor up, str function) -> Tensor",
    _launch_gated_forward,
    lambda gate, up, function: torch.empty_like(gate),
    _setup_gated,
    _gated_gradient,
)
gated_backward = Operator(
    "gated_backward(Tensor dy, Tensor gate, Tensor up, str function, bool[] needs) -> (Tensor, Tensor)",
    _launch_gated_backward,
    _fake_gated_backward,
)


def _obstacle(*tensors: Any) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    for tensor in tensors:
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
    if any(t.dtype != tensors[0].dtype for t in tensors):
        return "gate and up differ in dtype"
    if any(t.shape != tensors[0].shape for t in tensors):
        return "gate and up are broadcast"
    return None


def _bad_approximate(approximate: Any) -> str | None:
    return None if approximate in ("none", "tanh") else f"approximate={approximate!r} is neither 'none' nor 'tanh'"


# Public functions.


@with_kernel
def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.gelu`: any shape, floating dtype kept; approximate is "none" or "tanh".

    out: a tensor that takes the result, no gradients then. Hendrycks, Gimpel 2016.
    """
    obstacle = _obstacle(input) or _bad_approximate(approximate)
    if not _runtime.choose(input, obstacle=obstacle if out is None else "out= is given"):
        if out is not None:
            return F.gelu(input, approximate=approximate, out=out)  # pyright: ignore[reportCallIssue]
        return F.gelu(input, approximate=approximate)
    return unary_forward(input, _GELU[approximate])


@with_kernel
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`: any shape, floating or complex dtype kept."""
    if not _runtime.choose(input, obstacle="inplace=True" if inplace else _obstacle(input)):
        return F.silu(input, inplace)
    return unary_forward(input, "silu")


@with_kernel
def sigmoid(input: Tensor) -> Tensor:
    """`torch.nn.functional.sigmoid`: any shape; integers give the default floating dtype."""
    if not _runtime.choose(input, obstacle=_obstacle(input)):
        return F.sigmoid(input)
    return unary_forward(input, "sigmoid")


@with_kernel
def tanh(input: Tensor) -> Tensor:
    """`torch.nn.functional.tanh`: any shape; integers give the default floating dtype."""
    if not _runtime.choose(input, obstacle=_obstacle(input)):
        return F.tanh(input)
    return unary_forward(input, "tanh")


@with_kernel
def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)**2, `torch.nn.functional.relu(x).square()`: any shape, dtype kept; the gradient is 2 * max(x, 0)."""
    if not _runtime.choose(x, obstacle=_obstacle(x)):
        return relu_squared_reference(x)
    return unary_forward(x, "relu_squared")


@with_kernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: shapes broadcast as in PyTorch's product, floating dtypes promote as there. Shazeer 2020.

    gate and up may be the two halves of one tensor (`chunk(2, -1)`): they are read where they lie.
    """
    if not _runtime.choose(gate, up, obstacle=_obstacle(gate, up)):
        return swiglu_reference(gate, up)
    return gated_forward(gate, up, "silu")


@with_kernel
def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up: as `swiglu`; approximate is "none" or "tanh"."""
    if not _runtime.choose(gate, up, obstacle=_obstacle(gate, up) or _bad_approximate(approximate)):
        return geglu_reference(gate, up, approximate=approximate)
    return gated_forward(gate, up, _GELU[approximate])
