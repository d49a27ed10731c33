"""hf.patch: calls and classes off the beaten path, by PyTorch's functions, where these tests are quick."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hf_models import BERT, GATED, NO_DROPOUT, SMALL, assert_close, loss_and_gradients, make_batch, make_model, tf
from torch import nn

import fastlm_kernels as fk

pytestmark = pytest.mark.usefixtures("torch_functions")
CONFIGS: dict[str, Any] = {
    "gpt2": lambda **more: tf.GPT2Config(**SMALL, **NO_DROPOUT, **more),
    "bert": lambda **more: tf.BertConfig(**BERT, **more),
    "roberta": lambda **more: tf.RobertaConfig(**BERT, **more),
}


def _pair(make: Any, config: Any) -> tuple[Any, Any]:
    """The same model twice in training mode, the second patched."""
    model, patched = make(config), make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    patched.load_state_dict(model.state_dict())
    return model.train(), fk.hf.patch(patched.train())


@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_one_step_of_a_model_with_everything(kind: str) -> None:
    """Norms with an offset, windows, both soft-caps; gemma2's eager attention sees a mask in every call."""
    batch = make_batch(kind)
    model, patched = make_model("gemma2"), fk.hf.patch(make_model("gemma2"))
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))


@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 2, 8)])
def test_choices_count_positions_along_the_tokens(shape: tuple[int, ...]) -> None:
    model, patched = (each.eval() for each in _pair(tf.GPT2DoubleHeadsModel, CONFIGS["gpt2"]()))
    ids = make_batch("plain")["input_ids"][:, :8].reshape(shape)
    chosen = torch.full(shape[:2], 7)
    found, expected = (each(ids, mc_token_ids=chosen) for each in (patched, model))
    assert_close((found.logits, found.mc_logits), (expected.logits, expected.mc_logits))
    embeds = model.transformer.wte(ids[0])
    assert_close(patched.transformer(inputs_embeds=embeds)[0], model.transformer(inputs_embeds=embeds)[0])


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")]
)
def test_a_decoder_with_cross_attention(family: str, kind: str) -> None:
    """With and without padding of the encoder's: loss, gradients, and the same results but for the logits."""
    config = CONFIGS[family](is_decoder=True, add_cross_attention=True)
    model, patched = _pair(getattr(tf, kind), config)
    states, real = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.int64)
    real[0, 5:] = 0
    ids = make_batch("plain")["input_ids"]
    for mask in (None, real):
        batch = {"input_ids": ids, "labels": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}
        assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))
    found, expected = patched(**batch), model(**batch)
    assert found.logits is None
    assert [name for name in expected if name != "logits"] == list(found)


@pytest.mark.parametrize(("family", "around"), [("bert", "cls"), ("bert", "cls.predictions"), ("roberta", "lm_head")])
def test_a_hook_around_the_head_is_called(family: str, around: str) -> None:
    batch, patched, called = make_batch("plain"), fk.hf.patch(make_model(family)), []
    assert patched(**batch).logits is None
    patched.get_submodule(around).register_forward_hook(lambda *_: called.append(around))
    assert patched(**batch).logits is not None
    assert called == [around]


def test_a_hook_on_every_module_is_called_for_the_head_and_the_fused_norms() -> None:
    batch, patched, called = make_batch("plain"), fk.hf.patch(make_model("qwen3")), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        patched(**batch)
    finally:
        hook.remove()
    expected = [patched.lm_head, patched.model.layers[0].self_attn.q_norm]
    assert all(any(module is seen for seen in called) for module in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_data_parallel_can_copy_every_module(family: str) -> None:
    patched = fk.hf.patch(make_model(family))
    for module in patched.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module)
        assert replica is not module
        assert vars(replica)["_modules"] is not vars(module)["_modules"]


def test_attention_that_is_bidirectional_by_half_is_left_alone() -> None:
    """transformers' own attention functions differ there."""
    ids, real = make_batch("right")["input_ids"], make_batch("right")["attention_mask"]
    for more, left_alone in (({}, True), ({"is_causal": False}, False)):
        more |= {"sliding_window": 5, "attn_implementation": "eager"}
        config = tf.Gemma2Config(**GATED, use_bidirectional_attention=True, **more)
        model, patched = (each.eval() for each in _pair(tf.Gemma2ForCausalLM, config))
        assert ("use_bidirectional_attention=True" in fk.hf.report(patched)[0].reason) is left_alone
        assert (patched.config._attn_implementation == "fastlm_kernels") is not left_alone
        assert_close(patched(ids).logits, model(ids).logits)
        padded = [each(ids, attention_mask=real).logits[real.bool()] for each in (patched, model)]
        assert_close(*padded)


SCALED = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"attn_implementation": None}),
        ("gpt2", {**SCALED, "attn_implementation": "eager"}),
        ("gpt2", {**SCALED, "attn_implementation": "sdpa"}),
        ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    ],
)
def test_what_one_attention_of_transformers_computes_and_another_leaves_out(family: str, changes: Any) -> None:
    """In transformers 4: a soft-cap, and scales by layer. The patched model follows the one that it has."""
    batch, model, patched = make_batch("right"), make_model(family, **changes), make_model(family, **changes)
    assert_close(loss_and_gradients(fk.hf.patch(patched), **batch), loss_and_gradients(model, **batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_wrong_call_raises_as_before(family: str) -> None:
    ids, model = make_batch("plain")["input_ids"], make_model(family)
    positional = len(inspect.signature(type(model).forward).parameters)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids,), {"input_ids": ids}),
        ((ids, *[None] * positional), {}),
    ]
    for args, more in calls:
        said = []
        for each in (model, fk.hf.patch(make_model(family))):
            with pytest.raises(TypeError) as raised:
                each(*args, **more)
            said.append(str(raised.value))
        assert said[0] == said[1]


def test_counts_of_labels_of_any_type_divide_the_loss() -> None:
    batch, model, patched = make_batch("plain"), make_model("llama"), fk.hf.patch(make_model("llama"))
    for items in (7, 7.0, torch.tensor(7), torch.tensor(7.5), torch.tensor([7])):
        found, expected = (each(**batch, num_items_in_batch=items).loss for each in (patched, model))
        assert_close(found, expected)


def test_a_mask_of_heads_does_what_it_did() -> None:
    """transformers 5 reads none; 4 does where its attention is eager, and the call has that one."""
    ids, heads = make_batch("plain")["input_ids"], torch.tensor([[0.0, 1.0]] * 2)
    for implementation in ("eager", "sdpa"):
        model, patched = (make_model("gpt2", attn_implementation=implementation) for _ in range(2))
        assert_close(fk.hf.patch(patched)(ids, head_mask=heads).logits, model(ids, head_mask=heads).logits)


def test_a_class_made_from_a_patched_one_is_reported_and_not_half_undone() -> None:
    """As fully_shard makes one."""
    batch, patched = make_batch("plain"), fk.hf.patch(make_model("llama"))
    lines, kind = list(fk.hf.report(patched)), type(patched)
    patched.__class__ = type("Sharded" + kind.__name__, (kind,), {})
    assert list(fk.hf.report(patched)) == lines
    for change in (fk.hf.unpatch, fk.hf.patch):
        with pytest.raises(ValueError, match=r"got one of class ShardedLlamaForCausalLM.*before fully_shard"):
            change(patched)
    assert list(fk.hf.report(patched)) == lines
    assert patched(**batch).logits is None
    patched.__class__ = kind
    assert not any(line.patched for line in fk.hf.report(fk.hf.unpatch(patched)))
