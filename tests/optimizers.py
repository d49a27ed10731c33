"""What the optimizers' tests share: parameters, gradients that follow from the step's number, constructors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import configs

RULES = ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "RMSprop")
# Every state that a class can have.
FULL = {
    "AdamW": {"amsgrad": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"weight_decay": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
}
CHUNK = configs.OPTIM_CHUNK


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def set_gradients(params: list[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


def run(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def assert_resumes(optimizer: Any, params: list[Tensor], build: Callable[[list[Tensor]], Any]) -> None:
    """Two updates, saved, two more; these again by `build` and what it loads: the same bits, states and dtypes."""
    run(optimizer, params, range(2))
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
    run(optimizer, params, range(2, 4))
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    again = [value.to(params[0].device).requires_grad_() for value in values]
    resumed = build(again)
    resumed.load_state_dict(state)
    run(resumed, again, range(2, 4))
    assert_equal(again, params)
    for p, q in zip(again, params, strict=True):
        assert resumed.state[p].keys() == optimizer.state[q].keys()
        for key, value in optimizer.state[q].items():
            assert torch.equal(resumed.state[p][key], value)
            assert resumed.state[p][key].dtype == value.dtype


def make(name: str, params: Any, **options: Any) -> Any:
    return getattr(fk.optim, name)(params, **{"lr": 0.05, **options})
