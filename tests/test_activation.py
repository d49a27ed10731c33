"""Activations: what is theirs alone, on the path that this machine takes and on PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import DEVICE
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, activation, configs
from fastlm_kernels.check import compare

pytestmark = pytest.mark.both_paths


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
def test_pytorchs_path_is_the_composition(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate, up = torch.randn(4, 9).to(DEVICE, dtype), torch.randn(4, 9).to(DEVICE, dtype)
    with fk.backend("torch"):
        assert torch.equal(fk.swiglu(gate, up), F.silu(gate) * up)
        assert torch.equal(fk.geglu(gate, up), F.gelu(gate) * up)
        assert torch.equal(fk.relu_squared(gate), F.relu(gate).square())


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_kernels_round_once(name: str, kernel_device: str) -> None:
    """Half a unit in the last place of fp16, where the composition of two operators is off by more."""
    torch.manual_seed(1)
    count = FORMULAS[name][2]
    arguments = [torch.randn(40, 50).to(kernel_device, torch.float16) for _ in range(count)]
    exact = FORMULAS[name][1](*(a.double() for a in arguments))
    spacing = torch.exp2(exact.abs().log2().floor().clamp(min=-14)) * torch.finfo(torch.float16).eps
    assert ((getattr(fk, name)(*arguments).double() - exact).abs() / spacing).max() < 0.51
    with fk.backend("torch"):
        assert ((getattr(fk, name)(*arguments).double() - exact).abs() / spacing).max() > 0.6


@pytest.mark.needs_kernels
def test_gelu_and_its_slope_keep_their_digits_in_the_tail(kernel_device: str) -> None:
    """x (1 + erf) / 2 has none left in fp32 below -5; judged against the normal distribution in fp64."""
    x = torch.linspace(-5.99, 6.5, 3001, device=kernel_device).requires_grad_()
    wide = x.detach().double()
    cdf, density = torch.special.ndtr(wide), torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    y = fk.gelu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    condition = torch.finfo(torch.float32).eps * (2 + wide.square())
    assert ((y.double() - wide * cdf).abs() / (condition * (wide * cdf).abs()).clamp(min=1e-30)).max() < 2
    # Its two terms cancel near -0.75.
    assert ((slope.double() - cdf - wide * density).abs() / (condition * (cdf + (wide * density).abs()))).max() < 2


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", ["gelu tanh", "tanh", "sigmoid"])
def test_no_cancellation_in_fp32(name: str, kernel_device: str) -> None:
    """Near 0 and far below it: an error of a few units in the last place, relative to the result."""
    ours, formula, _ = FORMULAS[name]
    x = torch.cat([torch.linspace(-4, 4, 2001), torch.logspace(-20, 0, 200)]).to(kernel_device)
    exact = torch.tanh(x.double()) if name == "tanh" else formula(x.double())
    cancelled = 1 + (x.double().square() if name == "gelu tanh" else 0)
    error = (ours(x).double() - exact).abs() / (torch.finfo(torch.float32).eps * exact.abs() * cancelled + 1e-38)
    assert error.max() < 2.5


def _flipped(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(1.0, 2.0, -3.0).clamp(-4.0, 4.0).flip(0)


CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (fk.gelu, F.gelu),
    "gelu tanh": (lambda x: fk.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (fk.silu, F.silu),
    "sigmoid": (fk.sigmoid, torch.sigmoid),
    "tanh": (fk.tanh, torch.tanh),
    "relu_squared": (fk.relu_squared, activation.relu_squared_reference),
    "swiglu": (lambda x: fk.swiglu(x, _flipped(x)), lambda x: F.silu(x) * _flipped(x)),
    "geglu": (lambda x: fk.geglu(x, _flipped(x)), lambda x: F.gelu(x) * _flipped(x)),
}


# numpy, under Triton's interpreter, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_extreme_values_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    """Infinities, NaN, numbers whose squares overflow, subnormal numbers: results and gradients."""
    # The interpreter takes bf16's subnormal numbers for 0; PyTorch's GELU of infinity is NaN on a CPU, not on a GPU.
    small = 1e-40 if dtype == torch.float32 else 1e-30
    values = [-math.inf, math.nan, 1e30, -1e30, 80.0, -80.0, small, -small, 0.0, -0.0]
    values += [] if name in ("gelu", "geglu") else [math.inf]
    x = torch.tensor(values, dtype=dtype, device=DEVICE).requires_grad_()
    rtol = 8e-3 if dtype == torch.bfloat16 else 1e-5
    ours, theirs = (call(x) for call in CALLS[name])
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=rtol, atol=1e-38)
    for upstream in (torch.ones_like(x), torch.full_like(x, math.inf)):
        ours_dx, theirs_dx = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (ours, theirs))
        torch.testing.assert_close(ours_dx, theirs_dx, equal_nan=True, rtol=rtol, atol=1e-38)


def test_silu_where_fast_division_would_flush() -> None:
    """1 + e^88 is more than 2^126: a GPU's fast division by it gives 0, and the result is no subnormal number."""
    x = torch.tensor([-87.5, -88.0, -88.5], device=DEVICE)
    torch.testing.assert_close(fk.silu(x).double(), F.silu(x.double()), rtol=2e-5, atol=0)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "permuted": lambda: torch.randn(3, 4, 5, 6).permute(0, 2, 3, 1),
    "permuted with an axis of one": lambda: torch.randn(3, 1, 5).transpose(0, 2),
    "half of wider rows": lambda: torch.randn(3, 4, 10)[..., 5:],
    "permuted half": lambda: torch.randn(3, 4, 10)[..., :5].transpose(0, 1),
    "every other element": lambda: torch.randn(3, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
    "one number": lambda: torch.randn(()),
    "no numbers": lambda: torch.randn(3, 0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["silu", "tanh", "swiglu"])
def test_results_have_pytorchs_layout(name: str, layout: str) -> None:
    """Values, strides and gradients."""
    torch.manual_seed(2)
    x = LAYOUTS[layout]().to(DEVICE).requires_grad_()
    up = torch.randn_like(x)
    if name == "swiglu":
        ours, theirs = fk.swiglu(x, up), F.silu(x) * up
    else:
        ours, theirs = (call(x) for call in CALLS[name])
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the launches made, by name."""
    seen: list[dict[str, Any]] = []

    def noted(fn: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
        seen.append({**dict(zip(fn.arg_names, arguments, strict=False)), **options})
        _runtime.launch(fn, grid, arguments, **options)

    monkeypatch.setattr(activation, "launch", noted)
    return seen


@pytest.mark.needs_kernels
def test_halves_of_one_tensor_are_read_where_they_lie(launches: list[dict[str, Any]], kernel_device: str) -> None:
    """gate and up from chunk(2, -1) of a batch, forward and backward: no copy."""
    merged = torch.randn(2, 3, 48, device=kernel_device).requires_grad_()
    gate, up = merged.chunk(2, -1)
    y = fk.swiglu(gate, up)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, merged, upstream)
    exact = F.silu(merged[..., :24]) * merged[..., 24:]
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(grad, torch.autograd.grad(exact, merged, upstream)[0])
    assert len(launches) == 2
    for launch in launches:
        assert (launch["G"].data_ptr(), launch["U"].data_ptr()) == (gate.data_ptr(), up.data_ptr())
        assert (launch["M"], launch["N"], launch["stride_g"], launch["stride_u"]) == (6, 24, 48, 48)


@pytest.mark.needs_kernels
def test_dense_tensors_are_one_row(launches: list[dict[str, Any]], kernel_device: str) -> None:
    """Whatever the order of their axes, forward and backward, and whatever the upstream gradient's if it is theirs."""
    x = torch.randn(3, 4, 5, device=kernel_device).permute(2, 0, 1).requires_grad_()
    y = fk.gelu(x)
    (y * 2).sum().backward()
    assert [(launch["M"], launch["N"]) for launch in launches] == [(1, 60)] * 2
    assert launches[0]["X"].data_ptr() == launches[1]["S"].data_ptr() == x.data_ptr()


@pytest.mark.needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [5, 64, 96])
@pytest.mark.parametrize("rows", [1, 7])
def test_many_tiles(
    rows: int, columns: int, dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles and partial ones side by side, in one row of everything and in rows at a stride."""
    monkeypatch.setattr(configs, "ELEMENTWISE", {"generic": (configs.ElementwiseConfig(32 * dtype.itemsize, 1),)})
    monkeypatch.setattr(configs, "_NARROWEST_TILE", 8)
    torch.manual_seed(3)
    for wide in (columns, columns + 16):
        gate, up = (torch.randn(rows, wide, dtype=dtype, device=kernel_device)[:, :columns] for _ in range(2))
        leaves = {"gate": gate.requires_grad_(), "up": up.requires_grad_()}
        upstream = (torch.randn(rows, columns, dtype=dtype, device=kernel_device),)
        errors = compare(fk.swiglu, activation.swiglu_reference, leaves, upstream)
        errors += compare(fk.silu, F.silu, {"input": leaves["gate"]}, upstream)
        errors += compare(fk.tanh, torch.tanh, {"input": leaves["gate"]}, upstream)
        assert all(error.ok for error in errors), errors


@pytest.mark.parametrize(
    ("itemsize", "rows", "columns", "tile"),
    [
        (2, 1, 10**10, (1, 2048)),
        (4, 1, 5, (1, 1024)),
        (2, 8, 768, (8, 256)),
        (2, 8, 11008, (8, 256)),
        (2, 8, 8192, (1, 2048)),
        (4, 8, 8192, (1, 1024)),
        (2, 8, 100, (16, 128)),
        (2, 8, 5, (256, 8)),
        (2, 8, 5461, (1, 2048)),
    ],
)
def test_tiles_divide_rows_where_they_can(itemsize: int, rows: int, columns: int, tile: tuple[int, int]) -> None:
    """4096 bytes each, as many columns of a row as a power of two divides; one row of everything is cut evenly."""
    config = configs.elementwise_config("sm_90", itemsize, rows, columns)
    assert (config.block_m, config.block_n) == tile


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", ["gelu tanh", "geglu tanh", "swiglu"])
def test_gradients_of_the_options_by_finite_differences(
    name: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves in fp64; the generic test has the defaults. Halves of wider rows."""
    monkeypatch.setattr(activation, "_KERNEL_DTYPES", (torch.float64,))
    ours, _, count = FORMULAS[name]
    torch.manual_seed(4)
    wide = [2 * torch.randn(3, 8, dtype=torch.float64, device=kernel_device) for _ in range(count)]
    leaves = [a[:, :4].requires_grad_() for a in wide]
    explained = fk.explain(fk.gelu if count == 1 else fk.swiglu, *leaves)
    assert explained.path == "triton", explained.reason
    assert torch.autograd.gradcheck(ours, leaves)


X = torch.linspace(-2, 2, 12, device=DEVICE).view(3, 4)


@pytest.mark.parametrize(
    ("call", "theirs"),
    [
        (lambda: fk.sigmoid(X.int()), lambda: torch.sigmoid(X.int())),
        (lambda: fk.tanh(X.long()), lambda: torch.tanh(X.long())),
        (lambda: fk.relu_squared(X.int()), lambda: F.relu(X.int()).square()),
        (lambda: fk.silu(X.to(torch.complex64)), lambda: F.silu(X.to(torch.complex64))),
        (lambda: fk.tanh(X.to(torch.complex64)), lambda: torch.tanh(X.to(torch.complex64))),
        (lambda: fk.gelu(X.double()), lambda: F.gelu(X.double())),
        (lambda: fk.swiglu(X, X[:1]), lambda: F.silu(X) * X[:1]),
        (lambda: fk.swiglu(X[0], X), lambda: F.silu(X[0]) * X),
        (lambda: fk.geglu(X.half(), X), lambda: F.gelu(X.half()) * X),
        (lambda: fk.swiglu(X, 2.0), lambda: F.silu(X) * 2.0),  # type: ignore[arg-type]
    ],
)
def test_what_no_kernel_covers(call: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    """Integers, complex numbers, fp64, broadcasting, two dtypes, a number: PyTorch's answer."""
    torch.testing.assert_close(call(), theirs(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.gelu(X, approximate="exact"),
        lambda f: f.gelu(X, approximate=None),
        lambda f: f.gelu(X.long()),
        lambda f: f.gelu("x"),
        lambda f: f.silu(X.long()),
        lambda f: f.silu(X, True, 1),
        lambda f: f.sigmoid(1.0),
        lambda f: f.tanh(None),
    ],
)
def test_bad_calls_raise_pytorchs_error(call: Callable[[Any], Any]) -> None:
    """The same class through both."""
    with pytest.raises(Exception) as theirs:
        call(F)
    with pytest.raises(type(theirs.value)):
        call(fk)


@pytest.mark.parametrize(
    ("call", "theirs"),
    [
        (lambda: fk.swiglu(X, X[:, :3]), lambda: F.silu(X) * X[:, :3]),
        (lambda: fk.geglu(X, X, approximate="no"), lambda: F.gelu(X, approximate="no") * X),
        (lambda: fk.geglu(X.long(), X.long()), lambda: F.gelu(X.long())),
        (lambda: fk.relu_squared("x"), lambda: F.relu("x")),  # type: ignore[arg-type]
    ],
)
def test_bad_compositions_raise_pytorchs_error(call: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """The class that the composition raises."""
    with pytest.raises(Exception) as expected:
        theirs()
    with pytest.raises(type(expected.value)):
        call()


def test_inplace_and_out() -> None:
    x = torch.randn(5)
    expected = F.silu(x)
    assert fk.silu(x, inplace=True) is x
    assert torch.equal(x, expected)
    out = torch.empty(5)
    assert fk.gelu(x, out=out) is out
    assert torch.equal(out, F.gelu(x))
