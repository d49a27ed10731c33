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
        "cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)\n    total",
        "cols = tl.arange(0, BLOCK_N)\n    total",
        _ACCURATE.format("rms_norm-rows9-columns100-float32"),
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
        "last chunk of tokens dropped",
        "linear_cross_entropy.py",
        "for start in range(0, tokens, max(1, plan.rows))]",
        "for start in range(0, tokens - plan.rows + 1, max(1, plan.rows))]",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-tokens]",
    ),
    Mutation(
        "only the last chunk's weight gradient",
        "linear_cross_entropy.py",
        "_multiply(g.t(), x, dw, add[1])",
        "_multiply(g.t(), x, dw, False)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-tokens]",
    ),
    Mutation(
        "only the last block's input gradient",
        "linear_cross_entropy.py",
        "_multiply(g, linear_weight, dx, add[0])",
        "_multiply(g, linear_weight, dx, False)",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[mean-classes]",
    ),
    Mutation(
        "bias gradient missing",
        "linear_cross_entropy.py",
        "    if db.numel():\n",
        "    if False:\n",
        _LINEAR + "test_nothing_counted_in_the_kernels[True-9-tokens]",
    ),
    Mutation(
        "only the last chunk's bias gradient",
        "linear_cross_entropy.py",
        "torch.add(db, g.sum(0, dtype=db.dtype), out=db) if add[1] else torch.sum(",
        "torch.sum(",
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
        ", classes=classes\n        )",
        "\n        )",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-classes]",
    ),
    Mutation(
        "bias of the first block of classes for all",
        "linear_cross_entropy.py",
        "linear_bias[first:last]",
        "linear_bias[: last - first]",
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
        "part, upstream = x[start:stop], grad[start:stop]",
        "part, upstream = x[start:stop], grad[: stop - start]",
        _LINEAR + "test_chunks_equal_one_chunk_in_fp64[none-tokens]",
    ),
    Mutation(
        "log-sum-exp of another chunk's tokens",
        "linear_cross_entropy.py",
        "lse[:, start:stop], logits, upstream",
        "lse[:, : stop - start], logits, upstream",
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
        "make = torch.zeros if x.shape[0] == 0 else torch.empty",
        "make = torch.empty",
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
        "buffer = x.new_empty(plan.buffer_elements)\n    in_one_pass",
        "buffer = x.new_empty(max(plan.buffer_elements, tokens * classes))\n    in_one_pass",
        _LINEAR + "test_never_more_than_a_chunk_of_logits[tokens]",
    ),
    Mutation(
        "products blind to autocast",
        "linear_cross_entropy.py",
        "return torch.get_autocast_dtype(kind)",
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
