"""Seconds that a call takes: device time under CUDA-graph replay on a GPU, host time on a CPU.

Every run of a replay has inputs and upstream gradients of its own, together larger than any GPU's cache, so that it
reads memory. Two exceptions: shapes of less than `_ROTATE_BYTES / _MOST_COPIES` (8 MiB) are read from cache in part or
whole, and results go to the memory that the run before gave back, so that small ones are written to cache.

A call that waits for the device (Liger's cross-entropy reads a count) cannot be captured: it is timed by events around
eager runs, its waiting included, and says so.
"""

from __future__ import annotations

import ctypes
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm_kernels.check import leaves_of, outputs_of
from fastlm_kernels.registry import Arguments

DIRECTIONS = ("forward", "backward", "forward_backward")
_ROTATE_BYTES = 512 << 20
_MOST_COPIES = 64
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 50
_LEAST_SECONDS = 5e-3  # of one timed stretch: events, and the first launch behind one, take some microseconds
_LEAST_HOST_SECONDS = 3e-4  # short enough to come through between other programs' turns
_ISSUES = 20
_ENOUGH_SECONDS = 0.2  # of all stretches together

Run = Callable[[], Any]


class Inputs(NamedTuple):
    """What one run reads."""

    arguments: Arguments
    upstream: tuple[Tensor, ...]


class Spread(NamedTuple):
    """Seconds of one run: the median of `rounds` stretches, the 10 and 90 % quantiles, and the fastest."""

    median: float
    low: float
    high: float
    best: float
    rounds: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one call.

    call        runs once on each set of inputs and waits
    host_seconds        that an eager call keeps the host, the device's work not awaited; on a CPU all of it
    peak_bytes  device memory that one run takes beyond its inputs; None on a CPU
    launches    kernels, copies and fills that one run launches; None on a CPU, and of runs that no graph can hold
    timed_by    "graph" replay, "events" around eager runs, or the "host" clock
    repeats     whether two runs on the same inputs gave the same bits; None where they could not
    """

    call: Run
    seconds: Spread
    host_seconds: float
    peak_bytes: int | None
    launches: int | None
    timed_by: str
    repeats: bool | None


def prepared(fn: Callable[..., Any], direction: str, sets: Sequence[Inputs]) -> list[Run]:
    """For each set a function that runs fn forward, its backward, or both; what backward saved lives on with it."""
    make = {"forward": _forward, "backward": _backward, "forward_backward": _both}[direction]
    return [make(fn, inputs) for inputs in sets]


def _forward(fn: Callable[..., Any], inputs: Inputs) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return outputs_of(fn, inputs.arguments)

    return run


def _backward(fn: Callable[..., Any], inputs: Inputs) -> Run:
    outputs, leaves = outputs_of(fn, inputs.arguments), list(leaves_of(inputs.arguments).values())
    return lambda: torch.autograd.grad(outputs, leaves, inputs.upstream, retain_graph=True)


def _both(fn: Callable[..., Any], inputs: Inputs) -> Run:
    leaves = list(leaves_of(inputs.arguments).values())
    return lambda: torch.autograd.grad(outputs_of(fn, inputs.arguments), leaves, inputs.upstream)


def copies(inputs: Inputs) -> list[Inputs]:
    """The inputs and copies of them, at most `_MOST_COPIES`, together `_ROTATE_BYTES` or more."""
    tensors = [a for a in (*inputs.arguments.values(), *inputs.upstream) if isinstance(a, Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = 1 if size == 0 else min(_MOST_COPIES, -(-_ROTATE_BYTES // size))
    return [inputs] + [copied(inputs) for _ in range(count - 1)]


def copied(inputs: Inputs) -> Inputs:
    """The same numbers in memory of their own, in the same layout."""

    def copy(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    arguments = {name: copy(value) for name, value in inputs.arguments.items()}
    return Inputs(arguments, tuple(map(copy, inputs.upstream)))


def captured(runs: Sequence[Run], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the runs one after another, captured on `stream`, after three runs of the first there.

    What the runs read must have been made on that stream if they run backward: autograd returns to it.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # for `nodes`
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    graph.instantiate()
    return graph


def spreads(
    stretches: Sequence[Callable[[int], float]], least: float = _LEAST_SECONDS, enough: float = _ENOUGH_SECONDS
) -> list[Spread]:
    """The spread of each `stretch(calls)`, seconds a call of so many, over rounds long and many enough to trust.

    They take turns, so that what else goes on hits all alike. A stretch lasts `least` seconds or a call, the rounds of
    each together `enough`, if `_MOST_ROUNDS` last so long.
    """
    calls, longest = [], least
    for stretch in stretches:
        stretch(1)
        once = max(stretch(1), 1e-9)
        calls.append(max(1, round(least / once)))
        longest = max(longest, once)
    rounds = min(max(round(enough / longest), _FEWEST_ROUNDS), _MOST_ROUNDS)
    taken = [[stretch(count) for stretch, count in zip(stretches, calls, strict=True)] for _ in range(rounds)]
    samples = torch.tensor(taken, dtype=torch.float64)
    quantiles = samples.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0).T.tolist()
    return [
        Spread(median, low, high, best, rounds)
        for (low, median, high), best in zip(quantiles, samples.amin(0).tolist(), strict=True)
    ]


def device_spread(call: Run, enough: float = _ENOUGH_SECONDS) -> Spread:
    """Device time of one call, by events around as many calls as fill `_LEAST_SECONDS`."""

    def stretch(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    return spreads([stretch], enough=enough)[0]


def host_spreads(calls: Sequence[Run], enough: float = _ENOUGH_SECONDS) -> list[Spread]:
    """Host time of each call, in turns: `best` is what to compare where other programs take the processor away."""

    def timed(call: Run, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    return spreads([partial(timed, call) for call in calls], _LEAST_HOST_SECONDS, enough)


def host_spread(call: Run, enough: float = _ENOUGH_SECONDS) -> Spread:
    """Host time of one call."""
    return host_spreads([call], enough)[0]


def device_seconds(call: Run) -> float:
    """The median of `device_spread`."""
    return device_spread(call).median


def host_seconds(call: Run) -> float:
    """The median of `host_spread`."""
    return host_spread(call).median


def waits(run: Run) -> bool:
    """Whether a run makes the host wait for the device, which no graph can hold."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that the mode is a prototype: an error where all warnings are
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def issue_seconds(run: Run) -> float:
    """The median of the host's time for one run, begun with an idle device whose work is not awaited."""
    samples = []
    for _ in range(_ISSUES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def peak_bytes(run: Run) -> int:
    """Device memory that one run takes beyond what lies there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and fills in a graph that was captured to be kept; None where the driver does not tell.

    Asked of the driver: a profiler would stay subscribed to every launch after it, or crash with graphs when it goes.
    """
    if torch.version.hip is not None:
        return None
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if code == 0 else None


def repeats(run: Run) -> bool:
    """Whether two runs on the same inputs give the same bits."""
    first, second = run(), run()
    equal = (torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in zip(first, second, strict=True))
    return all(equal)


def measure(fn: Callable[..., Any], direction: str, sets: Sequence[Inputs]) -> Measured:
    """Everything about fn on these inputs; on a GPU captured, if it can be, and timed there."""
    if any(isinstance(a, Tensor) and a.is_cuda for a in sets[0].arguments.values()):
        return _measure_on_gpu(fn, direction, sets)
    runs = prepared(fn, direction, sets)

    def each() -> None:
        for run in runs:
            run()

    seconds = _each(host_spread(each), len(sets))
    return Measured(each, seconds, seconds.median, None, None, "host", repeats(runs[0]))


def _measure_on_gpu(fn: Callable[..., Any], direction: str, sets: Sequence[Inputs]) -> Measured:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = prepared(fn, direction, sets)
        same = repeats(runs[0])  # compiles what there is to compile
        peak, host, waiting = peak_bytes(runs[0]), issue_seconds(runs[0]), waits(runs[0])
    torch.cuda.current_stream().wait_stream(stream)
    if waiting:
        replay, count, timed_by = partial(_eagerly, runs, stream), None, "events"
    else:
        graph = captured(runs, stream)
        found = nodes(graph)
        replay, count, timed_by = partial(replay_of, graph, runs), found and round(found / len(runs)), "graph"

    def call() -> None:
        replay()
        torch.cuda.synchronize()

    return Measured(call, _each(device_spread(replay), len(sets)), host, peak, count, timed_by, same)


def replay_of(graph: torch.cuda.CUDAGraph, reads: object) -> None:
    """Replay. A partial of this keeps what the graph reads; once freed, a later capture takes it off the device."""
    graph.replay()


def _eagerly(runs: Sequence[Run], stream: torch.cuda.Stream) -> None:
    """The runs one after another on `stream`, between what comes before and after on the current one."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)


def _each(whole: Spread, sets: int) -> Spread:
    return Spread(whole.median / sets, whole.low / sets, whole.high / sets, whole.best / sets, whole.rounds)
