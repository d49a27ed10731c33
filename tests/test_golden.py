"""Loss curves of tiny runs, to be reproduced by every change that claims the same mathematics.

The figures are this project's own, from torch 2.13 on a CPU. Rounding differs between machines and versions; what
a change of the mathematics moves is far larger than the tolerance.
"""

from pathlib import Path

import pytest
from tiny import events, train, write_corpus

from fastlm import products

GPT2 = ["--model.family", "gpt2", "--optim.name", "adamw", "--optim.lr", "0.01", "--optim.schedule", "cosine"]
GOLDEN = {  # losses of updates 1, 5, 10, ... 30, then of the whole validation split
    "modern": ([], [3.29584, 3.01856, 2.68844, 2.24685, 2.04593, 1.92832, 1.95325, 1.87432]),
    "gpt2": (GPT2, [3.29677, 3.09531, 2.91006, 2.7198, 2.62234, 2.52813, 2.57298, 2.53784]),
}


@pytest.mark.parametrize(("name", "onednn"), [("modern", False), ("gpt2", False), ("gpt2", True)])
def test_loss_curve(name: str, onednn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if onednn:  # products of this size are left to PyTorch's own
        monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
        monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 0)
    arguments, expected = GOLDEN[name]
    train(write_corpus(tmp_path / "corpus.txt"), tmp_path / "run", *arguments, "--train.log_every", "5", steps=30)
    losses = [line["loss"] for line in events(tmp_path / "run", "train")]
    losses.append(events(tmp_path / "run", "eval")[-1]["val_loss"])
    assert losses == pytest.approx(expected, rel=2e-4)
