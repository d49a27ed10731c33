"""Runs the parts of a full run within a budget: hands items to worker processes, takes their rows, outlives them.

A worker (`bench.full_items`) is a process of its own, because a kernel that reads out of bounds ends every CUDA call of
its process, and one that hangs ends nothing. It is handed one item at a time on its stdin and answers on its stdout, a
JSON object a line:

    {"about": {...}, "items": {PART: [{"item", "needs", "limit", "call"}, ...]}}      first, once
    {"refused": [KEY, VALUE, REMEDY]}      instead, where the input asks for what this machine has not
    {"rows": [...]}      {"note": "..."}      {"done": true}      {"error": "...", "fatal": true or false}

An item that fails is noted and the next one follows; after a fatal error, a crash, or silence beyond the item's limit
the worker is replaced. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.plan import FIRST, SIDE_BY_SIDE, TOLERANCE, Item, Stage, kept, reserved, stages
from bench.record import Record, Row
from fastlm.errors import InputError

ROOT = Path(__file__).parent.parent
_START_SECONDS = 120  # of a worker's first words: imports, a CUDA context
_CLOSING_SECONDS = 4  # kept for the end: killing, writing, the table
_FAREWELL_SECONDS = 5  # for a process to end
_SPARE_WORKERS = 2  # of those that checked side by side: a start takes long
_PATIENCE = 3  # workers in a row that say nothing at all, before a part makes do with those it has


@dataclass
class Worker:
    """A process that does items, and the one that it is at; `until` is when it will be killed."""

    process: subprocess.Popen[bytes]
    until: float
    item: str | None = None
    limited: bool = False  # whether `until` is the item's own limit, or others wait for the time
    ready: bool = False
    buffer: bytes = b""
    answered: bool = field(default=False)

    @property
    def out(self) -> IO[bytes]:
        """What it answers on."""
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, item: str, seconds: float) -> None:
        """Hand an item over; a worker that is gone is noticed when its answers end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({"item": item, "seconds": seconds}).encode() + b"\n")
            self.process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]] | None:
        """Whole lines that have come; None where there will be no more."""
        data = os.read(self.out.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return (json.loads(line) for line in lines)

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # who waits for a hung device cannot be ended
            self.process.wait(_FAREWELL_SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Conductor:
    """One call: the stages of `plan` that are missing, in order, as far as `seconds` last."""

    def __init__(
        self,
        record: Record,
        command: Sequence[str],
        *,
        seconds: float,
        parts: Sequence[str],
        workers: int = 1,
        say: Callable[[str], None],
    ):
        self.record, self.command, self.parts, self.most_workers, self.say = record, command, parts, workers, say
        self.begin = time.monotonic()
        self.end = self.begin + seconds - _CLOSING_SECONDS
        self.plan: dict[str, list[Item]] = {}
        self.workers: list[Worker] = []
        self.log = (record.out / "full_run.log").open("ab")
        self.mute = 0  # workers in a row that ended before their first words
        self.deadline = self.end  # of the stage being run

    def run(self) -> None:
        """All stages, as far as time lasts. Whatever ends this early, every worker is ended."""
        try:
            self._open(1)
            if not self._until_ready():
                return
            due = self._due()
            for at, stage in enumerate(due):
                left = self.end - time.monotonic()
                if left <= 0:
                    break
                starts = not self.workers
                self.deadline = self.end - kept(stage, due[at + 1 :], left, self.most_workers, starts=starts)
                self._stage(stage)
        finally:
            for worker in self.workers:
                worker.kill()
            self.log.close()

    def missing(self) -> list[str]:
        """What this call was to do and has not done; the parts' names where no worker could tell the items."""
        return [item for part in self.parts for item in self._missing(part)] if self.plan else list(self.parts)

    def _due(self) -> list[Stage]:
        missing = {name for part in self.parts for name in self._missing(part)}
        plan = {part: [item for item in items if item.name in missing] for part, items in self.plan.items()}
        return stages(plan, self.parts, self.record.late)

    def _missing(self, part: str) -> list[str]:
        return self.record.missing(item.name for item in self.plan.get(part, []))

    def _until_ready(self) -> bool:
        """Wait for the first words of the first worker."""
        while not self.plan and self.mute < _PATIENCE and time.monotonic() < self.end:
            self._listen(until=self.end)
        if not self.plan:
            self.say(f"no worker has started; see {self.record.out / 'full_run.log'}")
        return bool(self.plan)

    def _stage(self, stage: Stage) -> None:
        """Hand out a stage's items until they or its time are up."""
        queue = list(stage.items)
        self.say(f"{stage.part}: {len(queue)} items, {self.deadline - time.monotonic():.0f} s")
        self.mute = 0
        alone = stage.part not in SIDE_BY_SIDE
        wanted = 1 if alone else min(self.most_workers, len(queue))
        self._open(wanted - len(self.workers))
        keeps = alone and stage.call == FIRST
        while time.monotonic() < self.deadline and (self.mute < _PATIENCE or any(w.ready for w in self.workers)):
            at_work = sum(worker.item is not None for worker in self.workers)
            for worker in [w for w in self.workers if w.ready and w.item is None][: wanted - at_work]:
                if queue:
                    self._hand_out(worker, queue, keeps=keeps)
            if not queue and all(worker.item is None for worker in self.workers if worker.ready):
                break
            self._listen(until=self.deadline)
            self._open(wanted - len(self.workers) if queue and self.mute < _PATIENCE else 0)
        self._close_stage()

    def _hand_out(self, worker: Worker, queue: list[Item], *, keeps: bool) -> None:
        """Give the first item for which there is time; `keeps`: so that those behind it have theirs."""
        now = time.monotonic()
        for item in queue:
            if item.needs <= self.deadline - now:
                queue.remove(item)
                later = reserved((o.needs for o in queue), self.deadline - now - item.needs) if keeps else 0.0
                limit = float("inf") if item.limit is None else now + item.limit
                worker.until = min(max(now + TOLERANCE * item.needs, self.deadline - later), limit, self.end)
                self.deadline = max(self.deadline, worker.until)
                worker.limited = worker.until == limit
                worker.item = item.name
                self.record.begin(item.name)
                worker.send(item.name, worker.until - now)
                return
        queue.clear()  # for none of them

    def _close_stage(self) -> None:
        """Keep a worker that is idle, and some for when it is lost; end the others, whose time is up."""
        idle = [worker for worker in self.workers if worker.ready and worker.item is None]
        for worker in list(self.workers):
            if worker not in idle[: 1 + _SPARE_WORKERS]:
                self._stop(worker)

    def _stop(self, worker: Worker) -> None:
        """End a worker whose time is up; what it is at is no failure, and keeps its place once."""
        if worker.item is not None:
            self.say(f"  {worker.item}: stopped, its time is up")
        worker.kill()
        self.workers.remove(worker)

    def _open(self, count: int) -> None:
        path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                start_new_session=True,
            )
            self.workers.append(Worker(process, until=time.monotonic() + _START_SECONDS))

    def _listen(self, until: float) -> None:
        """Wait for the next answers, or for the moment at which some worker must be ended."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.out, selectors.EVENT_READ, worker)
            moment = min([until, *(worker.until for worker in self.workers if worker.item or not worker.ready)])
            for key, _ in selector.select(max(0.0, moment - time.monotonic())):
                self._hear(key.data)
        now = time.monotonic()
        for worker in list(self.workers):
            if now < worker.until or now >= self.deadline or (worker.item is None and worker.ready):
                continue
            if worker.item is None or worker.limited:
                self._lose(worker, f"no answer within {self._limit(worker.item):.0f} s")
            else:
                self._stop(worker)

    def _limit(self, item: str | None) -> float:
        limits = (found.limit for items in self.plan.values() for found in items if found.name == item)
        return next(limits, None) or _START_SECONDS

    def _hear(self, worker: Worker) -> None:
        """Take what a worker says; notice that it is gone."""
        messages = worker.messages()
        if messages is None:
            self._lose(worker, f"the process ended ({_ending(worker.process)})")
            return
        for message in messages:
            if worker in self.workers:
                self._take(worker, message)

    def _take(self, worker: Worker, message: dict[str, Any]) -> None:
        if "refused" in message:
            raise InputError(*message["refused"])
        if "about" in message:
            self.mute, worker.ready = 0, True
            if not self.plan:
                self.record.introduce(message["about"])
                listed = message["items"].items()
                self.plan = {
                    part: [Item(i["item"], i["needs"], i["limit"], i.get("call", FIRST)) for i in found]
                    for part, found in listed
                }
            return
        if "note" in message:
            self.say(f"  {message['note']}")
            return
        if "rows" in message:
            self.record.add(Row(**row) for row in message["rows"])
            return
        assert worker.item is not None
        if "done" in message:
            self.record.finish(worker.item)
            worker.item = None
        elif message.get("fatal"):
            self._lose(worker, message["error"])
        else:
            self._failed(worker.item, message["error"])
            worker.item = None

    def _failed(self, item: str, reason: str) -> None:
        self.record.fail(item, reason)
        self.say(f"  {item}: {reason}")

    def _lose(self, worker: Worker, reason: str) -> None:
        """End a worker that cannot go on; its item has failed."""
        if worker.item is not None:
            self._failed(worker.item, reason)
        elif not worker.ready:
            self.mute += 1
            self.say(f"  a worker said nothing: {reason}")
        worker.kill()
        self.workers.remove(worker)
        if not self.plan and self.mute < _PATIENCE:
            self._open(1)


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its output and hangs"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
