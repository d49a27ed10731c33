"""A first update that does not fit: training goes on with a smaller micro-batch, or ends with one line."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import Replays
from tiny import events, final_weights, train, write_corpus

from fastlm import fit, resolve
from fastlm import train as train_module
from fastlm.config import load_config
from fastlm.errors import MachineError

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
BF16 = ("--train.precision", "bf16")


class Device:
    """A stand-in for memory that takes forward and backward of `most` sequences: larger ones fail after backward."""

    def __init__(self, most: int, monkeypatch: pytest.MonkeyPatch):
        self.most, self.tried = most, []
        self.accumulate = train_module.accumulate
        monkeypatch.setattr(train_module, "accumulate", self)

    def __call__(self, loss_of: Any, loss: Any, inputs: torch.Tensor, *rest: Any) -> None:
        self.accumulate(loss_of, loss, inputs, *rest)
        self.tried.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError(FULL)


class Full(Replays):
    """A recorder that has no room for the graph of the first size it meets."""

    attempts = 0

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        Full.attempts += 1
        if Full.attempts == 1:
            raise torch.OutOfMemoryError(FULL)
        return work


def whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` that trusts an estimate too low."""
    monkeypatch.setattr(resolve, "_micro_batch_size", lambda cfg, *_: (cfg.train.batch_size, "micro-batch: all"))


@pytest.mark.parametrize("how", ["eager", "warm-up", "recording"])
def test_auto_takes_the_next_smaller_one_bit_for_bit(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, losses and records are those of a run that had it from the start; so is what a second start reads."""
    corpus, graphs = write_corpus(tmp_path / "corpus.txt"), how != "eager"
    sizes, recorder = ([8, 4], Full) if how == "recording" else ([8, 4, 2], Replays)
    monkeypatch.setattr(resolve, "_cuda_graphs", lambda cfg, device: (graphs, "CUDA graphs: a test's"))
    monkeypatch.setattr(train_module, "CudaRecorder", lambda device: Replays())
    train(corpus, tmp_path / "small", *BF16, "--train.micro_batch_size", str(sizes[-1]))
    monkeypatch.setattr(train_module, "CudaRecorder", lambda device: recorder())
    monkeypatch.setattr(Full, "attempts", 0)
    whole_batch(monkeypatch)
    device = Device(8 if how == "recording" else 2, monkeypatch)
    capsys.readouterr()
    train(corpus, tmp_path / "shrunk", *BF16, "--train.micro_batch_size", "auto")
    notes = [line for line in capsys.readouterr().out.splitlines() if "did not fit" in line]
    assert len(notes) == len(sizes) - 1
    assert notes[0].startswith("micro-batch: 4, as 8 did not fit (CUDA out of memory.")
    assert load_config(tmp_path / "shrunk" / "config.yaml").train.micro_batch_size == sizes[-1]
    assert list(dict.fromkeys(device.tried)) == sizes
    assert final_weights(tmp_path / "shrunk") == final_weights(tmp_path / "small")
    losses = [[line["loss"] for line in events(tmp_path / name, "train")] for name in ("small", "shrunk")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "warm-up"])
def test_a_size_that_was_asked_for_ends_in_one_line(
    graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 1; the same command with a smaller one, or more memory, then trains in the same directory."""
    corpus = write_corpus(tmp_path / "corpus.txt")
    monkeypatch.setattr(resolve, "_cuda_graphs", lambda cfg, device: (graphs, "CUDA graphs: a test's"))
    monkeypatch.setattr(train_module, "CudaRecorder", lambda device: Replays())
    device = Device(2, monkeypatch)
    with pytest.raises(MachineError) as raised:
        train(corpus, tmp_path / "run", "--train.micro_batch_size", "4")
    assert str(raised.value) == (
        "--train.micro_batch_size: got 4; out of memory on cpu (Tried to allocate 2.00 GiB); give less, or "
        f"--train.recompute block; --out {tmp_path / 'run'} goes on from the beginning"
    )
    assert device.tried == [4]
    train(corpus, tmp_path / "run", "--train.micro_batch_size", "2")
    assert [line["step"] for line in events(tmp_path / "run", "train")][-1] == 6


class Held:
    """What stands for tensors of a recording."""


def test_eager_steps_have_the_memory_of_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that was asked for: there is no graph of it, and nothing of the attempt is left when a step begins."""
    recordings: list[weakref.ref[Held]] = []
    left: list[bool] = []

    class NoRoom(Replays):
        def record(self, work: Callable[[], None]) -> Callable[[], object]:
            held = Held()
            recordings.append(weakref.ref(held))
            raise torch.OutOfMemoryError(FULL)

    accumulate = train_module.accumulate

    def watched(*arguments: Any) -> None:
        left.extend(recording() is not None for recording in recordings)
        accumulate(*arguments)

    monkeypatch.setattr(train_module, "accumulate", watched)
    monkeypatch.setattr(resolve, "_cuda_graphs", lambda cfg, device: (True, "CUDA graphs: a test's"))
    monkeypatch.setattr(train_module, "CudaRecorder", lambda device: NoRoom())
    train(write_corpus(tmp_path / "corpus.txt"), tmp_path / "run", "--train.micro_batch_size", "4", steps=2)
    assert len(recordings) == 1
    assert left == [False] * 4


def test_the_optimizers_own_memory_is_no_reason_to_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not get less, and what it was at may be half done."""
    corpus = write_corpus(tmp_path / "corpus.txt")
    whole_batch(monkeypatch)
    device = Device(8, monkeypatch)

    def full(self: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    build = train_module.prepare

    def prepare(*arguments: Any) -> Any:
        run = build(*arguments)
        assert run is not None
        monkeypatch.setattr(type(run.optimizer), "step", full)
        return run

    monkeypatch.setattr(train_module, "prepare", prepare)
    with pytest.raises(MachineError, match="out of memory"):
        train(corpus, tmp_path / "run", "--train.micro_batch_size", "auto")
    assert len(set(device.tried)) == 1


def test_a_command_ends_with_the_line_and_code_1() -> None:
    script = "from fastlm.errors import *\ndef main(): raise MachineError('--a', 4, 'give less')\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: --a: got 4; give less\n")


def test_sizes_are_the_divisors() -> None:
    assert [fit.next_smaller(12, size) for size in (12, 6, 4, 3, 2, 1)] == [6, 4, 3, 2, 1, None]
