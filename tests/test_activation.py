"""Activations and softmax: written-out formulas in float64, composition in half precision, softmax's own NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm_kernels as fk


def _tanh_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _erf_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "gelu": (fk.gelu, _erf_gelu, 1),
    "gelu tanh": (lambda x: fk.gelu(x, approximate="tanh"), _tanh_gelu, 1),
    "silu": (fk.silu, _silu, 1),
    "sigmoid": (fk.sigmoid, lambda x: 1 / (1 + torch.exp(-x)), 1),
    "tanh": (fk.tanh, lambda x: 1 - 2 / (torch.exp(2 * x) + 1), 1),
    "relu_squared": (fk.relu_squared, lambda x: torch.where(x > 0, x * x, 0.0), 1),
    "swiglu": (fk.swiglu, lambda g, u: _silu(g) * u, 2),
    "geglu": (fk.geglu, lambda g, u: _erf_gelu(g) * u, 2),
    "geglu tanh": (lambda g, u: fk.geglu(g, u, approximate="tanh"), lambda g, u: _tanh_gelu(g) * u, 2),
    "softmax": (lambda x: fk.softmax(x, -1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True), 1),
    "log_softmax": (lambda x: fk.log_softmax(x, 0), lambda x: x - x.exp().sum(0, keepdim=True).log(), 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula_and_its_gradient(name: str) -> None:
    ours, formula, count = FORMULAS[name]
    torch.manual_seed(0)
    leaves = [(2 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_() for _ in range(count)]
    out, expected = ours(*leaves), formula(*leaves)
    torch.testing.assert_close(out, expected)
    upstream = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    grads = torch.autograd.grad(out, leaves, upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_functions_equal_the_composition_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate, up = torch.randn(4, 9).to(dtype), torch.randn(4, 9).to(dtype)
    assert torch.equal(fk.swiglu(gate, up), F.silu(gate) * up)
    assert torch.equal(fk.geglu(gate, up), F.gelu(gate) * up)
    assert torch.equal(fk.relu_squared(gate), F.relu(gate).square())


def test_difference_c_softmax_keeps_pytorchs_nan() -> None:
    x = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    for function in (fk.softmax, fk.log_softmax):
        out = function(x, -1)
        assert out[0].isnan().all()
        assert not out[1].isnan().any()


def test_softmax_options() -> None:
    x = torch.randn(3, 4, dtype=torch.float16)
    assert fk.softmax(x, 1, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(fk.softmax(x, 1, 3, torch.float64).sum(1), torch.ones(3, dtype=torch.float64))


def test_missing_dim_warns_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
        fk.softmax(torch.randn(2, 3))
    with pytest.warns(UserWarning, match="Implicit dimension choice") as expected:
        F.softmax(torch.randn(2, 3))
    assert caught[0].filename == expected[0].filename == __file__


def test_inplace_and_out() -> None:
    x = torch.randn(5)
    expected = F.silu(x)
    assert fk.silu(x, inplace=True) is x
    assert torch.equal(x, expected)
    out = torch.empty(5)
    assert fk.gelu(x, out=out) is out
    assert torch.equal(out, F.gelu(x))
