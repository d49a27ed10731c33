"""GPT-2 under transformers' Trainer with fastlm's kernels and optimizer, on the standard library's own sources.

    pip install -e '.[hf]' && python examples/gpt2_trainer.py && tensorboard --logdir runs/gpt2_trainer

Three epochs, two micro-batches an update, warm-up, weight decay on matrices alone, TensorBoard's event files. Two lines
differ from any other Trainer script: `fk.hf.patch(model)` and the optimizer. The Trainer clips, so that it does not.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastlm_kernels as fk


def tokenizer_of(texts: list[str], size: int) -> Tokenizer:
    """A byte-level BPE learnt from the texts, with at most `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    return tokenizer


def blocks_of(text: str, tokenizer: Tokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The text's tokens in blocks of `length`; the model shifts the labels itself."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    return [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def groups_of(model: torch.nn.Module, decay: float) -> list[dict]:
    """Weight decay for matrices, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def main(out: str = "runs/gpt2_trainer", length: int = 64, epochs: int = 3) -> tuple[list[float], float]:
    """Train; (the loss of every update, the loss on text held out)."""
    torch.manual_seed(0)
    text = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    tokenizer = tokenizer_of([text], 512)
    blocks = blocks_of(text, tokenizer, length)
    held_out = len(blocks) // 10
    config = GPT2Config(n_positions=length, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    config.vocab_size = tokenizer.get_vocab_size()
    model = fk.hf.patch(GPT2LMHeadModel(config))  # the loss never forms the logits while training
    arguments = TrainingArguments(
        output_dir=out,
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=10,
        logging_steps=1,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = fk.optim.AdamW(groups_of(model, 0.1), lr=5e-3)
    # The Trainer makes the schedule: a linear warm-up, then linear decay to 0.
    train, test = blocks[:-held_out], blocks[-held_out:]
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, optimizers=(optimizer, None))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    losses, held_out = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {held_out:.3f} on held-out text")  # noqa: T201
