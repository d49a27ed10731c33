"""Exit codes and the one-line form of errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastlm.errors import GuardStop, InputError, run_command, show


def ending(main) -> object:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (InputError("--seed", -1, "give at least 0"), 2, "error: --seed: got -1; give at least 0\n"),
        (GuardStop("the loss is not finite"), 3, "stopped: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_each_ending_has_its_exit_code(capsys, error: BaseException, code: int, stderr: str):
    assert ending(raising(error)) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", stderr)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (143, 143), (7, 7)])
def test_a_main_that_returns_gives_the_code(result: int | None, code: int):
    assert ending(lambda: result) == code


def test_an_unexpected_exception_keeps_its_traceback_and_gives_1():
    program = "from fastlm.errors import run_command\nrun_command(lambda: 1 // 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")


@pytest.mark.parametrize("size", [10, 10_000_000], ids=["in the buffer", "while writing"])
@pytest.mark.parametrize("code", [0, 143])
def test_a_reader_that_goes_away_is_no_error(size: int, code: int):
    program = "import sys\nfrom fastlm.errors import run_command\nsys.stdin.readline()\n"
    program += f"run_command(lambda: sys.stdout.write('x' * {size}) and {code})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate("go\n", timeout=60)
    # what fits into the buffer fails only after `main` has given its code
    assert (process.returncode, stderr) == (code if size == 10 else 0, "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1, "1"),
        (1e-3, "0.001"),
        ("", "an empty text"),
        ("a\nb\t\x1b[0m", r"a\nb\t\x1b[0m"),
        ("Grüße", "Grüße"),
        ("x" * 1000, "x" * 160 + "..."),
    ],
)
def test_values_are_shown_on_one_line(value: object, text: str):
    assert show(value) == text


def test_an_input_error_is_a_value_error_on_one_line():
    error = InputError("--a", "b\nc", "do\n  this")
    assert isinstance(error, ValueError)
    assert str(error) == r"--a: got b\nc; do this"
    assert (error.key, error.value) == ("--a", "b\nc")
