"""Attention's forward and backward as registered operators with an autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._runtime import Operator
from ._backward import fake_backward, launch_backward
from ._forward import fake_forward, launch_forward
from ._launch import Extras, Options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *rest[:6])
    ctx.options = Options(*rest[6:-1])


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *extras = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    rest = (None,) * (len(Extras._fields) + len(Options._fields) + 1)
    if (do is None and dlse is None) or not any(needs):
        return (None, None, None, *rest)
    do = torch.zeros_like(out) if do is None else do
    grads = attention_backward(do, dlse, q, k, v, out, lse, *extras, *ctx.options, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *rest)


_EXTRAS = "Tensor? mask, Tensor? key_mask, Tensor? cu_q, Tensor? cu_k, Tensor? used_k, Tensor? seed"
_OPTIONS = (
    "SymInt max_q, SymInt max_k, int left, int right, bool bottom_right, float scale, float softcap, float dropout,"
    " bool deterministic"
)
attention_forward = Operator(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}, bool save_lse) -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
    _setup_context,
    _backward,
)
attention_backward = Operator(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_EXTRAS}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    fake_backward,
)
