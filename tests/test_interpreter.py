"""The kernels themselves on a CPU: the tests marked `needs_kernels`, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.needs_interpreter
@pytest.mark.parametrize("share", ["test_as_accurate_as_pytorch", "not test_as_accurate_as_pytorch"])
def test_kernels_in_the_interpreter(share: str, tmp_path: Path) -> None:
    """Two halves, so that two workers may share the work."""
    files = [f for f in sorted(HERE.glob("test_*.py")) if "needs_kernels" in f.read_text() and f != Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(
        [*command, "--show-capture=no", "-m", "needs_kernels", "-k", share, *map(str, files)],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
