"""Activations, elementwise: one read and one write per element forward, two reads and one write backward.

    gelu(x)         = x * Phi(x),  tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
    silu(x)         = x * sigmoid(x)
    relu_squared(x) = max(x, 0)^2
    swiglu(g, u)    = silu(g) * u
    geglu(g, u)     = gelu(g) * u

Each function is its PyTorch operator or the composition of two; the inputs are saved for backward (`sigmoid` and
`tanh` save their output instead).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._runtime import without_kernel


@without_kernel("gelu has no kernel yet: PyTorch's operator")
def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.gelu`: any shape, floating dtype kept; approximate is "none" or "tanh".

    out: a tensor that takes the result, no gradients then.
    """
    if out is not None:
        return F.gelu(input, approximate=approximate, out=out)  # pyright: ignore[reportCallIssue]
    return F.gelu(input, approximate=approximate)


@without_kernel("silu has no kernel yet: PyTorch's operator")
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`: any shape, floating or complex dtype kept."""
    return F.silu(input, inplace)


@without_kernel("sigmoid has no kernel yet: PyTorch's operator")
def sigmoid(input: Tensor) -> Tensor:
    """`torch.nn.functional.sigmoid`: any shape; integers give the default floating dtype."""
    return F.sigmoid(input)


@without_kernel("tanh has no kernel yet: PyTorch's operator")
def tanh(input: Tensor) -> Tensor:
    """`torch.nn.functional.tanh`: any shape; integers give the default floating dtype."""
    return F.tanh(input)


@without_kernel("relu_squared has no kernel yet: PyTorch's operator")
def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)**2, `torch.nn.functional.relu(x).square()`: any shape, dtype kept; the gradient is 2 * max(x, 0)."""
    return F.relu(x).square()


@without_kernel("swiglu has no kernel yet: PyTorch's operator")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: shapes broadcast as in PyTorch's product, floating dtypes promote as there."""
    return F.silu(gate) * up


@without_kernel("geglu has no kernel yet: PyTorch's operator")
def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up: as `swiglu`; approximate is "none" or "tanh"."""
    return F.gelu(gate, approximate=approximate) * up
