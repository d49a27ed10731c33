"""`python -m fastlm.prepare`: text to shards that train like the text itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.config import DataConfig
from fastlm.data import open_dataset
from fastlm.errors import InputError
from fastlm.prepare import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i}\n" * (i + 5))
    return folder


@pytest.mark.parametrize("tokenizer", ["bpe", "byte", "char"])
def test_prepared_shards_equal_the_text(
    tmp_path: Path, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/shards"
    options = ["--data.path", str(corpus), "--data.tokenizer", tokenizer, "--data.vocab_size", "300"]
    assert main([*options, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert [path.name for path in out.parent.iterdir()] == ["shards"]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--data.path {out}")
    text = open_dataset(DataConfig(path=str(corpus), tokenizer=tokenizer, vocab_size=300, seq_len=4))
    shards = open_dataset(DataConfig(path=str(out), seq_len=4))
    assert text.tokenizer is not None
    assert shards.tokenizer is not None
    assert shards.vocab_size == text.vocab_size
    assert shards.tokenizer.name == tokenizer
    for a, b in [(text.train, shards.train), (text.val, shards.val)]:
        assert a.read(0, len(a)).tolist() == b.read(0, len(b)).tolist()


def test_empty_folder_is_filled(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(["--data.path", str(corpus), "--data.tokenizer", "byte", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/train_000000.bin").exists()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--out", "new", "--data.path", "missing"], "--data.path"),
        (["--out", "new", "--data.path", "bad"], "--data.path"),
        (["--out", "new", "--data.path", "ids.bin"], "--data.path"),
        (["--out", "new", "--data.path", "text", "--data.val_path", "ids.bin"], "--data.val_path"),
        (["--out", "new", "--data.path", "text", "--data.tokenizer", "nope"], "--data.tokenizer"),
        (["--out", "new", "--data.path", "text", "--data.vocab_size", "12"], "--data.vocab_size"),
        (["--out", "new", "--data.path", "text", "--data.val_fraction", "2"], "--data.val_fraction"),
        (["--out", "text", "--data.path", "text"], "--out"),
        (["--out", "ids.bin", "--data.path", "text"], "--out"),
        (["--data.path", "text"], "--out"),
        (["--out", "new", "--data.pth", "text"], "--data.pth"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.bin").write_bytes(b"\0" * 2000)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.txt").write_bytes(b"abc\xff")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        main(options)
    assert caught.value.key == key
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_command_line(tmp_path: Path, corpus: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastlm.prepare", *arguments], capture_output=True, text=True, check=False
        )

    out = tmp_path / "out"
    done = run("--data.path", str(corpus), "--out", str(out), "--data.vocab_size", "300")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((out / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    again = run("--data.path", str(corpus), "--out", str(out))
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: --out: got {out}; is there already")
    assert again.stderr.count("\n") == 1
