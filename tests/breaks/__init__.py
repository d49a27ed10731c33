"""The deliberate breaks that `mutations.py` runs, a file a family; what they share."""

from __future__ import annotations

from dataclasses import dataclass

EVERY = "test_every_kernel.py::"
ACCURATE = EVERY + "test_as_accurate_as_pytorch[{}]"
LONG = EVERY + "test_long_rows_walked_in_blocks[float32-{}]"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file` (of the package); `test` must then fail, in the interpreter unless said."""

    name: str
    file: str
    old: str
    new: str
    test: str
    interpret: bool = True
