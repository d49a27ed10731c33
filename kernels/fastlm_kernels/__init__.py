"""Fast drop-ins for PyTorch's functions, modules and optimizers: change the import, keep the numbers.

`import fastlm_kernels as fk`; every function takes its PyTorch equal's arguments in full, ours by keyword after them.
"""

from __future__ import annotations

from . import hf, layers, nn, optim
from ._runtime import Explanation, backend, explain
from .activation import geglu, gelu, relu_squared, sigmoid, silu, swiglu, tanh
from .attention import scaled_dot_product_attention, varlen_attn
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .patching import patch, unpatch
from .rotary import rotary_embedding
from .softmax import log_softmax, softmax

__all__ = [
    "Explanation",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "cross_entropy",
    "explain",
    "geglu",
    "gelu",
    "hf",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "optim",
    "patch",
    "relu_squared",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "swiglu",
    "tanh",
    "unpatch",
    "varlen_attn",
]
