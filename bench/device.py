"""The device that the benches run on: its name, the versions, and what it was just measured to do."""

from __future__ import annotations

import datetime
import functools
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.record import sources_hash
from bench.timing import Spread, device_spread, host_spread
from fastlm_kernels import _runtime

GPU = torch.cuda.is_available() and not _runtime.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
_ENOUGH_SECONDS = 0.5  # of each rate
_ROOT = Path(__file__).parent.parent


class Rates(NamedTuple):
    """What shares of speed refer to: the best of a large copy and of a large matrix product, just measured.

    copy_bytes_per_second counts bytes read and written; matmul is in bf16 on a GPU, in fp32 on a CPU.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def name() -> str:
    """The GPU's name, or the processor's with the threads in use: "AMD EPYC, 2 threads"."""
    if GPU:
        return torch.cuda.get_device_name()
    return f"{_processor(Path('/proc/cpuinfo'))}, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}"


def is_cpu(name: str) -> bool:
    """Whether `name` gave this name to a processor."""
    return re.search(r", \d+ threads?$", name) is not None


def _processor(cpuinfo: Path) -> str:
    """The processor's model, never the machine's own name."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def _commit(root: Path = _ROOT) -> str:
    """The short hash of the checked-out commit, "+" behind it if files differ from it; outside of git the sources'."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bench", "fastlm", "kernels")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"sources-{sources_hash(root)}"


@functools.cache
def provenance() -> dict[str, str]:
    """What every figure carries: device, torch, triton, python, commit and date (UTC)."""
    triton = _runtime.triton.__version__ if _runtime.HAS_TRITON else "none"
    return {
        "device": name(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


@functools.cache
def rates() -> Rates:
    """The device's copy bandwidth and matmul rate, measured once a process, before anything else is timed."""
    time: Callable[[Callable[[], Any], float], Spread] = device_spread if GPU else host_spread
    # Far beyond any cache, and a matrix product of a second's part.
    copied, side, dtype = (1 << 30, 8192, torch.bfloat16) if GPU else (1 << 28, 1024, torch.float32)
    source = torch.zeros(copied // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = time(lambda: target.copy_(source), _ENOUGH_SECONDS).best
    # Random numbers: a GPU multiplies zeros faster than it would anything else.
    a, b = (torch.randn(side, side, dtype=dtype, device=DEVICE) for _ in range(2))
    product = torch.empty_like(a)
    matmul = time(lambda: torch.mm(a, b, out=product), _ENOUGH_SECONDS).best
    return Rates(2 * source.nbytes / copy, 2 * side**3 / matmul)
