"""Every `auto` and every derived `None` decided once, with the reason in words."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastlm import machine
from fastlm.config import Config, recompute_part
from fastlm.errors import InputError
from fastlm.flops import training_flops
from fastlm.memory import step_memory

# On a CPU a compiled step of the modern family was 7 and 8 % faster, compiling took 11 s, later starts 2 (one thread,
# LOG.md): runs of ten minutes gain. GPT-2's, whose tanh takes as long compiled, was 2 and 3 % slower.
CPU_COMPILE_PAYS_FLOPS = 5e13
CPU_COMPILE_PAYS_SECONDS = 600
MEMORY_SHARE = 0.8  # of the device's memory that a step may plan with


class Fastest(NamedTuple):
    """The attention measured fastest in training on a device, and what says so."""

    attention: Literal["triton", "sdpa", "flash"]
    record: str


# By the device's name. A device enters with a record under bench/results; none has been measured yet.
FASTEST_ATTENTION: dict[str, Fastest] = {}


def resolve(cfg: Config, device: torch.device, vocab_size: int, steps: int | None) -> tuple[Config, list[str]]:
    """A copy of `cfg` without `auto` or derived `None`s, and one line for each decision worth knowing.

    `steps` is the length in updates, None under a time limit.
    """
    cfg = deepcopy(cfg)
    cfg.device = device.type  # type: ignore[assignment]
    resolve_model(cfg)
    notes = []
    cfg.train.precision, note = _precision(cfg, device)
    notes.append(note)
    cfg.model.kernels, note = _kernels(cfg, device)
    notes.append(note)
    cfg.model.attention, note = _attention(cfg, device)
    notes.append(note)
    cfg.train.compile, note = _compile(cfg, device, training_flops(cfg, vocab_size, steps))
    notes.append(note)
    if cfg.train.check_compile and not cfg.train.compile:
        notes.append("check_compile: nothing to compare, this run compiles nothing")
    cfg.train.cuda_graphs, note = _cuda_graphs(cfg, device)
    notes.append(note)
    cfg.train.recompute = recompute_part(cfg.train.recompute)
    if not isinstance(cfg.train.micro_batch_size, int):
        cfg.train.micro_batch_size, note = _micro_batch_size(cfg, device, vocab_size)
        notes.append(note)
    return cfg, notes


def resolve_model(cfg: Config) -> None:
    """Fill in what follows from the family and the data; needs no device."""
    model, modern = cfg.model, cfg.model.family == "modern"
    model.n_kv_head = model.n_kv_head or model.n_head
    model.max_seq_len = model.max_seq_len or cfg.data.seq_len
    if model.tie_embeddings is None:
        model.tie_embeddings = not modern
    if model.logit_softcap is None:
        model.logit_softcap = 15.0 if modern else 0.0


def _precision(cfg: Config, device: torch.device) -> tuple[Literal["fp32", "bf16"], str]:
    if cfg.train.precision != "auto":
        return cfg.train.precision, f"precision: {cfg.train.precision} as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "precision: bf16 activations over fp32 parameters"
    return "fp32", f"precision: fp32 on {device.type}"


def _kernels(cfg: Config, device: torch.device) -> tuple[Literal["triton", "torch"], str]:
    import fastlm_kernels as fk

    with fk.backend("triton"):
        explanation = fk.explain(fk.rms_norm, torch.empty(1, 8, device=device), (8,))
    runs, why = explanation.path == "triton", explanation.reason
    if runs and device.type == "cuda" and (missing := _missing_compiler(device)):
        runs, why = False, missing
    if cfg.model.kernels == "triton" and not runs:
        raise InputError("--model.kernels", "triton", f"{why}; use auto or torch")
    if cfg.model.kernels == "torch" or not runs:
        reason = "as asked" if cfg.model.kernels == "torch" else why
        return "torch", f"kernels: PyTorch's ops ({reason})"
    if cfg.model.kernels == "auto" and device.type == "cpu":
        return (
            "torch",
            "kernels: PyTorch's ops (the interpreter is for tests; --model.kernels triton asks for it)",
        )
    return "triton", "kernels: fastlm's Triton kernels where one exists, else PyTorch's ops"


def _attention(cfg: Config, device: torch.device) -> tuple[Literal["triton", "sdpa", "flash"], str]:
    """`cfg.model.kernels` is resolved."""
    asked, reason = cfg.model.attention, "as asked"
    if asked == "auto":
        asked, reason = _open_attention(cfg, device)
    elif obstacle := _attention_obstacle(asked, cfg, device):
        raise InputError("--model.attention", asked, f"{obstacle}; use auto or sdpa")
    what = {"triton": "fastlm's Triton kernel", "flash": "flash-attn", "sdpa": "PyTorch's scaled_dot_product_attention"}
    if cfg.model.dropout > 0:
        what["sdpa"] = "PyTorch's operators one by one, every weight held (its fused ones seed no dropout by sample)"
    return asked, f"attention: {what[asked]}, {reason}"


def _open_attention(cfg: Config, device: torch.device) -> tuple[Literal["triton", "sdpa", "flash"], str]:
    """What `auto` means: the fastest measured, if this run can use it; else ours, whose runs repeat bit for bit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    fastest = FASTEST_ATTENTION.get(name)
    ours = _attention_obstacle("triton", cfg, device) is None
    if ours and cfg.model.dropout > 0:
        return "triton", "which seeds dropout by sample and holds no weights"
    if fastest is None:
        unknown = f"none measured on this {name} yet"
        return ("triton", f"whose gradients repeat bit for bit ({unknown})") if ours else ("sdpa", unknown)
    if obstacle := _attention_obstacle(fastest.attention, cfg, device):
        return "sdpa", f"the fastest measured on {name} is {fastest.attention}, but {obstacle}"
    return fastest.attention, f"the fastest measured on {name}, {fastest.record}"


def _attention_obstacle(attention: str, cfg: Config, device: torch.device) -> str | None:
    """Why this run cannot use `attention`, None if it can."""
    if attention == "triton" and cfg.model.kernels == "torch":
        return f"no Triton kernels in this run on {device.type}"
    if attention != "flash":
        return None
    if cfg.model.dropout > 0:
        return "flash-attn's dropout takes no seed of each sample"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'fastlm[flash]')"
    if device.type != "cuda" or cfg.train.precision != "bf16":
        return f"flash-attn computes in bf16 on a GPU, this run in {cfg.train.precision} on {device.type}"
    return None


def _cuda_graphs(cfg: Config, device: torch.device) -> tuple[bool, str]:
    """`cfg.model.kernels` is resolved: PyTorch's optimizers read a flag on the host, which no graph can hold."""
    obstacle = None
    if device.type != "cuda":
        obstacle = f"not on {device.type}"
    elif cfg.model.kernels == "torch":
        obstacle = "not with PyTorch's optimizers"
    if cfg.train.cuda_graphs is True and obstacle:
        raise InputError("--train.cuda_graphs", "true", f"{obstacle}; use auto")
    if cfg.train.cuda_graphs is False or obstacle:
        return False, f"CUDA graphs: off ({obstacle or 'as asked'})"
    return True, "CUDA graphs: on (the step is recorded once and replayed)"


def _compile(cfg: Config, device: torch.device, flops: float) -> tuple[bool, str]:
    missing = _missing_compiler(device)
    if cfg.train.compile is True and missing:
        raise InputError("--train.compile", "true", f"{missing}; install one or use auto")
    if cfg.train.compile != "auto":
        return bool(cfg.train.compile), f"compile: {'on' if cfg.train.compile else 'off'} as asked"
    if missing:
        return False, f"compile: off ({missing})"
    if device.type == "cuda":
        return True, "compile: on (torch.compile of forward and backward)"
    if device.type == "mps":
        return False, "compile: off (not on mps)"
    if cfg.model.family == "gpt2":
        return False, "compile: off (on a CPU compiled code was no faster for this family)"
    limit = cfg.train.max_seconds
    if (limit < CPU_COMPILE_PAYS_SECONDS) if limit is not None else (flops < CPU_COMPILE_PAYS_FLOPS):
        return False, "compile: off (a CPU run of this length ends before compilation would pay)"
    return True, "compile: on (this run is long enough to pay for compilation)"


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, None if nothing."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or "g++"
        return None if shutil.which(compiler) or shutil.which("clang++") else "no C++ compiler found"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        # Triton builds its launchers with these at their first use.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler found"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "Python's C headers (python3-dev) are not installed"
    return None


def _micro_batch_size(cfg: Config, device: torch.device, vocab_size: int) -> tuple[int, str]:
    """The largest divisor of the batch whose estimated memory fits; the whole batch where memory is not known."""
    batch_size = cfg.train.batch_size
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = machine.memory()
    if free is None:
        return batch_size, f"micro-batch: {batch_size} (this machine does not say how much memory it has)"
    for size in range(batch_size, 0, -1):
        if batch_size % size:
            continue
        cfg.train.micro_batch_size = size
        needed = step_memory(cfg, vocab_size).peak
        if needed <= MEMORY_SHARE * free:
            what = f"an estimated {needed / 2**30:.2f} of {free / 2**30:.1f} GiB free"
            return size, f"micro-batch: {size} of {batch_size} sequences ({what})"
    return 1, f"micro-batch: 1 (even that is estimated not to fit {free / 2**30:.1f} GiB; try --train.recompute block)"
