"""loss.png: train and validation loss against tokens, drawn from the record in metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

INK = {"train": "#3b6ea5", "val": "#c8553d"}


def plot_loss(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of metrics.jsonl's `records` into the PNG at `path`, replaced in one rename.

    Losses in nats per token; points without one (null) leave a gap, and a run without any gives empty axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    train = _points(records, "train", "loss")
    validation = _points(records, "eval", "val_loss")
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    single = "." if len(train[0]) <= 50 else ""  # a point between gaps has no line to show it
    axes.plot(*train, color=INK["train"], linewidth=1.2, marker=single, label="train")
    axes.plot(*validation, color=INK["val"], linewidth=1.8, marker="o", markersize=4, label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        canvas.print_png(file)
    os.replace(temporary, path)


def _points(records: list[Mapping[str, Any]], event: str, name: str) -> tuple[list[int], list[float]]:
    chosen = [record for record in records if record["event"] == event]
    losses = [float("nan") if record.get(name) is None else record[name] for record in chosen]
    return [record["tokens"] for record in chosen], losses
