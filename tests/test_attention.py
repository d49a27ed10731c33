"""Attention: our keywords against a loop over single queries in float64; packed documents against one call each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm_kernels as fk


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
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"causal_align": "left"}, "causal_align: got 'left'"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "key_mask: got torch.bool (2, 6)"),
        ({"key_mask": torch.ones(2, 7)}, "key_mask: got torch.float32 (2, 7)"),
        ({"key_mask": [True]}, "key_mask: got [True]"),
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


def test_mixed_dtypes_are_refused_with_our_options_too() -> None:
    q, k, v = _qkv()
    with pytest.raises(RuntimeError, match="one dtype"):
        fk.scaled_dot_product_attention(q, k.float(), v, softcap=2.0)


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
