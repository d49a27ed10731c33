"""The accuracy rule: what it lets through and what it must not, and the command that applies it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm_kernels import _runtime, check
from fastlm_kernels.check import DTYPES, Error, compare, in_units
from fastlm_kernels.registry import KERNELS

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax(x: Tensor) -> Tensor:
    """The true function of the tests below."""
    return F.softmax(x, -1)


class _Loss(torch.autograd.Function):
    """A cross-entropy whose gradient lacks its softmax term: right at the target, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(x, target)
        return F.cross_entropy(x, target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, target = ctx.saved_tensors
        p = x.float().softmax(-1).gather(1, target[:, None])
        dx = torch.zeros_like(x, dtype=torch.float32).scatter(1, target[:, None], p - 1)
        return (dx / len(x) * grads[0]).to(x.dtype), None


@every_dtype
def test_pytorchs_own_op_passes_everywhere(dtype: torch.dtype) -> None:
    """The baseline meets its own rule, with room."""
    x = numbers(0, 20, 33, dtype=dtype).requires_grad_()
    errors = compare(softmax, softmax, {"x": x}, (numbers(1, 20, 33, dtype=dtype),))
    assert [e.quantity for e in errors] == ["output 0", "gradient of x"]
    assert all(e.ok for e in errors)


@every_dtype
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: softmax(x) + torch.finfo(x.dtype).eps,
        lambda x: softmax(x) * (1 + 8 * torch.finfo(x.dtype).eps),
        lambda x: softmax(x).where(torch.arange(33) != 7, torch.nan),
        lambda x: softmax(x).where(torch.arange(33) != 7, 0),
        lambda x: softmax(x.detach()) + 0 * x,
        lambda x: softmax(x.clamp(max=1.5)),
    ],
    ids=["absolute offset", "8 eps off", "one NaN", "one column dropped", "no gradient", "clipped"],
)
def test_wrong_results_fail(wrong: Any, dtype: torch.dtype) -> None:
    """Small, local and one-sided errors."""
    x = numbers(0, 20, 33, dtype=dtype).requires_grad_()
    errors = compare(wrong, softmax, {"x": x}, (numbers(1, 20, 33, dtype=dtype),))
    assert not all(e.ok for e in errors)


@every_dtype
def test_gradient_without_its_small_terms_fails(dtype: torch.dtype) -> None:
    """An error measured against the largest value would pass this one in bf16."""
    x, target = numbers(0, 8, 500, dtype=dtype).requires_grad_(), torch.arange(8)
    arguments, upstream = {"input": x, "target": target}, (torch.tensor(1.0, dtype=dtype),)
    right = compare(F.cross_entropy, F.cross_entropy, arguments, upstream)
    wrong = compare(lambda input, target: _Loss.apply(input, target), F.cross_entropy, arguments, upstream)
    assert all(e.ok for e in right)
    assert [e.quantity for e in wrong if not e.ok] == ["gradient of input"]


@every_dtype
def test_lower_precision_inside_fails(dtype: torch.dtype) -> None:
    """Sums in 16 bits, where PyTorch sums in 32."""
    x = numbers(0, 4, 4000, dtype=dtype).add(1).requires_grad_()
    low = torch.bfloat16 if dtype != torch.float16 else dtype

    def coarse(x: Tensor) -> Tensor:
        total = torch.zeros(4, dtype=low)
        for part in x.to(low).split(1, dim=1):
            total = total + part.sum(1)
        return (total / 4000).to(dtype)

    errors = compare(coarse, lambda x: x.mean(1), {"x": x}, (numbers(1, 4, dtype=dtype),))
    assert not errors[0].ok


def test_where_the_unit_is_zero_the_error_must_be() -> None:
    """An exact zero that nothing moves allows no error at all."""
    zero = torch.zeros(2, dtype=torch.float64)
    units = in_units(torch.tensor([0.0, 1e-30]), zero, zero)
    assert units.tolist() == [0.0, float("inf")]


def test_nan_and_infinity_never_pass() -> None:
    """Neither in ours nor, hiding ours, in the allowance."""
    nan = float("nan")
    assert not Error("output", nan, 4.0, 0.1, 1.0).ok
    assert not Error("output", 1.0, 4.0, nan, 1.0).ok
    assert not Error("output", float("inf"), 4.0, float("inf"), 1.0).ok
    assert not Error("output", float("inf"), float("inf"), float("inf"), float("inf")).ok


def test_an_error_of_pytorchs_where_none_is_allowed_does_not_excuse_ours() -> None:
    """Its op errs at an element whose unit is 0: the rule still sees what is wrong elsewhere."""
    x = torch.cat([torch.zeros(1), numbers(0, 32)])

    def baseline(x: Tensor) -> Tensor:
        return 2 * x + (0.0 if x.dtype == torch.float64 else 1e-30) * (x == 0)

    assert all(e.ok for e in compare(lambda x: 2 * x, baseline, {"x": x}, (torch.ones(33),)))
    assert not any(e.ok for e in compare(lambda x: 2.01 * x, baseline, {"x": x}, (torch.ones(33),)))
    assert not any(e.ok for e in compare(baseline, baseline, {"x": x}, (torch.ones(33),)))


def test_pytorchs_own_op_may_err_as_it_does_where_none_is_allowed() -> None:
    """No further than that, and only there."""
    x = torch.cat([torch.zeros(1), numbers(0, 32)])

    def off(by: float) -> Any:
        return lambda x: 2 * x + (0.0 if x.dtype == torch.float64 else by) * (x == 0)

    arguments, upstream = {"x": x}, (torch.ones(33),)
    assert all(e.ok for e in compare(off(1e-30), off(1e-30), arguments, upstream, own_op=True))
    for wrong in (off(2e-30), off(torch.nan), lambda x: 2.01 * x):
        assert not any(e.ok for e in compare(wrong, off(1e-30), arguments, upstream, own_op=True))


def test_a_row_that_sees_one_key_passes_with_two_threads() -> None:
    """PyTorch's fp16 attention rounds a gradient that is 0 there to 1e-7, on a CPU with several threads alone."""
    kernel = next(k for k in KERNELS if k.name == "scaled_dot_product_attention")
    case = {"rows": 40, "columns": 16, "keys": 20, "align": "bottom_right"}
    assert case in kernel.small
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with _runtime.backend("torch"):
            errors = check.check_kernel(kernel, case, torch.float16, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(e.ok for e in errors), errors


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastlm_kernels.check", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


def test_command_says_which_path_it_checked() -> None:
    """One line a case, the path among its columns, and a total."""
    run = _run("--kernel", "rms_norm", TRITON_INTERPRET="0")
    cases = len(DTYPES) * len(KERNELS[0].small)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "PyTorch's own path" in lines[0]
    assert sum(" torch " in line and line.endswith("ok") for line in lines) == cases
    assert lines[-1] == f"{cases} of {cases} pass"


@pytest.mark.needs_interpreter
def test_command_runs_the_kernels_in_the_interpreter() -> None:
    """The same table from the kernels."""
    run = _run("--kernel", "rms_norm", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert "interpreter" in run.stdout.splitlines()[0]
    assert " triton " in run.stdout
    assert " torch " not in run.stdout


def test_command_fails_when_a_kernel_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Exit code 1, and the line says FAIL."""
    good = KERNELS[0]

    def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        return good.reference(input, normalized_shape, weight, eps) * 1.1

    bad = replace(good, fused=_runtime.without_kernel("wrong on purpose")(rms_norm), small=good.small[:2])
    monkeypatch.setattr(check, "CALLS", (bad,))
    assert check.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert all(line.endswith("FAIL") for line in printed[2:-1])
    assert printed[-1] == "0 of 6 pass"
