"""The examples run as they stand, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import fastlm_kernels as fk

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = ("adamw_hf_trainer", "adamw_plain_loop", "bert_classifier", "gpt2_trainer", "llama_lora", "nanogpt_loop")


def run_main(name: str, *arguments: Any, **options: Any) -> Any:
    """What the `main` of examples/name.py gives."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](*arguments, **options)


def test_these_are_the_examples() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{name}.py" in text.split('"""')[1]


def test_the_plain_loop_learns() -> None:
    losses = run_main("adamw_plain_loop", 60)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.needs_kernels
def test_the_plain_loop_learns_with_the_kernels() -> None:
    losses = run_main("adamw_plain_loop", 12)
    assert losses[-1] < 0.7 * losses[0]


def test_nanogpt_learns(capsys: pytest.CaptureFixture) -> None:
    losses = run_main("nanogpt_loop", 60, batch_size=8)
    assert losses[-1] < 0.7 * losses[0]
    text = capsys.readouterr().out
    assert text.startswith("    def ")  # the prompt, and a sample behind it
    assert len(text) > len("    def ") + 30


def test_bert_learns() -> None:
    losses, accuracy = run_main("bert_classifier", 400, 16)
    assert len(losses) == 2 * (720 // 16)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert accuracy > 0.8


def test_gpt2_learns_under_the_trainer(tmp_path: Path) -> None:
    losses, held_out = run_main("gpt2_trainer", str(tmp_path), epochs=1)
    assert losses[-1] < 0.9 * losses[0]
    assert held_out < 0.9 * losses[0]
    assert list(tmp_path.rglob("events.out.tfevents.*"))


# PEFT 0.21 reads what transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapts_a_llama() -> None:
    losses, (before, after) = run_main("llama_lora", steps=20)
    assert losses[0] == pytest.approx(before, rel=1e-4)  # an adapter starts as nothing
    assert after < 0.6 * before
    assert after < 1.01 * losses[-1]


def test_hugging_faces_trainer_learns_with_our_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = fk.optim.AdamW.step

    def counted(self: fk.optim.AdamW, *args: object) -> object:
        steps.append(self.options.max_grad_norm)
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(fk.optim.AdamW, "step", counted)
    losses = run_main("adamw_hf_trainer", 24)
    assert losses[-1] < 0.7 * losses[0]
    assert steps == [1.0] * 24
