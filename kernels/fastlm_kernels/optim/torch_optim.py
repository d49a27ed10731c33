"""`torch.optim`'s classes with our keywords: same constructor, same results, same `state_dict`, both ways.

Each takes what the torch class of its name takes, and keyword-only after it:

    max_grad_norm         clip the global norm over all parameters to this before the update (None: off); gradients are
                          scaled in place. Unscale first where a GradScaler is in use
    skip_nonfinite        leave out the whole update, the step count included, when a gradient is inf or NaN. Reads one
                          flag on the host
    zero_grads            fill the gradients with 0 after the update; `p.grad` is kept
    master_weights, stochastic_rounding, state_bits=8     ValueError so far: they arrive with the fused optimizers

The options are not part of `state_dict`: they belong to the constructor.
"""

from __future__ import annotations

import torch

from ._options import WithOptions


class AdamW(WithOptions, torch.optim.AdamW):
    """`torch.optim.AdamW`: decoupled weight decay. Our keywords: see the module's text."""


class Adam(WithOptions, torch.optim.Adam):
    """`torch.optim.Adam`: weight decay as L2, added to the gradient. Our keywords: see the module's text."""


class SGD(WithOptions, torch.optim.SGD):
    """`torch.optim.SGD`: momentum, dampening, Nesterov. Our keywords: see the module's text."""


class Adagrad(WithOptions, torch.optim.Adagrad):
    """`torch.optim.Adagrad`. Our keywords: see the module's text."""


class Adadelta(WithOptions, torch.optim.Adadelta):
    """`torch.optim.Adadelta`. Our keywords: see the module's text."""


class RMSprop(WithOptions, torch.optim.RMSprop):
    """`torch.optim.RMSprop`: centred or not, with or without momentum. Our keywords: see the module's text."""


class Muon(WithOptions, torch.optim.Muon):
    """`torch.optim.Muon`: 2-d parameters only; `MuonWithAdamW` takes a whole model. Our keywords: see above."""
