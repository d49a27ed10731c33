"""What a run says while it trains: metrics.jsonl, TensorBoard's file beside it, a line or a bar for people.

metrics.jsonl is the record; the TensorBoard file repeats it, and is rebuilt from it when a run resumes, so
that neither a killed process nor a cut leaves a point missing or doubled there. Progress goes to stdout,
warnings to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO, get_args

from fastlm.checkpoint import json_bytes

Event = Literal["start", "train", "eval", "sample", "save", "skip", "end"]
EVENTS: tuple[Event, ...] = get_args(Event)
Record = dict[str, Any]

# The TensorBoard name of each number, by event.
SCALARS: dict[str, dict[str, str]] = {
    "train": {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "tokens_per_second": "speed/tokens_per_second",
        "mfu": "speed/mfu",
    },
    "eval": {"val_loss": "val/loss", "bits_per_byte": "val/bits_per_byte"},
}


def warn(text: str) -> None:
    """A warning for people, on stderr."""
    sys.stderr.write(f"warning: {text}\n")
    sys.stderr.flush()


class MetricsLog:
    """Writes one event a line to metrics.jsonl, each line whole and at once, and the numbers to TensorBoard.

    With `resume_step` the file is first cut back to the checkpoint of that step (see `cut_back`); `saved` has
    the fields of that checkpoint's own "save" line (tokens, seconds, ...), which is put back should the process
    have died between the checkpoint and the line. Without, an old file is emptied.
    A full disk never stops the run: lines wait in memory until there is room.

    TensorBoard is imported at the first event after the first train line, not before: its import would keep
    someone who has just started a run waiting for the first loss.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int | None = None,
        saved: Mapping[str, object] | None = None,
        tensorboard: bool = True,
        notify: Callable[[str], None] = warn,
    ):
        self.path, self._notify = path, notify
        kept = cut_back(path, resume_step)
        self._waiting = b""  # lines that the disk had no room for
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the log
        self._end = self._file.tell()
        self._events = EventFile(path.parent, kept) if tensorboard else None
        has_line = any(record["event"] == "save" and record["step"] == resume_step for record in kept)
        if resume_step is not None and saved is not None and not has_line:
            self._write_record({"event": "save", "step": resume_step, **saved})

    def write(self, event: Event, *, step: int, tokens: int, seconds: float, **fields: object) -> None:
        """Append one event: updates done, tokens seen, seconds of training in all, and its own fields.

        Fields are JSON values; a float is written by repr, one that is not finite as null.
        """
        if event not in EVENTS:
            raise ValueError(f"event: got {event}; choose one of {', '.join(EVENTS)}")
        self._write_record({"event": event, "step": step, "tokens": tokens, "seconds": seconds, **fields})

    def _write_record(self, record: Record) -> None:
        line = json_bytes(record)
        self._append(line)
        if self._events is not None:
            self._events.add(json.loads(line))

    def _append(self, line: bytes) -> None:
        first_failure = not self._waiting
        self._waiting += line
        try:
            written = 0
            while written < len(self._waiting):
                written += os.write(self._file.fileno(), self._waiting[written:])
            self._end += written
            self._waiting = b""
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)  # no torn line
            if first_failure:
                self._notify(f"{self.path} cannot be written ({error.strerror}); its lines wait in memory")

    def sync(self) -> None:
        """Put every line on the disk: before a checkpoint, which must not outlive the lines before it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._notify(f"{self.path} cannot be flushed ({error.strerror})")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The events of a metrics.jsonl in order; lines that are not whole (a torn last one) are left out."""
    records = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and {"event", "step"} <= set(record):
            records.append(record)
    return records


def cut_back(path: Path, step: int | None) -> list[Record]:
    """Cut metrics.jsonl to what a checkpoint after `step` updates had behind it, in one rename; what is left.

    Left are the lines up to that step, which were all written before the checkpoint was. "end" goes: the run
    goes on. None cuts everything, for a run that starts anew.
    """
    records = read_metrics(path) if step is not None else []
    kept = [r for r in records if step is not None and r["step"] <= step and r["event"] != "end"]
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.writelines(json_bytes(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return kept


class EventFile:
    """A TensorBoard event file in `folder` that starts over with the events of `earlier`.

    It opens at the first event behind a train event; until then events wait.
    """

    def __init__(self, folder: Path, earlier: list[Record]):
        self.folder, self._waiting = folder, list(earlier)
        self._writer: Any = None
        self._seen_train = False
        self._epoch = time.time() - (earlier[-1].get("seconds", 0.0) if earlier else 0.0)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()

    def add(self, record: Record) -> None:
        self._waiting.append(record)
        if self._seen_train:
            self._write_waiting()
        self._seen_train |= record["event"] == "train"

    def _write_waiting(self) -> None:
        from tensorboard.compat.proto.event_pb2 import (
            Event as TensorBoardEvent,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(self.folder), flush_secs=10)
        for record in self._waiting:
            values = [
                Summary.Value(tag=tag, simple_value=record[name])
                for name, tag in SCALARS.get(record["event"], {}).items()
                if record.get(name) is not None
            ]
            if values:
                when = self._epoch + record.get("seconds", 0.0)
                self._writer.add_event(
                    TensorBoardEvent(step=record["step"], wall_time=when, summary=Summary(value=values))
                )
        self._waiting.clear()

    def close(self) -> None:
        if self._seen_train or self._writer is not None:
            self._write_waiting()
        if self._writer is not None:
            self._writer.close()


class Progress:
    """How far training is: a live bar in a terminal, else a line for each update with a loss.

        with Progress(total_steps=400, start_step=0) as progress:
            progress.update(step=10, loss=5.1, tokens_per_second=12e3, mfu=0.12)
            progress.note("validation loss 4.9")

    Without `total_steps` the share done is that of `max_seconds`. `file` is where it goes, stdout by default.
    """

    def __init__(
        self,
        total_steps: int | None,
        start_step: int = 0,
        *,
        max_seconds: float | None = None,
        start_seconds: float = 0.0,
        file: TextIO | None = None,
    ):
        self.total_steps, self.start_step, self.max_seconds = total_steps, start_step, max_seconds
        self.file = file or sys.stdout
        self._offset = start_seconds  # seconds of training before this process
        self._began = time.monotonic()
        self._bar: Any = None
        self._numbers = ""
        if self.file.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _rich_bar(self.file)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("", total=1.0, numbers="starting", eta="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """After update `step`; without a loss only the bar moves."""
        eta = self.eta_seconds(step)
        timing = "" if eta is None else f"eta {format_seconds(eta)}"
        if loss is not None:
            self._numbers = format_numbers(loss, tokens_per_second, mfu)
        of = f"/{self.total_steps}" if self.total_steps else ""
        if self._bar is not None:
            numbers = f"step {step}{of}  {self._numbers}"
            self._bar.update(self._task, completed=self.share_done(step), numbers=numbers, eta=timing)
        elif loss is not None:
            self._print(f"step {step}{of}  {self._numbers}  {timing}".rstrip())

    def note(self, text: str) -> None:
        """A line of its own: an evaluation, a checkpoint, a sample."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def share_done(self, step: int) -> float:
        """How much of the run is behind, 0 to 1."""
        if self.total_steps:
            return min(1.0, step / self.total_steps)
        if self.max_seconds:
            return min(1.0, (self._offset + time.monotonic() - self._began) / self.max_seconds)
        return 0.0

    def eta_seconds(self, step: int) -> float | None:
        """Seconds to go at this process's mean speed; None where nothing is known yet."""
        elapsed = time.monotonic() - self._began
        if self.total_steps:
            done = step - self.start_step
            return elapsed / done * (self.total_steps - step) if done > 1 else None
        if self.max_seconds:
            return max(0.0, self.max_seconds - self._offset - elapsed)
        return None

    def _print(self, text: str) -> None:
        self.file.write(f"{text}\n")
        self.file.flush()  # a pipe would hold lines back until 8 KiB are full


def _rich_bar(file: TextIO) -> Any:
    """A rich progress bar on a terminal; rich is imported only there."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[eta]}", markup=False),
        console=Console(file=file),
        refresh_per_second=4,
    )


def format_numbers(loss: float, tokens_per_second: float | None, mfu: float | None) -> str:
    """`loss 4.1234  12,345 tokens/s  mfu 12.3 %`, without what is unknown."""
    parts = [f"loss {loss:.4f}"]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if mfu is not None:
        parts.append(f"mfu {100 * mfu:.1f} %")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """`7 s`, `3:07`, `2:03:07`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
