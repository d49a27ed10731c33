"""Every deliberate break of `mutations.py` is noticed by its test."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mutations import MUTATIONS, PACKAGE

from fastlm_kernels.registry import KERNELS

HERE = Path(__file__).parent


@pytest.mark.needs_interpreter
def test_every_mutation_is_noticed() -> None:
    """Each named test fails on its mutated copy."""
    run = _mutations("pass")
    rest = [line for line in run.stdout.splitlines() if not line.startswith("killed")]
    assert run.returncode == 0, "\n".join(rest)[:8000] + run.stderr[-2000:]
    assert run.stdout.count("killed") == len({m.name for m in MUTATIONS}) == len(MUTATIONS)


def _mutations(code: str) -> subprocess.CompletedProcess[str]:
    """`mutations.main` after `code`, which may put others in their place."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    code = f"import mutations, sys; {code}; sys.exit(mutations.main([]))"
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=HERE, capture_output=True, text=True)


def _kernels_of(module: ModuleType) -> list[ast.FunctionDef]:
    functions = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if f.name.endswith("_kernel") and not f.name.startswith("_")]


def test_every_kernel_has_at_least_three_mutations() -> None:
    """The kernels of the registry's modules, counted by where a mutation's text lies."""
    for kernel in KERNELS:
        assert any(_kernels_of(module) for module in kernel.modules), kernel.name
    for module in {module for kernel in KERNELS for module in kernel.modules}:
        text, file = inspect.getsource(module), Path(str(module.__file__)).relative_to(PACKAGE).as_posix()
        for node in _kernels_of(module):
            body = ast.get_source_segment(text, node) or ""
            aimed = [m for m in MUTATIONS if m.file == file and m.old in body]
            assert len(aimed) >= 3, f"{node.name} has {len(aimed)} mutations"


@pytest.mark.needs_interpreter
def test_the_runner_notices_survivors_and_typos() -> None:
    """A break that changes nothing, a text that is gone and a test that does not exist are all reported."""
    test = "test_norm.py::test_several_normalised_axes"
    run = _mutations(
        "from breaks import Mutation; mutations.MUTATIONS = ("
        f"Mutation('harmless', 'norm.py', 'import math', 'import math  #', {test!r}),"
        f"Mutation('gone', 'norm.py', 'no such text', '', {test!r}),"
        "Mutation('no test', 'norm.py', 'import math', 'import math  #', 'test_norm.py::test_gone'))"
    )
    assert run.returncode == 1
    assert run.stdout.count("SURVIVES") == 3
    for said in ("ended with 0", "occurs 0 times", "ended with 4"):
        assert said in run.stdout
