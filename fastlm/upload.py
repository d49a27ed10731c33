"""Batches on their way to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastlm.data import Batch

AHEAD = 4  # updates that the host may have queued beyond the one that the device is at


def uploaded(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, each copied there by a stream of its own while the update before it computes.

    `batches` are in pinned memory. On a CPU they are passed on as they are. The host, which waits for nothing between
    log steps, waits here once it is `AHEAD` updates ahead: every update that is queued keeps its batch on the device.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, Any] | None = None  # with the event that its copies are over
    queued: deque[Any] = deque()  # the ends of the updates handed out
    for batch in batches:
        with torch.cuda.stream(stream):
            inputs, targets = (x.to(device, non_blocking=True) for x in batch[:2])
            following = Batch(inputs, targets, batch.first_sample), stream.record_event()
        if waiting is not None:
            yield _received(*waiting)
            queued.append(torch.cuda.current_stream(device).record_event())
        if len(queued) > AHEAD:
            queued.popleft().synchronize()
        waiting = following
    if waiting is not None:
        yield _received(*waiting)


def _received(batch: Batch, event: Any) -> Batch:
    """`batch`, for which the device's current stream waits."""
    current = torch.cuda.current_stream(batch.inputs.device)
    current.wait_event(event)
    for x in batch[:2]:
        x.record_stream(current)  # its memory is not the side stream's to reuse before this one is done with it
    return batch
