"""Checks of our own keywords, shared by the families: a bad value is a ValueError that says what to give instead.

PyTorch's own arguments are left to PyTorch's checks, so that a bad call raises the class that PyTorch raises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless `softcap` is None (off) or a finite number above 0."""
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap!r}; give a finite number above 0, or None for no cap")


def check_coefficient(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number, 0 or above."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value!r}; give a finite number, 0 or above (0 switches it off)")


def check_switch(name: str, value: bool) -> None:
    """Raise ValueError unless `value` is a bool: of anything else, "no" too, Python would make True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}; give True or False")


def check_num_items(num_items: int | Tensor | None, reduction: str) -> None:
    """Raise ValueError unless `num_items` is None, a count (int64, 0 or above) or a 0-d tensor, and there is a sum."""
    if num_items is None:
        return
    if reduction == "none":
        raise ValueError(
            f"num_items={num_items!r} with reduction='none': nothing is summed, so nothing can be divided; "
            "use reduction='mean' or 'sum', or leave num_items out"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.is_complex() or num_items.dtype == torch.bool:
            raise ValueError(
                f"num_items: got a {num_items.dtype} tensor of shape {tuple(num_items.shape)}; "
                "give an int or a 0-d tensor that holds the count"
            )
    elif isinstance(num_items, bool) or not isinstance(num_items, int) or not 0 <= num_items < 2**63:
        raise ValueError(f"num_items: got {num_items!r}; give an int from 0 to 2**63 - 1, or a 0-d tensor")


def check_loss_keywords(z_loss: float, softcap: float | None, num_items: int | Tensor | None, reduction: str) -> None:
    """Raise ValueError for the first of a loss's own keywords that is wrong."""
    check_coefficient("z_loss", z_loss)
    check_softcap(softcap)
    check_num_items(num_items, reduction)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): near 0 the identity, never beyond +-cap. None is off. Any shape, dtype kept."""
    if cap is None:
        return x
    return (x / cap).tanh_() * cap
