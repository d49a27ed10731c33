"""The optimizers' kernels against torch.optim, and what our keywords promise on both paths."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from layouts import moat
from test_kernel_optim import INPUTS
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, check, configs
from fastlm_kernels.optim import _options, _plan
from fastlm_kernels.optim._rounding import round_stochastically
from fastlm_kernels.optim._symmetric import symmetric_product
from fastlm_kernels.optim._update import FIELDS

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


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.needs_kernels)])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both paths, the kernels' where they can run."""
    with fk.backend(request.param):
        yield request.param


@pytest.fixture
def device(path: str) -> str:
    """The device that the path runs on."""
    return "cuda" if path == "triton" and not _runtime.INTERPRETED else "cpu"


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


def make(name: str, params: Any, **options: Any) -> Any:
    return getattr(fk.optim, name)(params, **{"lr": 0.05, **options})


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
    run(optimizer, params, range(2))
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
    run(optimizer, params, range(2, 4))
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    again = [v.to(device).requires_grad_() for v in values]
    resumed = make(name, again, **options)
    resumed.load_state_dict(state)
    run(resumed, again, range(2, 4))
    assert_equal(again, params)
    for p, q in zip(again, params, strict=True):
        assert resumed.state[p].keys() == optimizer.state[q].keys()
        for key, value in optimizer.state[q].items():
            assert torch.equal(resumed.state[p][key], value)
            assert value.dtype == torch.float32


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


def recorded(name: str, params: list[Tensor], steps: int = 1, **options: Any) -> list[list[_runtime.Launch]]:
    """The launches of each step on tensors without data: reading one on the host would raise."""
    optimizer = make(name, params, **options)
    found = []
    for step in range(steps):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
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
def test_no_step_of_a_schedule_compiles_anew() -> None:
    """What decides the binary is the same in every step: constants, and each argument's type."""
    params = [torch.empty(40, device="meta", requires_grad=True) for _ in range(3)]
    kinds = {
        tuple(
            (launch.kernel.__name__, tuple(launch.constexprs.items()), tuple(type(a) for a in launch.arguments))
            for launch in step
        )
        for step in recorded("AdamW", params, 1000, max_grad_norm=1.0)
    }
    assert len(kinds) == 1
