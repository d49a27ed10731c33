"""The rule of accuracy: is a result as near the exact one as PyTorch's own op is?

It holds for the output and every gradient, in fp32 as in fp16 and bf16. The unit of error of an element is

    u = eps(dtype) |ref|  +  the largest change of ref over 8 draws of a relative eps(dtype) perturbation
                             of every input, the upstream gradient included

with ref computed in fp64: an error of one unit is what rounding the inputs alone may cause. A result passes if

    max(err / u) <= 2 max(err of PyTorch / u) + 4      and      rms(err / u) <= 2 rms(err of PyTorch / u) + 1

with PyTorch's op on the same device and inputs as the baseline, but where it is off by more than 1e7 units (no digit of
an fp32 result is right): such elements are compared with PyTorch's own, one by one. Where u is 0 the error must be 0,
whatever PyTorch's is; but of a call that takes PyTorch's own op, which is the baseline itself, it may be PyTorch's.
Both sides are judged per element, so that a gradient's small elements count as much as its large ones; of fewer than 8
elements the largest error alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .registry import Arguments, generator_of, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DRAWS = 8
# Where PyTorch is off by more units than this (a causal query with one key, whose score gradient is 0 and comes out as
# noise), it is no measure: its error would allow any other anywhere.
_BASELINE_LIMIT = 1e7
_FEWEST_FOR_A_MEAN = 8


@dataclass(frozen=True)
class Error:
    """The error of one result (an output or a gradient) in units, beside what the rule allows."""

    quantity: str
    worst: float
    worst_allowed: float
    rms: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        """Whether both the largest and the mean error are finite and within the rule; NaN never is."""
        return self.worst <= self.worst_allowed and self.rms <= self.rms_allowed and math.isfinite(self.worst)


def results(
    fn: Callable[..., Any], arguments: Arguments, upstream: tuple[Tensor, ...] | None = None
) -> dict[str, Tensor]:
    """fn's outputs ("output 0", ...) and, given `upstream`, the gradients of its arguments by parameter name."""
    outputs = outputs_of(fn, arguments)
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    leaves = leaves_of(arguments)
    if upstream is not None and leaves:
        # With some arguments frozen, an output that depends on these alone wants no gradient.
        pairs = [(output, dy) for output, dy in zip(outputs, upstream, strict=True) if output.requires_grad]
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs])
        found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def outputs_of(fn: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
    """fn's outputs, one or several, as a tuple."""
    outputs = fn(**arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves_of(arguments: Arguments) -> dict[str, Tensor]:
    """The arguments that want a gradient, by parameter name."""
    return {name: a for name, a in arguments.items() if isinstance(a, Tensor) and a.requires_grad}


def upstream_gradients(fn: Callable[..., Any], arguments: Arguments, seed: int | torch.Generator) -> tuple[Tensor, ...]:
    """A random upstream gradient for each output of fn, of its shape, dtype and device."""
    generator = generator_of(seed)
    with torch.no_grad():
        outputs = outputs_of(fn, arguments)
    return tuple(random_tensor(tuple(o.shape), o.dtype, o.device, generator).detach() for o in outputs)


def _map(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {
        name: change(a.detach()).requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for name, a in arguments.items()
    }


def exact(
    reference: Callable[..., Any], arguments: Arguments, upstream: tuple[Tensor, ...], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fp64 results and each one's change under input rounding (the second term of u), elementwise."""
    truth = results(reference, _map(arguments, Tensor.double), tuple(u.double() for u in upstream))
    change = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    # Drawn where they are used: a head of a large vocabulary takes a CPU seconds a draw.
    device = next(tensor.device for tensor in truth.values())
    generator = torch.Generator(device).manual_seed(seed)

    def nudge(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64, device=device) * 2 - 1
        return tensor.double() * (1 + torch.finfo(tensor.dtype).eps * signs)

    for _ in range(_DRAWS):
        moved = results(reference, _map(arguments, nudge), tuple(nudge(u) for u in upstream))
        for name, tensor in moved.items():
            change[name] = torch.maximum(change[name], (tensor - truth[name]).abs())
    return truth, change


def in_units(result: Tensor, truth: Tensor, change: Tensor) -> Tensor:
    """|result - truth| / u, elementwise; where u is 0: 0 for an exact result, infinity for any other."""
    # Equal infinities are exact: their difference is NaN.
    error = torch.where(result == truth, 0.0, (result.double() - truth).abs())
    unit = torch.finfo(result.dtype).eps * truth.abs() + change
    return torch.where(unit > 0, error / unit, torch.where(error == 0, 0.0, torch.inf))


def _excused(units: Tensor, error: Tensor, baseline: Tensor) -> Tensor:
    """`units` without those elements that allow no error, and where the baseline errs as far."""
    return units.masked_fill(units.isposinf() & (error <= baseline), 0.0)


def _largest_and_rms(units: Tensor) -> tuple[float, float]:
    if units.numel() == 0:
        return 0.0, 0.0
    return units.max().item(), units.square().mean().sqrt().item()


def compare(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments,
    upstream: tuple[Tensor, ...],
    *,
    own_op: bool = False,
) -> list[Error]:
    """The rule, applied to every output and gradient of `fused(*arguments)`; own_op: it takes PyTorch's own op."""
    truth, change = exact(reference, arguments, upstream)
    ours = results(fused, arguments, upstream)
    theirs = results(reference, arguments, upstream)
    errors = []
    for name, result in ours.items():
        mine = in_units(result, truth[name], change[name])
        base = in_units(theirs[name], truth[name], change[name])
        if own_op:
            mine = _excused(mine, *((found - truth[name]).abs() for found in (result.double(), theirs[name].double())))
        # There the two are compared element by element.
        noise = base.isfinite() & (base > _BASELINE_LIMIT)
        worst, rms = _largest_and_rms(mine.masked_fill(noise & (mine <= 2 * base + 4), 0.0))
        base_worst, base_rms = _largest_and_rms(base.masked_fill(base > _BASELINE_LIMIT, 0.0))
        worst_allowed, rms_allowed = 2 * base_worst + 4, 2 * base_rms + 1
        # The mean of a few says no more than the largest.
        few = result.numel() < _FEWEST_FOR_A_MEAN
        errors.append(Error(name, worst, worst_allowed, rms, worst_allowed if few else rms_allowed))
    return errors
