"""Breaks of the rotary package."""

from __future__ import annotations

from breaks import ACCURATE, EVERY, Mutation

MUTATIONS = (
    # rotary_kernel, rotary_norm_backward_kernel, their launchers
    Mutation(
        "rotary: norm without the channels past R",
        "rotary/_rotation.py",
        "squares += tl.sum(rest * rest, axis=1)",
        "squares += 0.0",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: forward without eps",
        "rotary/_rotation.py",
        "squares / D + eps, 1.0))[:, None]\n            a, b",
        "squares / D, 1.0))[:, None]\n            a, b",
        ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: channels past R not written",
        "rotary/_rotation.py",
        "tl.store(Y + y_at[:, None] + cols[None, :], rest.to(Y.dtype.element_ty), mask=rest_ok)",
        "pass",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: channels past R not normed",
        "rotary/_rotation.py",
        "                rest *= rstd\n            if HAS_WQ",
        "                rest *= 1.0\n            if HAS_WQ",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: forward positions in int32",
        "rotary/_rotation.py",
        "t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)\n    t_ok",
        "t = (block % time_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)\n    t_ok",
        "test_rotary.py::test_strides_past_two_to_the_31_elements[2-kernels]",
    ),
    Mutation(
        "rotary: q rotated into k",
        "rotary/_rotation.py",
        "X, W, Y, heads, first, weighted = K,",
        "X, W, Y, heads, first, weighted = Q,",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: one head of each group",
        "rotary/_rotation.py",
        "tl.minimum(first + group_heads, heads)):\n        x_at",
        "tl.minimum(first + 1, heads)):\n        x_at",
        "test_rotary.py::test_heads_in_groups[kernels-2]",
    ),
    Mutation(
        "rotary: the sign of the sine in the backward",
        "rotary/_tiles.py",
        "sin_a, sin_b = -sin_b, -sin_a",
        "sin_a, sin_b = sin_b, sin_a",
        "test_rotary.py::test_gradients_of_every_switch[none-True-False-8-kernels]",
    ),
    Mutation(
        "rotary: the inverse for the transpose",
        "rotary/_tiles.py",
        "sin_a, sin_b = -sin_b, -sin_a",
        "sin_a, sin_b = -sin_a, -sin_b",
        "test_rotary.py::test_gradients_of_every_switch[none-True-False-8-kernels]",
    ),
    Mutation(
        "rotary: neighbours exchanged",
        "rotary/_tiles.py",
        "a, b = tl.split(",
        "b, a = tl.split(",
        ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: one table for both channels",
        "rotary/_tiles.py",
        "    if FULL:\n        first, second",
        "    if FULL:\n        second, first",
        ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: weight offset left out",
        "rotary/_tiles.py",
        "tl.where(weighted, a + weight_offset, 1.0)",
        "tl.where(weighted, a, 1.0)",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: weight offset left out past R",
        "rotary/_tiles.py",
        "tl.where(weighted, rest + weight_offset, 1.0)",
        "tl.where(weighted, rest, 1.0)",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: a missing weight is the other's",
        "rotary/_tiles.py",
        "tl.where(weighted, b + weight_offset, 1.0)",
        "b + weight_offset",
        "test_rotary.py::test_gradients_of_every_switch[q_weight-False-False-8-kernels]",
    ),
    Mutation(
        "rotary: dx without mean(g x^)",
        "rotary/_norm_backward.py",
        "dx_a, dx_b = (g_a - x_a * mean) * rstd,",
        "dx_a, dx_b = g_a * rstd,",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: mean(g x^) without the channels past R",
        "rotary/_norm_backward.py",
        "dot += tl.sum(g_rest * x_rest, axis=1)",
        "dot += 0.0",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: the backward's norm without the channels past R",
        "rotary/_norm_backward.py",
        "squares += tl.sum(x_rest * x_rest, axis=1)",
        "squares += 0.0",
        ACCURATE.format("rotary_embedding-rows7-columns24-rotary_dim10-heads2-kv_heads2-batch2-batched_tables-float32"),
    ),
    Mutation(
        "rotary: backward without eps",
        "rotary/_norm_backward.py",
        "squares / D + eps, 1.0))[:, None]\n            x_a",
        "squares / D, 1.0))[:, None]\n            x_a",
        ACCURATE.format(
            "rotary_embedding-rows6-columns20-interleaved-full_tables-batch2-batched_tables-eps0.1-float32"
        ),
    ),
    Mutation(
        "rotary: no inverse before the norm's backward",
        "rotary/_norm_backward.py",
        "cos_a, cos_b, sin_a, sin_b, True)",
        "cos_a, cos_b, sin_a, sin_b, False)",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: dw without x^",
        "rotary/_norm_backward.py",
        "dw_a += g_a * x_a",
        "dw_a += g_a",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: only the first block of each walker",
        "rotary/_norm_backward.py",
        "for step in range(steps):",
        "for step in range(1):",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: k's partial sums over q's",
        "rotary/_norm_backward.py",
        "dw_row = walkers * groups_q + walker",
        "dw_row = walker",
        ACCURATE.format("rotary_embedding-rows5-columns12-batch2-heads3-float32"),
    ),
    Mutation(
        "rotary: channels taken for adjacent",
        "rotary/_launch.py",
        "return x if x.stride(-1) == 1 else x.contiguous()",
        "return x",
        "test_rotary.py::test_any_order_of_axes_in_memory[kernels-False-order4]",
    ),
    Mutation(
        "rotary: lazy negation of the upstream gradient ignored",
        "rotary/_launch.py",
        "    x = x.resolve_neg()\n",
        "",
        EVERY + "test_negated_upstream_gradient[rotary_embedding]",
    ),
    Mutation(
        "rotary: the order of sums depends on what is frozen",
        "rotary/_norm_backward.py",
        "plan_of(sides, inputs, options, summed=need_dw)",
        "plan_of(sides, sides, options, summed=need_dw)",
        "test_rotary.py::test_a_side_whose_result_is_unused_is_not_read[True-k-kernels]",
    ),
    Mutation(
        "rotary: sin read with the strides of cos",
        "rotary/_launch.py",
        "if cos.stride() != sin.stride():",
        "if False:",
        "test_rotary.py::test_tables_of_any_layout_and_dtype[kernels-sin elsewhere]",
    ),
    Mutation(
        "rotary: a table of one row of positions walked by batch",
        "rotary/_launch.py",
        "if cos.dim() == 3 and cos.shape[0] > 1 else 0",
        "if cos.dim() == 3 else 0",
        "test_rotary.py::test_tables_of_any_layout_and_dtype[kernels-one batch]",
    ),
    Mutation(
        "rotary: the first head of each group alone in the norm's backward",
        "rotary/_norm_backward.py",
        "tl.minimum(first + group_heads, heads)):\n            dy_at",
        "tl.minimum(first + 1, heads)):\n            dy_at",
        "test_rotary.py::test_heads_in_groups[kernels-2]",
    ),
    Mutation(
        "rotary: only the first block of positions in the norm's backward",
        "rotary/_norm_backward.py",
        "t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)\n        t_ok",
        "t = (block % time_blocks) * 0 + tl.arange(0, BLOCK_T)\n        t_ok",
        ACCURATE.format("rotary_embedding-rows37-columns64-batch2-float32"),
    ),
    Mutation(
        "rotary: a number that varies cannot be compiled",
        "rotary/_reference.py",
        "-math.inf < value < math.inf",
        "math.isfinite(value)",
        "test_rotary.py::test_numbers_that_vary_from_call_to_call_compile[kernels]",
    ),
    Mutation(
        "rotary: a frozen side wants a gradient",
        "rotary/_operators.py",
        "if not (needs[side] or needs[4 + side])",
        "if False",
        EVERY + "test_outputs_require_a_gradient_where_pytorchs_do[captured-rotary_embedding]",
    ),
    Mutation(
        "rotary: a weight of any shape",
        "rotary/_reference.py",
        "isinstance(weight, Tensor) and weight.shape == q.shape[-1:]",
        "isinstance(weight, Tensor)",
        "test_rotary.py::test_bad_calls_say_what_to_give[kernels]",
    ),
)
