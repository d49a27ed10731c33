"""rotary_embedding: complex multiplication by hand in float64, in every layout and table width, on both paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _rows, _runtime, configs, rotary
from fastlm_kernels.check import compare
from fastlm_kernels.rotary import _norm_backward, _rotation

pytestmark = pytest.mark.both_paths

B, T, HQ, HK, D = 2, 5, 3, 1, 8
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["torch", pytest.param("kernels", marks=pytest.mark.needs_kernels)], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on PyTorch's path and, where kernels run, through them, in float64 too."""
    if request.param == "torch":
        with fk.backend("torch"):
            yield request.param
        return
    monkeypatch.setattr(rotary, "_KERNEL_DTYPES", (*FLOATS, torch.float64))
    with torch.device(request.getfixturevalue("kernel_device")):
        yield request.param


on_kernels = pytest.mark.parametrize("path", [pytest.param("kernels", marks=pytest.mark.needs_kernels)], indirect=True)


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


@pytest.mark.parametrize("heads_axis", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("R", [D, 6, 4, 2])
def test_equals_complex_multiplication(heads_axis: int, interleaved: bool, full: bool, batched: bool, R: int) -> None:
    q, k = _qk(heads_axis)
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
        torch.testing.assert_close(y, _by_hand(x, angles, interleaved, heads_axis))


@pytest.mark.parametrize("axis", [1, 2])
def test_the_axis_of_the_heads_counts_from_either_end(axis: int) -> None:
    q, k = _qk(axis)
    cos, sin = _tables(_angles(False, D), False, False)
    both = (fk.rotary_embedding(q, k, cos, sin, head_dim_axis=number) for number in (axis, axis - 4))
    for y, z in zip(*both, strict=True):
        assert torch.equal(y, z)


def test_tables_of_two_different_halves_are_taken_channel_by_channel() -> None:
    q, k = _qk()
    torch.manual_seed(2)
    cos, sin = torch.randn(T, D, dtype=torch.float64), torch.randn(T, D, dtype=torch.float64)
    a, b = q[..., : D // 2], q[..., D // 2 :]
    expected = q * cos + torch.cat((-b, a), -1) * sin
    torch.testing.assert_close(fk.rotary_embedding(q, k, cos, sin)[0], expected)
    crossed = torch.stack((-q[..., 1::2], q[..., 0::2]), -1).flatten(-2)
    torch.testing.assert_close(fk.rotary_embedding(q, k, cos, sin, interleaved=True)[0], q * cos + crossed * sin)


@pytest.mark.parametrize(("weighted", "weight_offset"), [(False, 0.0), (True, 0.0), (True, 1.0)])
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
        # The interpreter cuts bf16 off instead of rounding it.
        eps = torch.finfo(dtype).eps * (2 if _runtime.INTERPRETED and dtype is torch.bfloat16 else 1)
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
        ({"qk_norm_eps": "1e-6"}, "qk_norm_eps: got '1e-6'"),
        ({"qk_norm_eps": float("nan")}, "qk_norm_eps: got nan"),
        ({"qk_norm_eps": 1e-6, "weight_offset": float("inf")}, "weight_offset: got inf"),
        ({"weight_offset": 1.0}, "weight_offset: got 1.0"),
        ({"qk_norm_eps": 1e-6, "weight_offset": 1.0}, "weight_offset: got 1.0"),
        ({"qk_norm_eps": 1e-6, "q_weight": torch.ones(1)}, f"q_weight: got shape (1,); give a tensor of shape ({D},)"),
        ({"qk_norm_eps": 1e-6, "k_weight": torch.ones(1, D)}, f"k_weight: got shape (1, {D}); give"),
        ({"qk_norm_eps": 1e-6, "q_weight": torch.ones(D), "k_weight": torch.ones(())}, "k_weight: got shape ()"),
        ({"qk_norm_eps": 1e-6, "q_weight": 1.0}, f"q_weight: got 1.0; give a tensor of shape ({D},)"),
        ({"rotary_dim": 4.0}, "rotary_dim: got 4.0"),
        ({"rotary_dim": "4"}, "rotary_dim: got '4'"),
        ({"rotary_dim": True}, "rotary_dim: got True"),
        ({"head_dim_axis": [1]}, "head_dim_axis: got [1]"),
        ({"head_dim_axis": True}, "head_dim_axis: got True"),
        ({"head_dim_axis": 1.0}, "head_dim_axis: got 1.0"),
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


def _case(
    dtype: torch.dtype = torch.float64, R: int = 6, *, weighted: bool = True, full: bool = False
) -> dict[str, Any]:
    """Leaves of (B, H, T, D), tables that are no cosines and, if `weighted`, the norm with weights and an offset."""
    torch.manual_seed(6)
    q, k = (torch.randn(B, heads, T, D, dtype=dtype).requires_grad_() for heads in (HQ, HK))
    cos, sin = torch.randn(2, B, T, R if full else R // 2, dtype=torch.promote_types(dtype, torch.float32))
    options: dict[str, Any] = {"rotary_dim": R}
    if weighted:
        options |= {"qk_norm_eps": 0.1, "weight_offset": 0.5}
        options |= {f"{name}_weight": torch.randn(D, dtype=dtype).requires_grad_() for name in "qk"}
    return {"q": q, "k": k, "cos": cos, "sin": sin, **options}


def _leaves(case: dict[str, Any]) -> list[Tensor]:
    return [value for value in case.values() if isinstance(value, Tensor) and value.requires_grad]


def _both(case: dict[str, Any], upstream: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """Outputs and gradients of the public function."""
    outputs = fk.rotary_embedding(**case)
    upstream = tuple(torch.randn_like(y) for y in outputs) if upstream is None else upstream
    return [*outputs, *torch.autograd.grad(outputs, _leaves(case), upstream)]


@pytest.mark.parametrize("batched", [False, True])
def test_equals_the_formula_of_hugging_face(batched: bool) -> None:
    """q cos + rotate_half(q) sin with tables of the whole head, (T, D) or one row of positions a sequence."""
    q, k = _qk()
    angles = _angles(batched, D)
    cos, sin = _tables(angles, True, False)
    cos_BHTD, sin_BHTD = ((t.unsqueeze(1) if batched else t) for t in (cos, sin))
    for x, y in zip((q, k), fk.rotary_embedding(q, k, cos, sin), strict=True):
        half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        torch.testing.assert_close(y, x * cos_BHTD + half * sin_BHTD)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_keeps_lengths_and_is_undone_by_its_inverse(interleaved: bool) -> None:
    q, k = _qk()
    angles = _angles(True, D)
    angles[:, 0] = 0.0
    turned = fk.rotary_embedding(q, k, angles.cos(), angles.sin(), interleaved=interleaved)
    back = fk.rotary_embedding(*turned, angles.cos(), -angles.sin(), interleaved=interleaved)
    for x, y, z in zip((q, k), turned, back, strict=True):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
        assert (y[:, :, 1:] - x[:, :, 1:]).abs().amax(-1).min() > 0.1
        torch.testing.assert_close(z, x)


@on_kernels
@pytest.mark.parametrize("R", [D, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("norm", ["none", "bare", "q_weight", "k_weight", "both"])
def test_gradients_of_every_switch(R: int, interleaved: bool, full: bool, norm: str) -> None:
    """Autograd's through the formula, in float64; tables of two different halves, whose inverse is no transpose."""
    case: dict[str, Any] = _case(R=R, weighted=norm != "none", full=full) | {"interleaved": interleaved}
    for name in ("q_weight", "k_weight"):
        if norm not in ("both", name):
            case.pop(name, None)
    if norm == "bare":
        del case["weight_offset"]
    assert fk.explain(fk.rotary_embedding, **case).path == "triton"
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])
    found = _both(case, upstream)
    with fk.backend("torch"):
        expected = _both(case, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def _axes_permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with its axes in memory in `order`, inside a buffer of NaN."""
    shape = [x.shape[axis] for axis in order]
    memory = torch.full([size + 2 for size in shape], torch.nan, dtype=x.dtype, device=x.device)
    view = memory[tuple(slice(1, 1 + size) for size in shape)].permute([order.index(axis) for axis in range(4)])
    return view.copy_(x.detach())


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_order_of_axes_in_memory(order: tuple[int, ...], interleaved: bool, path: str) -> None:
    """q, k and their upstream gradients; the kernels' results are laid out as empty_like has it."""
    case: dict[str, Any] = _case() | {"interleaved": interleaved}
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])
    expected = _both(case, upstream)
    moved: dict[str, Any] = case | {name: _axes_permuted(case[name], order).requires_grad_() for name in "qk"}
    found = _both(moved, tuple(_axes_permuted(dy, order) for dy in upstream))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if path == "kernels" and order[-1] == 3:
        for x, results in ((moved["q"], found[::2]), (moved["k"], found[1::2])):
            assert all(y.stride() == torch.empty_like(x).stride() for y in results if y.dim() == 4)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2), (0, 1, 2, 3)])
def test_expanded_inputs_and_upstream_gradients(axes: tuple[int, ...]) -> None:
    """Strides of 0: one batch, head, position or number for all."""
    case = _case()

    def expanded(x: Tensor) -> Tensor:
        first = x.detach()[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
        return first.expand(x.shape)

    moved: dict[str, Any] = case | {name: expanded(case[name]).requires_grad_() for name in "qk"}
    copied: dict[str, Any] = case | {name: moved[name].detach().contiguous().requires_grad_() for name in "qk"}
    upstream = tuple(expanded(torch.randn_like(case[name])) for name in "qk")
    for a, b in zip(_both(moved, upstream), _both(copied, tuple(dy.contiguous() for dy in upstream)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, HQ, HK, T), (B, 0, HK, T), (B, HQ, 0, T), (B, 0, 0, T), (B, HQ, HK, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_to_rotate(shape: tuple[int, int, int, int], weighted: bool) -> None:
    """No batch, heads or positions: empty results, and zero gradients of a weight that no head met."""
    batch, heads, kv_heads, time = shape
    case = _case(weighted=weighted)
    case |= {"q": torch.ones(batch, heads, time, D).requires_grad_(), "k": torch.ones(batch, kv_heads, time, D)}
    case |= {"cos": torch.ones(time, 3), "sin": torch.ones(time, 3), "k": case["k"].requires_grad_()}
    found = _both(case)
    assert [tuple(y.shape) for y in found[:4]] == 2 * [(batch, heads, time, D), (batch, kv_heads, time, D)]
    for x, dw in zip((case["q"], case["k"]), found[4:], strict=weighted):
        assert x.numel() or not dw.any()


@pytest.mark.parametrize("kind", ["one batch", "expanded", "columns apart", "sin elsewhere", "bfloat16", "two dtypes"])
def test_tables_of_any_layout_and_dtype(kind: str) -> None:
    case = _case()
    cos, sin = case["cos"], case["sin"]
    if kind in ("one batch", "expanded"):
        case |= {"cos": cos[:1].expand_as(cos).contiguous(), "sin": sin[:1].expand_as(sin).contiguous()}
        moved = [t[:1] if kind == "one batch" else t[:1].expand_as(t) for t in (cos, sin)]
    elif kind == "columns apart":
        moved = list(torch.stack((cos, sin), -1).unbind(-1))
    elif kind == "sin elsewhere":
        moved = [cos, sin.transpose(0, 1).contiguous().transpose(0, 1)]
    else:
        cos, sin = cos.bfloat16(), sin.bfloat16()
        case |= {"cos": cos.double(), "sin": sin.double()}
        moved = [cos, sin if kind == "bfloat16" else sin.double()]
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])
    expected, found = _both(case, upstream), _both(case | dict(zip(("cos", "sin"), moved, strict=True)), upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", FLOATS)
def test_weights_of_other_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    """q's weight and k's each of any dtype; results keep q's, gradients each its own."""
    case = _case(dtype)
    case["q_weight"] = case["q_weight"].detach().to(other).requires_grad_()
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])
    errors = compare(fk.rotary_embedding, rotary.rotary_embedding_reference, case, upstream)
    assert all(error.ok for error in errors), errors
    found = _both(case, upstream)
    assert [t.dtype for t in found] == [dtype] * 4 + [other, dtype]


@pytest.mark.parametrize("columns", [4, 40, 80, 96, 160, 192, 256])
@pytest.mark.parametrize("partial", [False, True])
def test_head_dimensions(columns: int, partial: bool) -> None:
    """Whole heads and a quarter of the head rotated, an odd number of positions, q and k in one dtype."""
    torch.manual_seed(7)
    rotated = max(2, columns // 8 * 2) if partial else columns
    q, k = (torch.randn(1, 3, heads, columns).requires_grad_() for heads in (2, 1))
    weights = [torch.randn(columns).requires_grad_() for _ in range(2)]
    case = {"q": q, "k": k, "cos": torch.randn(3, rotated // 2), "sin": torch.randn(3, rotated // 2)}
    case |= {"head_dim_axis": 2, "rotary_dim": rotated, "qk_norm_eps": 1e-2}
    case |= {"q_weight": weights[0], "k_weight": weights[1]}
    errors = compare(
        fk.rotary_embedding, rotary.rotary_embedding_reference, case, (torch.randn_like(q), torch.randn_like(k))
    )
    assert all(error.ok for error in errors), errors


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group_heads", [1, 2, 3, 8])
def test_heads_in_groups(group_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several heads share a load of the tables, the last group smaller; every head is rotated once."""
    monkeypatch.setattr(configs, "rotary_group_heads", lambda tiles, resident: group_heads)
    case = _case()
    q = torch.randn(B, 5, T, D, dtype=torch.float64).requires_grad_()
    case = case | {"q": q}
    errors = compare(
        fk.rotary_embedding,
        rotary.rotary_embedding_reference,
        case,
        (torch.randn_like(q), torch.randn_like(case["k"])),
    )
    assert all(error.ok for error in errors), errors


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_a_head_of_zeros_without_eps() -> None:
    """eps = 0: a head of zeros is NaN, as 0 / 0 is, and stays in its place; positions past the last do not count."""
    case: dict[str, Any] = _case() | {"qk_norm_eps": 0.0}
    expected = _both(case)
    assert all(t.isfinite().all() for t in expected)
    case["q"].data[1, 2, 3] = 0.0
    output = fk.rotary_embedding(**case)[0].detach()
    assert output[1, 2, 3].isnan().all()
    assert output.isnan().sum() == D


def test_autocast_keeps_the_dtype() -> None:
    case = _case(torch.float32)
    expected = fk.rotary_embedding(**case)
    with torch.autocast(case["q"].device.type, dtype=torch.bfloat16):
        found = fk.rotary_embedding(**case)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@on_kernels
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_past_two_to_the_31_elements(axis: int) -> None:
    """The last batch, head or position lies 2.1e9 elements behind the first (memory touched: theirs alone)."""
    case = _case(torch.float16)
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])

    def spread(x: Tensor) -> Tensor:
        strides = list(torch.empty_like(x, memory_format=torch.contiguous_format).stride())
        strides[axis] = 2**31 // max(1, x.shape[axis] - 1) + 9
        memory = torch.empty(strides[axis] * (x.shape[axis] - 1) + x.numel(), dtype=x.dtype, device=x.device)
        return memory.as_strided(x.shape, strides).copy_(x.detach())

    expected = _both(case, upstream)
    moved: dict[str, Any] = case | {name: spread(case[name]).requires_grad_() for name in "qk"}
    # One at a time: each is 4 GB of addresses.
    for a, b in zip(_both(case | {"k": moved["k"]}, (upstream[0], spread(upstream[1]))), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(_both(case | {"q": moved["q"]}, (spread(upstream[0]), upstream[1])), expected, strict=True):
        assert torch.equal(a, b)


# What the kernels alone promise.


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, options) of every launch."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def noting(module_launch: Callable[..., None]) -> Callable[..., None]:
        def noted(fn: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
            found.append((fn.__name__, arguments, options))
            module_launch(fn, grid, arguments, **options)

        return noted

    for owner in (_rotation, _norm_backward, _rows):
        monkeypatch.setattr(owner, "launch", noting(owner.launch))
    return found


@on_kernels
@pytest.mark.parametrize("weighted", [False, True])
def test_views_of_a_merged_projection_take_no_copy(
    weighted: bool, launches: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
) -> None:
    """One launch each way reads q, k and their upstream gradients where they lie; two small sums for the weights."""
    case = _case(torch.float32, weighted=weighted)
    merged = torch.randn(B, T, HQ + 2 * HK, D)
    q, k, _ = merged.transpose(1, 2).split([HQ, HK, HK], 1)
    upstream = torch.randn(B, T, HQ + HK, D).transpose(1, 2).split([HQ, HK], 1)
    case |= {"q": q.detach().requires_grad_(), "k": k.detach().requires_grad_()}
    outputs = _both(case, upstream)
    names = [name for name, _, _ in launches]
    backward = ["rotary_norm_backward_kernel", "sum_partials_kernel"] if weighted else ["rotary_kernel"]
    assert names == ["rotary_kernel", *backward]
    addresses = [[a.data_ptr() for a in arguments if isinstance(a, Tensor)] for _, arguments, _ in launches]
    assert addresses[0][:2] == [q.data_ptr(), k.data_ptr()]
    assert addresses[1][:2] == [dy.data_ptr() for dy in upstream]
    if weighted:
        assert addresses[1][2:4] == [q.data_ptr(), k.data_ptr()]
    # (B, T, H, D) in memory, as the projection is.
    assert all(y.transpose(1, 2).is_contiguous() for y in outputs[:4])


@on_kernels
@pytest.mark.parametrize("alone", ["q", "k"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_side_whose_result_is_unused_is_not_read(
    alone: str, weighted: bool, launches: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
) -> None:
    """The other's gradients are bit for bit those of both together."""
    case = _case(torch.float32, weighted=weighted)
    index = "qk".index(alone)
    upstream = torch.randn_like(case["q"]), torch.randn_like(case["k"])
    expected = _both(case, upstream)[2:][index::2]
    launches.clear()
    output = fk.rotary_embedding(**case)[index]
    found = torch.autograd.grad(output, _leaves(case), upstream[index], allow_unused=True)
    assert all(grad is None for grad in found[1 - index :: 2])
    for a, b in zip(found[index::2], expected, strict=True):
        assert a is not None
        assert torch.equal(a, b)
    _, arguments, _ = launches[1]
    other = case["qk"[1 - index]]
    assert all(a.data_ptr() != other.data_ptr() for a in arguments if isinstance(a, Tensor))


@on_kernels
@pytest.mark.parametrize("weighted", [False, True])
def test_saved_for_backward(weighted: bool) -> None:
    """cos and sin; with the norm its inputs too, and no copy of anything."""
    case, saved = _case(torch.float32, weighted=weighted), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fk.rotary_embedding(**case)
    wanted = ["cos", "sin", *(["q", "k", "q_weight", "k_weight"] if weighted else [])]
    assert saved == [case[name].data_ptr() for name in wanted]


def test_numbers_that_vary_from_call_to_call_compile() -> None:
    """eps, weight_offset, rotary_dim and the axis as symbols."""
    torch._dynamo.reset()
    case = _case(full=True)
    # As many heads as positions, so that both axes fit.
    case |= {name: case[name].detach()[:, :1].expand(B, T, T, D) for name in "qk"}

    def rotated(eps: float, weight_offset: float, rotary_dim: int, axis: int) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {
            "qk_norm_eps": eps,
            "weight_offset": weight_offset,
            "rotary_dim": rotary_dim,
            "head_dim_axis": axis,
        }
        return fk.rotary_embedding(**case | options)

    compiled = torch.compile(rotated, dynamic=True, fullgraph=True, backend="aot_eager")
    for numbers in ((1e-6, 1.5, 6, 1), (0.1, 2.5, 6, 2), (0.2, -0.5, 6, -2)):
        torch.testing.assert_close(compiled(*numbers), rotated(*numbers))


@pytest.mark.parametrize("trains", ["q", "k", "q_weight", "k_weight"])
def test_a_frozen_side_wants_no_gradient(trains: str) -> None:
    """Neither result depends on the other side's inputs."""
    case = _case()
    case |= {name: value.detach() for name, value in case.items() if isinstance(value, Tensor) and name != trains}
    assert [y.requires_grad for y in fk.rotary_embedding(**case)] == [trains.startswith(side) for side in "qk"]


@on_kernels
def test_what_takes_pytorchs_path() -> None:
    """A gradient of the tables, two dtypes, heads past 1024: explained, and right."""
    case = _case(torch.float32)
    assert fk.explain(fk.rotary_embedding, **case).path == "triton"
    wide = torch.zeros(1, 1, T, 1026)
    calls: Any = (
        (case | {"cos": case["cos"].requires_grad_()}, "cos or sin requires a gradient"),
        (case | {"k": case["k"].half()}, "q is torch.float32, k is torch.float16"),
        ({"q": wide, "k": wide, "cos": torch.ones(T, 513), "sin": torch.ones(T, 513)}, "a head dimension of 1026"),
    )
    for call, reason in calls:
        explanation = fk.explain(fk.rotary_embedding, **call)
        assert (explanation.path, explanation.reason[: len(reason)]) == ("torch", reason)
        ours, theirs = fk.rotary_embedding(**call), rotary.rotary_embedding_reference(**call)
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert fk.explain(fk.rotary_embedding, **calls[0][0]).path == "triton"
