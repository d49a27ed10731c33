"""What this package's commands share: bad input is one line on stderr, `error: KEY: got VALUE; REMEDY`, and code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from . import _runtime

EXIT_BAD_INPUT = 2


class BadInput(ValueError):
    """Input that only the user can mend: the argument, the value seen, and what to do about it."""

    def __init__(self, key: str, value: object, remedy: str):
        super().__init__(f"{key}: got {value}; {' '.join(remedy.split())}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which completes no abbreviated flag."""

    def __init__(self, module: str, description: str | None):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2; `message` is argparse's."""
        self.exit(EXIT_BAD_INPUT, f"error: {message}; {self.prog} --help lists the arguments\n")


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of `main(argv)`; 2 and one line for a `BadInput`."""
    try:
        return main(argv)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT


def device_argument(name: str | None) -> torch.device:
    """The device called `name`, one that is here; a GPU if there is one where none is named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # PyTorch raises AssertionError where it was built without CUDA, NotImplementedError for a device without memory.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput("--device", name, f"give a device of this machine, such as cpu or cuda ({reason})") from None
    return device


def where(device: torch.device) -> str:
    """Where the kernels run on `device`, for a table's first line."""
    if device.type == "cuda":
        return f"on {torch.cuda.get_device_name(device)}"
    if _runtime.INTERPRETED:
        return "in Triton's interpreter on the CPU"
    return f"on the {device.type.upper()}: PyTorch's own path (set TRITON_INTERPRET=1 to run the kernels)"
