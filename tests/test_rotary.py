"""rotary_embedding: complex multiplication by hand in float64, in every layout and table width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk

B, T, HQ, HK, D = 2, 5, 4, 2, 8


def _qk(heads_axis: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = (torch.randn(B, heads, T, D, dtype=torch.float64) for heads in (HQ, HK))
    return (q, k) if heads_axis == 1 else (q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous())


def _angles(batched: bool, R: int) -> Tensor:
    """(T, R/2) or (B, T, R/2) angles; nothing about them is symmetric."""
    torch.manual_seed(1)
    return 3 * torch.rand(*([B] if batched else []), T, R // 2, dtype=torch.float64)


def _tables(angles: Tensor, full: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    if full:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _by_hand(x: Tensor, angles: Tensor, interleaved: bool, heads_axis: int) -> Tensor:
    """Each pair of channels is a complex number, turned by its angle."""
    out = x.clone()
    half = angles.shape[-1]
    for b in range(B):
        for t in range(T):
            turn = torch.polar(torch.ones(half, dtype=torch.float64), angles[b, t] if angles.dim() == 3 else angles[t])
            at = (b, slice(None), t) if heads_axis == 1 else (b, t)
            channels = x[at]
            first = channels[:, 0 : 2 * half : 2] if interleaved else channels[:, :half]
            second = channels[:, 1 : 2 * half : 2] if interleaved else channels[:, half : 2 * half]
            turned = torch.complex(first, second) * turn
            result = channels.clone()
            if interleaved:
                result[:, 0 : 2 * half : 2], result[:, 1 : 2 * half : 2] = turned.real, turned.imag
            else:
                result[:, :half], result[:, half : 2 * half] = turned.real, turned.imag
            out[at] = result
    return out


@pytest.mark.parametrize("heads_axis", [1, 2, -3, -2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("R", [D, 6, 4, 2])
def test_equals_complex_multiplication(heads_axis: int, interleaved: bool, full: bool, batched: bool, R: int) -> None:
    axis = heads_axis % 4
    q, k = _qk(axis)
    angles = _angles(batched, R)
    cos, sin = _tables(angles, full, interleaved)
    # Without rotary_dim a width of D/2 is a full rotation and any other width is R.
    implied = D if cos.shape[-1] == D // 2 else cos.shape[-1]
    rotary_dim = None if implied == R else R
    rotated = fk.rotary_embedding(
        q, k, cos, sin, interleaved=interleaved, head_dim_axis=heads_axis, rotary_dim=rotary_dim
    )
    for x, y in zip((q, k), rotated, strict=True):
        assert y.shape == x.shape
        torch.testing.assert_close(y, _by_hand(x, angles, interleaved, axis))


def test_tables_of_two_different_halves_are_taken_channel_by_channel() -> None:
    q, k = _qk()
    torch.manual_seed(2)
    cos, sin = torch.randn(T, D, dtype=torch.float64), torch.randn(T, D, dtype=torch.float64)
    a, b = q[..., : D // 2], q[..., D // 2 :]
    expected = q * cos + torch.cat((-b, a), -1) * sin
    torch.testing.assert_close(fk.rotary_embedding(q, k, cos, sin)[0], expected)
    crossed = torch.stack((-q[..., 1::2], q[..., 0::2]), -1).flatten(-2)
    torch.testing.assert_close(fk.rotary_embedding(q, k, cos, sin, interleaved=True)[0], q * cos + crossed * sin)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norm_of_the_heads_comes_first(weighted: bool, weight_offset: float) -> None:
    q, k = _qk()
    torch.manual_seed(3)
    weights = [torch.rand(D, dtype=torch.float64) if weighted else None for _ in range(2)]
    angles = _angles(False, D)
    cos, sin = _tables(angles, False, False)
    rotated = fk.rotary_embedding(
        q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], qk_norm_eps=1e-3, weight_offset=weight_offset
    )
    for x, weight, y in zip((q, k), weights, rotated, strict=True):
        normed = x / torch.sqrt((x**2).sum(-1, keepdim=True) / D + 1e-3)
        normed = normed if weight is None else normed * (weight_offset + weight)
        torch.testing.assert_close(y, _by_hand(normed, angles, False, 1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    torch.manual_seed(4)
    shapes = ((1, 2, 2, 6), (1, 1, 2, 6), (2, 4), (2, 4), (6,), (6,))
    leaves = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def outputs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        return fk.rotary_embedding(
            q, k, cos, sin, interleaved=interleaved, q_weight=q_weight, k_weight=k_weight, qk_norm_eps=1e-2
        )

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounds_once_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in _qk())
    angles = _angles(True, D)
    cos, sin = _tables(angles, False, False)
    rotated = fk.rotary_embedding(q, k, cos.float(), sin.float(), qk_norm_eps=1e-6)
    for x, y in zip((q, k), rotated, strict=True):
        assert y.dtype == dtype
        normed = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            y.double(), _by_hand(normed, angles, False, 1), rtol=0.6 * eps, atol=1e-6 + eps / 100
        )


def test_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(5)
    row_q, row_k = (torch.randn(1, 1, 1, D, dtype=torch.float64).expand(1, 1, 9, D) for _ in range(2))
    frequencies = 0.3 ** torch.arange(D // 2, dtype=torch.float64)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * frequencies
    q, k = fk.rotary_embedding(row_q, row_k, angles.cos(), angles.sin())
    scores = (q @ k.mT)[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1


def test_bad_calls_say_what_to_give() -> None:
    q, k = _qk()
    cos, sin = _tables(_angles(False, D), False, False)
    calls: Any = (
        ({"head_dim_axis": 0}, "head_dim_axis: got 0"),
        ({"q_weight": torch.ones(D)}, "qk_norm_eps: got None"),
        ({"rotary_dim": 6}, "rotary_dim=6"),
        ({"rotary_dim": 16}, "rotary_dim=16"),
        ({"head_dim_axis": 2}, "head_dim_axis chooses"),
    )
    for options, words in calls:
        with pytest.raises(ValueError, match=r"give|must") as error:
            fk.rotary_embedding(q, k, cos, sin, **options)
        assert words in str(error.value)
    for bad in ((q[0], k[0], cos, sin), (q, k[..., :4], cos, sin), (q, k[:, :, :3], cos, sin)):
        with pytest.raises(ValueError, match="q, k: got shapes"):
            fk.rotary_embedding(*bad)
    for tables in ((cos[:3], sin[:3]), (cos, sin[:, :2]), (cos[None].expand(3, -1, -1), sin[None].expand(3, -1, -1))):
        with pytest.raises(ValueError, match="cos, sin: got shapes"):
            fk.rotary_embedding(q, k, *tables)
    with pytest.raises(ValueError, match="last dimension 3"):
        fk.rotary_embedding(q, k, cos[:, :3], sin[:, :3])
