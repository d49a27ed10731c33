"""Collects bench_*.py, which the test suite's own pattern leaves out; names the device in the JSON; keeps records.

    --bench-records FILE    append each result to FILE, a line of JSON, as soon as it is there; what FILE already holds
                            of this device, these sources and versions is not measured again
    --bench-seconds N       stop after the benchmark that N seconds are over in

Together they measure in pieces: the same command, again, goes on. `python -m bench.report` reads such files too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import device
from bench.bench_kernels import plan
from bench.record import sources_hash, whole_lines


class Recorder:
    """Results as they come: in memory what could not be timed, in a file everything."""

    def __init__(self, path: Path | None, source: dict[str, Any]):
        self.path, self.source = path, source
        self.not_timed: list[dict[str, Any]] = []
        self.known = self._known()
        self._append({"source": source})

    def _known(self) -> set[str]:
        """The ids measured by this very source, but for the date; a line cut short goes."""
        found: set[str] = set()
        same = False
        if self.path is not None and self.path.exists():
            written = self.path.read_text()
            text = whole_lines(written)
            for line in text.splitlines():
                record = json.loads(line)
                if "source" in record:
                    same = all(record["source"].get(key) == self.source[key] for key in self.source if key != "date")
                elif same:
                    found.add(record["id"])
            # What is whole stays as it is on the disk, whatever happens now.
            os.truncate(self.path, min(len(written.encode()), len(text.encode())))
            if len(text) > len(written):
                with self.path.open("a") as file:
                    file.write("\n")
        return found

    def add(self, name: str, info: dict[str, Any]) -> None:
        """One result; `seconds` is None where there is none, and `reason` says why."""
        if "reason" in info:
            self.not_timed.append(info)
        self._append({"id": name, **info})

    def _append(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            whole = file.tell()
            try:
                file.write(json.dumps(record) + "\n")
                file.flush()
            except OSError:  # a full disk: no later line may stand behind half of this one
                os.truncate(self.path, whole)
                raise


_RECORDER = pytest.StashKey[Recorder]()
_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options above."""
    group = parser.getgroup("bench")
    group.addoption("--bench-records", type=Path, metavar="FILE", help="append each result to FILE, go on from it")
    group.addoption("--bench-seconds", type=float, metavar="N", help="stop after N seconds")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock. Warnings are no errors here: most would be those of rivals."""
    config.addinivalue_line("filterwarnings", "default")
    config.stash[_STARTED] = time.monotonic()
    source = device.provenance() | {"sources": sources_hash(Path(__file__).parent.parent)}
    config.stash[_RECORDER] = Recorder(config.getoption("--bench-records"), source)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """A module of benchmarks, unless it is collected already: by the configured pattern, or by its own name."""
    patterns = parent.config.getini("python_files")
    known = parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns)
    if file_path.match("bench_*.py") and not known:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is on record."""
    known = config.stash[_RECORDER].known
    done = [item for item in items if item.nodeid in known]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in known]


@pytest.fixture(autouse=True)
def _recorded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what a benchmark said about itself; stop when time is over."""
    yield
    # Asked of the item: asking for the fixture would make one in tests that measure nothing.
    benchmark = getattr(request.node, "funcargs", {}).get("benchmark")
    if benchmark is not None and "ratio" in benchmark.extra_info:  # else it failed
        request.config.stash[_RECORDER].add(request.node.nodeid, benchmark.extra_info)
    limit = request.config.getoption("--bench-seconds")
    if limit is not None and time.monotonic() - request.config.stash[_STARTED] > limit:
        request.session.shouldstop = f"{limit:g} seconds are over"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The device instead of the machine: neither its name nor its paths belong into results."""
    machine_info.clear()
    machine_info.update(device.provenance() | {"rates": device.rates()._asdict()})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """As above."""
    commit_info["project"] = "fastlm"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What could not be timed, and why, beside what was."""
    output_json["not_timed"] = config.stash[_RECORDER].not_timed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for all that needs a GPU."""
    if not device.GPU:
        count = len(plan(gpu=True))
        terminalreporter.write_line(f"not measured here: {count} benchmarks that need a GPU (there is none)")
