"""Packed documents whose starts leave rows out, or are malformed: the same rows on both paths, never memory outside."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from layouts import moat
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import attention

ROWS, KEYS, CAUSAL = 9, 8, (-1, 0)
STARTS = {
    "rows before, between and after": ([2, 5, 5, 7], [1, 4, 6, 6]),
    "rows after": ([0, 3], [0, 8]),
    "one empty document": ([4, 4], [4, 4]),
    "no documents": ([0], [0]),
}


def _heads(device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, 2, 8), (KEYS, 1, 8), (KEYS, 1, 4))
    q, k, v = (torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes)
    return q, k, v


def _attend(tensors: tuple[Tensor, ...], starts: tuple[list[int], ...], **options: Any) -> Any:
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=tensors[0].device) for x in starts)
    call: Any = partial(fk.varlen_attn, enable_gqa=True, window_size=CAUSAL, **options)
    return call(*tensors, cu_q, cu_k, ROWS, KEYS)


@pytest.mark.both_paths
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("case", STARTS)
def test_rows_outside_every_document_are_zero_at_their_own_places(case: str, return_lse: bool, device: str) -> None:
    """Output, log-sum-exp and gradients of all rows, and a graph to every input."""
    q, k, v = _heads(device)
    starts = STARTS[case]
    result = _attend((q, k, v), starts, return_lse=return_lse)
    out = result[0] if return_lse else result
    expected, lse = torch.zeros(ROWS, 2, 4, device=device), torch.full((2, ROWS), -math.inf, device=device)
    for rows, keys in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
        part, theirs = slice(*rows), slice(*keys)
        document: Any = [x.transpose(0, 1)[None] for x in (q[part], k[theirs], v[theirs])]
        one, of_one = attention.scaled_dot_product_attention_reference(
            *document, enable_gqa=True, is_causal=True, causal_align="bottom_right", return_lse=True
        )
        expected = expected.index_copy(0, torch.arange(*rows, device=device), one[0].transpose(0, 1))
        lse[:, part] = of_one[0].detach()
    torch.testing.assert_close(out, expected)
    if return_lse:
        torch.testing.assert_close(result[1], lse)
    upstream = torch.linspace(-1.0, 2.0, out.numel(), device=device).view(out.shape)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    wanted = (torch.zeros_like(x) for x in (q, k, v))
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    for grad, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, theirs)


# Starts, keys in use, and the well-formed starts of the rows that there are.
OUTSIDE: dict[str, tuple[Any, ...]] = {
    "past the end": (([3, 6, 900], [2, 8, 700]), None, ([3, 6, 9], [2, 8, 8]), None),
    "all past the end": (([40, 90], [50, 70]), None, ([9, 9], [8, 8]), None),
    "before the first": (([-60, 4, 9], [-3, 5, 8]), None, ([0, 4, 9], [0, 5, 8]), None),
    "falling": (([5, -70, -80], [8, 3, 2]), None, ([5, 5, 5], [8, 8, 8]), None),
    "in use": (([0, 4, 9], [0, 5, 8]), [-7, 4000], ([0, 4, 9], [0, 5, 8]), [0, 3]),
}


@pytest.mark.needs_kernels
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", OUTSIDE)
def test_malformed_starts_never_leave_the_tensors(case: str, deterministic: bool, kernel_device: str) -> None:
    """NaN lies around the inputs; results are those of the rows that there are."""
    tensors = tuple(moat(x).requires_grad_() for x in _heads(kernel_device))
    upstream = torch.linspace(-1.0, 1.0, ROWS * 8, device=kernel_device).view(ROWS, 2, 4)

    def results(starts: tuple[list[int], ...], used: list[int] | None) -> list[Tensor]:
        used_k = None if used is None else torch.tensor(used, device=kernel_device)
        call = partial(_attend, tensors, starts, seqused_k=used_k, deterministic=deterministic)
        out, lse = call(return_lse=True)
        return [out, lse, *torch.autograd.grad(out, tensors, upstream)]

    starts, used, inside, inside_used = OUTSIDE[case]
    for found, expected in zip(results(starts, used), results(inside, inside_used), strict=True):
        torch.testing.assert_close(found, expected)


def _ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


MALFORMED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "past the end": ({"cu_seq_q": _ids(0, 4, 10)}, ValueError, r"cu_seq_q: got \[0, 4, 10\]; .*at most 9"),
    "negative": ({"cu_seq_k": _ids(-1, 4, 8)}, ValueError, r"cu_seq_k: got \[-1, 4, 8\]"),
    "falling": ({"cu_seq_k": _ids(0, 8, 4)}, ValueError, "never fall"),
    "in use, negative": ({"seqused_k": _ids(-1, 2)}, ValueError, r"seqused_k: got \[-1, 2\]"),
    "longer than max_q": ({"max_q": 4}, ValueError, "max_q: got 4; give at least 5"),
    "longer than max_k": ({"max_k": 3}, ValueError, "max_k: got 3; give at least 4"),
    "negative max": ({"max_k": -3}, ValueError, "max_k: got -3"),
    "an integer for a bool": ({"return_lse": 1}, ValueError, "return_lse: got 1; give True or False"),
    # What PyTorch's operator refuses, by its own class.
    "a number for a window": ({"window_size": 3}, TypeError, r"window_size: got 3; give \(left, right\)"),
    "a list": ({"cu_seq_q": [0, 4, 9]}, RuntimeError, r"cu_seq_q: got \[0, 4, 9\]; give an int32 tensor"),
    "None": ({"cu_seq_k": None}, RuntimeError, "cu_seq_k: got None"),
    "floats": ({"cu_seq_k": _ids(0, 4, 8).float()}, RuntimeError, r"cu_seq_k: got torch.float32 \(3,\)"),
    "two axes": ({"cu_seq_q": _ids(0, 4, 9)[None]}, RuntimeError, r"cu_seq_q: got torch.int32 \(1, 3\)"),
    "other documents": ({"cu_seq_k": _ids(0, 8)}, RuntimeError, "cu_seq_k: got 2 numbers with 3 in cu_seq_q"),
    "no starts": ({"cu_seq_q": _ids()}, RuntimeError, "cu_seq_q: got 0 numbers"),
    "other lengths": ({"seqused_k": _ids(1, 2, 3)}, RuntimeError, "seqused_k: got 3 numbers"),
    "a length of None": ({"max_q": None}, RuntimeError, "max_q: got None"),
    "a float length": ({"max_k": 4.0}, RuntimeError, r"max_k: got 4\.0"),
    "pages in a list": (
        {"block_table": [[0], [1]], "key": torch.zeros(2, 4, 1, 8).double(), "seqused_k": _ids(1, 1)},
        RuntimeError,
        "block_table: got",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_documents_are_refused(case: str) -> None:
    """With what was given and what to give."""
    q, k = (torch.zeros(rows, 1, 8, dtype=torch.float64) for rows in (ROWS, KEYS))
    given: dict[str, Any] = {"query": q, "key": k, "value": k}
    given |= {"cu_seq_q": _ids(0, 4, 9), "cu_seq_k": _ids(0, 4, 8), "max_q": ROWS, "max_k": KEYS}
    changed, error, words = MALFORMED[case]
    with pytest.raises(error, match=words):
        fk.varlen_attn(**given | changed)
