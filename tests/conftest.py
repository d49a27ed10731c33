"""Where kernels can run, and tests that need to know.

`needs_kernels`   runs the Triton kernels themselves: on a GPU, or in the interpreter under TRITON_INTERPRET=1.
                  On a CPU without it they are deselected here, and test_interpreter.py runs them in a subprocess.
`both_paths`      holds on PyTorch's path and on the kernels': runs here, and in that subprocess once more.
`needs_compiler`  compiles kernels: deselected where Triton is missing or interprets. `needs_interpreter` starts the
interpreter in a subprocess: deselected there too. `needs_triton` is deselected where Triton is missing, `needs_gpu`
where there is no GPU or the interpreter stands in for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tests are many small operators, often several processes at once, where a second thread a process only waits for the
# others: on two busy cores the suite took ten times as long. Set before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# PyTorch's deterministic mode, which poisons new memory here, wants it of cuBLAS, and warns without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import fastlm_kernels as fk
from fastlm_kernels import _interpreter, _runtime

CAN_RUN_KERNELS = _runtime.INTERPRETED or (_runtime.HAS_TRITON and torch.cuda.is_available())
CAN_COMPILE = _runtime.HAS_TRITON and not _runtime.INTERPRETED
CAN_INTERPRET = CAN_COMPILE  # in a subprocess


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; mend the interpreter."""
    if _runtime.INTERPRETED:
        _interpreter.mend_bf16()
    config.addinivalue_line("markers", "needs_kernels: runs Triton kernels (GPU, or TRITON_INTERPRET=1)")
    config.addinivalue_line("markers", "both_paths: runs on PyTorch's path and again on the kernels'")
    config.addinivalue_line("markers", "needs_compiler: compiles Triton kernels")
    config.addinivalue_line("markers", "needs_interpreter: starts Triton's interpreter in a subprocess")
    config.addinivalue_line("markers", "needs_triton: needs Triton to be installed")
    config.addinivalue_line("markers", "needs_gpu: runs on a GPU alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here. What takes minutes comes first: no core waits for it at the end."""
    can = {
        "needs_kernels": CAN_RUN_KERNELS,
        "needs_compiler": CAN_COMPILE,
        "needs_interpreter": CAN_INTERPRET,
        "needs_triton": _runtime.HAS_TRITON,
        "needs_gpu": CAN_COMPILE and torch.cuda.is_available(),
    }
    missing = [name for name, possible in can.items() if not possible]
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    long = ("needs_interpreter", "xdist_group")
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in long))


@pytest.fixture
def kernel_device() -> str:
    """The device that kernels run on: the GPU, or the CPU for the interpreter."""
    return "cpu" if _runtime.INTERPRETED else "cuda"


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.needs_kernels)])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both paths, the kernels' where they can run."""
    with fk.backend(request.param):
        yield request.param


@pytest.fixture
def device(path: str) -> str:
    """The device that the path runs on."""
    return "cuda" if path == "triton" and not _runtime.INTERPRETED else "cpu"


@pytest.fixture
def torch_functions() -> Iterator[None]:
    """PyTorch's path, also where kernels could run: for tests of what is the same on both."""
    with fk.backend("torch"):
        yield


@pytest.fixture(autouse=_runtime.INTERPRETED)
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN (a value no kernel may leave in a result); in the interpreter for every test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
