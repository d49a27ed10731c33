"""AdamW of fastlm_kernels in Hugging Face's Trainer: three lines, marked 1 to 3.

    pip install -e '.[hf]' && python examples/adamw_hf_trainer.py

Trainer makes the optimizer itself, with its own groups (no decay on biases and norms), and its scheduler sets the rate.
Clipping moves into the update, so Trainer's own, which writes every gradient once more, is turned off. A tiny GPT-2
with random weights learns to count; nothing is fetched.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastlm_kernels as fk  # 1


class Counting(torch.utils.data.Dataset):
    """Sequences n, n + 1, n + 2 ... modulo 32."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + i) % 32
        return {"input_ids": ids, "labels": ids}


def main(steps: int = 40) -> list[float]:
    """Train; the losses that Trainer logs."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            max_grad_norm=0.0,  # 2
            logging_steps=steps // 4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        options = {"lr": arguments.learning_rate, "max_grad_norm": 1.0, "skip_nonfinite": True}
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=arguments,
            train_dataset=Counting(),
            optimizer_cls_and_kwargs=(fk.optim.AdamW, options),  # 3
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")  # noqa: T201
