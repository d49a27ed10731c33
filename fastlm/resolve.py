"""Every `auto` and every derived `None` decided once, with the reason in words."""

from __future__ import annotations

import os
import shutil
import sysconfig
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch

from fastlm.config import Config
from fastlm.errors import InputError
from fastlm.flops import memory_bytes, training_flops

# On a CPU a compiled step was 9 and 16 % faster, compiling took 11 s (one thread, LOG.md): runs of ten minutes gain.
CPU_COMPILE_PAYS_FLOPS = 5e13
CPU_COMPILE_PAYS_SECONDS = 600
MEMORY_SHARE = 0.8  # of the device's memory that a step may plan with


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
    if cfg.train.micro_batch_size is None:
        cfg.train.micro_batch_size = _micro_batch_size(cfg, device, vocab_size)
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


def _attention(cfg: Config, device: torch.device) -> tuple[Literal["triton", "sdpa"], str]:
    """`cfg.model.kernels` is resolved. PyTorch's unless asked otherwise: no device's speeds are on record yet."""
    if cfg.model.attention != "triton":
        return "sdpa", "attention: PyTorch's scaled_dot_product_attention"
    if cfg.model.kernels == "torch":
        raise InputError(
            "--model.attention", "triton", f"no Triton kernels in this run on {device.type}; use auto or sdpa"
        )
    return "triton", "attention: fastlm's Triton kernel, as asked"


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
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        # Triton builds its launchers with these at their first use.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler found"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "Python's C headers (python3-dev) are not installed"
    return None


def _micro_batch_size(cfg: Config, device: torch.device, vocab_size: int) -> int:
    """The largest divisor of the batch whose estimated memory fits; the whole batch where memory is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return cfg.train.batch_size
    compute_bytes = 2 if cfg.train.precision == "bf16" else 4
    for size in range(cfg.train.batch_size, 0, -1):
        if cfg.train.batch_size % size:
            continue
        needed = memory_bytes(
            cfg.model,
            vocab_size,
            size,
            cfg.data.seq_len,
            compute_bytes=compute_bytes,
            recompute=cfg.train.recompute,
        )
        if needed <= MEMORY_SHARE * free:
            return size
    return 1
