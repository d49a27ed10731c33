"""A training step of Hugging Face models, checked and then timed: tokens a second and peak memory.   pytest bench

GPT-2 124M and a Llama of the 1B class with random weights, forward and backward in bf16, eager: as transformers wrote
them, after `hf.patch`, and after Liger's patch where that is installed and knows the model. On a CPU: models of a few
thousand parameters, which shows that the bench runs and no more.

Checked are every gradient at a small size, and the loss and the norm of all gradients of the very models and batch that
are timed. A rival that fails or differs is not timed.

`extra_info` holds kernel, provider, shape, dtype, ratio (the unpatched model's time over this one's: above 1 is
faster), seconds a step, tokens_per_second, peak_bytes (None on a CPU) and memory_ratio (the unpatched peak over this);
for who is not measured ratio and seconds are None, and `reason` says why.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from bench import device
from bench.providers import installed
from bench.timing import device_seconds, host_spreads
from fastlm_kernels import _runtime, hf
from fastlm_kernels.check_model import Batch, batch_for, compare, loss_of
from fastlm_kernels.norm import rms_norm

GPU = torch.cuda.is_available() and not _runtime.INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# Liger changes what transformers' Llama is made of, for the rest of the process: it comes last.
PROVIDERS = ("unpatched", "fastlm", "liger")
# Relative, of the loss and of the norm of all gradients: roundings of the dtype, which are many in a norm.
_AGREEMENT = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-3, 2e-2)}


class Shape(NamedTuple):
    """A model's configuration, and the batch that it is timed on: two tokens less than it has positions."""

    kind: str
    options: dict[str, Any]
    rows: int
    tokens: int


_LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
_LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4098}
_LLAMA_1B["tie_word_embeddings"] = True
_LLAMA_SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_LLAMA_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2_SMALL = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
SMALL = {
    "gpt2-124m": Shape("GPT2", _GPT2_SMALL, 2, 62),
    "llama-1b": Shape("Llama", _LLAMA_SMALL, 2, 62),
}
LARGE = {
    "gpt2-124m": Shape("GPT2", {"vocab_size": 50304, "n_positions": 1026}, 16, 1024),
    "llama-1b": Shape("Llama", _LLAMA_1B, 2, 4096),
}


class NotMeasured(Exception):
    """Why there is no figure of a provider."""


class Step(NamedTuple):
    """A forward and backward that was checked.

    call    does it and waits; None where it was not kept
    sizes   the loss and the norm of all gradients
    peak    bytes of device memory at most, model included; None on a CPU
    """

    call: Callable[[], None] | None
    sizes: tuple[float, float]
    seconds: float
    peak: int | None


def shape_of(name: str) -> Shape:
    """What is timed here."""
    return (LARGE if GPU else SMALL)[name]


def _model(shape: Shape) -> Any:
    """Random weights, no dropout, nothing patched."""
    if not installed("transformers"):
        raise NotMeasured("transformers is not installed")
    import transformers

    name = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[shape.kind]
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if shape.kind == "GPT2" else {}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{shape.kind}Config")(**shape.options, **no_dropout, **special)
    torch.manual_seed(0)
    with DEVICE:
        return getattr(transformers, name)(config).to(DTYPE).train()


def _patched(model: Any, provider: str) -> Any:
    if provider == "fastlm":
        hf.patch(model)
    elif provider == "liger":
        if not installed("liger_kernel"):
            raise NotMeasured("Liger is not installed")
        from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]

        if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise NotMeasured(f"Liger does not know {model.config.model_type}")
        monkey_patch._apply_liger_kernel_to_instance(model)
    return model


@functools.cache
def _check(name: str) -> None:
    """The patched model's loss and gradients are those of the model, at a small size of the same class."""
    before, after = _model(SMALL[name]), _patched(_model(SMALL[name]), "fastlm")
    wrong = [line for line in compare(before, after, batch_for(before, 2, 64, DEVICE), DTYPE) if not line.ok]
    assert not wrong, wrong


def _sizes(model: Any, batch: Batch) -> tuple[float, float]:
    """(the loss, the norm of all gradients)."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    norms = [p.grad.norm(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


def _difference(sizes: tuple[float, float], expected: tuple[float, float]) -> str | None:
    """What differs from the unpatched model by more than roundings."""
    for what, found, truth, allowed in zip(
        ("loss", "norm of the gradients"), sizes, expected, _AGREEMENT[DTYPE], strict=True
    ):
        if not abs(found - truth) <= allowed * abs(truth):
            return f"the {what} is {found:.7g}, unpatched {truth:.7g}"
    return None


def _start(name: str, provider: str) -> Step:
    """Build, compare with the unpatched model at the size that is timed, time."""
    shape = shape_of(name)
    expected = None if provider == "unpatched" else _unpatched(name).sizes
    gc.collect()  # models hold themselves in cycles: the last one would count
    elsewhere = torch.cuda.memory_allocated() if GPU else 0
    model = _patched(_model(shape), provider)
    batch = batch_for(model, shape.rows, shape.tokens, DEVICE, padded=False)
    sizes = _sizes(model, batch)
    wrong = expected and _difference(sizes, expected)
    if wrong and provider == "fastlm":
        raise AssertionError(f"{name}: {wrong}")
    if wrong:
        raise NotMeasured(wrong)

    def step() -> None:
        model.zero_grad()
        loss_of(model, batch).backward()

    if not GPU:
        return Step(step, sizes, math.nan, None)  # timed in turn with another
    torch.cuda.reset_peak_memory_stats()
    seconds = device_seconds(step)
    peak = torch.cuda.max_memory_allocated() - elsewhere

    def wait() -> None:
        step()
        torch.cuda.synchronize()

    return Step(wait, sizes, seconds, peak)


@functools.cache
def _unpatched(name: str) -> Step:
    """What all are compared with; on a GPU its model is gone."""
    found = _start(name, "unpatched")
    return found._replace(call=None) if GPU else found


def measure(name: str, provider: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """(a step that waits, its figures as in `extra_info`); NotMeasured where there are none."""
    _check(name)
    try:
        found = _start(name, provider)
    except NotMeasured:
        raise
    except Exception as error:
        if provider == "fastlm":
            raise
        raise NotMeasured(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}") from None
    shape, base = shape_of(name), _unpatched(name)
    assert found.call is not None
    seconds, ratio = found.seconds, base.seconds / found.seconds
    if base.call is not None:  # in turns, and the fastest compared: other programs take the processor away
        theirs, ours = host_spreads([base.call, found.call])
        seconds, ratio = ours.median, theirs.best / ours.best
    figures = {
        "ratio": ratio,
        "seconds": seconds,
        "tokens_per_second": shape.rows * shape.tokens / seconds,
        "peak_bytes": found.peak,
        "memory_ratio": None if found.peak is None or base.peak is None else base.peak / found.peak,
        "checked": True,
        "path": _runtime.explain(rms_norm, torch.ones(2, 8, device=DEVICE, dtype=DTYPE), (8,)).path,
    }
    return found.call, figures


def what(name: str, provider: str) -> dict[str, Any]:
    """Who does what, for a record."""
    shape = shape_of(name)
    return {
        "kernel": f"hf.{name}",
        "provider": provider,
        "shape": f"{shape.rows}x{shape.tokens}" + ("" if GPU else " of a small model"),
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": device.name(),
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", LARGE)
def test_training_step(benchmark: Any, name: str, provider: str) -> None:
    """Check, then time."""
    benchmark.extra_info.update(what(name, provider))
    try:
        call, figures = measure(name, provider)
    except NotMeasured as why:
        benchmark.extra_info.update(ratio=None, seconds=None, reason=str(why))
        pytest.skip(f"{provider}: {why}")
    benchmark.extra_info.update(figures)
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
