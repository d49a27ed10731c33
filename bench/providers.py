"""Who competes: our kernels, PyTorch eager and compiled, each SDPA backend forced alone, flash-attn and Liger.

A provider takes the arguments of our public function and gives its result. `mode` is what it was asked for:
"deterministic", or "default" where it is left to choose (the backwards of flash, efficient and cuDNN attention then add
up in any order). Whoever cannot do a case, runs out of memory, or disagrees with the reference is not timed, and the
reason is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm_kernels import _runtime, configs, tune
from fastlm_kernels.registry import Case, Kernel

_memory: Any = torch.utils.deterministic
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
_SDPA_ON_CPU = ("sdpa-flash", "sdpa-math")
_MASKS = {"window", "padded", "masked", "dropout"}  # which a CPU's flash attention does not take
_ATTENTION = ("scaled_dot_product_attention", "varlen_attn")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """One competitor on one kernel.

    make        kernel -> a function of the arguments of kernel.fused
    mode        "deterministic" or "default"
    during      a context for everything that is run, backward included
    overwrites  its inputs; they are copied for it
    """

    name: str
    make: Callable[[Kernel], Function]
    mode: str = "default"
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    overwrites: bool = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, which its flash and efficient attention follow only when errors are errors.

    New memory is not filled meanwhile: that would be timed too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only, fill = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    _memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill


def _compiled(kernel: Kernel) -> Function:
    torch._dynamo.reset()  # else a shape before this one would make sizes dynamic
    return torch.compile(kernel.reference, fullgraph=True)


def _keeping_buffers() -> AbstractContextManager[Any]:
    """Compiled backwards may otherwise give what was saved to their results, and cannot run twice."""
    import torch._functorch.config as config

    return config.patch(donated_buffer=False)


def _forced(backend: SDPBackend, kernel: Kernel) -> Function:
    def fn(**arguments: Any) -> Any:
        with sdpa_kernel(backend):
            return kernel.reference(**arguments)

    return fn


def _torchs_varlen(kernel: Kernel) -> Function:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _unordered(kernel: Kernel) -> Function:
    return partial(kernel.fused, deterministic=False)


def installed(module: str) -> bool:
    """Whether a module, "flash_attn" or "flash_attn.cute", could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def providers(kernel: Kernel, case: Case, direction: str, gpu: bool) -> Iterator[Provider]:
    """Who may be timed on this case, ours first; last what no GPU has run yet. Imports nothing."""
    yield Provider("fastlm", lambda kernel: kernel.fused, "deterministic")
    yield Provider("eager", lambda kernel: kernel.reference)
    if gpu:
        yield Provider("compile", _compiled, during=_keeping_buffers if direction == "backward" else nullcontext)
    if kernel.name in _ATTENTION:
        yield from _attention_providers(kernel, case, direction, gpu)
    elif gpu and installed("liger_kernel") and kernel.name in LIGER and not _options(case):
        yield Provider("liger", lambda kernel: LIGER[kernel.name], overwrites=True)
    if gpu and direction == "forward" and kernel.name == "scaled_dot_product_attention" and _in_gluon(case):
        yield Provider("fastlm-gluon", partial(_tried, case), "deterministic", partial(_trying_gluon, case))


def _options(case: Case) -> set[str]:
    """The case's options beside its sizes."""
    return set(case) - {"rows", "columns", "classes"}


def _attention_providers(kernel: Kernel, case: Case, direction: str, gpu: bool) -> Iterator[Provider]:
    differentiates = direction != "forward"
    if gpu and differentiates:
        yield Provider("fastlm-unordered", _unordered)
    if gpu and kernel.name == "varlen_attn" and not {"softcap", "one_pass"} & set(case):
        yield Provider("torch-varlen", _torchs_varlen)
    if kernel.name == "scaled_dot_product_attention" and not (case.get("softcap") or case.get("lse")):
        for name, backend in SDPA.items():
            if gpu or (name in _SDPA_ON_CPU and not _MASKS & set(case)):
                mode = "deterministic" if name == "sdpa-math" else "default"
                yield Provider(name, partial(_forced, backend), mode)
            if gpu and differentiates and name != "sdpa-math":
                yield Provider(f"{name}-deterministic", partial(_forced, backend), "deterministic", deterministic)
    if not gpu or any(case.get(name) for name in ("padded", "masked", "lse", "align", "values")):
        return
    for name, (module, open_side) in FLASH.items():
        if not installed(module) or (case.get("dropout") and name != "flash-attn-2"):
            continue
        for ordered in (False, True)[: 1 + differentiates]:
            call = partial(_flash, module, open_side, ordered)
            suffix, mode = ("-deterministic", "deterministic") if ordered else ("", "default")
            yield Provider(name + suffix, lambda kernel, call=call: call, mode)


def _in_gluon(case: Case) -> bool:
    """Whether the forward in Gluon, which no shipped table chooses, does this case."""
    other = {"padded", "masked", "dropout", "values", "keys", "one_pass"} & set(case)
    return not other and any(config.head_dim == case["columns"] for config in configs.ATTENTION_GLUON)


def _gluon_config(case: Case) -> configs.AttentionConfig:
    """Its first tile for such heads."""
    return next(config for config in configs.ATTENTION_GLUON if config.head_dim == case["columns"])


def _trying_gluon(case: Case) -> AbstractContextManager[None]:
    return configs.trying("ATTENTION_FORWARD", "sm_90", (_gluon_config(case),))


def _tried(case: Case, kernel: Kernel) -> Function:
    """The public function, once a process of its own has seen a causal call end and meet the accuracy rule."""
    if _runtime.architecture(torch.device("cuda", torch.cuda.current_device())) != "sm_90":
        raise ValueError("for sm_90 alone")
    if not _survives(_gluon_config(case)):
        raise ValueError("hangs, faults or is not accurate")
    return kernel.fused


@functools.cache
def _survives(config: configs.AttentionConfig) -> bool:
    return tune.survives(config, "ATTENTION_FORWARD", "sm_90", {"rows": 1024, "columns": config.head_dim})


def _flash(module: str, open_side: int | None, ordered: bool, **arguments: Any) -> Tensor:
    """flash-attn's functions: tensors are (B, T, H, D), as ours lie in memory; `open_side` of a window has no limit."""
    flash = importlib.import_module(module)
    left, right = arguments.get("window_size", (-1, -1))
    options: dict[str, Any] = {"causal": arguments.get("is_causal", False) or right == 0, "deterministic": ordered}
    if left >= 0 or right > 0:
        options["window_size"] = tuple(open_side if side < 0 else side for side in (left, right))
    options |= {name: arguments[name] for name in ("softcap", "dropout_p") if arguments.get(name)}
    tensors = [arguments[name] for name in ("query", "key", "value")]
    if "cu_seq_q" in arguments:
        lengths = [arguments[name] for name in ("cu_seq_q", "cu_seq_k", "max_q", "max_k")]
        return _output(flash.flash_attn_varlen_func(*tensors, *lengths, **options))
    return _output(flash.flash_attn_func(*(x.transpose(1, 2) for x in tensors), **options)).transpose(1, 2)


def _output(result: Any) -> Tensor:
    """The output alone: some releases give the log-sum-exp with it."""
    return result[0] if isinstance(result, tuple) else result


FLASH: dict[str, tuple[str, int | None]] = {
    "flash-attn-2": ("flash_attn", -1),
    "flash-attn-3": ("flash_attn_interface", -1),
    "flash-attn-4": ("flash_attn.cute", None),
}


def _liger(name: str) -> Function:
    import liger_kernel.transformers.functional as functional  # type: ignore[import-not-found]

    return getattr(functional, name)


# By the names of our arguments; what a call does not hold is at its default in the registry's bench cases.
LIGER: dict[str, Function] = {
    "rms_norm": lambda input, weight, eps, **_: _liger("liger_rms_norm")(input, weight, eps),
    "layer_norm": lambda input, weight, bias, eps, **_: _liger("liger_layer_norm")(input, weight, bias, eps),
    "swiglu": lambda gate, up: _liger("liger_swiglu")(gate, up),
    "cross_entropy": lambda input, target, **_: _liger("liger_cross_entropy")(input, target),
    "linear_cross_entropy": lambda input, linear_weight, target: _liger("liger_fused_linear_cross_entropy")(
        input, linear_weight, target
    ),
}
