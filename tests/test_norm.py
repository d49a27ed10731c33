"""LayerNorm and RMSNorm: what is theirs alone, on the path that this machine takes and on PyTorch's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from layouts import DEVICE
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import norm
from fastlm_kernels.check import compare

pytestmark = pytest.mark.both_paths

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES, torch.float64)


@pytest.fixture(params=["preferred", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on the path that the call would take and on PyTorch's."""
    if request.param == "preferred":
        yield request.param
        return
    with fk.backend("torch"):
        yield request.param


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_positional_signature_is_pytorchs(name: str) -> None:
    """Names, order and defaults; ours only after them, by keyword."""
    ours = list(inspect.signature(getattr(fk, name)).parameters.values())
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_default_eps_is_pytorchs(dtype: torch.dtype, scale: float) -> None:
    """eps=None: at 1e-4 the result is set by eps alone, and 16-bit inputs take fp32's."""
    x = rows(0, 4, 32, dtype=torch.float64).mul(scale).to(dtype)
    torch.testing.assert_close(fk.rms_norm(x, (32,)), F.rms_norm(x, (32,)))
    y, h = fk.add_rms_norm(x, x, (32,))
    torch.testing.assert_close(y, F.rms_norm(h, (32,)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Accepted on every path and without a warning; the result has the input's dtype."""
    x, w, b = rows(0, 5, 16, dtype=dtype), rows(1, 16, dtype=weight_dtype), rows(2, 16, dtype=weight_dtype)
    tolerance = 2e-2 if dtype in HALVES else 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = fk.rms_norm(x, (16,), w, 1e-5), fk.layer_norm(x, (16,), w, b)
    wide = F.rms_norm(x.double(), (16,), w.double(), 1e-5), F.layer_norm(x.double(), (16,), w.double(), b.double())
    for result, truth in zip(results, wide, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("input_dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("residual_dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_residual_sum_is_rounded_once_and_normalised_as_stored(
    name: str, input_dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    """h is the sum in the residual's dtype; y, in the input's, is the norm of that h and not of the exact sum."""
    x, r, w = rows(0, 6, 48, dtype=input_dtype), rows(1, 6, 48, dtype=residual_dtype) * 8, rows(2, 48)
    y, h = getattr(fk, name)(x, r, (48,), w, eps=1e-5)
    exact = x.double() + r.double()
    assert (y.dtype, h.dtype) == (input_dtype, residual_dtype)
    # The interpreter cuts bf16 off instead of rounding it: one unit in the last place.
    assert ((h.double() - exact).abs() <= torch.finfo(residual_dtype).eps * exact.abs() + 1e-12).all()
    alone = getattr(norm, name.removeprefix("add_") + "_reference")(h.double(), (48,), w.double(), eps=1e-5)
    torch.testing.assert_close(y.double(), alone, rtol=4 * torch.finfo(input_dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_weight_offset_is_added_before_rounding(dtype: torch.dtype) -> None:
    """weight 1e-3 with offset 1 scales by 1.001, which neither 16-bit type holds near 1 in bf16."""
    x = rows(0, 4, 64, dtype=dtype)
    w = torch.full((64,), 1e-3, dtype=dtype, device=DEVICE)
    y = fk.rms_norm(x, (64,), w, 1e-6, weight_offset=1.0)
    truth = F.rms_norm(x.double(), (64,), w.double() + 1.0, 1e-6)
    torch.testing.assert_close(y.double(), truth, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-6)


def test_weight_offset_gradients_are_accurate() -> None:
    """The offset enters the input's gradient, not the weight's; judged by the accuracy rule."""
    x, w = rows(0, 7, 40).requires_grad_(), rows(1, 40).requires_grad_()

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return fk.rms_norm(x, (40,), w, 1e-6, weight_offset=1.0)

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (40,), w + 1.0, 1e-6)

    errors = compare(fused, reference, {"x": x, "w": w}, (rows(2, 7, 40),))
    assert all(error.ok for error in errors), errors


@pytest.mark.parametrize(
    ("offset", "weight", "message"),
    [
        (float("nan"), True, r"weight_offset: got nan; pass a finite number"),
        ("1", True, r"weight_offset: got '1'; pass a finite number"),
        (1.0, False, r"weight_offset: got 1.0 with weight=None; pass a weight"),
    ],
)
def test_bad_weight_offset(offset: float, weight: bool, message: str) -> None:
    """One line with the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        fk.rms_norm(rows(0, 2, 8), (8,), rows(1, 8) if weight else None, weight_offset=offset)


def test_numbers_that_vary_from_call_to_call_compile() -> None:
    """weight_offset and eps as symbols of one graph."""
    torch._dynamo.reset()
    x, w = rows(0, 3, 8), rows(1, 8)

    def norm_of(offset: float, eps: float) -> Tensor:
        return fk.rms_norm(x, (8,), w, eps, weight_offset=offset)

    compiled = torch.compile(norm_of, dynamic=True, fullgraph=True, backend="aot_eager")
    for numbers in ((1.5, 1e-6), (2.5, 0.1), (-0.5, 0.2)):
        torch.testing.assert_close(compiled(*numbers), norm_of(*numbers))


def test_the_module_compiles_for_any_size() -> None:
    """nn.RMSNorm, dynamic from the start."""
    torch._dynamo.reset()
    module = fk.nn.RMSNorm(8, device=DEVICE)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (3, 5):
        torch.testing.assert_close(compiled(rows(0, count, 8)), module(rows(0, count, 8)))


@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("trains", ["weight", "input", "residual"])
def test_the_sum_wants_a_gradient_where_its_terms_do(name: str, trains: str) -> None:
    """h does not depend on the weight."""
    tensors = {"input": rows(0, 3, 8), "residual": rows(1, 3, 8), "weight": rows(2, 8)}
    tensors[trains].requires_grad_()
    y, h = getattr(fk, name)(**tensors, normalized_shape=(8,))
    assert y.requires_grad
    assert h.requires_grad == (trains != "weight")


@pytest.mark.parametrize("columns", [64, 8300])
def test_a_large_mean_does_not_cancel(columns: int) -> None:
    """Rows at 1e4 with a spread of 1, in registers and in blocks: E[x^2] - mean^2 would have no digit left."""
    x = (rows(0, 3, columns) + 1e4).requires_grad_()
    errors = compare(
        lambda x: fk.layer_norm(x, (columns,)),
        lambda x: F.layer_norm(x, (columns,)),
        {"x": x},
        (rows(1, 3, columns),),
    )
    assert all(error.ok for error in errors), errors


def test_properties() -> None:
    """RMS 1 a row; scale invariance; LayerNorm's mean 0 and shift invariance; rows do not see each other."""
    x = rows(0, 6, 96) + 0.5
    y = fk.rms_norm(x, (96,), eps=0.0)
    torch.testing.assert_close(y.square().mean(1), torch.ones(6, device=DEVICE))
    torch.testing.assert_close(fk.rms_norm(7 * x, (96,), eps=0.0), y)
    z = fk.layer_norm(x, (96,), eps=0.0)
    torch.testing.assert_close(z.mean(1), torch.zeros(6, device=DEVICE), atol=1e-6, rtol=0)
    torch.testing.assert_close(fk.layer_norm(x + 3, (96,), eps=0.0), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fk.rms_norm(x[2:3], (96,), eps=0.0), y[2:3])


def test_several_normalised_axes() -> None:
    """A row may be a block of axes; weight and bias have its shape, and so have their gradients."""
    x, w, b = rows(0, 4, 3, 5), rows(1, 3, 5).requires_grad_(), rows(2, 3, 5).requires_grad_()
    ours = fk.layer_norm(x, (3, 5), w, b)
    theirs = F.layer_norm(x, (3, 5), w, b)
    torch.testing.assert_close(ours, theirs)
    upstream = rows(3, 4, 3, 5)
    for a, c in zip(
        torch.autograd.grad(ours, (w, b), upstream), torch.autograd.grad(theirs, (w, b), upstream), strict=True
    ):
        torch.testing.assert_close(a, c)


def test_one_row_without_a_batch_axis() -> None:
    """A vector is one row."""
    x, w = rows(0, 24), rows(1, 24)
    torch.testing.assert_close(fk.rms_norm(x, (24,), w, 1e-5), F.rms_norm(x, (24,), w, 1e-5))
    y, h = fk.add_rms_norm(x, x, (24,), w, 1e-5)
    torch.testing.assert_close((y, h), (F.rms_norm(2 * x, (24,), w, 1e-5), 2 * x))


@pytest.mark.parametrize("columns", [4, 8])
def test_a_residual_that_broadcasts(columns: int) -> None:
    """No kernel covers it; the answer is the composition's."""
    x, r = rows(0, 5, columns), rows(1, columns)
    y, h = fk.add_rms_norm(x, r, (columns,))
    torch.testing.assert_close((y, h), (F.rms_norm(x + r, (columns,)), x + r))


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.rms_norm(torch.ones(3, 4), 4),
        lambda f: f.rms_norm(torch.ones(3, 4), (5,)),
        lambda f: f.rms_norm(torch.ones(3, 4), ()),
        lambda f: f.rms_norm(torch.ones(4), (3, 4)),
        lambda f: f.rms_norm(torch.ones(3, 4), (4,), torch.ones(5)),
        lambda f: f.rms_norm(torch.ones(3, 4), (4,), torch.ones(3, 4)),
        lambda f: f.rms_norm(torch.arange(4), (4,)),
        lambda f: f.rms_norm("x", (4,)),
        lambda f: f.rms_norm(torch.ones(3, 4), (4,), None, "eps"),
        lambda f: f.rms_norm(torch.ones(3, 4)),
        lambda f: f.layer_norm(torch.ones(3, 4), (4,), torch.ones(4), None, None),
        lambda f: f.layer_norm(torch.ones(3, 4), (4,), torch.ones(4), torch.ones(3)),
        lambda f: f.layer_norm(torch.ones(3, 4), (4,), 1.0),
        lambda f: f.layer_norm(torch.arange(4), (4,)),
    ],
)
def test_bad_calls_raise_pytorchs_error(call) -> None:
    """The same class through both."""
    with torch.device(DEVICE):
        with pytest.raises(Exception) as theirs:
            call(F)
        with pytest.raises(type(theirs.value)):
            call(fk)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("path", ["preferred"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernel_writes_autocasts_dtype_itself(
    dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under CUDA autocast the result is the norm of the 16-bit input in fp32, with 16-bit gradients."""
    monkeypatch.setattr(norm._runtime, "autocast_to_fp32", lambda tensor: True)
    x, w = (t.to(kernel_device).requires_grad_() for t in (rows(0, 6, 40, dtype=dtype), rows(1, 40, dtype=dtype)))
    upstream = (rows(2, 6, 40).to(kernel_device),)

    def widen(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32))

    errors = compare(
        lambda x, w: fk.rms_norm(x, (40,), w, 1e-5),
        lambda x, w: F.rms_norm(widen(x), (40,), widen(w), 1e-5),
        {"x": x, "w": w},
        upstream,
    )
    assert all(error.ok for error in errors), errors
    assert fk.rms_norm(x, (40,), w, 1e-5).dtype == torch.float32
