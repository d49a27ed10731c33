"""Breaks of attention/_hopper.py."""

from __future__ import annotations

from breaks import Mutation

FILE = "attention/_hopper.py"
TEXT = "test_hopper.py::test_the_kernels_text_computes_attention[{}]"
SCHEDULE = "test_hopper.py::test_no_schedule_changes_a_bit[{}]"
CAUSAL = TEXT.format("T257-S400-causal-group2-batch2-gluon")
RIGHT = TEXT.format("T300-S140-causal-alignbottom_right-gluon")
WINDOW = TEXT.format("T300-S300-window(100, 30)-softcap3.0-gluon")

MUTATIONS = (
    Mutation(
        "hopper: keys loaded over before they were read",
        FILE,
        "    mbarrier.wait(empty, phase ^ 1)\n    mbarrier.expect",
        "    mbarrier.expect",
        CAUSAL,
    ),
    Mutation(
        "hopper: the loader waits for the wrong phase",
        FILE,
        "    mbarrier.wait(empty, phase ^ 1)\n    mbarrier.expect",
        "    mbarrier.wait(empty, phase)\n    mbarrier.expect",
        CAUSAL,
    ),
    Mutation(
        "hopper: bytes that are not expected",
        FILE,
        "mbarrier.expect(full, DESCRIPTOR.block_type.nbytes)",
        "mbarrier.expect(full, DESCRIPTOR.block_type.nbytes // 2)",
        CAUSAL,
    ),
    Mutation(
        "hopper: keys never given back",
        FILE,
        "        mbarrier.arrive(k_empty.index(stage), count=1)\n        start",
        "        start",
        CAUSAL,
    ),
    Mutation(
        "hopper: keys given back before S is there",
        FILE,
        "        s = warpgroup_mma_wait(0, deps=[s])\n        mbarrier.arrive(k_empty.index(done % STAGES), count=1)\n",
        "        mbarrier.arrive(k_empty.index(done % STAGES), count=1)\n        s = warpgroup_mma_wait(0, deps=[s])\n",
        SCHEDULE.format("gluon-resident"),
    ),
    Mutation(
        "hopper: values given back before P V is there",
        FILE,
        "        acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n",
        "        mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        acc, p = warpgroup_mma_wait(0, deps=[acc, p])\n",
        SCHEDULE.format("gluon"),
    ),
    Mutation(
        "hopper: one group's reading is enough to load values over",
        FILE,
        "        _barriers(STAGES, 2),\n        _barriers(2, 1),",
        "        _barriers(STAGES, 1),\n        _barriers(2, 1),",
        SCHEDULE.format("gluon"),
    ),
    Mutation(
        "hopper: S taken while P V may be what has ended",
        FILE,
        "s = warpgroup_mma_wait(1, deps=[s])",
        "s = warpgroup_mma_wait(2, deps=[s])",
        CAUSAL,
    ),
    Mutation(
        "hopper: values of another stage",
        FILE,
        "    v = v_tiles.index(stage)",
        "    v = v_tiles.index((stage + 1) % STAGES)",
        CAUSAL,
    ),
    Mutation(
        "hopper: keys not waited for",
        FILE,
        "    mbarrier.wait(k_full.index(stage), done // STAGES & 1)\n",
        "",
        CAUSAL,
    ),
    Mutation(
        "hopper: nobody begins",
        FILE,
        "(done & 1) ^ (1 - HALF))",
        "done & 1)",
        CAUSAL,
    ),
    Mutation(
        "hopper: one group's reading is enough to load keys over",
        FILE,
        "        _barriers(STAGES, 2),\n        _barriers(STAGES, 1),\n        _barriers(STAGES, 2),",
        "        _barriers(STAGES, 1),\n        _barriers(STAGES, 1),\n        _barriers(STAGES, 2),",
        CAUSAL,
    ),
    Mutation(
        "hopper: values where keys belong",
        FILE,
        "(_load, (Q, K, V, buffers",
        "(_load, (Q, V, K, buffers",
        CAUSAL,
    ),
    Mutation(
        "hopper: a turn not passed on",
        FILE,
        "        mbarrier.arrive(turn.index(1 - HALF), count=1)\n        s = warpgroup_mma_wait(1",
        "        s = warpgroup_mma_wait(1",
        CAUSAL,
    ),
    Mutation(
        "hopper: the next queries loaded while these are in use",
        FILE,
        "        mbarrier.wait(q_full.index(HALF), q_phase)\n",
        "        mbarrier.wait(q_full.index(HALF), q_phase)\n        mbarrier.arrive(q_empty.index(HALF), count=1)\n",
        SCHEDULE.format("gluon-resident"),
    ),
    Mutation(
        "hopper: the last output overwritten while it is stored",
        FILE,
        "        tma.store_wait(0)\n        out_tile",
        "        out_tile",
        SCHEDULE.format("gluon-resident"),
    ),
    Mutation(
        "hopper: the output stored before the copy engine sees it",
        FILE,
        "        fence_async_shared()\n",
        "",
        CAUSAL,
    ),
    Mutation(
        "hopper: the program ends before its output is stored",
        FILE,
        "        q_phase = q_phase ^ 1\n    tma.store_wait(0)\n",
        "        q_phase = q_phase ^ 1\n",
        SCHEDULE.format("gluon"),
    ),
    Mutation(
        "hopper: the output not brought to the new top",
        FILE,
        "acc = acc * gl.convert_layout(shrink",
        "acc = acc + 0.0 * gl.convert_layout(shrink",
        CAUSAL,
    ),
    Mutation(
        "hopper: tiles on the diagonal taken for whole",
        FILE,
        "                phase != 1,\n",
        "                phase == 2,\n",
        TEXT.format("T1000-S1000-causal-gluon-resident"),
    ),
    Mutation(
        "hopper: the first tile not masked",
        FILE,
        "HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True\n",
        "HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, False\n",
        TEXT.format("T65-S63-causal-group3-gluon"),
    ),
    Mutation(
        "hopper: the second group masks the first one's queries",
        FILE,
        "        start += HALF * ROWS\n        rows = start + gl",
        "        rows = start + gl",
        CAUSAL,
    ),
    Mutation(
        "hopper: queries that see nothing read the last keys",
        FILE,
        "end = gl.where(stop > first, gl.cdiv(stop, BLOCK_N), past + 1)",
        "end = gl.where(stop > first, gl.cdiv(stop, BLOCK_N), past)",
        RIGHT,
    ),
    Mutation(
        "hopper: keys of the query's head",
        FILE,
        "        key_head = head // group\n",
        "        key_head = head\n",
        CAUSAL,
    ),
    Mutation(
        "hopper: the log-sum-exp of another batch",
        FILE,
        "(gl.cast(batch, gl.int64) * heads + head) * T",
        "gl.cast(head, gl.int64) * T",
        CAUSAL,
    ),
    Mutation(
        "hopper: the soft-cap left out",
        FILE,
        "        factor = 1.0\n    if MASKED",
        "        factor = 1.0 / softcap\n    if MASKED",
        WINDOW,
    ),
    Mutation(
        "hopper: a descriptor without the heads' stride",
        FILE,
        "    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)",
        "    return TensorDescriptor(x, list(x.shape), [strides[0], strides[2], strides[2], 1], block, layout)",
        CAUSAL,
    ),
    Mutation(
        "hopper: taken for a call with a mask",
        FILE,
        "    if any(x is not None for x in extras) or options.dropout > 0.0:",
        "    if options.dropout > 0.0:",
        "test_hopper.py::test_what_it_does_not_cover_keeps_the_plain_kernel[a key mask]",
    ),
    Mutation(
        "hopper: softmax after the products instead of beside them",
        FILE,
        "        mbarrier.wait(v_full.index(before), phase)\n",
        "",
        "test_hopper.py::test_its_code_is_what_hopper_is_for[128]",
        interpret=False,
    ),
)
