"""What a run says while it trains: metrics.jsonl, TensorBoard's file beside it, a line or a bar for people.

metrics.jsonl is the record; the TensorBoard file repeats it, and is rebuilt from it when a run resumes, so
that neither a killed process nor a cut leaves a point missing or doubled there. Progress goes to stdout,
warnings to stderr.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TextIO, get_args

from fastlm.checkpoint import json_bytes

Event = Literal["start", "train", "eval", "sample", "save", "skip", "end"]
METRICS = "metrics.jsonl"
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
    """Writes one event a line to `run_dir/metrics.jsonl`, each line whole and at once, and the numbers to TensorBoard.

    `step` is that of the checkpoint the run goes on from: the file is first cut back to it (see `cut_back`); 0, a run
    from nothing, empties it. `saved` has the fields of that checkpoint's own "save" line (tokens, seconds, ...), which
    is put back should the process have died between the checkpoint and the line.
    A full disk never stops the run: lines wait in memory until there is room.

    TensorBoard is imported at the first event after the first train line, not before: its import would keep someone
    who has just started a run waiting for the first loss.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int = 0,
        *,
        saved: Mapping[str, object] | None = None,
        tensorboard: bool = True,
        notify: Callable[[str], None] = warn,
    ):
        self.path, self._notify = run_dir / METRICS, notify
        kept = cut_back(self.path, step)
        self._waiting = b""  # lines that the disk had no room for
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the log
        self._end = self._file.tell()
        self._events = EventFile(run_dir, kept) if tensorboard else None
        has_line = any(record["event"] == "save" and record["step"] == step for record in kept)
        if saved is not None and kept and not has_line:
            self._write_record({"event": "save", "step": step, **saved})

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
        self._try_events(lambda events: events.add(json.loads(line)))

    def _try_events(self, action: Callable[[EventFile], None]) -> None:
        """Do something with TensorBoard's file; give it up when the disk refuses: a resume rebuilds it."""
        if self._events is None:
            return
        try:
            action(self._events)
        except OSError as error:
            given_up, self._events = self._events, None
            with contextlib.suppress(OSError):
                given_up.close()
            self._notify(f"TensorBoard's file cannot be written ({error.strerror}); it ends here")

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
        self._try_events(EventFile.close)

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
        if line.endswith(b"\n") and isinstance(record, dict) and "event" in record and type(record.get("step")) is int:
            records.append(record)
    return records


def cut_back(path: Path, step: int) -> list[Record]:
    """Cut metrics.jsonl to what a checkpoint after `step` updates had behind it, in one rename; what is left.

    Left are the lines up to that step, which were all written before the checkpoint was; "end" goes, for the run goes
    on. At step 0 there is no checkpoint, and nothing is left.
    """
    records = read_metrics(path) if step else []
    kept = [record for record in records if record["step"] <= step and record["event"] != "end"]
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
            from tensorboard.summary.writer.record_writer import RecordWriter

            # Not TensorBoard's own EventFileWriter: its thread dies with a traceback when the disk is full.
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
            self._writer = RecordWriter(open(self.folder / name, "wb", buffering=0))  # noqa: SIM115 - lives as long as the run
            first = TensorBoardEvent(wall_time=time.time(), file_version="brain.Event:2")
            self._writer.write(first.SerializeToString())
        for record in self._waiting:
            values = [
                Summary.Value(tag=tag, simple_value=record[name])
                for name, tag in SCALARS.get(record["event"], {}).items()
                if record.get(name) is not None
            ]
            if values:
                when = self._epoch + record.get("seconds", 0.0)
                event = TensorBoardEvent(step=record["step"], wall_time=when, summary=Summary(value=values))
                self._writer.write(event.SerializeToString())
        self._waiting.clear()
        self._writer.flush()

    def close(self) -> None:
        """Write what waits, once a train event was seen, and close the file. Raises OSError on a full disk."""
        try:
            if self._seen_train:
                self._write_waiting()
        finally:
            if self._writer is not None:
                self._writer.close()


class Progress:
    """How far training is: a live bar in a terminal, else a line for each update with a loss.

        with Progress() as progress:
            progress.update(10, 400, loss=5.1, tokens_per_second=12e3, mfu=0.12)
            progress.note("validation loss 4.9")

    `file` is where it goes, stdout by default. The bar appears with the first update.
    """

    def __init__(self, file: TextIO | None = None):
        self.file = file or sys.stdout
        self._first: tuple[int, float] | None = None  # step and time of the first update seen here
        self._live = self.file.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Any = None
        self._silent = False  # set when nobody reads any more
        self._numbers = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        total_steps: float | None,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """After update `step` of `total_steps` (None or infinite: not known); without a loss only the bar moves."""
        total = None if total_steps is None or math.isinf(total_steps) else max(step, round(total_steps))
        seconds = self._seconds_left(step, total)
        eta = "" if seconds is None else f"eta {format_seconds(seconds)}"
        if loss is not None:
            self._numbers = format_numbers(loss, tokens_per_second, mfu)
        text = f"step {step}" + ("" if total is None else f"/{total}") + f"  {self._numbers}"
        if self._live:
            if self._bar is None:
                self._bar = _rich_bar(self.file)
            self._bar.update(self._bar.task_ids[0], completed=step, total=total, numbers=text, eta=eta)
        elif loss is not None and not self._silent:
            self._print(f"{text}  {eta}".rstrip())

    def note(self, text: str) -> None:
        """Lines of their own: an evaluation, a checkpoint, a sample."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            self._print(text)

    def _seconds_left(self, step: int, total: int | None) -> float | None:
        """Seconds to go at the mean speed since the first update seen; None while that is unknown."""
        now = time.monotonic()
        first_step, began = self._first = self._first or (step, now)
        if total is None or step <= first_step:
            return None
        return (now - began) / (step - first_step) * (total - step)

    def _print(self, text: str) -> None:
        try:
            self.file.write(f"{encodable(text, self.file)}\n")
            self.file.flush()  # a pipe would hold lines back until 8 KiB are full
        except OSError:  # whoever read along has gone; that is no reason to stop training
            self._silent = True


def encodable(text: str, file: TextIO) -> str:
    """`text` with what `file`'s encoding lacks spelled out: a terminal may know less than Unicode."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _rich_bar(file: TextIO) -> Any:
    """A started rich progress bar with one task; rich is imported only here, for a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[eta]}", markup=False),
        console=Console(file=file),
        refresh_per_second=4,
    )
    bar.add_task("", total=None, numbers="", eta="")
    bar.start()
    return bar


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


def draw_loss(run_dir: Path) -> None:
    """Draw `run_dir/loss.png` from the record; a disk that refuses costs a warning, not the run."""
    from fastlm.plot import plot_loss

    try:
        plot_loss(read_metrics(run_dir / METRICS), run_dir / "loss.png")
    except OSError as error:
        warn(f"{run_dir / 'loss.png'} not drawn ({error.strerror})")
