"""Is every kernel as accurate as PyTorch's op?   python -m fastlm_kernels.check [--kernel NAME] [--device D]
And a whole model, patched?                     python -m fastlm_kernels.check --model DIR [--device D]

One table; exit code 0 if everything passes, 1 if not, 2 for bad arguments. The rule is that of accuracy.py: errors are
counted in units of what rounding the inputs may cause, and PyTorch's own op sets the measure. --model is told of in
check_model.py.

On a CPU, TRITON_INTERPRET=1 runs the kernels themselves. Triton 3.6's interpreter fails on loops with run-time bounds
under numpy 2.4 and newer: use an older numpy, or Triton 3.7. Neither version's interpreter multiplies bf16 matrices
rightly, so that this command mends it first (_interpreter.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import _interpreter, _runtime
from ._command import BadInput, Parser, device_argument, run, where
from .accuracy import (
    DTYPES,
    Error,
    compare,
    exact,
    in_units,
    leaves_of,
    outputs_of,
    results,
    upstream_gradients,
)
from .check_model import check_model
from .registry import CALLS, Case, Kernel, case_name

# The rule is imported from here as well.
__all__ = [
    "DTYPES",
    "Error",
    "check_kernel",
    "compare",
    "exact",
    "in_units",
    "leaves_of",
    "main",
    "outputs_of",
    "results",
    "upstream_gradients",
]


def check_kernel(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Error]:
    """The rule, applied to one registry entry on one case."""
    arguments = kernel.inputs(dtype, device, seed, **case)
    upstream = upstream_gradients(kernel.reference, arguments, seed + 1)
    # What asks nobody, a wrapper for one, is held to the rule for kernels.
    asks = getattr(kernel.fused, "_asks", False)
    own_op = asks and _runtime.explain(kernel.fused, **arguments).path == "torch"
    return compare(kernel.fused, kernel.reference, arguments, upstream, own_op=own_op)


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
    return check_model(options.model, device)


if __name__ == "__main__":
    sys.exit(run(main))
