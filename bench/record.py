"""What a full run leaves behind, whole at every moment: full_run.json, and beside it what is done, failed or missing.

    full_run.json          {device, torch, triton, commit, date, rows: [...]}, rows as in `Row`
    full_run_state.json    {sources, done, failed, attempts}: what a second call goes on from

Both are replaced by renaming, so that a reader, or a kill at any moment, finds a whole file. A run of other sources or
on another device is never mixed in: it is renamed aside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS, STATE = "full_run.json", "full_run_state.json"
ABOUT = ("device", "torch", "triton", "commit", "date")
_SOURCES = ("bench", "fastlm", "kernels")


@dataclass(frozen=True)
class Row:
    """One figure. `value`, `baseline` and `target` are in `unit`; a ratio above 1 says that ours is better.

    provider   who gave the value; for an item that failed "error: ..." with the reason, and no value
    baseline   the best rival's value under the same conditions, None where there is none
    checked    whether the result was compared with PyTorch's right before it was timed, and was right
    """

    name: str
    shape: str
    dtype: str
    provider: str
    value: float | None
    unit: str
    higher_is_better: bool
    baseline: float | None = None
    ratio: float | None = None
    target: float | None = None
    checked: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a later row of the same replaces."""
        provider = "error" if self.provider.startswith("error: ") else self.provider
        return self.name, self.shape, self.dtype, provider


def sources_hash(root: Path) -> str:
    """Of every Python file and preset that a measurement depends on."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Record:
    """Rows and progress in memory and on disk. `sources` is the hash of what is measured.

    Raises OSError where `out` cannot be a directory, ValueError where a file there is no record.
    """

    def __init__(self, out: Path, sources: str):
        self.out, self.sources = out, sources
        self.about: dict[str, str] = {}
        self.rows: dict[tuple[str, str, str, str], Row] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        out.mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        state, results = _read(self.out / STATE), _read(self.out / RESULTS)
        if results is None:
            return
        if state is None or state.get("sources") != self.sources:
            self._set_aside(results)
            return
        self.about = {key: str(results[key]) for key in ABOUT}
        rows = (Row(**row) for row in results["rows"])
        self.rows = {row.key: row for row in rows}
        self.done, self.failed = set(state["done"]), dict(state["failed"])
        self.attempts = dict(state["attempts"])

    def _set_aside(self, results: Mapping[str, Any]) -> None:
        """Keep another run's results under another name, and begin anew."""
        stem = f"full_run-{results.get('date', 'undated')}-{results.get('commit', 'unknown')}"
        taken = next(n for n in range(1, 10_000) if not (self.out / f"{stem}-{n}.json").exists())
        os.replace(self.out / RESULTS, self.out / f"{stem}-{taken}.json")
        (self.out / STATE).unlink(missing_ok=True)

    def introduce(self, about: Mapping[str, str]) -> None:
        """Say what runs here; figures of another device or other versions are set aside. The first date stays."""
        found = {key: about[key] for key in ABOUT}
        same = all(self.about.get(key) == found[key] for key in ("device", "torch", "triton"))
        if self.about and not same:
            self._set_aside(self.about)
            self.rows, self.done, self.failed, self.attempts, self.about = {}, set(), {}, {}, {}
        if not self.about:
            self.about = found
            self.write()

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in, each in the place of an earlier one of the same, and write."""
        for row in rows:
            self.rows[row.key] = row
        self.write()

    def begin(self, item: str) -> None:
        """Note that an item is tried."""
        self.attempts[item] = self.attempts.get(item, 0) + 1

    def finish(self, item: str) -> None:
        """Note that an item has all its rows."""
        self.done.add(item)
        if self.failed.pop(item, None) is not None:
            self.rows.pop(_failure(item, "").key, None)
        self.write()

    def fail(self, item: str, reason: str) -> None:
        """Note why an item has no figure, as a row without a value too."""
        self.failed[item] = reason
        self.add([_failure(item, reason)])

    def missing(self, items: Iterable[str]) -> list[str]:
        """Those not done, in their order, but for the late ones, which come last."""
        return sorted((item for item in items if item not in self.done), key=self.late)

    def late(self, item: str) -> bool:
        """Whether an item has failed, or was begun twice without an end."""
        return item in self.failed or self.attempts.get(item, 0) > 1

    def write(self) -> None:
        """Replace both files."""
        rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in self.rows.values()]
        _replace(self.out / RESULTS, {**self.about, "rows": rows})
        state = {"sources": self.sources, "done": sorted(self.done), "failed": self.failed, "attempts": self.attempts}
        _replace(self.out / STATE, state)


def whole_lines(text: str) -> str:
    """Lines of JSON without a last one that was cut short, by a kill or a full disk."""
    end = text.rfind("\n") + 1
    try:
        json.loads(text[end:])
    except json.JSONDecodeError:
        return text[:end]
    return text + "\n"  # all but its end was written


def _failure(item: str, reason: str) -> Row:
    name, _, shape = item.partition(" ")
    return Row(name, shape, "", f"error: {reason}", None, "", True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file; ValueError where it is none of ours."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"its {path.name} holds no JSON object")
    return found


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
