"""Whatever a user can get wrong: one clear line naming the value and the remedy, exit code 2, nothing written."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SHAPE, spawn, write_corpus

from fastlm.errors import run_command
from fastlm.train import main

Write = Callable[[str, bytes], str]


def shard(magic: int, count: int, ids: list[int]) -> bytes:
    header = struct.pack("<256i", magic, 1, count, *[0] * 253)
    return header + struct.pack(f"<{len(ids)}H", *ids)


# name -> (arguments made from a function that writes a file, what the one line has to hold)
CASES: dict[str, tuple[Callable[[Write], list[str]], list[str]]] = {
    "missing file": (lambda _: ["--data.path", "nowhere.txt"], ["--data.path", "nowhere.txt"]),
    "empty file": (lambda w: ["--data.path", w("empty.txt", b"")], ["empty.txt"]),
    "directory without text": (lambda w: ["--data.path", str(Path(w("d/x.png", b"1")).parent)], ["--data.path", "d"]),
    "not utf-8": (lambda w: ["--data.path", w("latin.txt", b"caf\xe9 " * 500)], ["latin.txt", "UTF-8"]),
    "too short": (lambda w: ["--data.path", w("short.txt", b"tiny text")], ["--data.seq_len"]),
    "unknown tokenizer": (lambda _: ["--data.tokenizer", "bpee"], ["--data.tokenizer", "bpee", "bpe"]),
    "unknown preset": (lambda _: ["--preset", "nanogpt"], ["--preset", "nanogpt", "nanogpt-cpu"]),
    "unknown optimizer": (lambda _: ["--optim.name", "adamW"], ["--optim.name", "adamW", "adamw"]),
    "unknown flag": (lambda _: ["--train.step", "5"], ["--train.step", "--train.steps"]),
    "half a flag": (lambda _: ["--data", "x.txt"], ["--data.path"]),
    "unknown key in a file": (
        lambda w: ["--config", w("c.yaml", b"optim: {learning_rate: 1}")],
        ["optim.learning_rate", "c.yaml"],
    ),
    "heads": (lambda _: ["--model.n_head", "3", "--model.n_embd", "128"], ["--model.n_head", "3", "128"]),
    "batch of 0": (lambda _: ["--train.batch_size", "0"], ["--train.batch_size", "0", "at least 1"]),
    "negative rate": (lambda _: ["--optim.lr", "-1"], ["--optim.lr", "-1"]),
    "rate in words": (lambda _: ["--optim.lr", "fast"], ["--optim.lr", "fast", "number"]),
    "rate not finite": (lambda _: ["--optim.lr", ".nan"], ["--optim.lr"]),
    "no such device": (lambda _: ["--device", "cuda"], ["--device", "cuda", "cpu"]),
    "later family": (lambda _: ["--model.family", "lstm"], ["--model.family", "lstm", "later"]),
    "kernels without a gpu": (lambda _: ["--model.kernels", "triton"], ["--model.kernels", "triton", "torch"]),
    "attention without kernels": (lambda _: ["--model.attention", "triton"], ["--model.attention", "triton", "sdpa"]),
    "wrong magic": (lambda w: ["--data.path", w("m.bin", shard(7, 900, [1] * 900))], ["m.bin", "magic"]),
    "cut short": (lambda w: ["--data.path", w("c.bin", shard(20240520, 900, [1] * 500))], ["c.bin", "900"]),
    "past the vocabulary": (
        lambda w: ["--data.path", w("v.bin", shard(20240520, 900, [60000] * 900))],
        ["v.bin", "60000"],
    ),
    "headerless": (lambda w: ["--data.path", w("h.bin", b"\1\0" * 900)], ["h.bin", "--data.bin_format uint16"]),
    "out is a file": (lambda w: ["--out", w("file", b"x")], ["--out", "file"]),
    "resume from nowhere": (lambda _: ["--resume", "nowhere"], ["--resume", "nowhere"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if name in ("kernels without a gpu", "no such device"):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if name == "kernels without a gpu":
        monkeypatch.setattr("fastlm_kernels._runtime.INTERPRETED", False)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus.txt")

    def write(file: str, content: bytes) -> str:
        path = tmp_path / "input" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    make, told = CASES[name]
    usual = ["--data.path", "corpus.txt", "--train.steps", "2", *SHAPE, "--out", str(tmp_path / "run")]
    arguments = [*usual, *make(write)]
    if any(word.endswith(".bin") for word in arguments):
        arguments += ["--data.tokenizer", "bpe"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as ending:
        run_command(lambda: main(arguments))
    err = capsys.readouterr().err
    assert ending.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert ": got " in err
    assert "; " in err
    for part in told:
        assert part in err
    assert not (tmp_path / "run").exists()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} <= set(before)


def test_from_a_shell(tmp_path: Path):
    """The same through the interpreter: exit status, stderr, no traceback."""
    process = spawn(["--optim.lr", "fast", "--out", str(tmp_path / "run")])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err == "error: --optim.lr: got fast; give a number\n", sys.version
