"""hf.patch and what trains a model: the compiler, LoRA, checkpointing, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_models import FAMILIES, VOCAB, assert_close, loss_and_gradients, make_batch, make_model, tf

import fastlm_kernels as fk

# transformers 5 warns of names that its own code and peft's still use.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiled_in_evaluation(family: str) -> None:
    """The loss and the logits, which in training are compiled for every family (test_hf.py)."""
    torch._dynamo.reset()
    batch, model, patched = make_batch("left"), make_model(family), fk.hf.patch(make_model(family))
    compiled = torch.compile(patched.eval(), backend="aot_eager", fullgraph=True)
    found, expected = compiled(**batch), model.eval()(**batch)
    real = batch["attention_mask"].bool()
    assert_close([found.loss, found.logits[real]], [expected.loss, expected.logits[real]])


@pytest.mark.needs_kernels
def test_compiled_whole_with_the_kernels() -> None:
    torch._dynamo.reset()
    batch, model, patched = make_batch("left"), make_model("llama"), fk.hf.patch(make_model("llama"))
    compiled = torch.compile(patched, backend="eager", fullgraph=True)
    assert_close(loss_and_gradients(compiled, **batch), loss_and_gradients(model, **batch))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, after a graph break
def test_compiled_with_packed_documents() -> None:
    torch._dynamo.reset()
    batch = make_batch("packed")
    model, patched = (make_model("llama", num_hidden_layers=1) for _ in range(2))
    compiled = torch.compile(fk.hf.patch(patched), backend="eager")
    assert_close(loss_and_gradients(compiled, **batch), loss_and_gradients(model, **batch))


ADAPTED = {
    "llama": ["q_proj", "gate_proj", "down_proj"],
    "qwen3": ["k_proj", "o_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "dense"],
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of gpt2's transposed matrices
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("family", ADAPTED)
def test_lora(family: str, patch_first: bool) -> None:
    batch = make_batch("right")
    options = peft.LoraConfig(r=4, target_modules=ADAPTED[family], init_lora_weights=False)
    found = []
    for patched in (False, True):
        model = make_model(family)
        if patched and patch_first:
            fk.hf.patch(model)
        torch.manual_seed(3)
        tuned: Any = peft.get_peft_model(model, options)
        if patched and not patch_first:
            fk.hf.patch(tuned)
        assert (tuned(**batch).logits is None) is patched
        found.append(loss_and_gradients(tuned, **batch))
    adapted = sum(name.split(".")[-1] in ADAPTED[family] for name, _ in make_model(family).named_modules())
    assert len(found[0]) == 1 + 2 * adapted > 1  # the loss, and two matrices a module
    assert_close(found[1], found[0])


def test_an_adapted_head_keeps_the_models_own_loss() -> None:
    options = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    batch, found = make_batch("right"), []
    for patch in (fk.hf.unpatch, fk.hf.patch):
        torch.manual_seed(3)
        tuned: Any = patch(peft.get_peft_model(make_model("llama"), options))
        assert tuned(**batch).logits is not None
        found.append(loss_and_gradients(tuned, **batch))
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    batch, model, patched = make_batch("right"), make_model(family), fk.hf.patch(make_model(family))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(loss_and_gradients(patched, **batch), loss_and_gradients(model, **batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_trainer_accumulates(family: str, tmp_path: Path) -> None:
    rows = torch.randint(3, VOCAB, (8, 8), generator=torch.Generator().manual_seed(2))
    # Micro-batches of unequal numbers of labels, which a mean of means would weigh wrongly.
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(8) < i, -100)} for i, row in enumerate(rows)]
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    options |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    logs = []
    for model in (make_model(family), fk.hf.patch(make_model(family))):
        trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), **options), train_dataset=data)
        trainer.train()
        logs.append([line[key] for line in trainer.state.log_history for key in ("loss", "grad_norm") if key in line])
    assert len(logs[0]) == 4
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
