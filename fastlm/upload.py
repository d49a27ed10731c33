"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fastlm.data import Batch


def uploaded(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, each copied there by a stream of its own while the update before it computes.

    `batches` are in pinned memory. On a CPU they are passed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = Batch(*(x.to(device, non_blocking=True) for x in batch[:2]), batch.first_sample)
            following = moved, stream.record_event()
        if waiting is not None:
            yield _received(*waiting)
        waiting = following
    if waiting is not None:
        yield _received(*waiting)


def _received(batch: Batch, event: torch.cuda.Event) -> Batch:
    """`batch`, for which the device's current stream waits."""
    current = torch.cuda.current_stream(batch.inputs.device)
    current.wait_event(event)
    for x in batch[:2]:
        x.record_stream(current)  # its memory is not the side stream's to reuse before this one is done with it
    return batch
