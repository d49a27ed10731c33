"""An optimizer's launches: how many, in a captured graph, under the compiler, over a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import RULES, assert_equal, make, parameters, run, set_gradients
from torch import Tensor

from fastlm_kernels import _runtime
from fastlm_kernels.optim import _options, _plan


@pytest.mark.needs_kernels
def test_a_captured_step_needs_every_gradient_and_its_state(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters([(3,), (2,)], device=kernel_device)
    optimizer = make("AdamW", params)
    set_gradients(params, 0)
    monkeypatch.setattr(_options, "capturing_graph", lambda device: True)
    monkeypatch.setattr(_plan, "capturing_graph", lambda device: True)
    with pytest.raises(RuntimeError, match="made in its first step: run one before capturing"):
        optimizer.step()
    params[1].grad = None
    with pytest.raises(RuntimeError, match=r"a parameter has no gradient; fill every p\.grad"):
        optimizer.step()


@pytest.mark.needs_kernels
def test_what_a_captured_step_reads_is_written_by_nobody_else(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph repeats its launches and its copies: addresses and scalars must be there, as they were."""
    params = parameters([(3,), (2,)], device=kernel_device)
    optimizer = make("AdamW", params)
    run(optimizer, params, range(1))
    upload = optimizer._plan[0].bundles[0].upload
    with monkeypatch.context() as capture:
        capture.setattr(_options, "capturing_graph", lambda device: True)
        capture.setattr(_plan, "capturing_graph", lambda device: True)
        capture.setattr(upload, "_make_spare", lambda count: (upload._empty(count), torch.empty(count).long()))
        run(optimizer, params, range(1, 3))
    captured = [(device, device.clone()) for device, _ in upload._captured]
    assert len({device.data_ptr() for device, _ in captured}) == 2
    for device, pinned in upload._captured:
        assert torch.equal(device.cpu(), pinned)
    optimizer.param_groups[0]["lr"] = 1.0
    run(optimizer, params, range(3, 5))
    for device, before in captured:
        assert torch.equal(device, before)
        assert device.data_ptr() != upload.tensor.data_ptr()
    optimizer.add_param_group({"params": parameters([(4,)], device=kernel_device)})
    run(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(5, 6))
    assert optimizer._captured[0][0].bundles[0].upload is upload


def test_dynamo_does_not_look_inside(path: str, device: str) -> None:
    params, reference = (parameters([(5, 3)], device=device) for _ in range(2))
    optimizer, plain = make("AdamW", params), make("AdamW", reference)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    torch._dynamo.utils.counters.clear()
    for i in range(4):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.01 * (i + 1)
        set_gradients(params, i)
        step()
        run(plain, reference, range(i, i + 1))
    assert_equal(params, reference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def recorded(
    name: str, params: list[Tensor], steps: int = 1, tensor_rates: bool = False, **options: Any
) -> list[list[_runtime.Launch]]:
    """The launches of each step on tensors without data: reading one on the host would raise.

    Each step has a rate of its own; tensor_rates: in a tensor of its own, and the decay in another.
    """
    optimizer = make(name, params, **options)
    found = []
    for step in range(steps):
        for p in params:
            p.grad = torch.empty_like(p)
        group = optimizer.param_groups[0]
        group["lr"] = 0.1 / (step + 1)
        if tensor_rates:
            group |= {"lr": torch.empty((), device="meta"), "weight_decay": torch.empty((), device="meta")}
        with _runtime.recording("sm_90") as launches:
            optimizer.step()
        found.append(list(launches))
    return found


@pytest.mark.needs_triton
@pytest.mark.parametrize("name", RULES)
def test_one_launch_a_dtype_whatever_the_number_of_tensors_and_groups(name: str) -> None:
    many = [torch.empty(3, 5, device="meta", requires_grad=True) for _ in range(50)]
    half = [torch.empty(7, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(50)]
    names = [[launch.kernel.__name__ for launch in step] for step in recorded(name, many + half, 2)]
    assert names == [["update_kernel"] * 2] * 2
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True}
    (names,) = [[launch.kernel.__name__ for launch in step] for step in recorded(name, many, **options)]
    assert names == ["norm_partial_kernel", "control_kernel", "update_kernel"]


@pytest.mark.needs_triton
@pytest.mark.parametrize("tensor_rates", [False, True])
def test_no_step_of_a_schedule_compiles_anew(tensor_rates: bool) -> None:
    """What decides the binary is the same in every step: constants, and each argument's type."""
    params = [torch.empty(40, device="meta", requires_grad=True) for _ in range(3)]
    kinds = {
        tuple(
            (launch.kernel.__name__, tuple(launch.constexprs.items()), tuple(type(a) for a in launch.arguments))
            for launch in step
        )
        for step in recorded("AdamW", params, 1000, tensor_rates, max_grad_norm=1.0)
    }
    assert len(kinds) == 1
