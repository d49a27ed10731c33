"""Bad input in one line, and what each exit code means.

    0  done                          2  bad input                 3  stopped by a guard
    1  anything else                 130 / 143  stopped by SIGINT / SIGTERM, checkpoint saved
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_GUARD = 3


class InputError(ValueError):
    """Input that only the user can mend: names the key, the value seen and what to do about it.

    Prints as `error: KEY: got VALUE; REMEDY`, at most three lines, on stderr; the process exits with 2.
    """

    def __init__(self, key: str, value: object, remedy: str):
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}: got {value}; {remedy}")


class GuardStop(RuntimeError):
    """Training stopped itself because going on could not help (exit code 3)."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and leave the process with the exit code that its ending calls for."""
    try:
        code = main() or EXIT_DONE
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        code = EXIT_BAD_INPUT
    except GuardStop as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        code = EXIT_GUARD
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our stdout went away: `... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    sys.exit(code)
