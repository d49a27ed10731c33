"""Optimizers: torch.optim's classes with our keywords, and Muon with AdamW for a whole model in one object."""

from __future__ import annotations

from .muon import MuonWithAdamW, newton_schulz
from .torch_optim import SGD, Adadelta, Adagrad, Adam, AdamW, Muon, RMSprop

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Muon",
    "MuonWithAdamW",
    "RMSprop",
    "newton_schulz",
]
