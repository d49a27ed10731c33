"""Deliberate breaks, each with the test that must notice it.

    python tests/mutations.py [NAME ...]

A mutation replaces one piece of a kernel package's text. It is applied to a copy of the package, never in place, and
its test is run on the copy. A mutation that survives, whose text no longer occurs exactly once, or whose test cannot be
found is a defect of the tests. A family's mutations lie in `breaks`, in the file of the family's name. NAME is the
beginning of a mutation's name or of the file that it breaks, "rotary" for one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from breaks import (
    Mutation,
    activation,
    attention,
    cross_entropy,
    hf,
    hopper,
    linear_cross_entropy,
    norm,
    optim,
    rotary,
    runtime,
    softmax,
)

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "kernels" / "fastlm_kernels"
OPTIONS = ("-x", "-q", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:randomly")

MUTATIONS = (
    *norm.MUTATIONS,
    *activation.MUTATIONS,
    *softmax.MUTATIONS,
    *rotary.MUTATIONS,
    *cross_entropy.MUTATIONS,
    *linear_cross_entropy.MUTATIONS,
    *attention.MUTATIONS,
    *hopper.MUTATIONS,
    *optim.MUTATIONS,
    *hf.MUTATIONS,
    *runtime.MUTATIONS,
)


def main(names: list[str]) -> int:
    """Run the named mutations, or all, a line each; 1 if one survives, 2 if there is none of a name."""
    unknown = [name for name in names if not any(_is_named(m, name) for m in MUTATIONS)]
    if unknown:
        sys.stderr.write(f"error: NAME: got {', '.join(map(repr, unknown))}; tests/breaks/*.py hold names and files\n")
        return 2
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = False
    for mutation, defect in survivors(m for m in MUTATIONS if not names or any(_is_named(m, name) for name in names)):
        sys.stdout.write(f"{'killed  ' if defect is None else 'SURVIVES'} {mutation.name}\n{defect or ''}")
        sys.stdout.flush()
        failed |= defect is not None
    return int(failed)


def _is_named(mutation: Mutation, name: str) -> bool:
    return mutation.name.startswith(name) or mutation.file.startswith(name)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
