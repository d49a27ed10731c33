"""Every kernel of the registry, checked and then timed.   pytest bench --benchmark-only

On a GPU: our kernel, PyTorch eager and torch.compile at the registry's bench shapes, forward and forward + backward,
by CUDA-graph replay over rotating inputs (see `timing`). On a CPU: PyTorch's paths at small shapes. Anywhere with
Triton: what each kernel's binaries use, compiled ahead of time.

`extra_info` holds kernel, provider, shape, dtype, ratio (PyTorch eager's time over this one's: above 1 is faster),
seconds a call (device time on a GPU; the benchmark's own columns are host time of a whole replay) and bytes a second.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any
from unittest import mock

import pytest
import torch

from bench.timing import Inputs, copies, measure, step
from fastlm_kernels import _runtime, aot, configs
from fastlm_kernels.check import check_kernel, upstream_gradients
from fastlm_kernels.registry import KERNELS, Case, case_name

GPU = torch.cuda.is_available() and not _runtime.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
PROVIDERS = ("fastlm", "eager", "compile") if GPU else ("fastlm", "eager")
# The choice of a configuration depends on the row's length alone; the fp64 truth of more rows only costs time. Where
# more depends on the number of rows, `_walked_as_timed` sees to it.
_CHECKED_ROWS = 256

FrozenCase = tuple[tuple[str, Any], ...]
CASES = [
    pytest.param(index, tuple(case.items()), id=f"{kernel.name}-{case_name(case)}")
    for index, kernel in enumerate(KERNELS)
    for case in (kernel.large if GPU else kernel.quick)
]


@functools.lru_cache(maxsize=1)
def _sets(index: int, frozen: FrozenCase) -> list[Inputs]:
    """The inputs of a case, drawn on the device, shared by all its providers."""
    kernel, generator = KERNELS[index], torch.Generator(DEVICE).manual_seed(0)
    arguments = kernel.inputs(DTYPE, DEVICE, generator, **dict(frozen))
    inputs = Inputs(arguments, upstream_gradients(kernel.fused, arguments, generator))
    return copies(inputs) if GPU else [inputs]


def _walked_as_timed(case: Case, rows: int) -> AbstractContextManager[Any]:
    """linear_cross_entropy walks `rows` tokens in as many chunks, and blocks of classes, as all tokens of the case."""
    if "classes" not in case:
        return nullcontext()
    classes = case["classes"]
    timed = configs.linear_cross_entropy_plan(case["rows"], case["columns"], classes, DTYPE)
    chunk = -(-rows // -(-case["rows"] // timed.rows))
    buffer = max(chunk * classes, rows * timed.classes if timed.mode == "classes" else 0)
    plan = configs.LinearCrossEntropyPlan(timed.mode, chunk, timed.classes, buffer)
    return mock.patch.object(configs, "linear_cross_entropy_plan", return_value=plan)


@functools.lru_cache(maxsize=1)
def _check(index: int, frozen: FrozenCase) -> None:
    """The accuracy rule, with programs that walk several tiles each, as they do at full size."""
    case: Case = dict(frozen)
    rows = min(case["rows"], _CHECKED_ROWS)
    with _walked_as_timed(case, rows), mock.patch.object(_runtime, "multiprocessors", return_value=1):
        errors = check_kernel(KERNELS[index], {**case, "rows": rows}, DTYPE, DEVICE)
    assert all(error.ok for error in errors), errors


@functools.lru_cache(maxsize=1)
def _eager_seconds(index: int, frozen: FrozenCase, backward: bool) -> float:
    """PyTorch eager's time, measured once for all providers."""
    return measure(step(KERNELS[index].reference, backward), _sets(index, frozen))[1]


# The provider varies fastest: what is kept of a case serves all of them, and one case at a time is kept.
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize(("index", "frozen"), CASES)
def test_time(benchmark: Any, index: int, frozen: FrozenCase, backward: bool, provider: str) -> None:
    """Check, then time."""
    _check(index, frozen)
    kernel, case, sets = KERNELS[index], dict(frozen), _sets(index, frozen)
    baseline = _eager_seconds(index, frozen, backward)
    torch._dynamo.reset()
    compiled = torch.compile(kernel.reference, fullgraph=True) if provider == "compile" else None
    fn = compiled or (kernel.fused if provider == "fastlm" else kernel.reference)
    call, taken = measure(step(fn, backward), sets)
    moved = sum(kernel.traffic(case, DTYPE, direction) for direction in ([False, True] if backward else [False]))
    benchmark.extra_info.update(
        kernel=f"{kernel.name}.{'forward_backward' if backward else 'forward'}",
        provider=provider,
        shape=case_name(case),
        dtype=str(DTYPE).removeprefix("torch."),
        ratio=baseline / taken,
        seconds=taken,
        bytes_per_second=moved / taken,
        device=torch.cuda.get_device_name() if GPU else "cpu",
        path=_runtime.explain(kernel.fused, **sets[0].arguments).path,
    )
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.skipif(_runtime.INTERPRETED or not _runtime.HAS_TRITON, reason="compiling needs Triton")
@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[kernel.name for kernel in KERNELS])
@pytest.mark.parametrize("architecture", aot.QUICK_ARCHITECTURES)
def test_resources(benchmark: Any, index: int, architecture: str) -> None:
    """Registers, spills and shared memory of the kernel's binaries, and the time it takes to build them."""
    case = KERNELS[index].quick[-1]
    job = aot.Job(index, tuple(case.items()), torch.bfloat16, architecture, aligned=True)
    rows = benchmark.pedantic(aot.run, args=(job,), rounds=1)
    assert all(row.ok for row in rows), rows
    benchmark.extra_info.update(
        kernel=KERNELS[index].name,
        provider="aot",
        shape=case_name(case),
        dtype="bfloat16",
        ratio=None,
        architecture=architecture,
        binaries=[asdict(row) for row in rows],
    )
