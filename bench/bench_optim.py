"""AdamW's step, checked and then timed.   pytest bench --benchmark-only

Ours, torch's fused and foreach, with and without clipping of the global norm, over a GPT's parameters: 124M and 1.5B on
a GPU, by CUDA-graph replay; a small model on a CPU, where ours is torch's, its fused form, as the trainer asks for.
Left to choose, ours and torch's classes alike take the slow one there, bit for bit.

`extra_info` holds kernel, provider, shape, dtype, ratio (the time of torch's fused step over this one's: above 1 is
faster), seconds a step (device time on a GPU), host_seconds of one eager call, and bytes a second, which counts what
ours must move (28 bytes a parameter in fp32, 32 with clipping).

`adamw.host` is the host's time of one eager step over 150 tensors of 8 x 8, with a new rate each time. Without a GPU
ours is the kernels' path on tensors without data, its launches recorded instead of made, and torch's steps include
their arithmetic, as `path` says: there it tells what the bookkeeping costs, not which is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk
from bench import device
from bench.device import DEVICE, GPU
from bench.timing import captured, device_seconds, host_seconds, host_spreads, replay_of
from fastlm_kernels import _runtime
from fastlm_kernels.optim.steps import bytes_per_parameter

# (layers, width) of GPT-2's shapes
MODELS = {"124M": (12, 768), "1.5B": (48, 1600)} if GPU else {"small": (4, 64)}
CLIPS = (None, 1.0)
PROVIDERS = ("fastlm", "fused", "foreach")


def _parameters(layers: int, width: int) -> list[Tensor]:
    vocabulary = 50304 if GPU else 256
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    shapes = [(vocabulary, width), (1024, width), *block * layers, (width,)]
    generator = torch.Generator(DEVICE).manual_seed(0)
    params = [torch.randn(shape, device=DEVICE, generator=generator).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=DEVICE, generator=generator)
    return params


def _step(provider: str, params: list[Tensor], clip: float | None) -> Callable[[], None]:
    """One update, as a captured graph may hold it."""
    if provider == "fastlm":
        return fk.optim.AdamW(params, lr=1e-4, max_grad_norm=clip, fused=True).step  # type: ignore[return-value]
    optimizer = torch.optim.AdamW(params, lr=1e-4, capturable=GPU, **{provider: True})  # type: ignore[arg-type]

    def step() -> None:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()

    return step


@functools.cache
def _check(clip: float | None) -> None:
    """Three steps on a small model are torch's."""
    ours, theirs = (_parameters(2, 64) for _ in range(2))
    mine, other = _step("fastlm", ours, clip), _step("foreach", theirs, clip)
    for _ in range(3):
        mine()
        other()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def _measure(provider: str, model: str, clip: float | None) -> tuple[Callable[[], Any], float, float, int]:
    """(a call that waits, seconds a step, host seconds of an eager call, number of parameters)."""
    params = _parameters(*MODELS[model])
    step = _step(provider, params, clip)
    elements = sum(p.numel() for p in params)
    host = host_seconds(step)
    if not GPU:
        return step, host, host, elements
    call = functools.partial(replay_of, captured([step]), step)  # which holds parameters and state
    return call, device_seconds(call), host, elements


@functools.cache
def _fused(model: str, clip: float | None) -> tuple[Callable[[], Any] | None, float]:
    """A call of torch's fused step, not kept on a GPU with all it takes, and its seconds: for all providers."""
    call, taken, _, _ = _measure("fused", model, clip)
    return (None if GPU else call), taken


def _beside_fused(call: Callable[[], Any], taken: float, model: str, clip: float | None) -> tuple[float, float]:
    """(seconds a step, the fused step's time over it); on a CPU in turns, and the fastest of each compared."""
    fused, fused_taken = _fused(model, clip)
    if fused is None:
        return taken, fused_taken / taken
    fused_time, time = host_spreads([fused, call])
    return time.median, fused_time.best / time.best


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("clip", CLIPS, ids=["plain", "clipped"])
@pytest.mark.parametrize("model", MODELS)
def test_adamw(benchmark: Any, model: str, clip: float | None, provider: str) -> None:
    """Check, then time."""
    _check(clip)
    call, taken, host, elements = _measure(provider, model, clip)
    taken, ratio = _beside_fused(call, taken, model, clip)
    moved = elements * bytes_per_parameter("AdamW", {"max_grad_norm": clip}, torch.float32)
    benchmark.extra_info.update(
        kernel="adamw.clipped" if clip else "adamw.step",
        provider=provider,
        shape=model,
        dtype="float32",
        ratio=ratio,
        seconds=taken,
        host_seconds=host,
        bytes=moved,
        bytes_per_second=moved / taken,
        bandwidth_share=moved / taken / device.rates().copy_bytes_per_second,
        direction="step",
        device=device.name(),
        checked=True,
        path=_runtime.explain(fk.optim.AdamW([torch.ones(1, device=DEVICE, requires_grad=True)]).step).path,
    )

    def run() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def _host_seconds(provider: str) -> tuple[float, str]:
    """(host seconds of a step over 150 small tensors, the path that it took)."""
    where = "meta" if provider == "fastlm" and not GPU else DEVICE
    params = [torch.empty(8, 8, device=where).fill_(0.5).requires_grad_() for _ in range(150)]
    for p in params:
        p.grad = torch.ones_like(p)
    if provider == "fastlm":
        optimizer = fk.optim.AdamW(params, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(params, lr=1e-4, **{provider: True})  # type: ignore[arg-type]

    def step() -> None:
        optimizer.param_groups[0]["lr"] *= 0.999
        optimizer.step()

    if where != "meta":
        return host_seconds(step), "triton" if provider == "fastlm" else "torch"
    with _runtime.recording("sm_90"):
        return host_seconds(step), "triton, launches recorded"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_host_time_of_150_tensors(benchmark: Any, provider: str) -> None:
    """What a step costs before the device has anything to do."""
    _check(None)
    baseline, _ = _host_seconds("fused")
    seconds, path = _host_seconds(provider)
    benchmark.extra_info.update(
        kernel="adamw.host",
        provider=provider,
        shape="150x8x8",
        dtype="float32",
        ratio=baseline / seconds,
        seconds=seconds,
        host_seconds=seconds,
        direction="host",
        device=device.name(),
        checked=True,
        path=path,
    )
    benchmark.pedantic(_host_seconds, args=(provider,), rounds=1)
