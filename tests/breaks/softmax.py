"""Breaks of softmax.py."""

from __future__ import annotations

from breaks import ACCURATE, EVERY, LONG, Mutation

MUTATIONS = (
    # softmax_forward_kernel
    Mutation(
        "softmax without its maximum",
        "softmax.py",
        "maximum = tl.where(row_ok, tl.max(x, axis=1), 0.0)",
        "maximum = tl.where(row_ok, 0.0, 0.0)",
        "test_softmax.py::test_extreme_values_are_pytorchs[preferred-torch.float32-5-softmax]",
    ),
    Mutation(
        "softmax: padding columns in the sum",
        "softmax.py",
        'other=-float("inf")).to(ACC)\n        # Rows past',
        "other=0.0).to(ACC)\n        # Rows past",
        ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: sum kept where the maximum moves",
        "softmax.py",
        "sums * step + 1.0",
        "sums + 1.0",
        LONG.format("softmax"),
    ),
    Mutation(
        "softmax: lanes added whatever their maxima",
        "softmax.py",
        "tl.sum(sums * tl.exp(top - maximum[:, None]), axis=1)",
        "tl.sum(sums, axis=1)",
        LONG.format("log_softmax"),
    ),
    Mutation(
        "softmax: lanes of nothing but -inf give NaN",
        "softmax.py",
        "-3.4028234663852886e38",
        '-float("inf")',
        "test_softmax.py::test_extreme_values_are_pytorchs[preferred-torch.float32-blocks-softmax]",
    ),
    Mutation(
        "log_softmax: the logarithm added to the maximum first",
        "softmax.py",
        "y = shifted - tl.log(total)[:, None]",
        "y = x - (maximum + tl.log(total))[:, None]",
        "test_softmax.py::test_a_large_maximum_costs_no_digits[preferred-5]",
    ),
    Mutation(
        "softmax rows in int32",
        "softmax.py",
        "elements.\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "elements.\n    rows = tl.program_id(0) * BLOCK_M",
        EVERY + "test_rows_past_two_to_the_31_elements[softmax]",
    ),
    Mutation(
        "softmax's result dtype blind to autocast",
        "softmax.py",
        "return torch.float32 if _runtime.autocast_to_fp32(input) else input.dtype",
        "return input.dtype",
        "test_softmax.py::test_a_wider_result[preferred-True-torch.float16-softmax]",
    ),
    # softmax_backward_kernel
    Mutation(
        "softmax: dx without the row's sum",
        "softmax.py",
        "dx = y * (dy - total[:, None])",
        "dx = y * dy",
        ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "log_softmax: dx without the row's sum",
        "softmax.py",
        "dx = dy - tl.exp(y) * total[:, None]",
        "dx = dy",
        ACCURATE.format("log_softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: the sum of dy for that of dy y",
        "softmax.py",
        "total = tl.sum(dy if IS_LOG else dy * y, axis=1)",
        "total = tl.sum(dy, axis=1)",
        ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: long rows: only the last block's sum",
        "softmax.py",
        "sums += dy if IS_LOG else dy * y",
        "sums = dy if IS_LOG else dy * y",
        LONG.format("softmax"),
    ),
    Mutation(
        "softmax: lazy negation of the upstream gradient ignored",
        "softmax.py",
        "(dy.resolve_neg(), y)",
        "(dy, y)",
        EVERY + "test_negated_upstream_gradient[softmax]",
    ),
    Mutation(
        "softmax: long rows: dx without the row's sum",
        "softmax.py",
        "total = tl.sum(sums, axis=1)\n        for",
        "total = tl.sum(sums, axis=1) * 0.0\n        for",
        LONG.format("softmax"),
    ),
    Mutation(
        "softmax: a symbolic dim in a message",
        "softmax.py",
        'return "dim is not the last dimension"',
        'return f"dim={dim} is not the last dimension"',
        "test_softmax.py::test_any_dimension_compiles[torch-softmax]",
    ),
)
