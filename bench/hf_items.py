"""What a full run asks of Hugging Face models: tokens a second and peak memory beside the unpatched model and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench import bench_hf
from bench.device import GPU
from bench.kernel_items import Task
from bench.providers import installed
from bench.record import Row

# Figure of `bench_hf` -> (its name here, unit, whether higher is better, the ratio to the unpatched model).
_FIGURES = {
    "tokens_per_second": ("tokens_per_second", "tokens/s", True, "ratio"),
    "peak_bytes": ("peak_memory", "bytes", False, "memory_ratio"),
}


def tasks() -> dict[str, list[Task]]:
    """A task a model; none where transformers is not installed."""
    names = bench_hf.LARGE if installed("transformers") else ()
    return {"hugging_face": [Task(f"hf.{name}", 15 if GPU else 1, 120, partial(_compared, name), 3) for name in names]}


def _compared(name: str, seconds: float) -> Iterator[Row | str]:
    """Every provider as soon as it is measured, who cannot be with the reason, then ours beside the best rival."""
    found: dict[str, dict[str, Any]] = {}
    for provider in bench_hf.PROVIDERS:
        try:
            found[provider] = bench_hf.measure(name, provider)[1]
        except bench_hf.NotMeasured as why:
            yield _row(name, f"{provider}: {why}", "tokens_per_second", None)
            continue
        yield from (_row(name, provider, figure, found[provider][figure]) for figure in _FIGURES)
    ours = found.pop("fastlm", None)
    for figure, (_, _, _, relative) in _FIGURES.items():
        rivals = [info for info in found.values() if info[relative] is not None]
        if ours is None or ours[relative] is None or not rivals:
            continue
        best = max(rivals, key=lambda info: info[relative])
        ratio = ours[relative] / best[relative]
        yield _row(name, "fastlm", figure, ours[figure], best[figure], ratio)


def _row(name: str, provider: str, figure: str, value: float | None, *beside: float) -> Row:
    """`beside`: the best rival's value and the ratio to it."""
    about, (title, unit, higher, _) = bench_hf.what(name, provider), _FIGURES[figure]
    where, checked = (about["shape"], about["dtype"]), value is not None
    return Row(f"hf.{name}.{title}", *where, provider, value, unit, higher, *beside, checked=checked)
