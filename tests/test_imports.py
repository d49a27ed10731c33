"""What importing and starting may load, and what must not be there for training to work."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import flags, write_corpus

import fastlm

MODULES = sorted(path.stem for path in Path(fastlm.__file__).parent.glob("*.py") if path.stem != "__init__")
OPTIONAL = ("jsonargparse", "rich", "tokenizers", "tensorboard", "matplotlib", "safetensors", "yaml", "triton")

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Block())
"""


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run code in a new interpreter -> stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_with_torch_numpy_and_the_standard_library():
    """And starts no process."""
    code = """
import importlib, subprocess
import torch
def started(self, *arguments, **options):
    raise AssertionError(f"a process: {arguments}")
subprocess.Popen.__init__ = started
for name in sys.argv[2].split(","):
    importlib.import_module("fastlm." + name)
"""
    python(BLOCK + code, ",".join(OPTIONAL), ",".join(MODULES))


def test_trains_where_triton_does_not_exist(tmp_path: Path):
    arguments = flags(write_corpus(tmp_path / "corpus.txt"), tmp_path / "run", steps=2)
    code = BLOCK + "from fastlm.train import main\nmain(sys.argv[2:])"
    out = python(code, "triton", *arguments)
    assert "Triton is not installed" in out
    assert "whole validation split" in out


def test_nothing_slow_loads_before_the_first_loss(tmp_path: Path):
    """Someone who has just pressed return waits for this line: no drawing, no event files, no compiler before it."""
    code = """
import sys
from fastlm.log import Progress
original = Progress.update
def update(self, *arguments, **options):
    slow = [name for name in ("tensorboard", "matplotlib", "torch._dynamo") if name in sys.modules]
    print("LOADED", slow)
    Progress.update = original
Progress.update = update
from fastlm.train import main
main(sys.argv[1:])
print("AT THE END", [name for name in ("tensorboard", "matplotlib") if name in sys.modules])
"""
    corpus = write_corpus(tmp_path / "corpus.txt")
    out = python(code, *flags(corpus, tmp_path / "run", "--data.tokenizer", "bpe", "--data.vocab_size", "300", steps=2))
    assert "LOADED []" in out
    assert "AT THE END ['tensorboard', 'matplotlib']" in out, "the test can see them"


def test_importing_has_no_side_effect(tmp_path: Path):
    code = "import os, sys, importlib\nfor name in sys.argv[1].split(','): importlib.import_module('fastlm.' + name)"
    assert python(code, ",".join(MODULES), cwd=tmp_path) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "prepare"])
def test_every_command_has_help(command: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", f"fastlm.{command}", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "--" in done.stdout
    assert not list(tmp_path.iterdir())


def test_public_names_load_on_first_use():
    code = """
import sys, fastlm
assert "torch" not in sys.modules
assert [getattr(fastlm, name).__name__ for name in fastlm.__all__] == fastlm.__all__
"""
    python(code)


def test_the_trainer_uses_no_private_name_of_the_kernels():
    """What it needs of them is public, and written down there."""
    for path in Path(fastlm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm_kernels"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") for name in names), f"{path.name}: {names}"
