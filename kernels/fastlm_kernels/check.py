"""Is every kernel as accurate as PyTorch's op?   python -m fastlm_kernels.check [--kernel NAME] [--device D]
And a whole model, patched?                     python -m fastlm_kernels.check --model DIR [--device D]

One table; exit code 0 if everything passes, 1 if not, 2 for bad arguments. --model is told of in check_model.py.

The rule, for the output and every gradient, in fp32 as in fp16 and bf16. The unit of error of an element is

    u = eps(dtype) |ref|  +  the largest change of ref over 8 draws of a relative eps(dtype) perturbation
                             of every input, the upstream gradient included

with ref computed in fp64: an error of one unit is what rounding the inputs alone may cause. A result passes if

    max(err / u) <= 2 max(err of PyTorch / u) + 4      and      rms(err / u) <= 2 rms(err of PyTorch / u) + 1

with PyTorch's op on the same device and inputs as the baseline, but where it is off by more than 1e7 units (no digit of
an fp32 result is right): such elements are compared with PyTorch's own, one by one. Where u is 0 the error must be 0,
whatever PyTorch's is. Both sides are judged per element, so that a gradient's small elements count as much as its large
ones; of fewer than 8 elements the largest error alone.

On a CPU, TRITON_INTERPRET=1 runs the kernels themselves. Triton 3.6's interpreter fails on loops with run-time bounds
under numpy 2.4 and newer: use an older numpy, or Triton 3.7. Neither version's interpreter multiplies bf16 matrices
rightly, so that this command mends it first (_interpreter.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _interpreter, _runtime
from ._command import BadInput, Parser, device_argument, run
from .registry import CALLS, Arguments, Case, Kernel, case_name, generator_of, random_tensor

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


def _largest_and_rms(units: Tensor) -> tuple[float, float]:
    if units.numel() == 0:
        return 0.0, 0.0
    return units.max().item(), units.square().mean().sqrt().item()


def compare(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments,
    upstream: tuple[Tensor, ...],
) -> list[Error]:
    """The rule, applied to every output and gradient of `fused(*arguments)`."""
    truth, change = exact(reference, arguments, upstream)
    ours = results(fused, arguments, upstream)
    theirs = results(reference, arguments, upstream)
    errors = []
    for name, result in ours.items():
        mine = in_units(result, truth[name], change[name])
        base = in_units(theirs[name], truth[name], change[name])
        # There the two are compared element by element.
        noise = base.isfinite() & (base > _BASELINE_LIMIT)
        worst, rms = _largest_and_rms(mine.masked_fill(noise & (mine <= 2 * base + 4), 0.0))
        base_worst, base_rms = _largest_and_rms(base.masked_fill(base > _BASELINE_LIMIT, 0.0))
        worst_allowed, rms_allowed = 2 * base_worst + 4, 2 * base_rms + 1
        # The mean of a few says no more than the largest.
        few = result.numel() < _FEWEST_FOR_A_MEAN
        errors.append(Error(name, worst, worst_allowed, rms, worst_allowed if few else rms_allowed))
    return errors


def check_kernel(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Error]:
    """The rule, applied to one registry entry on one case."""
    arguments = kernel.inputs(dtype, device, seed, **case)
    upstream = upstream_gradients(kernel.reference, arguments, seed + 1)
    return compare(kernel.fused, kernel.reference, arguments, upstream)


def _rows(names: list[str] | None, device: torch.device) -> Iterator[tuple[bool, str]]:
    for kernel in CALLS:
        if names and kernel.name not in names:
            continue
        for dtype in DTYPES:
            for case in kernel.small:
                yield _row(kernel, case, dtype, device)


def _columns(kernel: str, dtype: str, case: str) -> str:
    """The first three columns, as wide as the registry's longest entries."""
    names, cases = (k.name for k in CALLS), (case_name(c) for k in CALLS for c in k.small)
    return f"{kernel:{max(map(len, names)) + 2}}{dtype:10}{case:{max(map(len, cases)) + 2}}"


def _row(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    errors = check_kernel(kernel, case, dtype, device)
    path = _runtime.explain(kernel.fused, **kernel.inputs(dtype, device, 0, **case)).path
    worst = max(errors, key=lambda e: (not e.ok, e.worst / e.worst_allowed))
    ok = all(e.ok for e in errors)
    label = f"{_columns(kernel.name, str(dtype).removeprefix('torch.'), case_name(case))}{path:8}"
    numbers = f"{worst.worst:9.2f}{worst.worst_allowed:9.2f}{worst.rms:9.3f}{worst.rms_allowed:9.3f}"
    return ok, f"{label}{worst.quantity:26}{numbers}  {'ok' if ok else 'FAIL'}"


def where(device: torch.device) -> str:
    """Where the kernels run on `device`, for a table's first line."""
    if device.type == "cuda":
        return f"on {torch.cuda.get_device_name(device)}"
    if _runtime.INTERPRETED:
        return "in Triton's interpreter on the CPU"
    return f"on the {device.type.upper()}: PyTorch's own path (set TRITON_INTERPRET=1 to run the kernels)"


def _check_kernels(names: list[str] | None, device: torch.device) -> int:
    """Print the table of kernels; 0 if every one passes, 1 if not."""
    known = [kernel.name for kernel in CALLS]
    for name in names or []:
        if name not in known:
            raise BadInput("--kernel", name, f"give one of {', '.join(known)}")
    sys.stdout.write(f"fastlm_kernels {where(device)}; errors in units, the worst result of each case\n")
    header = f"{_columns('kernel', 'dtype', 'case')}{'path':8}{'worst result':26}"
    sys.stdout.write(f"{header}{'max':>9}{'allowed':>9}{'rms':>9}{'allowed':>9}\n")
    failures = count = 0
    for ok, line in _rows(names, device):
        sys.stdout.write(f"{line}\n")
        count, failures = count + 1, failures + (not ok)
    sys.stdout.write(f"{count - failures} of {count} pass\n")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the kernels, or a patched model; the exit code."""
    parser = Parser(f"{__package__}.check", __doc__)
    parser.add_argument("--kernel", action="append", metavar="NAME", help="one kernel (may be repeated)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model to patch and compare")
    parser.add_argument("--device", metavar="D", help="cuda where there is a GPU, else cpu")
    options = parser.parse_args(argv)
    device = device_argument(options.device)
    if _runtime.INTERPRETED:
        _interpreter.mend_bf16()
    if options.model is None:
        return _check_kernels(options.kernel, device)
    if options.kernel:
        raise BadInput("--kernel", options.kernel[0], "leave it out with --model, which checks a whole model")
    from .check_model import check_model

    return check_model(options.model, device)


if __name__ == "__main__":
    sys.exit(run(main))
