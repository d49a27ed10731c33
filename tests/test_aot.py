"""Every shipped configuration compiles, fits and does not spill; the committed report describes these sources."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlm_kernels import _runtime, aot, configs
from fastlm_kernels.optim.steps import STEPS, Step, bytes_per_parameter
from fastlm_kernels.registry import CALLS, Kernel

# One worker compiles the quick report for all tests that read it.
pytestmark = [pytest.mark.needs_compiler, pytest.mark.xdist_group("ahead of time")]


# Attention in bf16, heads of 64 and 128 channels: every feature alone spills nothing but one's 8 bytes. With all that a
# call may ask for at once: so many bytes at most. Binaries of other heads or fp32 that spill: not to become more.
USUAL_ATTENTION = r"(scaled_dot_product_attention|varlen_attn) rows\d+-columns(64|128)(-.*)? bfloat16"
KNOWN = {("sm_120", "scaled_dot_product_attention rows4096-columns128-kv_heads2-one_pass-masked(0, 1) bfloat16")}
EVERYTHING = "-padded-window(1023, -1)-softcap30.0-dropout0.1 "
EVERYTHING_SPILLS = {"3.6": 56, "3.7": 72}
ATTENTION_SPILLS = {"3.6": 44, "3.7": 55}
every_kernel = pytest.mark.parametrize("kernel", CALLS, ids=lambda kernel: kernel.name)


def named(name: str) -> Kernel:
    """The registry's kernel of that name."""
    return next(kernel for kernel in CALLS if kernel.name == name)


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    """The quick report: one size of each kernel for sm_89 and sm_90."""
    return aot.collect(list(aot.jobs(False, aot.QUICK_ARCHITECTURES)), workers=1)


def test_quick_report_covers_both_architectures_and_every_kernel(rows: list[aot.Row]) -> None:
    """Forward and backward of each registry entry reach the compiler, and say what the call must move."""
    for architecture in aot.QUICK_ARCHITECTURES:
        mine = [row for row in rows if row.architecture == architecture]
        assert {row.call.split()[0] for row in mine} == {kernel.name for kernel in CALLS}
        assert all(row.call_bytes > 0 for row in mine)
        kernels = {row.kernel for row in mine}
        for family in ("norm", "softmax", "cross_entropy", "unary", "gated"):
            assert {f"{family}_forward_kernel", f"{family}_backward_kernel"} <= kernels
        assert {"rotary_kernel", "rotary_norm_backward_kernel"} <= kernels


def test_row_kernels_fit_and_do_not_spill(rows: list[aot.Row]) -> None:
    """Zero spills, shared memory within the architecture's limit."""
    assert [row for row in rows if not row.ok] == []


def test_alignment_gives_16_byte_loads(rows: list[aot.Row]) -> None:
    """Aligned pointers are read 16 bytes at a time; unaligned ones element by element, and still compile."""
    for row in rows:
        widths = [int(word.split("x")[0]) for word in row.loads.split()]
        # One number a row of the logits, in slices that begin anywhere: one binary for all of them.
        reads_numbers = row.kernel == "cross_entropy_reduce_kernel"
        assert (max(widths) == 128) == (row.aligned and not reads_numbers), row


@every_kernel
def test_sizes_that_vary_never_compile_a_new_binary(kernel: Kernel) -> None:
    """Any number of rows, 1 and 16-divisible ones included, asks for the same binaries: one a kernel for tensors of
    certain dtypes and certain switches (many rows may add a pass), never one for a size.
    """
    found: dict[tuple[Any, ...], set[str]] = {}
    for count in (1, 2, 16, 33, 4096, 4097, 100_003):
        case = {**kernel.quick[-1], "rows": count}
        for launch in aot.record(CALLS.index(kernel), case, torch.bfloat16, "sm_90"):
            source, options = aot.specialise(launch, "sm_90", True)
            types = tuple(t for t in source.signature.values() if t.startswith("*"))
            switches = tuple((name, on) for name, on in launch.constexprs.items() if isinstance(on, bool))
            binary = f"{source.hash()} {options.hash()}"
            found.setdefault((launch.kernel.__name__, types, switches), set()).add(binary)
    assert len(found) >= 2
    assert {name: len(binaries) for name, binaries in found.items()} == dict.fromkeys(found, 1)


@pytest.mark.parametrize("name", ["rms_norm", "add_layer_norm", "softmax", "cross_entropy", "silu", "swiglu"])
def test_row_strides_that_vary_compile_two_binaries_at_most(name: str) -> None:
    """One for strides that 16 divides, whose loads may be wide, one for all others."""
    kernel, found = named(name), {}
    for stride in (1040, 2048, 1072, 1041, 1042, 1048, 3000, 100_000, 99_999):
        arguments = {
            name: torch.empty(64, stride, device="meta", dtype=a.dtype)[:, :1024].requires_grad_()
            if isinstance(a, torch.Tensor) and a.shape == (64, 1024)
            else a
            for name, a in kernel.inputs(torch.bfloat16, "meta", 0, rows=64, columns=1024).items()
        }
        for launch in aot.record_call(kernel, arguments, "sm_90"):
            source, options = aot.specialise(launch, "sm_90", True)
            binaries = found.setdefault(launch.kernel.__name__, {})
            binaries.setdefault(f"{source.hash()} {options.hash()}", set()).add(stride % 16 == 0)
    forward = next(iter(found.values()))
    assert sorted(map(sorted, forward.values())) == [[False], [True]]
    assert all(len(binaries) <= 2 for binaries in found.values())


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["add_layer_norm", "softmax", "cross_entropy", "swiglu"])
def test_rows_of_one_element_compile(name: str, architecture: str) -> None:
    """Triton turns an argument of 1 into a constant: the kernels must still compile."""
    for launch in aot.record(CALLS.index(named(name)), {"rows": 5, "columns": 1}, torch.float32, architecture):
        assert aot.describe(launch, architecture, True).ok


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_a_tile_too_large_is_reported_as_spilling(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 elements a thread cannot stay in registers: the report must say so on both vendors' hardware."""
    monkeypatch.setattr(configs, "NORM_BACKWARD_BIAS", {"generic": (configs.RowConfig(4, 8192, 4),)})
    launches = aot.record(CALLS.index(named("layer_norm")), {"rows": 64, "columns": 8192}, torch.float32, architecture)
    backward = next(launch for launch in launches if launch.kernel.__name__ == "norm_backward_kernel")
    row = aot.describe(backward, architecture, True)
    assert row.spill_bytes > 0
    assert not row.ok


def test_exit_code_follows_the_rows(
    rows: list[aot.Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """0 if every binary is in order, 1 if one is not."""
    monkeypatch.setattr(aot, "collect", lambda work, workers: rows[:2])
    assert aot.main([]) == 0
    monkeypatch.setattr(aot, "collect", lambda work, workers: [rows[0], replace(rows[1], spill_bytes=8)])
    assert aot.main([]) == 1
    assert "2 binaries, 1 of which" in capsys.readouterr().out
    assert not replace(rows[0], shared_bytes=rows[0].shared_limit + 1).ok


def test_hash_is_of_the_code_alone() -> None:
    """Comments, blank lines and docstrings may change under a report; a constant, or a string in the code, may not."""
    code = '''"""Module."""\n\nclass A:\n    """Two\n    lines."""\n\n    x = f"a {1}"\n'''
    assert aot.code_lines(code) == ["class A:", '    x = f"a {1}"']
    same = code.replace("Two\n", "Three\n\n").replace("\n\nclass", "\n# why  \nclass").replace("\n", "\r\n")
    assert aot.code_lines(same) == aot.code_lines(code)
    assert aot.code_lines(code.replace("{1}", "{2}")) != aot.code_lines(code)


@pytest.mark.parametrize("triton_version", aot.REPORTED_TRITONS)
def test_committed_reports_are_fresh_and_clean(triton_version: str) -> None:
    """Made from these sources, for every architecture and every kernel; spills where attention is known to."""
    sources, found = aot.read_report(aot.report_path(triton_version))
    remedy = f"run python -m fastlm_kernels.aot --all under Triton {triton_version} and commit what it writes"
    assert sources == aot.source_hash(), remedy
    spilling = [row for row in found if row["spill_bytes"] != "0"]
    assert all(row["kernel"].startswith("attention_") for row in spilling)
    usual = [row for row in spilling if re.fullmatch(USUAL_ATTENTION, row["call"])]
    crowded = [row for row in usual if EVERYTHING in row["call"]]
    assert {(row["architecture"], row["call"]) for row in usual if row not in crowded} <= KNOWN
    assert all(int(row["spill_bytes"]) <= EVERYTHING_SPILLS[triton_version] for row in crowded)
    assert len(spilling) - len(crowded) <= ATTENTION_SPILLS[triton_version]
    assert all(int(row["shared_bytes"]) <= int(row["shared_limit"]) for row in found)
    for architecture in configs.ARCHITECTURES:
        mine = [row for row in found if row["architecture"] == architecture]
        assert {row["call"].split()[0] for row in mine} == {kernel.name for kernel in (*CALLS, *aot.STEPS)}
        assert {row["aligned"] for row in mine} == {"True", "False"}
        for table, name in (
            (configs.NORM_FORWARD, "norm_forward_kernel"),
            (configs.NORM_BACKWARD, "norm_backward_kernel"),
        ):
            for config in table["generic"]:
                tile = f"BLOCK_M={config.block_m} BLOCK_N={config.block_n} "
                assert any(row["kernel"] == name and tile in row["constexprs"] for row in mine)
    assert {row["types"] for row in found} >= {"*bf16 *fp32", "*fp32", "*fp16 *fp32", "*fp32 *bf16"}


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_up_to_8192_stay_in_registers_where_that_does_not_spill(architecture: str, mixed: bool) -> None:
    """LayerNorm's backward reads such rows once on all but the architectures and dtypes that would spill."""
    launches = aot.record(
        CALLS.index(named("layer_norm")), {"rows": 64, "columns": 8192, "mixed": mixed}, torch.bfloat16, architecture
    )
    backward = next(launch for launch in launches if launch.kernel.__name__ == "norm_backward_kernel")
    spills = architecture in ("sm_100", "sm_120") or (mixed and architecture != "gfx942")
    assert backward.constexprs["WHOLE_ROW"] == (not spills)
    assert aot.describe(backward, architecture, True).ok


def test_recording_makes_no_launch_and_ends() -> None:
    """Inside, launches are only noted; afterwards everything is as before, after an error too."""
    with _runtime.recording("sm_80") as launches:
        assert _runtime.architecture(torch.device("cpu")) == "sm_80"
        assert _runtime.choose(torch.ones(2))
    assert launches == []
    with pytest.raises(KeyError), _runtime.recording("sm_80"):
        raise KeyError
    assert _runtime.architecture(torch.device("cpu")) == "generic"
    assert not _runtime.choose(torch.ones(2))


@pytest.fixture(scope="module")
def step_rows() -> list[aot.Row]:
    """The quick report's part for the optimizers."""
    return aot.collect(list(aot.step_jobs(False, ["sm_90"])), workers=1)


def test_optimizer_steps_fit_do_not_spill_and_read_16_bytes(step_rows: list[aot.Row]) -> None:
    """Every class; the loads of the tiles that lie whole on 16-byte boundaries."""
    assert {row.call.split()[0] for row in step_rows} == {step.name for step in STEPS}
    assert {"update_kernel", "symmetric_kernel"} <= {row.kernel for row in step_rows}
    assert [row for row in step_rows if not row.ok] == []
    for row in step_rows:
        assert row.kernel != "update_kernel" or row.loads.startswith("128x"), row
        assert row.kernel != "symmetric_kernel" or row.tensor_core > 0, row


# The matrix products of one tile, (rows, columns, depth) in the names of its sizes, and how often the code holds them:
# of causal queries once for tiles seen whole and once for those at the edge.
PRODUCTS = {
    "attention_forward_kernel": (2, ("M N D", "M E N")),
    "attention_dkdv_kernel": (1, ("N M D", "N M E", "N E M", "N D M")),
    "attention_dq_kernel": (2, ("M N D", "M N E", "M D N")),
}


@pytest.mark.parametrize("columns", [64, 128])
def test_hoppers_products_are_by_warp_groups_and_no_more_than_there_must_be(columns: int) -> None:
    """Every instruction multiplies (64, n, 16) for each warp group: together as much as the tile's products."""
    import triton

    case = {"rows": 4096, "columns": columns, "kv_heads": 2}
    arguments = named("scaled_dot_product_attention").inputs(torch.bfloat16, "meta", 0, **case)
    launches = aot.record_call(named("scaled_dot_product_attention"), arguments, "sm_90")
    found = {launch.kernel.__name__: launch for launch in launches if launch.kernel.__name__ in PRODUCTS}
    assert set(found) == set(PRODUCTS)
    for name, launch in found.items():
        source, options = aot.specialise(launch, "sm_90", True)
        code = triton.compile(source, target=aot._target("sm_90"), options=options.__dict__).asm["ptx"]
        assert "mma.sync" not in code
        instructions = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", code)
        done = sum(int(m) * int(n) * int(k) for m, n, k in instructions) * launch.options["num_warps"] // 4
        times, products = PRODUCTS[name]
        must = sum(math.prod(launch.constexprs[f"BLOCK_{side}"] for side in product.split()) for product in products)
        assert done == times * must, name


def bytes_moved(launch: _runtime.Launch) -> int:
    """Bytes per element that the compiled kernel's loop over whole tiles reads and writes."""
    import triton

    source, options = aot.specialise(launch, "sm_90", True)
    code = triton.compile(source, target=aot._target("sm_90"), options=options.__dict__).asm["ttgir"]
    loop = re.search(r"\n( *)(?:%\S+ = )?scf\.for .*?\n\1}", code, re.S)
    assert loop is not None
    pointers = re.findall(r"tt\.(?:load|store) .*?tensor<\d+x!tt\.ptr<\w*?(\d+)>", loop.group(0))
    return sum(int(bits) // 8 for bits in pointers)


OPTIONS = [
    ("AdamW", {}, torch.float32, 28),
    ("AdamW", {"max_grad_norm": 1.0}, torch.float32, 32),
    ("AdamW", {"skip_nonfinite": True, "zero_grads": True}, torch.float32, 36),
    ("AdamW", {}, torch.bfloat16, 14),
    ("AdamW", {"master_weights": True}, torch.bfloat16, 28),
    ("AdamW", {"stochastic_rounding": True}, torch.bfloat16, 22),
    ("AdamW", {"amsgrad": True}, torch.float32, 36),
    ("SGD", {}, torch.float32, 12),
    ("SGD", {"momentum": 0.9, "zero_grads": True}, torch.float32, 24),
    ("RMSprop", {"momentum": 0.9, "centered": True}, torch.float32, 36),
    ("Adagrad", {}, torch.float32, 20),
    ("Adadelta", {}, torch.bfloat16, 14),
]


@pytest.mark.parametrize(("name", "options", "dtype", "expected"), OPTIONS, ids=str)
def test_a_step_moves_the_bytes_it_must_and_no_more(
    name: str, options: dict[str, Any], dtype: torch.dtype, expected: int
) -> None:
    """The floor, counted by hand, is what the report says and what the binaries do."""
    launches = Step(name, ()).record(options, dtype, "sm_90")
    assert bytes_per_parameter(name, options, dtype) == expected
    assert sum(bytes_moved(launch) for launch in launches if launch.kernel.__name__ != "control_kernel") == expected
