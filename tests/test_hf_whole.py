"""hf.patch and the rest of the world: other models, transformers' own features, copies, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_hf import DECODERS, FAMILIES, GATED, VOCAB, make_batch, make_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastlm_kernels as fk
from fastlm_kernels import _hf_attention, hf

tf: Any = transformers  # its constructors take more than they declare

# transformers 5 warns of names that its own code and peft's still use.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _loss_and_gradients(model: Any, **batch: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_same_configuration_and_unpatch_are_bitwise(family: str) -> None:
    batch, model = make_batch("right"), make_model(family)
    other = type(model)(model.config).train()
    other.load_state_dict(model.state_dict())
    config, attributes = model.config, [dict(vars(module)) for module in model.modules()]
    text, before = config.to_json_string(), _loss_and_gradients(other, **batch)
    patched = fk.hf.patch(fk.hf.patch(model, norm=False))
    assert patched is model
    assert type(patched) is not type(other)
    assert type(patched).__name__ == type(other).__name__
    assert isinstance(patched, type(other))
    _assert_close(_loss_and_gradients(patched, **batch), before)
    _assert_same(_loss_and_gradients(other, **batch), before)
    assert other.config is config
    assert (config.to_json_string(), config._attn_implementation) == (text, other.config._attn_implementation)
    assert fk.hf.unpatch(patched) is model
    _assert_same(_loss_and_gradients(model, **batch), before)
    hooked = "_output_capturing_hooks_installed"  # transformers' own, at the first forward
    for module, attribute in zip(model.modules(), attributes, strict=True):
        now = {name: value for name, value in vars(module).items() if name != hooked}
        assert now.keys() == attribute.keys()
        assert now.get("config") is attribute.get("config")
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]


def _everything() -> dict[tuple[str, ...], Any]:
    """Every global of transformers and torch's modules, and every attribute of their classes."""
    found: dict[tuple[str, ...], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "transformers" and not name.startswith(("torch.nn", "torch.functional")):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if type(value) is dict:  # transformers' lazy tables import all their models when asked
                found[name, key, "keys"] = list(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, key, attribute): held for attribute, held in vars(value).items()}
    return found


def test_nothing_of_transformers_or_torch_changes_but_two_keys() -> None:
    batch, model = make_batch("left"), make_model("qwen3")
    _loss_and_gradients(fk.hf.unpatch(fk.hf.patch(make_model("qwen3"))), **batch)  # whatever is imported lazily
    tables = (tf.AttentionInterface._global_mapping, tf.AttentionMaskInterface._global_mapping)
    for table in tables:
        table.pop(_hf_attention.KEY)
    before, keys = _everything(), [set(table) for table in tables]
    _loss_and_gradients(fk.hf.patch(model), **batch)
    after = _everything()
    assert len(before) > 10_000
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] is not after[name] and before[name] != after[name]]
    assert not [name for name in changed if name[-2:] != ("_global_mapping", "keys")]
    assert [set(table) - known for table, known in zip(tables, keys, strict=True)] == [{"fastlm_kernels"}] * 2


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_token_for_token_with_growing_and_static_caches(family: str) -> None:
    model, batch = make_model(family).eval(), make_batch("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**inputs, **options)
    fk.hf.patch(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, **static), expected)
    assert len(set(expected[:, -8:].flatten().tolist())) > 1  # the model says something


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_several_tokens_after_a_cache(family: str) -> None:
    model = fk.hf.patch(make_model(family).eval())
    batch = make_batch("left")
    ids, real = batch["input_ids"], batch["attention_mask"]
    expected = fk.hf.unpatch(copy.deepcopy(model))(ids, attention_mask=real).logits
    first = model(ids[:, :7], attention_mask=real[:, :7], use_cache=True)
    second = model(ids[:, 7:], attention_mask=real, past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)
    # A mask that is too short leaves the last keys out.
    found = model(ids, attention_mask=torch.ones(2, 10), position_ids=torch.arange(16)[None], use_cache=True).logits
    fk.hf.unpatch(model)
    theirs = model(ids, attention_mask=torch.ones(2, 10), position_ids=torch.arange(16)[None], use_cache=True).logits
    torch.testing.assert_close(found[:, :14], theirs[:, :14], rtol=1e-4, atol=1e-5)  # a window of 5 is empty at 14


@pytest.mark.needs_kernels
def test_generation_by_the_kernels() -> None:
    model, ids = make_model("mistral").eval(), make_batch("left")
    inputs = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "max_new_tokens": 3}
    expected = model.generate(**inputs, do_sample=False, eos_token_id=None)
    assert torch.equal(fk.hf.patch(model).generate(**inputs, do_sample=False, eos_token_id=None), expected)


def test_masks_are_no_larger_than_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attention = _hf_attention.attention

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return attention(module, q, k, v, mask, **options)

    monkeypatch.setattr(_hf_attention, "attention", spy)
    model = fk.hf.patch(make_model("mistral"))
    for kind, shape in {"plain": (1, 1, 1, 0), "left": (2, 16), "right": (2, 16)}.items():
        seen.clear()
        model(**make_batch(kind))
        assert [tuple(mask.shape) for mask in seen] == [shape] * 2
    seen.clear()
    model(**make_batch("packed"))
    assert [(mask.starts.tolist(), mask.longest) for mask in seen] == [([0, 6, 16, 29, 32], 13)] * 2
    # Documents as flash attention takes them.
    ids = make_batch("plain")["input_ids"].view(1, -1)
    starts = torch.tensor([0, 6, 16, 29, 32], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 13, "max_length_k": 13}
    places = torch.cat([torch.arange(int(n)) for n in starts.diff()])[None]
    looked_for = model(ids, position_ids=places).logits
    seen.clear()
    assert torch.equal(model(ids, position_ids=places, **lengths).logits, looked_for)
    assert [tuple(mask.shape) for mask in seen] == [(1, 1, 1, 0)] * 2


def test_dropout_of_packed_documents_stays_inside_them() -> None:
    model = make_model("gpt2")
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    fk.hf.patch(model)
    batch = make_batch("packed")
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}

    def states() -> Tensor:
        torch.manual_seed(3)
        return model(**inputs).logits

    first = states()
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 0] += 1  # of the first document of each row
    changed = (states() - first).abs().amax(-1) > 0
    assert changed[0].tolist() == [True] * 6 + [False] * 10
    assert changed[1].tolist() == [True] * 13 + [False] * 3


def test_loss_options() -> None:
    batch, model, patched = make_batch("plain"), make_model("gemma2"), fk.hf.patch(make_model("gemma2"))
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    items: list[Any] = [7, torch.tensor(7)]
    for extra in ({}, *({"num_items_in_batch": n} for n in items), {"shift_labels": shifted.flip(1).contiguous()}):
        _assert_close(_loss_and_gradients(patched, **batch, **extra), _loss_and_gradients(model, **batch, **extra))
    out = patched(**batch, output_hidden_states=True)
    assert out.logits is None
    assert type(out) is type(model(**batch))
    assert len(out.hidden_states) == 3
    assert patched(**batch, return_dict=False)[1].shape == (2, 16, VOCAB)
    assert patched(batch["input_ids"]).logits is not None
    assert patched.eval()(**batch).logits.shape == (2, 16, VOCAB)
    kept = fk.hf.patch(patched.train(), keep_logits=True)(**batch)
    assert kept.logits.shape == (2, 16, VOCAB)
    torch.testing.assert_close(kept.loss, out.loss)
    patched = fk.hf.patch(patched)
    patched.loss_function = lambda logits, labels, *_, **__: logits.sum()
    assert patched(**batch).logits is not None


@pytest.mark.parametrize(
    ("family", "kind", "backend"),
    [
        ("llama", "plain", "eager"),
        ("gpt2", "left", "aot_eager"),
        ("bert", "plain", "eager"),
        ("gemma2", "left", "eager"),
    ],
)
def test_compiled_whole(family: str, kind: str, backend: str) -> None:
    torch._dynamo.reset()
    batch, model, patched = make_batch(kind), make_model(family), fk.hf.patch(make_model(family))
    compiled = torch.compile(patched, backend=backend, fullgraph=True)
    _assert_close(_loss_and_gradients(compiled, **batch), _loss_and_gradients(model, **batch))


@pytest.mark.needs_kernels
def test_compiled_whole_with_the_kernels() -> None:
    test_compiled_whole("llama", "left", "eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, after a graph break
def test_compiled_with_packed_documents() -> None:
    torch._dynamo.reset()
    batch, model, patched = make_batch("packed"), make_model("llama"), make_model("llama")
    for each in (model, patched):
        del each.model.layers[1]
    compiled = torch.compile(fk.hf.patch(patched), backend="eager")
    _assert_close(_loss_and_gradients(compiled, **batch), _loss_and_gradients(model, **batch))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])
def test_copies_pickles_and_saved_models(family: str, tmp_path: Path) -> None:
    ids = make_batch("plain")["input_ids"]
    original = make_model(family).eval()
    expected = original(ids).logits
    patched = fk.hf.patch(make_model(family)).eval()
    logits = patched(ids).logits
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    pickled = pickle.dumps(patched)
    for table in (tf.AttentionInterface, tf.AttentionMaskInterface):
        table._global_mapping.pop(_hf_attention.KEY)  # as in a new process
    for copied in (pickle.loads(pickled), copy.deepcopy(patched), loaded):
        assert [type(m) for m in copied.modules()] == [type(m) for m in patched.modules()]
        assert copied.config is not patched.config
        assert torch.equal(copied(ids).logits, logits)
        assert torch.equal(fk.hf.unpatch(copied)(ids).logits, expected)
    assert torch.equal(patched(ids).logits, logits)
    patched.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    again = type(patched).from_pretrained(tmp_path).eval()
    assert type(again) is type(original)
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(fk.hf.patch(again)(ids).logits, logits)


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora(patch_first: bool) -> None:
    batch = make_batch("right")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    found = []
    for patched in (False, True):
        model = make_model("llama")
        if patched and patch_first:
            fk.hf.patch(model)
        torch.manual_seed(3)
        tuned: Any = peft.get_peft_model(model, options)
        if patched and not patch_first:
            fk.hf.patch(tuned)
        assert (tuned(**batch).logits is None) is patched
        found.append(_loss_and_gradients(tuned, **batch))
    assert len(found[0]) == 13  # two matrices of three modules in two layers, and the loss
    _assert_close(found[1], found[0])


def test_trainer_accumulates(tmp_path: Path) -> None:
    rows = torch.randint(3, VOCAB, (8, 8), generator=torch.Generator().manual_seed(2))
    # Micro-batches of unequal numbers of labels, which a mean of means would weigh wrongly.
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(8) < i, -100)} for i, row in enumerate(rows)]
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    options |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    logs = []
    for model in (make_model("llama"), fk.hf.patch(make_model("llama"))):
        trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), **options), train_dataset=data)
        trainer.train()
        logs.append([line[key] for line in trainer.state.log_history for key in ("loss", "grad_norm") if key in line])
    assert len(logs[0]) == 4
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_hooks_are_called() -> None:
    batch, patched = make_batch("plain"), fk.hf.patch(make_model("qwen3"))
    called: list[str] = []
    for name in ("model.norm", "model.layers.0.self_attn.q_norm", "lm_head"):
        patched.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    _assert_close(_loss_and_gradients(patched, **batch), _loss_and_gradients(make_model("qwen3"), **batch))
    assert called == ["model.layers.0.self_attn.q_norm", "model.norm", "lm_head"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(family: str) -> None:
    batch, model, patched = make_batch("right"), make_model(family), fk.hf.patch(make_model(family))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _assert_close(_loss_and_gradients(patched, **batch), _loss_and_gradients(model, **batch))


@pytest.mark.parametrize("switch", ["attention", "norm", "mlp", "rotary", "loss"])
def test_each_switch_alone(switch: str) -> None:
    batch, model, patched = make_batch("left"), make_model("qwen3"), make_model("qwen3")
    others = {name: name == switch for name in ("attention", "norm", "mlp", "rotary", "loss")}
    fk.hf.patch(patched, **others)
    done = {line.reason for line in fk.hf.report(patched) if line.patched}
    expected = {
        "attention": {"attention"},
        "norm": {"RMS norm"},
        "mlp": {"MLP gated by silu"},
        "rotary": {"rotary embedding with QK-norm"},
        "loss": {"loss without logits"},
    }
    assert done == expected[switch]
    _assert_close(_loss_and_gradients(patched, **batch), _loss_and_gradients(model, **batch))


def test_norms_keep_the_dtype_of_their_own() -> None:
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    for family, dtype in (("llama", torch.float32), ("gemma", torch.bfloat16)):
        model = make_model(family)
        expected = model.model.norm(x)
        fk.hf.patch(model)
        assert model.model.norm(x).dtype == expected.dtype == dtype
        torch.testing.assert_close(model.model.norm(x), expected, rtol=1e-2, atol=1e-2)


def test_a_configuration_changed_while_patched_stays() -> None:
    model = make_model("llama")
    config = model.config
    fk.hf.patch(model)
    model.config.use_cache = True
    fk.hf.unpatch(model)
    assert model.config is not config
    assert model.config.use_cache
    assert model.config._attn_implementation == config._attn_implementation
    assert {id(vars(m)["config"]) for m in model.modules() if "config" in vars(m)} == {id(model.config)}


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
    old = make_model("gpt2")
    for module in (old, old.transformer):
        module._supports_attention_backend = False  # transformers 4's BERT
    assert "does not look it up" in str(fk.hf.report(fk.hf.patch(old)))
    assert old.config._attn_implementation == "sdpa"
    wants = fk.hf.patch(
        tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, output_attentions=True, attn_implementation="eager"))
    )
    assert wants(ids).attentions[0].shape == (1, 2, 8, 8)
    assert "output_attentions=True" in str(fk.hf.report(wants))


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
    with pytest.raises(ValueError, match="keep_logits: got 'yes'; give True or False"):
        fk.hf.patch(make_model("llama"), keep_logits="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module: got str; give a torch\.nn\.Module"):
        fk.hf.patch("llama")  # type: ignore[type-var]
    module = make_model("llama").model.layers[0].self_attn
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"position_bias: .*patch with attention=False"):
        _hf_attention.attention(module, q, q, q, None, position_bias=q)


def test_every_family_is_a_line_of_data() -> None:
    assert set(hf.FAMILIES) == set(FAMILIES)
