"""The optimizers on two processes (gloo): DDP and FSDP2 train as one process does on the whole batch."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import Manager
from torch.multiprocessing.spawn import spawn

import fastlm_kernels as fk
from fastlm_kernels import _runtime

OPTIONS = {"lr": 0.05, "max_grad_norm": 0.5, "skip_nonfinite": True, "zero_grads": True}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _train(model: nn.Module, name: str, share: slice, poisoned: int, steps: int = 4) -> Any:
    """A few steps on this process's share of the batch; step `poisoned` has a NaN in it on one process."""
    optimizer = getattr(fk.optim, name)(model.parameters(), **OPTIONS)
    if _runtime.INTERPRETED:
        assert _runtime.explain(optimizer.step).path == "triton"
    x = torch.linspace(-1, 1, 48).view(8, 6)
    for step in range(steps):
        batch = (x * (step + 1)).sin()
        if step == poisoned:
            batch[7, 0] = float("nan")
        model(batch[share]).square().mean().backward()
        optimizer.step()
    return optimizer


def _worker(rank: int, port: int, kind: str, name: str, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model: nn.Module = _model()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = _train(model, name, slice(4 * rank, 4 * rank + 4), poisoned=2)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # type: ignore[operator]
    norm = optimizer.grad_norm
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if _runtime.INTERPRETED:
        assert optimizer._plan is not None  # the step was the kernels', not torch's
    results[rank] = ([p.detach().numpy().tolist() for p in full], float(norm), int(optimizer.skipped_steps))
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check(kind: str, name: str) -> None:
    model = _model()
    single = _train(model, name, slice(0, 8), poisoned=2)
    with Manager() as manager:
        results = manager.dict()
        spawn(_worker, args=(_free_port(), kind, name, results), nprocs=2)
        found = [results[rank] for rank in (0, 1)]
    assert found[0] == found[1]
    values, norm, skipped = found[0]
    assert skipped == int(single.skipped_steps) == 1
    assert norm == pytest.approx(float(single.grad_norm), rel=1e-4)
    for p, value in zip(model.parameters(), values, strict=True):
        torch.testing.assert_close(p.detach(), Tensor(value), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW", "MuonWithAdamW"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind: str, name: str) -> None:
    _check(kind, name)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_kernels(kind: str) -> None:
    _check(kind, "AdamW")
