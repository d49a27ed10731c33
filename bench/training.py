"""One update of training, ours beside the plain baseline: what both do, how long it takes, what it needs.

    workload("gpt2", device)     the preset's shape, optimizer and batch, without the config parser
    start(...)                   builds one contender: time to its first step, compile time, peak memory
    plain_candidates(...)        the baseline at several micro-batches
    interleave(...)              rounds of updates, contenders in turn, in one process
    compare(...)                 all of it for one preset

Tokens are random: an update costs the same whatever they say.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn

from bench.baseline import PlainGPT, plain_bytes, plain_optimizers, plain_step
from fastlm import checkpoint, config, run
from fastlm.config import Config, ModelConfig, OptimConfig
from fastlm.data import Batch, Dataset
from fastlm.flops import flops_per_token, parameters, peak_flops
from fastlm.log import Progress
from fastlm.model import GPT
from fastlm.resolve import resolve, resolve_model
from fastlm.run import build_model
from fastlm.train import Trainer

# (layers, heads, width) of the presets; a test holds them against fastlm/presets, which take a YAML parser to read.
_SHAPES = {"": (12, 12, 768), "-medium": (24, 16, 1024), "-large": (36, 20, 1280), "-xl": (48, 25, 1600)}
_MODERN = {"modern-124m": "", "modern-350m": "-medium", "modern-774m": "-large", "modern-1.5b": "-xl"}
PRESETS = ("nanogpt-cpu", *(f"gpt2{size}" for size in _SHAPES), *_MODERN)
CLASS_124M = ("gpt2", "modern-124m")
_VOCAB_SIZE = 50304  # GPT-2's, padded to a multiple of 128 as nanoGPT does

# A public plain script reaches 490k tokens/s at 124M on an H200: a baseline far below that is no measure.
LEAST_BASELINE_TOKENS_PER_SECOND = 470_000
_MOST_MICRO_TOKENS = 2**17  # of ours: beyond, a matrix product gains nothing, and both must fit side by side
_PLAIN_MICRO_TOKENS = (2**15, 2**16, 2**14, 2**17)  # searched in this order while time and memory last
_MEMORY_SHARE = 0.9
_AGREEMENT = {"fp32": 1e-5, "bf16": 3e-3}  # of the two losses on equal weights

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """What both contenders do: `cfg` is resolved for the device; a batch is cfg.train.batch_size x cfg.data.seq_len.

    decisions   what resolving chose and why, a line each: attention, kernels, compiling, CUDA graphs
    """

    preset: str
    cfg: Config
    vocab_size: int
    device: torch.device
    decisions: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Target tokens of one update."""
        return self.cfg.train.batch_size * self.cfg.data.seq_len

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random inputs and targets of one update, int64 (B, T) each, on the device."""
        shape = (self.cfg.train.batch_size, self.cfg.data.seq_len + 1)
        ids = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def mfu(self, tokens_per_second: float, *, causal: bool = False) -> float | None:
        """Model FLOPs utilisation, attention over full rows or (`causal`) over half; None where no peak is known."""
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        flops = flops_per_token(self.cfg.model, self.vocab_size, self.cfg.data.seq_len, causal=causal)
        return None if peak is None else tokens_per_second * flops / peak


def preset_config(preset: str) -> Config:
    """What a preset's file says of model, optimizer and batch; rates stay as they are, no schedule runs here."""
    cfg = Config(preset=preset)
    cfg.train.steps = 1000
    if preset == "nanogpt-cpu":
        cfg.model = ModelConfig("gpt2", n_layer=4, n_head=4, n_embd=128, tie_embeddings=True, bias=False)
        cfg.optim = OptimConfig("adamw", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        cfg.data.seq_len, cfg.train.batch_size, cfg.train.compile = 64, 12, False
        cfg.optim.schedule = "constant"
        return cfg
    layers, heads, width = _SHAPES[_MODERN[preset] if preset in _MODERN else preset.removeprefix("gpt2")]
    if preset in _MODERN:
        cfg.model = ModelConfig("modern", n_layer=layers, n_head=heads, n_embd=width)
        cfg.optim = OptimConfig("muon", lr=0.01, adam_lr=0.005)
    else:
        cfg.model = ModelConfig("gpt2", n_layer=layers, n_head=heads, n_embd=width, tie_embeddings=True)
        cfg.optim = OptimConfig("adamw", lr=3e-4, weight_decay=0.1)
    cfg.data.seq_len, cfg.train.batch_size = 1024, 512
    cfg.optim.schedule = "constant"
    return cfg


def workload(
    preset: str,
    device: torch.device | str,
    *,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    attention: str = "auto",
) -> Workload:
    """A preset as `fastlm.train` would run it on `device`: every auto resolved, micro-batches held to what pays."""
    cfg, device = preset_config(preset), torch.device(device)
    vocab_size = 103 if preset == "nanogpt-cpu" else _VOCAB_SIZE
    cfg.model.attention = attention  # type: ignore[assignment]
    cfg.train.batch_size = batch_size or cfg.train.batch_size
    if micro_batch_size is not None:
        cfg.train.micro_batch_size = micro_batch_size
    resolve_model(cfg)
    with _room_for_a_rival(parameters(cfg.model, vocab_size).total, device):
        cfg, decisions = resolve(cfg, device, vocab_size, steps=1000)
    most = max(1, _MOST_MICRO_TOKENS // cfg.data.seq_len)
    cfg.train.micro_batch_size = _divisor(cfg.train.batch_size, min(most, config.micro_batch_size(cfg, most)))
    return Workload(preset, cfg, vocab_size, device, tuple(decisions))


@contextlib.contextmanager
def _room_for_a_rival(parameters: int, device: torch.device) -> Iterator[None]:
    """Hold what the other contender's parameters and optimizer take, so that what is chosen leaves them room."""
    held = torch.empty(16 * parameters, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    yield
    del held
    release(device)


def _divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def fits(preset: str, device: torch.device) -> bool:
    """Whether the baseline takes one sequence of the preset on this GPU, by estimate; a CPU runs its own preset."""
    if device.type != "cuda":
        return preset == "nanogpt-cpu"
    cfg, (free, _) = preset_config(preset), torch.cuda.mem_get_info(device)
    resolve_model(cfg)
    return plain_bytes(cfg.model, _VOCAB_SIZE, cfg.data.seq_len) < _MEMORY_SHARE * free


def same_function(work: Workload) -> float:
    """The difference of both contenders' losses on equal weights and four sequences, relative. Both are then gone."""
    torch.manual_seed(work.cfg.seed)
    with work.device:
        plain = PlainGPT(work.cfg.model, work.vocab_size)
    ours = _drawn_in_place(work.cfg, work.vocab_size, work.device)
    ours.load_state_dict(plain.state_dict())
    inputs, targets = (x[:4] for x in work.batch())
    with torch.no_grad():
        mine = float(ours(inputs, targets))
        with torch.autocast("cuda", torch.bfloat16, enabled=work.device.type == "cuda"):
            theirs = float(plain(inputs, targets))
    return abs(mine - theirs) / theirs


class Update(NamedTuple):
    """A function that does one update on a fresh model, and what it trains."""

    step: Step
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]


def fastlm_update(work: Workload) -> Update:
    """The trainer's own update, set up as for a run: the one place that knows how `fastlm.train` is driven.

    Left out are the corpus, whose length alone is asked for, and the run directory: nothing is written. A run goes on
    eagerly where recording CUDA graphs fails; what is timed raises RuntimeError then.
    """
    cfg, tokens = deepcopy(work.cfg), cast(Any, range(work.tokens + 1))
    data = Dataset(tokens, tokens, None, work.vocab_size, "", "random tokens", is_code=False)
    cfg.out, cfg.resume = str(Path(tempfile.gettempdir()) / "fastlm-bench-writes-nothing"), "never"
    with (
        mock.patch.object(run, "open_dataset", return_value=data),
        mock.patch.object(run, "open_directory", return_value=io.StringIO()),
        mock.patch.object(checkpoint, "check_free_space"),
        mock.patch.object(run, "build_model", _drawn_in_place),
    ):
        prepared = run.prepare(cfg, lambda _: None)
    assert prepared is not None
    told = io.StringIO()
    trainer = Trainer(prepared, Progress(told))
    trainer.clock = time.monotonic()
    meant = trainer.step

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = trainer._update(Batch(inputs_BT, targets_BT, 0)).loss
        if trainer.step is not meant:
            raise RuntimeError(f"{work.preset}: not the step that was asked for: {told.getvalue().strip()}")
        return loss

    return Update(step, prepared.model, [prepared.optimizer])


def _drawn_in_place(cfg: Config, vocab_size: int, device: torch.device) -> GPT:
    """`build_model`, the weights drawn where they stay: on a CPU 1.5B of them take half a minute."""
    draw = GPT.init_weights

    def drawn(model: GPT, generator: torch.Generator) -> GPT:
        return draw(model, torch.Generator(device).manual_seed(generator.initial_seed()))

    with device, mock.patch.object(GPT, "init_weights", drawn):
        return build_model(cfg, vocab_size, device)


def baseline_update(work: Workload, micro_batch_size: int) -> Update:
    """The plain update, compiled where ours is."""
    torch.manual_seed(work.cfg.seed)
    with work.device:  # as ours, weights are drawn where they stay
        model = PlainGPT(work.cfg.model, work.vocab_size)
    # Static shapes: each micro-batch size is compiled for itself, as a run of its own would.
    forward = torch.compile(model, dynamic=False) if work.cfg.train.compile else model
    optimizers = plain_optimizers(work.cfg.optim, model)
    grad_clip = work.cfg.optim.grad_clip
    step = plain_step(forward, model, optimizers, micro_batch_size=micro_batch_size, grad_clip=grad_clip)
    return Update(step, model, optimizers)


@dataclass
class Contender:
    """One way to do the update, started, and what was measured of it.

    first_step_seconds  from nothing to the first loss: model, optimizer, compilation, one update
    compile_seconds     what the first updates took beyond later ones
    peak_bytes          device memory at most held at once for it, model and optimizer included; None on a CPU
    seconds             of one update, one number a round
    fixed_bytes         of the peak what does not grow with the micro-batch: model, optimizer, gradients; None on a CPU
    """

    provider: str
    micro_batch_size: int
    step: Step
    first_step_seconds: float
    compile_seconds: float
    update_seconds: float
    peak_bytes: int | None
    loss: float
    seconds: list[float] = field(default_factory=list)
    fixed_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of one update: the median of the rounds, or of what was seen while starting."""
        return statistics.median(self.seconds) if self.seconds else self.update_seconds


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_SEARCH_SHARE = 0.55  # of the time for a comparison, for the baseline's micro-batch
_WARM_UPDATES = 3  # a compiled step's first ones compile, warm up and capture


@functools.cache
def _load_lazily_loaded(device: torch.device) -> None:
    """A toy update of plain PyTorch, and the compiler on a GPU: who starts first shall not pay for their imports."""
    cfg = Config(model=ModelConfig("gpt2", n_layer=1, n_head=1, n_embd=16))
    cfg.data.seq_len, cfg.train.batch_size, cfg.train.compile = 16, 1, False
    cfg.optim = OptimConfig("adamw")
    resolve_model(cfg)
    toy = Workload("toy", cfg, 128, device)
    baseline_update(toy, 1).step(*toy.batch())
    if device.type == "cuda":
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    wait(device)


def start(provider: str, build: Callable[[], Update], work: Workload, micro_batch_size: int) -> Contender:
    """Build a contender and run its first updates."""
    device, on_gpu = work.device, work.device.type == "cuda"
    _load_lazily_loaded(device)
    batch = work.batch()
    release(device)
    held = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    wait(device)
    begin = time.perf_counter()
    update = build()
    step = update.step
    wait(device)
    loss, taken, first = 0.0, [], 0.0
    for _ in range(_WARM_UPDATES + 1):
        before = time.perf_counter()
        loss = float(step(*batch))  # waits
        wait(device)
        taken.append(time.perf_counter() - before)
        first = first or time.perf_counter() - begin
    if not math.isfinite(loss):
        raise RuntimeError(f"{provider}, micro-batch {micro_batch_size}: the loss is {loss}; nothing of it was timed")
    peak = torch.cuda.max_memory_allocated(device) - held if on_gpu else None
    fixed = torch.cuda.memory_allocated(device) - held + _absent_gradients(update.model) if on_gpu else None
    steady = taken[-1]
    compiling = max(0.0, sum(taken[:-1]) - _WARM_UPDATES * steady)
    return Contender(provider, micro_batch_size, step, first, compiling, steady, peak, loss, fixed_bytes=fixed)


def _absent_gradients(model: nn.Module) -> int:
    """Bytes of gradients that are not there between updates."""
    return sum(p.nbytes for p in model.parameters() if p.grad is None)


def start_ours(work: Workload) -> Contender:
    """The trainer's step at the micro-batch that the workload names."""
    return start("fastlm", lambda: fastlm_update(work), work, config.micro_batch_size(work.cfg, 1))


def start_plain(work: Workload, micro_batch_size: int) -> Contender:
    """The baseline's step at one micro-batch."""
    return start("baseline", lambda: baseline_update(work, micro_batch_size), work, micro_batch_size)


def plain_candidates(work: Workload, seconds: float = math.inf) -> Iterator[Contender]:
    """The baseline at one micro-batch after another, the likely best first; what runs out of memory is left out.

    After the first another is tried only while `seconds` leave room for one as costly.
    """
    begin, cost, found = time.perf_counter(), 0.0, 0
    for size in _plain_sizes(work):
        before = time.perf_counter()
        if found and seconds - (before - begin) < 1.2 * cost:
            return
        try:
            contender = start_plain(work, size)
        except torch.cuda.OutOfMemoryError:
            continue
        cost, found = time.perf_counter() - before, found + 1
        yield contender
        del contender
    if not found:
        raise RuntimeError(f"{work.preset}: the baseline fits at none of the micro-batches tried")


def _plain_sizes(work: Workload) -> list[int]:
    """Sequences in a micro-batch worth trying; on a CPU the whole batch, as the preset has it."""
    train, seq_len = work.cfg.train, work.cfg.data.seq_len
    if work.device.type != "cuda":
        return [train.batch_size]
    free, _ = torch.cuda.mem_get_info(work.device)

    sizes = [_divisor(train.batch_size, max(1, tokens // seq_len)) for tokens in _PLAIN_MICRO_TOKENS]
    needed = {size: plain_bytes(work.cfg.model, work.vocab_size, size * seq_len) for size in sizes}
    return [size for size in needed if needed[size] < _MEMORY_SHARE * free] or [1]


def interleave(contenders: Sequence[Contender], work: Workload, *, rounds: int, updates: int) -> None:
    """Time `updates` updates of each contender in turn, `rounds` times; each first does one that does not count."""
    batch = work.batch(1)
    for _ in range(rounds):
        turn = len(contenders[0].seconds)
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            contender.step(*batch)
            wait(work.device)
            begin = time.perf_counter()
            for _ in range(updates):
                contender.step(*batch)
            wait(work.device)
            contender.seconds.append((time.perf_counter() - begin) / updates)


def median_ratio(ours: Contender, baseline: Contender) -> float:
    """How many times as fast ours is: the median over the rounds of one round's two times."""
    return statistics.median(b / a for a, b in zip(ours.seconds, baseline.seconds, strict=True))


def verdict(preset: str, device_name: str, baseline_tokens_per_second: float) -> tuple[bool, str]:
    """(whether a ratio to this baseline counts, why).

    At 124M on an H200 only against a baseline as fast as public plain scripts are there.
    """
    if preset not in CLASS_124M or "H200" not in device_name.split():
        return True, "no least speed of the baseline is known for this preset and device"
    known = f"{baseline_tokens_per_second:,.0f} tokens/s, {LEAST_BASELINE_TOKENS_PER_SECOND:,} wanted"
    good = baseline_tokens_per_second >= LEAST_BASELINE_TOKENS_PER_SECOND
    return good, f"the baseline reaches {known}" if good else f"the baseline is too slow to count: {known}"


@dataclass
class Comparison:
    """Both contenders of one preset after their rounds."""

    work: Workload
    ours: Contender
    baseline: Contender

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return median_ratio(self.ours, self.baseline)

    def tokens_per_second(self, contender: Contender) -> float:
        """By the median of its rounds."""
        return self.work.tokens / contender.median

    def verdict(self) -> tuple[bool, str]:
        """Whether the ratio counts, and why."""
        device = self.work.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return verdict(self.work.preset, name, self.tokens_per_second(self.baseline))

    def facts(self, contender: Contender) -> dict[str, object]:
        """What a benchmark's `extra_info` says of one contender."""
        speed, (valid, why) = self.tokens_per_second(contender), self.verdict()
        model = self.work.cfg
        return {
            "kernel": "train_step",
            "provider": contender.provider,
            "shape": f"{self.work.preset}-T{model.data.seq_len}-batch{model.train.batch_size}"
            f"-micro{contender.micro_batch_size}",
            "dtype": {"bf16": "bfloat16", "fp32": "float32"}[model.train.precision],
            "ratio": (self.ratio if contender is self.ours else 1.0) if valid else None,
            "valid": valid,
            "validity": why,
            "seconds": contender.median,
            "seconds_by_round": contender.seconds,
            "tokens_per_second": speed,
            "mfu": self.work.mfu(speed),
            "mfu_causal": self.work.mfu(speed, causal=True),
            "peak_bytes": contender.peak_bytes,
            "compile_seconds": contender.compile_seconds,
            "first_step_seconds": contender.first_step_seconds,
            "compiled": bool(model.train.compile),
        } | (self._ours() if contender is self.ours else {})

    def _ours(self) -> dict[str, object]:
        """How ours does its update. Had a graph not been recorded, its first update would have raised."""
        model, train = self.work.cfg.model, self.work.cfg.train
        chosen = {"cuda_graphs": bool(train.cuda_graphs), "attention": model.attention, "kernels": model.kernels}
        return {**chosen, "decisions": self.work.decisions}


def compare(
    work: Workload, *, rounds: int, updates: int, seconds: float = math.inf
) -> Iterator[Contender | Comparison]:
    """Both contenders of a workload, timed in turn.

    Checks that they are one function, searches the baseline's micro-batch, starts ours, and lets both run. Yields each
    contender as it has started (its figures alone), then after every round the comparison so far. The search takes at
    most about half of `seconds`; the rounds after the second stop when they are up.
    """
    begin = time.perf_counter()
    difference = same_function(work)
    if not difference <= _AGREEMENT[work.cfg.train.precision]:
        raise RuntimeError(f"{work.preset}: the two losses differ by {difference:.1e}; nothing was timed")
    torch._dynamo.reset()  # the compiler gives up on a function after eight shapes
    baseline: Contender | None = None
    for found in plain_candidates(work, _SEARCH_SHARE * seconds):
        yield replace(found, step=_gone)
        if baseline is None or found.update_seconds < baseline.update_seconds:
            baseline = found
        del found
    assert baseline is not None
    ours = start_ours(work)
    yield replace(ours, step=_gone)
    for turn in range(rounds):
        before = time.perf_counter()
        interleave([ours, baseline], work, rounds=1, updates=updates)
        yield Comparison(work, ours, baseline)
        now = time.perf_counter()
        if turn and seconds - (now - begin) < 2 * (now - before):
            return


def _gone(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    raise RuntimeError("of this contender only the figures were kept")


def bytes_per_sequence(runs: Iterable[tuple[int, int]]) -> tuple[float, float] | None:
    """(bytes held at any micro-batch, bytes a sequence) by the line through the first and last of (size, peak).

    A size of 0 stands for what is held at any.
    """
    points = sorted(set(runs))
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return None
    (low, least), (high, most) = points[0], points[-1]
    slope = (most - least) / (high - low)
    return least - slope * low, slope
