"""Step -> learning-rate multiplier: pure functions, no state to save."""

from __future__ import annotations

import math

from fastlm.config import OptimConfig


def multiplier(cfg: OptimConfig, step: int, total_steps: float) -> float:
    """The factor on every learning rate for update `step` (0-based) of `total_steps`.

    Warm-up rises as (step + 1) / (warmup_steps + 1), so that no update has rate 0; then the schedule falls from 1
    towards `min_lr_ratio`, which it would reach at step `total_steps`.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = step - cfg.warmup_steps
    progress = min(1.0, done / max(1.0, total_steps - cfg.warmup_steps))
    if cfg.schedule == "exponential":  # the one shape that can only reach its end as a ratio
        return cfg.min_lr_ratio**progress
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * _shape(cfg, progress, done)


def _shape(cfg: OptimConfig, progress: float, done: int) -> float:
    """The schedule between 1 and 0 at `progress` in [0, 1], `done` updates after the warm-up."""
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "linear":
        return 1.0 - progress
    if cfg.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if cfg.schedule == "inverse_sqrt":
        return math.sqrt((cfg.warmup_steps + 1) / (cfg.warmup_steps + 1 + done))
    assert cfg.schedule == "wsd"  # warm-up, stable, decay
    return min(1.0, (1.0 - progress) / cfg.decay_fraction)
