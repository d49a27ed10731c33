"""Hugging Face models: what of them runs on this package's functions, and what does not yet.

So far `patch` covers the torch.nn modules that a transformers model is built from (BERT's and GPT-2's LayerNorm, any
nn.GELU). The model classes' own modules are left alone, and `report` names them with the reason. Works on any
`torch.nn.Module`; needs no import of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .patching import _ORIGINALS, AnyModule
from .patching import patch as _patch
from .patching import unpatch as _unpatch

# Parts of a transformers class name -> why such a module is left alone.
_LEFT_ALONE = {
    "RMSNorm": "the model's own RMSNorm: arrives with the Hugging Face hooks",
    "LayerNorm": "the model's own LayerNorm: arrives with the Hugging Face hooks",
    "Attention": "attention: arrives with the Hugging Face hooks",
    "MLP": "gated and plain MLPs: arrive with the Hugging Face hooks",
    "RotaryEmbedding": "rotary embedding: arrives with the Hugging Face hooks",
    "Activation": "activations outside torch.nn: arrive with the Hugging Face hooks",
}


@dataclass(frozen=True)
class ReportLine:
    """One module of a model: its dotted name ("" is the model), its class, whether it is patched, and why (not)."""

    name: str
    module: str
    patched: bool
    reason: str


class Report(tuple[ReportLine, ...]):
    """What `report` found, a line a module; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (line.name or "(model)", line.module, "patched" if line.patched else "left alone", line.reason)
            for line in self
        ]
        if not rows:
            return "nothing here that a kernel could replace"
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def patch(model: AnyModule) -> AnyModule:
    """Let the torch.nn modules of `model` run on our functions, in place, and return it; see `fastlm_kernels.patch`."""
    return _patch(model)


def unpatch(model: AnyModule) -> AnyModule:
    """Undo `patch`, exactly, in place, and return the model."""
    return _unpatch(model)


def report(model: torch.nn.Module) -> Report:
    """Which modules of `model` are patched, which could be some day, and why they are not; print it for a table."""
    lines = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _ORIGINALS:
            lines.append(ReportLine(name, _ORIGINALS[kind].__name__, True, "torch.nn module"))
        else:
            reason = _why_left_alone(kind)
            if reason is not None:
                lines.append(ReportLine(name, kind.__name__, False, reason))
    return Report(lines)


def _why_left_alone(kind: type[torch.nn.Module]) -> str | None:
    if kind in _ORIGINALS.values():
        return "not patched: call patch(model)"
    return next((reason for part, reason in _LEFT_ALONE.items() if part in kind.__name__), None)
