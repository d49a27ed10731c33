"""What a trainer needs of these optimizers' states: to know their size, to cut them, to put them back.

MASTER        the key of a 16-bit parameter's fp32 master
by_block      which of the keys hold one number for each block of elements, in memory order, and not one for each
blocks_of     how many such numbers
adam_bytes    what both of Adam's averages take
fit           after writing to `optimizer.state` by hand: averages in the width that this optimizer keeps
"""

from __future__ import annotations

from ._eight_bits import BLOCK, LOWS, blocks_of
from ._options import fit_states as fit
from ._plan import MASTER

__all__ = ["MASTER", "adam_bytes", "blocks_of", "by_block", "fit"]


def by_block(key: str) -> bool:
    """Whether the state under `key` has an element for each block of the parameter's: 8-bit averages' exponents."""
    return key in LOWS


def adam_bytes(state_bits: int) -> float:
    """Bytes of both averages of one element, as if no parameter were too small for averages of 8 bits."""
    return 2 * (1 + 1 / BLOCK) if state_bits == 8 else 2 * 4
