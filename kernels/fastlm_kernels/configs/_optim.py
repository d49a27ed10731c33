"""The optimizers' updates, and Muon's products of a matrix with its transpose."""

from __future__ import annotations

import torch

from ._forms import OptimConfig, SymmetricConfig

# Chunks do not depend on the tile, so that one map of them serves all. 8 tiles of fp32 hide what a program reads before
# the first one: its row of the table, the group's scalars, the step.
OPTIM_CHUNK = 8192
_OPTIM_THREADS = 256
# For every option at once on 16-bit tensors or with stochastic rounding, which else spill on sm_80 and sm_90; asked for
# elsewhere, it costs resident warps.
OPTIM_REGISTERS = 168
# With states of 8 bits the assembler takes up to 180 where 80 do, which hold three programs instead of one or two.
OPTIM_EIGHT_BITS_REGISTERS = 96


def optim_config(architecture: str, *itemsizes: int) -> OptimConfig:
    """For tensors of these element sizes: one 128-bit load a thread and tile of the widest.

    Fewer bits of a narrower tensor beside it: with more, its layout and the widest's differ, and each store goes
    through shared memory.
    """
    warps = _OPTIM_THREADS // (64 if architecture.startswith("gfx") else 32)
    return OptimConfig(OPTIM_CHUNK, _OPTIM_THREADS * 16 // max(itemsizes), warps)


# As many steps on their way as shared memory holds; elsewhere 3, which fits 99 KB.
_SYMMETRIC_STAGES = {"sm_90": 4, "sm_100": 4, "gfx942": 2}
# fp32 is summed without tensor cores: on a GPU only where the kernel is forced.
_SYMMETRIC_FP32 = SymmetricConfig(32, 32, 4, 2)
_SYMMETRIC_SMALL = SymmetricConfig(64, 64, 4, 3)


def symmetric_config(architecture: str, dtype: torch.dtype, size: int) -> SymmetricConfig:
    """For a symmetric result of `size` x `size`."""
    if dtype == torch.float32:
        return _SYMMETRIC_FP32
    if size <= 64:
        return _SYMMETRIC_SMALL
    return SymmetricConfig(128, 64, 8, _SYMMETRIC_STAGES.get(architecture, 3))
