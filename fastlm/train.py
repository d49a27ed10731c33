"""Training: one update, the loop, and what happens between. `python -m fastlm.train` with no argument trains at once.

    state <- newest verified checkpoint, or step 0
    until the last step:
        batch  <- samples [n, n + batch_size)                      data.py
        loss   =  sum of nats over the batch's targets / their number
        update <- optimizer(clip(gradient), lr * multiplier(step))  optim.py, schedule.py
        now and then: log, evaluate, sample, save                   log.py, evaluate.py, samples.py, checkpoint.py

Whatever is random is a pure function of the seed and a counter kept in the state, so that a run continued from a
checkpoint is the run that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastlm_kernels as fk
from fastlm import checkpoint
from fastlm.capture import CapturedStep, CaptureFailed, CudaRecorder
from fastlm.compiled import CHECKED_UPDATES, check_compiled, compile_block, compile_note
from fastlm.config import Config, dump_config, parse_config
from fastlm.data import IGNORE, Batch, BatchLoader, WindowOrder, eval_windows
from fastlm.errors import GuardStop, run_command
from fastlm.evaluate import Evaluation, evaluate
from fastlm.fit import NoRoomToUpdate, forget_attempt, next_smaller, out_of_memory, updating
from fastlm.flops import flops_per_token, peak_flops
from fastlm.log import MetricsLog, Progress, draw_loss, warn
from fastlm.memory import step_memory
from fastlm.model import hash32
from fastlm.optim import set_lr
from fastlm.run import Prepared, prepare, total_steps, write_config
from fastlm.samples import append_sample, draw_sample, drop_samples_after, opening
from fastlm.schedule import multiplier
from fastlm.step_profile import StepProfile
from fastlm.upload import uploaded
from fastlm.weights import model_tensors, optimizer_tensors

EVAL_SUBSET_TOKENS = 2**15  # predicted tokens in every evaluation but the last
SKIPS_BEFORE_STOP = 10  # non-finite updates in a row after which going on could not help

Result = TypeVar("Result")
Step = Callable[..., tuple[Tensor, Tensor]]  # (batch, seeds_B=) -> (loss, grad_norm)


@dataclass(frozen=True)
class Update:
    """What one update left behind, as 0-d tensors on the device: read them where waiting for it is no loss."""

    step: int
    lr: float
    loss: Tensor  # mean nats a target token
    grad_norm: Tensor  # before clipping; not finite where the update was skipped


def train_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    micro_batch_size: int,
    seeds_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward, backward and update on (B, T) inputs and targets -> (loss, grad_norm), 0-d each.

    Every micro-batch divides by the number of target tokens of the whole batch: however it is cut, the gradient is
    the same. The optimizer clips, and leaves itself and the parameters untouched when the norm is not finite.
    """
    num_items = (batch.targets != IGNORE).sum()
    loss = torch.zeros((), device=batch.inputs.device)
    for start in range(0, batch.inputs.size(0), micro_batch_size):
        cut = slice(start, start + micro_batch_size)
        seeds = None if seeds_B is None else seeds_B[cut]
        accumulate(loss_of, loss, batch.inputs[cut], batch.targets[cut], num_items, seeds)
    with updating():
        optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return loss, optimizer.grad_norm  # type: ignore[attr-defined]


def accumulate(
    loss_of: nn.Module, loss: Tensor, inputs_BT: Tensor, targets_BT: Tensor, num_items: Tensor, seeds_B: Tensor | None
) -> None:
    """Forward and backward of one micro-batch: adds to `loss` and to every gradient."""
    part = loss_of(inputs_BT, targets_BT, num_items=num_items, seeds_B=seeds_B)
    part.backward()
    loss += part.detach()


class Trainer:
    """The loop over updates, and what happens between them."""

    def __init__(self, run: Prepared, progress: Progress):
        self.cfg, self.data, self.state, self.out, self.lock = run.cfg, run.dataset, run.state, run.out, run.lock
        self.model, self.optimizer, self.progress = run.model, run.optimizer, progress
        self.device = next(run.model.parameters()).device
        if run.cfg.train.compile:
            compile_block(run.model)
        assert isinstance(run.cfg.train.micro_batch_size, int), "resolved"
        self.micro_batch_size, self.may_shrink = run.cfg.train.micro_batch_size, run.may_shrink
        self.step = self._make_step()
        self.order = WindowOrder(len(self.data.train), self.cfg.data.seq_len, self.cfg.seed)
        self.total_steps = total_steps(self.cfg, self.order.windows_per_epoch)
        self.token_bytes = None if self.data.tokenizer is None else self.data.tokenizer.token_bytes()
        self.meter = Meter(self.cfg, self.data.vocab_size, self.device)
        self.profile = StepProfile(self.cfg, self.data.vocab_size, self.device, self.out, progress.note)
        self.unread: list[Update] = []  # updates whose norm the host has not looked at yet
        self.stop_signal: int | None = None
        self.last_eval: tuple[int, float] | None = None  # step and loss on the subset

    def train(self) -> int:
        """Run to the end, or to the first signal -> exit code."""
        state, cfg = self.state, self.cfg
        saved = {"tokens": state.tokens, "seconds": state.seconds} if state.step else None
        self.metrics = MetricsLog(self.out, state.step, saved=saved)
        pin_memory = self.device.type == "cuda"
        loader = BatchLoader(self.data.train, self.order, cfg.train.batch_size, state.samples, pin_memory)
        with self.lock, self.metrics, loader, self.profile, self._signals(), self._kernels():
            try:
                self._begin()
                return self._loop(loader)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.cfg, error, self._kept()) from None

    def _loop(self, loader: BatchLoader) -> int:
        train, first = self.cfg.train, self.state.step
        # A recorded step keeps its memory: what is compared later would come on top of it.
        checked = (1 if train.cuda_graphs else CHECKED_UPDATES) if train.check_compile and train.compile else 0
        for batch in uploaded(loader, self.device):
            if self.state.step < first + checked:
                self._fitting(self._check_compiled, batch)
            update = self.profile.run(self._fitting, self._update, batch)
            if self.state.step == first + 1:
                self._note_first(update)
            last, stop = self._is_last(), self.stop_signal  # one look at the signal an iteration
            save = self._due(train.save_every, last) or stop is not None
            self._log(update, last, save)
            if self._due(train.eval_every, last):
                self._evaluate(full=last)
            if self._due(train.sample_every, last):
                self._sample()
            saved = save and self._save()
            if last:
                return self._end(saved)
            if stop is not None:
                return self._interrupted(stop, saved)
        raise AssertionError("the loader never ends")

    def _begin(self) -> None:
        drop_samples_after(self.out / "samples.md", self.state.step)
        self.clock = time.monotonic() - self.state.seconds
        self.metrics.write("start", **self._when())
        if self.state.step == 0:
            self._evaluate(full=False)
        self.meter.restart()

    def _make_step(self) -> Step:
        """`train_step` of this run's model and optimizer, on a GPU as CUDA graphs."""
        eager = partial(train_step, self.model, self.optimizer, micro_batch_size=self.micro_batch_size)
        if not self.cfg.train.cuda_graphs:
            return eager
        work, recorder = partial(accumulate, self.model), CudaRecorder(self.device)
        captured = CapturedStep(work, self.optimizer, recorder, micro_batch_size=self.micro_batch_size)

        def step(batch: Batch, seeds_B: Tensor | None) -> tuple[Tensor, Tensor]:
            try:
                return captured(batch, seeds_B)
            except CaptureFailed as failure:
                if isinstance(failure.__cause__, torch.OutOfMemoryError) and self._smaller():
                    raise failure.__cause__ from None
                self.progress.note(f"CUDA graphs: off from here on, recording failed ({failure})")
            self.step = eager
            return eager(batch, seeds_B=seeds_B)  # behind the handler, which holds what the recording took

        return step

    def _fitting(self, work: Callable[[Batch], Result], batch: Batch) -> Result:
        """work(batch); until the first update is done, again with a smaller micro-batch where memory does not do."""
        while True:
            try:
                result = work(batch)
            except torch.OutOfMemoryError as error:
                size, told = self._smaller(), str(error).partition("\n")[0]
                if size is None or isinstance(error, NoRoomToUpdate):
                    raise
            else:
                self.may_shrink = self.may_shrink and self.state.step == 0
                return result
            self._shrink(size, told)  # behind the handler, which holds what the attempt took

    def _smaller(self) -> int | None:
        """The next smaller micro-batch, where there is one and it may still be taken."""
        return next_smaller(self.cfg.train.batch_size, self.micro_batch_size) if self.may_shrink else None

    def _shrink(self, size: int, told: str) -> None:
        """Begin anew with `size` sequences a micro-batch."""
        self.progress.note(f"micro-batch: {size}, as {self.micro_batch_size} did not fit ({told})")
        self.cfg.train.micro_batch_size = self.micro_batch_size = size
        self.step = self._make_step()
        forget_attempt(self.model.parameters(), compiled=bool(self.cfg.train.compile))
        try:
            write_config(self.out, self.cfg)
        except OSError as error:
            warn(f"config.yaml cannot be written ({error.strerror}); training goes on")

    def _kept(self) -> str:
        newest, _ = checkpoint.newest_verified(self.out)
        return f"--out {self.out} goes on from " + ("the beginning" if newest is None else newest.name)

    def _seeds(self) -> Tensor | None:
        """One dropout seed for each sample of the next update; made on the device, so that nobody waits for a copy."""
        if self.cfg.model.dropout == 0:
            return None
        first = self.state.samples
        samples = torch.arange(first, first + self.cfg.train.batch_size, device=self.device)
        return hash32(hash32(samples) + self.cfg.seed)

    def _update(self, batch: Batch) -> Update:
        state, cfg = self.state, self.cfg
        lr = set_lr(self.optimizer, multiplier(cfg.optim, state.step, self._expected_steps()))
        loss, grad_norm = self.step(batch, seeds_B=self._seeds())
        tokens = batch.targets.numel()
        state.step += 1
        state.samples += cfg.train.batch_size
        state.tokens += tokens
        state.seconds = time.monotonic() - self.clock
        self.meter.count(tokens)
        return Update(state.step, lr, loss, grad_norm)

    def _check_compiled(self, batch: Batch) -> None:
        cut, seeds_B = slice(self.micro_batch_size), self._seeds()
        seeds_B = None if seeds_B is None else seeds_B[cut]
        self.progress.note(check_compiled(self.model, batch.inputs[cut], batch.targets[cut], seeds_B))

    def _note_first(self, update: Update) -> None:
        """What the process's first update cost beside the update: compilation, and memory against the estimate."""
        if self.cfg.train.compile:
            float(update.loss)  # waits for the device
            self.progress.note(compile_note(self.meter.restart()))
        if self.device.type == "cuda":
            peak, planned = (
                torch.cuda.max_memory_allocated(self.device),
                step_memory(self.cfg, self.data.vocab_size).peak,
            )
            figures = f"{peak / 2**30:.2f} GiB at most, the estimate was {planned / 2**30:.2f}"
            self.progress.note(f"memory: the first update took {figures} ({peak / planned:.0%})")

    def _log(self, update: Update, last: bool, save: bool) -> None:
        """Write what is due; on a GPU only then does the host wait for the device."""
        train = self.cfg.train
        write = self.state.step == 1 or last or self.state.step % train.log_every == 0
        self.unread.append(update)
        if write or save or self.device.type == "cpu":
            self._read_norms()
        if write:
            speed, mfu = self.meter.read()
            loss, grad_norm = float(update.loss), float(update.grad_norm)
            line = {"loss": loss, "lr": update.lr, "grad_norm": grad_norm, "tokens_per_second": speed, "mfu": mfu}
            self.metrics.write("train", **self._when(), **line)  # type: ignore[arg-type]
            self.progress.update(update.step, self._expected_steps(), loss, speed, mfu)

    def _read_norms(self) -> None:
        """Count the updates that were skipped because their gradient was not finite; stop after too many in a row."""
        state = self.state
        for update in self.unread:
            if math.isfinite(float(update.grad_norm)):
                state.skipped_in_a_row = 0
                continue
            state.skipped += 1
            state.skipped_in_a_row += 1
            when = self._when()
            when["step"] = update.step
            self.metrics.write("skip", **when, skipped=state.skipped)
            self.progress.note(f"step {update.step}: the gradient is not finite, update skipped")
            if state.skipped_in_a_row >= SKIPS_BEFORE_STOP:
                raise GuardStop(self._guard_message())
        self.unread.clear()

    def _evaluate(self, *, full: bool) -> None:
        with self.meter.paused():
            result = self._evaluation(full)
        line = {"val_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        self.metrics.write("eval", **self._when(), **line, full=full)
        if not full:
            self.last_eval = (self.state.step, result.loss)
        what = "whole validation split" if full else "validation subset"
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.progress.note(f"step {self.state.step}: validation loss {result.loss:.4f}{bits} ({what})")

    def _evaluation(self, full: bool) -> Evaluation:
        cfg = self.cfg
        limit = None if full else max(1, EVAL_SUBSET_TOKENS // cfg.data.seq_len)
        windows = eval_windows(self.data.val, cfg.data.seq_len, self.micro_batch_size, limit)
        return evaluate(self.model, windows, self.token_bytes)

    def _sample(self) -> None:
        tokenizer, start = self.data.tokenizer, self.data.document_start
        if tokenizer is None or start is None:
            return
        with self.meter.paused():
            seed = int(hash32(torch.tensor((self.cfg.seed + self.state.step) % 2**63)))
            sample = draw_sample(self.model, tokenizer, start, seed=seed, is_code=self.data.is_code)
        try:
            append_sample(self.out / "samples.md", sample, step=self.state.step, tokens=self.state.tokens)
        except OSError as error:
            warn(f"samples.md cannot be written ({error.strerror}); training goes on")
        self.metrics.write("sample", **self._when(), tokenizes=sample.tokenizes)
        share = "" if sample.tokenizes is None else f" ({sample.tokenizes:.0%} of its lines tokenize as Python)"
        self.progress.note(f"step {self.state.step}: sampled{share}\n{opening(sample.texts[0])}")

    def _save(self) -> bool:
        """Write a checkpoint -> whether that went well; a full disk does not stop the run."""
        self.metrics.sync()
        when = self._when()  # of the state saved, so that time adds up over a restart
        with self.meter.paused():
            try:
                checkpoint.save(
                    self.out,
                    self.state.step,
                    model=model_tensors(self.model, self.optimizer),
                    optimizer=optimizer_tensors(self.model, self.optimizer),
                    state=self._state_json(),
                    config=dump_config(self.cfg),
                    tokenizer=self.data.tokenizer,
                )
            except checkpoint.SaveFailed as failure:
                warn(f"{failure}; training goes on, the last good checkpoint is kept")
                return False
            checkpoint.prune(self.out, self.cfg.train.keep, self.cfg.train.keep_best)
            self.metrics.write("save", **when)
            draw_loss(self.out)
        return True

    def _end(self, saved: bool) -> int:
        self.metrics.write("end", **self._when())
        if not saved:
            warn("the last step's checkpoint is missing; make room, and the same command with --out writes it")
        return 0 if saved else 1

    def _interrupted(self, number: int, saved: bool) -> int:
        name = signal.Signals(number).name
        if not saved:
            warn(f"{name}: stopped without a new checkpoint; the same command with --out {self.out} goes on")
            return 1
        self.progress.note(f"{name}: saved at step {self.state.step}; the same command with --out {self.out} goes on")
        return 128 + number

    def _is_last(self) -> bool:
        if self.total_steps is not None:
            return self.state.step >= self.total_steps
        assert self.cfg.train.max_seconds is not None
        return self.state.seconds >= self.cfg.train.max_seconds

    def _expected_steps(self) -> float:
        """The run's length in updates; under a time limit the estimate from the pace so far."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.cfg.train.max_seconds is not None
        share = self.state.seconds / self.cfg.train.max_seconds
        return self.state.step / share if share > 0 and self.state.step else math.inf

    def _due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.state.step % every == 0)

    def _when(self) -> dict[str, Any]:
        self.state.seconds = time.monotonic() - self.clock
        return {"step": self.state.step, "tokens": self.state.tokens, "seconds": self.state.seconds}

    def _state_json(self) -> dict[str, object]:
        evaluated = self.last_eval is not None and self.last_eval[0] == self.state.step
        return asdict(self.state) | {
            "vocab_size": self.data.vocab_size,
            "data": self.data.fingerprint,
            "document_start": self.data.document_start,
            "val_loss": self.last_eval[1] if self.last_eval and evaluated else None,  # on the fixed subset
        }

    def _guard_message(self) -> str:
        newest, _ = checkpoint.newest_verified(self.out)
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"{self.state.skipped_in_a_row} updates in a row had a gradient that is not finite; {good}; "
            "lower --optim.lr or look at the data around this step"
        )

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        with fk.backend("torch") if self.cfg.model.kernels == "torch" else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM: note the first, leave at once on the second."""

        def stop(number: int, frame: object) -> None:
            if self.stop_signal is not None:
                os._exit(128 + number)
            self.stop_signal = number
            text = f"{signal.Signals(number).name}: saving at the end of this step; again to leave at once\n"
            os.write(2, text.encode())  # not through a buffer that the interrupted code may be writing to

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Meter:
    """Tokens per second and model FLOPs utilisation between two readings, pauses taken out."""

    def __init__(self, cfg: Config, vocab_size: int, device: torch.device):
        self.flops_per_token = flops_per_token(cfg.model, vocab_size, cfg.data.seq_len)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name)
        self.device = device
        self.tokens, self.since = 0, time.monotonic()

    def restart(self) -> float:
        """Begin to count -> seconds since the last beginning."""
        now = time.monotonic()
        seconds, self.tokens, self.since = now - self.since, 0, now
        return seconds

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def read(self) -> tuple[float | None, float | None]:
        """-> (tokens per second, MFU) since the last reading; None where no token or no peak is known."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        tokens = self.tokens
        speed = tokens / max(self.restart(), 1e-9) if tokens else None
        return speed, None if self.peak is None or speed is None else speed * self.flops_per_token / self.peak

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # queued updates are no pause
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start


def main(argv: list[str] | None = None) -> int:
    """Parse, prepare, train."""
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    with Progress() as progress:
        run = prepare(cfg, progress.note)
        return 0 if run is None else Trainer(run, progress).train()


if __name__ == "__main__":
    run_command(main)
