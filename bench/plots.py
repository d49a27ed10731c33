"""Plots of benchmark results: a roofline, bars of ratios, and attention's rates over the length."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.results import Info, Results, split
from bench.tables import ATTENTION, DIRECTIONS, FAMILIES, NOT_MEASURED, caption, rate

COLOURS = {
    "fastlm": "#c8553d",
    "fastlm-unordered": "#e8a87c",
    "eager": "#9aa5b1",
    "compile": "#3b6ea5",
    "liger": "#5b8c5a",
    "foreach": "#3b6ea5",
}
_OTHERS = ("#6b4e9b", "#2a9d8f", "#b08900", "#7d8597", "#8d5a97", "#457b9d", "#bc6c25", "#606c38", "#a44a3f", "#264653")
_MARKS = "osD^v<>PX*ph8d"
_BARS = ("fastlm", "compile", "liger", "foreach")


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    """(figure, its axes), an array of them for rows and columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else figure.subplots()


def _finish(figure: Any, title: str, infos: Iterable[Info], path: Path) -> None:
    """Title above, sources below."""
    sources = {id(info["source"]): info["source"] for info in infos}
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(caption(sources.values()), fontsize=7, color="#555555")
    # No time or version of the library in the file: the same results give the same bytes.
    figure.savefig(path, metadata={"Software": None})


def roofline(results: Results, path: Path) -> bool:
    """Each kernel's largest shape, forward and backward, under what the device can do; False if there is nothing."""
    copy, matmul = results.rate("bytes_per_second", "bandwidth_share"), results.rate("flops_per_second", "matmul_share")
    points = [info for kernel in FAMILIES if (info := _largest(results, kernel)) is not None]
    if copy is None or matmul is None or not points:
        return False
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(8.5, 5.2)
    places = [info["flops"] / info["bytes"] for info in points]
    low, high = min(*places, matmul / copy) / 10, max(*places, matmul / copy) * 4
    _roof(axes, copy, matmul, low, high)
    for number, (info, place) in enumerate(zip(points, places, strict=True)):
        kernel = split(info)[0]
        axes.plot(
            place,
            info["flops_per_second"],
            _MARKS[number % len(_MARKS)],
            markersize=7,
            alpha=0.85,
            color=_OTHERS[number % len(_OTHERS)],
            label=f"{kernel}  {info['shape']}",
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = [info["flops_per_second"] for info in points] + [copy * low, matmul]
    axes.set_ylim(10 ** math.floor(math.log10(min(rates))), 10 ** math.ceil(math.log10(max(rates))))
    axes.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
    axes.set_xlabel("FLOPs a byte that must move")
    axes.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right center", fontsize=6.5, frameon=False)
    _finish(figure, "Roofline: fastlm, forward + backward, largest shape measured", points, path)
    return True


def _roof(axes: Any, copy: float, matmul: float, low: float, high: float) -> None:
    """The most that the device can do, from `low` to `high` FLOPs a byte."""
    ridge = matmul / copy
    axes.plot([low, ridge, high], [copy * low, matmul, matmul], color="#333333", linewidth=1.4)
    on_line = low * (ridge / low) ** 0.1
    axes.annotate(
        f"copy {rate(copy, 'B/s')}",
        (on_line, copy * on_line),
        (8, -4),
        textcoords="offset points",
        fontsize=8,
        ha="left",
        color="#333333",
    )
    axes.annotate(
        f"matmul {rate(matmul, 'FLOP/s')}",
        (high, matmul),
        (-4, 4),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        color="#333333",
    )


def _largest(results: Results, kernel: str) -> Info | None:
    found = [
        info
        for info in results.of(kernel)
        if info["provider"] == "fastlm" and split(info)[1] == "forward_backward" and info.get("flops")
    ]
    timed = [info for info in found if info["seconds"]]
    return max(timed, key=lambda info: info["bytes"], default=None)


def ratios(results: Results, path: Path) -> bool:
    """Bars a kernel: the median over shapes of the speed against PyTorch eager; False if nothing was timed."""
    figure, axes = _figure(8.5, 0.33 * len(FAMILIES) + 1.4)
    used: list[Info] = []
    for place, kernel in enumerate(reversed(FAMILIES)):
        medians = {}
        for provider in _BARS:
            found = [i for i in results.of(kernel) if i["provider"] == provider and i["ratio"] and _whole(i)]
            used += found
            if found:
                medians[provider] = statistics.median(info["ratio"] for info in found)
        if "fastlm" not in medians:
            axes.text(0.02, place, NOT_MEASURED, va="center", fontsize=7, color="#888888")
        height = 0.8 / max(len(medians), 1)
        for slot, (provider, value) in enumerate(medians.items()):
            at = place + 0.4 - height * (slot + 0.5)
            axes.barh(at, value, height * 0.9, color=COLOURS[provider], label=provider)
            axes.text(value, at, f"{value:.2f} ", va="center", ha="right", fontsize=6.5, color="white")
    if not used:
        return False
    axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(FAMILIES)), list(reversed(FAMILIES)), fontsize=7.5)
    axes.set_xlabel("speed against PyTorch eager (adamw: against torch's fused step), dashed: equal")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(FAMILIES) - 0.4)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(unique)}
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=8, **place)
    _finish(figure, "Forward + backward, median over all shapes measured", used, path)
    return True


def _whole(info: Info) -> bool:
    return split(info)[1] in ("forward_backward", "clipped")


def attention(results: Results, path: Path) -> bool:
    """TFLOP/s over the length, causal: a row a head dimension, a column a direction; False if there is no series."""
    series = _series(results)
    if not series:
        return False
    widths = sorted({width for (width, _), _ in series})
    directions = [name for name in DIRECTIONS if any(panel[1] == name for panel, _ in series)]
    figure, axes = _figure(4.6 * len(directions), 3.7 * len(widths) + 0.6, len(widths), len(directions))
    providers = sorted({provider for _, provider in series}, key=lambda name: (name not in COLOURS, name))
    colours = COLOURS | dict(zip((name for name in providers if name not in COLOURS), cycle(_OTHERS), strict=False))
    for (width, direction), provider in sorted(series, key=lambda key: providers.index(key[1])):
        points = series[(width, direction), provider]
        at = axes[widths.index(width), directions.index(direction)]
        lengths = sorted(points)
        rates = [points[length]["flops_per_second"] / 1e12 for length in lengths]
        ours, dashed = provider.startswith("fastlm"), provider.endswith(("-deterministic", "-unordered"))
        style = {"linewidth": 2.4 if ours else 1.1, "linestyle": "--" if dashed else "-", "zorder": 3 if ours else 2}
        at.plot(lengths, rates, color=colours[provider], marker="o", markersize=3, label=provider, **style)
        at.set_title(f"head dimension {width}, {DIRECTIONS[direction]}", fontsize=9)
    found: dict[str, Any] = {}
    for at in axes.flat:
        at.set_xscale("log", base=2)
        at.xaxis.set_major_formatter(lambda length, _: f"{length / 1024:g}k")
        at.set_ylim(0)  # only now: it fixes the upper end too
        at.set_ylabel("TFLOP/s")
        at.grid(alpha=0.25)
        found |= {label: handle for handle, label in zip(*at.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8, frameon=False)
    used = [info for points in series.values() for info in points.values()]
    _finish(figure, "Attention, causal, 16k tokens, by the length of a sequence", used, path)
    return True


def _series(results: Results) -> dict[tuple[tuple[int, str], str], dict[int, Info]]:
    """{((head dimension, direction), provider): {length: info}} of plain causal attention, two lengths or more."""
    series: dict[tuple[tuple[int, str], str], dict[int, Info]] = {}
    for info in results.of(ATTENTION[0]):
        shape = re.fullmatch(r"rows(\d+)-columns(64|128)-batch\d+-heads(\d+)-kv_heads(\d+)-causal", info["shape"])
        if shape is None or shape[3] != shape[4] or not info["seconds"]:
            continue
        panel = (int(shape[2]), split(info)[1])
        series.setdefault((panel, info["provider"]), {})[int(shape[1])] = info
    lengths = {row for points in series.values() for row in points}
    return series if len(lengths) > 1 else {}


PLOTS = {"roofline.png": roofline, "ratios.png": ratios, "attention.png": attention}
