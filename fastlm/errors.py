"""Bad input in one line, and what each exit code means.

    0  done                          2  bad input                 3  stopped by a guard
    1  anything else                 130 / 143  stopped by SIGINT / SIGTERM, checkpoint saved

Results and progress go to stdout, errors and warnings to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_GUARD = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM

LONGEST_VALUE = 160  # characters of an offending value that an error repeats


class InputError(ValueError):
    """Input that only the user can mend: names the key, the value seen and what to do about it.

    Prints as `error: KEY: got VALUE; REMEDY`, one line, on stderr; the process exits with 2.
    """

    def __init__(self, key: str, value: object, remedy: str):
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}: got {show(value)}; {' '.join(remedy.split())}")


class MachineError(InputError):
    """Input that another machine would take, noticed after the run began: prints as InputError does, exit code 1."""


class GuardStop(RuntimeError):
    """Training stopped itself because going on could not help (exit code 3)."""


def show(value: object) -> str:
    """`value` as the user would have typed it in YAML: on one line, no control characters, cut when long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value) if str(value) else "an empty text"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and leave the process with the exit code that its ending calls for.

    An unexpected exception keeps Python's traceback and exit code 1: that is a bug, and whoever mends it
    needs the lines.
    """
    if sys.stdout is None:  # closed by whoever started us, as daemons are
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    try:
        code = main() or EXIT_DONE
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        code = EXIT_FAILED if isinstance(error, MachineError) else EXIT_BAD_INPUT
    except GuardStop as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        code = EXIT_GUARD
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away: `... | head` is no error
        code = EXIT_DONE
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what is left has no reader, and must not spoil the interpreter's own last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
