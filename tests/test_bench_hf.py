"""The bench of Hugging Face models checks, times and labels; it times what it says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench import bench_hf, hf_items
from bench.record import Row
from bench.timing import Spread
from fastlm_kernels import hf


class Benchmark:
    """As much of pytest-benchmark's fixture as the bench uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        """Once will do."""
        call()


def patched(model: Any) -> bool:
    return any(line.patched for line in hf.report(model))


def spreads(calls: Sequence[Callable[[], None]]) -> list[Spread]:
    """A second for a step of an unpatched model, half of one for ours; each is run."""
    found = []
    for call in calls:
        call()
        seconds = 0.5 if patched(inspect.getclosurevars(call).nonlocals["model"]) else 1.0
        found.append(Spread(seconds, seconds, seconds, seconds, 1))
    return found


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU the large models would be timed."""
    monkeypatch.setattr(bench_hf, "GPU", False)
    monkeypatch.setattr(bench_hf, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_hf, "DTYPE", torch.float32)
    monkeypatch.setattr(bench_hf, "host_spreads", spreads)
    bench_hf._unpatched.cache_clear()


@pytest.mark.parametrize("name", bench_hf.LARGE)
def test_says_what_was_timed(name: str) -> None:
    for provider, seconds in (("unpatched", 1.0), ("fastlm", 0.5)):
        benchmark = Benchmark()
        bench_hf.test_training_step(benchmark, name, provider)
        info = benchmark.extra_info
        assert (info["kernel"], info["provider"], info["dtype"]) == (f"hf.{name}", provider, "float32")
        assert (info["seconds"], info["tokens_per_second"]) == (seconds, 2 * 62 / seconds)
        assert info["ratio"] == 1 / seconds
        assert (info["peak_bytes"], info["memory_ratio"]) == (None, None)


def test_memory_stands_beside_the_unpatched_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the unpatched model is gone, its figures stay."""
    steps = {"fastlm": bench_hf.Step(lambda: None, (1.0, 1.0), 0.25, 100)}
    monkeypatch.setattr(bench_hf, "_check", lambda name: None)
    monkeypatch.setattr(bench_hf, "_start", lambda name, provider: steps[provider])
    monkeypatch.setattr(bench_hf, "_unpatched", lambda name: bench_hf.Step(None, (1.0, 1.0), 1.0, 150))
    found = bench_hf.measure("llama-1b", "fastlm")[1]
    assert (found["ratio"], found["peak_bytes"], found["memory_ratio"]) == (4.0, 100, 1.5)


@pytest.mark.parametrize(
    ("name", "provider", "lacks", "reason"),
    [
        ("llama-1b", "liger", "liger_kernel", "Liger is not installed"),
        ("gpt2-124m", "unpatched", "transformers", "transformers is not installed"),
    ],
)
def test_who_is_not_measured_says_why(
    name: str, provider: str, lacks: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_hf, "installed", lambda module: module != lacks)
    bench_hf._check.cache_clear()
    benchmark = Benchmark()
    with pytest.raises(pytest.skip.Exception, match=reason):
        bench_hf.test_training_step(benchmark, name, provider)
    info = benchmark.extra_info
    assert (info["kernel"], info["provider"]) == (f"hf.{name}", provider)
    assert (info["ratio"], info["seconds"], info["reason"]) == (None, None, reason)


def test_the_patched_model_is_patched_and_the_other_is_not() -> None:
    shape = bench_hf.SMALL["llama-1b"]
    for provider in ("unpatched", "fastlm"):
        assert patched(bench_hf._patched(bench_hf._model(shape), provider)) == (provider == "fastlm")


def wrong(model: Any, provider: str) -> Any:
    if provider != "unpatched":
        hf.patch(model).lm_head.weight.register_hook(lambda g: 1.01 * g)
    return model


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is wrong at the small size, nor one that is wrong at the size that is timed alone."""
    monkeypatch.setattr(bench_hf, "_patched", wrong)
    bench_hf._check.cache_clear()
    with pytest.raises(AssertionError, match="gradient of"):
        bench_hf.test_training_step(Benchmark(), "llama-1b", "fastlm")
    monkeypatch.setattr(bench_hf, "_check", lambda name: None)
    with pytest.raises(AssertionError, match="norm of the gradients is"):
        bench_hf.measure("llama-1b", "fastlm")
    with pytest.raises(bench_hf.NotMeasured, match="norm of the gradients is"):
        bench_hf.measure("llama-1b", "liger")


def test_a_full_run_gives_ours_beside_the_best_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed and memory each beside whoever is best at it; who is not measured stands there with the reason."""
    figures = {
        "unpatched": {"tokens_per_second": 100.0, "peak_bytes": 60, "ratio": 1.0, "memory_ratio": 1.0},
        "fastlm": {"tokens_per_second": 300.0, "peak_bytes": 20, "ratio": 3.0, "memory_ratio": 3.0},
        "liger": {"tokens_per_second": 200.0, "peak_bytes": 80, "ratio": 2.0, "memory_ratio": 0.75},
    }

    def measure(name: str, provider: str) -> tuple[None, dict[str, Any]]:
        if provider not in figures:
            raise bench_hf.NotMeasured("Liger is not installed")
        return None, figures[provider]

    monkeypatch.setattr(bench_hf, "measure", measure)
    rows = [row for row in hf_items._compared("llama-1b", 60.0) if isinstance(row, Row)]
    last = {(row.name, row.provider): row for row in rows}
    speed, memory = (last[f"hf.llama-1b.{what}", "fastlm"] for what in ("tokens_per_second", "peak_memory"))
    assert (speed.value, speed.baseline, speed.ratio, speed.higher_is_better) == (300.0, 200.0, 1.5, True)
    assert (memory.value, memory.baseline, memory.ratio, memory.higher_is_better) == (20, 60, 3.0, False)
    assert last["hf.llama-1b.tokens_per_second", "liger"].value == 200.0
    del figures["liger"]
    absent = [row for row in hf_items._compared("llama-1b", 60.0) if isinstance(row, Row) and row.value is None]
    assert [(row.name, row.provider) for row in absent] == [
        ("hf.llama-1b.tokens_per_second", "liger: Liger is not installed")
    ]


def test_the_large_models_are_those_of_their_names() -> None:
    """Counted without memory."""
    counts = {}
    for name, shape in bench_hf.LARGE.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_hf, "DEVICE", torch.device("meta"))
            counts[name] = sum(p.numel() for p in bench_hf._model(shape).parameters())
    assert counts["gpt2-124m"] == pytest.approx(124e6, rel=0.01)
    assert 1.2e9 < counts["llama-1b"] < 1.3e9
