"""Markdown tables of benchmark results. Every table carries its sources; what was never measured says so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.cases import TIMED
from bench.providers import FLASH, SDPA
from bench.results import Info, Results, Source, split

NOT_MEASURED = "not measured"
DIRECTIONS = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}
_TITLES = {**DIRECTIONS, "step": "step", "clipped": "clipped", "host": "host time of a step over many small tensors"}
_RIVALS = ("eager", "compile", "liger")
_ATTENTION_RIVALS = (
    "fastlm-unordered",
    "fastlm-gluon",
    "eager",
    "compile",
    "torch-varlen",
    *(
        name + suffix
        for name in SDPA
        for suffix in ("", "-deterministic")
        if name + suffix != "sdpa-math-deterministic"
    ),
    *(name + suffix for name in FLASH for suffix in ("", "-deterministic")),
)
ATTENTION = ("scaled_dot_product_attention", "varlen_attn")
_OPTIMIZER_RIVALS = ("fused", "foreach")
FAMILIES = (*(kernel.name for kernel in TIMED), "adamw")


def rivals_of(kernel: str) -> tuple[str, ...]:
    """Who may compete on this kernel, in the order of the columns."""
    if kernel == "adamw":
        return _OPTIMIZER_RIVALS
    return _ATTENTION_RIVALS if kernel in ATTENTION else _RIVALS


def baseline_of(kernel: str) -> str:
    """Whom ratios refer to."""
    return "torch's fused step" if kernel == "adamw" else "PyTorch eager"


def caption(sources: Iterable[Source]) -> str:
    """One line a source: device, versions, commit, date."""
    return "; ".join(
        f"{s['device']}, torch {s['torch']}, triton {s['triton']}, commit {s['commit']}, {s['date']}" for s in sources
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three digits in the unit that fits: "12.3 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def share(value: float | None) -> str:
    """A share in percent."""
    return NOT_MEASURED if value is None else f"{100 * value:.3g} %"


def times(value: float | None) -> str:
    """A ratio."""
    return NOT_MEASURED if value is None else f"{value:.2f}x"


def cell(info: Info | None) -> str:
    """A rival's time, or why there is none."""
    if info is None:
        return NOT_MEASURED
    if info["seconds"] is None:
        reason = info.get("reason", NOT_MEASURED)
        return NOT_MEASURED if reason.startswith(NOT_MEASURED) else f"none: {reason}".replace("|", "/")
    return duration(info["seconds"]) + ("" if info.get("repeats", True) else " *")


def _memory(info: Info) -> str:
    return NOT_MEASURED if info.get("peak_bytes") is None else f"{info['peak_bytes'] / 2**20:.4g} MiB"


def _rows(found: list[Info], rivals: Sequence[str]) -> Iterable[list[str]]:
    """A row a shape: ours in full, the others' times."""
    shapes = dict.fromkeys((info["shape"], info["dtype"]) for info in found)
    for shape, dtype in shapes:
        by = {info["provider"]: info for info in found if (info["shape"], info["dtype"]) == (shape, dtype)}
        ours = by.get("fastlm")
        row = [f"{shape} {dtype}", cell(ours)]
        if ours is None or ours["seconds"] is None:
            row += [NOT_MEASURED] * 8
        else:
            others = [i["seconds"] for name, i in by.items() if not name.startswith("fastlm") and i["seconds"]]
            best = min(others) / ours["seconds"] if others else None
            low, high = ours.get("low_seconds"), ours.get("high_seconds")
            row += [NOT_MEASURED if low is None or high is None else f"{duration(low)} - {duration(high)}"]
            row += [times(ours.get("ratio")), times(best)]
            row += [share(ours.get("bandwidth_share")), share(ours.get("matmul_share")), _memory(ours)]
            row += [str(ours.get("launches", NOT_MEASURED)), _optional(ours.get("host_seconds"), duration)]
        yield row + [cell(by.get(rival)) for rival in rivals]


def kernel_section(results: Results, kernel: str) -> str:
    """All that was timed of one kernel, a table a direction."""
    found = list(results.of(kernel))
    parts = [f"## {kernel}"]
    if not found:
        return f"{parts[0]}\n\n{NOT_MEASURED}\n"
    rivals = rivals_of(kernel)
    baseline = baseline_of(kernel).removeprefix("PyTorch ").removeprefix("torch's ")
    header = ["shape", "fastlm", "10 - 90 %", f"against {baseline}", "against the best rival"]
    header += ["of copy", "of matmul", "memory", "launches", "host", *rivals]
    for name in sorted({split(info)[1] for info in found}, key=_place):
        of_it = [info for info in found if split(info)[1] == name]
        sources = {id(info["source"]): info["source"] for info in of_it}
        parts += [f"### {_TITLES.get(name, name)}", table(header, _rows(of_it, rivals)), caption(sources.values())]
    return "\n\n".join(parts) + "\n"


def _place(direction: str) -> tuple[int, str]:
    """Where a table stands: what has no title comes last, by name."""
    known = list(_TITLES)
    return (known.index(direction) if direction in known else len(known), direction)


def _optional(value: Any, form: Callable[[Any], str]) -> str:
    return NOT_MEASURED if value is None else form(value)


def training_section(results: Results) -> str:
    """Updates of training, and the time to a loss, beside the plain model's."""
    parts = ["## Training"]
    updates, races = list(results.of("train_step")), list(results.of("time_to_loss"))
    if updates:
        header = [
            "shape",
            "provider",
            "tokens/s",
            "ratio",
            "MFU",
            "MFU, causal",
            "memory",
            "first step",
            "compile",
            "by",
        ]
        parts.append(table(header, map(_update_row, updates)))
    if races:
        rows = [
            [
                f"{info['shape']} {info['dtype']}",
                ": ".join(info[key] for key in ("provider", "recipe") if key in info),
                _optional(info.get("tokens"), number),
                _optional(info["seconds"], duration),
                _optional(info.get("reached"), lambda reached: "yes" if reached else "no"),
                times(info["ratio"]),
            ]
            for info in races
        ]
        about = (
            "Recipes of model and optimizer to the same loss: what one learns from a token counts as much as its speed."
        )
        parts += [about, table(["time to a loss", "recipe", "tokens", "seconds", "reached", "ratio"], rows)]
    sources = {id(info["source"]): info["source"] for info in (*updates, *races)}
    parts.append(caption(sources.values()) if sources else NOT_MEASURED)
    return "\n\n".join(parts) + "\n"


def hugging_face_section(results: Results) -> str:
    """Steps of transformers' models: unpatched, ours, Liger's; who could not be measured says why."""
    found = sorted(results.of("hf"), key=lambda info: [info[name] for name in ("kernel", "shape", "dtype", "provider")])
    if not found:
        return f"## Hugging Face models\n\n{NOT_MEASURED}\n"
    about = (
        "A forward and backward in training mode; ratios refer to the unpatched model, above 1 is faster or smaller."
    )
    rows = []
    for info in found:
        speed = cell(info) if info["seconds"] is None else _optional(info.get("tokens_per_second"), number)
        row = [split(info)[1], f"{info['shape']} {info['dtype']}", info["provider"], speed, times(info["ratio"])]
        rows.append([*row, _memory(info), times(info.get("memory_ratio"))])
    header = ["model", "shape", "provider", "tokens/s", "ratio", "memory", "memory ratio"]
    sources = {id(info["source"]): info["source"] for info in found}
    return f"## Hugging Face models\n\n{about}\n\n{table(header, rows)}\n\n{caption(sources.values())}\n"


def _update_row(info: Info) -> list[str]:
    if info["seconds"] is None:
        return [info["shape"], info["provider"], cell(info), *[NOT_MEASURED] * 6, ""]
    ratio = times(info["ratio"]) if info.get("valid", True) else f"{times(info['ratio'])} (does not count)"
    row = [
        f"{info['shape']} {info['dtype']}",
        info["provider"],
        _optional(info.get("tokens_per_second"), number),
        ratio,
    ]
    row += [share(info.get(name)) for name in ("mfu", "mfu_causal")] + [_memory(info)]
    row += [_optional(info.get(name), duration) for name in ("first_step_seconds", "compile_seconds")]
    switches = {"compiled": "compiled", "cuda_graphs": "CUDA graphs"}
    chosen = [f"{info[name]} {name}" for name in ("kernels", "attention") if name in info]
    return [*row, ", ".join(chosen + [text for name, text in switches.items() if info.get(name)])]


def resources_section(results: Results) -> str:
    """What compiled binaries use, the most of each kernel's."""
    if not results.resources:
        return f"## Binaries\n\n{NOT_MEASURED}\n"
    rows = []
    for info in results.resources:
        used = info["binaries"]
        most = [str(max(row[key] for row in used)) for key in ("registers", "spill_bytes", "shared_bytes")]
        rows.append([info["kernel"], info["architecture"], info["shape"], str(len(used)), *most])
    header = ["kernel", "architecture", "case", "binaries", "registers", "spilled bytes", "shared bytes"]
    sources = {id(info["source"]): info["source"] for info in results.resources}
    about = "Compiled ahead of time, bf16; the most that any binary of the call, forward or backward, uses."
    return f"## Binaries\n\n{about}\n\n{table(header, rows)}\n\n{caption(sources.values())}\n"


def number(value: float | None) -> str:
    """A figure of a full run."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def met(row: Info) -> bool:
    """Whether a full run's row with a target reaches it."""
    if row.get("higher_is_better", True):
        return row["value"] >= row["target"]
    return row["value"] <= row["target"]


def full_run_section(results: Results) -> str:
    """A full run's rows, beside their targets."""
    if not results.rows:
        return f"## Full run\n\n{NOT_MEASURED}\n"
    rows = []
    for row in results.rows:
        target, value = row.get("target"), row["value"]
        verdict = "" if target is None or value is None else "yes" if met(row) else "no"
        cells = [row["name"], row.get("shape") or "", row.get("dtype") or "", row.get("provider") or ""]
        cells += [f"{number(value)} {row['unit']}".strip(), number(row.get("baseline")), times(row.get("ratio"))]
        rows.append([*(text.replace("|", "/") for text in cells), "" if target is None else number(target), verdict])
    header = ["figure", "shape", "dtype", "provider", "value", "best rival", "ratio", "target", "met"]
    sources = {id(row["source"]): row["source"] for row in results.rows}
    return f"## Full run\n\n{table(header, rows)}\n\n{caption(sources.values())}\n"


def report(results: Results, plots: Sequence[str]) -> str:
    """The whole report in Markdown; `plots` are the names of image files beside it."""
    parts = [f"# {results.device}\n", f"Sources: {caption(results.sources)}.\n", _legend(results)]
    parts += [f"![{name.removesuffix('.png')}]({name})\n" for name in plots]
    parts += [full_run_section(results), training_section(results), hugging_face_section(results)]
    parts += [*(kernel_section(results, kernel) for kernel in FAMILIES)]
    parts.append(resources_section(results))
    return "\n".join(parts)


def rate(value: float | None, unit: str) -> str:
    """A rate in the unit's billions, or thousands of billions: "20.8 GB/s", "812 TFLOP/s"."""
    if value is None:
        return NOT_MEASURED
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def _legend(results: Results) -> str:
    copy = rate(results.rate("bytes_per_second", "bandwidth_share"), "B/s")
    matmul = rate(results.rate("flops_per_second", "matmul_share"), "FLOP/s")
    text = f"""\
Times are medians, beside their 10 and 90 % quantiles; a ratio above 1 says that ours is faster. A star: two runs on the
same inputs gave different bits. "Host" is the time that an eager call keeps the host. Every kernel was checked right
before it was timed. Shares refer to what the device was measured to do in the same session: a large copy, {copy},
and a large matrix product, {matmul}.
"""
    if not results.on_gpu:
        text += """
On a CPU ours are PyTorch's operators: ratios show what asking costs, and noise. They compare the fastest of runs that
took turns. Shapes are small and stay in the caches, so that shares may pass 100 %.
"""
    return text


def headline(results: Results, kernel: str) -> str:
    """A kernel's cell in the README: the median ratio of all its shapes and the best share of the GPU's rates."""
    last = "clipped" if kernel == "adamw" else "forward_backward"
    found = [
        info for info in results.of(kernel) if info["provider"] == "fastlm" and info["kernel"].endswith(f".{last}")
    ]
    ratios = [info["ratio"] for info in found if info["ratio"]]
    if not ratios:
        return NOT_MEASURED
    shares = [max(info.get("bandwidth_share", 0.0), info.get("matmul_share", 0.0)) for info in found]
    shapes = f"{len(ratios)} shape{'s'[: len(ratios) > 1]}"
    return f"{statistics.median(ratios):.2f}x ({shapes}), {share(max(shares, default=math.nan))}"


def readme_block(devices: Sequence[Results]) -> str:
    """README's tables: kernels, a column a GPU; training on every device; full runs. What nobody measured says so."""
    gpus = [results for results in devices if results.on_gpu]
    runs = [_full_run_summary(results) for results in gpus if results.rows]
    parts = [_kernels_on(gpus), *_training_on(devices), *runs]
    if not runs:
        parts.append(f"Training and the full run (`python -m bench.full_run`) on a GPU: {NOT_MEASURED}.")
    sources = [source for results in devices for source in results.sources]
    return "\n\n".join([*parts, f"Measured on: {caption(sources) if sources else NOT_MEASURED}."])


def _kernels_on(gpus: Sequence[Results]) -> str:
    if not gpus:
        return f"Kernels on a GPU: {NOT_MEASURED}. On a CPU they do not run: fastlm takes PyTorch's operators there."
    about = (
        "Forward + backward against PyTorch eager, AdamW with clipping against torch's fused step: the median\n"
        "ratio over shapes, above 1 is faster, and the best share of the GPU's measured copy bandwidth or matmul rate."
    )
    rows = ([f"`{kernel}`", *(headline(results, kernel) for results in gpus)] for kernel in FAMILIES)
    return f"{about}\n\n{table(['kernel', *(results.device for results in gpus)], rows)}"


def _training_on(devices: Sequence[Results]) -> Iterable[str]:
    """A table of our training steps that were measured, if any was."""
    rows = []
    for results in devices:
        for info in results.of("train_step"):
            if info["provider"] == "fastlm" and info["seconds"] is not None:
                speed = _optional(info.get("tokens_per_second"), number)
                rows.append([f"`{info['shape'].partition('-T')[0]}`", results.device, speed, times(info["ratio"])])
    if rows:
        yield table(["training", "on", "tokens/s", "against plain PyTorch of the same architecture"], rows)


def _full_run_summary(results: Results) -> str:
    """A full run's figures by name: how many, their median ratio, and how many meet their targets."""
    names: dict[str, list[Info]] = {}
    for row in results.rows:
        if row.get("provider", "").startswith("fastlm") and row["value"] is not None:
            names.setdefault(row["name"], []).append(row)
    rows = []
    for name, found in names.items():
        ratios = [row["ratio"] for row in found if row.get("ratio") is not None]
        judged = [met(row) for row in found if row.get("target") is not None]
        value = f"{number(found[0]['value'])} {found[0]['unit']}" if len(found) == 1 else f"{len(found)} shapes"
        ratio = times(statistics.median(ratios)) if ratios else ""
        rows.append([f"`{name}`", value, ratio, f"{sum(judged)} of {len(judged)}" if judged else ""])
    sources = {id(row["source"]): row["source"] for row in results.rows}
    header = ["full run", "value", "against the best rival, median", "targets met"]
    return f"{table(header, rows)}\n\nMeasured on: {caption(sources.values())}."
