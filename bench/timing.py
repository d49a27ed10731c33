"""Seconds a call takes: device time under CUDA-graph replay on a GPU, the best of several runs on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ROTATE_BYTES = 256 << 20  # more than any GPU's cache
_MOST_COPIES = 64


def step(fn: Callable[..., Any], backward: bool) -> Callable[..., Any]:
    """A function of (arguments, upstream gradients) that runs fn forward, and backward if asked."""

    def forward(arguments: tuple[Any, ...], upstream: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return fn(*arguments)

    def forward_backward(arguments: tuple[Any, ...], upstream: tuple[Tensor, ...]) -> Any:
        outputs = fn(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return torch.autograd.grad(outputs, leaves, upstream)

    return forward_backward if backward else forward


def copies(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments and copies of them, together larger than the cache: a benchmark reads memory, not cache."""
    size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))
    count = 1 if size == 0 else max(1, min(_MOST_COPIES, -(-_ROTATE_BYTES // size)))
    return [
        tuple(a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)
        for _ in range(count)
    ]


def replayer(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], upstream: Any) -> Callable[[], None]:
    """A CUDA graph of one run on each set of arguments; calling it replays the graph and waits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(sets[0], upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            run(arguments, upstream)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def seconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """The fastest of several timed calls."""
    call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
