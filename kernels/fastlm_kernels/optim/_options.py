"""Our keywords of every optimizer, as hooks around torch's own `step`.

    before   closure evaluated;  norm = sqrt(sum over all gradients of g^2)
             skip_nonfinite and norm not finite: gradients set aside, so that `step` finds nothing to do
             max_grad_norm: g *= min(1, max_grad_norm / (norm + 1e-6)), in place, as `clip_grad_norm_` does
    step     torch's, untouched
    after    gradients set aside return;  zero_grads: gradients filled with 0, `p.grad` kept

Hooks and no override of `step`: torch's hook wrappers, learning-rate schedulers and profiler labels stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepOptions:
    """Our keywords, checked."""

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    master_weights: bool = False
    stochastic_rounding: bool = False
    zero_grads: bool = False
    state_bits: int = 32

    def __post_init__(self) -> None:
        limit = self.max_grad_norm
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 < limit < math.inf):
            raise ValueError(f"max_grad_norm: got {limit!r}; give a finite number above 0, or None for no clipping")
        if self.state_bits not in (8, 32):
            raise ValueError(f"state_bits: got {self.state_bits!r}; give 32, the only width there is so far")
        for name in ("master_weights", "stochastic_rounding"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: got True; it arrives with the fused optimizers, leave it at False until then"
                )
        if self.state_bits == 8:
            raise ValueError("state_bits: got 8; it arrives with the fused optimizers, leave it at 32 until then")

    @property
    def needs_norm(self) -> bool:
        """Whether the step begins with a reduction over all gradients."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def active(self) -> bool:
        """Whether anything differs from torch's step."""
        return self.needs_norm or self.zero_grads


def gradients(param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Every gradient that is there, in the groups' order."""
    return [p.grad for group in param_groups for p in group["params"] if p.grad is not None]


def clip_in_place(grads: list[Tensor], norm: Tensor, max_grad_norm: float) -> None:
    """Scale all gradients by min(1, max_grad_norm / (norm + 1e-6)), with no host read."""
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))


def fill_with_zeros(grads: list[Tensor]) -> None:
    """Zero every gradient in place."""
    if grads:
        torch._foreach_zero_(grads)  # pyright: ignore[reportPrivateImportUsage]


class WithOptions:
    """Mixin before a `torch.optim` class: takes our keywords out of the constructor and hooks them in.

    grad_norm      0-d tensor, the last step's norm before clipping; None where no option asks for it
    skipped_steps  0-d int64 tensor, how many steps `skip_nonfinite` has left out
    """

    options: StepOptions
    grad_norm: Tensor | None
    skipped_steps: Tensor

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grads: bool = False,
        state_bits: int = 32,
        **kwargs: Any,
    ):
        options = StepOptions(
            max_grad_norm, skip_nonfinite, master_weights, stochastic_rounding, zero_grads, state_bits
        )
        super().__init__(*args, **kwargs)
        self._install(options, torch.zeros((), dtype=torch.int64))

    def _install(self, options: StepOptions, skipped_steps: Tensor) -> None:
        self.options, self.skipped_steps = options, skipped_steps
        self.grad_norm = None
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        if options.active:
            self.register_step_pre_hook(_before_step)  # type: ignore[attr-defined]
            self.register_step_post_hook(_after_step)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # deepcopy and pickle drop an optimizer's hooks: without this a copy would quietly stop clipping.
        return {**super().__getstate__(), "fastlm_options": (self.options, self.skipped_steps)}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        installed = state.pop("fastlm_options", None)
        super().__setstate__(state)  # type: ignore[misc]
        if installed is not None:
            self._install(*installed)


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    closure = kwargs.get("closure", next(iter(args[1:]), None))
    result = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
        result = ((optimizer, lambda: loss), {})
    if optimizer.options.needs_norm:
        _clip_or_set_aside(optimizer)
    return result


@torch.no_grad()
def _clip_or_set_aside(optimizer: Any) -> None:
    grads = gradients(optimizer.param_groups)
    options: StepOptions = optimizer.options
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_norm = norm
    if options.skip_nonfinite and not bool(torch.isfinite(norm)):
        optimizer.skipped_steps += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    optimizer._set_aside.append((p, p.grad))
                    p.grad = None
    elif options.max_grad_norm is not None:
        clip_in_place(grads, norm, options.max_grad_norm)


@torch.no_grad()
def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for p, grad in optimizer._set_aside:
        p.grad = grad
    optimizer._set_aside.clear()
    if optimizer.options.zero_grads:
        fill_with_zeros(gradients(optimizer.param_groups))
