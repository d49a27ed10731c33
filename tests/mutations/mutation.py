"""What a mutation is, and how its test is run on the mutated copy."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PACKAGE = TESTS.parent / "kernels" / "fastlm_kernels"
OPTIONS = ("-x", "-q", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:randomly")

EVERY = "test_every_kernel.py::"
ACCURATE = EVERY + "test_as_accurate_as_pytorch[{}]"
LONG = EVERY + "test_long_rows_walked_in_blocks[float32-{}]"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file` (of the package); `test` must then fail, in the interpreter unless said."""

    name: str
    file: str
    old: str
    new: str
    test: str
    interpret: bool = True


def survivors(mutations: Iterable[Mutation]) -> Iterator[tuple[Mutation, str | None]]:
    """Each mutation, as its test ends, with None where the test noticed it, else with what is wrong.

    One process a core. Call it under TRITON_INTERPRET=1 and before fastlm_kernels is imported: the processes are forked
    from this one, so that PyTorch and Triton are imported once.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1"
    assert "fastlm_kernels" not in sys.modules
    _import_what_tests_import()
    waiting = list(reversed(list(mutations)))
    running: dict[int, tuple[Mutation, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                mutation = waiting.pop()
                text = (PACKAGE / mutation.file).read_text()
                if text.count(mutation.old) != 1:
                    yield mutation, f"{mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}"
                    continue
                own = Path(folder) / str(len(waiting))
                shutil.copytree(PACKAGE, own / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
                (own / PACKAGE.name / mutation.file).write_text(text.replace(mutation.old, mutation.new))
                running[_start(mutation, own)] = (mutation, own)
            if running:
                child, status = os.wait()
                mutation, own = running.pop(child)
                yield mutation, _verdict(mutation, own, os.waitstatus_to_exitcode(status))
                shutil.rmtree(own)


def _verdict(mutation: Mutation, own: Path, code: int) -> str | None:
    # 1: a test failed; negative: the process crashed. Anything else: the test was not run at all.
    if code == 1 or code < 0:
        return None
    return f"{mutation.test} ended with {code}:\n{(own / 'printed.txt').read_text()[-3000:]}"


def _import_what_tests_import() -> None:
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch.testing._internal.optests
    import triton.language  # noqa: F401

    torch.set_num_threads(1)  # a fork has no other threads


def _start(mutation: Mutation, own: Path) -> int:
    """The number of a process that runs the mutation's test on the copy in `own`, printing to its printed.txt."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        printed = os.open(own / "printed.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.chdir(TESTS.parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        kept |= {"PYTHONPATH": str(own), "TRITON_INTERPRET": str(int(mutation.interpret))}
        kept |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        arguments = [*OPTIONS, f"tests/{mutation.test}"]
        if not mutation.interpret:  # Triton reads it as it is imported
            os.execve(sys.executable, [sys.executable, "-m", "pytest", *arguments], kept)
        os.environ.clear()
        os.environ.update(kept)
        sys.path.insert(0, str(own))
        import pytest

        code = int(pytest.main(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)
