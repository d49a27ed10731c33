"""What the launchers of attention share: tensors, options and switches as the kernels take them.

Every tensor of heads is (batch, heads, positions, channels); packed documents are one batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator


class Options(NamedTuple):
    """What every operator here takes besides tensors, in the order of the schemas; -1 is an open side."""

    max_q: int
    max_k: int
    left: int
    right: int
    bottom_right: bool
    scale: float
    softcap: float
    dropout: float
    deterministic: bool


class Extras(NamedTuple):
    """The tensors beside q, k and v, in the order of the schemas; `seed` (B,) or (1,), dropout's for each batch row."""

    mask: Tensor | None
    key_mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    used_k: Tensor | None
    seed: Tensor | None


def empty_like(x: Tensor, channels: int) -> Tensor:
    """An empty (B, H, T, channels), dense, with heads inside positions in memory if x has them so."""
    B, H, T, _ = x.shape
    strides = (T * H * channels, T * channels, channels, 1)
    if x.stride(1) < x.stride(2):
        strides = (T * H * channels, channels, H * channels, 1)
    # Not a transposed view: autograd would refuse changes in place.
    return torch.empty_strided((B, H, T, channels), strides, dtype=x.dtype, device=x.device)


def unit_of(x: Tensor) -> int:
    """How many elements 16 bytes hold."""
    return max(1, 16 // x.itemsize)


def steps_of(x: Tensor) -> list[int]:
    """[batch, head, position] strides; an axis of one element has none to speak of."""
    return [0 if x.shape[axis] == 1 else x.stride(axis) for axis in range(3)]


def readable(x: Tensor) -> Tensor:
    """A copy only where channels do not lie side by side, or where rows could start on 16-byte boundaries and do not.

    Reading it element by element would cost more, in time and in registers.
    """
    x = x.resolve_neg()
    unit = unit_of(x)
    wide = x.shape[-1] % unit == 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    if wide and (x.data_ptr() % 16 or any(step % unit for step in steps_of(x))):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """(unit, [batch, head, position] of each tensor in units)."""
    strides = [step for x in tensors for step in steps_of(x)]
    unit = unit_of(tensors[0])
    unit = unit if all(stride % unit == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def power_of_2(n: int) -> int:
    """The smallest power of 2 that holds n and that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def sizes_of(q: Tensor, v: Tensor) -> dict[str, Any]:
    D, E = q.shape[-1], v.shape[-1]
    return {"D": D, "E": E, "BLOCK_D": power_of_2(D), "BLOCK_E": power_of_2(E)}


def config_of(
    table: configs.AttentionTable,
    fp32: configs.AttentionTable,
    q: Tensor,
    v: Tensor,
    most: configs.AttentionTiles | None = None,
) -> configs.AttentionConfig:
    """The configuration for these tensors, of `fp32` if they are wider than 16 bits, else no larger than `most`."""
    architecture, head_dim = _runtime.architecture(q.device), power_of_2(max(q.shape[-1], v.shape[-1]))
    if q.itemsize > 2:
        return configs.attention_config(fp32, architecture, head_dim)
    return configs.attention_config(table, architecture, head_dim, most)


def launch_options(config: configs.AttentionConfig, q: Tensor, v: Tensor, unit: int) -> dict[str, Any]:
    """What every large kernel is launched with, besides switches."""
    return {
        "num_warps": config.num_warps,
        # Specialized warps divide the registers among themselves.
        "max_registers": None if config.loads == "specialized" else configs.ATTENTION_REGISTERS,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        **sizes_of(q, v),
        "UNIT": unit,
        "STAGES": config.num_stages,
        "ACC": accumulator(q.dtype)[1],
    }


def switches_of(extras: Extras, options: Options) -> dict[str, Any]:
    return {
        "BOTTOM_RIGHT": options.bottom_right,
        "HAS_LEFT": options.left >= 0,
        "HAS_RIGHT": options.right >= 0,
        "HAS_MASK": extras.mask is not None,
        "MASK_STEP": 0 if extras.mask is None else extras.mask.stride(3),
        "HAS_KEY_MASK": extras.key_mask is not None,
        "HAS_SOFTCAP": options.softcap > 0.0,
        "HAS_DROPOUT": options.dropout > 0.0,
        "PACKED": extras.cu_q is not None,
        "USED": extras.used_k is not None,
    }


def stepping(extras: Extras) -> Extras:
    """The same with a mask whose keys lie side by side, or are one for all; a copy where they do not."""
    mask = extras.mask
    if mask is None or mask.stride(3) in (0, 1):
        return extras
    if mask.shape[3] == 1:
        return extras._replace(mask=mask.as_strided(mask.shape, (*mask.stride()[:3], 0), mask.storage_offset()))
    return extras._replace(mask=mask.contiguous())


def pointers_of(extras: Extras, absent: Tensor) -> list[Tensor]:
    """The extras as kernels take them: masks as bytes, any pointer for what is not there."""
    *others, seed = extras
    pointers = [
        absent if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x.contiguous() for x in others
    ]
    return [*pointers, absent if seed is None else seed]


def scalars_of(extras: Extras, options: Options) -> list[Any]:
    """The last arguments of the three large kernels: the masks' and the seeds' strides, the window, the scales."""
    mask = [0] * 3 if extras.mask is None else extras.mask.stride()[:3]
    key_mask = [0] * 2 if extras.key_mask is None else extras.key_mask.stride()
    seed = 0 if extras.seed is None or extras.seed.numel() == 1 else extras.seed.stride(0)
    return [*mask, *key_mask, seed, options.left, options.right, options.scale, options.softcap, options.dropout]


def documents_of(q: Tensor, k: Tensor, extras: Extras, options: Options) -> tuple[int, int, int]:
    """(batches, longest queries, longest keys), of the documents if there are any."""
    if extras.cu_q is None:
        return q.shape[0], q.shape[2], k.shape[2]
    return extras.cu_q.shape[0] - 1, options.max_q, options.max_k


def grid_of(batch: int, heads: int, length: int, block: int, shared: int, bytes_each: int) -> tuple[int, int, int]:
    """(tiles, rows of heads, section) as `place` takes them; `shared` heads read the same bytes_each bytes."""
    return -(-length // block), batch * heads, min(batch * heads, shared * configs.attention_section(bytes_each))
