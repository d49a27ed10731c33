"""What a full run asks of training: one update beside the plain baseline's, memory, and the way to a loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial

import torch

from bench import learning, training
from bench.device import DEVICE, GPU
from bench.kernel_items import Task
from bench.record import Row
from bench.training import Comparison, Contender, Workload

TARGET_TOKENS_PER_SECOND = 650_000  # 124M class on one H200, 524,288 tokens an update
TARGET_MFU = 0.55  # 350M and 1.5B
TARGET_SEQUENCES = 2  # times the baseline's largest micro-batch
# Sequences an update: all 512 at 124M, fewer where four of those would take a minute.
_LARGER = {"gpt2-medium": 256, "modern-350m": 256, "gpt2-xl": 64, "modern-1.5b": 64}
_CLASSES = {
    "nanogpt-cpu": "train_nanogpt_cpu",
    **dict.fromkeys(("gpt2", "modern-124m"), "train_124m"),
    **dict.fromkeys(("gpt2-medium", "modern-350m"), "train_350m"),
    **dict.fromkeys(("gpt2-xl", "modern-1.5b"), "train_1.5b"),
}


def tasks() -> dict[str, list[Task]]:
    """The parts that are about training; on a CPU the small preset, and the others as not measured."""
    if not GPU:
        small = Task("train_nanogpt_cpu nanogpt-cpu", 5, None, partial(_compared, "nanogpt-cpu", None))
        large = [Task(f"{_CLASSES[p]} {p}", 0, None, partial(_not_measured, p)) for p in ("modern-124m", *_LARGER)]
        first = Task("train_124m gpt2", 0, None, partial(_not_measured, "gpt2"))
        return {"train_124m": [small, first], "train_larger": large, "time_to_loss": [_race_task(learning.SMALL)]}
    return {
        "train_124m": [
            Task("train_124m gpt2", 60, None, partial(_compared, "gpt2", None)),
            Task("train_124m triton-attention", 80, None, _triton_attention),
            Task("train_124m modern-124m", 120, None, partial(_compared, "modern-124m", None)),
            Task("train_124m memory", 120, None, _memory),
        ],
        "train_larger": [
            Task(f"{_CLASSES[preset]} {preset}", 120, None, partial(_compared, preset, batch_size))
            for preset, batch_size in _LARGER.items()
        ],
        "time_to_loss": [_race_task(learning.LARGE)],
    }


def _not_measured(preset: str, seconds: float) -> Iterator[Row]:
    target = TARGET_TOKENS_PER_SECOND if preset == "gpt2" else None
    name = f"{_CLASSES[preset]}.tokens_per_second"
    yield Row(name, preset, "bfloat16", "fastlm", None, "tokens/s", True, target=target)


def _shape(work: Workload, contender: Contender) -> str:
    train = work.cfg.train
    return f"{work.preset}-T{work.cfg.data.seq_len}-batch{train.batch_size}-micro{contender.micro_batch_size}"


def _dtype(work: Workload) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[work.cfg.train.precision]


def _speed(work: Workload, contender: Contender, provider: str | None = None) -> Row:
    """Tokens a second as seen so far."""
    name, value = f"{_CLASSES[work.preset]}.tokens_per_second", work.tokens / contender.median
    provider = provider or contender.provider
    return Row(name, _shape(work, contender), _dtype(work), provider, value, "tokens/s", True, checked=True)


def _compared(preset: str, batch_size: int | None, seconds: float) -> Iterator[Row | str]:
    """One update of ours and of the baseline's; rows already after the first round."""
    begin, work = time.monotonic(), training.workload(preset, DEVICE, batch_size=batch_size)
    verdict = ""
    yield from (f"{preset}: {line}" for line in work.decisions)
    for found in training.compare(work, rounds=5, updates=2 if GPU else 5, seconds=seconds):
        if isinstance(found, Contender):
            yield _speed(work, found)
        else:
            yield from comparison_rows(found)
            verdict = found.verdict()[1]
    yield f"{preset}: {time.monotonic() - begin:.0f} s; {verdict}"


def comparison_rows(found: Comparison) -> Iterator[Row]:
    """Speed, MFU in both conventions, peak memory, compile time and time to the first step; ours beside theirs.

    A ratio that does not count is left out.
    """
    work, ours, baseline = found.work, found.ours, found.baseline
    name, shape, dtype = _CLASSES[work.preset], _shape(work, ours), _dtype(work)
    valid, _ = found.verdict()
    speeds = found.tokens_per_second(ours), found.tokens_per_second(baseline)
    on_124m = work.preset in training.CLASS_124M
    target = TARGET_TOKENS_PER_SECOND if GPU and on_124m else None

    def row(what: str, value: float | None, unit: str, higher: bool, rival: float | None, **more: float | None) -> Row:
        ratio = None if not value or not rival else (value / rival if higher else rival / value)
        more = {"ratio": ratio if valid else None} | more
        return Row(f"{name}.{what}", shape, dtype, "fastlm", value, unit, higher, rival, checked=True, **more)

    yield _speed(work, baseline)
    ratio = found.ratio if valid else None
    yield row("tokens_per_second", speeds[0], "tokens/s", True, speeds[1], ratio=ratio, target=target)
    for what, causal in (("mfu", False), ("mfu_causal", True)):
        mfu, rival = (work.mfu(speed, causal=causal) for speed in speeds)
        wanted = TARGET_MFU if GPU and not on_124m and not causal else None
        yield row(what, mfu, "share of the dense bf16 peak", True, rival, target=wanted)
    yield row("peak_memory", ours.peak_bytes, "bytes", False, baseline.peak_bytes)
    if work.cfg.train.compile:
        yield row("compile_seconds", ours.compile_seconds, "s", False, baseline.compile_seconds)
    if GPU:  # a speed without them is none of the step that is meant
        for what, used in (("compiled", work.cfg.train.compile), ("cuda_graphs", work.cfg.train.cuda_graphs)):
            yield row(what, float(bool(used)), "of 1", True, None, target=1.0)
    yield row("first_step_seconds", ours.first_step_seconds, "s", False, baseline.first_step_seconds)


def _triton_attention(seconds: float) -> Iterator[Row | str]:
    """Ours with each of the two attentions, in turn: which one `auto` should take."""
    found: list[Contender] = []
    for attention in ("sdpa", "triton"):
        work = training.workload("gpt2", DEVICE, attention=attention, micro_batch_size=64)
        found.append(training.start_ours(work))
        yield _speed(work, found[-1], f"fastlm-{attention}-attention")
    training.interleave(found, work, rounds=5, updates=2)
    sdpa, triton = found
    yield _speed(work, sdpa, "fastlm-sdpa-attention")
    row = _speed(work, triton, "fastlm-triton-attention")
    ratio = training.median_ratio(triton, sdpa)
    yield Row(**{**vars(row), "baseline": work.tokens / sdpa.median, "ratio": ratio})


def _memory(seconds: float) -> Iterator[Row | str]:
    """Peak memory at two micro-batches each: what a sequence takes, and how many would fill the device.

    The number that fills it is read off the line through the two peaks, not run.
    """
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    largest: dict[str, float] = {}
    for provider in ("baseline", "fastlm"):
        peaks: list[tuple[int, int]] = []
        for size in (16, 32):
            torch._dynamo.reset()
            work = training.workload("gpt2", DEVICE, batch_size=size, micro_batch_size=size)
            contender = training.start_plain(work, size) if provider == "baseline" else training.start_ours(work)
            assert contender.peak_bytes is not None
            peaks.append((size, contender.peak_bytes))
            del contender
        line = training.bytes_per_sequence(peaks)
        assert line is not None
        largest[provider] = (0.95 * total - line[0]) / line[1]
        yield Row("train_124m.bytes_per_sequence", "gpt2-T1024", "bfloat16", provider, line[1], "bytes", False)
    ours, baseline = largest["fastlm"], largest["baseline"]
    yield Row(
        "train_124m.largest_micro_batch",
        "gpt2-T1024",
        "bfloat16",
        "fastlm",
        math.floor(ours),
        "sequences in 95 % of the memory, from two peaks",
        True,
        math.floor(baseline),
        ours / baseline,
        TARGET_SEQUENCES * math.floor(baseline),
        True,
    )


def _race_task(course: learning.Race) -> Task:
    size = f"L{course.layers}-D{course.width}-T{course.seq_len}"
    return Task(f"time_to_loss {size}", 80 if GPU else 4, None, partial(_raced, course, size))


def _raced(course: learning.Race, size: str, seconds: float) -> Iterator[Row | str]:
    """Tokens and seconds of each contender to the same validation loss."""
    device = torch.device(DEVICE)
    limit = min(60.0, 0.3 * seconds)
    ours, baseline = (learning.race(course, recipe, device, seconds=limit) for recipe in course.recipes())
    shape, dtype = f"{size}-loss{course.target:g}", "bfloat16" if GPU else "float32"
    for what, unit in (("tokens", "tokens"), ("seconds", "s")):
        mine, theirs = (getattr(finish, what) if finish.reached else None for finish in (ours, baseline))
        name = f"time_to_loss.{what}"
        yield Row(name, shape, dtype, "baseline", theirs, unit, False, checked=True)
        ratio = theirs / mine if mine and theirs else None
        yield Row(name, shape, dtype, "fastlm", mine, unit, False, theirs, ratio, checked=True)
    for finish in (ours, baseline):
        if not finish.reached:
            yield f"{finish.provider} stood at {finish.loss:.3f} after {finish.seconds:.0f} s, {course.target:g} wanted"
