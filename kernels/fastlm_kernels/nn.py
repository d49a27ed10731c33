"""Modules: torch.nn's classes with this package's functions in `forward`. Same constructor, same `state_dict`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .activation import gelu, sigmoid, silu, tanh
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .norm import layer_norm, rms_norm
from .softmax import log_softmax, softmax

# Frames between whoever calls a module and PyTorch's warning about a missing `dim`, as torch.nn.Softmax counts them.
_STACKLEVEL = 5


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`: (..., *normalized_shape) in and out."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last `len(normalized_shape)` dimensions; see `layer_norm`."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`: (..., *normalized_shape) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last `len(normalized_shape)` dimensions; see `rms_norm`."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GELU(torch.nn.GELU):
    """`torch.nn.GELU`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """See `gelu`."""
        return gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """`torch.nn.SiLU`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """See `silu`."""
        return silu(input, inplace=self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """`torch.nn.Sigmoid`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """See `sigmoid`."""
        return sigmoid(input)


class Tanh(torch.nn.Tanh):
    """`torch.nn.Tanh`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """See `tanh`."""
        return tanh(input)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Along `self.dim`; see `softmax`."""
        return softmax(input, self.dim, _STACKLEVEL)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax`: any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Along `self.dim`; see `log_softmax`."""
        return log_softmax(input, self.dim, _STACKLEVEL)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`; the loss of fp16 and bf16 logits is fp32."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """See `cross_entropy`."""
        loss = cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        assert isinstance(loss, Tensor)
        return loss


def held_head_loss(module: Any, input: Tensor, target: Tensor, **ours: Any) -> Any:
    """`linear_cross_entropy` under the head and the options that `module` holds as torch.nn.LinearCrossEntropyLoss."""
    classes = (module.num_classes, *module.out_features)
    bias = module.linear.bias
    return linear_cross_entropy(
        input,
        module.linear.weight.reshape(*classes, module.linear.in_features),
        target,
        linear_bias=None if bias is None else bias.reshape(classes),
        weight=module.weight,
        reduction=module.reduction,
        ignore_index=module.ignore_index,
        label_smoothing=module.label_smoothing,
        options=module.options,
        **ours,
    )


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` of torch 2.13, also on older versions: the head and its loss in one module.

    Holds `linear.weight` (num_classes * prod(out_features), in_features), `linear.bias` with bias=True, and `weight`
    (num_classes,), a buffer. Input (D,), (N, D) or (B, T, D); our keywords are those of `linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        return_z_loss: bool = False,
        softcap: float | None = None,
    ):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: got shape {tuple(weight.shape)}; give ({num_classes},), one per class")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"label_smoothing: got {label_smoothing}; give a number between 0 and 1")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.z_loss, self.return_z_loss, self.softcap = options, z_loss, return_z_loss, softcap
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, *, num_items: int | Tensor | None = None) -> Any:
        """The loss of `input` under the head this module holds; see `linear_cross_entropy`."""
        return held_head_loss(
            self,
            input,
            target,
            z_loss=self.z_loss,
            return_z_loss=self.return_z_loss,
            softcap=self.softcap,
            num_items=num_items,
        )

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        names = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
