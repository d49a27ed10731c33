"""Which parameter gets which update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlm_kernels as fk
from fastlm.config import OptimConfig
from fastlm.model import GPT, Attention


def build_optimizer(cfg: OptimConfig, model: GPT, *, captured: bool = False) -> torch.optim.Optimizer:
    """One optimizer over all parameters; every group carries `initial_lr`, which the schedule multiplies.

    For a model that computes in 16 bits it holds fp32 masters (`fastlm.weights`). `captured`: as a CUDA graph needs it,
    rates are tensors of the device and gradients are filled with zeros by the step, at the addresses that they have.

    muon: the blocks' matrices are orthogonalised (the Q, K and V parts of a merged projection apart), everything
    else gets AdamW at `adam_lr`. Otherwise one rule for all, with weight decay on tensors of two or more dimensions.
    `step()` clips the global norm, leaves out a non-finite update whole, and notes the norm in `grad_norm`.
    """
    guards = {"max_grad_norm": cfg.grad_clip, "skip_nonfinite": True, "zero_grads": captured}
    guards |= {"master_weights": model.compute_dtype != torch.float32, "state_bits": cfg.state_bits}
    if cfg.name == "muon":
        groups = _muon_groups(cfg, model)
        optimizer: Any = fk.optim.MuonWithAdamW(groups, split=qkv_split(model), **guards)
    else:
        optimizer = _build_torch(cfg, _decay_groups(cfg, list(model.parameters())), guards)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        if captured:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Scale every group's rate by the schedule; returns the first group's, the one that logs show."""
    rates = [group["initial_lr"] * multiplier for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a captured graph reads it there
        else:
            group["lr"] = rate
    return rates[0]


def qkv_split(model: GPT) -> dict[Tensor, list[int]]:
    """Row counts of Q, K and V inside each merged projection."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return {layer.qkv.weight: [heads * layer.head_dim for heads in layer.sizes] for layer in layers}


def _muon_groups(cfg: OptimConfig, model: GPT) -> list[dict[str, Any]]:
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = {"params": matrices, "use_muon": True, "lr": cfg.lr, "momentum": cfg.momentum}
    muon["weight_decay"] = cfg.weight_decay
    adam = {"use_muon": False, "betas": tuple(cfg.betas), "eps": cfg.eps}
    return [muon, *[group | adam for group in _decay_groups(cfg, rest, lr=cfg.adam_lr)]]


def _decay_groups(cfg: OptimConfig, params: list[nn.Parameter], lr: float | None = None) -> list[dict[str, Any]]:
    """Tensors of two or more dimensions decay, vectors (biases, norm weights) do not."""
    lr = cfg.lr if lr is None else lr
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "lr": lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _build_torch(cfg: OptimConfig, groups: list[dict[str, Any]], guards: dict[str, Any]) -> Any:
    """One of `torch.optim`'s rules, in its fused form where the trainer's devices all have one."""
    adam = {"betas": tuple(cfg.betas), "eps": cfg.eps, "fused": True}
    build, options = {
        "adamw": (fk.optim.AdamW, adam),
        "adam": (fk.optim.Adam, adam),
        "sgd": (fk.optim.SGD, {"momentum": cfg.momentum, "fused": True}),
        "adagrad": (fk.optim.Adagrad, {"eps": cfg.eps}),
        "adadelta": (fk.optim.Adadelta, {"eps": cfg.eps}),
        "rmsprop": (fk.optim.RMSprop, {"momentum": cfg.momentum, "eps": cfg.eps}),
    }[cfg.name]
    return build(groups, **options, **guards)
