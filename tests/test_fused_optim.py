"""The optimizers' kernels against torch.optim, and what our keywords promise on both paths."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from optimizers import CHUNK, FULL, RULES, assert_equal, make, parameters, run, set_gradients
from test_kernel_optim import INPUTS
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, check
from fastlm_kernels.optim._update import FIELDS


def build(module: Any, name: str, options: dict[str, Any], params: list[Tensor]) -> Any:
    return getattr(module, name)(params, **copy.deepcopy(options))


def trajectory(make_optimizer: Any, steps: int, keep: int, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Parameters and states after every `keep`th step; the gradient of step t is `g` scaled by a number of t."""
    names = sorted({name.partition("_")[0] for name in tensors})
    params = [tensors[f"{name}_p"].detach().clone().requires_grad_() for name in names]
    optimizer = make_optimizer(params)
    found = []
    for step in range(steps):
        for name, p in zip(names, params, strict=True):
            p.grad = tensors[f"{name}_g"] * math.cos(step + 0.3) + tensors[f"{name}_h"] * math.sin(step)
        optimizer.step()
        if (step + 1) % keep == 0:
            for p in params:
                states = [v for k, v in sorted(optimizer.state[p].items()) if v is not None and "step" not in k]
                found += [t.detach().clone() for t in (p, *states)]
    return tuple(found)


def trajectory_inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{i}_{kind}": torch.randn(shape, generator=generator).to(device, dtype)
        for i, shape in enumerate(shapes)
        for kind in "pgh"
    }


@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", [case for case in INPUTS if not case.startswith("Muon")])
def test_twenty_steps_are_as_accurate_as_torchs(case: str, kernel_device: str) -> None:
    name = case.partition("-")[0]
    keywords = INPUTS[case]
    fused, reference = (
        partial(trajectory, partial(build, module, name, keywords), 20, 5) for module in (fk.optim, torch.optim)
    )
    arguments = trajectory_inputs([(6, 4), (5,)], torch.float32, kernel_device)
    assert _runtime.explain(make(name, parameters([(2,)], device=kernel_device)).step).path == "triton"
    errors = check.compare(fused, reference, arguments, ())
    assert errors
    assert [error for error in errors if not error.ok] == []


@pytest.mark.needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_sixteen_bits_are_as_accurate_as_torchs(name: str, dtype: torch.dtype, kernel_device: str) -> None:
    fused, reference = (
        partial(trajectory, partial(build, module, name, {"lr": 0.05, **FULL[name]}), 3, 1)
        for module in (fk.optim, torch.optim)
    )
    errors = check.compare(fused, reference, trajectory_inputs([(6, 5)], dtype, kernel_device), ())
    assert errors
    assert [error for error in errors if not error.ok] == []


def in_a_moat(value: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A view of `value`'s data that starts `offset` elements into a buffer of NaN, and the buffer."""
    buffer = torch.full((value.numel() + 64,), float("nan"), dtype=value.dtype, device=value.device)
    view = buffer[offset : offset + value.numel()].view(value.shape)
    view.copy_(value)
    return view, buffer


@pytest.mark.needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_and_alignment_and_nothing_beside_it(dtype: torch.dtype, kernel_device: str) -> None:
    """Tails, whole tiles, several chunks, empty tensors, tensors off 16-byte boundaries; NaN around each stays."""
    sizes = [(0, 0), (1, 0), (1023, 0), (1024, 0), (CHUNK, 0), (CHUNK + 1, 0), (2 * CHUNK + 1025, 0), (2049, 1), (7, 3)]
    ours, theirs, buffers = [], [], []
    for i, (size, offset) in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        p = torch.randn(size, generator=generator).to(kernel_device, dtype)
        g = torch.randn(size, generator=generator).to(kernel_device, dtype)
        (view, p_buffer), (grad, g_buffer) = in_a_moat(p, 16 + offset), in_a_moat(g, 16 + offset)
        view.requires_grad_()
        q = p.float().requires_grad_()
        view.grad, q.grad = grad, g.float()
        ours.append(view)
        theirs.append(q)
        buffers += [(p_buffer, view), (g_buffer, grad)]
    make("AdamW", ours, weight_decay=0.1, zero_grads=True).step()
    torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1).step()
    rtol, atol = (1e-6, 1e-7) if dtype == torch.float32 else (2**-7, 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=rtol, atol=atol)
        assert p.grad is not None
        assert not p.grad.any()
    for buffer, view in buffers:
        inside = buffer.isfinite()
        assert int(inside.sum()) == view.numel()


@pytest.mark.needs_kernels
def test_elements_past_two_to_the_31(kernel_device: str) -> None:
    """The last chunk of a tensor of 2^31 + 5 elements, of which only that chunk is there."""
    ours, theirs = (parameters([(5,)], device=kernel_device) for _ in range(2))
    optimizer, reference = make("AdamW", ours, max_grad_norm=1e9), make("AdamW", theirs)
    run(optimizer, ours, range(1))
    run(reference, theirs, range(2))
    set_gradients(ours, 1)
    (plan, control), before = optimizer._plan, 2**31
    bundle, gradient = plan.bundles[0], ours[0].grad
    assert gradient is not None
    bundle.table[:, :3] -= 4 * before  # parameter and two states begin so much earlier
    bundle.table[:, FIELDS.index("size")] += before
    bundle.table[:, FIELDS.index("first_chunk")] -= before // CHUNK
    sent = bundle.send([gradient.data_ptr() - 4 * before], optimizer.param_groups)
    values, norm = control.run([sent], (None, None), optimizer.skipped_steps)
    bundle.launch_update(sent, values)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(norm, gradient.norm())


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", RULES)
def test_state_moves_to_torch_and_back_in_mid_run(name: str, kernel_device: str) -> None:
    shapes = [(5, 3), (4,)]
    ours, alone = (parameters(shapes, device=kernel_device) for _ in range(2))
    theirs_class = getattr(torch.optim, name)
    reference = theirs_class(alone, lr=0.05, **FULL[name])
    optimizer: Any = theirs_class(ours, lr=0.05, **FULL[name])
    for start, make_next in ((0, None), (3, fk.optim), (6, torch.optim), (9, fk.optim)):
        if make_next is not None:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = getattr(make_next, name)(ours)
            optimizer.load_state_dict(saved)
        run(optimizer, ours, range(start, start + 3))
        run(reference, alone, range(start, start + 3))
    assert optimizer.state.keys() == set(ours)
    for p, q in zip(ours, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
        state, expected = optimizer.state[p], reference.state[q]
        assert {key for key in state if not key.startswith("fastlm/")} == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype
            torch.testing.assert_close(state[key].cpu(), value.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_clipping_equals_clip_grad_norm_then_step(name: str, path: str, device: str) -> None:
    shapes = [(5, 3), (), (CHUNK + 3,)]
    ours, theirs = (parameters(shapes, device=device) for _ in range(2))
    optimizer = make(name, ours, max_grad_norm=0.7, **FULL[name])
    reference = getattr(torch.optim, name)(theirs, lr=0.05, **FULL[name])
    for step, scale in enumerate((1.0, 1e-4)):  # the second norm is below the limit
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        reference.step()
        assert optimizer.grad_norm.shape == ()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0.0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_without_states_none_are_kept(path: str, device: str) -> None:
    params = parameters([(3,)], device=device)
    optimizer = make("SGD", params)
    run(optimizer, params, range(2))
    assert optimizer.state_dict()["state"] == {}


def test_one_norm_over_all_dtypes_of_parameters(path: str, device: str) -> None:
    ours = parameters([(9,), (4, 2)], device=device) + parameters([(7,)], torch.bfloat16, device)
    optimizer = make("SGD", ours, max_grad_norm=0.5)
    set_gradients(ours, 0)
    squares = sum(float(p.grad.double().square().sum()) for p in ours if p.grad is not None)
    before = [p.detach().double() for p in ours]
    gradients = [p.grad.double() for p in ours if p.grad is not None]
    optimizer.step()
    torch.testing.assert_close(float(optimizer.grad_norm), squares**0.5, rtol=1e-2 if path == "torch" else 1e-6, atol=0)
    for p, old, gradient in zip(ours, before, gradients, strict=True):
        expected = old - 0.05 * gradient * 0.5 / squares**0.5
        # torch takes the norm of 16-bit gradients in 16 bits
        atol = 1e-5 if path == "torch" else 1e-7
        torch.testing.assert_close(p.detach().double(), expected, rtol=torch.finfo(p.dtype).eps, atol=atol)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", RULES)
def test_one_bad_gradient_leaves_every_bit(name: str, bad: float, path: str, device: str) -> None:
    params, reference = (parameters([(5, 3), (4,)], device=device) for _ in range(2))
    options = {"skip_nonfinite": True, "zero_grads": True, **FULL[name]}
    ours, theirs = make(name, params, **options), make(name, reference, **options)
    set_gradients(params, 7)
    assert params[1].grad is not None
    params[1].grad[2] = bad  # before any state exists, and again in mid-run
    ours.step()
    for start in (0, 2):
        run(ours, params, range(start, start + 2))
        run(theirs, reference, range(start, start + 2))
        set_gradients(params, 9)
        params[0].grad.view(-1)[0] = bad  # type: ignore[union-attr]
        ours.step()
        assert not ours.grad_norm.isfinite()
        assert not any(p.grad.any() for p in params if p.grad is not None)
    assert int(ours.skipped_steps) == 3
    assert int(theirs.skipped_steps) == 0
    assert_equal(params, reference)
    for p, q in zip(params, reference, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert_equal(list(ours.state[p].values()), list(theirs.state[q].values()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_training_loop_with_accumulation(set_to_none: bool, path: str, device: str) -> None:
    """Gradients at new addresses every step, or at the same ones, two backwards a step."""
    x = torch.linspace(-1, 1, 24, device=device).view(8, 3)
    models = [torch.nn.Linear(3, 2, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = make("AdamW", models[0].parameters()), torch.optim.AdamW(models[1].parameters(), lr=0.05)
    hold = []
    for _ in range(4):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in x.split(4):
                model(part).square().sum().backward()
            hold += [p.grad for p in model.parameters()] if set_to_none else []  # so that addresses differ
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_changes_between_steps_is_seen(path: str, device: str) -> None:
    """Rates, decay, groups added, gradients that come and go, data and states replaced by hand."""
    ours, theirs = (parameters([(5, 3), (4,), (2, 2)], device=device) for _ in range(2))
    pairs = [(make("AdamW", ours[:2]), ours), (torch.optim.AdamW(theirs[:2], lr=0.05), theirs)]

    def change(step: int, optimizer: Any, params: list[Tensor]) -> None:
        group = optimizer.param_groups[0]
        if step == 1:
            group["lr"], group["weight_decay"] = 0.2, 0.5
        elif step == 2:
            optimizer.add_param_group({"params": [params[2]], "lr": 0.01, "betas": (0.5, 0.6)})
        elif step == 3:
            params[0].grad = None
        elif step == 4:
            params[1].data = params[1].data.clone() + 1
        elif step == 5:
            optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.25)
        elif step == 6:
            group["eps"], group["maximize"] = 0.1, True
        elif step == 7:
            optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])

    for step in range(9):
        for optimizer, params in pairs:
            set_gradients(params, step)
            change(step, optimizer, params)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_rates_and_decay_may_be_tensors(path: str, device: str) -> None:
    ours, theirs = (parameters([(5, 3)], device=device) for _ in range(2))
    lr, decay = torch.tensor(0.05, device=device), torch.tensor(0.3, device=device)
    optimizer = fk.optim.AdamW(ours, lr=lr, weight_decay=decay)  # type: ignore[arg-type]
    reference = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.3)
    for step in range(3):
        lr.fill_(0.05 * (step + 1))
        decay.fill_(0.3 * step)
        reference.param_groups[0] |= {"lr": 0.05 * (step + 1), "weight_decay": 0.3 * step}
        run(optimizer, ours, range(step, step + 1))
        run(reference, theirs, range(step, step + 1))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0, dtype=torch.float64)
    before = ours[0].detach().clone()
    run(optimizer, ours, range(1))
    assert torch.equal(ours[0], before)


@pytest.mark.parametrize(
    "layout", ["transposed", "channels_last", "strided", "gradient transposed", "expanded gradient"]
)
def test_memory_orders(layout: str, path: str, device: str) -> None:
    shape = (2, 3, 2, 2) if layout == "channels_last" else (6, 4)
    value, *gradients = (t.detach() for t in parameters([shape] * 3, device=device))
    p = value.clone()
    if layout == "transposed":
        p = value.t().contiguous().t()
    elif layout == "channels_last":
        p = value.to(memory_format=torch.channels_last)
    elif layout == "strided":
        p = torch.zeros(6, 8, device=device)[:, ::2].copy_(value)
    p.requires_grad_()
    q = value.clone().requires_grad_()
    optimizer = make("SGD", [p], momentum=0.9, zero_grads=True)
    reference = torch.optim.SGD([q], lr=0.05, momentum=0.9)
    for gradient in gradients:
        if layout == "expanded gradient":
            p.grad, q.grad = gradient[:1].clone().expand(6, 4).clone().t().contiguous().t(), gradient[:1].repeat(6, 1)
        else:
            p.grad = gradient.t().contiguous().t() if "gradient" in layout else torch.empty_like(p).copy_(gradient)
            q.grad = gradient.clone()
        optimizer.step()
        reference.step()
        assert not p.grad.any()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradscaler_is_followed_without_it_reading_the_device(clip: float | None, path: str, device: str) -> None:
    ours, theirs = (parameters([(5, 3), (4,)], device=device) for _ in range(2))
    optimizer = make("SGD", ours, momentum=0.9, max_grad_norm=clip)
    reference = torch.optim.SGD(theirs, lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=1000)  # type: ignore[attr-defined]
    scaler.scale(torch.ones((), device=device))
    expected = 4.0
    for step in range(4):
        set_gradients(ours, step, expected)
        set_gradients(theirs, step)
        if step == 2:
            ours[0].grad.view(-1)[3] = float("inf")  # type: ignore[union-attr]
        else:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(theirs, clip)
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        expected = 2.0 if step >= 2 else 4.0
        assert scaler.get_scale() == expected
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_sparse_gradients_are_torchs_affair(name: str, path: str, device: str) -> None:
    ours, theirs = (parameters([(4, 3)], device=device)[0] for _ in range(2))
    optimizer, reference = make(name, [ours]), getattr(torch.optim, name)([theirs], lr=0.05)
    for p in (ours, theirs):
        p.grad = torch.eye(4, 3, device=device).to_sparse()
    supported = name in ("SGD", "Adagrad")
    with torch.sparse.check_sparse_tensor_invariants(False):
        if supported:
            optimizer.step()
            reference.step()
            torch.testing.assert_close(ours, theirs)
            return
        with pytest.raises(RuntimeError) as expected:
            reference.step()
        with pytest.raises(RuntimeError) as got:
            optimizer.step()
    assert str(got.value) == str(expected.value)


@pytest.mark.needs_kernels
def test_cases_without_a_kernel_are_torchs(kernel_device: str) -> None:
    for params, options, words in (
        (parameters([(3,)], torch.float64, kernel_device), {}, "float64"),
        (parameters([(3,)], torch.complex64, kernel_device), {}, "complex64"),
    ):
        reference = [p.detach().clone().requires_grad_() for p in params]
        ours, theirs = make("Adam", params, **options), torch.optim.Adam(reference, lr=0.05, **options)
        answer = _runtime.explain(ours.step)
        assert answer.path == "torch"
        assert words in answer.reason
        for optimizer, members in ((ours, params), (theirs, reference)):
            set_gradients(members, 0)
            with torch.no_grad():
                optimizer.step()
        assert_equal(params, reference)
    for options in ({"differentiable": True}, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}):
        optimizer = make("Adam", parameters([(3,)], device=kernel_device), **options)
        assert _runtime.explain(optimizer.step).path == "torch"


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_learning_rate_schedulers_and_hooks_work(name: str, path: str, device: str) -> None:
    ours, theirs = (parameters([(5, 3)], device=device) for _ in range(2))
    pairs = [(make(name, ours), ours), (getattr(torch.optim, name)(theirs, lr=0.05), theirs)]
    calls: list[str] = []
    for optimizer, params in pairs:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        for step in range(3):
            run(optimizer, params, range(step, step + 1))
            scheduler.step()
    assert calls == ["before", "after"] * 6
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
