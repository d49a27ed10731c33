"""The examples run as they stand, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import fastlm_kernels as fk

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, steps: int) -> list[float]:
    """The losses of an example's `main`."""
    return runpy.run_path(str(EXAMPLES / name))["main"](steps)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_the_plain_loop_learns() -> None:
    losses = run("adamw_plain_loop.py", 60)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.needs_kernels
def test_the_plain_loop_learns_with_the_kernels() -> None:
    losses = run("adamw_plain_loop.py", 12)
    assert losses[-1] < 0.7 * losses[0]


def test_hugging_faces_trainer_learns_with_our_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = fk.optim.AdamW.step

    def counted(self: fk.optim.AdamW, *args: object) -> object:
        steps.append(self.options.max_grad_norm)
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(fk.optim.AdamW, "step", counted)
    losses = run("adamw_hf_trainer.py", 24)
    assert losses[-1] < 0.7 * losses[0]
    assert steps == [1.0] * 24
