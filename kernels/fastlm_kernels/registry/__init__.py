"""Every kernel, once. Tests, benches, `check`, `aot` and the README's table iterate over `KERNELS`.

Adding a kernel is one file (or folder) and one entry here, in the module of its family: what its calls look like
(`inputs`), the cases that tests, benches and the compiler's report ask for, the bytes and operations that a call cannot
do without. Every case names rows and columns, whatever these are to the family (tokens and classes, positions and head
dimension); all other options have defaults, so that the tests of what holds for every kernel can ask any of them for a
size.
"""

from __future__ import annotations

from . import activation, attention, cross_entropy, linear_cross_entropy, norm, rotary, softmax
from ._kernel import Arguments, Case, Kernel, case_name, generator_of, modules_of, random_tensor

__all__ = [
    "CALLS",
    "KERNELS",
    "Arguments",
    "Case",
    "Kernel",
    "case_name",
    "generator_of",
    "modules_of",
    "random_tensor",
]

KERNELS: tuple[Kernel, ...] = (
    *norm.KERNELS,
    *rotary.KERNELS,
    *activation.KERNELS,
    *softmax.KERNELS,
    *cross_entropy.KERNELS,
    *linear_cross_entropy.KERNELS,
    *attention.KERNELS,
)
# What `check` judges and `aot` compiles: packed documents too, which are attention's kernels under another name.
CALLS: tuple[Kernel, ...] = (*KERNELS, attention.PACKED)
