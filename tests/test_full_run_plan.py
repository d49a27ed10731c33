"""What one call and two calls of a full run bring on a GPU, by a simulated clock: no process, no GPU, no waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import conductor, full_items, hf_items, kernel_items, plan, training_items
from bench.conductor import Conductor
from bench.kernel_items import Task
from bench.plan import FIRST, PARTS, START_SECONDS, Item, Stage
from bench.record import Record

SECONDS, WORKERS = 520.0, 12  # of a call, and on 16 cores
ABOUT = {"device": "GPU", "torch": "2", "triton": "3", "commit": "c", "date": "d"}
# Of the issue's targets and DESIGN 5's names, each by an item that has to bring it.
TARGETS = ("check.", "attention.forward", "attention.backward", "train_124m gpt2", "linear_cross_entropy.")
TARGETS += ("cross_entropy.", "layer_norm.", "rms_norm.", "adamw.", "train_350m", "train_1.5b")

Durations = Callable[[Task], float]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Task]]:
    """What is planned on a GPU, without the models of transformers, which the machine meant does not have."""
    for module in (kernel_items, training_items, hf_items):
        monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(hf_items, "installed", lambda module: False)
    monkeypatch.setattr(kernel_items.bench_optim, "MODELS", {"124M": (12, 768), "1.5B": (48, 1600)})
    return full_items.tasks()


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class SimulatedWorker:
    """Ready after `START_SECONDS`, then done with an item after its duration, or killed before."""

    def __init__(self, run: Simulation):
        self.run, self.until = run, run.clock.now + 120.0
        self.event = run.clock.now + START_SECONDS  # the next thing it has to say, and when
        self.item: str | None = None
        self.ready = self.limited = False

    def send(self, item: str, seconds: float) -> None:
        self.run.begun.append(item)
        assert seconds >= self.run.tasks[item].needs - 1e-6, f"{item} got {seconds}"
        self.event = self.run.clock.now + self.run.durations(self.run.tasks[item])

    def kill(self) -> None:
        self.event = float("inf")


class Simulation(Conductor):
    """One call whose workers are simulated."""

    def __init__(self, record: Record, tasks: dict[str, list[Task]], clock: Clock, durations: Durations):
        super().__init__(record, [], seconds=SECONDS, parts=PARTS, workers=WORKERS, say=lambda _: None)
        self.listed, self.clock, self.durations = tasks, clock, durations
        self.tasks = {task.name: task for found in tasks.values() for task in found}
        self.begun: list[str] = []

    def _open(self, count: int) -> None:
        self.workers += [SimulatedWorker(self) for _ in range(count)]  # type: ignore[list-item]

    def _listen(self, until: float) -> None:
        at_work: list[Any] = [w for w in self.workers if w.item is not None or not w.ready]
        self.clock.now = min([until, *(min(w.event, w.until) for w in at_work)])
        for worker in at_work:
            if worker.event <= self.clock.now and worker.ready:
                self._take(worker, {"done": True})
            elif worker.event <= self.clock.now:
                listed = {p: [self._message(task) for task in found] for p, found in self.listed.items()}
                self._take(worker, {"about": ABOUT, "items": listed})
            elif worker.until <= self.clock.now < self.deadline:
                self._stop(worker)

    def _message(self, task: Task) -> dict[str, Any]:
        return {"item": task.name, "needs": task.needs, "limit": task.limit, "call": task.call}


@pytest.fixture
def call(tmp_path: Path, tasks: dict[str, list[Task]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    """One call after another into the same folder; the record stays in memory, as thousands of writes would last."""
    clock, kept = Clock(), Record(tmp_path, "s")
    monkeypatch.setattr(conductor, "time", clock)
    monkeypatch.setattr(kept, "write", lambda: None)

    def run(durations: Durations) -> Simulation:
        begin = clock.now
        made = Simulation(kept, tasks, clock, durations)
        made.run()
        assert clock.now - begin <= SECONDS
        return made

    return run


def as_planned(task: Task) -> float:
    return task.needs


def done(run: Simulation, number: int) -> list[bool]:
    """Whether each item of a call of this number is done."""
    return [name in run.record.done for name, task in run.tasks.items() if task.call == number]


def test_what_one_call_promises_fits_into_it(tasks: dict[str, list[Task]]) -> None:
    """And each target of the issue has an item in it, with time kept for a worker that has to be replaced."""
    items = {part: [Item(t.name, t.needs, t.limit, t.call) for t in found] for part, found in tasks.items()}
    due = plan.stages(items, PARTS, lambda _: False)
    for number in (FIRST, 2):
        asked = sum(stage.seconds(WORKERS) for stage in due if stage.call == number)
        assert asked + START_SECONDS <= SECONDS - conductor._CLOSING_SECONDS, number
    assert all(item.limit is None or item.needs <= item.limit for stage in due for item in stage.items)
    assert max(item.needs for stage in due for item in stage.items) <= SECONDS - START_SECONDS
    names = [item.name for stage in due if stage.call == FIRST for item in stage.items]
    assert [prefix for prefix in (*TARGETS, "time_to_loss") if not any(name.startswith(prefix) for name in names)] == []
    checked = Counter(name.split()[0] for name in names if name.startswith("check."))
    assert set(checked) == {f"check.{kernel.name}" for kernel in kernel_items.KERNELS}


def test_one_call_brings_every_target_and_a_second_one_deepens(call: Callable[..., Simulation]) -> None:
    first = call(as_planned)
    assert all(done(first, FIRST))
    assert not all(done(first, 2))
    second = call(as_planned)
    assert all(done(second, 2))
    assert not {name for name, task in second.tasks.items() if task.call == FIRST} & set(second.begun)
    calls = 2
    while (last := call(as_planned)).missing():
        calls += 1
        assert calls < 8
    assert calls + 1 <= 7, "what the docstring of full_run says of how many bring everything"
    assert len(last.record.done) == len(last.tasks)


@pytest.mark.parametrize("slow", ["everything", "gpt2", "check"])
def test_every_target_begins_however_slow_another_one_is(call: Callable[..., Simulation], slow: str) -> None:
    """All a little slower than planned; one that hangs; checks three times as slow."""
    factor = {"everything": 1.04, "check": 3.0}.get(slow, 1.0)

    def durations(task: Task) -> float:
        hangs = slow == "gpt2" and task.name == "train_124m gpt2"
        return float("inf") if hangs else task.needs * (factor if slow in ("everything", task.name[:5]) else 1.0)

    run = call(durations)
    begun = [name for name in run.begun if run.tasks[name].call == FIRST]
    assert [prefix for prefix in TARGETS if not any(name.startswith(prefix) for name in begun)] == []
    assert not run.record.failed


def test_a_short_call_takes_what_matters_most(tasks: dict[str, list[Task]]) -> None:
    """Time is kept for later ones as far as it lasts, in order, and never for another call's."""
    stages = [Stage(str(n), FIRST, [Item(str(n), needs, None)]) for n, needs in enumerate((10, 30, 50, 5))]
    assert plan.kept(stages[0], stages[1:], 500, 1) == 85 + START_SECONDS
    assert plan.kept(stages[0], stages[1:], 60, 1) == 35 + START_SECONDS, "the third does not fit, the fourth does"
    assert plan.kept(stages[0], stages[1:], 5, 1) == 0
    assert plan.kept(stages[0], stages[1:], 60, 1, starts=True) == 35, "all that is left, but for its own"
    assert plan.kept(stages[0], [Stage("x", 2, [Item("x", 1, None, 2)])], 500, 1) == 0
    assert plan.reserved([], 10) == 0
    late = plan.stages({"a": stages[0].items + stages[1].items}, ["a"], lambda name: name == "0")
    assert [[item.name for item in stage.items] for stage in late] == [["1"], ["0"]]


def test_the_fastest_of_both_is_read_as_memory(tasks: dict[str, list[Task]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest micro-batch by one peak each: (share of the device - held at any size) / what a sequence takes."""
    device = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(training_items.torch.cuda, "get_device_properties", lambda _: device)
    rows = {(row.name, row.provider): row for row in training_items._largest((150.0, 10.0), (150.0, 25.0), how="x")}
    largest = rows["train_124m.largest_micro_batch", "fastlm"]
    assert (largest.value, largest.baseline, largest.ratio, largest.target) == (80, 32, 2.5, 64)
    assert rows["train_124m.bytes_per_sequence", "baseline"].value == 25.0
