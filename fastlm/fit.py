"""A training step that does not fit the device's memory: a smaller micro-batch where that is `auto`, else one line.

A first update that fails leaves nothing behind but gradients: forward and backward touch no parameter, and a recorded
step warms up on optimizer steps that are left out whole (`capture`). So the next attempt is the run that had chosen
the smaller micro-batch from the start, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastlm.config import Config
from fastlm.errors import MachineError


class NoRoomToUpdate(torch.OutOfMemoryError):
    """The optimizer's own memory: it knows no micro-batch, and parameters may be half updated."""


@contextlib.contextmanager
def updating() -> Iterator[None]:
    """Around an optimizer's step: what runs out of memory there is NoRoomToUpdate."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NoRoomToUpdate(str(error)) from error


def next_smaller(batch_size: int, micro_batch_size: int) -> int | None:
    """The largest divisor of the batch below `micro_batch_size`, None below 1."""
    return next((size for size in range(micro_batch_size - 1, 0, -1) if batch_size % size == 0), None)


def forget_attempt(parameters: Iterable[nn.Parameter], *, compiled: bool) -> None:
    """Drop gradients, which the next attempt sums in fp32, and what the compiler knows of the shape that failed."""
    for parameter in parameters:
        parameter.grad = None
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
    if compiled:
        torch._dynamo.reset()  # a second shape would make sizes dynamic
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(cfg: Config, error: BaseException, note: str) -> MachineError:
    """The line for the user; `note` says what of the run is kept."""
    first = str(error).partition("\n")[0].split(". ")
    asked = next((part.rstrip(".") for part in first if part.startswith("Tried to allocate")), "no more to be had")
    less = "give less" if cfg.train.micro_batch_size != 1 else "a shorter --data.seq_len or a smaller model needs less"
    dial = "" if cfg.train.recompute == "block" else ", or --train.recompute block"
    remedy = f"out of memory on {cfg.device} ({asked}); {less}{dial}; {note}"
    return MachineError("--train.micro_batch_size", cfg.train.micro_batch_size, remedy)
