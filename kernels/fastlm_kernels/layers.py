"""Layers for Hugging Face's kernel loader: `kernelize` lends their `forward` to modules of a model's own classes.

Stateless, as that loader wants them: no constructor, nothing but `forward`, whose `self` is the module of the model and
holds the parameters under the names that transformers gives them. Named as transformers names its layers for that
purpose, or, for an MLP and a merged gate, as they are commonly called. `python -m fastlm_kernels.hub` writes them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation, norm, rotary

__all__ = [
    "GEGLUMLP",
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "LayerNorm",
    "RMSNorm",
    "RMSNormZeroCentered",
    "RotaryPosEmb",
    "SiLU",
    "SiluAndMul",
    "SwiGLUMLP",
]


class _Layer(torch.nn.Module):
    """What the loader asks of a layer before it trains or compiles with it."""

    has_backward = True
    can_torch_compile = True


class LayerNorm(_Layer):
    """torch.nn.LayerNorm: weight, bias, eps, normalized_shape."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """See `layer_norm`."""
        return norm.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(_Layer):
    """The RMS norm of Llama, Qwen, Mistral: weight, variance_epsilon.

    Where input and weight are of one dtype it is scaled in fp32 and rounded once; where they differ, rounded to the
    input's dtype and then scaled, as the module does everywhere.
    """

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See `rms_norm`; the result's dtype is that of weight * input."""
        x, weight = hidden_states, self.weight
        if x.dtype == weight.dtype:
            return norm.rms_norm(x, weight.shape, weight, self.variance_epsilon).to(x.dtype)
        return weight * norm.rms_norm(x, weight.shape, None, self.variance_epsilon).to(x.dtype)


class RMSNormZeroCentered(_Layer):
    """The RMS norm of Gemma and Qwen 3.5: weight, eps; scaled by 1 + weight, then rounded to the input's dtype."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """See `rms_norm`."""
        return norm.rms_norm(x, self.weight.shape, self.weight, self.eps, weight_offset=1.0).to(x.dtype)


class SiLU(_Layer):
    """silu(input)."""

    def forward(self, input: Tensor) -> Tensor:
        """See `silu`."""
        return activation.silu(input)


class GeLU(_Layer):
    """gelu(input), by the error function."""

    def forward(self, input: Tensor) -> Tensor:
        """See `gelu`."""
        return activation.gelu(input)


class GeluTanh(_Layer):
    """gelu(input), by tanh: also what transformers calls NewGELU and FastGELU."""

    def forward(self, input: Tensor) -> Tensor:
        """See `gelu`."""
        return activation.gelu(input, approximate="tanh")


class SiluAndMul(_Layer):
    """silu(first half) * second half of the last dimension: a gate merged with its product."""

    def forward(self, x: Tensor) -> Tensor:
        """See `swiglu`; the halves are read where they lie."""
        return activation.swiglu(*x.chunk(2, -1))


class GeluAndMul(_Layer):
    """gelu(first half) * second half of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """See `geglu`; the halves are read where they lie."""
        return activation.geglu(*x.chunk(2, -1))


class SwiGLUMLP(_Layer):
    """The MLP of Llama, Qwen, Mistral: gate_proj, up_proj, down_proj. Its activation must be silu."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)); see `swiglu`."""
        return self.down_proj(activation.swiglu(self.gate_proj(x), self.up_proj(x)))


class GEGLUMLP(_Layer):
    """The MLP of Gemma: as SwiGLUMLP. Its activation must be gelu by tanh."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """down(gelu(gate(x)) * up(x)); see `geglu`."""
        return self.down_proj(activation.geglu(self.gate_proj(x), self.up_proj(x), approximate="tanh"))


class RotaryPosEmb(_Layer):
    """transformers' apply_rotary_pos_emb, which is a module to `kernelize`."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """See `rotary_embedding`; unsqueeze_dim names the axis of the heads."""
        return rotary.rotary_embedding(q, k, cos, sin, head_dim_axis=unsqueeze_dim)
