"""What a full run asks of training: one update beside the plain baseline's, memory, and the way to a loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench import learning, training
from bench.device import DEVICE, GPU
from bench.kernel_items import Task
from bench.plan import FIRST
from bench.record import Row
from bench.training import Comparison, Contender, Workload

TARGET_TOKENS_PER_SECOND = 650_000  # 124M class on one H200, 524,288 tokens an update
TARGET_MFU = 0.55  # 350M and 1.5B
TARGET_SEQUENCES = 2  # times the baseline's largest micro-batch
# Sequences an update: all 512 at 124M, fewer where four of those would take a minute.
_LARGER = {"gpt2-medium": 128, "gpt2-xl": 64, "modern-350m": 128, "modern-1.5b": 128}
_MEMORY_SHARE = 0.95  # that a largest micro-batch may take
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
        large = [Task(f"{_CLASSES[p]} {p}", 1, None, partial(_not_measured, p)) for p in ("modern-124m", *_LARGER)]
        first = Task("train_124m gpt2", 1, None, partial(_not_measured, "gpt2"))
        return {
            "train_124m": [small, first],
            "train_larger": large,
            "time_to_loss": [_race_task(learning.SMALL, 4, FIRST)],
        }
    return {
        "train_124m": [
            Task("train_124m gpt2", 140, None, partial(_compared, "gpt2", None)),
            Task("train_124m triton-attention", 95, 150, _triton_attention, 2),
            Task("train_124m best-baseline", 220, 260, partial(_compared, "gpt2", None), 2),
            Task("train_124m modern-124m", 150, 260, partial(_compared, "modern-124m", None), 3),
            Task("train_124m memory", 220, 300, _memory, 3),
        ],
        "train_larger": _larger_tasks(),
        "time_to_loss": [_race_task(learning.LARGE, 40, FIRST), _race_task(learning.LARGE, 120, 3)],
    }


def _larger_tasks() -> list[Task]:
    """GPT-2's sizes by ours alone, for the MFU wanted; then the modern ones; then each beside the baseline."""
    alone = {"gpt2-medium": (55, FIRST), "gpt2-xl": (70, FIRST), "modern-350m": (60, 3), "modern-1.5b": (100, 3)}
    beside = {"gpt2-medium": 180, "gpt2-xl": 300, "modern-350m": 180, "modern-1.5b": 320}  # compiled whole

    def task(preset: str, needs: float, run: Callable[..., Iterator[Row | str]], call: int, suffix: str = "") -> Task:
        return Task(f"{_CLASSES[preset]} {preset}{suffix}", needs, None, partial(run, preset, _LARGER[preset]), call)

    return [task(preset, needs, _alone, call) for preset, (needs, call) in alone.items()] + [
        task(preset, needs, _compared, 4, "-beside-the-baseline") for preset, needs in beside.items()
    ]


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
    """`_figures` of both, and on a GPU how large a micro-batch of 124M fits.

    A ratio that does not count is left out.
    """
    valid, _ = found.verdict()
    yield _speed(found.work, found.baseline)
    yield from _figures(found.work, found.ours, found.baseline, found.ratio, valid=valid)
    if GPU and found.work.preset == "gpt2":
        lines = map(_line, (found.ours, found.baseline))
        yield from _largest(*lines, how="from one peak and what is held at any size")


def _line(contender: Contender) -> tuple[float, float] | None:
    """(bytes held at any micro-batch, bytes a sequence) by what was measured at one size."""
    assert contender.peak_bytes is not None
    assert contender.fixed_bytes is not None
    return training.bytes_per_sequence([(0, contender.fixed_bytes), (contender.micro_batch_size, contender.peak_bytes)])


def _alone(preset: str, batch_size: int, seconds: float) -> Iterator[Row | str]:
    """One update of ours, without a rival: its MFU takes half the time."""
    work = training.workload(preset, DEVICE, batch_size=batch_size)
    yield from (f"{preset}: {line}" for line in work.decisions)
    ours = training.start_ours(work)
    yield from _figures(work, ours)
    training.interleave([ours], work, rounds=3, updates=2)
    yield from _figures(work, ours)


def _figures(
    work: Workload,
    ours: Contender,
    baseline: Contender | None = None,
    ratio: float | None = None,
    *,
    valid: bool = True,
) -> Iterator[Row]:
    """Speed, MFU in both conventions, peak memory, compile time and time to the first step; ours beside theirs.

    `ratio` is that of the speeds, round by round.
    """
    name, shape, dtype = _CLASSES[work.preset], _shape(work, ours), _dtype(work)
    speed, rival_speed = (None if c is None else work.tokens / c.median for c in (ours, baseline))
    on_124m = work.preset in training.CLASS_124M

    def row(what: str, value: float | None, unit: str, higher: bool, rival: float | None, **more: float | None) -> Row:
        ratio = None if not value or not rival else (value / rival if higher else rival / value)
        more = {"ratio": ratio if valid else None} | more
        return Row(f"{name}.{what}", shape, dtype, "fastlm", value, unit, higher, rival, checked=True, **more)

    def theirs(figure: str) -> float | None:
        return None if baseline is None else getattr(baseline, figure)

    target = TARGET_TOKENS_PER_SECOND if GPU and on_124m else None
    ratio = ratio if valid else None
    yield row("tokens_per_second", speed, "tokens/s", True, rival_speed, ratio=ratio, target=target)
    for what, causal in (("mfu", False), ("mfu_causal", True)):
        mfu, rival = (None if s is None else work.mfu(s, causal=causal) for s in (speed, rival_speed))
        wanted = TARGET_MFU if GPU and not on_124m and not causal else None
        yield row(what, mfu, "share of the dense bf16 peak", True, rival, target=wanted)
    yield row("peak_memory", ours.peak_bytes, "bytes", False, theirs("peak_bytes"))
    if work.cfg.train.compile:
        yield row("compile_seconds", ours.compile_seconds, "s", False, theirs("compile_seconds"))
    if GPU:  # a speed without them is none of the step that is meant
        for what, used in (("compiled", work.cfg.train.compile), ("cuda_graphs", work.cfg.train.cuda_graphs)):
            yield row(what, float(bool(used)), "of 1", True, None, target=1.0)
    yield row("first_step_seconds", ours.first_step_seconds, "s", False, theirs("first_step_seconds"))


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
    """Peak memory at two micro-batches each: what a sequence takes, and how many would fill the device."""
    lines: list[tuple[float, float] | None] = []
    for start in (training.start_ours, lambda work: training.start_plain(work, work.cfg.train.batch_size)):
        peaks: list[tuple[int, int]] = []
        for size in (16, 32):
            torch._dynamo.reset()
            contender = start(training.workload("gpt2", DEVICE, batch_size=size, micro_batch_size=size))
            assert contender.peak_bytes is not None
            peaks.append((size, contender.peak_bytes))
            del contender
        lines.append(training.bytes_per_sequence(peaks))
    yield from _largest(*lines, how="from two peaks")


def _largest(ours: tuple[float, float] | None, baseline: tuple[float, float] | None, *, how: str) -> Iterator[Row]:
    """The micro-batch that would fill the device, read off each one's line (held at any size, a sequence), not run."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    assert ours is not None
    assert baseline is not None
    for provider, (_, slope) in {"baseline": baseline, "fastlm": ours}.items():
        yield Row("train_124m.bytes_per_sequence", "gpt2-T1024", "bfloat16", provider, slope, "bytes", False)
    mine, theirs = (math.floor((_MEMORY_SHARE * total - fixed) / slope) for fixed, slope in (ours, baseline))
    yield Row(
        "train_124m.largest_micro_batch",
        "gpt2-T1024",
        "bfloat16",
        "fastlm",
        mine,
        f"sequences in {_MEMORY_SHARE:.0%} of the memory, {how}",
        True,
        theirs,
        mine / theirs if theirs > 0 else None,
        TARGET_SEQUENCES * theirs,
        True,
    )


def _race_task(course: learning.Race, needs: float, call: int) -> Task:
    """In the first call eagerly on a GPU, for the tokens alone: compiling would take longer than the way."""
    size, eager = f"L{course.layers}-D{course.width}-T{course.seq_len}", GPU and call == FIRST
    name = f"time_to_loss {size}" + ("-compiled" if GPU and not eager else "")
    return Task(name, needs, None, partial(_raced, course, size, eager), call)


def _raced(course: learning.Race, size: str, eager: bool, seconds: float) -> Iterator[Row | str]:
    """Tokens and seconds of each recipe to the same validation loss; of eager ones the tokens."""
    device, limit = torch.device(DEVICE), min(60.0, 0.3 * seconds)
    compiles = False if eager else None
    recipes = course.recipes()
    ours, baseline = (learning.race(course, recipe, device, seconds=limit, compiles=compiles) for recipe in recipes)
    shape = f"{size}-loss{course.target:g}, {' against '.join(recipe.name for recipe in recipes)}"
    dtype = "bfloat16" if GPU else "float32"
    for what, unit in (("tokens", "tokens"), ("seconds", "s"))[: 1 if eager else 2]:
        mine, theirs = (getattr(finish, what) if finish.reached else None for finish in (ours, baseline))
        name = f"time_to_loss.{what}"
        yield Row(name, shape, dtype, "baseline", theirs, unit, False, checked=True)
        ratio = theirs / mine if mine and theirs else None
        yield Row(name, shape, dtype, "fastlm", mine, unit, False, theirs, ratio, checked=True)
    for recipe, finish in zip(recipes, (ours, baseline), strict=True):
        if not finish.reached:
            yield f"{recipe.name} stood at {finish.loss:.3f} after {finish.seconds:.0f} s, {course.target:g} wanted"
