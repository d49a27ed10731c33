"""Packed documents on the host, for PyTorch's path: which rows are whose; malformed starts refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_packing(cu_seq_q: Any, cu_seq_k: Any, seqused_k: Any, block_table: Any, lengths: tuple[Any, Any]) -> None:
    """RuntimeError, PyTorch's class, unless these are integer tensors of N + 1 starts, N lengths and two ints."""
    starts = {"cu_seq_q": cu_seq_q} | ({} if block_table is not None else {"cu_seq_k": cu_seq_k})
    vectors = starts | ({} if seqused_k is None else {"seqused_k": seqused_k})
    for name, x in vectors.items():
        if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype not in _INTEGERS:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise RuntimeError(f"{name}: got {got}; give an int32 tensor of one axis")
    if block_table is not None and not (isinstance(block_table, Tensor) and block_table.dim() == 2):
        raise RuntimeError(f"block_table: got {block_table!r}; give an int32 tensor (N, pages)")
    documents = cu_seq_q.shape[0] - 1
    for name, x in vectors.items():
        expected = documents + (name in starts)
        if documents < 0 or x.shape[0] != expected:
            raise RuntimeError(
                f"{name}: got {x.shape[0]} numbers with {documents + 1} in cu_seq_q; give N + 1 starts of N documents "
                "in cu_seq_q and cu_seq_k, N lengths in seqused_k"
            )
    for name, length in zip(("max_q", "max_k"), lengths, strict=True):
        if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool):
            raise RuntimeError(f"{name}: got {length!r}; give the longest document's length, an int")


def starts_of(name: str, starts: Tensor, rows: int) -> list[int]:
    """The numbers in `starts`. ValueError unless they never fall and lie within the tensor's rows."""
    numbers = starts.tolist()
    if min(numbers) < 0 or max(numbers) > rows or any(end < begin for begin, end in pairwise(numbers)):
        raise ValueError(f"{name}: got {numbers}; give numbers that never fall, from 0 to at most {rows}")
    return numbers


def used_of(seqused_k: Tensor) -> list[int]:
    """The numbers in `seqused_k`. ValueError if one is negative."""
    numbers = seqused_k.tolist()
    if min(numbers, default=0) < 0:
        raise ValueError(f"seqused_k: got {numbers}; give how many of each document's keys are in use, 0 or more")
    return numbers


def check_longest(name: str, given: int, longest: int) -> None:
    """ValueError if a document is longer than the caller says: the kernels would leave its end out."""
    if given < longest:
        raise ValueError(f"{name}: got {given}; give at least {longest}, the length of the longest document")


def segments_of(starts: list[int], rows: int) -> list[tuple[int, int, int | None]]:
    """(begin, end, document) of all rows in order, one at least; None for rows of no document. Empty ones left out."""
    documents = [(begin, end, document) for document, (begin, end) in enumerate(pairwise(starts))]
    segments = [(0, starts[0], None), *documents, (starts[-1], rows, None)]
    return [segment for segment in segments if segment[0] < segment[1]] or [(0, rows, None)]
