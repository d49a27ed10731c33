"""How a model is compiled: one block for all layers, kept between runs, compared with eager on request.

Compiling the block alone takes as long for 48 layers as for one. What stays outside, embedding, head and loss, is one
kernel each, and repeats bit for bit there: compiled, the embedding's gradient would be summed by atomics on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastlm.corpus import cache_root
from fastlm.errors import GuardStop
from fastlm.model import GPT, Block

CHECKED_UPDATES = 3
# The largest |compiled - eager| / |eager| of one parameter's gradient that rounding explains.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def compile_block(model: GPT) -> None:
    """Have training run the blocks compiled; evaluation and sampling, whose shapes vary, stay eager."""
    # torch's own default lies in a folder for temporary files.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    model.compiled_block = torch.compile(Block.forward, dynamic=False)


def compile_note(seconds: float) -> str:
    """What the first update of a compiled run cost."""
    from torch._dynamo.utils import counters

    # Forward and backward as one, which that cache knows, need not reach the one of single graphs.
    caches = ("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache")
    seen = ([counters[where][f"{cache}_{outcome}"] for outcome in ("hit", "miss")] for where, cache in caches)
    reused, made = next(filter(any, seen), [0, 0])
    graphs = f"{made} graphs made, {reused} from the cache of earlier runs"
    return f"compile: the first update took {seconds:.1f} s, most of it compilation ({graphs})"


def check_compiled(model: GPT, inputs_BT: Tensor, targets_BT: Tensor, seeds_B: Tensor | None) -> str:
    """Compare compiled with eager gradients of one micro-batch -> a line that says how near they are.

    Raises GuardStop where they differ by more than rounding. Gradients that are held already stay as they are.
    """
    eager, compiled = (_gradients(model, on, inputs_BT, targets_BT, seeds_B) for on in (False, True))
    errors = {name: _relative_error(compiled[name], eager[name]) for name in eager}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    line = f"the gradient of {worst} differs by {errors[worst]:.1e} of its norm between compiled and eager"
    if not errors[worst] <= TOLERANCE[model.compute_dtype]:
        limit = f"rounding explains {TOLERANCE[model.compute_dtype]:g}"
        raise GuardStop(f"check_compile: {line}, {limit}; train with --train.compile false, and report this")
    return f"check_compile: at most, {line}"


def _gradients(model: GPT, compiled: bool, *batch: Any) -> dict[str, Tensor]:
    inputs_BT, targets_BT, seeds_B = batch
    kept = model.compiled_block
    model.compiled_block = kept if compiled else None
    try:
        loss = model(inputs_BT, targets_BT, seeds_B=seeds_B)
    finally:
        model.compiled_block = kept
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|; 0 where both are 0, as behind projections that start at zero."""
    error, size = (float(x.float().norm()) for x in (value.float() - truth.float(), truth))
    return 0.0 if error == 0 else error / max(size, 1e-30)
