"""fastlm: a compact GPT trainer with Triton kernels of its own. See `fastlm_kernels` for the kernels alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.config import Config
    from fastlm.data import open_dataset
    from fastlm.model import GPT
    from fastlm.run import open_run

__version__ = "0.1.0"
__all__ = ["GPT", "Config", "open_dataset", "open_run"]

_HOMES = {"Config": "config", "GPT": "model", "open_dataset": "data", "open_run": "run"}


def __getattr__(name: str) -> Any:
    """Public names on first use: `import fastlm` alone, and with it every command's --help, loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
