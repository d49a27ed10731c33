"""Collect bench_*.py here, which the test suite's own pattern leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """A module of benchmarks, unless the configured pattern collects it already."""
    patterns = parent.config.getini("python_files")
    if file_path.match("bench_*.py") and not any(file_path.match(pattern) for pattern in patterns):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
