"""A LoRA fine-tune of a Llama with PEFT on fastlm's kernels: patch the model, then let PEFT wrap it.

    pip install -e '.[hf]' && python examples/llama_lora.py [DIR]

DIR is a Llama and its tokenizer as `save_pretrained` writes them. Without it: a tiny model with random weights, first
trained as a whole on some sentences so that there is something to adapt. Its tokens are bytes.
"""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fastlm_kernels as fk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENGLISH = ["The cat sleeps under the table.", "The dog runs over the hill.", "A fox runs and the cat sleeps."]
GERMAN = ["Die Katze schläft unter dem Tisch.", "Der Hund läuft über den Berg.", "Ein Fuchs läuft."]


def batch_of(texts: list[str], directory: str | None) -> dict[str, torch.Tensor]:
    """Tokens padded on the right, their mask, and labels that leave the padding out."""
    if directory is None:
        rows = [torch.tensor([byte + 3 for byte in text.encode()]) for text in texts]
    else:
        rows = [torch.tensor(ids) for ids in AutoTokenizer.from_pretrained(directory)(texts)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def model_of(directory: str | None) -> LlamaForCausalLM:
    """The model in `directory`, or one to play with."""
    if directory is not None:
        return LlamaForCausalLM.from_pretrained(directory, local_files_only=True)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def train(model, batch: dict[str, torch.Tensor], steps: int, lr: float) -> list[float]:
    """Fit what wants a gradient to the batch; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = fk.optim.AdamW(trained, lr=lr, max_grad_norm=1.0, zero_grads=True)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main(directory: str | None = None, steps: int = 60) -> tuple[list[float], list[float]]:
    """Adapt; (the losses while adapting, those of the base model and of the adapter loaded from disk at the end)."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        base = fk.hf.patch(model_of(directory))
    if directory is None:
        train(base, batch_of(ENGLISH, None), steps, 3e-3)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    batch = batch_of(GERMAN, directory)
    losses = train(model, batch, steps, 1e-2)
    with tempfile.TemporaryDirectory() as adapter, torch.no_grad():
        model.save_pretrained(adapter)
        plain = fk.hf.unpatch(model.unload())  # the base model as it was, in transformers' own classes
        before = plain(**batch).loss.item()
        after = PeftModel.from_pretrained(plain, adapter)(**batch).loss.item()
    return losses, [before, after]


if __name__ == "__main__":
    losses, (before, after) = main(sys.argv[1] if len(sys.argv) > 1 else None)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; unpatched: base {before:.3f}, with the adapter {after:.3f}")  # noqa: T201
