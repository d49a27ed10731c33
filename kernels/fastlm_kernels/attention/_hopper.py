"""Attention's forward for Hopper in Gluon: a warp that loads, two warp groups that take turns at the tensor cores.

    warp 8        loads  Q of both halves, then K and V, a ring of STAGES tiles each, by the tensor memory accelerator
    warps 0 - 3   S = Q K^T, softmax, O += P V  for the first half of the tile's queries
    warps 4 - 7   the same for the second half

One group's softmax runs while the other group's products do: `turn` lets them issue one after the other. Within a group
the products of S for the next tile are issued before those of P V for this one, so that each softmax also runs beside
the group's own P V. Keys are walked from the last tile that is seen to the first: the tiles on the diagonal come first.

The equations, the masks and the order of programs are those of `_forward`, by the same helpers. Written to memory:
OUT, LSE; read: Q once, K and V once a tile of queries. A launch has a program for every tile of queries, or as many
programs as multiprocessors, which then walk tiles and load the next Q and K while the last O is stored.

Every buffer has a barrier that says it is full and one that says it is empty; a barrier's phase is its use modulo 2.
`tests/gluon_emulator.py` runs this file's text, with these barriers, under random schedules. That proves the arithmetic
and the protocol; what the compiler makes of them, and how fast that is, only a GPU can say: none has run it yet. So no
shipped table asks for it; `tune` tries it.
"""

# Gluon's annotations describe its compiler's objects, not what a kernel's text sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _runtime, configs
from .._runtime import HAS_TRITON, tl
from ._launch import Extras, Options, steps_of, unit_of
from ._tiles import VARYING, capped, place, seen_by, softmax_step, tile_range

if HAS_TRITON or TYPE_CHECKING:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEAD_DIMS = (64, 128)


def _gluon(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`gluon.jit`; where Triton is missing the function stays as it is and is never called."""

    def decorate(fn: Callable[..., Any]) -> Any:
        return gluon.jit(fn, do_not_specialize=list(do_not_specialize)) if HAS_TRITON else fn

    return decorate


def _constexpr(fn: Callable[..., Any]) -> Any:
    """A function of constants that kernels call while they are compiled."""
    return gluon.constexpr_function(fn) if HAS_TRITON else fn


@_constexpr
def _product(columns: Any) -> Any:
    """How four warps hold the product of rows, 64 at a time, with `columns` columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@_gluon()
def _work(
    program,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """(batch, head, first query, shift, tiles of keys as begin <= whole <= edge <= end) of a program.

    Every query sees the tiles from `whole` to `edge` whole. A tile of queries that sees nothing walks the one tile past
    the last key, which loads nothing and is masked.
    """
    T, S, _programs, heads, _group, tiles, rows_of_heads, section, left, right, _scale, _softcap = sizes
    tile, batch, head = place(program, tiles, rows_of_heads, heads, section, HAS_RIGHT)
    start = tile * BLOCK_M
    shift = 0
    if BOTTOM_RIGHT:
        shift = S - T
    first, full, edge, stop = tile_range(start, T, S, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    past = gl.cdiv(S, BLOCK_N)
    begin = gl.where(stop > first, first // BLOCK_N, past)
    end = gl.where(stop > first, gl.cdiv(stop, BLOCK_N), past + 1)
    whole = gl.maximum(full // BLOCK_N, begin)
    return batch, head, start, shift, begin, whole, gl.maximum(edge // BLOCK_N, whole), end


@_gluon()
def _load_tile(DESCRIPTOR, batch, head, start, full, empty, phase, tile):
    """Fill `tile` once its last content has been read; `full` counts the bytes that arrive."""
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(full, DESCRIPTOR.block_type.nbytes)
    tma.async_copy_global_to_shared(DESCRIPTOR, [batch, head, start, 0], full, tile)


@_gluon()
def _load(
    Q,
    K,
    V,
    buffers,
    barriers,
    sizes,
    BLOCK_M: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """The loading warp: Q, and then for every tile of keys K and V."""
    q_tiles, k_tiles, v_tiles, _out_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = barriers
    programs, group = sizes[2], sizes[4]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    done, q_phase = 0, 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        batch, head, start, _shift, begin, _whole, _edge, end = _work(
            program, sizes, BLOCK_M, BLOCK_N, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT
        )
        key_head = head // group
        for half in tl.static_range(2):
            at = start + half * (BLOCK_M // 2)
            _load_tile(Q, batch, head, at, q_full.index(half), q_empty.index(half), q_phase, q_tiles.index(half))
        for i in range(end - begin):
            at = (end - 1 - i) * BLOCK_N
            stage, phase = done % STAGES, done // STAGES & 1
            k_full_, k_empty_, k_tile = k_full.index(stage), k_empty.index(stage), k_tiles.index(stage)
            _load_tile(K, batch, key_head, at, k_full_, k_empty_, phase, k_tile)
            v_full_, v_empty_, v_tile = v_full.index(stage), v_empty.index(stage), v_tiles.index(stage)
            _load_tile(V, batch, key_head, at, v_full_, v_empty_, phase, v_tile)
            done += 1
        q_phase = q_phase ^ 1


@_gluon()
def _scores(q, buffers, barriers, done, HALF: gl.constexpr):
    """Issue S = Q K^T for the tile of keys number `done` of this program, at this group's turn."""
    k_tiles, k_full, turn = buffers[1], barriers[2], barriers[6]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), done // STAGES & 1)
    # The first group begins: what it waits for at first is the phase before the first, which is over.
    mbarrier.wait(turn.index(HALF), (done & 1) ^ (1 - HALF))
    k = k_tiles.index(stage).reshape([BLOCK_N, q.shape[1]]).permute((1, 0))
    nothing = gl.full([q.shape[0], BLOCK_N], 0.0, gl.float32, _product(BLOCK_N))
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@_gluon()
def _values(acc, weights, buffers, barriers, done):
    """(what is issued, its P): O += P V for the tile of keys number `done`."""
    v_tiles, v_full = buffers[2], barriers[4]
    STAGES: gl.constexpr = v_tiles.shape[0]
    stage = done % STAGES
    mbarrier.wait(v_full.index(stage), done // STAGES & 1)
    v = v_tiles.index(stage).reshape([weights.shape[1], acc.shape[1]])
    p = gl.convert_layout(weights.to(v_tiles.dtype), gl.DotOperandLayout(0, _product(acc.shape[1]), 2))
    return warpgroup_mma(p, v, acc, is_async=True), p


@_gluon()
def _weights(
    s,
    total,
    top,
    rows,
    start,
    sight,
    sizes,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    MASKED: gl.constexpr,
):
    """(p, shrink, total, top) after the scores of the keys from `start` on."""
    scale, softcap = sizes[10], sizes[11]
    BLOCK_N: gl.constexpr = s.shape[1]
    factor = scale * 1.4426950408889634
    if HAS_SOFTCAP:
        s, _slope = capped(s, scale, softcap)
        factor = 1.0
    if MASKED:
        cols = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _product(BLOCK_N)))
        rows = rows[:, None]
        seen = seen_by(rows, rows, cols[None, :], sight, 0, 0, 0, True, HAS_LEFT, HAS_RIGHT, False, 0, False)
        s = gl.where(seen, s, float("-inf"))
    return softmax_step(s, total, top, factor, MASKED)


@_gluon()
def _held(weights, dtype: gl.constexpr, D: gl.constexpr):
    """Weights until the next tile: in 16 bits, which costs two moves a pair of them, only where 32 would spill."""
    if weights.shape[1] * D > 8192:
        weights = weights.to(dtype)
    return weights


@_gluon()
def _walk(
    acc,
    weights,
    total,
    top,
    q,
    done,
    rows,
    end,
    begin,
    sight,
    buffers,
    barriers,
    sizes,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HALF: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Tiles of keys from end - 1 down to `begin`; `weights` are the tile's before, whose P V is not issued yet."""
    k_tiles = buffers[1]
    _q_full, _q_empty, _k_full, k_empty, v_full, v_empty, turn = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    D: gl.constexpr = k_tiles.shape[4]
    O_LAYOUT: gl.constexpr = _product(D)
    for i in range(end - begin):
        stage, before, phase = done % STAGES, (done - 1) % STAGES, (done - 1) // STAGES & 1
        s = _scores(q, buffers, barriers, done, HALF)
        acc, p = _values(acc, weights, buffers, barriers, done - 1)
        mbarrier.arrive(turn.index(1 - HALF), count=1)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        start = (end - 1 - i) * BLOCK_N
        weights, shrink, total, top = _weights(
            s, total, top, rows, start, sight, sizes, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, MASKED
        )
        # Long full. A branch is what NVIDIA's assembler moves no exponential across: without one the softmax would
        # come after the wait for P V instead of beside it.
        mbarrier.wait(v_full.index(before), phase)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
        weights = _held(weights, k_tiles.dtype, D)
        done += 1
    return acc, weights, total, top, done


@_gluon()
def _attend(
    OUT,
    LSE,
    buffers,
    barriers,
    sizes,
    BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HALF: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):
    """A group of four warps: its half of every tile of queries."""
    q_tiles, k_tiles, _v_tiles, out_tiles = buffers
    q_full, q_empty, _k_full, k_empty, _v_full, v_empty, turn = barriers
    T, S, programs, heads, _group, _tiles, _rows, _section, left, right, _scale, _softcap = sizes
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    ROWS: gl.constexpr = q_tiles.shape[3]
    D: gl.constexpr = q_tiles.shape[4]
    O_LAYOUT: gl.constexpr = _product(D)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, _product(BLOCK_N))
    q, out_tile = q_tiles.index(HALF).reshape([ROWS, D]), out_tiles.index(HALF)
    done, q_phase = 0, 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        batch, head, start, shift, begin, whole, edge, end = _work(
            program, sizes, 2 * ROWS, BLOCK_N, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT
        )
        sight = (S, shift, left, right)
        start += HALF * ROWS
        rows = start + gl.arange(0, ROWS, ROW_LAYOUT)
        total = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
        top = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
        acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full.index(HALF), q_phase)
        s = _scores(q, buffers, barriers, done, HALF)
        mbarrier.arrive(turn.index(1 - HALF), count=1)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(done % STAGES), count=1)
        end -= 1
        # The last tile is masked even where it is whole: one a program.
        weights, _shrink, total, top = _weights(
            s, total, top, rows, end * BLOCK_N, sight, sizes, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True
        )
        weights = _held(weights, OUT.dtype, D)
        done += 1
        # Tiles on the right edge, whole tiles, tiles on the left edge. Without a window there is but one on the right.
        for phase in tl.static_range(0 if HAS_RIGHT else 1, 3 if HAS_LEFT else 2):
            low = gl.minimum(edge if phase == 0 else (whole if phase == 1 else begin), end)
            acc, weights, total, top, done = _walk(
                acc,
                weights,
                total,
                top,
                q,
                done,
                rows,
                end,
                low,
                sight,
                buffers,
                barriers,
                sizes,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HALF,
                phase != 1,
            )
            end = low
        mbarrier.arrive(q_empty.index(HALF), count=1)
        acc, p = _values(acc, weights, buffers, barriers, done - 1)
        # out = sum of p v / sum of p; a row that saw nothing has 0 / 1
        norm = gl.where(total == 0.0, 1.0, total)
        if SAVE_LSE:
            lse = gl.where(total == 0.0, float("-inf"), top + gl.log2(norm))
            at = (gl.cast(batch, gl.int64) * heads + head) * T
            gl.store(LSE + at + rows, lse, mask=rows < T)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index((done - 1) % STAGES), count=1)
        out = acc / gl.convert_layout(norm, gl.SliceLayout(1, O_LAYOUT))[:, None]
        # The last tile's store may still read what this one overwrites.
        tma.store_wait(0)
        out_tile.reshape([ROWS, D]).store(out.to(OUT.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(OUT, [batch, head, start, 0], out_tile)
        q_phase = q_phase ^ 1
    tma.store_wait(0)


@_gluon()
def _barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers, each of whose phases ends with that many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in tl.static_range(N):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@_gluon()
def _buffers(N: gl.constexpr, DESCRIPTOR):
    """N tiles as the descriptor reads or writes them."""
    shape: gl.constexpr = DESCRIPTOR.block_type.shape
    return gl.allocate_shared_memory(DESCRIPTOR.dtype, [N, 1, 1, shape[2], shape[3]], DESCRIPTOR.layout)


@_gluon(do_not_specialize=(*VARYING, "programs"))
def attention_hopper_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    T,
    S,
    programs,
    heads,
    group,
    tiles,
    rows_of_heads,
    section,
    left,
    right,
    scale,
    softcap,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):
    """Tiles of BLOCK_M queries of one head each; Q, K, V and OUT are descriptors of (batches, heads, positions, D)."""
    buffers = (_buffers(2, Q), _buffers(STAGES, K), _buffers(STAGES, V), _buffers(2, OUT))
    barriers = (
        _barriers(2, 1),
        _barriers(2, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(2, 1),
    )
    # The copy engine must see the barriers too.
    fence_async_shared()
    sizes = (T, S, programs, heads, group, tiles, rows_of_heads, section, left, right, scale, softcap)
    gl.warp_specialize(
        [
            (
                _attend,
                (OUT, LSE, buffers, barriers, sizes, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, 0, SAVE_LSE),
            ),
            (
                _attend,
                (OUT, LSE, buffers, barriers, sizes, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, 1, SAVE_LSE),
            ),
            (_load, (Q, K, V, buffers, barriers, sizes, BLOCK_M, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT)),
        ],
        [4, 1],
        # Of 65536 for 384 threads each would have 168; what the loading warp leaves is for the groups that compute.
        [240, 24],
    )


def covers(config: configs.AttentionConfig, tensors: tuple[Tensor, ...], extras: Extras, options: Options) -> bool:
    """Whether this kernel can do the call with this configuration; the plain one takes the others.

    Heads of 64 or 128 channels in 16 bits, values as wide as keys; windows and soft-cap, but no mask in memory, packed
    documents or dropout. Positions, heads and batches lie apart, on 16-byte boundaries.
    """
    q, _, v = tensors
    if _runtime.architecture(q.device) != "sm_90":
        return False
    if any(x is not None for x in extras) or options.dropout > 0.0:
        return False
    if q.itemsize != 2 or q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return False
    # Each group's rows are a multiple of the 64 that its four warps multiply at once; with one stage K waits for V.
    if config.block_m not in (128, 256) or config.num_stages < 2:
        return False
    return all(_describable(x) for x in tensors)


def _describable(x: Tensor) -> bool:
    unit = unit_of(x)
    apart = (step >= x.shape[-1] and step % unit == 0 for step, n in zip(steps_of(x), x.shape, strict=False) if n > 1)
    return x.data_ptr() % 16 == 0 and all(apart)


def _descriptor(x: Tensor, rows: int) -> Any:
    """Tiles of `rows` positions of one head; what lies outside a head is read as 0 and not written."""
    block = [1, 1, rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # An axis of one element may have any stride, one that the hardware takes here.
    strides = [max(step, x.shape[-1]) for step in steps_of(x)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def run_hopper(
    tensors: tuple[Tensor, ...],
    options: Options,
    work: tuple[int, ...],
    config: configs.AttentionConfig,
    save_lse: bool,
) -> None:
    """Launch the kernel on q, k, v, out, lse that it `covers`; `work` is heads, group, tiles, rows, section, ..."""
    q, k, v, out, lse = tensors
    heads, group, tiles, rows, section = work[:5]
    programs = tiles * rows
    resident = config.loads == "gluon-resident"
    own, keys = config.block_m // 2, config.block_n
    if options.softcap > 0.0 and q.shape[-1] > 64:
        keys = min(keys, 64)  # the soft-cap's arithmetic on 128 keys spills beside 128 channels
    _runtime.launch(
        attention_hopper_kernel,
        (min(programs, _runtime.multiprocessors(q.device)) if resident else programs,),
        (
            *(_descriptor(q, own), _descriptor(k, keys), _descriptor(v, keys), _descriptor(out, own), lse),
            *(q.shape[2], k.shape[2], programs, heads, group, tiles, rows, section),
            *(options.left, options.right, options.scale, options.softcap),
        ),
        num_warps=config.num_warps,
        BLOCK_M=config.block_m,
        BLOCK_N=keys,
        D=q.shape[-1],
        STAGES=config.num_stages,
        BOTTOM_RIGHT=options.bottom_right,
        HAS_LEFT=options.left >= 0,
        HAS_RIGHT=options.right >= 0,
        HAS_SOFTCAP=options.softcap > 0.0,
        SAVE_LSE=save_lse,
    )
