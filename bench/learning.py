"""Time to a loss: how many tokens and seconds each contender takes to the same validation loss.

The text is Python's standard library as bytes (vocabulary 256), its last tenth for validation: real text, on every
machine, no tokenizer. Both contenders read the same windows in the same order, warm up linearly and then keep their
rate; only updates are on the clock, evaluations and compilation are not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bench.training import Workload, baseline_update, fastlm_update, release, wait
from fastlm.config import Config, ModelConfig, OptimConfig
from fastlm.optim import set_lr
from fastlm.resolve import resolve
from fastlm.schedule import multiplier
from fastlm.text import embedded_source

_VAL_SHARE = 0.1
_WARMUP_UPDATES = 20


@dataclass(frozen=True)
class Recipe:
    """A contender's name, model and optimizer."""

    provider: str
    model: ModelConfig
    optim: OptimConfig

    @property
    def name(self) -> str:
        """What is compared: "modern with muon"."""
        return f"{self.model.family} with {self.optim.name}"


@dataclass(frozen=True)
class Race:
    """The size, the text and the loss to reach. Sizes are those of every contender."""

    layers: int
    heads: int
    width: int
    seq_len: int
    batch_size: int  # sequences per update
    text_bytes: int  # of the library read, validation included
    val_windows: int
    eval_every: int  # updates
    target: float  # mean nats a byte on the validation windows

    def recipes(self) -> tuple[Recipe, Recipe]:
        """fastlm's modern family with Muon, and nanoGPT's GPT-2 with AdamW, at the same size."""
        shape = ModelConfig("modern", n_layer=self.layers, n_head=self.heads, n_embd=self.width)
        plain_rates = OptimConfig("adamw", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        return (
            Recipe("fastlm", shape, OptimConfig("muon", lr=0.03, adam_lr=0.01)),
            Recipe("baseline", replace(shape, family="gpt2", bias=False), plain_rates),
        )


SMALL = Race(2, 2, 64, 64, 12, 300_000, 40, 20, target=3.0)
LARGE = Race(8, 8, 512, 512, 64, 12_000_000, 64, 25, target=1.4)


@dataclass(frozen=True)
class Finish:
    """What a contender needed; `reached` is false where the clock ran out first, at `loss`."""

    provider: str
    reached: bool
    loss: float
    tokens: int
    seconds: float


def library_bytes(limit: int) -> Tensor:
    """The first `limit` bytes of the standard library's sources, in the order of their paths: uint8."""
    text = bytearray()
    for path in embedded_source().files:
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.from_numpy(np.frombuffer(bytes(text[:limit]), np.uint8).copy())


def race(course: Race, recipe: Recipe, device: torch.device, *, seconds: float, compiles: bool | None = None) -> Finish:
    """Train one contender until the target or until its updates have taken `seconds`."""
    text = library_bytes(course.text_bytes)
    split = int(len(text) * (1 - _VAL_SHARE))
    held_out = _windows(text[split:], torch.arange(course.val_windows) * course.seq_len, course.seq_len, device)
    draw = torch.Generator().manual_seed(1)
    step, evaluate = _contender(course, recipe, device, compiles)
    tokens, clock, updates, loss = 0, 0.0, 0, math.inf
    while clock < seconds:
        begin = time.perf_counter()
        for _ in range(course.eval_every):
            starts = torch.randint(split - course.seq_len, (course.batch_size,), generator=draw)
            batch = _windows(text, starts, course.seq_len, device)
            step(updates, *batch)
            updates += 1
            if updates == 1:  # what compiles is off the clock
                wait(device)
                begin = time.perf_counter()
        wait(device)
        clock += time.perf_counter() - begin
        tokens += course.eval_every * course.batch_size * course.seq_len
        loss = evaluate(*held_out)
        if loss <= course.target:
            return Finish(recipe.provider, True, loss, tokens, clock)
    return Finish(recipe.provider, False, loss, tokens, clock)


def _windows(text: Tensor, starts: Tensor, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, T) each, that begin at `starts`."""
    ids = text[starts[:, None] + torch.arange(seq_len + 1)].long().to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _contender(
    course: Race, recipe: Recipe, device: torch.device, compiles: bool | None
) -> tuple[Callable[[int, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], float]]:
    """(a function of the update's number and a batch that trains, one that evaluates)."""
    cfg = Config(seed=1, model=recipe.model, optim=recipe.optim)
    cfg.data.seq_len, cfg.train.batch_size, cfg.train.steps = course.seq_len, course.batch_size, 100_000
    cfg.optim = replace(cfg.optim, schedule="constant", warmup_steps=_WARMUP_UPDATES)
    cfg.train.compile = "auto" if compiles is None else compiles
    cfg, _ = resolve(cfg, device, 256, steps=1000)
    release(device)
    torch._dynamo.reset()
    work, plain = Workload(recipe.provider, cfg, 256, device), recipe.provider == "baseline"
    update = baseline_update(work, course.batch_size) if plain else fastlm_update(work)
    for group in (group for optimizer in update.optimizers for group in optimizer.param_groups if plain):
        group["initial_lr"] = group["lr"]

    def step(number: int, inputs: Tensor, targets: Tensor) -> Tensor:
        for optimizer in update.optimizers if plain else ():  # the trainer sets its own rate
            set_lr(optimizer, multiplier(cfg.optim, number, math.inf))
        return update.step(inputs, targets)

    @torch.no_grad()
    def evaluate(inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=plain and device.type == "cuda"):
            losses = [float(update.model(i, t)) for i, t in zip(inputs.split(8), targets.split(8), strict=True)]
        return sum(losses) / len(losses)

    return step, evaluate
