"""The optimizers on two processes (gloo): DDP and FSDP2 train as one process does on the whole batch."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import Manager
from torch.multiprocessing.spawn import spawn

import fastlm_kernels as fk
from fastlm_kernels import _runtime

OPTIONS = {"lr": 0.05, "max_grad_norm": 0.5, "skip_nonfinite": True, "zero_grads": True}


NAMES = ("AdamW", "MuonWithAdamW")


def _model() -> nn.Sequential:
    """Matrices of 8, 3 and 1 rows: over two processes one is cut in half, one unevenly, and one lies in the first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1))


def _optimizer(name: str, model: nn.Module) -> Any:
    params = list(model.parameters())
    matrices = [p for p in params if p.dim() == 2]
    if name == "MuonWithAdamW":
        # The second block of the first matrix lies on both sides of the cut.
        return fk.optim.MuonWithAdamW(params, split={matrices[0]: [3, 5]}, weight_decay=0.1, **OPTIONS)
    return getattr(fk.optim, name)(matrices if name == "Muon" else params, weight_decay=0.1, **OPTIONS)


def _train(model: nn.Module, name: str, share: slice, poisoned: int, steps: int = 4) -> Any:
    """A few steps on this process's share of the batch; step `poisoned` has a NaN in it on one process."""
    optimizer = _optimizer(name, model)
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


def _wrapped(kind: str) -> nn.Module:
    model = _model()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def _full(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _worker(rank: int, port: int, kind: str, names: tuple[str, ...], results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for name in names:
        model = _wrapped(kind)
        optimizer = _train(model, name, slice(4 * rank, 4 * rank + 4), poisoned=2)
        if _runtime.INTERPRETED:  # the step was the kernels', not torch's
            assert (optimizer._plans if name == "MuonWithAdamW" else optimizer._plan) is not None
        params = [_full(p).detach().numpy().tolist() for p in model.parameters()]
        results[name, rank] = (params, float(_full(optimizer.grad_norm)), int(optimizer.skipped_steps))
    torch.distributed.barrier()  # gloo aborts a process whose peer is gone while it still works
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check(kind: str, names: tuple[str, ...]) -> None:
    with Manager() as manager:
        results = manager.dict()
        spawn(_worker, args=(_free_port(), kind, names, results), nprocs=2)
        found = dict(results)
    for name in names:
        model = _model()
        single = _train(model, name, slice(0, 8), poisoned=2)
        assert found[name, 0] == found[name, 1]
        values, norm, skipped = found[name, 0]
        assert skipped == int(single.skipped_steps) == 1
        assert norm == pytest.approx(float(single.grad_norm), rel=1e-4)
        for p, value in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(p.detach(), Tensor(value), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind: str) -> None:
    _check(kind, NAMES)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_kernels(kind: str) -> None:
    _check(kind, (*NAMES, "Muon"))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A line of one process, this one."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{_free_port()}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def _cut(p: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(p.detach().clone(), mesh, [Shard(0)]).requires_grad_()


@pytest.mark.both_paths
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_16_bit_matrices_that_are_cut_step_as_whole_ones(option: str, mesh: Any) -> None:
    whole = [p.bfloat16().detach().requires_grad_() for p in _model().parameters()]
    cut = [_cut(p, mesh) for p in whole]
    make: Any = partial(fk.optim.MuonWithAdamW, **{option: True})
    ours, theirs = (make(params, split={params[0]: [3, 5]}) for params in (cut, whole))
    for step in range(2):
        for p, q in zip(cut, whole, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            p.grad = _cut(q.grad, mesh).detach()
        ours.step()
        theirs.step()
    for p, q in zip(cut, whole, strict=True):
        assert torch.equal(_full(p), q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert torch.equal(_full(ours.state[p][key]), value), key


def test_8_bits_of_what_is_cut_are_one_clear_error(mesh: Any) -> None:
    with pytest.raises(ValueError, match=r"state_bits: got 8 for a sharded parameter of shape \(8, 6\); use"):
        fk.optim.AdamW([_cut(torch.ones(8, 6), mesh)], state_bits=8)
