"""Attention of few queries against many keys, as in generation: in parts of the keys, joined by their lse."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator
from .._runtime import kernel, tl
from ._forward import Work, run_forward
from ._launch import Extras, Options, config_of, power_of_2, sizes_of, strides_of
from ._tiles import VARYING


@kernel(do_not_specialize=VARYING)
def attention_combine_kernel(
    PARTIAL,
    PARTIAL_LSE,
    OUT,
    LSE,
    T,
    heads,
    rows_of_heads,
    splits,
    stride_ob,
    stride_oh,
    stride_ot,
    BLOCK_M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = sum over splits of 2^lse_i out_i / sum of 2^lse_i, always in the same order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.cast(rows_of_heads, tl.int64) * T
    rows_ok = rows < count
    e = tl.arange(0, BLOCK_E)
    ok = rows_ok[:, None] & (e < E)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    for split in range(splits):
        at = split * count + rows
        lse = tl.load(PARTIAL_LSE + at, mask=rows_ok, other=float("-inf"))
        part = tl.load(PARTIAL + at[:, None] * E + e[None, :], mask=ok, other=0.0)
        higher = tl.maximum(top, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - base), tl.exp2(lse - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = higher
    norm = tl.where(total == 0.0, 1.0, total)
    row, t = rows // T, rows % T
    out_at = OUT + ((row // heads) * stride_ob + (row % heads) * stride_oh + t * stride_ot)[:, None] * UNIT
    tl.store(out_at + e[None, :], (acc / norm[:, None]).to(OUT.dtype.element_ty), mask=ok)
    if SAVE_LSE:
        tl.store(LSE + rows, tl.where(total == 0.0, float("-inf"), top + tl.log2(norm)), mask=rows_ok)


def few_queries(q: Tensor, k: Tensor, extras: Extras, options: Options) -> bool:
    """Whether all queries of a group of heads fit one small tile against keys long enough to be split.

    Not so of packed documents, whose lengths the host does not know: they take the plain forward, however few queries
    each has.
    """
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    few = rows <= configs.ATTENTION_DECODE_ROWS and k.shape[2] >= configs.ATTENTION_DECODE_KEYS
    return few and extras.cu_q is None


def launch_decode(tensors: tuple[Tensor, ...], extras: Extras, options: Options, save_lse: bool) -> None:
    """Few queries, many keys: a program for each chunk of the keys, then their results by their log-sum-exps."""
    q, k, v, out, lse = tensors
    (B, H, T, _), Hk, S, E = q.shape, k.shape[1], k.shape[2], v.shape[-1]
    config = config_of(configs.ATTENTION_DECODE, configs.ATTENTION_FP32, q, v)
    config = replace(config, block_m=power_of_2(T * (H // Hk)))
    blocks = -(-S // config.block_n)
    wanted = -(-configs.ATTENTION_DECODE_PROGRAMS * _runtime.multiprocessors(q.device) // (B * Hk))
    each = -(-blocks // min(blocks, wanted))
    splits = -(-blocks // each)
    work = Work(Hk, H // Hk, 1, B * Hk, B * Hk, splits, each * config.block_n)
    if splits == 1:
        run_forward(tensors, extras, options, work, config, save_lse, split=True)
        return
    acc, tl_acc = accumulator(q.dtype)
    partial, partial_lse = (
        torch.empty(shape, dtype=acc, device=q.device) for shape in ((splits * B, H, T, E), (splits * B, H, T))
    )
    run_forward((q, k, v, partial, partial_lse), extras, options, work, config, True, True, B * H * T * E)
    unit, strides = strides_of(out)
    sizes = sizes_of(q, v)
    _runtime.launch(
        attention_combine_kernel,
        (-(-B * H * T // configs.ATTENTION_COMBINE_ROWS),),
        (partial, partial_lse, out, lse, T, H, B * H, splits, *strides),
        num_warps=4,
        BLOCK_M=configs.ATTENTION_COMBINE_ROWS,
        E=E,
        BLOCK_E=sizes["BLOCK_E"],
        UNIT=unit,
        SAVE_LSE=save_lse,
        ACC=tl_acc,
    )
