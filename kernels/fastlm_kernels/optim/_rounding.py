"""Stochastic rounding to bf16 in plain PyTorch: the bits that the kernel gives, for the CPU path and as its truth.

Away from 0 with the probability of how far x lies beyond its nearer bf16 neighbour, so that the mean over many draws is
x. The draw is a hash of (seed, parameter, step, element in memory order): the same for everyone who asks again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def seed_of(seed: int, index: int) -> int:
    """The int64 that tells the rounding of parameter number `index` from every other's."""
    mixed = (int(seed) * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _mixed(bits: Tensor) -> Tensor:
    """The kernel's 32-bit hash, on int64."""
    bits = _times(bits ^ (bits >> 16), 0x7FEB352D)
    bits = _times(bits ^ (bits >> 15), 0x846CA68B)
    return bits ^ (bits >> 16)


def _times(bits: Tensor, factor: int) -> Tensor:
    # In two halves: 32 x 32 bits may not fit an int64.
    return (bits * (factor & 0xFFFF) + ((bits * (factor >> 16) & 0xFFFF) << 16)) & _WORD


def hashed(count: int, seed: int, index: int, step: Tensor, device: torch.device, salt: int = 0) -> Tensor:
    """32 random bits for each of `count` elements of parameter number `index` in step `step`, int64."""
    element = torch.arange(count, device=device)
    word = torch.tensor(seed_of(seed, index), device=device)
    key = _mixed((word & _WORD) ^ _mixed((word >> 32 & _WORD) ^ _mixed(step.to(device).long() & _WORD)))
    bits = _mixed((element & _WORD) ^ _mixed((element >> 32) ^ key))
    return _mixed(bits ^ salt) if salt else bits


def round_stochastically(x: Tensor, seed: int, index: int, step: Tensor) -> Tensor:
    """Dense fp32 `x` as bf16, for parameter number `index` in step `step` (from 1 on)."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    noise = hashed(x.numel(), seed, index, step, x.device) & 0xFFFF
    bits = flat.view(torch.int32).long() & _WORD
    up = torch.where(flat == flat, bits + noise, bits | 0x400000) >> 16
    rounded = torch.where(up >= 2**15, up - 2**16, up).to(torch.int16).view(torch.bfloat16)
    return torch.empty_like(x, dtype=torch.bfloat16).copy_(rounded.as_strided(x.shape, x.stride()))
