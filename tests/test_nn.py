"""fastlm_kernels.nn: torch.nn's constructors, state_dict, outputs and gradients; the head-and-loss module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk

pytestmark = pytest.mark.both_paths

ROWS = torch.Generator().manual_seed(0)
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], Callable[[], tuple[Tensor, ...]]]] = {
    "LayerNorm": ("LayerNorm", (12,), {}, lambda: (torch.randn(3, 5, 12),)),
    "LayerNorm 2-d": ("LayerNorm", ([5, 12],), {"eps": 1e-2, "bias": False}, lambda: (torch.randn(3, 5, 12),)),
    "LayerNorm plain": ("LayerNorm", (12,), {"elementwise_affine": False}, lambda: (torch.randn(3, 12),)),
    "RMSNorm": ("RMSNorm", (12,), {}, lambda: (torch.randn(3, 5, 12),)),
    "RMSNorm eps": ("RMSNorm", (12, 1e-2), {"elementwise_affine": False}, lambda: (torch.randn(3, 12),)),
    "GELU": ("GELU", (), {}, lambda: (torch.randn(3, 12),)),
    "GELU tanh": ("GELU", ("tanh",), {}, lambda: (torch.randn(3, 12),)),
    "SiLU": ("SiLU", (), {}, lambda: (torch.randn(3, 12),)),
    "Sigmoid": ("Sigmoid", (), {}, lambda: (torch.randn(3, 12),)),
    "Tanh": ("Tanh", (), {}, lambda: (torch.randn(3, 12),)),
    "Softmax": ("Softmax", (-1,), {}, lambda: (torch.randn(3, 5, 12),)),
    "Softmax dim 1": ("Softmax", (1,), {}, lambda: (torch.randn(3, 5, 12),)),
    "LogSoftmax": ("LogSoftmax", (), {"dim": -1}, lambda: (torch.randn(3, 12),)),
    "CrossEntropyLoss": ("CrossEntropyLoss", (), {}, lambda: (torch.randn(4, 6), torch.tensor([0, 5, -100, 2]))),
    "CrossEntropyLoss all options": (
        "CrossEntropyLoss",
        (torch.rand(6, generator=ROWS),),
        {"ignore_index": 5, "reduction": "sum", "label_smoothing": 0.2},
        lambda: (torch.randn(4, 6), torch.tensor([0, 5, 1, 2])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torchs_module(case: str) -> None:
    name, args, kwargs, make_inputs = CASES[case]
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(fk.nn, name)(*args, **kwargs)
    assert isinstance(ours, type(theirs))
    torch.manual_seed(7)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    inputs = make_inputs()
    results = []
    for module in (ours, theirs):
        x = inputs[0].clone().requires_grad_()
        out = module(x, *inputs[1:])
        upstream = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
        results.append((out, *torch.autograd.grad(out, [x, *module.parameters()], upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert repr(ours) == repr(theirs)


FUNCTIONS = {
    "LayerNorm": ("layer_norm", (4,)),
    "RMSNorm": ("rms_norm", (4,)),
    "GELU": ("gelu", ()),
    "SiLU": ("silu", ()),
    "Sigmoid": ("sigmoid", ()),
    "Tanh": ("tanh", ()),
    "Softmax": ("softmax", (-1,)),
    "LogSoftmax": ("log_softmax", (-1,)),
    "CrossEntropyLoss": ("cross_entropy", ()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_call_our_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = FUNCTIONS[name]
    called = []
    monkeypatch.setattr(fk.nn, function, lambda *args, **kwargs: called.append(name) or args[0])
    module = getattr(fk.nn, name)(*arguments)
    module(torch.randn(2, 4), *([torch.tensor([0, 1])] if name == "CrossEntropyLoss" else []))
    assert called == [name]


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_a_missing_dim_warns_as_torchs_module_does(name: str) -> None:
    for module in (getattr(torch.nn, name)(), getattr(fk.nn, name)()):
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            module(torch.randn(2, 4))


def test_half_precision_loss_is_fp32() -> None:
    loss = fk.nn.CrossEntropyLoss()(torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert loss.dtype == torch.float32


LINEAR_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"bias": True},
    "weight": {"weight": torch.rand(6, generator=ROWS), "reduction": "sum", "ignore_index": 2},
    "k-dimensional": {"out_features": (2, 3), "bias": True, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_cross_entropy_loss_holds_the_head(case: str) -> None:
    options = LINEAR_CASES[case]
    module = fk.nn.LinearCrossEntropyLoss(5, 6, **options)
    extra = options.get("out_features", ())
    assert module.linear.weight.shape == (6 * int(torch.tensor(extra).prod()) if extra else 6, 5)
    torch.manual_seed(0)
    x, target = torch.randn(4, 5), torch.randint(0, 6, (4, *extra))
    functional = {name: value for name, value in options.items() if name not in ("bias", "out_features")}
    expected = fk.linear_cross_entropy(
        x,
        module.linear.weight.view(6, *extra, 5),
        target,
        linear_bias=module.linear.bias.view(6, *extra) if options.get("bias") else None,
        **functional,
    )
    torch.testing.assert_close(module(x, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(5, 6, **options)
        theirs.load_state_dict(module.state_dict())
        assert list(theirs.state_dict()) == list(module.state_dict())
        torch.testing.assert_close(module(x, target), theirs(x, target))


def test_linear_cross_entropy_loss_takes_our_options() -> None:
    torch.manual_seed(0)
    module = fk.nn.LinearCrossEntropyLoss(5, 6, softcap=2.0, z_loss=0.1, return_z_loss=True)
    x, target = torch.randn(2, 3, 5), torch.randint(0, 6, (2, 3))
    loss, z = module(x, target, num_items=9)
    expected, expected_z = fk.linear_cross_entropy(
        x, module.linear.weight, target, softcap=2.0, z_loss=0.1, return_z_loss=True, num_items=9
    )
    assert torch.equal(loss, expected)
    assert torch.equal(z, expected_z)
    loss.backward()
    assert module.linear.weight.grad is not None
    assert "softcap=2.0" in repr(module)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x, target, num_items=9)[0], loss)


def test_linear_cross_entropy_loss_refuses_what_torchs_refuses() -> None:
    with pytest.raises(RuntimeError, match=r"weight: got shape \(5,\)"):
        fk.nn.LinearCrossEntropyLoss(4, 6, weight=torch.ones(5))
    with pytest.raises(RuntimeError, match=r"label_smoothing: got 1\.5"):
        fk.nn.LinearCrossEntropyLoss(4, 6, label_smoothing=1.5)
