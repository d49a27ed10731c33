"""How linear cross-entropy walks logits that are never all there: a plan by shape, the same on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# Linear cross-entropy: chunks of the logits as long as matrix products at full rate ask for, as small as memory does.
# Adding a chunk to the fp32 sum of the weight gradient moves 8 bytes for every 6 x rows FLOPs: on an H200 2.6 % of the
# products' time at 8192 rows, 5 % at 4096, 10 % at 2048.
_LEAST_ROWS, _MOST_ROWS = 2048, 8192
# The input's gradient is rows / 128 x hidden / 256 tiles of a product: on 132 multiprocessors 8192 rows fill their last
# round to 97 % at hidden sizes 512, 1024, 2048 and 4096, to 45 % where three tiles make a row. 11264 rows fill that.
_MOST_ROWS_BY_TILES = {3: 11264}
# The logits' buffer may take a GiB whatever the problem, and more where it and the fp32 sum stay within an eighth of
# what all logits and their gradient would take.
_BUFFER_BYTES = 1 << 30
_SHARE = 8
# A weight gradient larger than this in fp32 is formed class block by class block, straight in its own dtype.
_SUM_BYTES = 2 << 30
# Chunks and blocks end on multiples of this, whole tiles of any matrix product.
_MULTIPLE = 256
# Gradients scaled after the fact: 16 elements a thread, two 16-byte loads of 16 bits or four of 32.
LINEAR_SCALE_BLOCK = 2048
LINEAR_SCALE_WARPS = 4


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """How the N x V logits of one call are walked; no more than `buffer_elements` of them exist at a time.

    mode     "tokens": chunks of `rows` tokens, loss and gradients formed in one pass
             "classes": chunks of `rows` tokens for the loss; then, their logits computed a second time, blocks of
             `classes` classes for the gradients
    """

    mode: Literal["tokens", "classes"]
    rows: int
    classes: int
    buffer_elements: int


def linear_cross_entropy_by_classes(hidden: int, classes: int, dtype: torch.dtype) -> bool:
    """Whether a weight gradient of several chunks is formed by blocks of classes; the batch's size has no say."""
    # fp16 cannot hold sums over many tokens before they are divided by their number, fp32 needs no second buffer.
    return dtype == torch.bfloat16 and classes * hidden * 4 > _SUM_BYTES


def linear_cross_entropy_plan(
    tokens: int, hidden: int, classes: int, dtype: torch.dtype, weight_gradient: bool = True
) -> LinearCrossEntropyPlan:
    """The plan for `tokens` x `hidden` inputs and `classes` classes: a function of these alone, so that bits repeat.

    64k tokens, hidden 768, 50304 classes, bf16: 6 chunks of 11008 rows; buffer 1108 MB and fp32 sum 155 MB, where the
    logits and their gradient take 13.2 GB.
    """
    by_classes = linear_cross_entropy_by_classes(hidden, classes, dtype)
    row_bytes = classes * dtype.itemsize
    # By blocks of classes it is the input's gradient that is summed in fp32; fp32's own sums are results.
    sum_bytes = 0 if dtype.itemsize >= 4 else (tokens if by_classes else classes) * hidden * 4
    buffer_bytes = max(_BUFFER_BYTES, 2 * tokens * row_bytes // _SHARE - sum_bytes)
    most_rows = _MOST_ROWS_BY_TILES.get(-(-hidden // 256), _MOST_ROWS)
    most = max(_LEAST_ROWS, min(most_rows, buffer_bytes // row_bytes))
    rows = _even_part(tokens, most)
    if not by_classes or not weight_gradient or rows >= tokens:
        return LinearCrossEntropyPlan("tokens", rows, classes, rows * classes)
    block = _even_part(classes, buffer_bytes // (tokens * dtype.itemsize))
    return LinearCrossEntropyPlan("classes", rows, block, max(rows * classes, tokens * block))


def _even_part(size: int, most: int) -> int:
    """The length of as few equal parts of `size` as `most` allows, a multiple; `size` itself if it is one part."""
    most = max(_MULTIPLE, most // _MULTIPLE * _MULTIPLE)
    if size <= most:
        return size
    parts = -(-size // most)
    return -(-size // (parts * _MULTIPLE)) * _MULTIPLE
