"""Schedules as functions of the step."""

import itertools
import math

import pytest

from fastlm.config import OptimConfig
from fastlm.schedule import multiplier

NAMES = ("constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd")


def curve(steps: int = 100, **options: object) -> list[float]:
    cfg = OptimConfig(**options)  # type: ignore[arg-type]
    return [multiplier(cfg, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_never_starts_at_zero_and_rises_evenly(name: str):
    rise = curve(schedule=name, warmup_steps=9, min_lr_ratio=0.1)[:9]
    assert rise == pytest.approx([k / 10 for k in range(1, 10)])


@pytest.mark.parametrize("name", NAMES)
def test_after_warm_up_it_starts_at_the_peak_and_never_rises(name: str):
    falling = curve(schedule=name, warmup_steps=10, min_lr_ratio=0.1)[10:]
    assert falling[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert min(falling) >= 0.1


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "wsd"])
def test_the_end_is_min_lr_ratio(name: str):
    cfg = OptimConfig(schedule=name, warmup_steps=10, min_lr_ratio=0.1)  # type: ignore[arg-type]
    assert multiplier(cfg, 100, 100) == pytest.approx(0.1)
    assert multiplier(cfg, 99, 100) > 0.1
    assert multiplier(cfg, 10_000, 100) == pytest.approx(0.1), "a longer run stays at the floor"


def test_cosine_has_nanogpts_values():
    """100 warm-up steps of 2000 from 1e-3 to 1e-4: the first update runs at 1e-3 / 101."""
    cfg = OptimConfig(schedule="cosine", warmup_steps=100, min_lr_ratio=0.1)
    assert 1e-3 * multiplier(cfg, 0, 2000) == pytest.approx(1e-3 / 101)
    half = 1e-4 + 0.5 * (1 + math.cos(math.pi * 0.5)) * 9e-4
    assert 1e-3 * multiplier(cfg, 1050, 2000) == pytest.approx(half)


def test_wsd_is_flat_then_linear():
    flat = curve(schedule="wsd", decay_fraction=0.6)
    assert flat[:41] == [1.0] * 41
    assert flat[70] == pytest.approx(0.5)


def test_inverse_sqrt_halves_when_the_step_count_quadruples():
    cfg = OptimConfig(schedule="inverse_sqrt", warmup_steps=99)
    assert multiplier(cfg, 99 + 300, 10_000) == pytest.approx(0.5)


def test_one_step_runs_trains_at_the_peak():
    assert curve(1, schedule="cosine") == [1.0]
