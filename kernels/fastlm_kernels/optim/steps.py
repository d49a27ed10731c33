"""Optimizer steps for the ahead-of-time report: no functions of tensors, so not the registry's, but recorded alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import _runtime
from . import muon, torch_optim

# 124M parameters in a dozen tensors: the report compiles, it allocates nothing.
_SHAPES = ((50304, 768), (1024, 768), *((2304, 768), (768, 768), (3072, 768), (768, 3072), (768,)) * 12)
_EVERYTHING = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True}
# States of a class, each read and written: by name, and more by option.
_STATES = {"AdamW": 2, "Adam": 2, "SGD": 0, "Adagrad": 1, "Adadelta": 2, "RMSprop": 1}
_EXTRA_STATES = ("amsgrad", "momentum", "centered")


@dataclass(frozen=True)
class Step:
    """One optimizer; `compiled` are its options that reach every switch, `quick` those of the quick report."""

    name: str
    compiled: tuple[dict[str, Any], ...]

    @property
    def quick(self) -> tuple[dict[str, Any], ...]:
        """The last case alone."""
        return self.compiled[-1:]

    def record(self, case: dict[str, Any], dtype: torch.dtype, architecture: str) -> list[_runtime.Launch]:
        """The launches of one step, made on no device."""
        params = [torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for shape in _SHAPES]
        for p in params:
            p.grad = torch.empty_like(p)
        kind: Any = getattr(muon if self.name == "MuonWithAdamW" else torch_optim, self.name)
        with _runtime.recording(architecture) as launches:
            kind(params, **case).step()
        return launches

    def traffic(self, case: dict[str, Any], dtype: torch.dtype, backward: bool) -> int:
        """The least bytes that the step must move, Muon's matrix products left out; a step has no backward."""
        elements = sum(torch.Size(shape).numel() for shape in _SHAPES)
        return 0 if backward else elements * bytes_per_parameter(self.name, case, dtype)


def bytes_per_parameter(name: str, case: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes that a step reads and writes for each parameter and gradient of `dtype`.

    AdamW in fp32: p, g, m, v read and p, m, v written, 28. The norm of max_grad_norm or skip_nonfinite reads g again;
    zero_grads writes it; with masters p is written but not read, and the fp32 master is both. States of 8 bits: a byte
    each, their blocks' exponents (1/32 in all) not counted.
    """
    size = dtype.itemsize
    wide = case.get("master_weights") or case.get("stochastic_rounding")
    master = bool(case.get("master_weights")) and size < 4
    states = _STATES.get(name, 1) + sum(bool(case.get(option)) for option in _EXTRA_STATES)
    bits = case.get("state_bits", 32)
    total = size + states * 2 * (1 if bits == 8 else 4 if wide else size)
    total += size + 8 if master else 2 * size
    total += size * bool(case.get("max_grad_norm") is not None or case.get("skip_nonfinite"))
    return total + size * bool(case.get("zero_grads"))


STEPS = (
    Step("Adam", ({}, {"amsgrad": True})),
    Step("SGD", ({}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.1})),
    Step("Adagrad", ({},)),
    Step("Adadelta", ({},)),
    Step("RMSprop", ({}, {"momentum": 0.9, "centered": True})),
    Step("MuonWithAdamW", ({}, {"master_weights": True, **_EVERYTHING})),
    Step(
        "AdamW",
        (
            {"amsgrad": True, **_EVERYTHING},
            {"master_weights": True},
            {"master_weights": True, **_EVERYTHING},
            {"stochastic_rounding": True, **_EVERYTHING},
            {"state_bits": 8},
            {"state_bits": 8, "master_weights": True, **_EVERYTHING},
            {"state_bits": 8, "stochastic_rounding": True, **_EVERYTHING},
            {},
        ),
    ),
)
