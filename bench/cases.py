"""What the benches time: the registry's kernels, attention's features and packed documents beside them.

A GPU gets the registry's `large` cases, a CPU its `quick` ones. Attention has an entry a feature at one shape; dropout
is timed without the registry's seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from fastlm_kernels.registry import KERNELS, Arguments, Case, Kernel
from fastlm_kernels.registry.attention import PACKED

_ATTENTION = next(kernel for kernel in KERNELS if kernel.name == "scaled_dot_product_attention")
# Most important first: a run may be stopped at any moment.
_FIRST = (
    "scaled_dot_product_attention",
    "varlen_attn",
    "cross_entropy",
    "linear_cross_entropy",
    "layer_norm",
    "rms_norm",
)


def _attention_inputs(*args: Any, **case: Any) -> Arguments:
    """The registry's, dropout without seeds: PyTorch's operator, whose time is the measure, takes none."""
    return {name: value for name, value in _ATTENTION.inputs(*args, **case).items() if name != "dropout_seed"}


# The registry's shape for features on a GPU, and a small one.
_AT_16K: Case = {"rows": 4096, "columns": 128, "batch": 4, "heads": 16, "kv_heads": 16}
_AT_64: Case = {"rows": 64, "columns": 32, "heads": 4, "kv_heads": 4}
_SMALL_FEATURES: tuple[Case, ...] = (
    {"kv_heads": 2},
    {"window": (15, -1)},
    {"softcap": 30.0},
    {"padded": True, "causal": False},
    {"padded": True},
    {"keys": 96, "align": "bottom_right"},
    {"masked": (0, 1), "causal": False},
    {"lse": True},
    {"rows": 1, "keys": 256, "causal": False},
)
_SMALL_PACKED: tuple[Case, ...] = ({"window": 15}, {"softcap": 30.0}, {"one_pass": True})
TIMED: tuple[Kernel, ...] = (
    *(
        replace(
            kernel,
            inputs=_attention_inputs,
            quick=(*kernel.quick, *(_AT_64 | feature for feature in (*_SMALL_FEATURES, {"dropout": 0.1}))),
            large=(*kernel.large, _AT_16K | {"dropout": 0.1}),
        )
        if kernel is _ATTENTION
        else kernel
        for kernel in KERNELS
    ),
    replace(PACKED, quick=(*PACKED.quick, *(PACKED.quick[0] | feature for feature in _SMALL_PACKED))),
)


def checked(kernel: Kernel) -> Kernel:
    """The kernel on the inputs that the accuracy rule can judge: with seeds, by which the reference drops the same."""
    return replace(kernel, inputs=_ATTENTION.inputs) if kernel.inputs is _attention_inputs else kernel


class Entry(NamedTuple):
    """A kernel, by its place in `TIMED`, and a case of it, hashable."""

    index: int
    case: tuple[tuple[str, Any], ...]

    @property
    def kernel(self) -> Kernel:
        """The kernel itself."""
        return TIMED[self.index]


def entries(gpu: bool) -> Iterator[Entry]:
    """All cases for a GPU, or for a CPU: one of every kernel in turn, the most important kernels and cases first."""

    def rank(index: int) -> int:
        name = TIMED[index].name
        return _FIRST.index(name) if name in _FIRST else len(_FIRST)

    def cases(kernel: Kernel) -> list[Case]:
        found = kernel.large if gpu else kernel.quick
        # Attention's are in order; of the others' the large ones are those of training.
        ordered = kernel.name in _FIRST[:2]
        return list(found) if ordered else sorted(found, key=lambda case: -kernel.traffic(case, torch.bfloat16, False))

    queues = [
        [Entry(index, tuple(case.items())) for case in cases(TIMED[index])]
        for index in sorted(range(len(TIMED)), key=rank)
    ]
    for turn in zip_longest(*queues):
        yield from (entry for entry in turn if entry is not None)
