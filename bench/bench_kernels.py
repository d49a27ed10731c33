"""Every kernel of the registry, checked and then timed.   pytest bench --benchmark-only

On a GPU: our kernel, PyTorch eager and torch.compile at the registry's bench shapes, forward and forward + backward,
by CUDA-graph replay over rotating inputs. On a CPU: PyTorch's paths at small shapes. Anywhere with Triton: what each
kernel's binaries use, compiled ahead of time.

`extra_info` holds kernel, provider, shape, dtype, ratio (PyTorch eager's time over this one's: above 1 is faster),
seconds a call and bytes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.timing import copies, replayer, seconds, step
from fastlm_kernels import _runtime, aot
from fastlm_kernels.check import check_kernel, upstream_gradients
from fastlm_kernels.registry import KERNELS, Case, Kernel, case_name

GPU = torch.cuda.is_available() and not _runtime.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
PROVIDERS = ("fastlm", "eager", "compile") if GPU else ("fastlm", "eager")
SMALL: tuple[Case, ...] = ({"rows": 128, "columns": 256}, {"rows": 128, "columns": 768})
# The choice of a configuration depends on the row's length alone; the fp64 truth of more rows only costs time.
_CHECKED_ROWS = 256

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
_baselines: dict[tuple[str, str, bool], float] = {}


def _timed(fn: Callable[..., Any], kernel: Kernel, case: Case, backward: bool) -> tuple[Callable[[], Any], int]:
    """(a call to time, how many runs of fn it makes)."""
    arguments = kernel.inputs(DTYPE, DEVICE, 0, **case)
    upstream = upstream_gradients(kernel.reference, arguments, 1)
    run = step(fn, backward)
    if not GPU:
        return lambda: run(arguments, upstream), 1
    sets = copies(arguments)
    return replayer(run, sets, upstream), len(sets)


def _eager_seconds(kernel: Kernel, case: Case, backward: bool) -> float:
    """PyTorch eager's time, measured once a shape."""
    key = kernel.name, case_name(case), backward
    if key not in _baselines:
        call, runs = _timed(kernel.reference, kernel, case, backward)
        _baselines[key] = seconds(call) / runs
    return _baselines[key]


@every_kernel
@pytest.mark.parametrize("case", KERNELS[0].large if GPU else SMALL, ids=case_name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_time(benchmark: Any, kernel: Kernel, case: Case, backward: bool, provider: str) -> None:
    """Check, then time."""
    errors = check_kernel(kernel, {**case, "rows": min(case["rows"], _CHECKED_ROWS)}, DTYPE, DEVICE)
    assert all(error.ok for error in errors), errors
    torch._dynamo.reset()
    compiled = torch.compile(kernel.reference, fullgraph=True) if provider == "compile" else None
    fn = compiled or (kernel.fused if provider == "fastlm" else kernel.reference)
    baseline = _eager_seconds(kernel, case, backward)
    call, runs = _timed(fn, kernel, case, backward)
    taken = seconds(call) / runs
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
        path=_runtime.explain(kernel.fused, *kernel.inputs(DTYPE, DEVICE, 0, **case)).path,
    )
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.skipif(_runtime.INTERPRETED or not _runtime.HAS_TRITON, reason="compiling needs Triton")
@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[kernel.name for kernel in KERNELS])
@pytest.mark.parametrize("architecture", aot.QUICK_ARCHITECTURES)
def test_resources(benchmark: Any, index: int, architecture: str) -> None:
    """Registers, spills and shared memory of the kernel's binaries, and the time it takes to build them."""
    job = aot.Job(index, (("rows", 4096), ("columns", 1024)), torch.bfloat16, architecture, aligned=True)
    rows = benchmark.pedantic(aot.run, args=(job,), rounds=1)
    assert all(row.ok for row in rows), rows
    benchmark.extra_info.update(
        kernel=KERNELS[index].name,
        provider="aot",
        shape="rows4096-columns1024",
        dtype="bfloat16",
        ratio=None,
        architecture=architecture,
        binaries=[asdict(row) for row in rows],
    )
