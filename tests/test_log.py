"""metrics.jsonl, TensorBoard's copy of it, the progress line and the loss plot."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm import log
from fastlm.log import EVENTS, MetricsLog, Progress, cut_back, draw_loss, format_seconds, read_metrics
from fastlm.plot import plot_loss

SAVE_EVERY, STEPS = 4, 12


def write_run(metrics: MetricsLog, start: int, stop: int, *, last_save: bool = True) -> None:
    """The events of a run's updates start + 1 .. stop, in the trainer's order."""
    when = {"step": start, "tokens": 100 * start, "seconds": 0.1 * start}
    metrics.write("start", **when)
    if start == 0:
        metrics.write("eval", **when, val_loss=4.0, bits_per_byte=None, full=False)
    for step in range(start + 1, stop + 1):
        when = {"step": step, "tokens": 100 * step, "seconds": 0.1 * step}
        metrics.write("train", **when, loss=1 / step, lr=1e-3, grad_norm=0.1 * step, mfu=None)
        if step % 2 == 0:
            metrics.write("eval", **when, val_loss=2 / step, bits_per_byte=3 / step, full=step == STEPS)
            metrics.write("sample", **when)
        if step % SAVE_EVERY == 0 and (last_save or step < stop):
            metrics.write("save", **when)
    if stop == STEPS:
        metrics.write("end", **when)


def whole_run(folder: Path) -> list[str]:
    with MetricsLog(folder, tensorboard=False) as metrics:
        write_run(metrics, 0, STEPS)
    return lines(folder)


def lines(folder: Path) -> list[str]:
    """The record without its start lines."""
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"event": "start"' not in line]


def folder_of(base: Path, name: str) -> Path:
    (base / name).mkdir()
    return base / name


# metrics.jsonl


def test_lines_are_strict_json_with_floats_by_repr(tmp_path: Path):
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        third = 1 / 3
        metrics.write(
            "train", step=1, tokens=7, seconds=third, loss=math.nan, lr=math.inf, mfu=-math.inf, deep=[math.nan]
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        f'{{"event": "train", "step": 1, "tokens": 7, "seconds": {third!r}, '
        '"loss": null, "lr": null, "mfu": null, "deep": [null]}\n'
    )


def test_only_known_events_are_written(tmp_path: Path):
    assert set(EVENTS) == {"start", "train", "eval", "sample", "save", "skip", "end"}
    with MetricsLog(tmp_path, tensorboard=False) as metrics, pytest.raises(ValueError, match="event: got stop"):
        metrics.write("stop", step=1, tokens=1, seconds=1.0)  # type: ignore[arg-type]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_each_line_is_on_its_way_at_once(tmp_path: Path):
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        for step in range(3):
            metrics.write("train", step=step, tokens=step, seconds=0.0)
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step + 1
        metrics.sync()


def test_a_new_run_empties_an_old_record(tmp_path: Path):
    whole_run(tmp_path)
    with MetricsLog(tmp_path, 0, tensorboard=False):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("killed_after_save", [True, False], ids=["save line there", "killed before the save line"])
@pytest.mark.parametrize("beyond", [0, 1, 3])
@pytest.mark.parametrize("torn", [b"", b'{"event": "tra', b'{"event": "train", "step": 8}', b"\0\0\0"])
def test_a_resumed_record_is_an_uninterrupted_one(tmp_path: Path, killed_after_save: bool, beyond: int, torn: bytes):
    expected = whole_run(folder_of(tmp_path, "whole"))
    folder = folder_of(tmp_path, "resumed")
    resumed_step = 2 * SAVE_EVERY
    with MetricsLog(folder, tensorboard=False) as metrics:
        write_run(metrics, 0, resumed_step + beyond, last_save=killed_after_save or beyond > 0)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(torn)
    saved = {"tokens": 100 * resumed_step, "seconds": 0.1 * resumed_step}
    with MetricsLog(folder, resumed_step, saved=saved, tensorboard=False) as metrics:
        write_run(metrics, resumed_step, STEPS)
    assert lines(folder) == expected
    starts = [record["step"] for record in read_metrics(folder / "metrics.jsonl") if record["event"] == "start"]
    assert starts == [0, resumed_step]


def test_falling_back_to_an_older_checkpoint_drops_the_younger_one_s_lines(tmp_path: Path):
    expected = whole_run(folder_of(tmp_path, "whole"))
    folder = folder_of(tmp_path, "resumed")
    whole_run(folder)  # finished, but its newest checkpoints are damaged
    for step in (8, 4):
        with MetricsLog(
            folder, step, saved={"tokens": 100 * step, "seconds": 0.1 * step}, tensorboard=False
        ) as metrics:
            write_run(metrics, step, STEPS)
        assert lines(folder) == expected


def test_a_run_that_goes_on_has_not_ended(tmp_path: Path):
    with MetricsLog(tmp_path, tensorboard=False) as metrics:
        write_run(metrics, 0, 8)
        metrics.write("end", step=8, tokens=800, seconds=0.8)
    with MetricsLog(tmp_path, 8, tensorboard=False):
        assert [record["event"] for record in read_metrics(tmp_path / "metrics.jsonl")][-2:] == ["sample", "save"]


def test_a_run_from_elsewhere_has_no_save_line_to_put_back(tmp_path: Path):
    with MetricsLog(tmp_path, 8, saved={"tokens": 1, "seconds": 1.0}, tensorboard=False):
        assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_cut_that_fails_leaves_the_record(tmp_path: Path, monkeypatch):
    whole_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cut_back(tmp_path / "metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_cutting_leaves_the_lines_themselves_alone(tmp_path: Path):
    whole_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = cut_back(tmp_path / "metrics.jsonl", 8)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after == before[: len(after)]
    assert json.loads(after[-1])["event"] == "save"
    assert [json.loads(line) for line in after] == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("accepted", [0, 1, 17])
def test_lines_wait_for_a_full_disk_and_are_never_torn(tmp_path: Path, monkeypatch, accepted: int):
    said: list[str] = []
    metrics = MetricsLog(tmp_path, tensorboard=False, notify=said.append)
    metrics.write("train", step=1, tokens=1, seconds=0.0)
    write = os.write
    room = accepted

    def full(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            room = accepted
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= (done := write(descriptor, data[:room]))
        return done

    monkeypatch.setattr(os, "write", full)
    for step in (2, 3):
        metrics.write("train", step=step, tokens=1, seconds=0.0)
        assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert len(said) == 1
    assert "No space left on device" in said[0]
    monkeypatch.undo()
    metrics.write("train", step=4, tokens=1, seconds=0.0)
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# TensorBoard


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard_repeats_the_record_without_doubled_or_missing_points(tmp_path: Path):
    whole, resumed = folder_of(tmp_path, "whole"), folder_of(tmp_path, "resumed")
    with MetricsLog(whole) as metrics:
        write_run(metrics, 0, STEPS)
    with MetricsLog(resumed) as metrics:
        write_run(metrics, 0, 7)
    with MetricsLog(resumed, 4, saved={"tokens": 400, "seconds": 0.4}) as metrics:
        write_run(metrics, 4, STEPS)
    points = tensorboard_points(whole)
    assert points["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, STEPS + 1)]
    assert [step for step, _ in points["val/loss"]] == [0, 2, 4, 6, 8, 10, 12]
    assert [step for step, _ in points["val/bits_per_byte"]] == [2, 4, 6, 8, 10, 12]
    assert "speed/mfu" not in points  # null where the peak is unknown
    assert tensorboard_points(resumed) == points
    assert len(list(resumed.glob("events.out.tfevents.*"))) == 1


def test_heavy_libraries_wait_for_the_first_loss(tmp_path: Path):
    program = f"""
import sys
from pathlib import Path
from fastlm.log import MetricsLog, Progress, draw_loss
heavy = lambda: [m for m in ("tensorboard", "matplotlib", "rich") if m in sys.modules]
folder = Path({str(tmp_path)!r})
with Progress() as progress, MetricsLog(folder) as metrics:
    metrics.write("start", step=0, tokens=0, seconds=0.0)
    metrics.write("eval", step=0, tokens=0, seconds=0.0, val_loss=1.0)
    metrics.write("train", step=1, tokens=1, seconds=1.0, loss=1.0)
    print("before", heavy())
    progress.update(1, 2, loss=1.0)
    metrics.write("train", step=2, tokens=2, seconds=2.0, loss=1.0)
    print("after", heavy())
draw_loss(folder)
print("end", heavy())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "before []",
        "step 1/2  loss 1.0000",
        "after ['tensorboard']",
        "end ['tensorboard', 'matplotlib']",
    ], done.stderr


# Progress


def test_without_a_terminal_every_loss_is_a_line(monkeypatch):
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress(out) as progress:
        progress.update(1, 400, loss=8.31782, tokens_per_second=11222.4, mfu=None)
        now = 9.0
        progress.update(4, 400)
        progress.update(10, 400, loss=6.5, tokens_per_second=12345.6, mfu=0.1234)
        progress.note("validation loss 6.4")
        progress.update(400, 400, loss=math.nan)
    assert out.getvalue().splitlines() == [
        "step 1/400  loss 8.3178  11,222 tokens/s",
        "step 10/400  loss 6.5000  12,346 tokens/s  mfu 12.3 %  eta 6:30",
        "validation loss 6.4",
        "step 400/400  loss nan  eta 0 s",
    ]


@pytest.mark.parametrize(("total", "shown"), [(None, "step 5"), (math.inf, "step 5"), (99.6, "step 5/100")])
def test_a_length_that_is_not_known_is_not_shown(total: float | None, shown: str):
    out = io.StringIO()
    Progress(out).update(5, total, loss=1.0)
    assert out.getvalue() == f"{shown}  loss 1.0000\n"


def test_training_goes_on_when_nobody_reads_along():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(Gone()) as progress:
        for step in range(3):
            progress.update(step, 3, loss=1.0)
            progress.note("note")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_there_is_a_live_bar_with_notes_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress(out) as progress:
        progress.note("before the bar")
        for step in range(1, 5):
            progress.update(step, 4, loss=1.5, tokens_per_second=1000.0, mfu=0.5)
        progress.note("[red]not markup[/red] :smile:")
    text = out.getvalue()
    assert text.startswith("before the bar\n")
    assert "[red]not markup[/red] :smile:" in text
    assert "100%" in text
    assert "step 4/4  loss 1.5000  1,000 tokens/s  mfu 50.0 %" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(out) as progress:
        progress.update(1, 4, loss=1.5)
    assert out.getvalue() == "step 1/4  loss 1.5000\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (390, "6:30"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str):
    assert format_seconds(seconds) == text


# loss.png


def pixels(path: Path):
    from matplotlib.image import imread

    return imread(path)


def test_the_plot_shows_both_curves(tmp_path: Path):
    whole_run(tmp_path)
    draw_loss(tmp_path)
    image = pixels(tmp_path / "loss.png")
    assert image.shape[:2] == (540, 900)
    for color in (0x3B, 0x6E, 0xA5), (0xC8, 0x55, 0x3D):  # beyond what the legend's short lines have
        near = (abs(image[..., :3] * 255 - color).max(axis=-1) < 3).sum()
        assert near > 300, color
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "losses", [[], [1.0], [None], [None, 1.0, None], [float("nan"), 2.0], [1e30, 1.0]], ids=lambda losses: str(losses)
)
def test_the_plot_copes_with_few_and_missing_points(tmp_path: Path, losses: list[float | None]):
    def train_pixels(losses: list[float | None]) -> int:
        records = [{"event": "train", "step": i, "tokens": i, "loss": loss} for i, loss in enumerate(losses)]
        records += [{"event": "eval", "step": 0, "tokens": 0, "val_loss": loss and 2 * loss} for loss in losses[:1]]
        plot_loss([{"event": "start", "step": 0, "tokens": 0}, *records], tmp_path / "loss.png")
        image = pixels(tmp_path / "loss.png")
        return int((abs(image[..., :3] * 255 - (0x3B, 0x6E, 0xA5)).max(axis=-1) < 3).sum())

    in_the_legend = train_pixels([])
    visible = any(loss is not None and math.isfinite(loss) for loss in losses)
    assert (train_pixels(losses) > in_the_legend) == visible


def test_a_disk_that_refuses_the_plot_costs_a_warning(tmp_path: Path, capsys):
    whole_run(tmp_path)
    (tmp_path / "loss.png").mkdir()
    draw_loss(tmp_path)
    assert "loss.png not drawn" in capsys.readouterr().err


def test_lines_of_another_hand_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"event": "train", "step": 1, "tokens": 2, "seconds": 0.1}\n'
    path.write_bytes(good + b'{"event": "train", "step": "x"}\n[1]\n\xff\xfe\n' + good[:20])
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_what_an_encoding_lacks_is_spelled_out():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(file) as progress:
        progress.note("smile 😀")
    file.seek(0)
    assert file.read() == "smile \\U0001f600\n"
