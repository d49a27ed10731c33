"""What the launchers share: how a launch is cut into programs; tensors, strides and switches as kernels take them.

A side is q or k; what belongs to a side that takes no part is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator


class Options(NamedTuple):
    """What every operator here takes besides tensors, in the order of the schemas."""

    heads_axis: int
    rotated: int
    interleaved: bool
    eps: float | None
    weight_offset: float


Pair = Sequence[Tensor | None]


def empty_like(x: Tensor) -> Tensor:
    """An empty tensor whose axes lie in memory in x's order, as `torch.empty_like` has it, channels adjacent."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def adjacent(x: Tensor | None) -> Tensor | None:
    """None for no head at all, a copy only where channels do not lie side by side."""
    if x is None or x.numel() == 0:
        return None
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_units(strides: Sequence[int]) -> tuple[int, list[int]]:
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def _strides(tensors: Pair, heads_axis: int) -> tuple[int, list[int]]:
    """(unit, [batch, head, position] of each tensor in units); an axis of one element has no stride to speak of."""
    axes = (0, heads_axis, 3 - heads_axis)
    return _in_units([0 if x is None or x.shape[axis] == 1 else x.stride(axis) for x in tensors for axis in axes])


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, list[int]]:
    """(cos, sin, unit, [batch, position, channel] strides, the same for both)."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    time = cos.stride(-2) if cos.shape[-2] > 1 else 0
    unit, strides = _in_units((batch, time))
    return cos, sin, unit, [*strides, cos.stride(-1)]


class Plan(NamedTuple):
    """How one launch is cut into programs."""

    time: int
    blocks: int  # of positions, in all batches
    walkers: int  # programs a group of heads
    heads: list[int]
    groups: list[int]
    group_heads: int
    num_warps: int
    sizes: dict[str, Any]


def plan_of(sides: Pair, everyone: Pair, options: Options, summed: bool = False) -> Plan:
    """How to cut the work; `summed`: weights' gradients are.

    `everyone`'s heads decide, so that a sum's order is the same whichever sides take part.
    """
    like = next(x for x in sides if x is not None)
    batch, time, width = like.shape[0], like.shape[3 - options.heads_axis], like.shape[3]
    block_p = _power_of_2(options.rotated // 2)
    block_rest = _power_of_2(width - options.rotated)
    architecture = _runtime.architecture(like.device)
    # Half the elements a thread also where three sums and three parts of a head would take more than its registers.
    narrow = options.interleaved or (summed and block_rest > 0)
    table = configs.ROTARY_INTERLEAVED if narrow else configs.ROTARY
    config = configs.row_config(table, architecture, 2 * block_p + block_rest)
    blocks = batch * -(-time // config.block_m)
    heads, all_heads = ([0 if x is None else x.shape[options.heads_axis] for x in pair] for pair in (sides, everyone))
    programs = configs.ROTARY_PARTIAL_PROGRAMS if block_rest else configs.programs_per_multiprocessor(config)
    resident = _runtime.multiprocessors(like.device) * programs
    group_heads = configs.rotary_group_heads(blocks * sum(all_heads), resident)
    sizes = {"D": width, "PAIRS": options.rotated // 2, "BLOCK_T": config.block_m}
    sizes |= {"BLOCK_P": block_p, "BLOCK_REST": block_rest, "INTERLEAVED": options.interleaved}
    groups, all_groups = ([-(-count // group_heads) for count in counts] for counts in (heads, all_heads))
    # With sums to keep, as many programs as stay resident, each walking many blocks; else one a block.
    walkers = min(blocks, max(1, resident // sum(all_groups))) if summed else blocks
    return Plan(time, blocks, walkers, heads, groups, group_heads, config.num_warps, sizes)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that holds n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def shared(
    tensors: Pair, tables: Sequence[Tensor], weights: Pair, options: Options
) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """(tables and weights, strides and scalars, constexprs): what both kernels take alike."""
    cos, sin, table_unit, table_strides = _tables(*tables)
    unit, strides = _strides(tensors, options.heads_axis)
    scalars = [*strides, *table_strides, options.eps or 0.0, options.weight_offset]
    switches = {"UNIT": unit, "TABLE_UNIT": table_unit, "FULL": cos.shape[-1] == options.rotated}
    switches |= {"HAS_WQ": weights[0] is not None, "HAS_WK": weights[1] is not None}
    return [cos, sin, *_weights(weights, cos)], scalars, switches


def both_of(pair: Pair) -> list[Tensor]:
    """The pair, a missing side's tensor replaced by the other's, which stands there unread."""
    other = next(x for x in pair if x is not None)
    return [other if x is None else x for x in pair]


def _weights(weights: Pair, other: Tensor) -> list[Tensor]:
    """Both in one dtype, as the kernels select between them."""
    present = [w for w in weights if w is not None]
    if len({w.dtype for w in present}) > 1:
        weights = [w.to(accumulator(other.dtype)[0]) for w in present]
    return [w.contiguous() for w in both_of(weights)] if present else [other, other]
