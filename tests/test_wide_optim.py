"""16-bit parameters: fp32 masters, or stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import CHUNK, FULL, RULES, assert_resumes, make, parameters, set_gradients

import fastlm_kernels as fk
from fastlm_kernels import _runtime
from fastlm_kernels.optim._rounding import round_stochastically


def test_masters_are_fp32_training_and_parameters_their_rounding(path: str, device: str) -> None:
    ours = parameters([(5, 3), (CHUNK + 5,)], torch.bfloat16, device)
    masters = [p.detach().float().requires_grad_() for p in ours]
    optimizer = make("AdamW", ours, master_weights=True, max_grad_norm=1.0, lr=1e-4)
    reference = make("AdamW", masters, max_grad_norm=1.0, lr=1e-4)
    for step in range(3):
        set_gradients(ours, step)
        for p, q in zip(ours, masters, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, masters, strict=True):
        state = optimizer.state[p]
        # torch's path takes the norm of 16-bit gradients in 16 bits
        rtol, atol = (0.0, 0.0) if path == "triton" else (1e-3, 1e-5)
        torch.testing.assert_close(state["fastlm/master"], q.detach(), rtol=rtol, atol=atol)
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        # a 16-bit store of the interpreter rounds down
        torch.testing.assert_close(p.detach().float(), state["fastlm/master"], rtol=2**-7, atol=0.0)
        if not _runtime.INTERPRETED:
            assert torch.equal(p, state["fastlm/master"].bfloat16())


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("name", RULES)
def test_wide_updates_save_load_and_go_on_bit_for_bit(name: str, option: str, path: str, device: str) -> None:
    options = {option: True, **FULL[name]}
    params = parameters([(5, 3), (4,)], torch.bfloat16, device)
    optimizer = make(name, params, **options)
    assert_resumes(optimizer, params, lambda saved: make(name, saved, **options))
    assert all(value.dtype == torch.float32 for p in params for value in optimizer.state[p].values())


def test_small_updates_of_bf16_count_on_average(path: str, device: str) -> None:
    """1 - 2^-12 lies between two bf16 numbers 2^-8 apart: a sixteenth of the elements goes down, the mean is right."""
    p = torch.ones(CHUNK + 77, dtype=torch.bfloat16, device=device).requires_grad_()
    optimizer = fk.optim.SGD([p], lr=2.0**-12, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(p.detach().float().unique().tolist()) == {1.0, 1 - 2.0**-8}
    share = float((p.detach() != 1).double().mean())
    assert abs(share - 1 / 16) < 5 * math.sqrt(1 / 16 * 15 / 16 / p.numel())
    first = p.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
        optimizer.step()
        assert not torch.equal(p, first)  # every step draws anew
    same = torch.ones_like(p).requires_grad_()
    same.grad = torch.ones_like(p)
    fk.optim.SGD([same], lr=2.0**-12, stochastic_rounding=True).step()
    assert torch.equal(same, first)
    seeded = torch.ones_like(p).requires_grad_()
    seeded.grad = torch.ones_like(p)
    other = fk.optim.SGD([{"params": [seeded], "fastlm/seed": 1}], lr=2.0**-12, stochastic_rounding=True)
    other.step()
    assert not torch.equal(seeded, first)


@pytest.mark.needs_kernels
def test_the_kernel_rounds_as_the_reference(kernel_device: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(CHUNK + 9) * torch.logspace(-30, 30, CHUNK + 9)
    values[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    values = values.to(kernel_device)
    for index, step in ((0, 1), (1, 2)):
        params = [torch.zeros_like(values, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
        optimizer = fk.optim.SGD(params, lr=1.0, stochastic_rounding=True, maximize=True, momentum=0.0)
        for _ in range(step):
            for p in params:
                p.data.zero_()
                p.grad = values.bfloat16()  # what SGD adds, exactly
            optimizer.step()
        p = params[index]
        torch.testing.assert_close(p.detach(), values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    # Masters in fp32 hold values between two bf16 numbers: Adagrad's first step of size lr is one.
    params = [torch.zeros(CHUNK + 9, dtype=torch.bfloat16, device=kernel_device).requires_grad_() for _ in range(2)]
    optimizer = fk.optim.Adagrad(params, lr=0.3, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    exact = torch.full((CHUNK + 9,), -0.3, device=kernel_device)
    for index, p in enumerate(params):
        assert torch.equal(p.detach(), round_stochastically(exact, 0, index, torch.tensor(1.0)))
    assert not torch.equal(params[0], params[1])


def test_rounding_is_unbiased_and_keeps_what_is_exact() -> None:
    x = torch.tensor([1.0, -2.5, 0.0, 3e38, 1 + 2.0**-9, -1 - 2.0**-10, 1e-30, float("inf"), float("nan")])
    many = x.repeat_interleave(4096).contiguous()
    rounded = round_stochastically(many, 3, 5, torch.tensor(7.0)).double().view(-1, 4096)
    torch.testing.assert_close(rounded[:4, 0].float()[:3], x[:3], rtol=0, atol=0)
    assert (rounded[:3] == rounded[:3, :1]).all()
    spacing = torch.tensor([2.0**-7, 2.0**-7, 2.0**-107])
    error = (rounded[4:7].mean(1) - x[4:7].double()).abs() / spacing
    assert (error < 5 * 0.5 / math.sqrt(4096)).all()
    assert rounded[7].isinf().all()
    assert rounded[8].isnan().all()


def test_stochastic_rounding_beside_masters_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stochastic_rounding: got True beside master_weights=True; leave one out"):
        make("SGD", parameters([(2,)]), master_weights=True, stochastic_rounding=True)


@pytest.mark.parametrize("name", [*RULES, "MuonWithAdamW"])
def test_rounding_knows_bfloat16_alone(name: str) -> None:
    half = parameters([(2, 3)], torch.float16)
    with pytest.raises(ValueError, match=r"got a torch.float16 parameter of shape \(2, 3\); give bfloat16 parameters"):
        make(name, half, stochastic_rounding=True)
    optimizer = make(name, parameters([(2, 3)]), stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"got a torch\.float16 parameter"):
        optimizer.add_param_group({"params": half})
