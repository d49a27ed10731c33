"""fastlm_kernels.optim: torch.optim bit for bit, our keywords, and Muon with AdamW against float64 mathematics."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from optimizers import run, set_gradients
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels.optim._newton_schulz import NS_COEFFICIENTS, newton_schulz

NAMES = ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "RMSprop", "Muon")


def _optim_inputs() -> dict[str, dict[str, Any]]:
    """'Name-description' -> constructor keywords, out of PyTorch's own table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_optimizers import optim_db
    inputs = {}
    for info in optim_db:
        optim_class: Any = info.optim_cls
        if optim_class.__name__ in NAMES:
            for entry in info.optim_inputs_func("cpu"):
                inputs[f"{optim_class.__name__}-{entry.desc}"] = dict(entry.kwargs)
    return inputs


INPUTS = _optim_inputs()


def _parameters(matrices_only: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 4), (4, 6), (5, 5)] if matrices_only else [(6, 4), (7,), (), (3, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _assert_same(ours: Any, theirs: Any) -> None:
    """Bitwise equality of nested state: tensors, containers, numbers."""
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            _assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _assert_same(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize("case", INPUTS)
def test_twenty_steps_equal_torchs_and_state_moves_both_ways(case: str) -> None:
    name = case.partition("-")[0]
    ours_class, torch_class = getattr(fk.optim, name), getattr(torch.optim, name)
    ours_params, torch_params = _parameters(name == "Muon"), _parameters(name == "Muon")
    ours = ours_class(ours_params, **copy.deepcopy(INPUTS[case]))
    theirs = torch_class(torch_params, **copy.deepcopy(INPUTS[case]))
    assert isinstance(ours, torch_class)
    run(ours, ours_params, range(10))
    run(theirs, torch_params, range(10))
    _assert_same(ours.state_dict(), theirs.state_dict())
    # Each goes on from the other's state, under a fresh optimizer.
    ours_again, theirs_again = ours_class(ours_params), torch_class(torch_params)
    ours_again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    theirs_again.load_state_dict(copy.deepcopy(ours.state_dict()))
    run(ours_again, ours_params, range(10, 20))
    run(theirs_again, torch_params, range(10, 20))
    for p, q in zip(ours_params, torch_params, strict=True):
        assert torch.equal(p, q)
    _assert_same(ours_again.state_dict(), theirs_again.state_dict())


def test_every_optimizer_was_tried() -> None:
    assert {case.partition("-")[0] for case in INPUTS} == set(NAMES)


def _make(name: str, params: list[Tensor], **options: Any) -> Any:
    return getattr(fk.optim, name)(params, lr=0.1, **options)


ALL = (*NAMES, "MuonWithAdamW")


@pytest.mark.parametrize("name", ALL)
def test_clipping_equals_clip_grad_norm_then_step(name: str) -> None:
    params, reference = _parameters(name == "Muon"), _parameters(name == "Muon")
    ours, theirs = _make(name, params, max_grad_norm=0.7), _make(name, reference)
    for step in range(5):
        set_gradients(params, step)
        set_gradients(reference, step)
        if step == 3:  # a norm below the limit stays as it is
            for p in (*params, *reference):
                assert p.grad is not None
                p.grad.mul_(1e-3)
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(reference, 0.7)
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm)
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_one_bad_gradient_leaves_everything_untouched(name: str, clip: float | None, bad: float) -> None:
    params, reference = _parameters(name == "Muon"), _parameters(name == "Muon")
    options = {"weight_decay": 0.1, "skip_nonfinite": True, "max_grad_norm": clip}
    ours, theirs = _make(name, params, **options), _make(name, reference, **options)
    run(ours, params, range(3))
    run(theirs, reference, range(3))
    set_gradients(params, 99)
    gradient = params[1].grad
    assert gradient is not None
    gradient.view(-1)[0] = bad
    ours.step()
    assert params[1].grad is gradient
    assert int(ours.skipped_steps) == 1
    assert not ours.grad_norm.isfinite()
    for p, q in zip(params, reference, strict=True):
        assert torch.equal(p, q)
    _assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])
    run(ours, params, range(3, 6))
    run(theirs, reference, range(3, 6))
    assert int(ours.skipped_steps) == 1
    assert params[1].grad is not gradient
    for p, q in zip(params, reference, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ALL)
def test_zero_grads_keeps_the_tensors(name: str) -> None:
    params = _parameters(name == "Muon")
    optimizer = _make(name, params, zero_grads=True)
    set_gradients(params, 0)
    gradients = [p.grad for p in params]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, gradient, old in zip(params, gradients, before, strict=True):
        assert p.grad is gradient
        assert gradient is not None
        assert not gradient.any()
        assert not torch.equal(p, old)


@pytest.mark.parametrize("name", ALL)
def test_a_closure_runs_once_with_gradients_on_and_before_the_clipping(name: str) -> None:
    params = _parameters(name == "Muon")
    optimizer = _make(name, params, max_grad_norm=0.5)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward()
        calls.append(loss.detach())
        return loss

    assert torch.equal(optimizer.step(closure).detach(), calls[0])
    assert len(calls) == 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    torch.testing.assert_close(norm, torch.tensor(0.5))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copied_optimizer_still_clips(way: Any) -> None:
    optimizer = way(fk.optim.SGD([torch.zeros(4, requires_grad=True)], lr=1.0, max_grad_norm=0.5))
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.full((4,), 100.0)
    optimizer.step()
    torch.testing.assert_close(p.norm(), torch.tensor(0.5))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0"),
        ({"max_grad_norm": "1"}, "max_grad_norm: got '1'"),
        ({"max_grad_norm": True}, "max_grad_norm: got True"),
        ({"master_weights": True, "stochastic_rounding": True}, "stochastic_rounding: got True"),
        ({"state_bits": "8"}, "state_bits: got '8'"),
        ({"state_bits": 16}, "state_bits: got 16"),
    ],
    ids=str,
)
def test_bad_options_are_value_errors_with_the_value(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"give|leave") as error:
        _make(name, _parameters(name == "Muon"), **options)
    assert words in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_torchs_bad_arguments_raise_torchs_class(name: str) -> None:
    for make in (
        lambda cls: cls([]),
        lambda cls: cls(None),
        lambda cls: cls(_parameters(True), lr=-1.0),
        lambda cls: cls(_parameters(True), weight_decay=-1.0),
        lambda cls: cls(_parameters(True), learning_rate=1.0),
        lambda cls: cls(torch.zeros(3, requires_grad=True)),
        lambda cls: cls([1.0]),
    ):
        with pytest.raises(Exception) as expected:
            make(getattr(torch.optim, name))
        with pytest.raises(Exception) as got:
            make(getattr(fk.optim, name))
        assert type(got.value) is type(expected.value)


def _newton_schulz_float64(update: Tensor, steps: int = 5) -> Tensor:
    """The iteration on one matrix's singular values: the same polynomial, applied in float64 to an SVD."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    a, b, c = NS_COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 5), (4, 5, 16), (1, 1, 7), (7, 3)], ids=str)
def test_newton_schulz_equals_the_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    batch = matrices if len(shape) == 3 else matrices[None]
    expected = torch.stack([_newton_schulz_float64(matrix) for matrix in batch]).view(shape)
    torch.testing.assert_close(newton_schulz(matrices).double(), expected, rtol=1e-4, atol=1e-5)
    assert not newton_schulz(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)], ids=str)
def test_first_step_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    p = torch.zeros(shape, requires_grad=True)
    optimizer = fk.optim.MuonWithAdamW([{"params": [p], "use_muon": True}], lr=1.0)
    p.grad = torch.randn(shape) * 1e-3
    optimizer.step()
    singular = torch.linalg.svdvals(p.detach()) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert singular.max() < 1.21
    assert singular.median() > 0.68
    if shape[0] != shape[1]:  # a Gaussian square matrix has singular values near 0, which five steps do not raise
        assert singular.min() > 0.6
    assert (p.detach() * p.grad).sum() < 0


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_its_equations_over_steps(nesterov: bool) -> None:
    params = _parameters(True)
    optimizer = fk.optim.MuonWithAdamW(
        [{"params": params, "use_muon": True, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}], nesterov=nesterov
    )
    expected = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(4):
        set_gradients(params, step)
        for i, p in enumerate(params):
            assert p.grad is not None
            gradient = p.grad.double()
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            update = 0.1 * gradient + 0.9 * buffers[i] if nesterov else buffers[i]
            scale = 0.05 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            expected[i] = expected[i] * (1 - 0.05 * 0.2) - scale * _newton_schulz_float64(update)
        optimizer.step()
    for p, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-4, atol=1e-5)


def test_equals_torchs_muon_within_its_bfloat16() -> None:
    params, reference = _parameters(True), _parameters(True)
    ours = fk.optim.MuonWithAdamW([{"params": params, "use_muon": True}], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(reference, lr=0.02, weight_decay=0.1)
    run(ours, params, range(5))
    run(theirs, reference, range(5))
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=5 * 0.02 * 0.03)
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def test_its_adamw_is_torchs_fused_one_bit_for_bit() -> None:
    params, reference = _parameters(), _parameters()
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = fk.optim.MuonWithAdamW([{"params": params, "use_muon": False, **options}])
    theirs = torch.optim.AdamW(reference, fused=True, **options)
    run(ours, params, range(20))
    run(theirs, reference, range(20))
    for p, q in zip(params, reference, strict=True):
        assert torch.equal(p, q)
    _assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("split", [3, [4, 4, 4], [8, 2, 2]], ids=str)
def test_split_blocks_are_matrices_of_their_own(split: Any) -> None:
    torch.manual_seed(2)
    merged = torch.randn(12, 5, requires_grad=True)
    sizes = [4, 4, 4] if split == 3 else split
    apart = [block.clone().requires_grad_() for block in merged.detach().split(sizes)]
    ours = fk.optim.MuonWithAdamW([{"params": [merged], "use_muon": True}], lr=0.1, split={merged: split})
    theirs = fk.optim.MuonWithAdamW([{"params": apart, "use_muon": True}], lr=0.1)
    whole = merged.detach().clone().requires_grad_()
    unsplit = fk.optim.MuonWithAdamW([{"params": [whole], "use_muon": True}], lr=0.1)
    for step in range(3):
        set_gradients([merged], step)
        assert merged.grad is not None
        for block, gradient in zip(apart, merged.grad.split(sizes), strict=True):
            block.grad = gradient.clone()
        whole.grad = merged.grad.clone()
        for optimizer in (ours, theirs, unsplit):
            optimizer.step()
    torch.testing.assert_close(merged.detach(), torch.cat([block.detach() for block in apart]))
    assert not torch.allclose(merged, whole, atol=1e-2)


def test_batching_shapes_does_not_mix_matrices() -> None:
    torch.manual_seed(4)
    params = [torch.randn(6, 4, requires_grad=True) for _ in range(5)]
    alone = [p.detach().clone().requires_grad_() for p in params]
    together = fk.optim.MuonWithAdamW([{"params": params, "use_muon": True}])
    apart = [fk.optim.MuonWithAdamW([{"params": [p], "use_muon": True}]) for p in alone]
    run(together, params, range(3))
    for step in range(3):
        set_gradients(alone, step)
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q)


def _model_groups(dtype: torch.dtype = torch.float32) -> tuple[list[dict[str, Any]], list[Tensor], dict[Tensor, Any]]:
    torch.manual_seed(5)
    matrices = [torch.randn(12, 4), torch.randn(4, 4), torch.randn(4, 16)]
    others = [torch.randn(9, 4), torch.randn(4)]
    params = [p.to(dtype).requires_grad_() for p in (*matrices, *others)]
    groups = [
        {"params": params[:3], "use_muon": True, "lr": 0.03, "momentum": 0.95, "weight_decay": 0.01},
        {"params": params[3:], "use_muon": False, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    ]
    return groups, params, {params[0]: [4, 4, 4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    groups, params, split = _model_groups(dtype)
    optimizer = fk.optim.MuonWithAdamW(groups, split=split, max_grad_norm=1.0)
    run(optimizer, params, range(5))
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float32
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    groups_again, params_again, split_again = _model_groups(dtype)
    again = fk.optim.MuonWithAdamW(groups_again, split=split_again, max_grad_norm=1.0)
    with torch.no_grad():
        for p, value in zip(params_again, saved["params"], strict=True):
            p.copy_(value)
    again.load_state_dict(saved["optimizer"])
    assert again.state[params_again[0]]["momentum_buffer"].dtype == torch.float32
    run(again, params_again, range(5, 10))
    for p, q in zip(params, params_again, strict=True):
        assert torch.equal(p, q)
    _assert_same(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copied_muon_with_adamw_goes_on_alone(way: Any) -> None:
    groups, params, split = _model_groups()
    optimizer = fk.optim.MuonWithAdamW(groups, split=split, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    copied = way(optimizer)
    copied_params = [p for group in copied.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    run(copied, copied_params, range(2, 4))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    run(optimizer, params, range(2, 4))
    for p, q in zip(params, copied_params, strict=True):
        assert torch.equal(p, q)


def test_a_loaded_state_is_a_copy() -> None:
    groups, params, split = _model_groups()
    optimizer = fk.optim.MuonWithAdamW(groups, split=split)
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    groups_again, params_again, split_again = _model_groups()
    again = fk.optim.MuonWithAdamW(groups_again, split=split_again)
    again.load_state_dict(saved)
    run(again, params_again, range(2))
    _assert_same(saved, before)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_each_groups_rate_can_be_scheduled(tensor_lr: bool) -> None:
    groups, params, split = _model_groups()
    for group in groups:
        group["lr"] = torch.tensor(group["lr"]) if tensor_lr else group["lr"]
    optimizer = fk.optim.MuonWithAdamW(groups, split=split)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.03, 0.01])
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.0
    run(optimizer, params, range(1))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] + 0.5
    run(optimizer, params, range(1, 2))
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_plain_parameter_list_is_cut_by_dimension() -> None:
    params = _parameters()
    optimizer = fk.optim.MuonWithAdamW(params, lr=0.5, adamw_lr=0.25)
    described = [(g["use_muon"], g["lr"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]
    assert described == [(True, 0.5, [(6, 4)]), (False, 0.25, [(7,), (), (3, 2, 2)])]
    params[0].grad = torch.randn(6, 4)  # the others have no gradient and stay
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [False, True, True, True]


def test_gradients_of_another_memory_order_are_read_right() -> None:
    params, reference = [torch.ones(4, 3, requires_grad=True)], [torch.ones(4, 3, requires_grad=True)]
    ours = fk.optim.MuonWithAdamW([{"params": params, "use_muon": False}])
    theirs = fk.optim.MuonWithAdamW([{"params": reference, "use_muon": False}])
    for step in range(2):
        set_gradients(reference, step)
        assert reference[0].grad is not None
        params[0].grad = torch.empty(3, 4).t().copy_(reference[0].grad)
        assert params[0].grad.stride() == (1, 4)
        ours.step()
        theirs.step()
    assert torch.equal(params[0], reference[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda p, v: fk.optim.MuonWithAdamW([{"params": [v], "use_muon": True}]),
            "use_muon: got a parameter of shape (7,)",
        ),
        (lambda p, v: fk.optim.MuonWithAdamW([p], split={p: [3, 2]}), "split: got [3, 2]"),
        (lambda p, v: fk.optim.MuonWithAdamW([p], split={p: 4}), "split: got 4"),
        (lambda p, v: fk.optim.MuonWithAdamW([p], split={p: 0}), "split: got 0"),
        (lambda p, v: fk.optim.MuonWithAdamW([p, v], split={v: 7}), "split: got 7"),
        (
            lambda p, v: fk.optim.MuonWithAdamW([{"params": [p], "use_muon": False}], split={p: 2}),
            "no Muon group holds",
        ),
        (lambda p, v: fk.optim.MuonWithAdamW([p], lr=-1.0), "lr: got -1.0"),
        (lambda p, v: fk.optim.MuonWithAdamW([p], momentum=1.0), "momentum: got 1.0"),
        (lambda p, v: fk.optim.MuonWithAdamW([p], betas=(1.0, 0.9)), "betas: got (1.0, 0.9)"),
        (lambda p, v: fk.optim.MuonWithAdamW([p], ns_steps=0), "ns_steps: got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_groups_are_value_errors_with_the_value(make: Any, words: str) -> None:
    p, v = torch.zeros(6, 4, requires_grad=True), torch.zeros(7, requires_grad=True)
    with pytest.raises(ValueError) as error:
        make(p, v)
    assert words in str(error.value)


def test_muon_with_adamw_never_imports_the_compiler() -> None:
    """torch imports its compiler, most of a second, on the first use of some optimizer methods: not on ours."""
    script = """
import sys, torch, fastlm_kernels as fk
p, b = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
o = fk.optim.MuonWithAdamW([p, b], max_grad_norm=1.0, skip_nonfinite=True)
for _ in range(2):
    o.zero_grad(); (p.sum() + b.sum()).backward(); o.step()
o.load_state_dict(o.state_dict())
sys.exit('torch._dynamo' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
