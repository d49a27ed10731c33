"""hf.patch and generation: the unpatched model's tokens, with every kind of cache. Encoders generate nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import DECODERS, make_batch, make_model
from torch import Tensor

import fastlm_kernels as fk

# transformers 5 warns of names that its own code still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def _prompts(length: int = 16) -> dict[str, Tensor]:
    """Two prompts, the first padded on the left."""
    batch = make_batch("left", length)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_token_for_token_with_growing_and_static_caches(family: str) -> None:
    model, prompts = make_model(family).eval(), _prompts()
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=8)
    fk.hf.patch(model)
    for cache in ({}, STATIC, {"use_cache": False}):
        assert torch.equal(model.generate(**prompts, **GREEDY, **cache, max_new_tokens=8), expected)
    assert len(set(expected[:, -8:].flatten().tolist())) > 1  # the model says something


@pytest.mark.needs_kernels
@pytest.mark.parametrize(("family", "cache"), [*((family, {}) for family in DECODERS), ("llama", STATIC)])
def test_the_same_by_the_kernels(family: str, cache: dict[str, Any], kernel_device: str) -> None:
    model = (
        make_model(family, num_hidden_layers=2 if family in ("qwen2", "gemma2", "gemma3_text") else 1)
        .eval()
        .to(kernel_device)
    )
    prompts = {name: tensor.to(kernel_device) for name, tensor in _prompts(8).items()}
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=3)
    assert torch.equal(fk.hf.patch(model).generate(**prompts, **GREEDY, **cache, max_new_tokens=3), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 9}])
def test_beams_and_samples_are_the_models_own(family: str, how: dict[str, Any]) -> None:
    model, found = make_model(family).eval(), []
    for patch in (fk.hf.unpatch, fk.hf.patch):
        torch.manual_seed(5)
        found.append(patch(model).generate(**_prompts(), **GREEDY | how, max_new_tokens=6))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_several_tokens_after_a_cache(family: str) -> None:
    model, ids, real = make_model(family).eval(), *_prompts().values()
    patched = fk.hf.patch(copy.deepcopy(model))
    expected = model(ids, attention_mask=real).logits
    first = patched(ids[:, :7], attention_mask=real[:, :7], use_cache=True)
    second = patched(ids[:, 7:], attention_mask=real, past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)


def _answer(model: Any, **call: Any) -> Any:
    try:
        return model(**call).logits
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_a_mask_that_is_too_short(family: str) -> None:
    """Where it leaves the last keys out, and where (transformers 4's OPT) it is an error."""
    model, ids = make_model(family).eval(), _prompts()["input_ids"]
    call = {"input_ids": ids, "attention_mask": torch.ones(2, 10), "position_ids": torch.arange(16)[None]}
    expected = _answer(model, **call, use_cache=True)
    found = _answer(fk.hf.patch(model), **call, use_cache=True)
    if isinstance(expected, str):
        assert found == expected
    else:  # a window of 5 is empty at 14
        torch.testing.assert_close(found[:, :14], expected[:, :14], rtol=1e-4, atol=1e-5)
