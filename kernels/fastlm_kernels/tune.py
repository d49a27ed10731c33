"""Find the fastest configurations on this machine's GPU and write them into the tables.

    python -m fastlm_kernels.tune                    every table, bucket by bucket: minutes to an hour
    python -m fastlm_kernels.tune --table NORM_BACKWARD --table SOFTMAX_FORWARD
    python -m fastlm_kernels.tune --show sm_90       print the tables that an architecture uses; needs no GPU

For each bucket of a table: the tiles around the present one that compile without a spill and pass the accuracy rule are
timed on tensors far larger than any cache, by CUDA-graph replay, and the fastest takes the place if it is at least 3 %
faster. A tile of attention serves other calls than the one that is timed: it takes the place only if windows, masks,
soft-cap, dropout and packed documents pass as well. Every answer is written to `tuned.json` beside this file as it
comes, so that a run may be stopped at any time; `configs` reads that file when it is imported. Commit it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from . import _runtime, aot, configs
from .accuracy import leaves_of, outputs_of, upstream_gradients
from .check import check_kernel
from .configs import AttentionConfig, ElementwiseConfig
from .registry import KERNELS, Case, Kernel
from .registry.attention import PACKED

_LEAST_GAIN = 0.03
_TENSOR_BYTES = 256 << 20  # five times an H200's cache
_CHECKED_ROWS = 64
_CHECKED_POSITIONS = 1024  # of attention: four of the longest tiles that are tried, so that pipelines fill
_LONGEST_SECONDS = 120  # that a check in a process of its own may take, imports and compiler included


@dataclass(frozen=True)
class Subject:
    """A table of `configs`, and the call whose time decides about it.

    timed     the forward, the backward, both where one table serves both, or the forward of a call that will be
              differentiated
    case      options of that call; rows and columns follow from the bucket, unless given
    """

    table: str
    kernel: str
    timed: Literal["forward", "backward", "both", "forward for gradients"]
    case: Case = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


_HEADS: Case = {"rows": 4096, "batch": 4, "heads": 16, "kv_heads": 16}
_FEW_HEADS: Case = {**_HEADS, "rows": 1024}

SUBJECTS = (
    Subject("NORM_FORWARD", "rms_norm", "forward"),
    Subject("NORM_BACKWARD", "rms_norm", "backward"),
    Subject("NORM_BACKWARD_BIAS", "layer_norm", "backward"),
    Subject("NORM_BACKWARD_BIAS_MIXED", "layer_norm", "backward", {"mixed": True}),
    Subject("LONG_ROW", "rms_norm", "both", {"columns": 32768}),
    Subject("NORM_WEIGHT_GRADIENT", "rms_norm", "backward", {"columns": 32768}),
    Subject("SOFTMAX_FORWARD", "softmax", "forward"),
    Subject("SOFTMAX_BACKWARD", "softmax", "backward"),
    Subject("CROSS_ENTROPY", "cross_entropy", "both"),
    Subject("CROSS_ENTROPY_LONG", "cross_entropy", "both", {"columns": 50304}),
    # So narrow that the matrix products are cheap beside the rows of logits.
    Subject(
        "CROSS_ENTROPY_LONG_GRADIENT",
        "linear_cross_entropy",
        "forward for gradients",
        {"rows": 16384, "columns": 64, "classes": 50304},
    ),
    Subject("ROTARY", "rotary_embedding", "both", {"batch": 8, "heads": 12, "kv_heads": 12}),
    Subject("ROTARY_INTERLEAVED", "rotary_embedding", "both", {"batch": 8, "heads": 12, "interleaved": True}),
    Subject("ELEMENTWISE", "silu", "both", {"columns": 4096}),
    Subject("ATTENTION_FORWARD", "scaled_dot_product_attention", "forward", _HEADS),
    Subject("ATTENTION_DKDV", "scaled_dot_product_attention", "backward", _HEADS),
    Subject("ATTENTION_ONE_PASS", "scaled_dot_product_attention", "backward", {**_HEADS, "one_pass": True}),
    Subject("ATTENTION_DQ", "scaled_dot_product_attention", "backward", _HEADS),
    Subject("ATTENTION_FP32", "scaled_dot_product_attention", "both", _FEW_HEADS, torch.float32),
    Subject("ATTENTION_DQ_FP32", "scaled_dot_product_attention", "backward", _FEW_HEADS, torch.float32),
    Subject(
        "ATTENTION_DECODE",
        "scaled_dot_product_attention",
        "forward",
        {**_HEADS, "rows": 1, "keys": 32768, "causal": False},
    ),
)


# What a tile of attention serves beside the call that is timed.
_SWITCHES: tuple[Case, ...] = (
    {"causal": False},
    {"window": (300, 100), "causal": False, "align": "bottom_right"},
    {"softcap": 20.0},
    {"padded": True, "causal": False},
    {"masked": (0, 1), "causal": False},
    {"lse": True},
    {"dropout": 0.2},
    {"kv_heads": 1},
)


def kernel_named(name: str) -> Kernel:
    """The registry's kernel of that name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)


def candidates(config: Any, loops: bool) -> Iterator[Any]:
    """The tiles around `config`: half and twice the size, the warps and, where the kernel `loops`, other depths."""
    if getattr(config, "loads", "").startswith("gluon"):
        # Its tile and its warps belong together; with one stage K would wait for V.
        yield from (replace(config, num_stages=stages) for stages in (2, 3, 4))
        return
    size = "tile_bytes" if isinstance(config, ElementwiseConfig) else "block_m"
    for factor, warps in itertools.product((0.5, 1, 2), repeat=2):
        changes = {size: int(getattr(config, size) * factor), "num_warps": int(config.num_warps * warps)}
        specialized = getattr(config, "loads", None) == "specialized" and warps != 1
        if changes[size] >= 1 and 1 <= changes["num_warps"] <= 32 and not specialized:
            for stages in (1, 2, 3, 4) if loops else (None,):
                yield replace(config, **changes, **({} if stages is None else {"num_stages": stages}))


def descriptor_candidates(present: AttentionConfig) -> Iterator[AttentionConfig]:
    """Tiles by descriptors: the present one, and those that the compiler gives a loading warp group of its own."""
    yield replace(present, loads="descriptors")
    for queries, keys, stages in ((128, 64, 3), (128, 64, 2), (128, 128, 2), (64, 128, 2)):
        yield AttentionConfig(present.head_dim, queries, keys, 4, stages, "specialized")


def gluon_candidates(present: AttentionConfig) -> Iterator[AttentionConfig]:
    """The tiles of attention's forward in Gluon for heads of just so many channels; for sm_90."""
    return (config for config in configs.ATTENTION_GLUON if config.head_dim == present.head_dim)


def bucket_case(subject: Subject, config: Any, kernel: Kernel) -> Case:
    """The call that lands in the bucket of `config`, with tensors of about `_TENSOR_BYTES`."""
    columns = config.head_dim if isinstance(config, AttentionConfig) else getattr(config, "block_n", None)
    one = {"columns": columns, **subject.case, "rows": 1}
    rows = max(_CHECKED_ROWS, _TENSOR_BYTES // max(1, kernel.traffic(one, subject.dtype, False) // 2))
    return {**one, "rows": subject.case.get("rows", rows)}


def spills(subject: Subject, case: Case, architecture: str) -> bool:
    """Whether a binary of this call spills, does not fit or does not compile, under the tables as they are."""
    kernel = kernel_of(subject, case)
    launches = aot.record_call(kernel, kernel.inputs(subject.dtype, "meta", 0, **case), architecture)
    try:
        return not all(aot.describe(launch, architecture, True).ok for launch in launches)
    except RuntimeError:  # warp specialisation of a tile that the compiler cannot cut
        return True


def accurate(subject: Subject, case: Case) -> bool:
    """Whether the call meets the accuracy rule, on a few of its rows."""
    few = checked_case(subject, case)
    return all(error.ok for error in check_kernel(kernel_of(subject, case), few, subject.dtype, "cuda"))


def kernel_of(subject: Subject, case: Case) -> Kernel:
    """The function that the case is a call of."""
    return PACKED if "documents" in case else kernel_named(subject.kernel)


def served_cases(subject: Subject, case: Case) -> Iterator[Case]:
    """The calls beside the timed one that the same tile serves: of attention one a switch, and packed documents."""
    if not subject.table.startswith("ATTENTION"):
        return
    few = checked_case(subject, case)
    yield from ({**few, **switch} for switch in _SWITCHES)
    if few["rows"] > 1:
        kept = {name: few[name] for name in ("rows", "columns", "heads", "one_pass") if name in few}
        yield {**kept, "documents": 3}


def checked_case(subject: Subject, case: Case) -> Case:
    """A few rows of the call that is timed; of attention fewer heads instead, and so many rows that its loops loop."""
    if not subject.table.startswith("ATTENTION") or case["rows"] == 1:
        return {**case, "rows": min(case["rows"], _CHECKED_ROWS)}
    if "documents" in case:
        return {**case, "rows": _CHECKED_POSITIONS}
    return {**case, "rows": _CHECKED_POSITIONS, "batch": 1, "heads": 2, "kv_heads": min(2, case.get("kv_heads", 2))}


def milliseconds(subject: Subject, case: Case) -> float:
    """Device time of what the subject times."""
    kernel = kernel_named(subject.kernel)
    generator = torch.Generator("cuda").manual_seed(0)
    arguments = kernel.inputs(subject.dtype, "cuda", generator, **case)
    taken = 0.0
    if subject.timed != "backward":
        with torch.set_grad_enabled(subject.timed == "forward for gradients"):
            taken += _median_milliseconds(lambda: kernel.fused(**arguments))
    if subject.timed in ("backward", "both"):
        leaves = list(leaves_of(arguments).values())
        upstream = upstream_gradients(kernel.fused, arguments, generator)
        torch.cuda.synchronize()  # the new stream waits for nobody
        # Captured on the stream of the forward: autograd replays a node on the stream that recorded it.
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = outputs_of(kernel.fused, arguments)
            taken += _median_milliseconds(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))
    return taken


def _median_milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()  # it runs on a stream of its own, which does not wait for what made the inputs
    taken = do_bench_cudagraph(run, return_mode="median")
    assert isinstance(taken, float)
    return taken


def survives(config: AttentionConfig, table: str, architecture: str, case: Case) -> bool:
    """Whether the call ends, and is accurate, with this configuration, in a process of its own.

    Barriers set by hand may hang, or a fault take the GPU from the process: not from this one.
    """
    order = json.dumps([asdict(config), table, architecture, case])
    code = f"from {__package__} import tune; tune.try_alone({order!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=_LONGEST_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def try_alone(order: str) -> None:
    """What `survives` starts: raises if the call is not accurate."""
    config, table, architecture, case = json.loads(order)
    subject = next(subject for subject in SUBJECTS if subject.table == table)
    with configs.trying(table, architecture, (AttentionConfig(**config),)):
        if not accurate(subject, case):
            raise ValueError(f"not accurate: {config} on {case}")


@dataclass(frozen=True)
class Trial:
    """How a candidate is judged: spills(subject, case, architecture), accurate(subject, case), milliseconds(same).

    survives  the same as `accurate`, of attention's forward in Gluon, before anything of it runs in this process
    """

    spills: Callable[[Subject, Case, str], bool] = spills
    accurate: Callable[[Subject, Case], bool] = accurate
    milliseconds: Callable[[Subject, Case], float] = milliseconds
    survives: Callable[[AttentionConfig, str, str, Case], bool] = survives


def serves(config: Any, present: Any, subject: Subject, case: Case, architecture: str, trial: Trial) -> bool:
    """Whether `config`, in its table, gives right results on every call beside the timed one, from binaries that fit.

    The present one may spill there.
    """
    for other in served_cases(subject, case):
        if untried(config, present):
            # Windows and the soft-cap have binaries of their own, which may hang as well.
            right = trial.survives(config, subject.table, architecture, other)
        else:
            right = trial.accurate(subject, other)
        if not right or (config != present and trial.spills(subject, other, architecture)):
            return False
    return True


def untried(config: Any, present: Any) -> bool:
    """Whether it is attention's forward in Gluon, of which nothing may run in this process unseen."""
    return config != present and getattr(config, "loads", "").startswith("gluon")


def tune_bucket(subject: Subject, index: int, architecture: str, trial: Trial) -> tuple[Any, str]:
    """(the configuration to use in bucket `index`, a line that says what was seen); the table is left as it was."""
    table = configs.rows_of(subject.table, architecture)
    present, case = table[index], bucket_case(subject, table[index], kernel_named(subject.kernel))
    seen: dict[Any, float] = {}
    tried = candidates(present, "BACKWARD" in subject.table or isinstance(present, AttentionConfig))
    if subject.table == "ATTENTION_FORWARD" and architecture in configs.WITH_TENSOR_MEMORY_ACCELERATOR:
        tried = itertools.chain(tried, descriptor_candidates(present))
    if subject.table == "ATTENTION_FORWARD" and architecture == "sm_90":
        tried = itertools.chain(tried, gluon_candidates(present))
    # The present one first, so that all others have something to beat.
    for config in dict.fromkeys((present, *tried)):
        if untried(config, present) and not trial.survives(config, subject.table, architecture, case):
            continue
        with configs.trying(subject.table, architecture, (*table[:index], config, *table[index + 1 :])):
            if not trial.spills(subject, case, architecture) and trial.accurate(subject, case):
                seen[config] = trial.milliseconds(subject, case)
    # The present one has a start, and the fastest that serves every call wins.
    order = sorted(seen, key=lambda config: seen[config] * (1 - _LEAST_GAIN if config == present else 1))
    best = present
    for config in order:
        with configs.trying(subject.table, architecture, (*table[:index], config, *table[index + 1 :])):
            if serves(config, present, subject, case, architecture, trial):
                best = config
                break
    gain = f"{seen[best]:.4f} ms, was {seen[present]:.4f}" if present in seen and best in seen else "nothing ran"
    return best, f"{subject.table} {subject.kernel} columns {case['columns']}: {best} ({gain}, {len(seen)} tried)"


def tune(tables: list[str], architecture: str, device_name: str, trial: Trial) -> None:
    """Tune the named tables, all if none is, on this GPU; print a line a bucket and write each answer at once."""
    for subject in SUBJECTS:
        if tables and subject.table not in tables:
            continue
        for index in range(len(configs.rows_of(subject.table, architecture))):
            best, line = tune_bucket(subject, index, architecture, trial)
            rows = configs.rows_of(subject.table, architecture)
            configs.save(subject.table, architecture, (*rows[:index], best, *rows[index + 1 :]), device_name)
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Tune, or show the tables; 2 where there is no GPU to tune on."""
    parser = argparse.ArgumentParser(prog="python -m fastlm_kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--table", action="append", default=[], choices=[subject.table for subject in SUBJECTS])
    parser.add_argument("--show", choices=(*configs.ARCHITECTURES, "generic"), metavar="ARCHITECTURE")
    options = parser.parse_args(argv)
    if options.show:
        sys.stdout.write(configs.describe(options.show))
        return 0
    if not torch.cuda.is_available() or not _runtime.HAS_TRITON or _runtime.INTERPRETED:
        sys.stderr.write("error: tune: no GPU that Triton can use here; run it on one, or --show the tables\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    tune(options.table, _runtime.architecture(device), torch.cuda.get_device_name(device), Trial())
    return 0


if __name__ == "__main__":
    sys.exit(main())
