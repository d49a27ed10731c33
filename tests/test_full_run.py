"""The full run outlives whatever its items do, stays within its time, and leaves a whole file behind at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_imports import BLOCK, OPTIONAL

from bench import conductor, device, full_items, full_run, hf_items, kernel_items, plan, record, training_items
from bench.conductor import Conductor
from bench.record import ABOUT, RESULTS, STATE, Record, Row
from fastlm.errors import InputError

ROOT = Path(__file__).parent.parent
ROW = {"name", "shape", "dtype", "provider", "value", "unit", "higher_is_better", "baseline", "ratio", "target"}
ROW |= {"checked"}

# A worker whose items do what their names say; `tried` lists what it was handed. It loads in a moment.
WORKER = """
import json, os, sys, time
folder, items, device = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
def say(message): print(json.dumps(message), flush=True)
if os.path.exists(folder + "/alone"): time.sleep(0.2); sys.exit(7)  # only the first worker starts
open(folder + "/alone", "w") if "--alone" in sys.argv else None
about = dict(device=device, torch="2", triton="3", commit="c", date="d", python="3")
say({"about": about, "items": items})
for line in sys.stdin:
    item = json.loads(line)["item"]
    with open(folder + "/tried", "a") as file: file.write(item + "\\n")
    kind = item.split(".")[1].split(" ")[0]
    mended = os.path.exists(folder + "/mended")
    row = dict(name=item.split(" ")[0], shape=item.partition(" ")[2], dtype="float32", provider="fastlm", value=2.0,
               unit="s", higher_is_better=False, baseline=3.0, ratio=1.5, target=None, checked=True)
    if kind == "raise" and not mended: say({"error": "ValueError: no", "fatal": False}); continue
    if kind == "fatal" and not mended: say({"error": "CUDA error", "fatal": True}); time.sleep(60)
    if kind == "crash" and not mended: os.kill(os.getpid(), 11)
    if kind == "hang" and not mended: time.sleep(60)
    if kind == "slow": time.sleep(0.3)
    if kind == "nan": row["value"] = float("nan")
    say({"rows": [row]}); say({"done": True})
"""


def command(
    folder: Path, parts: dict[str, list[str]], device: str = "cpu", limit: float | None = None, needs: float = 0
) -> list[str]:
    """The words after the interpreter that start a worker with these items."""
    listed = {p: [{"item": i, "needs": needs, "limit": limit} for i in items] for p, items in parts.items()}
    return ["-c", WORKER, str(folder), json.dumps(listed), device]


def conduct(
    folder: Path,
    parts: dict[str, list[str]],
    *,
    seconds: float = 20,
    sources: str = "s",
    device: str = "cpu",
    limit: float | None = None,
    workers: int = 1,
    needs: float = 0,
) -> tuple[Record, list[str]]:
    """One call -> (what it left, what is missing)."""
    kept = Record(folder, sources)
    made = Conductor(
        kept,
        command(folder, parts, device, limit, needs),
        seconds=seconds,
        parts=list(parts),
        workers=workers,
        say=lambda _: None,
    )
    made.run()
    return kept, made.missing()


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text())


def tried(folder: Path) -> list[str]:
    return (folder / "tried").read_text().split("\n")[:-1]


@pytest.fixture(autouse=True)
def _no_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor, "_CLOSING_SECONDS", 0)


def test_the_file_has_the_layout_of_design_5(tmp_path: Path) -> None:
    conduct(tmp_path, {"norms": ["rms_norm.ok rows1-columns2", "layer_norm.nan x"]})
    found = results(tmp_path)
    assert set(found) == {*ABOUT, "rows"}
    assert all(set(row) == ROW for row in found["rows"])
    first, second = found["rows"]
    assert (first["name"], first["shape"], first["value"]) == ("rms_norm.ok", "rows1-columns2", 2.0)
    assert second["value"] is None, "strict JSON has no NaN"


def test_an_item_that_fails_stops_nothing_and_is_tried_again(tmp_path: Path) -> None:
    """Exceptions, fatal errors, crashes, hanging: the next item follows, the reason is kept, a second call mends."""
    parts = {"check": ["a.ok", "a.raise x y", "a.ok2"], "norms": ["b.fatal", "b.crash", "b.ok", "b.hang", "b.ok2"]}
    kept, missing = conduct(tmp_path, parts, limit=0.5)
    assert missing == ["a.raise x y", "b.fatal", "b.crash", "b.hang"]
    assert kept.failed["a.raise x y"] == "ValueError: no"
    assert kept.failed["b.fatal"] == "CUDA error"
    assert "SIGSEGV" in kept.failed["b.crash"]
    assert "no answer" in kept.failed["b.hang"]
    failures = {row["name"]: row for row in results(tmp_path)["rows"] if row["value"] is None}
    assert set(failures) == {"a.raise", "b.fatal", "b.crash", "b.hang"}
    assert failures["a.raise"]["provider"] == "error: ValueError: no"
    assert (failures["a.raise"]["shape"], failures["a.raise"]["checked"]) == ("x y", False)
    (tmp_path / "mended").touch()
    before = len(tried(tmp_path))
    kept, missing = conduct(tmp_path, parts, limit=0.5)
    assert missing == []
    assert tried(tmp_path)[before:] == ["a.raise x y", "b.fatal", "b.crash", "b.hang"], (
        "what was done is not done again"
    )
    assert kept.failed == {}
    assert all(row["value"] == 2.0 for row in results(tmp_path)["rows"])
    assert len(results(tmp_path)["rows"]) == 8


def test_checks_run_side_by_side_and_each_once(tmp_path: Path) -> None:
    items = [f"a.ok item{i}" for i in range(9)]
    _, missing = conduct(tmp_path, {"check": items, "norms": ["b.ok"]}, workers=3)
    assert missing == []
    assert sorted(tried(tmp_path)) == sorted([*items, "b.ok"])


def test_one_worker_is_enough_where_no_other_starts(tmp_path: Path) -> None:
    items = [f"a.slow {i}" for i in range(5)]
    words = [*command(tmp_path, {"check": items, "norms": ["b.ok"]}), "--alone"]
    made = Conductor(Record(tmp_path, "s"), words, seconds=20, parts=["check", "norms"], workers=3, say=lambda _: None)
    made.run()
    assert made.missing() == []


def test_time_is_shared_and_never_overrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes too long leaves later ones their share; what was stopped keeps its place, once."""
    monkeypatch.setattr(plan, "START_SECONDS", 6.0)  # a busy machine takes seconds to start a worker
    parts = {"check": [f"a.slow {i}" for i in range(60)], "attention": ["b.ok"], "train_124m": ["c.hang"]}
    kept, missing = conduct(tmp_path, parts, seconds=16.0, needs=0.02)
    assert "b.ok" in kept.done
    assert 0 < sum(item.startswith("a.") for item in kept.done) < 60
    assert "c.hang" in missing
    assert not kept.failed, "who has to make room has not failed"
    assert kept.attempts["c.hang"] == 1
    assert kept.missing(parts["check"]) == [item for item in parts["check"] if item not in kept.done]
    kept.begin("c.hang")
    kept.fail("c.raise", "no")
    assert kept.missing(["c.raise", "c.hang", "c.ok"]) == ["c.ok", "c.raise", "c.hang"]


def test_an_item_without_time_for_it_is_not_begun(tmp_path: Path) -> None:
    listed = {"norms": [{"item": "a.ok", "needs": 1e6, "limit": None}, {"item": "b.ok", "needs": 0, "limit": None}]}
    kept = Record(tmp_path, "s")
    words = ["-c", WORKER, str(tmp_path), json.dumps(listed), "cpu"]
    Conductor(kept, words, seconds=20, parts=["norms"], say=lambda _: None).run()
    assert tried(tmp_path) == ["b.ok"]


def test_a_worker_that_never_speaks_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    made = Conductor(Record(tmp_path, "s"), ["-c", "raise SystemExit(7)"], seconds=20, parts=["norms"], say=said.append)
    made.run()
    assert made.missing() == ["norms"]
    assert "exit code 7" in said[0]
    assert "no worker has started" in said[-1]


def test_figures_of_other_sources_or_devices_are_never_mixed(tmp_path: Path) -> None:
    conduct(tmp_path, {"norms": ["a.ok"]})
    conduct(tmp_path, {"norms": ["b.ok"]}, sources="other")
    assert [row["name"] for row in results(tmp_path)["rows"]] == ["b.ok"]
    conduct(tmp_path, {"norms": ["c.ok"]}, sources="other", device="another")
    assert [row["name"] for row in results(tmp_path)["rows"]] == ["c.ok"]
    aside = sorted(path.name for path in tmp_path.glob("full_run-*.json"))
    assert aside == ["full_run-d-c-1.json", "full_run-d-c-2.json"]
    assert [row["name"] for row in json.loads((tmp_path / aside[0]).read_text())["rows"]] == ["a.ok"]


def test_the_hash_of_sources_follows_them(tmp_path: Path) -> None:
    for folder in ("bench", "fastlm", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    first = record.sources_hash(tmp_path)
    (tmp_path / "kernels" / "notes.txt").write_text("no source")
    assert record.sources_hash(tmp_path) == first
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert record.sources_hash(tmp_path) != first


@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Both files are written; the kill comes in the middle of the first or of the second."""
    kept = Record(tmp_path, "s")
    kept.introduce(dict.fromkeys(ABOUT, "x"))
    kept.add([Row("a.b", "", "", "fastlm", 1.0, "s", True)])
    written: list[Path] = []

    def torn(self: Path, text: str) -> int:
        written.append(self)
        with self.open("w") as file:
            if len(written) < nth:
                return file.write(text)
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        kept.add([Row("c.d", "", "", "fastlm", 1.0, "s", True)])
    monkeypatch.undo()
    found = Record(tmp_path, "s")
    assert [row.name for row in found.rows.values()] == ["a.b", "c.d"][:nth]
    assert len(results(tmp_path)["rows"]) == nth


def test_a_call_killed_at_any_moment_leaves_a_whole_file_and_goes_on(tmp_path: Path) -> None:
    """SIGKILL, at whatever the process then is: what it leaves can be read, and the next call adds to it."""
    items = {"norms": [f"a.ok {i}" for i in range(100)]}
    conductor = "Conductor(Record(Path(sys.argv[1]), 's'), sys.argv[2:], seconds=20, parts=['norms'], say=print)"
    imports = (
        "import sys; from pathlib import Path; from bench.conductor import Conductor; from bench.record import Record"
    )
    words = [sys.executable, "-c", f"{imports}; {conductor}.run()", str(tmp_path), *command(tmp_path, items)]
    counts = [0]
    while len(counts) < 4:
        run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        path = tmp_path / RESULTS
        while not path.exists() or len(results(tmp_path)["rows"]) < counts[-1] + 10:
            time.sleep(0.003 * len(counts))
        run.kill()
        run.wait()
        counts.append(len(results(tmp_path)["rows"]))
    assert counts == sorted(set(counts))
    kept, missing = conduct(tmp_path, items)
    assert missing == []
    assert len(results(tmp_path)["rows"]) == len(kept.done) == 100


def test_a_gpu_that_is_not_there_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    if device.GPU:
        pytest.skip("there is one")
    words = ["-m", "bench.full_run", "--device", "cuda", "--out", str(tmp_path / "a" / "b")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr == "error: --device: got cuda; PyTorch sees no GPU here that it can use; give auto or cpu\n"
    assert not (tmp_path / "a").exists()


def test_sigterm_ends_the_workers_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_run, "_WORKER", command(tmp_path, {"norms": ["a.ok", "a.hang"]}))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit) as stopped:
        full_run.main(["--out", str(tmp_path), "--only", "norms", "--device", "cpu"])
    timer.join()
    assert stopped.value.code == 143
    out = capsys.readouterr().out
    assert "a.ok : 2 s rival 3 x1.50" in out
    assert "1 items are missing (a.hang)" in out
    assert json.loads((tmp_path / STATE).read_text())["done"] == ["a.ok"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--only", "norm"], "--only: got norm"),
        (["--seconds", "nan"], "--seconds: got nan"),
        (["--out", __file__], "--out: got"),
        (["--out", f"{__file__}/below"], "--out: got .*Not a directory"),
        (["--sec"], "arguments: got"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments: list[str], key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=key):
        full_run.main(["--out", str(tmp_path / "new"), *arguments])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [RESULTS, STATE])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_record_is_left_alone(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"--out: got .*; its {name} holds no JSON object; name another directory"):
        full_run.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


NAMES = ("attention.", "layer_norm.", "rms_norm.", "cross_entropy.", "linear_cross_entropy.", "adamw.")
NAMES += ("train_124m", "hf.")


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_every_name_of_design_5_is_planned(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernel_items, training_items, hf_items):
        monkeypatch.setattr(module, "GPU", gpu)
    planned = full_items.tasks()
    assert set(planned) == set(plan.PARTS)
    names = [task.name for tasks in planned.values() for task in tasks]
    assert len(set(names)) == len(names)
    assert all(any(name.startswith(prefix) for name in names) for prefix in NAMES)
    checked = {name.split()[0].removeprefix("check.") for name in names if name.startswith("check.")}
    assert {kernel.name for kernel in kernel_items.KERNELS} <= checked
    if gpu:
        attention = [task.name for task in planned["attention"]]
        wanted = [(d, t, c) for d in ("forward", "backward") for t in (1, 2, 4, 8, 16) for c in (64, 128)]
        for direction, thousands, channels in wanted:
            prefix = f"attention.{direction} rows{1024 * thousands}-columns{channels}-"
            assert any(name.startswith(prefix) for name in attention), prefix


def test_the_worker_runs_with_torch_numpy_and_pytest_alone(tmp_path: Path) -> None:
    """The whole script on a CPU, for a few items, where nothing optional can be imported."""
    blocked = ",".join(name for name in OPTIONAL if name != "triton")
    (tmp_path / "sitecustomize.py").write_text(BLOCK.replace("sys.argv[1]", repr(blocked)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    words = ["--device", "cpu", "--out", str(tmp_path / "out"), "--only", "adamw", "attention", "time_to_loss"]
    words += ["--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "bench/full_run.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "out" / "full_run.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = results(tmp_path / "out")
    assert found["commit"] == "abc"
    ours = {row["name"] for row in found["rows"] if row["provider"] == "fastlm" and row["value"] and row["ratio"]}
    raced = {"time_to_loss.tokens", "time_to_loss.seconds"}
    assert ours == {"attention.forward", "attention.backward", "adamw.step", "adamw.clipped"} | raced
    assert all(row["checked"] for row in found["rows"])
    assert "adamw.step small" in done.stdout
