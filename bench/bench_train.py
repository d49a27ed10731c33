"""One update of training, ours beside a plain model of the same shape.   pytest bench --benchmark-only

For each preset that the device can hold: the trainer's own step (model, optimizer and policy as `fastlm.train` resolves
them) and the baseline (`baseline`: torch.compile + SDPA + fused AdamW, at its best micro-batch), in one process, in
turn. On a CPU the preset `nanogpt-cpu` in eager fp32; what has to be timed on a GPU is skipped there.

`extra_info` holds
    kernel, provider, shape, dtype, ratio   "train_step"; "fastlm" or "baseline"; preset, length, batch, micro-batch;
                       the median over rounds of the baseline's time over ours, None for one that does not count
    valid, validity    whether the ratio counts: at 124M on an H200 only against a baseline of 470k tokens/s
    tokens_per_second, seconds, seconds_by_round
    mfu, mfu_causal    of the device's dense bf16 peak, 6 N + 12 L D T and 6 N + 6 L D T FLOPs a token
    peak_bytes         device memory for model, optimizer and update; None on a CPU
    first_step_seconds, compile_seconds, compiled, device; of ours cuda_graphs, attention, kernels and `decisions`
and for "time_to_loss": tokens and seconds of updates until the validation loss, `reached`, `loss`, `recipe`.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import pytest
import torch

from bench import device, training
from bench.device import DEVICE, GPU
from bench.learning import LARGE, SMALL, Finish, race
from bench.training import Comparison

_ROUNDS, _UPDATES = (5, 2) if GPU else (5, 5)
_COURSE = LARGE if GPU else SMALL
_NOT_HERE = "not measured: needs a GPU that holds it"
_LONGEST_SECONDS = 120.0 if GPU else 20.0  # of one contender's updates on the way to a loss


@functools.lru_cache(maxsize=1)
def _comparison(preset: str) -> Comparison:
    """Both contenders, timed in turn; the last preset's are kept."""
    steps = training.compare(training.workload(preset, DEVICE), rounds=_ROUNDS, updates=_UPDATES)
    last = deque(steps, maxlen=1).pop()
    assert isinstance(last, Comparison)
    return last


@pytest.mark.parametrize("provider", ["fastlm", "baseline"])
@pytest.mark.parametrize("preset", training.PRESETS)
def test_train_step(benchmark: Any, preset: str, provider: str) -> None:
    """Check that both compute one function, then time both in turn."""
    if not training.fits(preset, torch.device(DEVICE)):
        info = {"kernel": "train_step", "provider": provider, "shape": preset, "dtype": "bfloat16", "ratio": None}
        benchmark.extra_info.update(info, seconds=None, reason=_NOT_HERE, device=device.name())
        pytest.skip(_NOT_HERE)
    if provider == "fastlm":
        _comparison.cache_clear()  # the last preset's models must be gone before this one's are made
    found = _comparison(preset)
    contender = found.ours if provider == "fastlm" else found.baseline
    benchmark.extra_info.update(found.facts(contender), device=device.name())
    batch = found.work.batch(2)

    def update() -> None:
        contender.step(*batch)
        training.wait(found.work.device)

    benchmark.pedantic(update, rounds=2)


@functools.cache
def _finishes() -> dict[str, Finish]:
    found = (race(_COURSE, recipe, torch.device(DEVICE), seconds=_LONGEST_SECONDS) for recipe in _COURSE.recipes())
    return {finish.provider: finish for finish in found}


@pytest.mark.parametrize("provider", ["fastlm", "baseline"])
def test_time_to_loss(benchmark: Any, provider: str) -> None:
    """The modern family with Muon, and GPT-2's with AdamW, on the same text to the same loss."""
    finishes = _finishes()
    finish, rival = finishes[provider], finishes["baseline"]
    benchmark.extra_info.update(
        kernel="time_to_loss",
        provider=provider,
        recipe={recipe.provider: recipe.name for recipe in _COURSE.recipes()}[provider],
        shape=f"L{_COURSE.layers}-D{_COURSE.width}-T{_COURSE.seq_len}-loss{_COURSE.target:g}",
        dtype="bfloat16" if GPU else "float32",
        ratio=rival.seconds / finish.seconds if finish.reached and rival.reached else None,
        tokens=finish.tokens,
        seconds=finish.seconds,
        loss=finish.loss,
        reached=finish.reached,
        device=device.name(),
    )
    benchmark.pedantic(lambda: None, rounds=1)
