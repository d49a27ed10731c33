"""Every kernel of the registry, checked and then timed.   pytest bench --benchmark-only

On a GPU: our kernels against PyTorch eager, torch.compile, each SDPA backend forced alone, flash-attn and Liger where
installed (see `providers`), at the registry's bench shapes in bf16, forward, backward and both, by CUDA-graph replay
over rotating inputs (see `timing`). On a CPU: PyTorch's paths at small shapes. Anywhere with Triton: what each kernel's
binaries use, compiled ahead of time. `conftest` has options to stop in time and to go on later.

`extra_info` holds
    kernel, direction, provider, shape, dtype   the function with its direction, the direction, who, the case
    mode, repeats      what the provider was asked for, "deterministic" or "default"; whether two runs gave equal bits
    ratio              PyTorch eager's time over this one's, above 1 is faster; None where eager could not run.
                       On a CPU of the fastest of runs that take turns
    seconds, low_seconds, high_seconds, rounds      the median of one run, 10 and 90 % quantiles: device time on a GPU
    host_seconds       that one eager call keeps the host
    timed_by           "graph", "events" or "host"
    bytes_per_second, bandwidth_share      of what must move, and its share of the copy rate just measured here
    flops_per_second, matmul_share         of what must be computed, and its share of the matmul rate measured here
    bytes, flops, peak_bytes, launches, checked, path, device
The benchmark's own columns are host time of a whole replay.
"""

from __future__ import annotations

import functools
import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import device
from bench.cases import TIMED, Entry, checked, entries
from bench.device import DEVICE, GPU
from bench.providers import Provider, providers
from bench.timing import DIRECTIONS, Inputs, Measured, copied, copies, host_spreads, measure, prepared
from fastlm_kernels import _runtime, aot, configs
from fastlm_kernels.check import check_kernel, upstream_gradients
from fastlm_kernels.registry import KERNELS, Case, case_name

DTYPE = torch.bfloat16 if GPU else torch.float32
# The choice of a configuration depends on the row's length alone; the fp64 truth of more rows only costs time. Where
# more depends on the number of rows, `_walked_as_timed` sees to it.
_CHECKED_ROWS = 256
_AGREEMENT = 0.03  # of a rival with PyTorch, relative, in the mean: it says that both did the same task

FrozenCase = tuple[tuple[str, Any], ...]


def plan(gpu: bool) -> list[tuple[Entry, str, Provider]]:
    """All that is timed. The provider varies fastest: what is kept of a case serves all of them."""
    return [
        (entry, direction, provider)
        for entry in entries(gpu)
        for direction in DIRECTIONS
        for provider in providers(entry.kernel, dict(entry.case), direction, gpu)
    ]


@functools.lru_cache(maxsize=1)
def _sets(index: int, frozen: FrozenCase) -> list[Inputs]:
    """The inputs of a case, drawn on the device, shared by all its providers."""
    kernel, generator = TIMED[index], torch.Generator(DEVICE).manual_seed(0)
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
        errors = check_kernel(checked(TIMED[index]), {**case, "rows": rows}, DTYPE, DEVICE)
    assert all(error.ok for error in errors), errors


@functools.lru_cache(maxsize=1)
def _eager_seconds(index: int, frozen: FrozenCase, direction: str) -> float | None:
    """PyTorch eager's median seconds, measured once for all providers; None where its memory does not do."""
    try:
        return measure(TIMED[index].reference, direction, _sets(index, frozen)).seconds.median
    except torch.OutOfMemoryError:
        return None


def _beside_eager(entry: Entry, direction: str, measured: Measured) -> tuple[Measured, float | None]:
    """(the measurement, PyTorch eager's time over its). On a CPU both anew, in turns, and the fastest of each compared:
    other programs take the processor away for many times what a call lasts."""
    if GPU:
        eager = _eager_seconds(*entry, direction)
        return measured, eager and eager / measured.seconds.median
    runs = prepared(entry.kernel.reference, direction, _sets(*entry))
    eager_time, time = host_spreads([lambda: [run() for run in runs], measured.call])
    return replace(measured, seconds=time, host_seconds=time.median), eager_time.best / time.best


@functools.lru_cache(maxsize=1)
def _expected(index: int, frozen: FrozenCase, direction: str) -> tuple[Tensor, ...] | None:
    """PyTorch eager's results; None where its memory does not do."""
    try:
        return prepared(TIMED[index].reference, direction, _sets(index, frozen)[:1])[0]()
    except torch.OutOfMemoryError:
        return None


def _disagreement(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """Why a rival did another task than PyTorch; None if it did the same."""
    if len(results) != len(expected):
        return f"gives {len(results)} results where PyTorch gives {len(expected)}"
    for result, truth in zip(results, expected, strict=True):
        if result.shape != truth.shape:
            return f"gives {tuple(result.shape)} where PyTorch gives {tuple(truth.shape)}"
        # Queries that see no key give NaN in some backends.
        difference = (result.nan_to_num() - truth.nan_to_num()).norm(dtype=torch.float32).item()
        size = truth.nan_to_num().norm(dtype=torch.float32).item()
        if not difference <= _AGREEMENT * size:
            return f"differs from PyTorch by {difference:.3g} of {size:.3g}"
    return None


def _measured(entry: Entry, direction: str, provider: Provider) -> Measured | str:
    """The measurement, or why there is none. Our own failures are raised."""
    sets, random = _sets(*entry), "dropout" in dict(entry.case)
    judged = provider.name not in ("fastlm", "eager") and not random
    expected = _expected(*entry, direction) if judged else None
    try:
        if provider.overwrites:
            sets = [copied(inputs) for inputs in sets]
        with provider.during():
            fn = provider.make(entry.kernel)
            if expected is not None:
                first = [copied(sets[0])] if provider.overwrites else sets[:1]
                why = _disagreement(prepared(fn, direction, first)[0](), expected)
                if why is not None:
                    return why
            measured = measure(fn, direction, sets)
        return replace(measured, repeats=None) if random or provider.overwrites else measured
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if provider.name in ("fastlm", "eager"):
            raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def _info(entry: Entry, direction: str, provider: Provider) -> dict[str, Any]:
    """Who was timed on what."""
    case = dict(entry.case)
    return {
        "kernel": f"{entry.kernel.name}.{direction}",
        "direction": direction,
        "provider": provider.name,
        "mode": provider.mode,
        "shape": case_name(case),
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": device.name(),
        "path": _runtime.explain(entry.kernel.fused, **_sets(*entry)[0].arguments).path,
        "checked": True,
    }


def _figures(entry: Entry, direction: str, measured: Measured, ratio: float | None) -> dict[str, Any]:
    """What the measurement says."""
    case, rates, taken = dict(entry.case), device.rates(), measured.seconds.median
    sides = {"forward": [False], "backward": [True], "forward_backward": [False, True]}[direction]
    moved = sum(entry.kernel.traffic(case, DTYPE, side) for side in sides)
    flops = sum(entry.kernel.flops(case, side) for side in sides)
    return {
        "ratio": ratio,
        "seconds": taken,
        "low_seconds": measured.seconds.low,
        "high_seconds": measured.seconds.high,
        "rounds": measured.seconds.rounds,
        "host_seconds": measured.host_seconds,
        "timed_by": measured.timed_by,
        "repeats": measured.repeats,
        "bytes": moved,
        "flops": flops,
        "bytes_per_second": moved / taken,
        "flops_per_second": flops / taken,
        "bandwidth_share": moved / taken / rates.copy_bytes_per_second,
        "matmul_share": flops / taken / rates.matmul_flops_per_second,
        "peak_bytes": measured.peak_bytes,
        "launches": measured.launches,
    }


@pytest.mark.parametrize(
    ("entry", "direction", "provider"),
    [
        pytest.param(
            *planned, id=f"{planned[0].kernel.name}-{case_name(dict(planned[0].case))}-{planned[1]}-{planned[2].name}"
        )
        for planned in plan(GPU)
    ],
)
def test_time(benchmark: Any, entry: Entry, direction: str, provider: Provider) -> None:
    """Check, then time."""
    device.rates()
    _check(*entry)
    benchmark.extra_info.update(_info(entry, direction, provider))
    measured = _measured(entry, direction, provider)
    if isinstance(measured, str):
        benchmark.extra_info.update(ratio=None, seconds=None, reason=measured)
        if GPU:
            # Of what failed on the way much may still be held.
            gc.collect()
            torch.cuda.empty_cache()
        pytest.skip(f"{provider.name}: {measured}")
    measured, ratio = _beside_eager(entry, direction, measured)
    benchmark.extra_info.update(_figures(entry, direction, measured, ratio))
    benchmark.pedantic(measured.call, rounds=5, warmup_rounds=1)


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
