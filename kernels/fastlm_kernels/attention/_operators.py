"""Attention's forward and backward as registered operators with an autograd formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import configs
from .._rows import accumulator
from .._runtime import Operator
from ._backward import fake_backward, launch_backward
from ._decode import few_queries, launch_decode
from ._forward import Work, run_forward
from ._launch import (
    Extras,
    Options,
    config_of,
    documents_of,
    empty_like,
    grid_of,
    readable,
    stepping,
    steps_of,
    unit_of,
)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), lse in units of log2, empty if it is not asked for."""
    extras, options, save_lse = stepping(Extras(*rest[:6])), Options(*rest[6:-1]), rest[-1]
    out, lse = fake_forward(q, k, v, *rest)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0 or extras.cu_q is not None:
        # What belongs to no document is never written.
        out.zero_()
        lse.fill_(-math.inf)
    if k.numel() == 0:
        return out, lse
    q, k, v = readable(q), readable(k), readable(v)
    if few_queries(q, k, extras, options):
        launch_decode((q, k, v, out, lse), extras, options, save_lse)
        return out, lse
    config = config_of(configs.ATTENTION_FORWARD, configs.ATTENTION_FP32, q, v, _most(extras))
    gluon = config.loads.startswith("gluon") and _in_gluon(config, (q, k, v), extras, options)
    if not gluon and not _describable(config, (q, k, v), extras):
        config = configs.by_pointers(config)
    batch, longest, keys = documents_of(q, k, extras, options)
    group = q.shape[1] // k.shape[1]
    key_bytes = keys * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = grid_of(batch, q.shape[1], longest, config.block_m, group, key_bytes)
    work = Work(q.shape[1], group, tiles, rows, section)
    if gluon:
        from ._hopper import run_hopper

        run_hopper((q, k, v, out, lse), options, work, config, save_lse)
        return out, lse
    run_forward((q, k, v, out, lse), extras, options, work, config, save_lse)
    return out, lse


def _most(extras: Extras) -> configs.AttentionTiles | None:
    """What limits the tile of wide heads."""
    if extras.mask is not None:
        return configs.ATTENTION_FORWARD_MASKED
    return None if extras.key_mask is None else configs.ATTENTION_FORWARD_PADDED


def _in_gluon(config: configs.AttentionConfig, tensors: tuple[Tensor, ...], extras: Extras, options: Options) -> bool:
    """Whether the kernel in Gluon covers the call. It is imported where a configuration asks for it."""
    from ._hopper import covers

    return covers(config, tensors, extras, options)


def _describable(config: configs.AttentionConfig, tensors: tuple[Tensor, ...], extras: Extras) -> bool:
    """Whether the tiles can be loaded as the configuration says: descriptors want rows on 16-byte boundaries.

    Warps that only load cannot load masks, which have no descriptors, and leave no registers for dropout's words. A
    packed document may be empty, a descriptor not.
    """
    if extras.cu_q is not None or config.loads.startswith("gluon"):
        return config.loads == "pointers"
    beside = (extras.mask, extras.key_mask, extras.seed)
    if config.loads == "specialized" and any(x is not None for x in beside):
        return False
    rows = (x.shape[-1] % unit_of(x) == 0 and steps_of(x)[2] >= x.shape[-1] for x in tensors)
    return config.loads == "pointers" or (tensors[0].itemsize == 2 and all(rows))


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3] if rest[-1] else (0,), dtype=accumulator(q.dtype)[0], device=q.device)
    return empty_like(q, v.shape[-1]), lse


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
