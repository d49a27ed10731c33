"""Registration and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._runtime import Operator
from ._launch import Options, empty_like
from ._norm_backward import launch_norm_backward
from ._rotation import launch_rotation


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    results = _fake_forward(q, k)
    launch_rotation((q, k), results, (cos, sin), (q_weight, k_weight), Options(*options), inverse=False)
    return results


def _fake_forward(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(q), empty_like(k)


def _launch_backward(
    cos: Tensor,
    sin: Tensor,
    dyq: Tensor | None,
    dyk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dq_weight, dk_weight), those not in `needs` empty; q and k only where they were normed."""
    *options, needs = rest
    grads = _fake_backward(cos, sin, dyq, dyk, q, k, q_weight, k_weight, *rest)
    upstream = [dy if needs[i] or needs[i + 2] else None for i, dy in enumerate((dyq, dyk))]
    weights = (q_weight, k_weight)
    if q is None or k is None:
        launch_rotation(upstream, grads[:2], (cos, sin), weights, Options(*options), inverse=True)
    else:
        launch_norm_backward(upstream, (q, k), (cos, sin), weights, Options(*options), grads, needs)
    return grads


def _fake_backward(
    cos: Tensor,
    sin: Tensor,
    dyq: Tensor | None,
    dyk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_q, need_k, need_wq, need_wk = rest[-1]
    other = dyq if dyq is not None else dyk
    assert other is not None

    def like(x: Tensor | None, dy: Tensor | None, need: bool) -> Tensor:
        source = dy if x is None else x
        return empty_like(source) if need and source is not None else other.new_empty(0)

    def vector(weight: Tensor | None, need: bool) -> Tensor:
        return torch.empty_like(weight) if need and weight is not None else other.new_empty(0)

    return like(q, dyq, need_q), like(k, dyk, need_k), vector(q_weight, need_wq), vector(k_weight, need_wk)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cos, sin, q_weight, k_weight, *options = inputs
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    # Neither side depends on the other's inputs.
    ctx.mark_non_differentiable(*(y for side, y in enumerate(output) if not (needs[side] or needs[4 + side])))
    ctx.options = Options(*options)
    normed = ctx.options.eps is not None
    ctx.save_for_backward(cos, sin, *((q, k, q_weight, k_weight) if normed else (None,) * 4))


def _backward(ctx: Any, dyq: Tensor | None, dyk: Tensor | None) -> tuple[Any, ...]:
    cos, sin, *saved = ctx.saved_tensors
    need_q, need_k, _, _, need_wq, need_wk = ctx.needs_input_grad[:6]
    used = (dyq is not None, dyk is not None) * 2
    needs = [need and use for need, use in zip((need_q, need_k, need_wq, need_wk), used, strict=True)]
    rest = (None,) * len(ctx.options)
    if not any(needs):
        return (None,) * 6 + rest
    grads = rotary_backward(cos, sin, dyq, dyk, *saved, *ctx.options, needs)
    dq, dk, dwq, dwk = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (dq, dk, None, None, dwq, dwk, *rest)


_OPTIONS = "int heads_axis, SymInt rotated, bool interleaved, float? eps, float weight_offset"
rotary_forward = Operator(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    f" {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
rotary_backward = Operator(
    "rotary_backward(Tensor cos, Tensor sin, Tensor? dyq, Tensor? dyk, Tensor? q, Tensor? k, Tensor? q_weight,"
    f" Tensor? k_weight, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
