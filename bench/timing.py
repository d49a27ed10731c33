"""Seconds a call takes: device time under CUDA-graph replay on a GPU, the best of several runs on a CPU.

Every run of a replay has inputs and upstream gradients of its own, together larger than any GPU's cache, so that it
reads memory. Two exceptions: shapes of less than `_ROTATE_BYTES / _MOST_COPIES` (8 MiB) are read from cache in part or
whole, and results go to the memory that the run before gave back, so that small ones are written to cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm_kernels.check import leaves_of, outputs_of
from fastlm_kernels.registry import Arguments

_ROTATE_BYTES = 512 << 20
_MOST_COPIES = 64
_ROUNDS = 7
_LEAST_SECONDS = 2e-3  # of one timed stretch: events are good to about a microsecond


class Inputs(NamedTuple):
    """What one run reads."""

    arguments: Arguments
    upstream: tuple[Tensor, ...]


def step(fn: Callable[..., Any], backward: bool) -> Callable[[Inputs], Any]:
    """A function of `Inputs` that runs fn forward, and backward if asked."""

    def forward(inputs: Inputs) -> Any:
        with torch.no_grad():
            return fn(**inputs.arguments)

    def forward_backward(inputs: Inputs) -> Any:
        leaves = list(leaves_of(inputs.arguments).values())
        return torch.autograd.grad(outputs_of(fn, inputs.arguments), leaves, inputs.upstream)

    return forward_backward if backward else forward


def copies(inputs: Inputs) -> list[Inputs]:
    """The inputs and copies of them, at most `_MOST_COPIES`, together `_ROTATE_BYTES` or more."""
    tensors = [a for a in (*inputs.arguments.values(), *inputs.upstream) if isinstance(a, Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = 1 if size == 0 else min(_MOST_COPIES, -(-_ROTATE_BYTES // size))
    return [inputs] + [_copied(inputs) for _ in range(count - 1)]


def _copied(inputs: Inputs) -> Inputs:
    def copy(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    arguments = {name: copy(value) for name, value in inputs.arguments.items()}
    return Inputs(arguments, tuple(map(copy, inputs.upstream)))


def captured(run: Callable[[Inputs], Any], sets: Sequence[Inputs]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one run on each set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            run(inputs)
    return graph


def device_seconds(replay: Callable[[], None]) -> float:
    """Device time of one call, by events around as many calls as fill `_LEAST_SECONDS`; the best of several rounds."""

    def stretch(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    stretch(1)
    calls = max(1, round(_LEAST_SECONDS / stretch(1)))
    return min(stretch(calls) for _ in range(_ROUNDS))


def host_seconds(call: Callable[[], Any]) -> float:
    """Host time of one call, after one that does not count; the best of several rounds."""
    call()
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(run: Callable[[Inputs], Any], sets: Sequence[Inputs]) -> tuple[Callable[[], None], float]:
    """(a call that runs once on each set and waits, seconds of one run); on a GPU captured and timed there."""
    if not any(isinstance(a, Tensor) and a.is_cuda for a in sets[0].arguments.values()):

        def each() -> None:
            for inputs in sets:
                run(inputs)

        return each, host_seconds(each) / len(sets)
    graph = captured(run, sets)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, device_seconds(graph.replay) / len(sets)
