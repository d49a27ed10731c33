"""A training step of Hugging Face models, checked and then timed: tokens a second and peak memory.   pytest bench

GPT-2 124M and a Llama of the 1B class with random weights, forward and backward in bf16, eager: as transformers wrote
them, after `hf.patch`, and after Liger's patch where that is installed and knows the model. On a CPU: models of a few
thousand parameters, which shows that the bench runs and no more.

`extra_info` holds kernel, provider, shape, dtype, ratio (the unpatched model's time over this one's: above 1 is
faster), seconds a step, tokens_per_second, peak_bytes (None on a CPU) and memory_ratio (the unpatched peak over this).
"""

from __future__ import annotations

import functools
import gc
from typing import Any, NamedTuple

import pytest
import torch

from bench.timing import device_seconds, host_seconds
from fastlm_kernels import _runtime, hf
from fastlm_kernels.check_model import batch_for, compare, loss_of
from fastlm_kernels.norm import rms_norm

GPU = torch.cuda.is_available() and not _runtime.INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# Liger changes what transformers' Llama is made of, for the rest of the process: it comes last.
PROVIDERS = ("unpatched", "fastlm", "liger")


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


def _model(shape: Shape) -> Any:
    """Random weights, no dropout, nothing patched."""
    transformers = pytest.importorskip("transformers")
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
        liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        if model.config.model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
            pytest.skip(f"Liger does not know {model.config.model_type}")
        liger._apply_liger_kernel_to_instance(model)
    return model


@functools.cache
def _check(name: str) -> None:
    """The patched model's loss and gradients are those of the model, at a small size of the same class."""
    before, after = _model(SMALL[name]), _patched(_model(SMALL[name]), "fastlm")
    wrong = [line for line in compare(before, after, batch_for(before, 2, 64, DEVICE), DTYPE) if not line.ok]
    assert not wrong, wrong


def _measure(name: str, provider: str) -> tuple[Any, float, int | None]:
    """(a step that waits, seconds of one, bytes at the peak)."""
    shape = (LARGE if GPU else SMALL)[name]
    gc.collect()  # models hold themselves in cycles: the last one would count
    elsewhere = torch.cuda.memory_allocated() if GPU else 0
    model = _patched(_model(shape), provider)
    batch = batch_for(model, shape.rows, shape.tokens, DEVICE, padded=False)

    def step() -> None:
        model.zero_grad()
        loss_of(model, batch).backward()

    if not GPU:
        return step, host_seconds(step), None
    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = device_seconds(step)
    peak = torch.cuda.max_memory_allocated() - elsewhere

    def wait() -> None:
        step()
        torch.cuda.synchronize()

    return wait, seconds, peak


@functools.cache
def _unpatched(name: str) -> tuple[float, int | None]:
    return _measure(name, "unpatched")[1:]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", LARGE)
def test_training_step(benchmark: Any, name: str, provider: str) -> None:
    """Check, then time."""
    _check(name)
    baseline, baseline_peak = _unpatched(name)
    call, seconds, peak = _measure(name, provider)
    shape = (LARGE if GPU else SMALL)[name]
    tokens = shape.rows * shape.tokens
    benchmark.extra_info.update(
        kernel=f"hf.{name}",
        provider=provider,
        shape=f"{shape.rows}x{shape.tokens}" + ("" if GPU else " of a small model"),
        dtype=str(DTYPE).removeprefix("torch."),
        ratio=baseline / seconds,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=peak,
        memory_ratio=None if peak is None or baseline_peak is None else baseline_peak / peak,
        device=torch.cuda.get_device_name() if GPU else "cpu",
        path=_runtime.explain(rms_norm, torch.ones(2, 8, device=DEVICE, dtype=DTYPE), (8,)).path,
    )
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
