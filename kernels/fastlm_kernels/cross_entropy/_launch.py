"""What the launchers share: the options of a loss, and arguments and switches as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import configs
from .._rows import accumulator

# Numbers a row, fp32: loss (z included), z, lse, what rounding took from lse, weight in the denominator.
ROW_VALUES = 5
LSE = slice(2, 4)


@dataclass(frozen=True)
class Options:
    """What the kernels of one loss agree on; see the package's text."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def scalars(self, classes: int) -> tuple[int | float, ...]:
        """ignore_index, what label smoothing leaves to the target and gives to each class, z_loss, softcap."""
        e = self.label_smoothing
        return self.ignore_index, 1.0 - e, e / classes, self.z_loss, self.softcap or 1.0


def inputs_of(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, T, W, WEIGHT_SUM."""
    if weight is None:
        return logits, target, unused, unused
    # One small launch, for the one combination that needs the sum.
    total = weight.sum(dtype=unused.dtype) if options.label_smoothing else unused
    return logits, target, weight.contiguous(), total


def switches_of(weight: Tensor | None, options: Options, upstream: Tensor | None, logits: Tensor) -> dict[str, Any]:
    return {
        "HAS_WEIGHT": weight is not None,
        "HAS_SMOOTHING": options.label_smoothing != 0.0,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_UPSTREAM": upstream is not None,
        "ACC": accumulator(logits.dtype)[1],
    }


def registers_for(options: Options) -> int | None:
    return configs.CROSS_ENTROPY_REGISTERS if options.softcap is not None or options.label_smoothing else None


def row_stride(upstream: Tensor | None) -> int:
    return 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
