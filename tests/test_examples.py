"""The examples run as they stand, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["adamw_plain_loop.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_the_plain_loop_learns() -> None:
    losses = runpy.run_path(str(EXAMPLES[0]))["main"](60)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.needs_kernels
def test_the_plain_loop_learns_with_the_kernels() -> None:
    losses = runpy.run_path(str(EXAMPLES[0]))["main"](12)
    assert losses[-1] < 0.7 * losses[0]
