"""Runs small enough for a test: a few thousand characters, one thin layer, a handful of updates."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastlm.train import main

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "over",
    "under",
    "quick",
    "lazy",
    "brown",
    "fox",
    "and",
    "then",
    "it",
]
SHAPE = ["--data.tokenizer", "char", "--data.seq_len", "16", "--model.n_layer", "1", "--model.n_head", "2"]
SHAPE += ["--model.n_embd", "16", "--train.batch_size", "8", "--train.log_every", "1", "--device", "cpu"]
TIMES = {"seconds", "tokens_per_second", "mfu"}  # what no two runs share


def write_corpus(path: Path, sentences: int = 400) -> Path:
    """Text with some structure, the same on every machine."""
    draw = random.Random(5)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(sentences)]
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(corpus: Path, out: Path, *more: str, steps: int = 6) -> list[str]:
    """The command line of a tiny run; later flags win."""
    return ["--data.path", str(corpus), "--out", str(out), "--train.steps", str(steps), *SHAPE, *more]


def train(corpus: Path, out: Path, *more: str, steps: int = 6) -> int:
    """Train in this process -> exit code."""
    return main(flags(corpus, out, *more, steps=steps))


def spawn(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Train in a process of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def events(out: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of some kinds or all."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def record(out: Path) -> list[dict[str, Any]]:
    """What two equal runs share: every line but restarts, without the clock."""
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in events(out)
        if line["event"] != "start"
    ]


def final_weights(out: Path) -> bytes:
    """The bytes of the newest checkpoint's model.safetensors."""
    return (max((out / "checkpoints").glob("step_*")) / "model.safetensors").read_bytes()
