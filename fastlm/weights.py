"""A model's weights while it trains, and what a checkpoint holds of them.

    a checkpoint   fp32 weights and the optimizer's state, rows of the vocabulary as many as the tokenizer has tokens
    in training    where the model computes in 16 bits its matrices are 16-bit parameters; their fp32 masters lie in the
                   optimizer, whose step updates a master and writes the rounded copy in one pass; no forward casts

A checkpoint does not say which of the two it came from: any device, precision and padding reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import checkpoint
from fastlm.checkpoint import Scalar
from fastlm.model import GPT, VOCABULARY, cut_vocabulary, pad_vocabulary
from fastlm_kernels.optim.states import MASTER, blocks_of, by_block, fit


def narrow(model: GPT, optimizer: torch.optim.Optimizer, *, accumulate: bool) -> None:
    """Round the linear layers' and embeddings' parameters to `compute_dtype`; the optimizer takes over the fp32 ones.

    Norms' parameters stay fp32: their kernels read them so. With `accumulate` gradients are summed in fp32 over
    micro-batches; one micro-batch's are the product's own rounding, and stay in it.
    """
    if model.compute_dtype == torch.float32:
        return
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, nn.Linear | nn.Embedding) else ():
            if parameter.dtype == torch.float32:  # a tied one comes twice
                optimizer.state[parameter][MASTER] = parameter.data
                parameter.data = parameter.data.to(model.compute_dtype)
                if accumulate:
                    parameter.grad_dtype = torch.float32


def model_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state_dict in fp32, masters in place of their copies."""
    state: dict[str, Tensor] = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        master = optimizer.state.get(parameter, {}).get(MASTER)
        if master is not None:
            state[name] = cut_vocabulary(name, master, model.vocab_size)
    return state


def optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | Scalar]:
    """`checkpoint.optimizer_tensors` without masters, which are the model's, and without padding."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    kept: dict[str, Tensor | Scalar] = {}
    for key, value in checkpoint.optimizer_tensors(optimizer, parameters.items()).items():
        name, _, state = key.partition("/")
        if state == MASTER:
            continue
        if by_block(state) and isinstance(value, Tensor):  # one number for each block of the rows that are kept
            rows = cut_vocabulary(name, parameters[name], model.vocab_size)
            kept[key] = value[: blocks_of(rows.numel())]
            continue
        by_row = isinstance(value, Tensor) and value.shape == parameters[name].shape
        kept[key] = cut_vocabulary(name, value, model.vocab_size) if by_row else value  # type: ignore[arg-type]
    return kept


def restore_optimizer(model: GPT, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor | Scalar]) -> None:
    """Put back what `optimizer_tensors` gave, in the width that `optimizer` keeps; before `narrow`."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    padded: dict[str, Tensor | Scalar] = {}
    for key, value in tensors.items():
        name, _, state = key.partition("/")
        padded[key] = value
        if not isinstance(value, Tensor) or name not in parameters:
            continue
        if by_block(state) and name in VOCABULARY:
            missing = blocks_of(parameters[name].numel()) - value.numel()
            padded[key] = F.pad(value, (0, max(0, missing)))
        else:
            padded[key] = pad_vocabulary(name, value, parameters[name])
    checkpoint.restore_optimizer(optimizer, parameters.items(), padded)
    fit(optimizer)
