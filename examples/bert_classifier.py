"""A BERT that tells comments from code, trained on the Python standard library's own sources: two epochs of AdamW.

    pip install -e '.[hf]' && python examples/bert_classifier.py

Shows `fk.hf.patch` on an encoder with padded batches and attention masks, and `fk.optim.AdamW` under a linear warm-up.
The model is small and starts from random weights; `BertForSequenceClassification.from_pretrained(DIR)` works the same.
"""

import re
import tokenize
import zlib
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastlm_kernels as fk

PAD, START, VOCABULARY, LENGTH = 0, 1, 2000, 32


def lines_of_the_library(count: int) -> tuple[list[str], list[int]]:
    """`count` lines of each kind, what they say and whether it is a comment; no line twice."""
    comments, code = {}, {}
    for path in sorted(Path(tokenize.__file__).parent.glob("*.py"))[:50]:
        with tokenize.open(path) as file:
            for line in map(str.strip, file):
                if len(line) > 20:
                    (comments if line.startswith("#") else code)[line.lstrip("# ")] = None
    texts = [*list(comments)[:count], *list(code)[:count]]
    return texts, [1] * count + [0] * count


def batch_of(texts: list[str], labels: list[int], device: str) -> dict[str, torch.Tensor]:
    """Words and signs, numbered by a hash, padded on the right to the longest text, their mask, and the labels."""
    words = [re.findall(r"\w+|\S", text)[: LENGTH - 1] for text in texts]
    rows = [torch.tensor([START, *(2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in row)]) for row in words]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(labels)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def main(count: int = 2000, batch_size: int = 32, epochs: int = 2) -> tuple[list[float], float]:
    """Train; (the loss of every update, the share of unseen lines that it gets right)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    with torch.device(device):
        model = fk.hf.patch(BertForSequenceClassification(config))  # print(fk.hf.report(model)) says what it did
    texts, labels = lines_of_the_library(count)
    order = torch.randperm(2 * count).tolist()
    train, test = order[count // 5 :], order[: count // 5]

    steps, warmup = epochs * (len(train) // batch_size), epochs * (len(train) // batch_size) // 10
    optimizer = fk.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, max_grad_norm=1.0, zero_grads=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    losses = []
    for _ in range(epochs):
        shuffled = [train[i] for i in torch.randperm(len(train)).tolist()]
        for rows in zip(*[iter(shuffled)] * batch_size, strict=False):
            loss = model(**batch_of([texts[i] for i in rows], [labels[i] for i in rows], device)).loss
            loss.backward()
            optimizer.step()  # clips and zeroes the gradients too
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        batch = batch_of([texts[i] for i in test], [labels[i] for i in test], device)
        right = model(**batch).logits.argmax(-1) == batch["labels"]
    return losses, right.float().mean().item()


if __name__ == "__main__":
    losses, accuracy = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {accuracy:.1%} of unseen lines right")  # noqa: T201
