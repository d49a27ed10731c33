"""Tensors of the same values in awkward places: in a moat of NaN, off alignment, strided, expanded."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm_kernels import _runtime

# Where kernels run if they can at all, for tests that hold on PyTorch's path too.
DEVICE = "cuda" if _runtime.HAS_TRITON and not _runtime.INTERPRETED and torch.cuda.is_available() else "cpu"
_MOAT = 64


def moat(tensor: Tensor) -> Tensor:
    """The tensor in the middle of a larger buffer of NaN: a read outside it shows in the result."""
    buffer = _poisoned((tensor.numel() + 2 * _MOAT,), tensor)
    return _fill(buffer[_MOAT : _MOAT + tensor.numel()].view(tensor.shape), tensor)


def offset(tensor: Tensor) -> Tensor:
    """The same, one element off: no 16-byte alignment."""
    buffer = _poisoned((tensor.numel() + 2 * _MOAT,), tensor)
    return _fill(buffer[_MOAT + 1 : _MOAT + 1 + tensor.numel()].view(tensor.shape), tensor)


def padded(tensor: Tensor) -> Tensor:
    """Rows inside wider rows of NaN."""
    if tensor.dim() == 0:
        return moat(tensor)
    buffer = _poisoned((*tensor.shape[:-1], tensor.shape[-1] + 7), tensor)
    return _fill(buffer[..., 3 : 3 + tensor.shape[-1]], tensor)


def transposed(tensor: Tensor) -> Tensor:
    """First and last axis exchanged in memory; adjacent elements lie far apart."""
    if tensor.dim() < 2:
        return strided(tensor)
    return _fill(_poisoned(tuple(tensor.transpose(0, -1).shape), tensor).transpose(0, -1), tensor)


def strided(tensor: Tensor) -> Tensor:
    """Every other element of rows twice as long, NaN between."""
    if tensor.dim() == 0:
        return moat(tensor)
    return _fill(_poisoned((*tensor.shape[:-1], 2 * tensor.shape[-1]), tensor)[..., ::2], tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first row for every row: stride 0. Not the values of `tensor`, unless it has one row."""
    if tensor.dim() < 2:
        return tensor.detach().clone()
    return moat(tensor[:1]).expand(tensor.shape)


def guarded(tensor: Tensor) -> Tensor:
    """Dense, at the very end of readable memory: the first byte read past it kills the process. On a GPU, in a moat."""
    if tensor.is_cuda:
        return moat(tensor)
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    readable = -(-size // page) * page
    memory = mmap.mmap(-1, readable + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + readable), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=readable - size)
    return _fill(flat.view(tensor.shape), tensor)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (moat, offset, padded, transposed, strided, expanded)


def _poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """NaN everywhere; the largest integer, which no class has, for integers."""
    poison = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, poison, dtype=like.dtype, device=like.device)


def _fill(view: Tensor, values: Tensor) -> Tensor:
    view.copy_(values.detach())
    return view


def lay_out(arguments: tuple[Any, ...], layout: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """Every tensor argument in that layout, leaves of autograd as before."""
    return tuple(layout(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)


def snapshot(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Copies of the memory behind the tensor arguments, moats included."""
    return [
        torch.empty(0, dtype=a.dtype, device=a.device).set_(a.untyped_storage()).clone()
        for a in arguments
        if isinstance(a, Tensor)
    ]
