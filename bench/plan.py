"""What a full run does in which order, and what time it keeps for what comes later.   Pure arithmetic on items.

Each item belongs to a call: the first brings a figure for everything that one GPU has to prove, in short form, the
second and later ones deepen it. Within a call the parts go in the order of `PARTS`. While the first call's items are
done, time is kept for those behind: an early one that takes longer than it should uses up what is over, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# The most important first.
PARTS = (
    "check",
    "attention",
    "train_124m",
    "cross_entropy",
    "norms",
    "adamw",
    "train_larger",
    "time_to_loss",
    "hugging_face",
)
SIDE_BY_SIDE = ("check",)  # mostly compiling: nothing is timed
START_SECONDS = 15.0  # until a worker's first words, beside others that start too
TOLERANCE = 1.25  # of what an item needs: a little longer, and it is let finish
FIRST, LATE = 1, 99  # calls: the one whose time is kept, and the turn of what failed before


class Item(NamedTuple):
    """A piece of work: worth starting with `needs` seconds left, killed after `limit` (None: when its time is up)."""

    name: str
    needs: float
    limit: float | None
    call: int = FIRST


class Stage(NamedTuple):
    """One part's items of one call."""

    part: str
    call: int
    items: list[Item]

    def seconds(self, workers: int) -> float:
        """What all of it should take."""
        alone = sum(item.needs for item in self.items)
        if self.part not in SIDE_BY_SIDE or len(self.items) < 2:
            return alone
        at_work = min(workers, len(self.items))
        # The last item of one worker begins while the others may have nothing left.
        return alone / at_work + (START_SECONDS if at_work > 1 else 0) + max(item.needs for item in self.items)


def stages(plan: Mapping[str, Sequence[Item]], parts: Sequence[str], late: Callable[[str], bool]) -> list[Stage]:
    """All of `plan`, in the order in which it is to be done; an item that is `late` comes behind everything else."""
    found: dict[tuple[int, int], Stage] = {}
    for at, part in enumerate(parts):
        for item in plan.get(part, ()):
            call = LATE if late(item.name) else item.call
            found.setdefault((call, at), Stage(part, call, [])).items.append(item)
    return [found[key] for key in sorted(found)]


def kept(stage: Stage, later: Sequence[Stage], left: float, workers: int, *, starts: bool = False) -> float:
    """Seconds of `left` that `stage` must leave for later ones: each of the first call that fits whole, in order.

    `starts`: no worker is there, and `stage` has to wait for one.
    """
    free = left - stage.seconds(workers) - (START_SECONDS if starts else 0)
    return reserved((other.seconds(workers) for other in later if other.call == FIRST), free)


def reserved(needs: Iterable[float], free: float) -> float:
    """Of `free` seconds what is kept for those who come later: each that fits whole, in order.

    And a worker's start, as who has to be stopped to make room leaves none.
    """
    promised = 0.0
    for seconds in needs:
        promised += seconds if seconds <= free - promised else 0.0
    return min(promised + START_SECONDS, free) if promised else 0.0
