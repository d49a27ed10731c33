"""Results of benchmarks, read back: from pytest-benchmark's JSON, from records, from full runs, from earlier reports.

A file is one of
    pytest-benchmark's JSON     `pytest bench --benchmark-only --benchmark-json=FILE`
    records, lines of JSON      `pytest bench --benchmark-only --bench-records=FILE`
    full_run.json               `python -m bench.full_run`
    kernels.json                what a report leaves behind, from which it can be made again
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.device import is_cpu
from bench.record import whole_lines
from fastlm.errors import InputError

KERNELS_FILE, FULL_RUN_FILE = "kernels.json", "full_run.json"
SOURCE = ("device", "torch", "triton", "python", "commit", "date")
_NEEDED = ("device", "torch", "triton", "commit", "date")
# What of a benchmark's extra_info a report needs.
_KEPT = (
    *("kernel", "direction", "provider", "mode", "shape", "dtype", "ratio", "path", "checked", "repeats", "reason"),
    *("seconds", "low_seconds", "high_seconds", "rounds", "timed_by", "host_seconds", "bytes", "flops"),
    *("bytes_per_second", "flops_per_second", "bandwidth_share", "matmul_share", "peak_bytes", "launches"),
    *("memory_ratio", "tokens_per_second", "mfu", "mfu_causal", "valid", "first_step_seconds", "compile_seconds"),
    *("compiled", "cuda_graphs", "attention", "kernels", "tokens", "loss", "reached", "recipe"),
)
_KEPT_OF_A_BINARY = ("kernel", "registers", "spill_bytes", "shared_bytes")

Info = dict[str, Any]
Source = dict[str, str]


def split(info: Info) -> tuple[str, str]:
    """("rms_norm", "forward") of a result of "rms_norm.forward"."""
    kernel, _, direction = info["kernel"].partition(".")
    return kernel, direction


@dataclass
class Results:
    """All that is known of one device.

    sources    where figures come from, the last read last
    timed      {(kernel, provider, shape, dtype): info}; info["seconds"] is None where info["reason"] says why
    resources  what binaries use: kernel, architecture, binaries
    rows       a full run's rows, each with its source
    """

    device: str
    sources: list[Source] = field(default_factory=list)
    timed: dict[tuple[str, str, str, str], Info] = field(default_factory=dict)
    resources: list[Info] = field(default_factory=list)
    rows: list[Info] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return not is_cpu(self.device)

    def rate(self, per_second: str, share: str) -> float | None:
        """The device's own rate, bytes or FLOPs a second, to which the shares refer: the median over sessions."""
        found = {info[per_second] / info[share] for info in self.timed.values() if info.get(share)}
        return statistics.median(found) if found else None

    def of(self, kernel: str) -> Iterator[Info]:
        """What is known of "rms_norm", in all directions, timed or not."""
        return (info for info in self.timed.values() if split(info)[0] == kernel)


def load(paths: Iterable[Path]) -> Results:
    """The files together, later ones replacing what earlier ones say of the same; raises InputError."""
    results: Results | None = None
    for path in paths:
        for source, infos, rows in _parts(path):
            if results is None:
                results = Results(source["device"])
            if source["device"] != results.device:
                raise InputError(
                    str(path), source["device"], f"the files before are of {results.device}; one device a report"
                )
            _add(results, source, infos, rows)
    if results is None or not (results.timed or results.resources or results.rows):
        raise InputError("FILE", "no results", "give a file that a benchmark wrote")
    return results


def _add(results: Results, source: Source, infos: Iterable[Info], rows: Iterable[Info]) -> None:
    used = False
    for info in infos:
        used = True
        if info["provider"] == "aot":
            kept = {key: info[key] for key in ("kernel", "shape", "architecture")}
            kept["binaries"] = [{key: row[key] for key in _KEPT_OF_A_BINARY} for row in info["binaries"]]
            results.resources.append(kept | {"source": source})
            continue
        kept = {key: info[key] for key in _KEPT if info.get(key) is not None}
        key = (info["kernel"], info["provider"], info["shape"], info["dtype"])
        results.timed[key] = {"seconds": None, "ratio": None, **kept, "source": source}
    for row in rows:
        used = True
        results.rows.append(row | {"source": source})
    if used and source not in results.sources:
        results.sources.append(source)


def _parts(path: Path) -> Iterator[tuple[Source, list[Info], list[Info]]]:
    """(source, benchmarks, rows) for each source in a file."""
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError("FILE", path, f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError("FILE", path, "it is not text; give a JSON file that a benchmark wrote") from None
    try:
        try:
            parts = list(_of_document(json.loads(text)))
        except json.JSONDecodeError:
            parts = list(_of_lines(text))
        for source, infos, rows in parts:
            _check(source, infos, rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"it is not what a benchmark writes ({type(error).__name__}: {error}); give another file"
        raise InputError("FILE", path, why) from None
    yield from parts


def _of_document(document: Any) -> Iterator[tuple[Source, list[Info], list[Info]]]:
    if "source" in document:  # records of which nothing came but the first line
        yield from _of_lines(json.dumps(document) + "\n")
    elif "benchmarks" in document:
        infos = [b["extra_info"] for b in document["benchmarks"]] + document.get("not_timed", [])
        yield _source(document["machine_info"]), infos, []
    elif "sources" in document:  # kernels.json
        for number, source in enumerate(document["sources"]):
            infos = [info for info in (*document["timed"], *document["resources"]) if info["source"] == number]
            yield _source(source), [{"provider": "aot", **info} for info in infos], []
    else:
        yield _source(document), [], document["rows"]


def _of_lines(text: str) -> Iterator[tuple[Source, list[Info], list[Info]]]:
    lines = [json.loads(line) for line in whole_lines(text).splitlines()]
    if not lines or "source" not in lines[0]:
        raise KeyError("source")
    starts = [at for at, line in enumerate(lines) if "source" in line]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield _source(lines[start]["source"]), lines[start + 1 : stop], []


def _source(record: Info) -> Source:
    return {key: str(record[key]) for key in SOURCE if key in _NEEDED or key in record}


def _check(source: Source, infos: list[Info], rows: list[Info]) -> None:
    """Raise KeyError or TypeError for results that lack what every table needs."""
    for info in infos:
        for key in ("kernel", "provider", "shape"):
            if not isinstance(info[key], str):
                raise TypeError(f"{key} is {info[key]!r}")
    for row in rows:
        if missing := {"name", "value", "unit"} - set(row):
            raise KeyError(", ".join(sorted(missing)))


def save(results: Results, path: Path) -> None:
    """kernels.json: what was timed, a result a line, in a stable order."""

    def lines(infos: Iterable[Info]) -> str:
        numbered = ({**info, "source": results.sources.index(info["source"])} for info in infos)
        return ",\n".join(json.dumps({key: _short(value) for key, value in info.items()}) for info in numbered)

    timed = (results.timed[key] for key in sorted(results.timed))
    sources = ",\n".join(map(json.dumps, results.sources))
    parts = {"sources": sources, "timed": lines(timed), "resources": lines(results.resources)}
    path.write_text("{" + ",\n".join(f'"{name}": [\n{part}\n]' for name, part in parts.items()) + "}\n")


def _short(value: Any) -> Any:
    """A number to five digits: no measurement here is better."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
