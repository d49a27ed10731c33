"""hf.patch and what it does not know: left alone with a report, never broken; a wrong argument says what to do."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from hf_models import (
    BERT,
    FAMILIES,
    GATED,
    MIXTURES,
    NO_DROPOUT,
    SMALL,
    VOCAB,
    assert_close,
    assert_same,
    loss_and_gradients,
    make_batch,
    make_model,
    tf,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastlm_kernels as fk
from fastlm_kernels import _hf_attention

# transformers 5 warns of names that its own code still uses.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("torch_functions")]


class _OwnRMSNorm(LlamaRMSNorm):
    """A subclass with a forward of its own, outside transformers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 2


def test_what_is_not_known_is_left_alone_and_reported() -> None:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(3, 11)[None]
    kinds, expected = [type(m) for m in model.modules()], model(input_ids=ids, labels=ids)
    got = fk.hf.patch(model)(input_ids=ids, labels=ids)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(got.logits, expected.logits)
    assert "architecture 't5' is not known" in str(fk.hf.report(model))
    llama = make_model("llama")
    llama.model.norm = _OwnRMSNorm(32)
    llama.model.layers[0].mlp.act_fn = nn.Hardswish()
    llama.model.layers[1].mlp.forward = lambda x: x
    lines = {line.name: line for line in fk.hf.report(fk.hf.patch(llama))}
    left = {name: line.reason for name, line in lines.items() if not line.patched}
    assert left == {
        "model.norm": "an RMS norm of an unknown kind",
        "model.layers.0.mlp": "a gated MLP with Hardswish: no kernel",
        "model.layers.1.mlp": "has a forward of its own",
    }
    assert lines["model.layers.0.self_attn"].reason == "rotary embedding, attention"
    relu = [line for line in fk.hf.report(fk.hf.patch(make_model("opt"))) if line.module == "ReLU"]
    assert [(line.patched, line.reason) for line in relu] == [(False, "an activation without a kernel")] * 2
    old = make_model("gpt2")
    for module in (old, old.transformer):
        module._supports_attention_backend = False  # transformers 4's BERT
    assert "does not look it up" in str(fk.hf.report(fk.hf.patch(old)))
    assert old.config._attn_implementation == "sdpa"


class _Unknown(nn.Module):
    """Holds all that a gated MLP does, and computes something else."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) - self.up_proj(x))


class _EightBits(nn.Linear):
    """As quantising libraries make them: a Linear by its class, but its weight is whole numbers beside a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(whole, requires_grad=False), linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


def _with_unknown_mlp(model: Any) -> Any:
    model.model.layers[0].mlp = _Unknown(model.model.layers[0].mlp)
    return model


def _in_eight_bits(model: Any) -> Any:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _EightBits(child))
    return model


def _hooked(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: 1.5 * out)
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    return model


def _tied(model: Any) -> Any:
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


class _OwnLlama(tf.LlamaForCausalLM):
    """A model class outside transformers, with a loss of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.loss = 2 * out.loss
        return out


def _of_an_own_class(model: Any) -> Any:
    model.__class__ = _OwnLlama
    return model


@pytest.mark.parametrize(
    ("make", "logits"),
    [(_with_unknown_mlp, False), (_in_eight_bits, True), (_hooked, False), (_tied, False), (_of_an_own_class, True)],
)
def test_models_with_something_of_their_own_keep_their_numbers(make: Any, logits: bool) -> None:
    """Where the head or the model's class is not transformers' own, its logits stay, and its loss."""
    batch, model = make_batch("right"), make(make_model("llama"))
    patched = fk.hf.patch(make(make_model("llama")))
    assert any(line.patched for line in fk.hf.report(patched))
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))
    assert (patched(**batch).logits is not None) is logits
    assert_same(loss_and_gradients(fk.hf.unpatch(patched), **batch), loss_and_gradients(model, **batch))


def _encoder_and_decoder() -> Any:
    torch.manual_seed(0)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return tf.EncoderDecoderModel(encoder=tf.BertModel(tf.BertConfig(**BERT)), decoder=decoder)


def _with_another_configuration() -> Any:
    model = make_model("bert")
    model.config = copy.deepcopy(model.config)
    model.bert.config = copy.deepcopy(model.config)
    return model


@pytest.mark.parametrize("make", [_encoder_and_decoder, _with_another_configuration])
def test_layers_that_hold_another_configuration_than_their_model(make: Any) -> None:
    """Masks are made by the model's, attention is looked up by the layer's: both name ours, or neither."""
    batch, model, patched = make_batch("right"), make().eval(), make().eval()
    patched.load_state_dict(model.state_dict())
    call = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if patched.config.is_encoder_decoder:
        call |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    kinds = [vars(module).get("config") for module in patched.modules()]
    expected = model(**call).logits
    assert_close(fk.hf.patch(patched)(**call).logits, expected)
    patched(**call, output_attentions=True)
    names = {line.module: line.patched for line in fk.hf.report(patched) if line.module == "BertSelfAttention"}
    assert all(names.values())
    assert_same([fk.hf.unpatch(patched)(**call).logits], [expected])
    assert all(a is b for a, b in zip(kinds, [vars(m).get("config") for m in patched.modules()], strict=True))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_asked_for_its_routers_adds_their_loss(family: str) -> None:
    """By the call or by the configuration; else the loss is ours."""
    batch = make_batch("plain")
    for options, call in (({"output_router_logits": True}, {}), ({}, {"output_router_logits": True})):
        model, patched = make_model(family, **options), fk.hf.patch(make_model(family, **options))
        out = patched(**batch, **call)
        assert out.aux_loss is not None
        assert_close(out.aux_loss, model(**batch, **call).aux_loss)
        assert_close(loss_and_gradients(patched, **batch, **call), loss_and_gradients(model, **batch, **call))
    assert patched(**batch).logits is None


def test_a_soft_cap_that_a_model_does_not_apply_is_not_applied() -> None:
    """Gemma 3 inherits Gemma 2's, and passes it on to nothing."""
    batch, options = make_batch("left"), {"attn_logit_softcapping": 0.5}
    model, patched = make_model("gemma3_text", **options), fk.hf.patch(make_model("gemma3_text", **options))
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("phi3", {"RMS norm", "MLP gated by silu", "rotary embedding, attention"}),
        ("gemma3_text", {"RMS norm", "MLP gated by gelu_tanh", "rotary embedding with QK-norm, attention"}),
        ("mixtral", {"RMS norm", "activation silu", "rotary embedding, attention"}),
        ("olmo2", {"RMS norm", "MLP gated by silu", "rotary embedding, attention"}),
        ("smollm3", {"RMS norm", "MLP gated by silu", "rotary embedding, attention", "attention"}),
    ],
)
def test_what_is_patched_of_the_newer_families(family: str, reasons: set[str]) -> None:
    lines = [line for line in fk.hf.report(fk.hf.patch(make_model(family))) if not line.module.endswith("Model")]
    assert all(line.patched for line in lines)
    assert {line.reason for line in lines} == reasons | {"attention, loss without logits"}


def test_tied_weights_stay_one_tensor() -> None:
    file = io.BytesIO()
    patched = fk.hf.patch(make_model("gpt2"))
    torch.save(patched, file)
    file.seek(0)
    for model in (patched, copy.deepcopy(patched), torch.load(file, weights_only=False), fk.hf.unpatch(patched)):
        assert model.lm_head.weight is model.transformer.wte.weight


# Heads whose loss is no language model's, by class: the configuration, and the labels of two rows of 16 tokens.
_CLASSES = {"labels": torch.tensor([0, 1])}
_TOKENS = {"labels": torch.arange(32).view(2, 16) % 2}
_SPANS = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
HEADS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "BertForSequenceClassification": (tf.BertConfig(**BERT), _CLASSES),
    "BertForTokenClassification": (tf.BertConfig(**BERT), _TOKENS),
    "BertForQuestionAnswering": (tf.BertConfig(**BERT), _SPANS),
    "BertForNextSentencePrediction": (tf.BertConfig(**BERT), _CLASSES),
    "BertForPreTraining": (tf.BertConfig(**BERT), {**_TOKENS, "next_sentence_label": torch.tensor([0, 1])}),
    "RobertaForSequenceClassification": (tf.RobertaConfig(**BERT), _CLASSES),
    "RobertaForTokenClassification": (tf.RobertaConfig(**BERT), _TOKENS),
    "GPT2ForSequenceClassification": (tf.GPT2Config(**SMALL | NO_DROPOUT), _CLASSES),
    "GPT2ForTokenClassification": (tf.GPT2Config(**SMALL | NO_DROPOUT), _TOKENS),
    "LlamaForSequenceClassification": (tf.LlamaConfig(**GATED), _CLASSES),
    "LlamaForTokenClassification": (tf.LlamaConfig(**GATED), _TOKENS),
    "OPTForSequenceClassification": (
        tf.OPTConfig(**SMALL, ffn_dim=24, dropout=0.0, word_embed_proj_dim=32),
        _CLASSES,
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_other_kinds_keep_their_loss_and_say_so(kind: str) -> None:
    config, labels = HEADS[kind]
    torch.manual_seed(0)
    model = getattr(tf, kind)(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {**make_batch("right"), **labels}
    if "labels" not in labels:
        del batch["labels"]
    patched = fk.hf.patch(copy.deepcopy(model.train()))
    found, expected = patched(**batch), model(**batch)
    assert list(found) == list(expected)
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))
    reasons = {line.name: line.reason for line in fk.hf.report(patched)}
    assert "its own stays" in reasons[""] or "labels" not in labels
    norms = [line for line in fk.hf.report(patched) if "Norm" in line.module]
    assert norms
    assert all(line.patched for line in norms)


@pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning")  # transformers 4
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_for_attention_weights_has_the_models_own_attention(
    family: str, implementation: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights where that forms them (eager), its warning where it does not; the next call has ours again."""
    if family == "gemma2":
        implementation = "eager"  # transformers 5 knows no other for its soft-cap
    batch = make_batch("left")
    model, patched = (make_model(family, attn_implementation=implementation) for _ in range(2))
    fk.hf.patch(patched)
    key = patched.config._attn_implementation
    with caplog.at_level(logging.ERROR, "transformers"):
        expected, found = (each(**batch, output_attentions=True) for each in (model, patched))
    assert_close(found.loss, expected.loss)
    assert (found.attentions is None) == (expected.attentions is None)
    assert_close(
        [w for w in found.attentions or () if w is not None], [w for w in expected.attentions or () if w is not None]
    )
    assert len(found.attentions or ()) == 2 or implementation == "sdpa"
    assert patched.config._attn_implementation == key
    called = []
    monkeypatch.setattr(_hf_attention, "scaled_dot_product_attention", lambda q, k, v, **_: called.append(0) or q)
    patched(**batch)
    assert bool(called) is (key == "fastlm_kernels")


def test_a_configuration_that_asks_for_attention_weights_keeps_its_attention() -> None:
    model = fk.hf.patch(make_model("llama", output_attentions=True, attn_implementation="eager"))
    assert model(make_batch("plain")["input_ids"]).attentions[0].shape == (2, 2, 16, 16)
    assert "output_attentions=True" in str(fk.hf.report(model))


def test_a_model_inside_a_module_of_your_own() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make_model("bert").bert
            self.norm = nn.LayerNorm(32)
            self.head = nn.Linear(32, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.norm(self.encoder(input_ids).last_hidden_state[:, 0]))

    torch.manual_seed(0)
    model = Classifier().eval()
    ids = make_batch("plain")["input_ids"]
    expected = model(ids)
    fk.hf.patch(model)
    torch.testing.assert_close(model(ids), expected)
    patched = {line.name for line in fk.hf.report(model) if line.patched}
    assert {"norm", "encoder.embeddings.LayerNorm"} <= patched
    assert torch.equal(fk.hf.unpatch(model)(ids), expected)


def test_wrong_arguments_say_what_to_do() -> None:
    model = make_model("llama")
    for name in ("attention", "norm", "mlp", "rotary", "loss", "keep_logits"):
        wrong: Any = {name: "yes"}
        with pytest.raises(ValueError, match=f"{name}: got 'yes'; give True or False"):
            fk.hf.patch(model, **wrong)
    assert not any(line.patched for line in fk.hf.report(model))
    with pytest.raises(ValueError, match=r"module: got str; give a torch\.nn\.Module"):
        fk.hf.patch("llama")  # type: ignore[type-var]
    module = make_model("llama").model.layers[0].self_attn
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"position_bias: .*patch with attention=False"):
        _hf_attention.attention(module, q, q, q, None, position_bias=q)
