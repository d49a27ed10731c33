"""FSDP2's parameters: `DTensor`s, of which each process holds a part. Everything else passes through unchanged."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; where nobody has imported the class there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All parts, gathered; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def like_shards_of(param: Any, part: Tensor) -> Tensor:
    """This process's `part` of a tensor that is cut as `param` is."""
    if not is_sharded(param):
        return part
    cut = sys.modules["torch.distributed.tensor"].DTensor.from_local
    options = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    return cut(part, param.device_mesh, param.placements, **options)


def sharded_as(param: Any, tensor: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut as `param` is; nothing is sent."""
    if not is_sharded(param):
        return tensor
    cut = sys.modules["torch.distributed.tensor"].distribute_tensor
    return cut(tensor, param.device_mesh, param.placements, src_data_rank=None)


def cut_alike(params: list[Any]) -> bool:
    """Whether none is cut, or all are, into disjoint parts over one line of the same processes."""
    if not any(is_sharded(param) for param in params):
        return True
    if not all(is_sharded(param) for param in params) or params[0].device_mesh.ndim != 1:
        return False
    mesh = params[0].device_mesh
    return all(param.device_mesh == mesh and param.placements[0].is_shard() for param in params)


def rows_here(param: Any) -> tuple[int, int]:
    """(first row, number of rows) of the matrix `param` that lie in this process; all of one that is not cut."""
    if not is_sharded(param):
        return 0, param.shape[0]
    mesh, rows = param.device_mesh, param.shape[0]
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return first, local(param).shape[0]


def cut_by_rows(param: Any) -> bool:
    """Whether `param`, if it is cut at all, is cut between rows."""
    return not is_sharded(param) or param.placements[0].is_shard(0)


def shard_group(param: Any) -> Any:
    """The processes over which `param` is cut; None if it is not."""
    return param.device_mesh.get_group() if is_sharded(param) else None


def sum_over(group: Any, values: Tensor) -> Tensor:
    """The sum of all elements of all processes, 1 element, the same in each."""
    total = values.sum().view(1)
    torch.distributed.all_reduce(total, group=group)
    return total
