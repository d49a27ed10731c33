"""What a full run asks of the kernels: right on this device, then how fast beside every rival.

Each function yields rows as they come, and lines of text. Ours stands in a row of its own at once, and again with its
baseline, the fastest rival under the same conditions, once all are measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import bench_kernels, bench_optim
from bench.cases import TIMED, Entry
from bench.device import DEVICE, GPU, rates
from bench.plan import FIRST
from bench.providers import providers
from bench.record import Row
from bench.timing import Measured
from fastlm_kernels import _runtime
from fastlm_kernels.check import check_kernel
from fastlm_kernels.optim.steps import bytes_per_parameter
from fastlm_kernels.registry import KERNELS, Case, Kernel, case_name

_ROOT = Path(__file__).parent.parent
_BANDWIDTH_TARGET = 0.9  # of the measured copy rate
_UNFUSED_TIME, _UNFUSED_MEMORY = 1.05, 1 / 8  # of the unfused pair: what linear cross-entropy may take
_FLASH_SHARE = 0.85  # of FlashAttention-2's unordered backward that the deterministic one must reach
# Rows, columns and classes of the heads of 124M and of 7B models.
_HEADS = ((65536, 768, 50304), (8192, 4096, 128256))
_LENGTHS = (1024, 16384, 4096, 2048, 8192)  # of attention, in the order of what they tell
# What a full run has no time for; the benches under pytest have it.
_LEFT_OUT = {"attention": ("compile", "sdpa-efficient-deterministic")}


class Task(NamedTuple):
    """A piece of work, as `plan.Item` has it; `run(seconds)` yields rows and lines of text."""

    name: str
    needs: float
    limit: float | None
    run: Callable[[float], Iterator[Row | str]]
    call: int = FIRST


def tasks() -> dict[str, list[Task]]:
    """The parts that are about kernels."""
    return {
        "check": _check_tasks(),
        "attention": _attention_tasks(),
        "cross_entropy": _cross_entropy_tasks(),
        "norms": _norm_tasks(),
        "adamw": [
            Task(
                f"adamw.{'clipped' if clip else 'step'} {model}",
                6 if GPU else 1,
                60,
                partial(_adamw, model, clip),
                FIRST + number,  # the smallest model first
            )
            for number, model in enumerate(bench_optim.MODELS)
            for clip in bench_optim.CLIPS
        ],
    }


def forget() -> None:
    """Drop the inputs that the timings keep for the providers of one case."""
    for cached in vars(bench_kernels).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def _check_tasks() -> list[Task]:
    """The accuracy rule: in bf16, as training has it, and once in fp32; then fp32 and a GPU's own tests; then fp16."""
    if not GPU:
        return [_check_task(kernel, kernel.small[1], torch.float32, FIRST) for kernel in KERNELS]
    calls = {torch.bfloat16: FIRST, torch.float32: 2, torch.float16: 3}
    found = [
        _check_task(kernel, case, dtype, FIRST if number == 0 and dtype == torch.float32 else call)
        for dtype, call in calls.items()
        for kernel in KERNELS
        for number, case in enumerate(kernel.small)
    ]
    return found + list(_gpu_test_tasks())


def _check_task(kernel: Kernel, case: Case, dtype: torch.dtype, call: int) -> Task:
    name = f"check.{kernel.name} {_short(dtype)} {case_name(case)}"
    return Task(name, 3 if GPU else 0, 90, partial(_checked, kernel, case, dtype), call)


def _attention_tasks() -> list[Task]:
    """The length of training, and the longest; then those between."""
    calls = {(1024, 64): FIRST, (1024, 128): FIRST, (16384, 128): FIRST, (4096, 64): 2, (4096, 128): 2}

    def call(case: Case) -> int:
        return calls.get((case["rows"], case["columns"]), 3)

    return _timing_tasks("scaled_dot_product_attention", {"forward": 6, "backward": 9}, _plain_attention, call)


def _cross_entropy_tasks() -> list[Task]:
    """The head of 124M and its logits; then a 7B model's head; then every vocabulary."""

    def call(case: Case) -> int:
        return FIRST if (case["rows"], case["columns"]) == (8192, 50304) else 3

    heads = _HEADS if GPU else _HEADS[:1]
    found = [
        task
        for number, head in enumerate(heads)
        for task in _timing_tasks(
            "linear_cross_entropy",
            {"forward_backward": 20},
            partial(_head, sizes=head),
            lambda _, number=number: FIRST + number,
        )
    ]
    return found + _timing_tasks("cross_entropy", {"forward": 8, "forward_backward": 8}, _many_rows, call)


def _norm_tasks() -> list[Task]:
    """The two norms at 124M's width; then those with a residual added, and other widths, one after another."""
    widths = (768, 4096, 8192, 1024, 2048) if GPU else (None,)
    norms = {"layer_norm": FIRST, "rms_norm": FIRST, "add_layer_norm": 3, "add_rms_norm": 3}

    def wanted(case: Case, width: int | None) -> bool:
        return case["rows"] == 65536 and case["columns"] == width

    return [
        task
        for number, width in enumerate(widths)
        for name, call in norms.items()
        for task in _timing_tasks(
            name,
            {"forward": 6, "backward": 6},
            partial(wanted, width=width),
            lambda _, call=call if number == 0 else 3: call,
        )
    ]


def _checked(kernel: Kernel, case: Case, dtype: torch.dtype, seconds: float) -> Iterator[Row | str]:
    """The accuracy rule on one case: the worst error over the one allowed."""
    errors = check_kernel(kernel, case, dtype, DEVICE)
    path = _runtime.explain(kernel.fused, **kernel.inputs(dtype, DEVICE, 0, **case)).path
    worst = max(max(e.worst / e.worst_allowed, e.rms / e.rms_allowed) for e in errors)
    bad = [e for e in errors if not e.ok]
    provider = "fastlm" if path == "triton" else "torch"
    yield Row(
        f"check.{kernel.name}",
        case_name(case),
        _short(dtype),
        provider,
        worst,
        "of the error allowed",
        False,
        target=1.0,
        checked=not bad,
    )
    if bad:
        yield f"WRONG {kernel.name} {_short(dtype)} {case_name(case)}: {bad[0]}"


def _gpu_test_tasks() -> Iterator[Task]:
    """The test suite's own facts about a GPU, kernel by kernel: graph replay, no waiting in compiled code."""
    for kernel in KERNELS:
        yield Task(f"check.gpu_tests {kernel.name}", 30, 240, partial(_gpu_tests, kernel), 2)


def _gpu_tests(kernel: Kernel, seconds: float) -> Iterator[Row | str]:
    longer = [other.name for other in KERNELS if kernel.name in other.name and other is not kernel]
    chosen = " and not ".join([kernel.name, *longer])
    command = [sys.executable, "-m", "pytest", "tests/test_every_kernel.py", "-m", "needs_gpu", "-q", "-k", chosen]
    command += ["-p", "no:cacheprovider", "--tb=line", "--no-header"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=max(10.0, seconds), check=False)
    passed, failed = (_count(done.stdout, word) for word in ("passed", "failed"))
    failed += _count(done.stdout, "error") + _count(done.stdout, "errors")
    if passed + failed == 0:
        raise RuntimeError(f"no test ran: {(done.stdout + done.stderr).strip()[-250:]}")
    yield Row(
        "check.gpu_tests", kernel.name, "", "fastlm", failed, "failed tests", False, target=0, checked=failed == 0
    )
    if failed:
        yield f"FAILED tests of {kernel.name}: {done.stdout.strip()[-600:]}"


def _count(report: str, word: str) -> int:
    found = re.search(rf"(\d+) {word}\b", report.splitlines()[-1] if report.strip() else "")
    return int(found[1]) if found else 0


def _plain_attention(case: Case) -> bool:
    return case.get("causal") is True and set(case) == {"rows", "columns", "batch", "heads", "kv_heads", "causal"}


def _head(case: Case, sizes: tuple[int, int, int]) -> bool:
    return (case["rows"], case["columns"], case["classes"]) == sizes


def _many_rows(case: Case) -> bool:
    return case["rows"] >= 8192 and case["columns"] >= 50304


def _timing_tasks(
    name: str, directions: Mapping[str, float], wanted: Callable[[Case], bool], call: Callable[[Case], int]
) -> list[Task]:
    """One task a case and direction (with the seconds it needs): the wanted cases on a GPU, the smallest on a CPU."""
    index = next(i for i, kernel in enumerate(TIMED) if kernel.name == name)
    kernel = TIMED[index]
    cases = [case for case in kernel.large if wanted(case)] if GPU else kernel.quick[:1]
    if name == "scaled_dot_product_attention":
        cases = sorted(
            cases, key=lambda case: _LENGTHS.index(case["rows"]) if case["rows"] in _LENGTHS else len(_LENGTHS)
        )
    public = "attention" if name == "scaled_dot_product_attention" else name
    return [
        Task(
            f"{public}.{direction} {case_name(case)}",
            needs if GPU else 1,
            90,
            partial(_timed, public, Entry(index, tuple(case.items())), direction),
            call(case) if GPU else FIRST,
        )
        for case in cases
        for direction, needs in directions.items()
    ]


def _timed(public: str, entry: Entry, direction: str, seconds: float) -> Iterator[Row | str]:
    """Check ours, then measure everybody: TFLOP/s where products dominate, else GB/s of what must move."""
    bench_kernels._check(*entry)
    found: dict[str, tuple[Row, str]] = {}
    memory: dict[str, int] = {}
    for provider in providers(entry.kernel, dict(entry.case), direction, GPU):
        if provider.name in _LEFT_OUT.get(public, ()) or (provider.name == "sdpa-math" and not _math_fits(entry)):
            continue
        measured = bench_kernels._measured(entry, direction, provider)
        if isinstance(measured, str):
            yield f"{public}.{direction} {case_name(dict(entry.case))}, {provider.name}: {measured}"
            continue
        row = _rate(public, entry, direction, provider.name, measured)
        found[provider.name] = row, provider.mode
        if measured.peak_bytes is not None:
            memory[provider.name] = measured.peak_bytes
        yield row
        del measured
    yield from _judged(public, entry, direction, found)
    if direction == "forward_backward":
        yield from _memory_rows(public, entry, memory)


def _math_fits(entry: Entry) -> bool:
    """The written-out scores of more rows take seconds and tens of GB, and no one would use them."""
    return dict(entry.case)["rows"] <= 2048


def _rate(public: str, entry: Entry, direction: str, provider: str, measured: Measured) -> Row:
    case, taken = dict(entry.case), measured.seconds.median
    sides = {"forward": [False], "backward": [True], "forward_backward": [False, True]}[direction]
    if public in ("attention", "linear_cross_entropy"):
        value, unit = sum(entry.kernel.flops(case, side) for side in sides) / taken / 1e12, "TFLOP/s"
    else:
        value = sum(entry.kernel.traffic(case, bench_kernels.DTYPE, side) for side in sides) / taken / 1e9
        unit = "GB/s"
    dtype = _short(bench_kernels.DTYPE)
    return Row(f"{public}.{direction}", case_name(case), dtype, provider, value, unit, True, checked=True)


def _judged(public: str, entry: Entry, direction: str, found: dict[str, tuple[Row, str]]) -> Iterator[Row]:
    """Ours again, beside the fastest rival and the target.

    A deterministic backward of attention is compared with deterministic ones, the other with everyone's default.
    """
    rivals = {name: (row.value or 0.0, mode) for name, (row, mode) in found.items() if not name.startswith("fastlm")}
    for name in ("fastlm", "fastlm-unordered"):
        if name not in found:
            continue
        ours, own_mode = found[name]
        alike = public != "attention" or direction == "forward"
        values = [value for value, mode in rivals.values() if alike or mode == own_mode]
        baseline = max(values, default=None)
        ratio = ours.value / baseline if baseline and ours.value is not None else None
        target = _target(public, entry, direction, name, baseline, {n: value for n, (value, _) in rivals.items()})
        yield Row(**{**vars(ours), "baseline": baseline, "ratio": ratio, "target": target})


def _target(
    public: str, entry: Entry, direction: str, name: str, baseline: float | None, rivals: dict[str, float]
) -> float | None:
    """What DESIGN and the kernels' issues ask of ours, in the row's unit; None on a CPU."""
    if not GPU:
        return None
    if public == "linear_cross_entropy":
        return rivals["eager"] / _UNFUSED_TIME if "eager" in rivals else None
    if public != "attention":
        return _BANDWIDTH_TARGET * rates().copy_bytes_per_second / 1e9
    flash = rivals.get("sdpa-flash", 0.0)
    if direction == "forward":
        best = max(flash, rivals.get("sdpa-cudnn", 0.0))
        return (best if dict(entry.case)["columns"] <= 64 else 0.9 * best) or None
    if name == "fastlm-unordered":
        return flash or None
    return max(baseline or 0.0, _FLASH_SHARE * flash) or None


def _memory_rows(public: str, entry: Entry, memory: dict[str, int]) -> Iterator[Row]:
    """Peak bytes beyond the inputs; linear cross-entropy's without the weight gradient, which everyone must have."""
    case = dict(entry.case)
    common = case["columns"] * case["classes"] * bench_kernels.DTYPE.itemsize if "classes" in case else 0
    baseline = memory["eager"] - common if "eager" in memory else None
    for provider, peak in memory.items():
        value, ours = peak - common, provider == "fastlm" and baseline is not None
        yield Row(
            f"{public}.peak_memory",
            case_name(case),
            _short(bench_kernels.DTYPE),
            provider,
            value,
            "bytes",
            False,
            baseline if ours else None,
            baseline / max(value, 1) if ours and baseline is not None else None,
            _UNFUSED_MEMORY * baseline if ours and baseline is not None and "classes" in case else None,
            True,
        )


def _adamw(model: str, clip: float | None, seconds: float) -> Iterator[Row | str]:
    """One step over all parameters of a model: GB/s of the bytes that ours must move."""
    bench_optim._check(clip)
    name, rows = "adamw.clipped" if clip else "adamw.step", {}
    for provider in bench_optim.PROVIDERS:
        _, taken, _, elements = bench_optim._measure(provider, model, clip)
        moved = elements * bytes_per_parameter("AdamW", {"max_grad_norm": clip}, torch.float32)
        rows[provider] = Row(name, model, "float32", provider, moved / taken / 1e9, "GB/s", True, checked=True)
        yield rows[provider]
    ours, baseline = rows["fastlm"].value, rows["fused"].value
    target = _BANDWIDTH_TARGET * rates().copy_bytes_per_second / 1e9 if GPU else None
    yield Row(**{**vars(rows["fastlm"]), "baseline": baseline, "ratio": ours / baseline, "target": target})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
