"""hf.patch, then fully_shard, on two processes (gloo): as on one. In a file of its own: each process imports it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from hf_models import assert_close, loss_and_gradients, make_batch, make_model
from torch.multiprocessing.spawn import spawn

import fastlm_kernels as fk

FAMILIES = ("llama", "gpt2")


def _worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes: the loss of its row of the batch, and the whole gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for family in FAMILIES:
        model = fk.hf.patch(make_model(family))
        for module in (*(m for m in model.modules() if hasattr(m, "mlp")), model):
            fully_shard(module, mesh=mesh)
        out = model(**{name: tensor[rank : rank + 1] for name, tensor in make_batch("plain").items()})
        assert out.logits is None  # the head's matrix is whole while the model runs
        out.loss.backward()
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        torch.save([out.loss.detach(), *gradients], folder / f"{family}{rank}.pt")
    torch.distributed.barrier()  # gloo aborts a process whose peer is gone while it still works
    torch.distributed.destroy_process_group()


def test_sharded_on_two_processes_as_whole_on_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, args=(port, tmp_path), nprocs=2)
    for family in FAMILIES:
        model, batch = make_model(family), make_batch("plain")
        rows = [loss_and_gradients(model, **{k: t[i : i + 1] for k, t in batch.items()}) for i in range(2)]
        for rank in range(2):
            loss, *gradients = torch.load(tmp_path / f"{family}{rank}.pt")
            assert loss.item() == pytest.approx(rows[rank][0].item(), rel=1e-5)
            assert_close(gradients, [torch.stack(pair).mean(0) for pair in zip(*rows, strict=True)][1:])
