"""Compile kernels ahead of time and report what they use; needs no GPU.

    python -m fastlm_kernels.aot                 one size of each kernel for sm_89 and sm_90
    python -m fastlm_kernels.aot --arch sm_80    ... for other architectures (may be repeated)
    python -m fastlm_kernels.aot --all           every shipped configuration for every supported architecture, in bf16
                                                 on and off 16-byte boundaries and in fp32 on them, parameters of
                                                 another dtype in the widest tiles, fp16 at one size; writes
                                                 aot_report_triton_X.Y.csv of the installed Triton beside this file

A binary's line says which call it belongs to, the bytes which that call, forward and backward, must move at the least,
and the widths of the binary's loads. What is compiled is what would run: the registry's public functions are called on
tensors without data, forward and backward, their launches are recorded and specialised by Triton's own launcher code,
once with pointers on 16-byte boundaries and once without (alignment decides how wide the loads are). Exit code 1 if a
kernel spills registers or needs more shared memory than its architecture has.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _runtime, configs
from .check import leaves_of, outputs_of
from .optim.steps import STEPS
from .registry import CALLS, Arguments, Case, Kernel, case_name, modules_of

REPORTED_TRITONS = ("3.6", "3.7")
QUICK_ARCHITECTURES = ("sm_89", "sm_90")
_KB = 1024
# Shared memory one program may use.
SHARED_LIMIT = {
    "sm_80": 163 * _KB,
    "sm_86": 99 * _KB,
    "sm_89": 99 * _KB,
    "sm_90": 227 * _KB,
    "sm_100": 227 * _KB,
    "sm_120": 99 * _KB,
    "gfx942": 64 * _KB,
}
_MOST_THREADS = 1024  # of one program
# What attention's forward in Gluon does not cover, or repeats.
_IN_TRITON = {"padded", "masked", "one_pass", "keys", "dropout", "lse"}
_STEP_MODULES = ("_eight_bits", "_muon_plan", "_plan", "_symmetric", "_update", "steps")
_SHARED_MODULES = ("aot", "configs", "registry", "_math", "_rows", "_runtime")
_ALIGNED, _UNALIGNED = 1 << 20, (1 << 20) + 4


@dataclass(frozen=True)
class Row:
    """One binary: whose, which, and what it uses.

    call        the public function and the case that launch it
    call_bytes  the least that this call, forward and backward, must move
    loads       global loads by width in bits, "128x3 32x1"
    """

    call: str
    call_bytes: int
    kernel: str
    architecture: str
    types: str
    aligned: bool
    constexprs: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    loads: str
    tensor_core: int

    @property
    def ok(self) -> bool:
        """No spills; shared memory within the architecture's limit, threads within every architecture's."""
        threads = self.num_warps * (64 if self.architecture.startswith("gfx") else 32)
        return self.spill_bytes == 0 and self.shared_bytes <= self.shared_limit and threads <= _MOST_THREADS


@dataclass(frozen=True)
class Job:
    """One registry kernel on one case, dtype, architecture and alignment.

    trial  a configuration of attention's forward that no table holds: its binary alone
    """

    kernel: int
    case: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    architecture: str
    aligned: bool
    trial: configs.AttentionConfig | None = None


@dataclass(frozen=True)
class _Pointer:
    """Stands for a device tensor where the launcher asks for its type and address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def record(kernel_index: int, case: Case, dtype: torch.dtype, architecture: str) -> list[_runtime.Launch]:
    """The launches of one registry kernel's forward and backward, or of an optimizer's step, made on no device."""
    if kernel_index >= len(CALLS):
        return STEPS[kernel_index - len(CALLS)].record(case, dtype, architecture)
    kernel = CALLS[kernel_index]
    return record_call(kernel, kernel.inputs(dtype, "meta", 0, **case), architecture)


def record_call(kernel: Kernel, arguments: Arguments, architecture: str) -> list[_runtime.Launch]:
    """The launches of one call, forward and backward."""
    with _runtime.recording(architecture) as launches:
        outputs = outputs_of(kernel.fused, arguments)
        leaves = list(leaves_of(arguments).values())
        torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    return launches


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def specialise(launch: _runtime.Launch, architecture: str, aligned: bool) -> tuple[Any, Any]:
    """(source, options) of this launch's binary: types, constants and alignment as Triton's launcher sees them."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(architecture))
    fn, address = launch.kernel, _ALIGNED if aligned else _UNALIGNED
    arguments = [_Pointer(a.dtype, address) if isinstance(a, Tensor) else a for a in launch.arguments]
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    settings = {**launch.options, "debug": False}
    bound, specialization, rest = binder(*arguments, **launch.constexprs, **settings)
    options, signature, constexprs, attributes = fn._pack_args(backend, rest, bound, specialization, rest)
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    return ASTSource(fn, signature, constexprs, attributes), options


def describe(launch: _runtime.Launch, architecture: str, aligned: bool, call: str = "", call_bytes: int = 0) -> Row:
    """Compile one launch and read off what the binary uses."""
    import triton

    source, options = specialise(launch, architecture, aligned)
    compiled = triton.compile(source, target=_target(architecture), options=options.__dict__)
    amd = architecture.startswith("gfx")
    registers, spills, shared = _amd_usage(compiled) if amd else _nvidia_usage(compiled)
    code = compiled.asm["amdgcn" if amd else "ptx"]
    tensor_core = r"\bv_mfma" if amd else r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
    switches = " ".join(f"{k}={v}" for k, v in launch.constexprs.items())
    types = " ".join(dict.fromkeys(t for t in source.signature.values() if t.startswith("*")))
    return Row(
        call,
        call_bytes,
        launch.kernel.__name__,
        architecture,
        types,
        aligned,
        switches,
        launch.options["num_warps"],
        registers,
        spills,
        shared,
        SHARED_LIMIT[architecture],
        _load_widths(code, amd),
        len(re.findall(tensor_core, code)),
    )


def _nvidia_usage(compiled: Any) -> tuple[int, int, int]:
    """(registers, bytes of stack, bytes of shared memory) from the binary itself."""
    from triton.backends import nvidia

    tool = Path(inspect.getfile(nvidia)).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # Triton asks for shared memory at launch, so the binary's own figure does not hold it.
    return usage["REG"], usage["STACK"] + usage["LOCAL"], max(usage["SHARED"], compiled.metadata.shared)


def _amd_usage(compiled: Any) -> tuple[int, int, int]:
    """(vector registers, bytes of scratch, bytes of shared memory) from the code object's metadata."""

    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))  # type: ignore[union-attr]

    spills = value("private_segment_fixed_size")
    return value("vgpr_count"), spills, max(value("group_segment_fixed_size"), compiled.metadata.shared)


def _load_widths(code: str, amd: bool) -> str:
    """Global loads by width in bits, widest first: "128x3 32x1"."""
    widths: Counter[int] = Counter()
    if amd:
        bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
        for size in re.findall(r"\b(?:global|buffer)_load_(?:d16_hi_|d16_)?(\w+?)(?:_d16\w*)?\s", code):
            widths[bits.get(size.removesuffix("_d16"), 16)] += 1
    else:
        for vector, size in re.findall(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b", code):
            widths[int(vector or 1) * int(size)] += 1
    return " ".join(f"{width}x{count}" for width, count in sorted(widths.items(), reverse=True))


def jobs(every: bool, architectures: Iterable[str]) -> Iterator[Job]:
    """What to compile: each kernel's last quick case, or its cases for every shipped configuration."""
    variants = [(torch.bfloat16, True), (torch.bfloat16, False)] + [(torch.float32, True)] * every
    for index, kernel in enumerate(CALLS):
        for architecture in architectures:
            for case in kernel.compiled if every else kernel.quick[-1:]:
                for dtype, aligned in variants:
                    if not aligned and kernel.realigns:
                        continue
                    yield Job(index, tuple(case.items()), dtype, architecture, aligned)
            if every:
                yield Job(index, tuple(kernel.quick[-1].items()), torch.float16, architecture, True)


def step_jobs(every: bool, architectures: Iterable[str]) -> Iterator[Job]:
    """The same for the optimizers' steps, which find their tensors, and whether they are aligned, by themselves."""
    for index, step in enumerate(STEPS, len(CALLS)):
        for architecture in architectures:
            for case in step.compiled if every else step.quick:
                for dtype in (torch.bfloat16, torch.float32):
                    yield Job(index, tuple(case.items()), dtype, architecture, True)


def trial_jobs(every: bool, architectures: Iterable[str]) -> Iterator[Job]:
    """Attention's forward in Gluon, which `tune` tries on sm_90: each tile, or the first of each head dimension."""
    index, kernel = next((i, k) for i, k in enumerate(CALLS) if k.name == "scaled_dot_product_attention")
    tiles = [config for config in configs.ATTENTION_GLUON if config.loads == "gluon"]
    for config in tiles if every else {c.head_dim: c for c in reversed(tiles)}.values():
        cases = [case for case in kernel.compiled if case["columns"] == config.head_dim and not set(case) & _IN_TRITON]
        for case in (cases if every else cases[:1]) if "sm_90" in architectures else ():
            yield Job(index, tuple(case.items()), torch.bfloat16, "sm_90", True, config)


def run(job: Job) -> list[Row]:
    """The report's rows for one job."""
    kernel, case = (*CALLS, *STEPS)[job.kernel], dict(job.case)
    call = f"{kernel.name} {case_name(case)} {str(job.dtype).removeprefix('torch.')}"
    least = sum(kernel.traffic(case, job.dtype, backward) for backward in (False, True))
    if job.trial is None:
        launches = record(job.kernel, case, job.dtype, job.architecture)
    else:
        with configs.trying("ATTENTION_FORWARD", job.architecture, (job.trial,)):
            launches = record(job.kernel, case, job.dtype, job.architecture)[:1]
    return [describe(launch, job.architecture, job.aligned, call, least) for launch in launches]


def code_lines(source: str) -> list[str]:
    """The lines of `source` without blank lines, lines of comment and docstrings; the same under every Python."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            left_out.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    numbered = ((number, line.rstrip()) for number, line in enumerate(source.splitlines(), 1))
    return [line for number, line in numbered if number not in left_out and line and line.lstrip()[0] != "#"]


def source_hash() -> str:
    """SHA-256 of what decides the binaries: the kernel modules, the registry and the tables, by `code_lines`."""
    modules = {module.__name__ for kernel in CALLS for module in kernel.modules}
    modules |= {f"{__package__}.optim.{name}" for name in _STEP_MODULES}
    modules |= {module.__name__ for name in _SHARED_MODULES for module in modules_of(f"{__package__}.{name}")}
    digest = hashlib.sha256()
    for name in sorted(modules):
        # The text, not a dump of its syntax tree: what a dump looks like changes with the version of Python.
        lines = code_lines(inspect.getsource(importlib.import_module(name)))
        digest.update("\n".join(lines).encode())
    if configs.TUNED.exists():
        digest.update(configs.TUNED.read_bytes())
    return digest.hexdigest()


def report_path(triton_version: str) -> Path:
    """Where the committed report of a Triton version, "3.7" or "3.7.1", lies."""
    return Path(__file__).with_name(f"aot_report_triton_{'.'.join(triton_version.split('.')[:2])}.csv")


def write_report(rows: Iterable[Row], path: Path) -> None:
    """The report as CSV; its first line names the sources and the compiler that it describes."""
    import triton

    with path.open("w", newline="") as file:
        file.write(f"# sources {source_hash()} triton {triton.__version__}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_report(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(hash of the sources, rows) of a report."""
    with path.open(newline="") as file:
        words = file.readline().split()
        return words[2], list(csv.DictReader(file))


def collect(work: list[Job], workers: int) -> list[Row]:
    """Rows of all jobs in order, each binary once, under the first call that launches it."""
    if workers == 1:
        found = [run(job) for job in work]
    else:
        with ProcessPoolExecutor(workers) as pool:
            found = list(pool.map(run, work))
    binaries: dict[Row, Row] = {}
    for row in (row for rows in found for row in rows):
        binaries.setdefault(replace(row, call="", call_bytes=0), row)
    return list(binaries.values())


def main(argv: list[str] | None = None) -> int:
    """Compile, print one line a binary; 1 if one spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m fastlm_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--all", action="store_true", help="every configuration, every architecture")
    parser.add_argument("--arch", action="append", choices=configs.ARCHITECTURES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    options = parser.parse_args(argv)
    if not _runtime.HAS_TRITON or _runtime.INTERPRETED:
        parser.exit(1, "Triton is missing or interprets: install it and unset TRITON_INTERPRET\n")
    architectures = options.arch or (configs.ARCHITECTURES if options.all else QUICK_ARCHITECTURES)
    work = [job for kind in (jobs, step_jobs, trial_jobs) for job in kind(options.all, architectures)]
    rows = collect(work, options.workers)
    for row in rows:
        values = (f"{k}={v}" for k, v in asdict(row).items() if k != "constexprs")
        sys.stdout.write(f"{'ok  ' if row.ok else 'FAIL'} {' '.join(values)} [{row.constexprs}]\n")
    failures = sum(not row.ok for row in rows)
    sys.stdout.write(f"{len(rows)} binaries, {failures} of which spill or do not fit\n")
    if options.all and not options.arch:
        import triton

        write_report(rows, report_path(triton.__version__))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
