"""Breaks of what the families share: _runtime, _math, check."""

from __future__ import annotations

from breaks import EVERY, Mutation

MUTATIONS = (
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
    # _runtime.py
    Mutation(
        "a second derivative in silence",
        "_runtime.py",
        "forward, setup_context, backward or _raise_for(name))",
        "forward, setup_context, backward or (lambda ctx, *grads: (None,) * 13))",
        EVERY + "test_gradient_penalty_is_right_or_raises[rms_norm]",
    ),
    Mutation(
        "raw launches under torch.func",
        "_runtime.py",
        "if torch._C._are_functorch_transforms_active():",
        "if False:",
        EVERY + "test_function_transforms_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "raw launches on dual tensors",
        "_runtime.py",
        "if forward_ad._current_level >= 0:",
        "if False:",
        EVERY + "test_function_transforms_take_pytorchs_path[layer_norm]",
    ),
    Mutation(
        "foreign modes ignored",
        "_runtime.py",
        "if not isinstance(mode, _CAPTURE_MODES):",
        "if False:",
        EVERY + "test_subclasses_and_foreign_modes_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "negated views read as they lie",
        "_runtime.py",
        "if not torch.compiler.is_compiling() and tensor.is_neg():",
        "if False:",
        EVERY + "test_negated_views_and_other_dtypes_take_pytorchs_path[rms_norm]",
    ),
    Mutation(
        "no operator while compiling",
        "_runtime.py",
        "if capturing(inputs[0]):",
        "if False:",
        EVERY + "test_compiles_whole_and_once_for_all_sizes[dynamic-rms_norm]",
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
    # accuracy.py
    Mutation(
        "an infinite error of the baseline excuses ours",
        "accuracy.py",
        "base.masked_fill(base > _BASELINE_LIMIT, 0.0)",
        "base",
        "test_check.py::test_an_error_of_pytorchs_where_none_is_allowed_does_not_excuse_ours",
        interpret=False,
    ),
    Mutation(
        "PyTorch's own op may err at will where no error is allowed",
        "accuracy.py",
        "units.isposinf() & (error <= baseline)",
        "units.isposinf()",
        "test_check.py::test_pytorchs_own_op_may_err_as_it_does_where_none_is_allowed",
        interpret=False,
    ),
    Mutation(
        "PyTorch's own op is judged as a kernel is",
        "check.py",
        "upstream, own_op=own_op",
        "upstream",
        "test_check.py::test_a_row_that_sees_one_key_passes_with_two_threads",
        interpret=False,
    ),
    Mutation(
        "a rule that forgives anything",
        "accuracy.py",
        "2 * base_worst + 4, 2 * base_rms + 1",
        "2 * base_worst + 4e6, 2 * base_rms + 4e6",
        "test_check.py::test_wrong_results_fail",
    ),
)
