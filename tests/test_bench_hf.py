"""The bench of Hugging Face models checks, times and labels; it times what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import bench_hf
from fastlm_kernels import hf


class Benchmark:
    """As much of pytest-benchmark's fixture as the bench uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        """Once will do."""
        call()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU the large models would be timed."""
    monkeypatch.setattr(bench_hf, "GPU", False)
    monkeypatch.setattr(bench_hf, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_hf, "DTYPE", torch.float32)
    monkeypatch.setattr(bench_hf, "host_seconds", lambda call: (call(), 0.5)[1])


@pytest.mark.parametrize("name", bench_hf.LARGE)
def test_says_what_was_timed(name: str) -> None:
    for provider in ("unpatched", "fastlm"):
        benchmark = Benchmark()
        bench_hf.test_training_step(benchmark, name, provider)
        info = benchmark.extra_info
        assert (info["kernel"], info["provider"]) == (f"hf.{name}", provider)
        assert info["tokens_per_second"] == 2 * 62 / 0.5
        assert info["ratio"] == 1.0
        assert info["dtype"] == "float32"


def test_the_patched_model_is_patched_and_the_other_is_not() -> None:
    shape = bench_hf.SMALL["llama-1b"]
    for provider in ("unpatched", "fastlm"):
        model = bench_hf._patched(bench_hf._model(shape), provider)
        assert any(line.patched for line in hf.report(model)) == (provider == "fastlm")


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hf.patch

    def wrong(model: Any) -> Any:
        right(model).lm_head.weight.register_hook(lambda g: 1.01 * g)
        return model

    bench_hf._check.cache_clear()
    monkeypatch.setattr(hf, "patch", wrong)
    with pytest.raises(AssertionError, match="gradient of"):
        bench_hf.test_training_step(Benchmark(), "llama-1b", "fastlm")
    bench_hf._check.cache_clear()


def test_the_large_models_are_those_of_their_names() -> None:
    """Counted without memory."""
    counts = {}
    for name, shape in bench_hf.LARGE.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_hf, "DEVICE", torch.device("meta"))
            counts[name] = sum(p.numel() for p in bench_hf._model(shape).parameters())
    assert counts["gpt2-124m"] == pytest.approx(124e6, rel=0.01)
    assert 1.2e9 < counts["llama-1b"] < 1.3e9
