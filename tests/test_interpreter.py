"""The kernels themselves on a CPU: the tests marked `needs_kernels` or `both_paths`, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MARKS = re.compile(r"mark\.(needs_kernels|both_paths)")
# The share's name -> (whether it is of test_every_kernel.py, which of its tests).
SHARES = {
    "accuracy": (True, "test_as_accurate_as_pytorch"),
    "guarantees": (True, "not test_as_accurate_as_pytorch"),
    "families": (False, ""),
}


@pytest.mark.needs_interpreter
@pytest.mark.parametrize("share", SHARES)
def test_kernels_in_the_interpreter(share: str, tmp_path: Path) -> None:
    """In parts, so that workers may share the work."""
    marked = [f for f in sorted(HERE.glob("test_*.py")) if MARKS.search(f.read_text()) and f != Path(__file__)]
    every, keyword = SHARES[share]
    files = [f for f in marked if (f.name == "test_every_kernel.py") == every]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(
        [*command, "--show-capture=no", "-m", "needs_kernels or both_paths", "-k", keyword, *map(str, files)],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
