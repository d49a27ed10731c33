"""Models of transformers small enough for a test, with random weights."""

from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(**changes: Any) -> Any:
    """A decoder, the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **(SHAPE | changes)))


def tiny_bert_classifier(classes: int = 3) -> Any:
    """An encoder with a classifier on top, the same weights each time."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=classes, **SHAPE))  # pyright: ignore[reportCallIssue]
