"""Every deliberate break of `mutations.py` is noticed by its test."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, survives

from fastlm_kernels.registry import KERNELS


@pytest.mark.needs_interpreter
def test_every_mutation_is_noticed() -> None:
    """Each named test fails on its mutated copy; one process a core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip((m.name for m in MUTATIONS), pool.map(survives, MUTATIONS), strict=True))
    assert {name: defect for name, defect in found.items() if defect is not None} == {}


def test_every_kernel_has_at_least_three_mutations() -> None:
    """The kernels of the registry's modules, counted by where a mutation's text lies."""
    for module in {sys.modules[kernel.fused.__module__] for kernel in KERNELS}:
        text = inspect.getsource(module)
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        kernels = [f for f in functions if f.name.endswith("_kernel") and not f.name.startswith("_")]
        assert kernels
        for node in kernels:
            body = ast.get_source_segment(text, node) or ""
            aimed = [m for m in MUTATIONS if m.file == Path(str(module.__file__)).name and m.old in body]
            assert len(aimed) >= 3, f"{node.name} has {len(aimed)} mutations"


@pytest.mark.needs_interpreter
def test_the_runner_notices_survivors_and_typos() -> None:
    """A break that changes nothing, a text that is gone and a test that does not exist are all reported."""
    harmless = Mutation(
        "harmless", "norm.py", "import math\n", "import math  # \n", "test_norm.py::test_several_normalised_axes"
    )
    assert "ended with 0" in (survives(harmless) or "")
    assert "occurs 0 times" in (survives(replace(harmless, old="no such text")) or "")
    assert "ended with 4" in (survives(replace(harmless, test="test_norm.py::test_gone")) or "")
