"""The training step recorded once and replayed: two CUDA graphs over buffers that never move.

    accumulate   forward and backward of one micro-batch; gradients are added to p.grad, the loss to `loss`
    update       clip, guard, optimizer; leaves p.grad zeroed

An update copies its micro-batches one after the other into the buffers, replays `accumulate` for each and `update`
once. The learning rate is a tensor that both the schedule and the graph know. Nothing is read on the host.

Recording runs nothing, but what it records must have run before: compilation, libraries' work space, the optimizer's
state. The warm-up therefore runs real micro-batches, and optimizer steps on gradients made NaN, which the optimizer
leaves out whole: parameters, masters and moments are never touched, so that nothing needs to be put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlm.data import IGNORE, Batch

WARM_UPS = 2  # the second one meets every cache of the first filled


class CaptureFailed(RuntimeError):
    """The step cannot be recorded here; nothing has been trained yet, and eager steps can go on from where it was."""


class Recorder(Protocol):
    """What turns work into something to replay; a test has one of its own."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` as it will be recorded."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        """What does `work` again; records without running it."""
        ...


class CudaRecorder:
    """CUDA graphs in one memory pool, on one side stream: autograd remembers the stream that it first met."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` on the side stream, between what the current one did and does."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        """Capture `work`. Other threads may go on allocating pinned memory meanwhile: the loader does."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class CapturedStep:
    """`train.train_step` by replay: a (B, T) batch -> (loss, grad_norm), 0-d, tensors of their own each time.

    `accumulate(loss, inputs, targets, num_items, seeds_B)` does one micro-batch: it adds to p.grad and to `loss`.
    `optimizer` is one that `build_optimizer(captured=True)` made. Records at the first call, or raises CaptureFailed;
    a warm-up that runs out of memory raises what PyTorch raises, with nothing changed but gradients.
    """

    def __init__(
        self,
        accumulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None],
        optimizer: Any,
        recorder: Recorder,
        *,
        micro_batch_size: int,
    ):
        self.accumulate, self.optimizer, self.recorder = accumulate, optimizer, recorder
        self.micro_batch_size = micro_batch_size
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.replays: tuple[Callable[[], object], Callable[[], object]] | None = None

    def __call__(self, batch: Batch, seeds_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One update; `batch` and `seeds_B` lie on the parameters' device."""
        cuts = range(0, batch.inputs.size(0), self.micro_batch_size)
        if self.replays is None:
            self._make_buffers(batch, seeds_B)
            self._place(batch, seeds_B, 0)
            self.replays = self._record()
        accumulate, update = self.replays
        self.loss.zero_()
        self.num_items.copy_((batch.targets != IGNORE).sum())
        for start in cuts:
            self._place(batch, seeds_B, start)
            accumulate()
        update()
        return self.loss.clone(), self.optimizer.grad_norm.clone()  # the next replay overwrites both

    def _make_buffers(self, batch: Batch, seeds_B: Tensor | None) -> None:
        cut, device = slice(self.micro_batch_size), batch.inputs.device
        self.inputs, self.targets = torch.empty_like(batch.inputs[cut]), torch.empty_like(batch.targets[cut])
        self.seeds_B = None if seeds_B is None else torch.empty_like(seeds_B[cut])
        self.num_items = torch.ones((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def _place(self, batch: Batch, seeds_B: Tensor | None, start: int) -> None:
        """Samples [start, start + micro_batch_size) into the buffers that the graph reads."""
        cut = slice(start, start + self.micro_batch_size)
        self.inputs.copy_(batch.inputs[cut])
        self.targets.copy_(batch.targets[cut])
        if self.seeds_B is not None and seeds_B is not None:
            self.seeds_B.copy_(seeds_B[cut])

    def _record(self) -> tuple[Callable[[], object], Callable[[], object]]:
        skipped = self.optimizer.skipped_steps.clone()
        device = self.loss.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.recorder.warm_up(self._warm_up)
        finally:  # out of memory, for one: what is there must be what was
            self.optimizer.skipped_steps.copy_(skipped)
        try:
            return self.recorder.record(self._accumulate), self.recorder.record(self.optimizer.step)
        except torch.OutOfMemoryError as error:
            raise CaptureFailed("out of memory; a smaller --train.micro_batch_size leaves room for it") from error
        except RuntimeError as error:
            raise CaptureFailed(str(error).partition("\n")[0]) from error

    def _accumulate(self) -> None:
        self.accumulate(self.loss, self.inputs, self.targets, self.num_items, self.seeds_B)

    @torch.no_grad()
    def _warm_up(self) -> None:
        # Dynamo traces no parameter of 16 bits beside a gradient of 32: what compiles does so before there are any.
        with torch.enable_grad():
            self._accumulate()
        for p in self.parameters:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        for _ in range(WARM_UPS):
            with torch.enable_grad():
                self._accumulate()
            self.parameters[0].grad.fill_(math.nan)
            self.optimizer.step()  # left out whole, but for the zeroing of gradients
