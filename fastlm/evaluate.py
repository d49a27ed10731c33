"""How good a model is on held-out text: `python -m fastlm.evaluate RUN [--data.path FILE]`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

import fastlm_kernels as fk
from fastlm.errors import InputError, run_command
from fastlm.model import GPT

if TYPE_CHECKING:
    from fastlm.run import Run
    from fastlm.shards import TokenStream

METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")


@dataclass
class EvaluateData:
    """What to evaluate on, if not the run's own validation split."""

    path: str | None = None  # text or shards, all of it; null = the run's validation split


@dataclass
class EvaluateConfig:
    """Score a run's newest checkpoint; prints one JSON object."""

    run: str  # a run directory or one checkpoint
    data: EvaluateData = field(default_factory=EvaluateData)
    metrics: str = "loss,perplexity,bits_per_byte,accuracy"
    batch_size: int = 8  # windows per forward pass
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass(frozen=True)
class Evaluation:
    """Sums over every predicted token; `text_*` leave out special tokens, which stand for no bytes."""

    tokens: int
    nats: float
    text_nats: float
    text_bytes: int | None  # None where no tokenizer says how long a token is
    correct: int | None  # None where not asked for

    @property
    def loss(self) -> float:
        """Mean nats a predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite rather than an overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits spent a UTF-8 byte of the text: comparable across tokenizers."""
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float | None:
        """Share of tokens that the model ranked first."""
        return None if self.correct is None else self.correct / self.tokens


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray | None,
    *,
    accuracy: bool = False,
) -> Evaluation:
    """Score (inputs, targets) batches, (B, T) int64 each, target -100 = not counted. Sums are kept in fp64."""
    device = next(model.parameters()).device
    length_V = None if token_bytes is None else torch.from_numpy(token_bytes)
    tokens = text_bytes = correct = 0
    nats = text_nats = 0.0
    for inputs_BT, targets_BT in batches:
        nats_BT, hits_BT = _score(model, inputs_BT.to(device), targets_BT.to(device), accuracy)
        counted_BT = targets_BT >= 0
        tokens += int(counted_BT.sum())
        nats += float(nats_BT[counted_BT].sum())
        if length_V is not None:
            length_BT = length_V[targets_BT.clamp(min=0)] * counted_BT
            text_bytes += int(length_BT.sum())
            text_nats += float(nats_BT[length_BT > 0].sum())
        if hits_BT is not None:
            correct += int(hits_BT.sum())
    return Evaluation(
        tokens=tokens,
        nats=nats,
        text_nats=text_nats,
        text_bytes=None if length_V is None else text_bytes,
        correct=correct if accuracy else None,
    )


def _score(model: GPT, inputs_BT: Tensor, targets_BT: Tensor, accuracy: bool) -> tuple[Tensor, Tensor | None]:
    """Nats of each target (fp64) and, if asked, whether the model ranked it first; both on the CPU."""
    if not accuracy:
        return model(inputs_BT, targets_BT, reduction="none").cpu().double(), None
    logits_BTV = model(inputs_BT)
    nats_BT = fk.cross_entropy(logits_BTV.mT, targets_BT, reduction="none")
    return nats_BT.cpu().double(), (logits_BTV.argmax(dim=-1) == targets_BT).cpu()


def main(argv: list[str] | None = None) -> int:
    """Print the metrics asked for, with what they were measured on."""
    from fastlm.checkpoint import json_bytes
    from fastlm.config import parse_arguments
    from fastlm.data import eval_windows
    from fastlm.run import open_run

    arguments = sys.argv[1:] if argv is None else argv
    cfg = parse_arguments(EvaluateConfig, arguments, command="fastlm.evaluate", positional="run")
    names = [name.strip() for name in cfg.metrics.strip("[]").split(",")]
    for name in names:
        if name not in METRICS:
            raise InputError("--metrics", name, f"choose among {', '.join(METRICS)}")
    if cfg.batch_size < 1:
        raise InputError("--batch_size", cfg.batch_size, "give at least 1")
    run = open_run(cfg.run, cfg.device)
    windows = eval_windows(_open_stream(run, cfg.data.path), run.cfg.data.seq_len, cfg.batch_size)
    token_bytes = None if run.tokenizer is None else run.tokenizer.token_bytes()
    with run.kernels():
        result = evaluate(run.model, windows, token_bytes, accuracy="accuracy" in names)
    report = {
        "run": str(run.checkpoint),
        "step": run.state["step"],
        "data": cfg.data.path or "validation split",
    }
    report |= {"tokens": result.tokens} | {name: getattr(result, name) for name in names}
    sys.stdout.write(json_bytes(report).decode())
    return 0


def _open_stream(run: Run, path: str | None) -> TokenStream:
    """The tokens of `path`, or of the run's validation split, if that is still the text that the run trained on."""
    from fastlm.data import open_dataset, open_for_evaluation

    if path is not None:
        return open_for_evaluation(run.cfg.data, path, run.tokenizer, run.model.vocab_size)
    dataset = open_dataset(run.cfg.data)
    if dataset.fingerprint != run.state["data"]:
        remedy = "its content changed since the run; restore it, or name a text with --data.path"
        raise InputError("the run's data", dataset.source, remedy)
    return dataset.val


if __name__ == "__main__":
    run_command(main)
