"""softmax and log_softmax: what is theirs alone, on the path that this machine takes and on PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import DEVICE
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, configs
from fastlm_kernels.check import compare

pytestmark = pytest.mark.both_paths

both = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
# Several rows a program, one, and rows walked in blocks (of 4 columns).
every_length = pytest.mark.parametrize("length", [5, 1100, "blocks"])


@pytest.fixture(params=["preferred", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on the path that the call would take and on PyTorch's."""
    if request.param == "preferred":
        yield request.param
        return
    with fk.backend("torch"):
        yield request.param


@pytest.fixture
def columns(length: int | str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The row length; "blocks" makes short rows take the path of rows too long for registers."""
    if isinstance(length, int):
        return length
    for table in ("SOFTMAX_FORWARD", "SOFTMAX_BACKWARD"):
        monkeypatch.setattr(configs, table, {"generic": ()})
    monkeypatch.setattr(configs, "LONG_ROW", {"generic": (configs.RowConfig(2, 4, 4),)})
    return 23


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible normal numbers with a spread of 3."""
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


@every_length
def test_properties(columns: int) -> None:
    """Rows sum to one, whatever is added to a row; the logarithm is the logarithm; rows do not see each other."""
    x = numbers(0, 6, columns)
    y = fk.softmax(x, -1)
    torch.testing.assert_close(y.sum(1), torch.ones(6, device=DEVICE))
    torch.testing.assert_close(fk.softmax(x + 100, -1), y, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(fk.log_softmax(x, -1), y.double().log().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fk.softmax(x[2:3], 1), y[2:3])
    upstream = numbers(1, 6, columns)
    for function in (fk.softmax, fk.log_softmax):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(leaf, -1), leaf, upstream)
        # A shift of the row changes nothing.
        torch.testing.assert_close(dx.sum(1), torch.zeros(6, device=DEVICE), rtol=0, atol=1e-3)


# numpy, under Triton's interpreter, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@both
@every_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_values_are_pytorchs(name: str, columns: int, dtype: torch.dtype) -> None:
    """Rows with -inf at either end or all over, +inf, NaN, and the largest numbers: results and gradients."""
    x = numbers(0, 9, columns, dtype=dtype)
    largest = torch.finfo(dtype).max
    x[0, : columns // 2] = -math.inf
    x[1, columns // 2 :] = -math.inf
    x[2] = -math.inf
    x[3, 1] = math.inf
    x[4, 2] = math.nan
    x[5, 3] = largest
    x[6] = -largest
    x[7, 1:] = -math.inf
    x.requires_grad_()
    ours, theirs = (getattr(f, name)(x, -1) for f in (fk, F))
    # PyTorch's logarithms in fp16 are off by as much on a CPU.
    rtol, atol = (2e-5, 1e-6) if dtype == torch.float32 else (2e-3, 1e-3)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=rtol, atol=atol)
    upstream = numbers(1, 9, columns, dtype=dtype)
    ours_dx, theirs_dx = (torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs))
    # The sum over a row of 1100 numbers, each rounded in fp16, times numbers close to 1.
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (1e-2, 5e-2)
    torch.testing.assert_close(ours_dx, theirs_dx, equal_nan=True, rtol=rtol, atol=atol)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@both
def test_difference_c_keeps_pytorchs_nan(name: str) -> None:
    """A row of nothing but -inf; its neighbour is not touched."""
    x = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]], device=DEVICE)
    out = getattr(fk, name)(x, -1)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@every_length
def test_a_large_maximum_costs_no_digits(columns: int) -> None:
    """Rows at 10^4: x - (max + log sum) would round the logarithm to 1e-3."""
    x = (numbers(0, 5, columns) + 1e4).requires_grad_()
    exact = x.detach().double().log_softmax(-1)
    torch.testing.assert_close(fk.log_softmax(x, -1).double(), exact, rtol=1e-6, atol=3e-6)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wider_result(name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """dtype=, or CUDA autocast: softmax of the 16-bit input in fp32, with 16-bit gradients."""
    if autocast:
        monkeypatch.setattr(_runtime, "autocast_to_fp32", lambda tensor: True)
    x = numbers(0, 6, 40, dtype=dtype).requires_grad_()
    asked = None if autocast and _triton(name, x) else torch.float32
    errors = compare(
        lambda x: getattr(fk, name)(x, -1, dtype=asked),
        lambda x: getattr(F, name)(x, -1, dtype=torch.promote_types(x.dtype, torch.float32)),
        {"x": x},
        (numbers(1, 6, 40),),
    )
    assert all(error.ok for error in errors), errors
    assert getattr(fk, name)(x, -1, 3, asked).dtype == torch.float32


def _triton(name: str, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    return fk.explain(getattr(fk, name), x, *(args or (-1,)), **kwargs).path == "triton"


@pytest.mark.needs_kernels
@pytest.mark.parametrize("path", ["preferred"], indirect=True)
@both
def test_which_calls_have_a_kernel(name: str) -> None:
    """The last dimension, by either of its names, in the input's dtype or fp32."""
    x = numbers(0, 2, 3, 4)
    assert _triton(name, x, 2)
    assert _triton(name, x, -1)
    assert _triton(name, x.half(), -1, dtype=torch.float32)
    assert not any(_triton(name, x, dim) for dim in (0, 1, -2, None, True))
    assert not any(_triton(name, x, -1, dtype=dtype) for dtype in (torch.float16, torch.float64))
    assert not _triton(name, x.half(), -1, dtype=torch.bfloat16)
    assert not _triton(name, x[0, 0, 0])


@both
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_every_dimension_and_dtype(name: str, dim: int, dtype: torch.dtype | None) -> None:
    """PyTorch's values, dtype, strides and gradients."""
    x = numbers(0, 4, 3, 5).transpose(0, 2).requires_grad_()
    ours, theirs = (getattr(f, name)(x, dim, dtype=dtype) for f in (fk, F))
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)))


@both
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1)], ids=str)
def test_shapes_with_little_in_them(name: str, shape: tuple[int, ...]) -> None:
    """No axes, no rows, no columns, one number."""
    x = numbers(0, *shape).requires_grad_()
    ours, theirs = (getattr(f, name)(x, -1) for f in (fk, F))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))


@both
def test_integers_need_a_dtype(name: str) -> None:
    """As in PyTorch."""
    x = torch.arange(6, device=DEVICE).view(2, 3)
    torch.testing.assert_close(
        getattr(fk, name)(x, -1, dtype=torch.float32), getattr(F, name)(x, -1, dtype=torch.float32)
    )


@both
def test_missing_dim_warns_at_the_callers_line(name: str) -> None:
    """The same warning, at the same place."""
    with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
        getattr(fk, name)(torch.randn(2, 3))
    with pytest.warns(UserWarning, match="Implicit dimension choice") as expected:
        getattr(F, name)(torch.randn(2, 3))
    assert caught[0].filename == expected[0].filename == __file__


@both
def test_any_dimension_compiles(name: str) -> None:
    """`dim` as a symbol, of whatever value."""
    torch._dynamo.reset()
    f = getattr(fk, name)
    compiled = torch.compile(lambda x, dim: f(x, dim), dynamic=True, fullgraph=True, backend="aot_eager")
    for shape, dim in (((3, 4), 0), ((3, 4), 1), ((2, 3, 4, 5), 2), ((2, 3, 4, 5), 3), ((2, 3, 4, 5), -3)):
        x = numbers(0, *shape)
        torch.testing.assert_close(compiled(x, dim), getattr(F, name)(x, dim))


@both
@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(torch.ones(2, 3), 2),
        lambda f: f(torch.ones(2, 3), -3),
        lambda f: f(torch.ones(2, 3), "x"),
        lambda f: f(torch.ones(2, 3), 1.0),
        lambda f: f(torch.ones(2, 3), (1,)),
        lambda f: f(torch.ones(2, 3).long(), 1),
        lambda f: f(torch.ones(2, 3), 1, dtype=torch.int64),
        lambda f: f(torch.ones(2, 3), 1, dtype="float32"),
        lambda f: f(torch.ones(()), 1),
        lambda f: f("x", 1),
    ],
)
def test_bad_calls_raise_pytorchs_error(name: str, call: Callable[[Any], Any]) -> None:
    """The same class through both."""
    with torch.device(DEVICE):
        with pytest.raises(Exception) as theirs:
            call(getattr(F, name))
        with pytest.raises(type(theirs.value)):
            call(getattr(fk, name))
