"""A mend for Triton's interpreter, which keeps bf16 as its bits: it multiplies matrices of those bits, and truncates.

Wanted by whoever runs the kernels there in bf16: `python -m fastlm_kernels.check` and the test suite. Importing this
changes nothing; `mend_bf16` changes Triton's interpreter for the rest of the process.
"""

from __future__ import annotations

from typing import Any

import torch


def mend_bf16() -> None:
    """From here on products are of the numbers, and conversions round to nearest even, as on hardware."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    multiply, cast = builder.create_dot, builder.cast_impl

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle(torch.tensor(x.data).view(torch.bfloat16).float().numpy(), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        return handle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
