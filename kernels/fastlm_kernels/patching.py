"""`patch` a model of your own: its torch.nn modules compute with this package's functions; `unpatch` undoes it.

A patched instance only changes its class, to a subclass of its own with another `forward`. So it keeps its parameters,
buffers, hooks, names and `state_dict`, passes every isinstance test, survives deepcopy and pickle, and is restored
exactly by taking its old class again. Nothing outside the given module is touched.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from . import nn

AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


class PatchedLayerNorm(nn.LayerNorm):
    """A torch.nn.LayerNorm that `patch` found."""


class PatchedRMSNorm(nn.RMSNorm):
    """A torch.nn.RMSNorm that `patch` found."""


class PatchedGELU(nn.GELU):
    """A torch.nn.GELU that `patch` found."""


class PatchedSiLU(nn.SiLU):
    """A torch.nn.SiLU that `patch` found."""


class PatchedSigmoid(nn.Sigmoid):
    """A torch.nn.Sigmoid that `patch` found."""


class PatchedTanh(nn.Tanh):
    """A torch.nn.Tanh that `patch` found."""


class PatchedSoftmax(nn.Softmax):
    """A torch.nn.Softmax that `patch` found."""


class PatchedLogSoftmax(nn.LogSoftmax):
    """A torch.nn.LogSoftmax that `patch` found."""


class PatchedCrossEntropyLoss(nn.CrossEntropyLoss):
    """A torch.nn.CrossEntropyLoss that `patch` found."""


# Classes of their own rather than `nn`'s: `unpatch` must leave alone the modules that were ours from the start.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: PatchedLayerNorm,
    torch.nn.RMSNorm: PatchedRMSNorm,
    torch.nn.GELU: PatchedGELU,
    torch.nn.SiLU: PatchedSiLU,
    torch.nn.Sigmoid: PatchedSigmoid,
    torch.nn.Tanh: PatchedTanh,
    torch.nn.Softmax: PatchedSoftmax,
    torch.nn.LogSoftmax: PatchedLogSoftmax,
    torch.nn.CrossEntropyLoss: PatchedCrossEntropyLoss,
}

if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # new in torch 2.13

    class PatchedLinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
        """A torch.nn.LinearCrossEntropyLoss that `patch` found."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            """The loss of `input` under the head this module holds; see `linear_cross_entropy`."""
            return nn.held_head_loss(self, input, target)

    REPLACEMENTS[torch.nn.LinearCrossEntropyLoss] = PatchedLinearCrossEntropyLoss

_ORIGINALS = {patched: original for original, patched in REPLACEMENTS.items()}


def check_module(module: object) -> None:
    """ValueError for anything but a module."""
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module: got {type(module).__name__}; give a torch.nn.Module")


def _swap(module: torch.nn.Module, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    check_module(module)
    for child in module.modules():
        # Exact types alone: a subclass may have a forward of its own. So may an instance.
        replacement = classes.get(type(child))
        if replacement is not None and "forward" not in vars(child):
            child.__class__ = replacement


def patch(module: AnyModule) -> AnyModule:
    """Let every module of a class in `REPLACEMENTS` in `module`, itself included, run on ours.

    These are torch.nn's LayerNorm, RMSNorm, GELU, SiLU, Sigmoid, Tanh, Softmax, LogSoftmax, CrossEntropyLoss and, from
    torch 2.13 on, LinearCrossEntropyLoss. In place, and returned. Patching twice is harmless; subclasses, parametrised
    modules and instances with a forward of their own stay as they are. ValueError for anything but a module.
    """
    _swap(module, REPLACEMENTS)
    return module


def unpatch(module: AnyModule) -> AnyModule:
    """Give every module that `patch` changed its class back. In place, and returned; harmless where nothing was."""
    _swap(module, _ORIGINALS)
    return module
