"""What a configuration of each kind says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WITH_TENSOR_MEMORY_ACCELERATOR = ("sm_90", "sm_100")


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows x `block_n` columns worked on by `num_warps` warps.

    num_stages  tiles in flight in a program that walks several: all but one of them in shared memory
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class ElementwiseConfig:
    """A tile of `tile_bytes` of each tensor worked on by `num_warps` warps; a power of two."""

    tile_bytes: int
    num_warps: int


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of `block_m` queries x `block_n` keys of heads of up to `head_dim` channels, on `num_warps` warps.

    num_stages  tiles of what a program walks that are in flight: all but one of them in shared memory
    loads       how the forward loads its tiles: by pointers; by descriptors, for the tensor memory accelerator of sm_90
                and later; or "specialized", by descriptors in a warp group of its own beside those that compute (of
                num_warps warps each). "gluon" is the kernel of attention/_hopper.py, for sm_90 alone: a warp loads, two
                groups of 4 warps compute in turns; "gluon-resident" the same with a program a multiprocessor. Only
                measured tables ask for anything but pointers: no GPU has run the others yet.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loads: Literal["pointers", "descriptors", "specialized", "gluon", "gluon-resident"] = "pointers"


@dataclass(frozen=True)
class OptimConfig:
    """A program's part of a tensor: `chunk` elements, walked in tiles of `block`, worked on by `num_warps` warps."""

    chunk: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class SymmetricConfig:
    """Tiles of `block_n` x `block_n`, summed `block_k` columns at a time, `num_stages` - 1 such steps on their way."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
