"""Deliberate breaks, each with the test that must notice it.

    python tests/mutations.py [NAME ...]

A mutation replaces one piece of a kernel package's text. It is applied to a copy of the package, never in place, and
its test is run on the copy. A mutation that survives, whose text no longer occurs exactly once, or whose test cannot be
found is a defect of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "fastlm_kernels"
_EVERY = "test_every_kernel.py::"
_ACCURATE = _EVERY + "test_as_accurate_as_pytorch[{}]"
_LONG = _EVERY + "test_long_rows_walked_in_blocks[float32-{}]"
_LINEAR = "test_linear_cross_entropy.py::"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file` (of the package); `test` must then fail, in the interpreter unless said."""

    name: str
    file: str
    old: str
    new: str
    test: str
    interpret: bool = True


MUTATIONS = (
    # norm.py: around the kernels
    Mutation(
        "norms: a number that varies cannot be compiled",
        "norm.py",
        "-math.inf < weight_offset < math.inf",
        "math.isfinite(weight_offset)",
        "test_norm.py::test_numbers_that_vary_from_call_to_call_compile[preferred]",
    ),
    Mutation(
        "norms: h wants a gradient where the weight alone does",
        "norm.py",
        "residual is not None and any(ctx.needs_input_grad[:2])",
        "residual is not None",
        _EVERY + "test_outputs_require_a_gradient_where_pytorchs_do[eager-add_rms_norm]",
    ),
    # norm_forward_kernel
    Mutation(
        "residual sum not rounded before the statistics",
        "norm.py",
        "        x = x.to(H.dtype.element_ty).to(ACC)\n",
        "",
        "test_norm.py::test_residual_sum_is_rounded_once_and_normalised_as_stored",
    ),
    Mutation(
        "forward without eps",
        "norm.py",
        "tl.sum(x * x, axis=1) / N + eps, 1.0",
        "tl.sum(x * x, axis=1) / N, 1.0",
        _ACCURATE.format("rms_norm-rows6-columns130-eps0.1-float32"),
    ),
    Mutation(
        "long rows without eps",
        "norm.py",
        "squares / N + eps, 1.0",
        "squares / N, 1.0",
        _LONG.format("rms_norm"),
    ),
    Mutation(
        "padding columns in the variance",
        "norm.py",
        "x = tl.where(mask, x - mean[:, None], 0.0)",
        "x = x - mean[:, None]",
        _ACCURATE.format("layer_norm-rows3-columns5-float32"),
    ),
    Mutation(
        "variance of blocks merged without their means",
        "norm.py",
        "squares += step * step * start * width / (start + width)",
        "squares += 0.0",
        _LONG.format("layer_norm"),
    ),
    Mutation(
        "weight offset left out of the forward",
        "norm.py",
        "w = tl.load(W + cols, mask=col_ok, other=0.0).to(ACC) + weight_offset",
        "w = tl.load(W + cols, mask=col_ok, other=0.0).to(ACC)",
        "test_norm.py::test_weight_offset_is_added_before_rounding",
    ),
    Mutation(
        "bias left out",
        "norm.py",
        "y += tl.load(B + cols, mask=col_ok, other=0.0).to(ACC)[None, :]",
        "y += 0.0",
        _ACCURATE.format("add_layer_norm-rows3-columns5-float16"),
    ),
    Mutation(
        "input read without a mask",
        "norm.py",
        "x = tl.load(X + x_at, mask=mask, other=0.0).to(ACC)\n    if HAS_RESIDUAL",
        "x = tl.load(X + x_at).to(ACC)\n    if HAS_RESIDUAL",
        _EVERY + "test_any_strides_and_offsets[moat-rms_norm-whole]",
    ),
    Mutation(
        "forward rows in int32",
        "norm.py",
        "rows = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "rows = tl.program_id(0) * BLOCK_M",
        _EVERY + "test_rows_past_two_to_the_31_elements[rms_norm]",
    ),
    # norm_backward_kernel
    Mutation(
        "dx without mean(g x^)",
        "norm.py",
        "dx = g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None]",
        "dx = g",
        _ACCURATE.format("rms_norm-rows3-columns5-bfloat16"),
    ),
    Mutation(
        "dx without mean(g)",
        "norm.py",
        "dx -= (tl.sum(g, axis=1) / N)[:, None]",
        "dx -= 0.0",
        _ACCURATE.format("layer_norm-rows5-columns768-float16"),
    ),
    Mutation(
        "long rows: only the last block's sum",
        "norm.py",
        "sum_gx += tl.sum(g * xhat, axis=1)",
        "sum_gx = tl.sum(g * xhat, axis=1)",
        _LONG.format("rms_norm"),
    ),
    Mutation(
        "long rows: dx without mean(g)",
        "norm.py",
        " - (sum_g / N)[:, None]) * rstd",
        ") * rstd",
        _LONG.format("add_layer_norm"),
    ),
    Mutation(
        "gradient of h forgotten",
        "norm.py",
        "dx += tl.load(DH + h_at, mask=mask, other=0.0).to(ACC)",
        "dx += 0.0",
        _ACCURATE.format("add_rms_norm-rows3-columns5-float32"),
    ),
    Mutation(
        "weight offset left out of the backward",
        "norm.py",
        "w = tl.load(W + cols, mask=cols < N, other=0.0).to(ACC) + weight_offset\n    return",
        "w = tl.load(W + cols, mask=cols < N, other=0.0).to(ACC)\n    return",
        "test_norm.py::test_weight_offset_gradients_are_accurate",
    ),
    Mutation(
        "dw without x^",
        "norm.py",
        "dw += dy * xhat",
        "dw += dy",
        _ACCURATE.format("rms_norm-rows9-columns100-float32"),
    ),
    Mutation(
        "only the first tile of each program",
        "norm.py",
        "    for step in tl.range(0, steps, num_stages=STAGES):\n        tile =",
        "    for step in range(1):\n        tile =",
        _ACCURATE.format("rms_norm-rows11-columns2048-float32"),
    ),
    Mutation(
        "backward rows in int32",
        "norm.py",
        "tile = (step * tl.num_programs(0) + program).to(tl.int64)",
        "tile = step * tl.num_programs(0) + program",
        _EVERY + "test_rows_past_two_to_the_31_elements[rms_norm]",
    ),
    # norm_weight_gradient_kernel
    Mutation(
        "long rows: dw without rstd",
        "norm.py",
        "dw += dy * x * tl.load(STATS + rows, mask=row_ok, other=0.0)[:, None]",
        "dw += dy * x",
        _LONG.format("rms_norm"),
    ),
    Mutation(
        "long rows: dw without the mean",
        "norm.py",
        "x -= tl.load(STATS + M + rows, mask=row_ok, other=0.0)[:, None]",
        "x -= 0.0",
        _LONG.format("layer_norm"),
    ),
    Mutation(
        "long rows: only the first tile of each group",
        "norm.py",
        "    for step in range(steps):\n        rows = (step",
        "    for step in range(1):\n        rows = (step",
        _LONG.format("layer_norm"),
    ),
    # sum_partials_kernel
    Mutation(
        "only the last partial sums",
        "_rows.py",
        "total += tl.load(PARTIAL",
        "total = tl.load(PARTIAL",
        _LONG.format("rms_norm"),
    ),
    Mutation(
        "partial sums past the last",
        "_rows.py",
        "mask = (rows < P)[:, None] & (cols < N)[None, :]",
        "mask = (rows >= 0)[:, None] & (cols < N)[None, :]",
        _ACCURATE.format("rms_norm-rows3-columns5-float32"),
    ),
    Mutation(
        "columns of the total in the wrong strip",
        "_rows.py",
        "cols = strip * BLOCK_N + tl.arange(0, BLOCK_N)\n    total",
        "cols = tl.arange(0, BLOCK_N)\n    total",
        _ACCURATE.format("rms_norm-rows9-columns100-float32"),
    ),
    Mutation(
        "the first sum twice",
        "_rows.py",
        "PARTIAL, TOTAL, P, strip = SECOND_PARTIAL,",
        "PARTIAL, TOTAL, P, strip = PARTIAL,",
        _ACCURATE.format("layer_norm-rows9-columns100-float32"),
    ),
    # launchers and autograd
    Mutation(
        "columns taken for adjacent",
        "_rows.py",
        "return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()",
        "return rows",
        _EVERY + "test_any_strides_and_offsets[strided-add_rms_norm-whole]",
    ),
    Mutation(
        "lazy negation of the upstream gradient ignored",
        "norm.py",
        "as_rows(dy.resolve_neg(), columns)",
        "as_rows(dy, columns)",
        _EVERY + "test_negated_upstream_gradient[rms_norm]",
    ),
    Mutation(
        "one gradient dtype for input and residual",
        "norm.py",
        "(dr if two_dtypes else dx) if need_r else None",
        "dx if need_r else None",
        _ACCURATE.format("add_rms_norm-rows6-columns130-mixed-bfloat16"),
    ),
    Mutation(
        "h's gradient lost when y is unused",
        "norm.py",
        "return (dx, dh if need_r else None, None, None, *rest)",
        "return (dx, None, None, None, *rest)",
        _EVERY + "test_one_output_used_alone[add_rms_norm]",
    ),
    Mutation(
        "result dtype blind to autocast",
        "norm.py",
        "return torch.float32 if _runtime.autocast_to_fp32(input) else input.dtype",
        "return input.dtype",
        "test_capture.py::test_autocast_gives_pytorchs_dtype",
    ),
    # activation.py: unary kernels
    Mutation(
        "activations: only the first strip of columns",
        "activation.py",
        "first_col = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_N",
        "first_col = (tl.program_id(0) % strips).to(tl.int64) * 0",
        _ACCURATE.format("silu-rows11-columns1023-float32"),
    ),
    Mutation(
        "gelu's tanh form without its cubic term",
        "activation.py",
        "x * (1.0 + 0.044715 * x * x)\n        #",
        "x\n        #",
        _ACCURATE.format("gelu-rows6-columns130-approximatetanh-float16"),
    ),
    Mutation(
        "relu_squared without the square",
        "activation.py",
        "value = positive * positive",
        "value = positive",
        _ACCURATE.format("relu_squared-rows3-columns5-float32"),
    ),
    Mutation(
        "tanh's gradient from its input, which is not saved",
        "activation.py",
        '_FROM_OUTPUT = ("sigmoid", "tanh")',
        '_FROM_OUTPUT = ("sigmoid",)',
        _ACCURATE.format("tanh-rows3-columns5-float32"),
    ),
    Mutation(
        "gelu's slope without the density",
        "activation.py",
        "slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))",
        "slope = cdf",
        _ACCURATE.format("gelu-rows11-columns1023-bfloat16"),
    ),
    Mutation(
        "slope of gelu's tanh form without the inner one's cubic term",
        "activation.py",
        "(1.0 + 0.134145 * x * x)",
        "1.0",
        _ACCURATE.format("gelu-rows6-columns130-approximatetanh-float16"),
    ),
    Mutation(
        "silu's slope without its second term",
        "activation.py",
        "slope = s * (1.0 + x * (1.0 - s))",
        "slope = s",
        _ACCURATE.format("silu-rows3-columns5-float32"),
    ),
    Mutation(
        "an infinite gradient passes the threshold",
        "activation.py",
        "dx = tl.where(saved <= 0.0, 0.0, dx)",
        "dx = dx + 0.0",
        "test_activation.py::test_extreme_values_are_pytorchs[relu_squared-torch.float32]",
    ),
    Mutation(
        "sigmoid's slope without 1 - y",
        "activation.py",
        "dx = dy * (saved * (1.0 - saved))",
        "dx = dy * saved",
        _ACCURATE.format("sigmoid-rows3-columns5-float32"),
    ),
    Mutation(
        "unary: lazy negation of the upstream gradient ignored",
        "activation.py",
        "(dy.resolve_neg(), saved)",
        "(dy, saved)",
        _EVERY + "test_negated_upstream_gradient[silu]",
    ),
    Mutation(
        "unary forward: the output's rows for the input's",
        "activation.py",
        "x_at = X + (rows * stride_x + first_col) + cols",
        "x_at = X + (rows * stride_y + first_col) + cols",
        _EVERY + "test_any_strides_and_offsets[padded-silu-whole]",
    ),
    Mutation(
        "unary forward: all strips of columns written to the first",
        "activation.py",
        "y_at = Y + (rows * stride_y + first_col) + cols\n    if whole:\n        _unary",
        "y_at = Y + rows * stride_y + cols\n    if whole:\n        _unary",
        _ACCURATE.format("silu-rows11-columns1023-float32"),
    ),
    Mutation(
        "unary forward: whole tiles written over the input",
        "activation.py",
        "_unary_forward_tile(x_at, y_at, mask, True",
        "_unary_forward_tile(x_at, x_at, mask, True",
        _ACCURATE.format("silu-rows11-columns1023-float32"),
    ),
    Mutation(
        "unary backward: the gradient's rows for what was saved",
        "activation.py",
        "s_at = S + (rows * stride_s + first_col) + cols",
        "s_at = S + (rows * stride_dx + first_col) + cols",
        _EVERY + "test_any_strides_and_offsets[padded-silu-whole]",
    ),
    Mutation(
        "unary backward: upstream's rows taken for dense",
        "activation.py",
        "dy_at = DY + (rows * stride_dy + first_col) + cols\n    s_at",
        "dy_at = DY + (rows * stride_dx + first_col) + cols\n    s_at",
        _EVERY + "test_upstream_gradient_of_any_stride[padded-silu]",
    ),
    Mutation(
        "unary backward: all strips of columns written to the first",
        "activation.py",
        "dx_at = DX + (rows * stride_dx + first_col) + cols",
        "dx_at = DX + rows * stride_dx + cols",
        _ACCURATE.format("silu-rows11-columns1023-float32"),
    ),
    # activation.py: gated kernels
    Mutation(
        "gated: a sum for the product",
        "activation.py",
        "value * _load(u_at, mask, WHOLE, ACC), mask, WHOLE)",
        "value + _load(u_at, mask, WHOLE, ACC), mask, WHOLE)",
        _ACCURATE.format("swiglu-rows3-columns5-float32"),
    ),
    Mutation(
        "gated forward: the output's rows for up's",
        "activation.py",
        "u_at = U + (rows * stride_u + first_col) + cols\n    y_at",
        "u_at = U + (rows * stride_y + first_col) + cols\n    y_at",
        _ACCURATE.format("geglu-rows9-columns96-halves-float32"),
    ),
    Mutation(
        "gated forward: rounded to 16 bits before the product",
        "activation.py",
        "_store(y_at, value * _load",
        "_store(y_at, value.to(y_at.dtype.element_ty).to(ACC) * _load",
        "test_activation.py::test_kernels_round_once[swiglu]",
    ),
    Mutation(
        "gated backward: dg without u",
        "activation.py",
        "dy * _load(u_at, mask, WHOLE, ACC) * slope",
        "dy * slope",
        _ACCURATE.format("swiglu-rows3-columns5-float32"),
    ),
    Mutation(
        "gated backward: the slope in du",
        "activation.py",
        "_store(du_at, dy * value",
        "_store(du_at, dy * slope",
        _ACCURATE.format("swiglu-rows3-columns5-float32"),
    ),
    Mutation(
        "gated backward: gradients exchanged",
        "activation.py",
        "inputs, (dg, du), FUNCTION",
        "inputs, (du, dg), FUNCTION",
        _ACCURATE.format("geglu-rows3-columns5-float32"),
    ),
    Mutation(
        "gated backward: gate's rows for up's",
        "activation.py",
        "u_at = U + (rows * stride_u + first_col) + cols\n    dg_at",
        "u_at = U + (rows * stride_dg + first_col) + cols\n    dg_at",
        _ACCURATE.format("geglu-rows9-columns96-halves-float32"),
    ),
    Mutation(
        "gated: lazy negation of the upstream gradient ignored",
        "activation.py",
        "(dy.resolve_neg(), gate, up)",
        "(dy, gate, up)",
        _EVERY + "test_negated_upstream_gradient[swiglu]",
    ),
    Mutation(
        "one tensor's dense layout taken for everyone's",
        "activation.py",
        "all(t.stride() == output.stride() for t in inputs)",
        "any(t.stride() == output.stride() for t in inputs)",
        "test_activation.py::test_results_have_pytorchs_layout[swiglu-permuted half]",
    ),
    Mutation(
        "halves of one tensor copied",
        "activation.py",
        "if len(axes) == 2 and axes[0][1] == inner:",
        "if False:",
        "test_activation.py::test_halves_of_one_tensor_are_read_where_they_lie",
    ),
    Mutation(
        "gated forward: gate and up exchanged in whole tiles",
        "activation.py",
        "_gated_forward_tile(g_at, u_at, y_at, mask, True",
        "_gated_forward_tile(u_at, g_at, y_at, mask, True",
        _ACCURATE.format("swiglu-rows11-columns1023-float32"),
    ),
    Mutation(
        "gated forward: all strips of columns written to the first",
        "activation.py",
        "y_at = Y + (rows * stride_y + first_col) + cols\n    if whole:\n        _gated",
        "y_at = Y + rows * stride_y + cols\n    if whole:\n        _gated",
        _ACCURATE.format("swiglu-rows11-columns1023-float32"),
    ),
    Mutation(
        "gated backward: gate and up exchanged in whole tiles",
        "activation.py",
        "_gated_backward_tile(dy_at, g_at, u_at, dg_at, du_at, mask, True",
        "_gated_backward_tile(dy_at, u_at, g_at, dg_at, du_at, mask, True",
        _ACCURATE.format("swiglu-rows11-columns1023-float32"),
    ),
    Mutation(
        "gated backward: all strips of dgate written to the first",
        "activation.py",
        "dg_at = DG + (rows * stride_dg + first_col) + cols",
        "dg_at = DG + rows * stride_dg + cols",
        _ACCURATE.format("swiglu-rows11-columns1023-float32"),
    ),
    Mutation(
        "gated backward: all strips of dup written to the first",
        "activation.py",
        "du_at = DU + (rows * stride_dg + first_col) + cols",
        "du_at = DU + rows * stride_dg + cols",
        _ACCURATE.format("swiglu-rows11-columns1023-float32"),
    ),
    # _math.py
    Mutation(
        "a coefficient of Phi cut short",
        "_math.py",
        "p * a - 0.45919736286359186",
        "p * a - 0.4592",
        "test_activation.py::test_gelu_and_its_slope_keep_their_digits_in_the_tail",
    ),
    Mutation(
        "Phi of negative numbers by subtraction",
        "_math.py",
        "return tl.where(x < 0.0, tail, 1.0 - tail)",
        "return tl.where(x < 0.0, 1.0 - (1.0 - tail), 1.0 - tail)",
        "test_activation.py::test_gelu_and_its_slope_keep_their_digits_in_the_tail",
    ),
    Mutation(
        "tanh cancels near 0",
        "_math.py",
        "tl.where(z < 0.3025, near",
        "tl.where(z < 0.0, near",
        "test_activation.py::test_no_cancellation_in_fp32[tanh]",
    ),
    Mutation(
        "a coefficient of tanh cut short",
        "_math.py",
        "p * z - 0.33332946636446775",
        "p * z - 0.3333",
        "test_activation.py::test_no_cancellation_in_fp32[tanh]",
    ),
    Mutation(
        "sigmoid by subtraction",
        "_math.py",
        "return tl.where(x < 0.0, e, 1.0) / (1.0 + e)",
        "return 1.0 - tl.where(x < 0.0, 1.0, e) / (1.0 + e)",
        "test_activation.py::test_no_cancellation_in_fp32[sigmoid]",
    ),
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
        _ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: sum kept where the maximum moves",
        "softmax.py",
        "sums * step + 1.0",
        "sums + 1.0",
        _LONG.format("softmax"),
    ),
    Mutation(
        "softmax: lanes added whatever their maxima",
        "softmax.py",
        "tl.sum(sums * tl.exp(top - maximum[:, None]), axis=1)",
        "tl.sum(sums, axis=1)",
        _LONG.format("log_softmax"),
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
        _EVERY + "test_rows_past_two_to_the_31_elements[softmax]",
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
        _ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "log_softmax: dx without the row's sum",
        "softmax.py",
        "dx = dy - tl.exp(y) * total[:, None]",
        "dx = dy",
        _ACCURATE.format("log_softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: the sum of dy for that of dy y",
        "softmax.py",
        "total = tl.sum(dy if IS_LOG else dy * y, axis=1)",
        "total = tl.sum(dy, axis=1)",
        _ACCURATE.format("softmax-rows3-columns5-float32"),
    ),
    Mutation(
        "softmax: long rows: only the last block's sum",
        "softmax.py",
        "sums += dy if IS_LOG else dy * y",
        "sums = dy if IS_LOG else dy * y",
        _LONG.format("softmax"),
    ),
    Mutation(
        "softmax: lazy negation of the upstream gradient ignored",
        "softmax.py",
        "(dy.resolve_neg(), y)",
        "(dy, y)",
        _EVERY + "test_negated_upstream_gradient[softmax]",
    ),
    Mutation(
        "softmax: long rows: dx without the row's sum",
        "softmax.py",
        "total = tl.sum(sums, axis=1)\n        for",
        "total = tl.sum(sums, axis=1) * 0.0\n        for",
        _LONG.format("softmax"),
    ),
    Mutation(
        "softmax: a symbolic dim in a message",
        "softmax.py",
        'return "dim is not the last dimension"',
        'return f"dim={dim} is not the last dimension"',
        "test_softmax.py::test_any_dimension_compiles[torch-softmax]",
    ),
    # rotary_kernel, rotary_norm_backward_kernel, their launchers
    Mutation(
        "rotary: norm without the channels past R",
        "rotary.py",
        "squares += tl.sum(rest * rest, axis=1)",
        "squares += 0.0",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: forward without eps",
        "rotary.py",
        "squares / D + eps, 1.0))[:, None]\n            a, b",
        "squares / D, 1.0))[:, None]\n            a, b",
        _ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: channels past R not written",
        "rotary.py",
        "tl.store(Y + y_at[:, None] + cols[None, :], rest.to(Y.dtype.element_ty), mask=rest_ok)",
        "pass",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: channels past R not normed",
        "rotary.py",
        "                rest *= rstd\n            if HAS_WQ",
        "                rest *= 1.0\n            if HAS_WQ",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: forward positions in int32",
        "rotary.py",
        "t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)\n    t_ok",
        "t = (block % time_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)\n    t_ok",
        "test_rotary.py::test_strides_past_two_to_the_31_elements[2-kernels]",
    ),
    Mutation(
        "rotary: q rotated into k",
        "rotary.py",
        "X, W, Y, heads, first, weighted = K,",
        "X, W, Y, heads, first, weighted = Q,",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: one head of each group",
        "rotary.py",
        "tl.minimum(first + group_heads, heads)):\n        x_at",
        "tl.minimum(first + 1, heads)):\n        x_at",
        "test_rotary.py::test_heads_in_groups[kernels-2]",
    ),
    Mutation(
        "rotary: the sign of the sine in the backward",
        "rotary.py",
        "sin_a, sin_b = -sin_b, -sin_a",
        "sin_a, sin_b = sin_b, sin_a",
        "test_rotary.py::test_gradients_of_every_switch[none-True-False-8-kernels]",
    ),
    Mutation(
        "rotary: the inverse for the transpose",
        "rotary.py",
        "sin_a, sin_b = -sin_b, -sin_a",
        "sin_a, sin_b = -sin_a, -sin_b",
        "test_rotary.py::test_gradients_of_every_switch[none-True-False-8-kernels]",
    ),
    Mutation(
        "rotary: neighbours exchanged",
        "rotary.py",
        "a, b = tl.split(",
        "b, a = tl.split(",
        _ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: one table for both channels",
        "rotary.py",
        "    if FULL:\n        first, second",
        "    if FULL:\n        second, first",
        _ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: weight offset left out",
        "rotary.py",
        "tl.where(weighted, a + weight_offset, 1.0)",
        "tl.where(weighted, a, 1.0)",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: weight offset left out past R",
        "rotary.py",
        "tl.where(weighted, rest + weight_offset, 1.0)",
        "tl.where(weighted, rest, 1.0)",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: a missing weight is the other's",
        "rotary.py",
        "tl.where(weighted, b + weight_offset, 1.0)",
        "b + weight_offset",
        "test_rotary.py::test_gradients_of_every_switch[q_weight-False-False-8-kernels]",
    ),
    Mutation(
        "rotary: dx without mean(g x^)",
        "rotary.py",
        "dx_a, dx_b = (g_a - x_a * mean) * rstd,",
        "dx_a, dx_b = g_a * rstd,",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: mean(g x^) without the channels past R",
        "rotary.py",
        "dot += tl.sum(g_rest * x_rest, axis=1)",
        "dot += 0.0",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: the backward's norm without the channels past R",
        "rotary.py",
        "squares += tl.sum(x_rest * x_rest, axis=1)",
        "squares += 0.0",
        _ACCURATE.format(
            "rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"
        ),
    ),
    Mutation(
        "rotary: backward without eps",
        "rotary.py",
        "squares / D + eps, 1.0))[:, None]\n            x_a",
        "squares / D, 1.0))[:, None]\n            x_a",
        _ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: no inverse before the norm's backward",
        "rotary.py",
        "cos_a, cos_b, sin_a, sin_b, True)",
        "cos_a, cos_b, sin_a, sin_b, False)",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: dw without x^",
        "rotary.py",
        "dw_a += g_a * x_a",
        "dw_a += g_a",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: only the first block of each walker",
        "rotary.py",
        "for step in range(steps):",
        "for step in range(1):",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: k's partial sums over q's",
        "rotary.py",
        "dw_row = walkers * groups_q + walker",
        "dw_row = walker",
        _ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: channels taken for adjacent",
        "rotary.py",
        "return x if x.stride(-1) == 1 else x.contiguous()",
        "return x",
        "test_rotary.py::test_any_order_of_axes_in_memory[kernels-False-order4]",
    ),
    Mutation(
        "rotary: lazy negation of the upstream gradient ignored",
        "rotary.py",
        "    x = x.resolve_neg()\n",
        "",
        _EVERY + "test_negated_upstream_gradient[rotary_embedding]",
    ),
    Mutation(
        "rotary: the order of sums depends on what is frozen",
        "rotary.py",
        "_plan(sides, inputs, options)",
        "_plan(sides, sides, options)",
        "test_rotary.py::test_a_side_whose_result_is_unused_is_not_read[True-k-kernels]",
    ),
    Mutation(
        "rotary: sin read with the strides of cos",
        "rotary.py",
        "if cos.stride() != sin.stride():",
        "if False:",
        "test_rotary.py::test_tables_of_any_layout_and_dtype[kernels-sin elsewhere]",
    ),
    Mutation(
        "rotary: a table of one row of positions walked by batch",
        "rotary.py",
        "if cos.dim() == 3 and cos.shape[0] > 1 else 0",
        "if cos.dim() == 3 else 0",
        "test_rotary.py::test_tables_of_any_layout_and_dtype[kernels-one batch]",
    ),
    Mutation(
        "rotary: the first head of each group alone in the norm's backward",
        "rotary.py",
        "tl.minimum(first + group_heads, heads)):\n            dy_at",
        "tl.minimum(first + 1, heads)):\n            dy_at",
        "test_rotary.py::test_heads_in_groups[kernels-2]",
    ),
    Mutation(
        "rotary: only the first block of positions in the norm's backward",
        "rotary.py",
        "t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)\n        t_ok",
        "t = (block % time_blocks) * 0 + tl.arange(0, BLOCK_T)\n        t_ok",
        _ACCURATE.format("rotary_embedding-rows37-columns64-batch2-float32"),
    ),
    Mutation(
        "rotary: a number that varies cannot be compiled",
        "rotary.py",
        "-math.inf < value < math.inf",
        "math.isfinite(value)",
        "test_rotary.py::test_numbers_that_vary_from_call_to_call_compile[kernels]",
    ),
    Mutation(
        "rotary: a frozen side wants a gradient",
        "rotary.py",
        "if not (needs[side] or needs[4 + side])",
        "if False",
        _EVERY + "test_outputs_require_a_gradient_where_pytorchs_do[captured-rotary_embedding]",
    ),
    Mutation(
        "rotary: a weight of any shape",
        "rotary.py",
        "isinstance(weight, Tensor) and weight.shape == q.shape[-1:]",
        "isinstance(weight, Tensor)",
        "test_rotary.py::test_bad_calls_say_what_to_give[kernels]",
    ),
    # cross_entropy_forward_kernel
    Mutation(
        "target's power lost among the others",
        "cross_entropy.py",
        '    others = tl.where(cols[None, :] == y[:, None], float("-inf"), l)\n',
        "    others = l\n",
        "test_cross_entropy.py::test_all_options_together_are_accurate[mean-torch.float32]",
    ),
    Mutation(
        "target's power counted twice in long rows",
        "cross_entropy.py",
        'l = tl.where(at[None, :] == y[:, None], float("-inf"), l)',
        "l = l",
        "test_cross_entropy.py::test_long_rows_with_all_options_are_accurate[48-torch.float32]",
    ),
    Mutation(
        "log-sum-exp not rescaled",
        "cross_entropy.py",
        "return top, s * tl.exp2(before - top2) + ",
        "return top, s + ",
        "test_cross_entropy.py::test_long_rows_with_all_options_are_accurate[48-torch.float32]",
    ),
    Mutation(
        "lanes not brought to one largest logit",
        "cross_entropy.py",
        "s = tl.sum(s * tl.exp2(_log2_power(top, ACC) - row_top2[:, None]), axis=1)",
        "s = tl.sum(s, axis=1)",
        "test_cross_entropy.py::test_long_rows_with_all_options_are_accurate[48-torch.float32]",
    ),
    Mutation(
        "the block ahead read without a mask",
        "cross_entropy.py",
        "mask=row_ok[:, None] & (ahead < N)[None, :]",
        "mask=row_ok[:, None] & (ahead >= 0)[None, :]",
        "test_cross_entropy.py::test_long_rows_with_all_options_are_accurate[23-torch.float32]",
    ),
    Mutation(
        "no digits of a confident token's loss",
        "cross_entropy.py",
        "    log1p = tl.where(taken > 0.0, tl.log(one_more) * (ratio / tl.where(taken > 0.0, taken, 1.0)), ratio)\n",
        "    log1p = tl.log(one_more)\n",
        "test_cross_entropy.py::test_confident_targets_keep_their_digits[torch.float32-whole]",
    ),
    Mutation(
        "saved log-sum-exp rounded to fp32",
        "cross_entropy.py",
        "return total, (a - (total - kept)) + (b - kept)",
        "return total, 0.0 * (a - (total - kept))",
        "test_cross_entropy.py::test_confident_targets_keep_their_digits[torch.float32-whole]",
    ),
    Mutation(
        "label smoothing without its sum over classes",
        "cross_entropy.py",
        "weight_sum * ((origin - base) + rest) - deviation",
        "weight_sum * ((origin - base) + rest)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[sum-torch.float32]",
    ),
    Mutation(
        "label smoothing without class weights",
        "cross_entropy.py",
        "        d *= tl.load(W + cols, mask=col_ok, other=0.0).to(ACC)[None, :]\n",
        "        d *= 1.0\n",
        "test_cross_entropy.py::test_all_options_together_are_accurate[sum-torch.float32]",
    ),
    Mutation(
        "z without its coefficient",
        "cross_entropy.py",
        "z = tl.where(counted, z_loss * high * high, 0.0)",
        "z = tl.where(counted, high * high, 0.0)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[none-torch.float32]",
    ),
    Mutation(
        "ignored rows in the loss",
        "cross_entropy.py",
        "tl.store(LOSS + rows, tl.where(counted, loss + z, 0.0), mask=row_ok)",
        "tl.store(LOSS + rows, loss + z, mask=row_ok)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[sum-torch.float32]",
    ),
    Mutation(
        "a bad target taken for class 0",
        "cross_entropy.py",
        'tl.where(inside, w, float("nan"))',
        "w",
        "test_cross_entropy.py::test_bad_target_is_nan_without_the_cpus_check[13]",
    ),
    Mutation(
        "a bad target read where it points",
        "cross_entropy.py",
        "y = tl.where(inside, y, 0).to(tl.int32)",
        "y = y.to(tl.int32)",
        "test_cross_entropy.py::test_bad_target_is_nan_without_the_cpus_check[13]",
    ),
    Mutation(
        "-inf logits at the beginning of a row",
        "cross_entropy.py",
        'return tl.where(top == float("-inf"), 0.0, top)',
        "return top",
        "test_cross_entropy.py::test_infinite_and_nan_logits_give_pytorchs_answer[plain-long]",
    ),
    Mutation(
        "forward rows in int32 (cross-entropy)",
        "cross_entropy.py",
        "    rows = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "    rows = tl.program_id(0) * BLOCK_M",
        _EVERY + "test_rows_past_two_to_the_31_elements[cross_entropy]",
    ),
    Mutation(
        "chunk's gradient without upstream",
        "cross_entropy.py",
        "scale = tl.load(UPSTREAM + rows * stride_upstream, mask=row_ok, other=0.0).to(ACC)\n        a, b",
        "scale = scale * 1.0\n        a, b",
        "test_cross_entropy.py::test_chunks_and_blocks_of_classes[rows-False-plain-whole]",
    ),
    Mutation(
        "chunk's gradient: only the last block",
        "cross_entropy.py",
        "        blocks = 1 if WHOLE_ROW else tl.cdiv(N, BLOCK_N)\n        for block in range(blocks):",
        "        blocks = 1 if WHOLE_ROW else tl.cdiv(N, BLOCK_N)\n        for block in range(1):",
        "test_cross_entropy.py::test_chunks_and_blocks_of_classes[none-False-plain-long]",
    ),
    # cross_entropy_reduce_kernel
    Mutation(
        "only the last step's losses",
        "cross_entropy.py",
        "loss += tl.load(LOSS + rows, mask=rows < M, other=0.0)",
        "loss = tl.load(LOSS + rows, mask=rows < M, other=0.0)",
        "test_cross_entropy.py::test_many_rows_are_summed_in_two_passes[sum]",
    ),
    Mutation(
        "rows past the last in the sum",
        "cross_entropy.py",
        "count += tl.load(COUNT + rows, mask=rows < M, other=0.0)",
        "count += tl.load(COUNT + rows, mask=rows < M, other=1.0)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[mean-torch.float32]",
    ),
    Mutation(
        "programs that sum the same rows",
        "cross_entropy.py",
        "rows = (program * steps + step).to(tl.int64) * BLOCK",
        "rows = (program * 0 + step).to(tl.int64) * BLOCK",
        "test_cross_entropy.py::test_many_rows_are_summed_in_two_passes[sum]",
    ),
    Mutation(
        "no items taken for 0",
        "cross_entropy.py",
        "denominator = tl.where(items < 1.0, 1.0, items)",
        "denominator = items",
        "test_cross_entropy.py::test_num_items_of_every_kind[0]",
    ),
    Mutation(
        "nothing counted is a loss of 0",
        "cross_entropy.py",
        'divisor = tl.where(denominator == 0.0, float("nan"), denominator)',
        "divisor = tl.where(denominator == 0.0, 1.0, denominator)",
        "test_cross_entropy.py::test_difference_b_nothing_counted[kernels-False-4-plain]",
    ),
    # cross_entropy_backward_kernel
    Mutation(
        "p - 1 rounded",
        "cross_entropy.py",
        "tl.where(v[None, :] == y[:, None], miss[:, None], p)",
        "tl.where(v[None, :] == y[:, None], p - 1.0, p)",
        "test_cross_entropy.py::test_confident_targets_keep_their_digits[torch.float32-whole]",
    ),
    Mutation(
        "gradient without p's other terms",
        "cross_entropy.py",
        "(b[:, None] * p - each)",
        "(0.0 * p - each)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[none-torch.float32]",
    ),
    Mutation(
        "gradient without smoothing's share",
        "cross_entropy.py",
        "(b[:, None] * p - each)",
        "(b[:, None] * p)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[none-torch.float32]",
    ),
    Mutation(
        "z's gradient halved",
        "cross_entropy.py",
        "2.0 * z_loss * lse)",
        "z_loss * lse)",
        "test_cross_entropy.py::test_all_options_together_are_accurate[none-torch.float32]",
    ),
    Mutation(
        "soft-cap's slope left out",
        "cross_entropy.py",
        "dx *= tl.exp(-2.0",
        "dx *= 1.0 + 0.0 * tl.exp(-2.0",
        "test_cross_entropy.py::test_all_options_together_are_accurate[none-torch.float32]",
    ),
    Mutation(
        "ignored rows with a gradient",
        "cross_entropy.py",
        "return tl.where(counted, a, 0.0), tl.where(counted, b, 0.0), tl.where(counted, scale * on_each, 0.0)",
        "return a, b, scale * on_each",
        "test_cross_entropy.py::test_all_options_together_are_accurate[sum-torch.float32]",
    ),
    Mutation(
        "backward without the denominator",
        "cross_entropy.py",
        '        scale /= tl.where(denominator == 0.0, float("nan"), denominator)\n',
        "        scale *= 1.0\n",
        "test_cross_entropy.py::test_all_options_together_are_accurate[mean-torch.float32]",
    ),
    Mutation(
        "classes of a block counted from 0",
        "cross_entropy.py",
        "    v = first_class + cols\n",
        "    v = cols\n",
        "test_cross_entropy.py::test_chunks_and_blocks_of_classes[one-False-plain-whole]",
    ),
    Mutation(
        "backward rows in int32 (cross-entropy)",
        "cross_entropy.py",
        "rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M",
        "rows = (tl.program_id(0) // tiles) * BLOCK_M",
        _EVERY + "test_rows_past_two_to_the_31_elements[cross_entropy]",
    ),
    # cross_entropy: launchers and autograd
    Mutation(
        "second in-place backward in silence",
        "cross_entropy.py",
        "    if ctx.inplace and ctx.used:\n",
        "    if False:\n",
        "test_cross_entropy.py::test_inplace_backward_takes_the_logits_memory[None]",
    ),
    Mutation(
        "in-place gradient unnoticed by other users",
        "cross_entropy.py",
        "        torch.autograd.graph.increment_version(logits)\n",
        "        pass\n",
        "test_cross_entropy.py::test_inplace_backward_is_noticed_by_others_who_saved_the_logits",
    ),
    Mutation(
        "in place over rows that share memory",
        "cross_entropy.py",
        "inplace = inplace and (rows <= 1 or x.stride(0) >= classes)",
        "inplace = bool(inplace)",
        "test_cross_entropy.py::test_inplace_backward_leaves_other_layouts_alone[expanded]",
    ),
    Mutation(
        "captured backward in place",
        "cross_entropy.py",
        "inplace_backward and not _runtime.capturing(input)",
        "inplace_backward",
        "test_cross_entropy.py::test_compiled_inplace_backward_and_counts[eager]",
    ),
    Mutation(
        "upstream of cross-entropy taken for contiguous",
        "cross_entropy.py",
        "return 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)",
        "return 0 if upstream is None or upstream.dim() == 0 else 1",
        "test_cross_entropy.py::test_chunks_and_blocks_of_classes[rows-False-plain-whole]",
    ),
    Mutation(
        "num_items hides a bad reduction",
        "cross_entropy.py",
        'torch_reduction = "sum" if num_items is not None and reduction == "mean" else reduction',
        'torch_reduction = "sum" if num_items is not None else reduction',
        "test_cross_entropy.py::test_num_items_does_not_hide_a_bad_reduction[preferred-average]",
    ),
    Mutation(
        "ignore_index past int64 in the kernels",
        "cross_entropy.py",
        "    if not -(2**63) <= ignore_index < 2**63:\n",
        "    if False:\n",
        "test_bad_calls.py::test_bad_call_raises_pytorchs_class[cross_entropy-ignore_index past int64]",
    ),
    Mutation(
        "smoothed uint8 targets in the kernels",
        "cross_entropy.py",
        "    if label_smoothing and target.dtype == torch.uint8:\n",
        "    if False:\n",
        "test_cross_entropy.py::test_uint8_targets_are_the_same_numbers_in_int64[kernels]",
    ),
    Mutation(
        "class 156 ignored in uint8",
        "cross_entropy.py",
        "counted = target.long() != ignore_index",
        "counted = target != ignore_index",
        "test_cross_entropy.py::test_uint8_targets_are_the_same_numbers_in_int64[preferred]",
        interpret=False,
    ),
    Mutation(
        "legacy reductions refused by the compiler",
        "cross_entropy.py",
        "_legacy_reduction._dynamo_marked_constant = True",
        "_legacy_reduction._dynamo_marked_constant = False",
        "test_cross_entropy.py::test_legacy_reductions_compile_whole[preferred-size_average]",
        interpret=False,
    ),
    Mutation(
        "count of items past int64",
        "_arguments.py",
        "not 0 <= num_items < 2**63",
        "num_items < 0",
        "test_cross_entropy.py::test_bad_options_are_value_errors_with_the_value"
        "[preferred-{'num_items': 9223372036854775808}-num_items: got 9223372036854775808]",
    ),
    # _runtime.py
    Mutation(
        "a second derivative in silence",
        "_runtime.py",
        "forward, setup_context, backward or _raise_for(name))",
        "forward, setup_context, backward or (lambda ctx, *grads: (None,) * 13))",
        _EVERY + "test_gradient_penalty_is_right_or_raises[rms_norm]",
    ),
    Mutation(
        "raw launches under torch.func",
        "_runtime.py",
        "if torch._C._are_functorch_transforms_active():",
        "if False:",
        _EVERY + "test_function_transforms_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "raw launches on dual tensors",
        "_runtime.py",
        "if forward_ad._current_level >= 0:",
        "if False:",
        _EVERY + "test_function_transforms_take_pytorchs_path[layer_norm]",
    ),
    Mutation(
        "foreign modes ignored",
        "_runtime.py",
        "if not isinstance(mode, _CAPTURE_MODES):",
        "if False:",
        _EVERY + "test_subclasses_and_foreign_modes_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "negated views read as they lie",
        "_runtime.py",
        "if not torch.compiler.is_compiling() and tensor.is_neg():",
        "if False:",
        _EVERY + "test_negated_views_and_other_dtypes_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "no operator while compiling",
        "_runtime.py",
        "if capturing(inputs[0]):",
        "if False:",
        _EVERY + "test_compiles_whole_and_once_for_all_sizes[rms_norm]",
    ),
    Mutation(
        "launch on whatever device is current",
        "_runtime.py",
        "with torch.cuda.device(tensor.device):",
        "with contextlib.nullcontext():",
        "test_runtime.py::test_launches_make_the_tensors_device_current",
    ),
    Mutation(
        "a binary for every number of rows",
        "norm.py",
        '@kernel(do_not_specialize=("M", "steps"))\ndef norm_backward_kernel(',
        "@kernel()\ndef norm_backward_kernel(",
        "test_aot.py::test_sizes_that_vary_never_compile_a_new_binary[rms_norm]",
        interpret=False,
    ),
    Mutation(
        "GPUs too old, seen by eager code alone",
        "_runtime.py",
        "_age_obstacle._dynamo_marked_constant = True",
        "_age_obstacle._dynamo_marked_constant = False",
        "test_runtime.py::test_gpus_too_old_take_pytorchs_op",
        interpret=False,
    ),
    Mutation(
        "explain runs what does not ask",
        "_runtime.py",
        'if not getattr(fn, "_asks", False):',
        "if False:",
        "test_runtime.py::test_explain_refuses_what_does_not_ask",
    ),
    # check.py
    Mutation(
        "an infinite error of the baseline excuses ours",
        "check.py",
        "base.masked_fill(base.isinf(), 0.0)",
        "base",
        "test_check.py::test_an_error_of_pytorchs_where_none_is_allowed_does_not_excuse_ours",
        interpret=False,
    ),
    Mutation(
        "a rule that forgives anything",
        "check.py",
        "2 * base_worst + 4, rms, 2 * base_rms + 1",
        "2 * base_worst + 4e6, rms, 2 * base_rms + 4e6",
        "test_check.py::test_wrong_results_fail",
    ),
    # linear_cross_entropy.py
    Mutation(
        "weights that sum to 0 taken for nothing counted",
        "linear_cross_entropy.py",
        "torch.where(total == 0.0, torch.nan, 1.0)",
        "torch.where(total == 0.0, 1.0, 1.0)",
        _LINEAR + "test_class_weights_that_sum_to_zero[-tokens]",
    ),
    Mutation(
        "ignored tokens among the weights",
        "linear_cross_entropy.py",
        "weights.masked_fill(target == problem.options.ignore_index, 0.0)",
        "weights",
        _LINEAR + "test_class_weights_of_counted_tokens_alone",
    ),
    Mutation(
        "num_items without its gradient",
        "linear_cross_entropy.py",
        "*(ignore_index, reduction, label_smoothing, num_items),",
        "*(ignore_index, reduction, label_smoothing, None),",
        _LINEAR + "test_num_items_that_requires_a_gradient_gets_it",
    ),
    Mutation(
        "options of any kind",
        "linear_cross_entropy.py",
        "    if options is not None and not isinstance(options, _OPTIONS):\n",
        "    if False:\n",
        _LINEAR + "test_options_of_another_kind_are_pytorchs_error[3]",
    ),
    Mutation(
        "last chunk of tokens dropped",
        "linear_cross_entropy.py",
        "for start in range(0, tokens, max(1, plan.rows))]",
        "for start in range(0, tokens - plan.rows + 1, max(1, plan.rows))]",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-tokens]",
    ),
    Mutation(
        "only the last chunk's weight gradient",
        "linear_cross_entropy.py",
        "_multiply(g.t(), part.x, self.dw, dw_begun)",
        "_multiply(g.t(), part.x, self.dw, False)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-tokens]",
    ),
    Mutation(
        "only the last block's input gradient",
        "linear_cross_entropy.py",
        "_multiply(g, part.linear_weight, self.dx, dx_begun)",
        "_multiply(g, part.linear_weight, self.dx, False)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-classes]",
    ),
    Mutation(
        "bias gradient missing",
        "linear_cross_entropy.py",
        "    if self.db.numel():\n",
        "    if False:\n",
        _LINEAR + "test_nothing_counted_in_the_kernels[True-9-tokens]",
    ),
    Mutation(
        "only the last chunk's bias gradient",
        "linear_cross_entropy.py",
        "self.db.add_(total) if dw_begun else self.db.copy_(total)",
        "self.db.copy_(total)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-tokens]",
    ),
    Mutation(
        "where a block of classes begins",
        "linear_cross_entropy.py",
        "first_class=first, ",
        "first_class=0, ",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-classes]",
    ),
    Mutation(
        "a block of classes taken for all",
        "linear_cross_entropy.py",
        ", first_class=first, classes=classes)",
        ", first_class=first)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-classes]",
    ),
    Mutation(
        "bias of the first block of classes for all",
        "linear_cross_entropy.py",
        "self.linear_bias[first:last]",
        "self.linear_bias[: last - first]",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-classes]",
    ),
    Mutation(
        "weight gradient summed in 16 bits",
        "linear_cross_entropy.py",
        "return (wide if x.dtype == torch.float16 else x.dtype), wide",
        "return (wide if x.dtype == torch.float16 else x.dtype), x.dtype",
        _LINEAR + "test_fp16_sums_over_many_tokens_stay_finite",
    ),
    Mutation(
        "input gradient rounded to fp16 before it is scaled",
        "linear_cross_entropy.py",
        "return (wide if x.dtype == torch.float16 else x.dtype), wide",
        "return x.dtype, wide",
        _LINEAR + "test_kept_gradients_are_as_wide_as_they_must[float16]",
    ),
    Mutation(
        "upstream gradient of another chunk's tokens",
        "linear_cross_entropy.py",
        "upstream=grad[start:stop]",
        "upstream=grad[: stop - start]",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-tokens]",
    ),
    Mutation(
        "log-sum-exp of another chunk's tokens",
        "linear_cross_entropy.py",
        "lse[:, start:stop], logits)",
        "lse[:, : stop - start], logits)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-tokens]",
    ),
    Mutation(
        "scaled twice",
        "linear_cross_entropy.py",
        "(x * scale).to(",
        "(x * scale * scale).to(",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-tokens]",
    ),
    Mutation(
        "upstream gradient forgotten",
        "linear_cross_entropy.py",
        "tl.load(UPSTREAM).to(ACC) / tl.where",
        "1.0 / tl.where",
        _LINEAR + "test_fp16_gradients_do_not_depend_on_a_loss_scale[tokens]",
    ),
    Mutation(
        "0 / 0 where nothing was counted",
        "linear_cross_entropy.py",
        "counted = denominator != 0.0",
        "counted = denominator == denominator",
        _LINEAR + "test_nothing_counted_in_the_kernels[False-9-tokens]",
    ),
    Mutation(
        "no zeros where no chunk writes",
        "linear_cross_entropy.py",
        "if tokens == 0:",
        "if False:",
        _LINEAR + "test_nothing_counted_in_the_kernels[False-0-tokens]",
    ),
    Mutation(
        "scaled in place",
        "linear_cross_entropy.py",
        "torch.empty_like(source, dtype=dtype)",
        "source.to(dtype)",
        _LINEAR + "test_chunks_repeat_bit_for_bit[mean-tokens]",
    ),
    Mutation(
        "gradients formed for nobody",
        "linear_cross_entropy.py",
        'in_one_pass = any(needs) and plan.mode == "tokens"',
        'in_one_pass = plan.mode == "tokens"',
        _LINEAR + "test_products_and_launches_of_a_step[tokens]",
    ),
    Mutation(
        "a buffer for all logits",
        "linear_cross_entropy.py",
        "x.new_empty(plan.buffer_elements), grads",
        "x.new_empty(max(plan.buffer_elements, tokens * classes)), grads",
        _LINEAR + "test_never_more_than_a_chunk_of_logits[tokens]",
    ),
    Mutation(
        "products blind to autocast",
        "linear_cross_entropy.py",
        "return torch.get_autocast_dtype(input.device.type)",
        "return input.dtype",
        _LINEAR + "test_autocast_gives_the_references_dtypes[torch.bfloat16-mean]",
    ),
    Mutation(
        "a sharded head fails somewhere inside",
        "linear_cross_entropy.py",
        'if not hasattr(linear_weight, "placements") or',
        "if True or",
        _LINEAR + "test_a_sharded_head_is_one_clear_error_and_the_module_the_way",
        interpret=False,
    ),
    Mutation(
        "a frozen head pays for blocks of classes",
        "configs.py",
        "if not by_classes or not weight_gradient or rows >= tokens:",
        "if not by_classes or rows >= tokens:",
        _LINEAR + "test_products_and_launches_of_a_step[classes]",
    ),
    Mutation(
        "chunks past their share of memory",
        "configs.py",
        "min(most_rows, buffer_bytes // row_bytes)",
        "most_rows",
        _LINEAR + "test_plans_of_all_sizes[128256-768-torch.bfloat16]",
        interpret=False,
    ),
)


def survives(mutation: Mutation) -> str | None:
    """None if the mutation's test fails on the mutated copy, else what is wrong."""
    text = (PACKAGE / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        return f"{mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / mutation.file).write_text(text.replace(mutation.old, mutation.new))
        run = _run_test(mutation, folder)
    # 1: a test failed; negative: the process crashed. Anything else: the test was not run at all.
    if run.returncode == 1 or run.returncode < 0:
        return None
    return f"{mutation.test} ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-1000:]}"


def _run_test(mutation: Mutation, folder: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": folder, "TRITON_INTERPRET": str(int(mutation.interpret))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{mutation.test}"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def main(names: list[str]) -> int:
    """Run the named mutations, or all; 1 if one survives."""
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    found = {mutation.name: survives(mutation) for mutation in chosen}
    for name, defect in found.items():
        sys.stdout.write(f"{'killed  ' if defect is None else 'SURVIVES'} {name}\n{defect or ''}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
