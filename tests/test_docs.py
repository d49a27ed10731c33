"""docs/dropping-in.md is true: its blocks run in their order, its lists are the package's, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from fastlm_kernels import check, hf, hub, layers, patching
from fastlm_kernels._command import run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "dropping-in.md"
TEXT = PAGE.read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def names_after(start: str, end: str) -> list[str]:
    """What stands in backquotes between two pieces of the text."""
    return re.findall(r"`(\w+)`", TEXT.split(start, 1)[1].split(end, 1)[0])


def test_the_blocks_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write = next(command for command in COMMANDS if "hub" in command)
    assert shlex.split(write)[:3] == ["python", "-m", "fastlm_kernels.hub"]
    assert run(hub.main, shlex.split(write)[3:]) == 0
    torch.manual_seed(0)
    scope = {"torch": torch, "x": torch.randn(5, 64), "weight": torch.randn(64), "head": torch.randn(9, 64)}
    scope |= {"targets": torch.arange(5), "ids": torch.arange(8)[None]}
    losses = []
    for block in PYTHON:
        exec(block, scope)
        losses.append(scope["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # before and after
    assert "LlamaRMSNorm" in capsys.readouterr().out


def test_the_command_for_a_model_is_one(capsys: pytest.CaptureFixture) -> None:
    command = shlex.split(next(command for command in COMMANDS if "--model" in command))
    assert command[:3] == ["python", "-m", "fastlm_kernels.check"]
    assert run(check.main, command[3:]) == 2  # there is no directory of this name
    assert "error: --model: got DIR" in capsys.readouterr().err


def test_the_lists_are_the_packages() -> None:
    assert names_after("Known: ", "each by") == list(hf.FAMILIES)
    assert names_after("Layers: ", "; each has") == layers.__all__
    # On older versions of PyTorch the last one is missing.
    replaced = [kind.__name__ for kind in patching.REPLACEMENTS]
    listed = names_after("Replaced: ", ". An instance")
    assert listed[: len(replaced)] == replaced
    assert set(listed) - set(replaced) <= {"LinearCrossEntropyLoss"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert all((page.parent / link).exists() for link in links)
    if page.stem != "README":
        assert f"(docs/{page.name})" in (ROOT / "README.md").read_text()
    modules = re.findall(r"python -m (fastlm[\w.]*|bench[\w.]*)", text)
    assert all(importlib.util.find_spec(module) for module in modules)
    scripts = re.findall(r"(?:python|pytest) (tests/\w+\.py)", text)
    assert all((ROOT / script).exists() for script in scripts)
