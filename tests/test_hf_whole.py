"""hf.patch and the rest of the world: other models, transformers' own features, copies."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    DECODERS,
    FAMILIES,
    VOCAB,
    assert_close,
    assert_same,
    loss_and_gradients,
    make_batch,
    make_model,
    tf,
)
from torch import Tensor, nn

import fastlm_kernels as fk
from fastlm_kernels import _hf_attention

# transformers 5 warns of names that its own code still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_same_configuration_and_unpatch_are_bitwise(family: str) -> None:
    batch, model = make_batch("right"), make_model(family)
    other = type(model)(model.config).train()
    other.load_state_dict(model.state_dict())
    config, attributes = model.config, [dict(vars(module)) for module in model.modules()]
    text, before = config.to_json_string(), loss_and_gradients(other, **batch)
    patched = fk.hf.patch(fk.hf.patch(model, norm=False))
    assert patched is model
    assert type(patched) is not type(other)
    assert type(patched).__name__ == type(other).__name__
    assert isinstance(patched, type(other))
    assert_close(loss_and_gradients(patched, **batch), before)
    assert_same(loss_and_gradients(other, **batch), before)
    assert other.config is config
    assert (config.to_json_string(), config._attn_implementation) == (text, other.config._attn_implementation)
    assert fk.hf.unpatch(patched) is model
    assert_same(loss_and_gradients(model, **batch), before)
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
    batch, models = make_batch("right"), [make_model(family) for family in FAMILIES]
    for model in models:  # whatever is imported lazily
        loss_and_gradients(fk.hf.unpatch(fk.hf.patch(model)), **batch)
    tables = (tf.AttentionInterface._global_mapping, tf.AttentionMaskInterface._global_mapping)
    for table in tables:
        table.pop(_hf_attention.KEY)
    before, keys = _everything(), [set(table) for table in tables]
    for model in models:
        loss_and_gradients(fk.hf.patch(model), **batch)
    after = _everything()
    assert len(before) > 10_000
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] is not after[name] and before[name] != after[name]]
    assert not [name for name in changed if name[-2:] != ("_global_mapping", "keys")]
    assert [set(table) - known for table, known in zip(tables, keys, strict=True)] == [{"fastlm_kernels"}] * 2


def test_masks_are_no_larger_than_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attention = _hf_attention.attention

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return attention(module, q, k, v, mask, **options)

    monkeypatch.setattr(_hf_attention, "attention", spy)
    for family in DECODERS:
        seen.clear()
        fk.hf.patch(make_model(family))(**make_batch("left"))
        assert [tuple(mask.shape) for mask in seen] == [(2, 16)] * 2
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
        assert_close(loss_and_gradients(patched, **batch, **extra), loss_and_gradients(model, **batch, **extra))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_pickles_and_saved_models(family: str, tmp_path: Path) -> None:
    ids = make_batch("plain")["input_ids"]
    original = make_model(family).eval()
    expected, own = original(ids).logits, original.config._attn_implementation
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
    again = type(patched).from_pretrained(tmp_path, attn_implementation=own).eval()
    assert type(again) is type(original)
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(fk.hf.patch(again)(ids).logits, logits)


def test_hooks_are_called() -> None:
    batch, patched = make_batch("plain"), fk.hf.patch(make_model("qwen3"))
    called: list[str] = []
    for name in ("model.norm", "model.layers.0.self_attn.q_norm", "lm_head"):
        patched.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(make_model("qwen3"), **batch))
    assert called == ["model.layers.0.self_attn.q_norm", "model.norm", "lm_head"]


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
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))


def test_norms_keep_the_dtype_of_their_own() -> None:
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    for family, dtype in (("llama", torch.float32), ("gemma", torch.bfloat16), ("olmo2", torch.bfloat16)):
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


@pytest.mark.parametrize(
    "make",
    [
        lambda model: type(model)(model.config),
        lambda model: tf.AutoModelForCausalLM.from_config(model.config),
        lambda model: tf.LlamaForCausalLM(copy.deepcopy(model.config)),
    ],
    ids=["its class", "from_config", "a copy"],
)
def test_a_model_of_a_patched_ones_configuration_can_be_patched_and_unpatched(make: Any) -> None:
    batch, patched = make_batch("left"), fk.hf.patch(make_model("llama"))
    config, before = patched.config, loss_and_gradients(patched, **batch)
    made = make(patched).train()
    made.load_state_dict(patched.state_dict())
    assert_close(loss_and_gradients(made, **batch), before)
    assert [line.name for line in fk.hf.report(made) if line.module == "LlamaForCausalLM" and line.patched] == [""]
    fk.hf.unpatch(made)
    assert not any(line.patched for line in fk.hf.report(made))
    assert made.config._attn_implementation == make_model("llama").config._attn_implementation
    assert_same(loss_and_gradients(made, **batch), loss_and_gradients(make_model("llama"), **batch))
    assert_same(loss_and_gradients(fk.hf.patch(made), **batch), before)
    fk.hf.unpatch(made)
    assert not any(line.patched for line in fk.hf.report(made))
    # The first one is as it was.
    assert patched.config is config
    assert all(line.patched for line in fk.hf.report(patched))
    assert_same(loss_and_gradients(patched, **batch), before)
