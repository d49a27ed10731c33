"""Muon by kernels: symmetric products, Newton-Schulz, the whole step."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from layouts import moat
from optimizers import assert_equal, parameters, run, set_gradients
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, check, configs
from fastlm_kernels.optim._symmetric import symmetric_product


def plain_product(x: Tensor, alpha: float, add: Tensor | None, beta: float) -> Tensor:
    product = alpha * (x @ x.mT)
    return product if add is None else product + beta * add


@pytest.mark.needs_kernels
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 33, 70), (2, 64, 32), (1, 97, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_symmetric_products(dtype: torch.dtype, shape: tuple[int, ...], with_add: bool, kernel_device: str) -> None:
    """Every tile of the triangle and its mirror image; tails; both orders of the operand in memory."""
    batch, n, _ = shape
    x = moat(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kernel_device, dtype))
    add = torch.randn(batch, n, n, device=kernel_device).to(dtype)
    add = (add + add.mT if with_add else add).contiguous()
    given = add if with_add else None
    ours = symmetric_product(x, 0.75, given, -1.5)
    close = partial(torch.testing.assert_close, rtol=4 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)
    close(ours, ours.mT)
    close(symmetric_product(x.mT.contiguous().mT, 0.75, given, -1.5), ours)
    block = configs.symmetric_config(_runtime.architecture(x.device), dtype, n).block_n
    if n > block:  # beside the diagonal's tiles one is the other's image, to the bit
        assert torch.equal(ours[:, block:, :block], ours[:, :block, block:].mT)
    arguments = {"x": x} | ({"add": add} if with_add else {})
    fused, reference = (
        lambda x, add=None, fn=fn: fn(x, alpha=0.75, add=add, beta=-1.5) for fn in (symmetric_product, plain_product)
    )
    errors = check.compare(fused, reference, arguments, ())
    assert [error for error in errors if not error.ok] == []


@pytest.mark.needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 40, 33), (3, 4, 4)], ids=str)
def test_newton_schulz_is_as_accurate_as_torchs(shape: tuple[int, ...], kernel_device: str) -> None:
    """Against the same iteration in float64."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    reference = fk.backend("torch")(fk.optim.newton_schulz)
    with fk.backend("triton"):
        assert _runtime.explain(fk.optim.newton_schulz, matrices).path == "triton"
        errors = check.compare(fk.optim.newton_schulz, reference, {"matrices": matrices}, ())
    assert [error for error in errors if not error.ok] == []


def muon_parameters(dtype: torch.dtype, device: str) -> list[Tensor]:
    return parameters([(12, 4), (4, 6), (4, 6), (7, 3), (9, 5), (6,)], dtype, device)


def make_muon(params: list[Tensor], **options: Any) -> Any:
    """Matrices of shared and of single shapes, one cut in equal and one in unequal blocks; the rest under AdamW."""
    groups = [
        {"params": params[:3], "use_muon": True, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.2},
        {"params": params[3:4], "use_muon": True, "lr": 0.02, "nesterov": False},
        {"params": params[4:], "use_muon": False, "lr": 0.01, "weight_decay": 0.1},
    ]
    return fk.optim.MuonWithAdamW(groups, split={params[0]: [4, 4, 4], params[3]: [2, 5]}, **options)


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5, "zero_grads": True}, {"skip_nonfinite": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_muon_with_adamw_follows_the_torch_path(options: dict[str, Any], kernel_device: str) -> None:
    ours, theirs = (muon_parameters(torch.float32, kernel_device) for _ in range(2))
    optimizer, reference = make_muon(ours, **options), make_muon(theirs, **options)
    for step in range(5):
        for params in (ours, theirs):
            set_gradients(params, step)
            if step == 1:
                params[2].grad = None
            if step == 2 and "skip_nonfinite" in options:
                params[0].grad.view(-1)[5] = float("inf")  # type: ignore[union-attr]
            if step == 3:
                params[1].grad = params[1].grad.t().contiguous().t()  # type: ignore[union-attr]
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        with fk.backend("torch"):
            reference.step()
        if options.get("zero_grads"):
            assert not any(p.grad.any() for p in ours if p.grad is not None)
        if step == 2 and "skip_nonfinite" in options:
            assert_equal(ours, before)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6 if kernel_device == "cpu" else 1e-2)
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-5, atol=1e-6)
    assert int(optimizer.skipped_steps) == int(reference.skipped_steps) == ("skip_nonfinite" in options)


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_muon_in_16_bits_saves_loads_and_goes_on_bit_for_bit(option: str, path: str, device: str) -> None:
    params = muon_parameters(torch.bfloat16, device)
    optimizer = make_muon(params, **{option: True})
    exact = [p.detach().float().requires_grad_() for p in params]
    reference = make_muon(exact)
    for step in range(2):
        set_gradients(params, step)
        for p, q in zip(params, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(params, exact, strict=True):
        if option == "master_weights":
            torch.testing.assert_close(optimizer.state[p]["fastlm/master"], q.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2**-6, atol=2**-9)
    again = [p.detach().clone().requires_grad_() for p in params]
    resumed = make_muon(again, **{option: True})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, again, range(2, 4))
    run(optimizer, params, range(2, 4))
    assert_equal(again, params)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_within_its_bfloat16(nesterov: bool, adjust: str, path: str, device: str) -> None:
    ours, theirs = (parameters([(6, 4), (4, 6), (5, 5), (6, 4)], device=device) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    optimizer, reference = fk.optim.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    run(optimizer, ours, range(4))
    run(reference, theirs, range(4))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=4 * 0.02 * 0.03)
        mine, other = optimizer.state[p], reference.state[q]
        assert mine.keys() == other.keys()
        torch.testing.assert_close(mine["momentum_buffer"], other["momentum_buffer"], rtol=1e-6, atol=1e-7)
