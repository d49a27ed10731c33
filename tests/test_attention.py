"""Attention: our keywords against a loop over single queries in float64; packed documents against one call each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime, attention, configs
from fastlm_kernels.attention import _operators
from fastlm_kernels.attention.dropout import kept_weights
from fastlm_kernels.check import compare, upstream_gradients
from fastlm_kernels.registry import KERNELS, case_name

ATTENTION = next(kernel for kernel in KERNELS if kernel.name == "scaled_dot_product_attention")


def _qkv(
    L: int = 5,
    S: int = 7,
    heads: int = 2,
    key_heads: int = 2,
    D: int = 4,
    E: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(L * 100 + S)
    q = torch.randn(2, heads, L, D, dtype=dtype)
    k = torch.randn(2, key_heads, S, D, dtype=dtype)
    v = torch.randn(2, key_heads, S, E, dtype=dtype)
    return q, k, v


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    causal_align: str = "top_left",
) -> tuple[Tensor, Tensor]:
    """Every query by itself, over a list of the keys it may see: (out, lse)."""
    B, H, L, D = q.shape
    S, group = k.shape[2], H // k.shape[1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    left, right = window_size
    outs, lses = [], []
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(L)):
        position = i + (S - L if causal_align == "bottom_right" else 0)
        scores, values = [], []
        for j in range(S):
            bias = 0.0 if attn_mask is None else attn_mask.expand(B, H, L, S)[b, h, i, j]
            seen = not (left >= 0 and j < position - left) and not (right >= 0 and j > position + right)
            seen = seen and not (is_causal and j > position) and (key_mask is None or bool(key_mask[b, j]))
            if isinstance(bias, Tensor) and bias.dtype == torch.bool:
                seen, bias = seen and bool(bias), 0.0
            if seen:
                score = scale * (q[b, h, i] * k[b, h // group, j]).sum()
                scores.append((score if softcap is None else softcap * torch.tanh(score / softcap)) + bias)
                values.append(v[b, h // group, j])
        if scores:
            weights = torch.exp(torch.stack(scores) - torch.stack(scores).max())
            outs.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
            lses.append(weights.sum().log() + torch.stack(scores).max())
        else:
            outs.append(v.new_zeros(v.shape[-1]))
            lses.append(q.new_full((), -math.inf))
    return torch.stack(outs).view(B, H, L, -1), torch.stack(lses).view(B, H, L)


KEY_MASK = torch.tensor([[True] * 5 + [False] * 2, [False] * 3 + [True] * 4])
MASKED_ROW = torch.tensor([[True] * 7, [False] * 7, [True, False] * 3 + [True], [False] * 6 + [True], [True] * 7])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal bottom right": {"is_causal": True, "causal_align": "bottom_right"},
    "window": {"window_size": (2, 1)},
    "window left": {"window_size": (1, -1)},
    "window right, bottom right": {"window_size": (-1, 0), "causal_align": "bottom_right"},
    "window, causal": {"window_size": (1, 3), "is_causal": True, "causal_align": "bottom_right"},
    "window of one": {"window_size": (0, 0)},
    "key_mask": {"key_mask": KEY_MASK},
    "key_mask, causal": {"key_mask": KEY_MASK, "is_causal": True},
    "bool mask, masked row": {"attn_mask": MASKED_ROW},
    "bool mask and window": {"attn_mask": MASKED_ROW, "window_size": (1, 1)},
    "float mask and key_mask": {
        "attn_mask": torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7),
        "key_mask": KEY_MASK,
    },
    "softcap": {"softcap": 0.7},
    "softcap, key_mask, causal, scale": {"softcap": 0.7, "key_mask": KEY_MASK, "is_causal": True, "scale": 0.9},
    "softcap, float mask": {
        "softcap": 0.5,
        "attn_mask": torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 1, 1, 7),
    },
}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_query_at_a_time(case: str, return_lse: bool) -> None:
    leaves: Any = [t.requires_grad_() for t in _qkv()]
    result = fk.scaled_dot_product_attention(*leaves, **CASES[case], return_lse=return_lse)
    copies: Any = [t.detach().clone().requires_grad_() for t in leaves]
    expected, expected_lse = _one_by_one(*copies, **CASES[case])
    out, lse = result if return_lse else (result, None)
    torch.testing.assert_close(out, expected)
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    total, expected_total = (out * upstream).sum(), (expected * upstream).sum()
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse)
        seen = expected_lse > -math.inf
        total, expected_total = total + lse[seen].square().sum(), expected_total + expected_lse[seen].square().sum()
    grads = torch.autograd.grad(total, leaves)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected_total, copies), strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_query_that_sees_nothing_gives_zero(return_lse: bool) -> None:
    q, k, v = (t.float().requires_grad_() for t in _qkv())
    for mask in (MASKED_ROW, torch.where(MASKED_ROW, 0.0, -math.inf)):
        result = fk.scaled_dot_product_attention(q, k, v, mask, return_lse=return_lse)
        out = result[0] if return_lse else result
        assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
        if return_lse:
            assert (result[1][:, :, 1] == -math.inf).all()
            assert result[1][:, :, 0].isfinite().all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][:, :, 1].any()


def test_no_keys_at_all() -> None:
    q, k, v = _qkv(L=3, S=0)
    out, lse = fk.scaled_dot_product_attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 2, 3, 3, dtype=torch.float64))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"softcap": 2.0}, {"window_size": (1, 1)}], ids=str)
def test_grouped_heads(options: dict[str, Any]) -> None:
    q, k, v = _qkv(heads=4, key_heads=2)
    result = fk.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    wanted = {name: value for name, value in options.items() if name != "return_lse"}
    expected, _ = _one_by_one(q, k, v, **wanted)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_sum_exp_is_fp32_and_out_keeps_the_dtype(dtype: torch.dtype) -> None:
    q, k, v = _qkv(dtype=dtype)
    out, lse = fk.scaled_dot_product_attention(q, k, v, return_lse=True, softcap=3.0)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (2, 2, 5))
    expected, expected_lse = _one_by_one(q.double(), k.double(), v.double(), softcap=3.0)
    tolerance: Any = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"softcap": 2.0}, {"window_size": (3, 0)}], ids=str)
def test_output_is_laid_out_as_the_query(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 8).transpose(1, 2) for _ in range(3))
    result = fk.scaled_dot_product_attention(q, k, v, **options)
    out = result[0] if isinstance(result, tuple) else result
    assert out.transpose(1, 2).is_contiguous()
    assert F.scaled_dot_product_attention(q, k, v).transpose(1, 2).is_contiguous()


def test_plain_calls_are_pytorchs_bit_for_bit() -> None:
    q, k, v = _qkv(dtype=torch.float32)
    calls: Any = ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": MASKED_ROW})
    for options in calls:
        ours = fk.scaled_dot_product_attention(q, k, v, **options, deterministic=False)
        assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, **options))


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    q, k, v = _qkv(L=16, S=16, dtype=torch.float32)
    torch.manual_seed(1)
    first = fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3, softcap=5.0)
    torch.manual_seed(1)
    assert torch.equal(first, fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3, softcap=5.0))
    many = torch.stack([fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3, softcap=5.0) for _ in range(100)])
    whole = fk.scaled_dot_product_attention(q, k, v, softcap=5.0)
    spread = many.std(0) / math.sqrt(100)
    assert ((many.mean(0) - whole).abs() < 6 * spread).all()
    assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": (1,)}, "window_size: got (1,)"),
        ({"window_size": (1.5, 0)}, "window_size: got (1.5, 0)"),
        ({"window_size": 3}, "window_size: got 3"),
        ({"window_size": (True, 0)}, "window_size: got (True, 0)"),
        ({"deterministic": "no"}, "deterministic: got 'no'"),
        ({"return_lse": 1}, "return_lse: got 1"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"causal_align": "left"}, "causal_align: got 'left'"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "key_mask: got torch.bool (2, 6)"),
        ({"key_mask": torch.ones(2, 7)}, "key_mask: got torch.float32 (2, 7)"),
        ({"key_mask": [True]}, "key_mask: got [True]"),
        ({"dropout_seed": 3}, "dropout_seed: got 3"),
        ({"dropout_seed": torch.zeros(3, dtype=torch.int64)}, "dropout_seed: got torch.int64 (3,)"),
        ({"dropout_seed": torch.zeros(2)}, "dropout_seed: got torch.float32 (2,)"),
        ({"dropout_seed": torch.zeros(2, dtype=torch.int64, device="meta")}, "on meta for query"),
    ],
    ids=str,
)
def test_bad_options_are_value_errors_with_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="give") as error:
        fk.scaled_dot_product_attention(*_qkv(), **options)
    assert words in str(error.value)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"return_lse": True}, {"window_size": (1, 1)}], ids=str)
def test_masks_that_pytorch_refuses_are_refused_with_our_options_too(options: dict[str, Any]) -> None:
    q = torch.randn(1, 1, 4, 8)
    for mask in (*(torch.ones(4, 4, dtype=d) for d in (torch.int64, torch.uint8, torch.float64)), [[1.0]]):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with pytest.raises((RuntimeError, TypeError)) as theirs:
                    torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)  # type: ignore[arg-type]
                with pytest.raises(theirs.type, match="attn_mask: got"):
                    fk.scaled_dot_product_attention(q, q, q, mask, **options)  # type: ignore[arg-type]
    half = torch.zeros(4, 4, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        fk.scaled_dot_product_attention(q, q, q, half, **options)
    with pytest.raises(RuntimeError, match="attn_mask"):
        fk.scaled_dot_product_attention(q, q, q, half, **options)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"return_lse": True}], ids=str)
def test_what_pytorch_refuses_is_refused_with_our_options_too(options: dict[str, Any]) -> None:
    """Mixed dtypes, integers, complex numbers, a list: PyTorch's class, and no truncated answer."""
    q, k, v = _qkv()
    whole, complex_ = ([x.to(dtype) for x in (q, k, v)] for dtype in (torch.int32, torch.complex64))
    calls: Any = ((q, k.float(), v), whole, complex_, ([1.0], k, v))
    for call, words in zip(calls, ("one dtype", "torch.int32", "torch.complex64", "must be Tensor"), strict=True):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            F.scaled_dot_product_attention(*call)
        with pytest.raises(RuntimeError if issubclass(theirs.type, RuntimeError) else TypeError, match=words):
            fk.scaled_dot_product_attention(*call, **options)
    with pytest.raises(TypeError, match="must be Tensor"):
        fk.scaled_dot_product_attention([1.0], k, v, key_mask=torch.ones(2, 7, dtype=torch.bool))  # type: ignore[arg-type]


def test_windows_of_numpys_integers() -> None:
    numpys: Any = (np.int64(2), np.int32(0))
    expected = fk.scaled_dot_product_attention(*_qkv(), window_size=(2, 0))
    assert torch.equal(fk.scaled_dot_product_attention(*_qkv(), window_size=numpys), expected)


@pytest.mark.both_paths
@pytest.mark.parametrize("side", [2**63 - 1, 2**70])
def test_a_side_of_more_than_any_tensor_is_open(side: int, device: str) -> None:
    q, k, v = (x.to(device) for x in _qkv(dtype=torch.float32))
    for window, opened in (((side, 1), (-1, 1)), ((1, side), (1, -1)), ((side, side), (-1, -1))):
        found = fk.scaled_dot_product_attention(q, k, v, window_size=window)
        torch.testing.assert_close(found, fk.scaled_dot_product_attention(q, k, v, window_size=opened))


@pytest.mark.both_paths
def test_a_mask_beside_is_causal_both_decide(device: str) -> None:
    """As on those of PyTorch's backends that take the two."""
    q, k, v = (x.to(device) for x in _qkv(dtype=torch.float32))
    mask = MASKED_ROW.to(device)
    found = fk.scaled_dot_product_attention(q, k, v, mask, is_causal=True, softcap=2.0)
    both = mask & torch.ones(5, 7, dtype=torch.bool, device=device).tril()
    torch.testing.assert_close(found, fk.scaled_dot_product_attention(q, k, v, both, softcap=2.0))


LENGTHS_Q, LENGTHS_K = (3, 0, 5, 1), (4, 2, 5, 0)


def _packed(dtype: torch.dtype = torch.float64, key_heads: int = 4) -> Any:
    torch.manual_seed(11)
    q = torch.randn(sum(LENGTHS_Q), 4, 8, dtype=dtype)
    k, v = (torch.randn(sum(LENGTHS_K), key_heads, 8, dtype=dtype) for _ in range(2))
    starts = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)
    ]
    return q, k, v, *starts


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_documents_equal_one_query_at_a_time(
    options: dict[str, Any], window_size: tuple[int, int], key_heads: int
) -> None:
    q, k, v, q_starts, k_starts = _packed(key_heads=key_heads)
    leaves: Any = [t.requires_grad_() for t in (q, k, v)]
    result = fk.varlen_attn(
        leaves[0],
        leaves[1],
        leaves[2],
        q_starts,
        k_starts,
        5,
        5,
        window_size=window_size,
        enable_gqa=key_heads != 4,
        return_lse=True,
        **options,
    )
    assert isinstance(result, tuple)
    out, lse = result
    assert (out.shape, lse.shape) == (q.shape, (4, sum(LENGTHS_Q)))
    copies: Any = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = [], []
    for queries, keys, values in zip(
        copies[0].split(LENGTHS_Q), copies[1].split(LENGTHS_K), copies[2].split(LENGTHS_K), strict=True
    ):
        if len(queries):
            document: Any = [x.transpose(0, 1)[None] for x in (queries, keys, values)]
            o, l = _one_by_one(*document, window_size=window_size, causal_align="bottom_right", **options)
            expected.append(o[0].transpose(0, 1))
            expected_lse.append(l[0])
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(lse, torch.cat(expected_lse, 1))
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, leaves, upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(torch.cat(expected), copies, upstream), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_packed_documents_keep_to_themselves() -> None:
    q, k, v, q_starts, k_starts = _packed(torch.float32)
    before = fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5)
    k[LENGTHS_K[0] :], v[LENGTHS_K[0] :] = math.nan, math.nan
    after = fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5)
    assert torch.equal(before[: LENGTHS_Q[0]], after[: LENGTHS_Q[0]])


def test_used_keys_and_pages() -> None:
    q, k, v, q_starts, k_starts = _packed()
    used = torch.tensor([2, 1, 5, 0], dtype=torch.int32)
    limited = fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5, seqused_k=used)
    kept = [slice(int(start), int(start) + int(n)) for start, n in zip(k_starts, used, strict=False)]
    expected = fk.varlen_attn(
        q,
        torch.cat([k[part] for part in kept]),
        torch.cat([v[part] for part in kept]),
        q_starts,
        torch.tensor([0, 2, 3, 8, 8], dtype=torch.int32),
        5,
        5,
    )
    torch.testing.assert_close(limited, expected)
    pages = torch.zeros(4, 2, dtype=torch.int32)
    pool_k, pool_v = torch.zeros(8, 3, 4, 8, dtype=torch.float64), torch.zeros(8, 3, 4, 8, dtype=torch.float64)
    for document, part in enumerate(kept):
        pages[document] = torch.tensor([7 - 2 * document, 6 - 2 * document])
        for offset, row in enumerate(range(part.start, part.stop)):
            pool_k[pages[document, offset // 3], offset % 3] = k[row]
            pool_v[pages[document, offset // 3], offset % 3] = v[row]
    paged = fk.varlen_attn(q, pool_k, pool_v, q_starts, None, 5, 5, seqused_k=used, block_table=pages)
    torch.testing.assert_close(paged, expected)


def test_auxiliary_request_returns_the_log_sum_exp() -> None:
    from torch.nn.attention.varlen import AuxRequest

    q, k, v, q_starts, k_starts = _packed()
    aux = fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5, return_aux=AuxRequest(lse=True))
    ours = fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5, return_lse=True)
    assert isinstance(aux, tuple)
    assert isinstance(ours, tuple)
    assert all(torch.equal(a, b) for a, b in zip(aux, ours, strict=True))
    assert isinstance(fk.varlen_attn(q, k, v, q_starts, k_starts, 5, 5, return_aux=AuxRequest()), Tensor)


def test_gradcheck_of_the_explicit_form() -> None:
    leaves = tuple(t.requires_grad_() for t in _qkv(L=3, S=4))

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fk.scaled_dot_product_attention(
            q, k, v, softcap=1.5, is_causal=True, causal_align="bottom_right", return_lse=True
        )

    assert torch.autograd.gradcheck(outputs, leaves)


def test_packed_documents_take_pytorchs_operator_only_if_it_knows_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    from fastlm_kernels.attention import _torch_varlen

    off = {"scale": None, "window_size": (-1, -1), "enable_gqa": False, "seqused_k": None}
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *, scale=None, window_size=(-1, -1): (scale, window_size))
    plain = _torch_varlen({**off, "window_size": (-1, 0)})
    assert plain is not None
    assert plain("query") == (None, (-1, 0))
    assert _torch_varlen({**off, "enable_gqa": True}) is None


# The kernels. Where they cannot run these tests are deselected.

kernels = pytest.mark.needs_kernels
LENGTHS = (1, 2, 63, 64, 65, 127, 257, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _inputs(device: str, dtype: torch.dtype = torch.float32, seed: int = 3, **case: Any) -> dict[str, Any]:
    """Arguments as the registry makes them, on the kernel's path."""
    arguments = ATTENTION.inputs(dtype, device, seed, **({"columns": 16, "heads": 1} | case))
    explanation = fk.explain(fk.scaled_dot_product_attention, **arguments)
    assert explanation.path == "triton", explanation.reason
    return arguments


def _launched(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """What `run` returns, and the kernels that it launches."""
    names: list[str] = []
    launch = _runtime.launch

    def noted(fn: Any, grid: Any, arguments: tuple[Any, ...], **options: Any) -> None:
        names.append(fn.__name__)
        launch(fn, grid, arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(_runtime, "launch", noted)
        return run(), names


def _assert_accurate(arguments: dict[str, Any]) -> None:
    reference = attention.scaled_dot_product_attention_reference
    upstream = upstream_gradients(reference, arguments, 4)
    errors = compare(fk.scaled_dot_product_attention, reference, arguments, upstream)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _spread_by_hand(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False, **options: Any) -> Tensor:
    """Masked softmax with every score and every mask written out: another reference than the package's."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    L, S = query.shape[-2], key.shape[-2]
    scores = query.float() @ key.float().transpose(-1, -2) if query.dtype != torch.float64 else query @ key.mT
    scale = options.get("scale")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    at = torch.arange(L, device=query.device)[:, None] + (S - L) * (options.get("causal_align") == "bottom_right")
    keys = torch.arange(S, device=query.device)
    left, right = options.get("window_size", (-1, -1))
    seen = torch.ones(L, S, dtype=torch.bool, device=query.device)
    if left >= 0:
        seen = seen & (keys >= at - left)
    if right >= 0:
        seen = seen & (keys <= at + right)
    if options.get("is_causal"):
        seen = seen & (keys <= at)
    if options.get("key_mask") is not None:
        seen = seen & options["key_mask"][:, None, None]
    if options.get("attn_mask") is not None:
        seen = seen & options["attn_mask"]
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return (weights @ value.to(weights.dtype)).to(query.dtype)


@kernels
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_lengths_around_tiles(length: int, causal: bool, kernel_device: str) -> None:
    dtype = DTYPES[LENGTHS.index(length) % 3]
    _assert_accurate(_inputs(kernel_device, dtype, rows=length, kv_heads=1, causal=causal))


COMBINATIONS: tuple[dict[str, Any], ...] = (
    {"rows": 70, "keys": 131, "window": (20, 9), "causal": False},
    {"rows": 70, "keys": 131, "window": (20, 9), "causal": False, "align": "bottom_right"},
    {"rows": 131, "keys": 70, "window": (40, -1), "align": "bottom_right", "softcap": 2.0},
    {"rows": 131, "keys": 70, "window": (0, 33), "causal": False},
    {"rows": 150, "keys": 150, "window": (90, 75), "causal": False},
    {"rows": 90, "keys": 90, "window": (0, 0), "causal": False, "heads": 2},
    {"rows": 67, "keys": 150, "causal": True, "padded": True, "batch": 2, "heads": 4, "kv_heads": 2},
    {"rows": 67, "keys": 150, "causal": False, "padded": True, "masked": (1,), "batch": 2, "heads": 2},
    {"rows": 40, "keys": 99, "causal": False, "masked": (0, 2), "heads": 3, "window": (50, -1), "columns": 40},
    {"rows": 40, "keys": 99, "causal": True, "align": "bottom_right", "columns": 24, "values": 72, "scale": 0.1},
    {"rows": 40, "keys": 99, "causal": True, "columns": 72, "values": 8, "softcap": 2.0, "heads": 2, "kv_heads": 2},
    {"rows": 33, "keys": 34, "causal": True, "columns": 256, "heads": 2},
    {"rows": 1, "keys": 1, "causal": False},
    {"rows": 70, "keys": 1, "causal": False},
    {"rows": 65, "keys": 64, "causal": False, "columns": 96},
    {"rows": 20, "keys": 33, "causal": True, "columns": 80},
    {"rows": 20, "keys": 33, "causal": False, "columns": 192},
)


@kernels
@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: case_name(case))
@pytest.mark.usefixtures("poisoned")
def test_masked_softmax_written_out(case: dict[str, Any], kernel_device: str) -> None:
    """The reference equals scores and masks written out, and the kernel is as accurate as the reference."""
    dtype = DTYPES[COMBINATIONS.index(case) % 3]
    arguments = _inputs(kernel_device, dtype, **({"kv_heads": 1} | case))
    wide = {name: x.double() if name in ("query", "key", "value") else x for name, x in arguments.items()}
    expected = attention.scaled_dot_product_attention_reference(**wide)
    torch.testing.assert_close(_spread_by_hand(**wide), expected)
    _assert_accurate(arguments)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_and_its_gradient(dtype: torch.dtype, kernel_device: str) -> None:
    case = {"rows": 37, "keys": 70, "heads": 4, "kv_heads": 2, "softcap": 3.0, "align": "bottom_right"}
    _assert_accurate(_inputs(kernel_device, dtype, **case, lse=True))
    arguments = _inputs(kernel_device, dtype, **case, lse=True)
    leaves = [arguments[name] for name in ("query", "key")]
    ours, theirs = (
        torch.autograd.grad(fn(**arguments)[1].sum(), leaves)
        for fn in (fk.scaled_dot_product_attention, attention.scaled_dot_product_attention_reference)
    )
    for grad, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2 * torch.finfo(dtype).eps)


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(rows: int, keys: int, kernel_device: str) -> None:
    q, k, v = (t.float().to(kernel_device).requires_grad_() for t in _qkv(L=rows, S=keys, D=16, E=16))
    assert fk.explain(fk.scaled_dot_product_attention, q, k, v).path == "triton"
    out, lse = fk.scaled_dot_product_attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 2, rows, 16, device=kernel_device))
    assert torch.equal(lse, torch.full((2, 2, rows), -math.inf, device=kernel_device))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, (q, k, v), strict=True))


@kernels
@pytest.mark.usefixtures("poisoned")
def test_rows_that_see_nothing_give_zero_and_no_gradient(kernel_device: str) -> None:
    q, k, v = (t.float().to(kernel_device).requires_grad_() for t in _qkv(L=70, S=40))
    hidden = torch.ones(2, 40, dtype=torch.bool, device=kernel_device)
    hidden[1] = False
    options: dict[str, Any] = {"is_causal": True, "causal_align": "bottom_right", "key_mask": hidden}
    assert fk.explain(fk.scaled_dot_product_attention, q, k, v, **options).path == "triton"
    out, lse = fk.scaled_dot_product_attention(q, k, v, **options, return_lse=True)
    assert not out[:, :, :30].any()
    assert not out[1].any()
    assert out[0, :, 30:].any()
    assert (lse[:, :, :30] == -math.inf).all()
    assert lse[0, :, 30:].isfinite().all()
    upstream = torch.full_like(lse, math.nan).masked_fill(lse > -math.inf, 0.5)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), upstream))
    assert not dq[:, :, :30].any()
    assert not any(grad[1].any() for grad in (dq, dk, dv))
    assert all(grad.isfinite().all() and grad[0].any() for grad in (dq, dk, dv))


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_with_one_key_in_sight_has_no_gradient(dtype: torch.dtype, kernel_device: str) -> None:
    """Its weight is 1 whatever the score; the rounding of dp - delta must not show."""
    arguments = _inputs(kernel_device, dtype, rows=70, keys=1, causal=False)
    out = fk.scaled_dot_product_attention(**arguments)
    dq, dk = torch.autograd.grad(out, (arguments["query"], arguments["key"]), torch.randn_like(out))
    assert not dq.any()
    assert not dk.any()
    arguments = _inputs(kernel_device, dtype, rows=70, heads=4)
    out = fk.scaled_dot_product_attention(**arguments)
    (dq,) = torch.autograd.grad(out, arguments["query"], torch.randn_like(out))
    assert not dq[:, :, 0].any()
    assert dq[:, :, 1:].any(-1).all()


@kernels
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("keys", "window"), [(5, (-1, 0)), (5, (0, 0)), (1, (-1, -1)), (None, (-1, 0))], ids=str)
def test_the_log_sum_exp_of_one_key_has_its_gradient(
    keys: int | None, window: tuple[int, int], one_pass: bool, kernel_device: str
) -> None:
    """That of the one score: a causal sequence's first query, a window of one, a single key, packed documents' first.

    Beside the output's gradient, to which such a query adds nothing.
    """
    options: dict[str, Any] = {"window_size": window, "return_lse": True, "deterministic": not one_pass}
    torch.manual_seed(0)
    if keys is None:
        q, k, v = (torch.randn(5, 2, 16, device=kernel_device, requires_grad=True) for _ in range(3))
        starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=kernel_device)
        call: Any = partial(fk.varlen_attn, q, k, v, starts, starts, 3, 3, **options)
    else:
        q, k, v = (torch.randn(1, 2, n, 16, device=kernel_device, requires_grad=True) for n in (5, keys, keys))
        call = partial(fk.scaled_dot_product_attention, q, k, v, **options)
    assert fk.explain(call.func, *call.args, **options).path == "triton"
    found = call()
    upstream = tuple(torch.randn_like(x) for x in found)
    with fk.backend("torch"):
        expected = call()
    for given in ((None, upstream[1]), upstream):
        pairs = [(a, b, dy) for a, b, dy in zip(found, expected, given, strict=True) if dy is not None]
        ours, theirs, dys = zip(*pairs, strict=True)
        grads = torch.autograd.grad(ours, (q, k), dys, retain_graph=True)
        for grad, wanted in zip(grads, torch.autograd.grad(theirs, (q, k), dys, retain_graph=True), strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("options", [{}, {"window_size": (9, -1)}, {"softcap": 3.0}], ids=str)
def test_a_causal_query_never_sees_a_later_key(options: dict[str, Any], kernel_device: str) -> None:
    arguments = _inputs(kernel_device, rows=150) | options
    before = fk.scaled_dot_product_attention(**arguments)
    changed = {name: arguments[name].detach().clone() for name in ("key", "value")}
    for x in changed.values():
        x[:, :, 77:] += 5.0
    after = fk.scaled_dot_product_attention(**arguments | changed)
    assert torch.equal(before[:, :, :77], after[:, :, :77])
    assert all((before[:, :, at] != after[:, :, at]).any() for at in range(77, 150))


@kernels
@pytest.mark.parametrize(("align", "first", "last"), [("bottom_right", 384, 512), ("top_left", 0, 192)])
def test_tiles_that_no_query_sees_are_never_loaded(align: str, first: int, last: int, kernel_device: str) -> None:
    """NaN in all keys outside the tiles that the window touches, and in all queries that see none of the keys."""
    arguments = _inputs(kernel_device, rows=65, keys=512, window=(60, 60), align=align, causal=False)
    clean = fk.scaled_dot_product_attention(**arguments)
    upstream = torch.ones_like(clean)
    names = ("query", "key", "value")
    expected = torch.autograd.grad(clean, [arguments[name] for name in names], upstream)
    spoiled = arguments | {name: arguments[name].detach().clone() for name in ("key", "value")}
    for name in ("key", "value"):
        outside = torch.ones(512, dtype=torch.bool, device=kernel_device)
        outside[first:last] = False
        spoiled[name][:, :, outside] = math.nan
        spoiled[name].requires_grad_()
    out = fk.scaled_dot_product_attention(**spoiled)
    assert torch.equal(out, clean)
    dq, dk, dv = torch.autograd.grad(out, [spoiled[name] for name in names], upstream)
    assert torch.equal(dq, expected[0])
    assert torch.equal(dk[:, :, first:last], expected[1][:, :, first:last])
    assert not dv[:, :, outside].any()


@kernels
def test_views_of_one_projection_are_read_in_place(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = torch.randn(2, 9, 6, 16, device=kernel_device)
    q, k, v = (x.requires_grad_() for x in merged.transpose(1, 2).split([4, 1, 1], 1))
    addresses: list[set[int]] = []
    launch = _runtime.launch

    def noted(fn: Any, grid: Any, arguments: tuple[Any, ...], **options: Any) -> None:
        addresses.append({a.data_ptr() for a in arguments if isinstance(a, Tensor)})
        launch(fn, grid, arguments, **options)

    monkeypatch.setattr(_runtime, "launch", noted)
    out = fk.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    assert out.transpose(1, 2).is_contiguous()
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    read = {x.data_ptr() for x in (q, k, v)}
    assert len(addresses) == 4
    assert all(read <= found for index, found in enumerate(addresses) if index != 1)


@kernels
@pytest.mark.parametrize(
    ("rows", "splits", "dtype"), [(1, 1, DTYPES[1]), (1, 3, DTYPES[2]), (5, 8, DTYPES[1])], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_few_queries_against_many_keys(
    rows: int, splits: int, dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are split over programs; the parts, combined by their log-sum-exps, are the whole."""
    monkeypatch.setattr(configs, "ATTENTION_DECODE_PROGRAMS", splits)
    monkeypatch.setattr(_runtime, "multiprocessors", lambda device: 1)
    case = {"rows": rows, "keys": 600, "heads": 3, "kv_heads": 1, "align": "bottom_right", "padded": True, "lse": True}
    arguments = _inputs(kernel_device, dtype, **case, window=(500, -1))
    with torch.no_grad():
        found, names = _launched(lambda: fk.scaled_dot_product_attention(**arguments), monkeypatch)
        assert torch.equal(found[0], fk.scaled_dot_product_attention(**arguments)[0])
    _assert_accurate(arguments)
    assert ("attention_combine_kernel" in names) == (splits > 1)


@kernels
def test_a_split_that_sees_nothing_changes_nothing(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "ATTENTION_DECODE_PROGRAMS", 8)
    arguments = _inputs(kernel_device, rows=2, keys=600, align="bottom_right", window=(30, -1), lse=True)
    arguments["key"].detach()[:, :, :500] = math.nan
    out, lse = fk.scaled_dot_product_attention(**arguments)
    clean = arguments | {name: arguments[name][:, :, 500:] for name in ("key", "value")}
    expected, expected_lse = attention.scaled_dot_product_attention_reference(**clean)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


# One pass: dq by atomics.

ONE_PASS: dict[str, dict[str, Any]] = {
    "window, softcap, lse": {"window": (40, 9), "softcap": 2.0, "lse": True, "causal": False},
    "dropout": {"padded": True, "dropout": 0.3},
    "mask": {"masked": (0,), "causal": False, "rows": 40},
}


@kernels
@pytest.mark.parametrize("case", [*ONE_PASS, "packed"])
@pytest.mark.usefixtures("poisoned")
def test_one_pass_gives_the_gradients_of_two(case: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every feature, all but the last bits; no second kernel forms the scores again."""
    if case == "packed":
        packed = _documents(kernel_device, torch.float32)
        leaves, options = packed[:3], {"window_size": (-1, 0), "enable_gqa": True}
        call = partial(fk.varlen_attn, *packed, **options)
    else:
        given = {"rows": 67, "keys": 131, "heads": 4, "kv_heads": 2, **ONE_PASS[case]}
        dropout = given.pop("dropout", 0.0)
        arguments = _inputs(kernel_device, **given)
        leaves = [arguments[name] for name in ("query", "key", "value")]
        call = partial(fk.scaled_dot_product_attention, **arguments, dropout_p=dropout)

    def gradients(deterministic: bool) -> Any:
        torch.manual_seed(3)
        outputs = call(deterministic=deterministic)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seen = [x.masked_fill(x == -math.inf, 0.0) for x in outputs]
        return torch.autograd.grad(torch.stack([x.sin().sum() for x in seen]).sum(), leaves)

    expected = gradients(True)
    found, names = _launched(lambda: gradients(False), monkeypatch)
    assert "attention_dkdv_kernel" in names
    assert "attention_dq_kernel" not in names
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


# Tiles by descriptors.


@kernels
@pytest.mark.parametrize("loads", ["descriptors", "specialized"])
@pytest.mark.parametrize(
    "case",
    [{"align": "bottom_right"}, {"window": (50, 20), "causal": False, "padded": True, "columns": 24}],
    ids=case_name,
)
def test_descriptors_load_what_pointers_load(
    loads: Any, case: dict[str, Any], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tiles give the same bits, between NaN on both sides; a mask in memory keeps to pointers."""
    arguments = _inputs(
        kernel_device, torch.float16, **{"rows": 70, "keys": 131, "kv_heads": 2, "heads": 2, "lse": True, **case}
    )
    for name in ("query", "key", "value"):
        x = arguments[name].detach()
        around = torch.full((1, x.shape[1], x.shape[2] + 400, x.shape[3]), math.nan, dtype=x.dtype, device=x.device)
        around[:, :, 200:-200] = x
        arguments[name] = around[:, :, 200:-200]
    expected = fk.scaled_dot_product_attention(**arguments)
    present = configs.ATTENTION_FORWARD["generic"][0]
    switches: list[tuple[bool, bool]] = []
    launch = _runtime.launch

    def noted(*given: Any, **options: Any) -> None:
        switches.append((options["DESCRIPTORS"], options["SPECIALIZED"]))
        launch(*given, **options)

    monkeypatch.setattr(_runtime, "launch", noted)
    monkeypatch.setitem(configs.ATTENTION_FORWARD, "generic", (replace(present, loads=loads),))
    found = fk.scaled_dot_product_attention(**arguments)
    masked = "padded" in case and loads == "specialized"
    assert switches == [(not masked, loads == "specialized" and not masked)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@kernels
def test_descriptors_want_rows_on_16_byte_boundaries(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 20 channels, fp32 and expanded keys are read by pointers, by the tile that suits those."""
    noted: list[Any] = []
    run = _operators.run_forward

    def noting(tensors: Any, extras: Any, options: Any, work: Any, config: Any, *rest: Any) -> None:
        noted.append((config.loads, config.num_warps, config.block_n))
        run(tensors, extras, options, work, config, *rest)

    monkeypatch.setattr(_operators, "run_forward", noting)
    for table in ("ATTENTION_FORWARD", "ATTENTION_FP32"):
        config = configs.AttentionConfig(64, 32, 128, 4, 2, "specialized")
        monkeypatch.setitem(getattr(configs, table), "generic", (config,))
    q = torch.randn(1, 1, 40, 16, dtype=torch.float16, device=kernel_device)
    one = q[:, :, :1].expand_as(q)
    for call in ((q, q, q), (q[..., :10], q[..., :10], q), (q.float(), q.float(), q.float()), (q, one, one)):
        torch.testing.assert_close(
            fk.scaled_dot_product_attention(*call), F.scaled_dot_product_attention(*call), rtol=1e-2, atol=1e-3
        )
    assert noted == [("specialized", 4, 128), *[("pointers", 8, 64)] * 3]


@kernels
@pytest.mark.parametrize("loads", ["descriptors", "specialized"])
def test_packed_documents_are_read_by_pointers(loads: Any, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be empty, and a descriptor of no rows is none."""
    present = configs.ATTENTION_FORWARD["generic"][0]
    monkeypatch.setitem(configs.ATTENTION_FORWARD, "generic", (replace(present, loads=loads),))
    launches: list[dict[str, Any]] = []
    launch = _runtime.launch

    def noted(*given: Any, **options: Any) -> None:
        launches.append(options)
        launch(*given, **options)

    monkeypatch.setattr(_runtime, "launch", noted)
    fk.varlen_attn(*_documents(kernel_device, torch.float16), enable_gqa=True)
    assert [(options["PACKED"], options["DESCRIPTORS"], options["SPECIALIZED"]) for options in launches] == [
        (True, False, False)
    ]


# Packed documents on the kernel.

DOCUMENTS_Q, DOCUMENTS_K = (70, 0, 3, 1, 66), (70, 5, 64, 0, 90)


def _documents(device: str, dtype: torch.dtype, heads: int = 2, key_heads: int = 1) -> Any:
    generator = torch.Generator().manual_seed(5)

    def packed(lengths: tuple[int, ...], count: int) -> Tensor:
        # Two tokens after the last document belong to none.
        x = torch.randn(sum(lengths) + 2, count, 16, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    starts = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        for lengths in (DOCUMENTS_Q, DOCUMENTS_K)
    ]
    return packed(DOCUMENTS_Q, heads), packed(DOCUMENTS_K, key_heads), packed(DOCUMENTS_K, key_heads), *starts, 70, 90


@kernels
@pytest.mark.parametrize(
    ("window_size", "dtype"), list(zip([(-1, -1), (-1, 0), (20, 3)], DTYPES, strict=True)), ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_packed_documents_are_one_call_each_bit_for_bit(
    window_size: tuple[int, int], dtype: torch.dtype, kernel_device: str
) -> None:
    """Outputs, log-sum-exps and gradients; nothing where no document lies."""
    arguments = _documents(kernel_device, dtype)
    q, k, v = arguments[:3]
    options: dict[str, Any] = {"enable_gqa": True, "window_size": window_size, "softcap": 4.0, "return_lse": True}
    assert fk.explain(fk.varlen_attn, *arguments, **options).path == "triton"
    found: Any = fk.varlen_attn(*arguments, **options)
    upstream = torch.linspace(-1.0, 1.0, found[0].numel(), device=kernel_device).view(found[0].shape).to(dtype)
    upstream_lse = torch.linspace(-1.0, 1.0, found[1].numel(), device=kernel_device).view(found[1].shape)
    found = *found, *torch.autograd.grad(found, (q, k, v), (upstream, upstream_lse))
    at_q = at_k = 0
    for queries, keys in zip(DOCUMENTS_Q, DOCUMENTS_K, strict=True):
        mine, theirs = slice(at_q, at_q + queries), slice(at_k, at_k + keys)
        document = [x[part].transpose(0, 1)[None] for x, part in ((q, mine), (k, theirs), (v, theirs))]
        out, lse = fk.scaled_dot_product_attention(*document, **options, causal_align="bottom_right")
        grads = torch.autograd.grad(
            (out, lse), document, (upstream[mine].transpose(0, 1)[None], upstream_lse[None, :, mine])
        )
        alone = [x[0].transpose(0, 1) for x in (out, *grads)]
        assert torch.equal(found[0][mine], alone[0])
        assert torch.equal(found[1][:, mine], lse[0])
        for grad, expected, part in zip(found[2:], alone[1:], (mine, theirs, theirs), strict=True):
            assert torch.equal(grad[part], expected)
        at_q, at_k = at_q + queries, at_k + keys
    assert not any(x[-2:].any() for x in (found[0], *found[2:]))
    assert (found[1][:, -2:] == -math.inf).all()


@kernels
def test_used_keys_of_documents_on_the_kernel(kernel_device: str) -> None:
    arguments = _documents(kernel_device, torch.float32)
    used = torch.tensor([64, 2, 64, 0, 33], dtype=torch.int32, device=kernel_device)
    options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": used}
    assert fk.explain(fk.varlen_attn, *arguments, **options).path == "triton"
    out = fk.varlen_attn(*arguments, **options)
    expected = attention.varlen_attn_reference(*arguments, **options)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), arguments[:3]) for x in (out, expected))
    for grad, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@kernels
def test_packed_documents_compile_whole_and_pass_opcheck(kernel_device: str) -> None:
    """fullgraph, no number read on the host; eager's bits, for other documents too."""
    torch._dynamo.reset()
    *arguments, max_q, max_k = _documents(kernel_device, torch.float32)
    varlen: Any = fk.varlen_attn
    compiled = torch.compile(
        lambda *given: varlen(*given, window_size=(-1, 0), enable_gqa=True), fullgraph=True, backend="aot_eager"
    )
    for moved in (0, 1):
        starts = [x.clone() for x in arguments[3:]]
        starts[0][1] -= moved
        call = (*arguments[:3], *starts, max_q + moved, max_k)
        found, expected = compiled(*call), varlen(*call, window_size=(-1, 0), enable_gqa=True)
        assert torch.equal(found, expected)
        for a, b in zip(
            *(torch.autograd.grad(x.square().sum(), arguments[:3]) for x in (found, expected)), strict=True
        ):
            assert torch.equal(a, b)
    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in arguments[:3])
    options = (max_q, max_k, -1, 0, True, 0.25, 0.0, 0.0, True, True)
    checks = torch.library.opcheck(
        attention.attention_forward.op, (q, k, v, None, None, *arguments[3:], None, None, *options)
    )
    assert set(checks.values()) == {"SUCCESS"}


# Dropout on the kernel.


@kernels
def test_dropout_has_its_share_its_scale_and_its_seed(kernel_device: str) -> None:
    """With identity values and equal scores the output is the mask itself: 0, or 1 / (S (1 - p))."""
    q, v = torch.zeros(2, 3, 128, 16, device=kernel_device), torch.eye(128, device=kernel_device).expand(2, 3, 128, 128)
    k = torch.randn(2, 3, 128, 16, device=kernel_device)
    torch.manual_seed(1)
    first = fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    second = fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, fk.scaled_dot_product_attention(q, k, v, dropout_p=0.3))
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (128 * 0.7)))
    count = kept.numel()
    spread = math.sqrt(0.3 * 0.7)
    assert abs(kept.float().mean() - 0.7) < 5 * spread / math.sqrt(count)
    # Rows, columns, heads, batches and calls draw apart: each pair agrees as often as independent ones do.
    pairs = [
        (kept, second != 0),
        (kept[0], kept[1]),
        (kept[:, 0], kept[:, 1]),
        (kept[..., :-1], kept[..., 1:]),
        (kept[..., :-1, :], kept[..., 1:, :]),
        (kept, kept.mT),
    ]
    for a, b in pairs:
        agree = (a == b).float().mean().item()
        assert abs(agree - (0.49 + 0.09)) < 6 * 0.5 / math.sqrt(a.numel() / 2)


@kernels
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 2.0}], ids=str)
def test_dropouts_backward_uses_the_mask_of_its_forward(options: dict[str, Any], kernel_device: str) -> None:
    """The mask seen through identity values, then used by hand: outputs and gradients agree."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, device=kernel_device, requires_grad=True) for _ in range(3))
    eye = torch.eye(70, device=kernel_device).expand(1, 2, 70, 70)
    torch.manual_seed(7)
    kept = fk.scaled_dot_product_attention(q, k, eye, dropout_p=0.4, **options).detach() != 0
    torch.manual_seed(7)
    out = fk.scaled_dot_product_attention(q, k, v, dropout_p=0.4, **options)
    weights = _spread_by_hand(q, k, eye, **options)
    expected = (weights * kept / 0.6) @ v
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for grad, wanted in zip(
        torch.autograd.grad(out, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


SEEDS = torch.tensor([7, -(2**40) - 7, 2**40 + 7])


@pytest.mark.both_paths
@pytest.mark.parametrize(("rows", "keys"), [(40, 70), (2, 256)], ids=["tiles", "split"])
def test_a_seed_says_what_is_dropped(rows: int, keys: int, device: str) -> None:
    """With equal scores and identity values the output is the mask: that of the definition, bit for bit."""
    q, k = torch.zeros(3, 4, rows, 16, device=device), torch.randn(3, 2, keys, 16, device=device)
    v = torch.eye(keys, device=device).expand(3, 2, keys, keys)
    spaced = torch.stack([SEEDS, SEEDS + 1], 1).to(device)[:, 0]
    attend = partial(fk.scaled_dot_product_attention, dropout_p=0.3, enable_gqa=True)
    kept = attend(q, k, v, dropout_seed=spaced) != 0
    assert torch.equal(kept, kept_weights(spaced, kept, 0.3))
    assert torch.equal(attend(q, k, v, dropout_seed=spaced[1]) != 0, kept[1].expand_as(kept))
    assert torch.equal(attend(q[1], k[1], v[1], dropout_seed=spaced[1:2]) != 0, kept[1])
    # Seeds that differ in one word, heads, queries and keys draw apart.
    pairs = [(kept[0], kept[2]), (kept[1], kept[2]), (kept[:, 0], kept[:, 1])]
    pairs += [(kept[..., 1:, :], kept[..., :-1, :]), (kept[..., 1:], kept[..., :-1])]
    for a, b in pairs:
        assert abs((a == b).float().mean().item() - 0.58) < 3 / math.sqrt(a.numel())
    for share in (1.0, 1.0 - 2.0**-30):  # in fp32 the same
        assert not attend(q, k, v, dropout_p=share, dropout_seed=spaced).any()


@pytest.mark.both_paths
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_sample_drops_alike_wherever_it_stands_in_a_batch(deterministic: bool, device: str) -> None:
    """Outputs and gradients of a row by itself are those in its batch."""
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, 40, 16, device=device, requires_grad=True) for heads in (2, 1, 1)]
    upstream = torch.randn(2, 2, 40, 16, device=device)

    def results(rows: slice) -> list[Tensor]:
        q, k, v = (x[rows] for x in whole)
        seeds = SEEDS[:2].to(device)[rows]
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "deterministic": deterministic}
        out = fk.scaled_dot_product_attention(q, k, v, dropout_p=0.4, dropout_seed=seeds, **options)
        return [out, *(grad[rows] for grad in torch.autograd.grad(out, whole, upstream[rows]))]

    for together, alone in zip(results(slice(None)), results(slice(1, 2)), strict=True):
        torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


@kernels
def test_seeded_dropout_compiles_whole_and_passes_opcheck(kernel_device: str) -> None:
    """fullgraph, seeds as a tensor whose values change; eager's bits."""
    torch._dynamo.reset()
    q = torch.randn(2, 1, 20, 16, device=kernel_device, requires_grad=True)

    def attend(seeds: Tensor) -> Tensor:
        return fk.scaled_dot_product_attention(q, q, q, dropout_p=0.4, dropout_seed=seeds)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    seeds = SEEDS[:2].to(kernel_device)
    outs = [compiled(seeds), compiled(seeds + 1)]
    assert not torch.equal(*outs)
    for out, given in zip(outs, (seeds, seeds + 1), strict=True):
        expected = attend(given)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(x.sin().sum(), q)[0] for x in (out, expected)))
    options = (20, 20, -1, -1, False, 0.25, 0.0, 0.4, True, True)
    checks = torch.library.opcheck(attention.attention_forward.op, (q, q, q, *[None] * 5, seeds, *options))
    assert set(checks.values()) == {"SUCCESS"}


@kernels
def test_dropout_survives_checkpointing(kernel_device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = (torch.randn(1, 1, 40, 16, device=kernel_device, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fk.scaled_dot_product_attention(q, k, v, dropout_p=0.5).square().sum()

    torch.manual_seed(3)
    plain = torch.autograd.grad(attend(q, k, v), (q, k, v))
    torch.manual_seed(3)
    again: Any = checkpoint(attend, q, k, v, use_reentrant=False)
    for grad, expected in zip(torch.autograd.grad(again, (q, k, v)), plain, strict=True):
        assert torch.equal(grad, expected)


GRADCHECKS: dict[str, dict[str, Any]] = {
    "window, softcap, lse": {"window_size": (3, 1), "softcap": 1.5, "return_lse": True},
    "bottom right, scale": {"is_causal": True, "causal_align": "bottom_right", "scale": 0.7},
    "key_mask": {"key_mask": torch.tensor([[True, True, False, True]])},
    "mask": {"attn_mask": torch.ones(3, 4, dtype=torch.bool).tril(1)},
    "dropout": {"dropout_p": 0.3, "softcap": 2.0, "dropout_seed": torch.tensor([5])},
}


@kernels
@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradients_of_every_feature_by_finite_differences(
    case: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_KERNEL_DTYPES", (torch.float64,))
    q, k, v = (
        torch.randn(1, heads, length, 2, dtype=torch.float64, device=kernel_device, requires_grad=True)
        for heads, length in ((2, 3), (1, 4), (1, 4))
    )
    options: Any = {n: x.to(kernel_device) if isinstance(x, Tensor) else x for n, x in GRADCHECKS[case].items()}

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch.manual_seed(2)
        return fk.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    assert fk.explain(fk.scaled_dot_product_attention, q, k, v, enable_gqa=True, **options).path == "triton"
    assert torch.autograd.gradcheck(outputs, (q, k, v))


@kernels
def test_calls_without_a_kernel_take_pytorchs_operator(kernel_device: str) -> None:
    q, k, v = (t.to(kernel_device) for t in _qkv(dtype=torch.float32))
    explain = partial(fk.explain, fk.scaled_dot_product_attention)
    assert explain(q, k, v).path == "triton"
    assert explain(q, k, v, torch.zeros(5, 7, device=kernel_device)).reason == "a mask that is no bool tensor"
    assert "float64" in explain(q.double(), k.double(), v.double()).reason
    wide = torch.zeros(1, 1, 2, 257, device=kernel_device)
    assert "257" in explain(wide, wide, wide).reason
    others: Any = ({"scale": 0.0}, {"scale": -1.0}, {"dropout_p": 1.0})
    for options in others:
        assert explain(q, k, v, **options).path == "torch"
        fk.scaled_dot_product_attention(q, k, v, **options)
    negative: Any = {"scale": -0.7, "window_size": (2, 1)}
    ours = fk.scaled_dot_product_attention(q, k, v, **negative)
    torch.testing.assert_close(ours, _spread_by_hand(q, k, v, **negative))


@kernels
def test_malformed_calls_raise_what_pytorch_raises(kernel_device: str) -> None:
    def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    q = heads(2, 4, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool, device=kernel_device)
    calls: Any = (
        ((q, heads(2, 4, 5, 7), q), {}),
        ((q, heads(2, 3, 5, 8), heads(2, 3, 5, 8)), {}),
        ((q, heads(2, 3, 5, 8), heads(2, 3, 5, 8)), {"enable_gqa": True}),
        ((q, heads(3, 4, 5, 8), heads(3, 4, 5, 8)), {}),
        ((q, q.half(), q), {}),
        ((q, q, q, mask[:, :3]), {}),
        ((q, q, q), {"dropout_p": 1.5}),
        ((q, q, q, mask.long()), {}),
    )
    for arguments, options in calls:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
            F.scaled_dot_product_attention(*arguments, **options)
        with pytest.raises(theirs.type):
            fk.scaled_dot_product_attention(*arguments, **options)


@kernels
def test_autocast_and_fewer_dimensions(kernel_device: str) -> None:
    q, k, v = (t[0].float().to(kernel_device) for t in _qkv())
    out, lse = fk.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 5, 3), (2, 5))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with torch.autocast(kernel_device, torch.bfloat16):
        ours, theirs = (f.scaled_dot_product_attention(q, k, v) for f in (fk, F))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)


@kernels
def test_tile_sizes_change_no_dropout_mask_and_no_answer(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _inputs(kernel_device, rows=100, keys=140, window=(70, 20), causal=False)
    names = ("query", "key", "value")

    def run() -> list[Tensor]:
        torch.manual_seed(9)
        out = fk.scaled_dot_product_attention(**arguments, dropout_p=0.2)
        return [out, *torch.autograd.grad(out.square().sum(), [arguments[name] for name in names])]

    before = run()
    for blocks in ((16, 64), (64, 16)):
        table = {"generic": (configs.AttentionConfig(256, *blocks, 4, 1),)}
        for name in ("FP32", "DQ_FP32"):
            monkeypatch.setattr(configs, f"ATTENTION_{name}", table)
        for found, expected in zip(run(), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
