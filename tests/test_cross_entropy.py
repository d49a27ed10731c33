"""cross_entropy: our keywords against the formulas written out in float64, and the named differences of DESIGN 3.1."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import DEVICE, LAYOUTS, guarded, offset, padded, strided, transposed
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import configs
from fastlm_kernels.check import DTYPES, compare, upstream_gradients

# The function hides its package: both are called cross_entropy.
kernels: Any = sys.modules["fastlm_kernels.cross_entropy"]
LONG = configs.RowConfig(4, 16, 4)


@pytest.fixture(params=["preferred", pytest.param("kernels", marks=pytest.mark.needs_kernels)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that the calls take by themselves, and in the interpreter the kernels, in float64 too."""
    if request.param == "kernels":
        monkeypatch.setattr(kernels, "_KERNEL_DTYPES", (*DTYPES, torch.float64))


both_paths = pytest.mark.usefixtures("path")
needs_kernels = pytest.mark.needs_kernels


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 columns and steps of 16 rows: short rows are walked as long ones, few are summed as many."""
    monkeypatch.setattr(configs, "CROSS_ENTROPY", {"generic": ()})
    for name in ("CROSS_ENTROPY_LONG", "CROSS_ENTROPY_LONG_GRADIENT"):
        monkeypatch.setattr(configs, name, {"generic": (LONG,)})
    monkeypatch.setattr(configs, "CROSS_ENTROPY_REDUCE", LONG)


pytestmark = pytest.mark.both_paths


def _inputs(seed: int = 0, rows: int = 9, classes: int = 13, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[2], target[5] = -100, -100
    weight = (0.2 + torch.rand(classes, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, target, weight


def _names(value: Any) -> str:
    """A test's name from options or a layout."""
    return "-".join(value) or "plain" if isinstance(value, dict) else getattr(value, "__name__", str(value))


def _by_hand(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    reduction: str,
    z_loss: float,
    softcap: float | None,
    num_items: int | None,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The module text's equations, token by token, with no use of PyTorch's losses: (loss, z)."""
    losses, zs, denominator = [], [], 0.0
    for row, y in zip(logits, target.tolist(), strict=True):
        if y == -100:
            losses.append(row.sum() * 0)
            zs.append(row.sum() * 0)
            continue
        capped = row if softcap is None else softcap * torch.tanh(row / softcap)
        lse = torch.log(torch.exp(capped - capped.max()).sum()) + capped.max()
        smooth = (weight * (lse - capped)).sum() / len(row)
        nll = (1 - smoothing) * weight[y] * (lse - capped[y]) + smoothing * smooth
        losses.append(nll + z_loss * lse**2)
        zs.append(z_loss * lse**2)
        denominator = denominator + weight[y]
    loss, z = torch.stack(losses), torch.stack(zs)
    if reduction == "none":
        return loss, z
    if num_items is not None:
        return loss.sum() / num_items, z.sum() / num_items
    return (loss.sum(), z.sum()) if reduction == "sum" else (loss.sum() / denominator, z.sum() / denominator)


CASES = [
    (reduction, z_loss, softcap, num_items, smoothing)
    for reduction in ("none", "sum", "mean")
    for z_loss in (0.0, 0.3)
    for softcap in (None, 2.5)
    for num_items in (None, 23)
    for smoothing in (0.0, 0.1)
    if not (reduction == "none" and num_items)
]


@both_paths
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("reduction", "z_loss", "softcap", "num_items", "smoothing"), CASES)
def test_options_equal_the_formula(
    reduction: str, z_loss: float, softcap: float | None, num_items: int | None, smoothing: float, weighted: bool
) -> None:
    logits, target, weight = _inputs()
    x = logits.clone().requires_grad_()
    loss, z = fk.cross_entropy(
        x,
        target,
        weight if weighted else None,
        reduction=reduction,
        label_smoothing=smoothing,
        z_loss=z_loss,
        return_z_loss=True,
        softcap=softcap,
        num_items=num_items,
    )
    x_ref = logits.clone().requires_grad_()
    weights = weight if weighted else torch.ones_like(weight)
    expected, expected_z = _by_hand(x_ref, target, weights, reduction, z_loss, softcap, num_items, smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z, expected_z.detach())
    assert not z.requires_grad
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    (expected_grad,) = torch.autograd.grad(expected, x_ref, upstream)
    torch.testing.assert_close(grad, expected_grad)


@both_paths
def test_options_pass_gradcheck() -> None:
    logits, target, weight = _inputs(1, rows=6, classes=5)

    def loss(x: Tensor) -> Any:
        return fk.cross_entropy(x, target, weight, z_loss=0.1, softcap=2.0, num_items=torch.tensor(7))

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    with fk.backend("torch"):
        assert torch.autograd.gradgradcheck(loss, logits)


@both_paths
def test_options_with_images_and_probabilities() -> None:
    torch.manual_seed(3)
    image = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 3, 4))
    flat = fk.cross_entropy(image.permute(0, 2, 3, 1).reshape(-1, 5), target.flatten(), z_loss=0.2, softcap=3.0)
    torch.testing.assert_close(fk.cross_entropy(image, target, z_loss=0.2, softcap=3.0), flat)

    probabilities = torch.randn(6, 5, dtype=torch.float64).softmax(1)
    x = torch.randn(6, 5, dtype=torch.float64)
    lse = x.logsumexp(1)
    expected = (-(probabilities * (x - lse[:, None])).sum(1) + 0.2 * lse**2).mean()
    torch.testing.assert_close(fk.cross_entropy(x, probabilities, z_loss=0.2), expected)


@both_paths
def test_num_items_makes_micro_batches_add_up() -> None:
    logits, target, _ = _inputs(4, rows=12)
    whole = fk.cross_entropy(logits, target, z_loss=0.1)
    counted = int((target != -100).sum())
    for items in (counted, torch.tensor(counted), torch.tensor(float(counted))):
        parts = [
            fk.cross_entropy(logits[i : i + 3], target[i : i + 3], z_loss=0.1, num_items=items) for i in range(0, 12, 3)
        ]
        torch.testing.assert_close(sum(parts), whole)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_difference_a_losses_are_fp32(dtype: torch.dtype) -> None:
    logits, target, weight = _inputs(5, dtype=dtype)
    for reduction in ("none", "sum", "mean"):
        loss = fk.cross_entropy(logits, target, weight, reduction=reduction)
        assert loss.dtype == torch.float32
        expected = F.cross_entropy(logits.double(), target, weight.double(), reduction=reduction)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fk.cross_entropy(x, target), x)
    assert grad.dtype == dtype


@both_paths
def test_difference_a_keeps_a_confident_tokens_gradient() -> None:
    """p - 1 formed in fp32: in half precision p rounds to 1 and the gradient to 0."""
    x = torch.tensor([[10.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(fk.cross_entropy(x, torch.tensor([0])), x)
    exact = -2 * torch.exp(torch.tensor(-10.0)) / (1 + 2 * torch.exp(torch.tensor(-10.0)))
    torch.testing.assert_close(grad[0, 0].float(), exact, rtol=1e-2, atol=0.0)


@both_paths
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.1, "softcap": 5.0}, {"label_smoothing": 0.1}], ids=["plain", "ours", "smooth"]
)
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_difference_b_nothing_counted(options: dict[str, Any], rows: int, weighted: bool) -> None:
    x = torch.randn(rows, 5, requires_grad=True)
    target = torch.full((rows,), -100)
    weight = torch.rand(5) if weighted else None
    loss = fk.cross_entropy(x, target, weight, **options)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, torch.zeros_like(x))
    for items in (8, torch.tensor(8), 0, torch.tensor(0)):
        loss = fk.cross_entropy(x, target, weight, num_items=items, **options)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, x)
        assert torch.equal(grad, torch.zeros_like(x))


@both_paths
def test_target_outside_the_classes_is_an_index_error_with_our_options_too() -> None:
    x = torch.randn(2, 5)
    for bad in (5, -1, 2**40):
        with pytest.raises(IndexError):
            fk.cross_entropy(x, torch.tensor([0, bad]), z_loss=0.1, softcap=3.0, num_items=2)


@both_paths
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"softcap": float("nan")}, "softcap: got nan"),
        ({"softcap": "15"}, "softcap: got '15'"),
        ({"z_loss": -0.1}, "z_loss: got -0.1"),
        ({"z_loss": float("inf")}, "z_loss: got inf"),
        ({"num_items": -1}, "num_items: got -1"),
        ({"num_items": 2.5}, "num_items: got 2.5"),
        ({"num_items": True}, "num_items: got True"),
        ({"num_items": torch.tensor([3])}, "num_items: got a torch.int64 tensor of shape (1,)"),
        ({"num_items": 2**63}, f"num_items: got {2**63}"),
        ({"num_items": 7, "reduction": "none"}, "num_items=7 with reduction='none'"),
    ],
    ids=str,
)
def test_bad_options_are_value_errors_with_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"give|use") as error:
        fk.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), **options)
    assert words in str(error.value)


@both_paths
@pytest.mark.parametrize("reduction", ["average", None, 3, ["mean"]], ids=str)
def test_num_items_does_not_hide_a_bad_reduction(reduction: Any) -> None:
    """PyTorch's own message."""
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        fk.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), reduction=reduction, num_items=2)


@both_paths
def test_uint8_targets_are_the_same_numbers_in_int64() -> None:
    """256 classes, so that -100 has a namesake among them; label smoothing is PyTorch's, which mistakes the two."""
    x, target = torch.randn(3, 256, dtype=torch.float64), torch.tensor([156, 5, 255])
    several: tuple[Any, ...] = ({}, {"z_loss": 0.1}, {"z_loss": 0.1, "reduction": "none"})
    for options in several:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found = [fk.cross_entropy(leaves[0], target.byte(), **options), fk.cross_entropy(leaves[1], target, **options)]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*(torch.autograd.grad(found[i].sum(), leaves[i])[0] for i in range(2)))
    smoothed = fk.cross_entropy(x, target.byte(), label_smoothing=0.1)
    torch.testing.assert_close(smoothed, F.cross_entropy(x, target.byte(), label_smoothing=0.1))
    with pytest.raises(RuntimeError):
        fk.cross_entropy(x, target.byte(), torch.rand(256, dtype=torch.float64), label_smoothing=0.1)


@both_paths
def test_num_items_that_requires_a_gradient_gets_it() -> None:
    logits, target, _ = _inputs()
    items = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss = fk.cross_entropy(logits, target, num_items=items)
    (grad,) = torch.autograd.grad(loss, items)
    torch.testing.assert_close(grad, -loss.detach() / 4)


@both_paths
def test_class_weights_that_sum_to_zero() -> None:
    """NaN in every counted token's gradient, as PyTorch's 0 / 0 is; an ignored one's stays 0."""
    logits, target, weight = _inputs()
    for weights in (torch.zeros_like(weight), torch.tensor([1.0, -1.0]).repeat(7)[:13].double()):
        labels = target.where(target == -100, torch.arange(len(target)) % 2)
        labels[0] = -100  # as many of class 0 as of class 1
        assert weights[labels[labels != -100]].sum() == 0
        grads = []
        for fn in (fk.cross_entropy, F.cross_entropy):
            x = logits.clone().requires_grad_()
            loss = fn(x, labels, weights)
            assert not loss.isfinite()
            grads.append(torch.autograd.grad(loss, x)[0])
        assert torch.equal(grads[0].isfinite(), (labels == -100)[:, None].expand_as(logits))
        assert torch.equal(grads[0].isfinite(), grads[1].isfinite())


@both_paths
def test_inplace_backward_allows_one_backward() -> None:
    logits, target, _ = _inputs(6)
    x = logits.clone().requires_grad_()
    loss = fk.cross_entropy(x, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    reference = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(reference, target), reference)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, x)


@both_paths
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "softcap": 5.0, "num_items": 4}], ids=["plain", "ours"])
def test_two_backwards_agree_and_nothing_is_modified(options: dict[str, Any]) -> None:
    logits, target, weight = _inputs(7)
    x = logits.clone().requires_grad_()
    upstream = torch.full((), 1.7, dtype=torch.float64)
    loss = fk.cross_entropy(x, target, weight, **options)
    first = torch.autograd.grad(loss, x, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, upstream)[0]
    assert torch.equal(first, second)
    assert torch.equal(x, logits)
    assert upstream.item() == 1.7
    assert torch.equal(target, _inputs(7)[1])
    assert torch.equal(weight, _inputs(7)[2])


@both_paths
def test_legacy_reductions_warn_as_pytorch_does() -> None:
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="reduction='sum'"):
        ours = fk.cross_entropy(x, target, None, False)
    torch.testing.assert_close(ours, F.cross_entropy(x, target, reduction="sum"))


@both_paths
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"reduce": True}], ids=_names)
def test_legacy_reductions_compile_whole(legacy: Any) -> None:
    """With PyTorch's warning, once, while the function is traced."""
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="please use reduction="):
        expected = F.cross_entropy(x, target, **legacy)
    for fn in (fk.cross_entropy, kernels.cross_entropy_reference):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y, fn=fn: fn(x, y, **legacy), fullgraph=True, backend="eager")
        with pytest.warns(UserWarning, match="please use reduction=") as noted:
            ours = compiled(x, target)
        assert len(noted) == 1
        torch.testing.assert_close(ours, expected)


@both_paths
def test_transforms_work_on_the_pytorch_path() -> None:
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, -100])

    def loss(row: Tensor, y: Tensor) -> Any:
        return fk.cross_entropy(row, y, softcap=3.0, z_loss=0.1, reduction="sum")

    per_row = torch.func.vmap(torch.func.grad(loss))(x, target)
    together = torch.func.grad(loss)(x, target)
    torch.testing.assert_close(per_row, together)


# The kernels alone.

OPTIONS: list[dict[str, Any]] = [
    {"weight": weight, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
    for weight, smoothing, z_loss, softcap in itertools.product((False, True), (0.0, 0.1), (0.0, 0.3), (None, 2.5))
]
EVERYTHING = OPTIONS[-1]


def _call(dtype: torch.dtype, rows: int = 6, classes: int = 13, weight: Any = False, **options: Any) -> dict[str, Any]:
    """Arguments of a call that the kernels cover, on the device that they run on."""
    logits, target, weights = (t.to(DEVICE) for t in _inputs(8, rows, classes, dtype))
    call = {"input": logits.requires_grad_(), "target": target, "weight": weights if weight else None, **options}
    assert fk.explain(fk.cross_entropy, **call).path == "triton"
    return call


def _assert_accurate(call: dict[str, Any]) -> None:
    upstream = upstream_gradients(kernels.cross_entropy_reference, call, 9)
    errors = compare(fk.cross_entropy, kernels.cross_entropy_reference, call, upstream)
    assert all(error.ok for error in errors), [*map(str, errors), call]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_options_together_are_accurate(dtype: torch.dtype, reduction: str) -> None:
    for options in OPTIONS:
        _assert_accurate(_call(dtype, **options, reduction=reduction))


@needs_kernels
@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [23, 48])
def test_long_rows_with_all_options_are_accurate(dtype: torch.dtype, classes: int) -> None:
    for options in ({}, EVERYTHING):
        _assert_accurate(_call(dtype, 9, classes, **options))


@needs_kernels
@pytest.mark.parametrize("tiles", ["whole", "long"])
@pytest.mark.parametrize("target", [0, 23, 2**40], ids=str)
def test_no_read_beyond_the_logits(target: int, tiles: str, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """The logits end where readable memory does; the last row's target is a class, or points past them."""
    if tiles == "long":
        request.getfixturevalue("long_rows")
    monkeypatch.setattr(kernels._forward, "_check_targets", lambda *_: None)
    call = _call(torch.float32, classes=23, reduction="none")
    call["target"][-1] = target
    call["input"] = guarded(call["input"]).requires_grad_()
    loss = fk.cross_entropy(**call)
    (grad,) = torch.autograd.grad(loss.sum(), call["input"])
    assert bool(loss[-1].isnan()) == bool(grad[-1].isnan().all()) == (target != 0)


@needs_kernels
@pytest.mark.parametrize(
    ("reduction", "tiles"),
    [("none", "whole"), ("sum", "whole"), ("mean", "whole"), ("items", "whole"), ("mean", "long")],
)
def test_gradients_by_finite_differences(
    reduction: str, tiles: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if tiles == "long":
        request.getfixturevalue("long_rows")
    monkeypatch.setattr(kernels, "_KERNEL_DTYPES", (torch.float64,))
    ours = {"num_items": torch.tensor(7, device=DEVICE)} if reduction == "items" else {"reduction": reduction}
    call = _call(torch.float64, 6, 19 if tiles == "long" else 5, **EVERYTHING, **ours)
    logits = call.pop("input")
    assert torch.autograd.gradcheck(lambda x: fk.cross_entropy(x, **call), logits)


@needs_kernels
@pytest.mark.parametrize("num_items", [0, 3, torch.tensor(3), torch.tensor(0), torch.tensor(2.5), torch.tensor(0.5)])
def test_num_items_of_every_kind(num_items: Any) -> None:
    if isinstance(num_items, Tensor):
        num_items = num_items.to(DEVICE)
    for reduction in ("mean", "sum"):
        call = _call(torch.float32, **EVERYTHING, num_items=num_items, reduction=reduction, return_z_loss=True)
        for ours, theirs in zip(fk.cross_entropy(**call), kernels.cross_entropy_reference(**call), strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_z_part_is_detached_and_the_references(reduction: str, z_loss: float) -> None:
    call = _call(torch.bfloat16, softcap=4.0, z_loss=z_loss, reduction=reduction, return_z_loss=True)
    (loss, z), (loss_ref, z_ref) = fk.cross_entropy(**call), kernels.cross_entropy_reference(**call)
    torch.testing.assert_close((loss, z), (loss_ref, z_ref))
    assert loss.requires_grad
    assert not z.requires_grad


@needs_kernels
@pytest.mark.parametrize("tiles", ["whole", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_targets_keep_their_digits(dtype: torch.dtype, tiles: str, request: pytest.FixtureRequest) -> None:
    """p - 1 of 1e-2 to 1e-12, where p itself is 1 in fp32; the loss too: better than PyTorch's 6e-8."""
    if tiles == "long":
        request.getfixturevalue("long_rows")
    gaps = torch.arange(4.0, 28.0, 2.0)
    logits = torch.zeros(len(gaps), 24).index_put_((torch.arange(len(gaps)), torch.arange(len(gaps))), gaps)
    x = logits.to(DEVICE, dtype).requires_grad_()
    target = torch.arange(len(gaps), device=DEVICE)
    loss = fk.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    others = 23 * torch.exp(-gaps.double())
    torch.testing.assert_close(loss.detach().double().cpu(), torch.log1p(others), rtol=4e-6, atol=0)
    exact = -others / (1 + others)
    kept = exact.abs() > torch.finfo(dtype).tiny  # fp16 ends at 6e-5
    found = grad.diagonal()[: len(gaps)].double().cpu()
    torch.testing.assert_close(found[kept], exact[kept], rtol=max(4e-6, 1.01 * torch.finfo(dtype).eps), atol=0)


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter
@pytest.mark.parametrize("tiles", ["whole", "long"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"z_loss": 0.1}], ids=_names)
def test_infinite_and_nan_logits_give_pytorchs_answer(
    options: dict[str, Any], tiles: str, request: pytest.FixtureRequest
) -> None:
    """Those of ignored rows too: NaN in their gradient, where PyTorch's is."""
    if tiles == "long":
        request.getfixturevalue("long_rows")
    x = torch.randn(12, 21, generator=torch.Generator().manual_seed(0))
    target = torch.arange(12)
    infinity = torch.inf
    x[0, 3], x[1, :], x[2, 4], x[3, 3], x[4, :20], x[5, 5] = (
        -infinity,
        -infinity,
        infinity,
        torch.nan,
        -infinity,
        -infinity,
    )
    x[6, 8], x[7, 8], x[8, :], x[9, 2], x[10, :8] = torch.nan, infinity, -infinity, -infinity, -infinity
    target[6:10] = -100
    found = []
    for fn in (fk.cross_entropy, kernels.cross_entropy_reference):
        leaf = x.to(DEVICE, copy=True).requires_grad_()
        loss = fn(leaf, target.to(DEVICE), reduction="none", **options)
        (grad,) = torch.autograd.grad(loss, leaf, torch.linspace(1, 2, 12, device=DEVICE))
        found.append((loss, grad))
    torch.testing.assert_close(*found, equal_nan=True)


@needs_kernels
def test_shapes_of_pytorch() -> None:
    """(C,), (N, C, d1), (N, C, d1, d2), classes last in memory, uint8; targets of any stride."""
    generator = torch.Generator().manual_seed(1)

    def same(x: Tensor, target: Tensor, **options: Any) -> None:
        found = []
        for fn in (fk.cross_entropy, kernels.cross_entropy_reference):
            leaf = x.to(DEVICE).detach().requires_grad_()
            call = {"input": leaf, "target": target.to(DEVICE), "z_loss": 0.1, **options}
            assert fk.explain(fk.cross_entropy, **call).path == "triton"
            loss = fn(**call)
            found.append((loss, *torch.autograd.grad(loss, leaf, torch.ones_like(loss))))
        torch.testing.assert_close(*found, equal_nan=True)

    for reduction in ("none", "mean"):
        same(torch.randn(5, generator=generator), torch.tensor(2), reduction=reduction)
        same(torch.randn(5, generator=generator), torch.tensor(-100), reduction=reduction, num_items=None)
        for shape in ((3, 5, 4), (2, 5, 3, 4), (2, 5, 3, 2, 2), (1, 5, 3, 4), (2, 5, 0, 3)):
            target = torch.randint(5, (shape[0], *shape[2:]), generator=generator)
            same(torch.randn(shape, generator=generator), target, reduction=reduction)
        last = torch.randn(2, 3, 4, 5, generator=generator).movedim(-1, 1)
        same(last, torch.randint(5, (2, 3, 4), generator=generator), reduction=reduction)
        target = torch.randint(5, (6,), generator=generator)
        x = torch.randn(6, 5, generator=generator)
        same(x, target.to(torch.uint8), reduction=reduction)
        for layout in LAYOUTS:
            same(x, layout(target), reduction=reduction)


@needs_kernels
@pytest.mark.parametrize("bad", [13, -1, 2**40])
def test_target_outside_the_classes(bad: int) -> None:
    """PyTorch's IndexError on a CPU, from the kernels' launcher; NaN on a GPU, and no read outside."""
    call = _call(torch.float32, reduction="none", weight=True)
    call["target"][0] = bad
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            fk.cross_entropy(**call)
        return
    loss = fk.cross_entropy(**call)
    (grad,) = torch.autograd.grad(loss.sum(), call["input"])
    assert loss.isnan().tolist() == [True] + [False] * 5
    assert grad[0].isnan().all()
    assert not grad[1:].isnan().any()


@needs_kernels
@pytest.mark.parametrize("bad", [13, -1, 2**40])
def test_bad_target_is_nan_without_the_cpus_check(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do by themselves, in the row of the target alone."""
    monkeypatch.setattr(kernels._forward, "_check_targets", lambda *_: None)
    for options in ({}, EVERYTHING):
        call = _call(torch.float32, reduction="none", **options)
        call["target"][0] = bad
        loss = fk.cross_entropy(**call)
        (grad,) = torch.autograd.grad(loss.sum(), call["input"])
        assert loss.isnan().tolist() == [True] + [False] * 5
        assert grad.isnan().all(1).tolist() == [True] + [False] * 5


@needs_kernels
@pytest.mark.parametrize("layout", [None, padded, offset], ids=_names)
def test_inplace_backward_takes_the_logits_memory(layout: Any) -> None:
    """No second tensor of their size; rows with a gap between them count as dense."""
    call = _call(torch.float32, softcap=4.0)
    leaf = call["input"]
    x = leaf.clone() if layout is None else layout(leaf)
    x = x.detach().requires_grad_()
    version = x._version
    loss = fk.cross_entropy(**{**call, "input": x}, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert grad.data_ptr() == x.data_ptr()
    assert x._version > version
    (expected,) = torch.autograd.grad(fk.cross_entropy(**call), leaf)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, x)


@needs_kernels
def test_inplace_backward_is_noticed_by_others_who_saved_the_logits() -> None:
    call = _call(torch.float32)
    x = call.pop("input") * 2.0
    other = x.square().sum()
    fk.cross_entropy(x, **call, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@needs_kernels
@pytest.mark.parametrize("layout", [transposed, strided, "expanded"], ids=_names)
def test_inplace_backward_leaves_other_layouts_alone(layout: Any) -> None:
    """Rows that share memory, or elements apart: the permission is not used."""
    call = _call(torch.float32)
    x = call["input"].detach()
    x = (x[:1].expand(6, 13) if layout == "expanded" else layout(x)).requires_grad_()
    before = x.detach().clone()
    (grad,) = torch.autograd.grad(fk.cross_entropy(**{**call, "input": x}, inplace_backward=True), x)
    (expected,) = torch.autograd.grad(fk.cross_entropy(**{**call, "input": x}), x)
    assert torch.equal(x, before)
    assert torch.equal(grad, expected)


@needs_kernels
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_inplace_backward_and_counts(compiler: str) -> None:
    """Compiled code keeps the logits; a new count of items every call compiles no new graph."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs) if compiler == "aot_eager" else graph.forward

    call = _call(torch.float32, **EVERYTHING)
    before = call["input"].detach().clone()
    compiled = torch.compile(
        lambda items, **kwargs: fk.cross_entropy(**kwargs, num_items=items, inplace_backward=True),
        fullgraph=True,
        backend=backend,
    )
    for items in (3, 4, 5, 9):
        loss = compiled(items, **call)
        (grad,) = torch.autograd.grad(loss, call["input"])
        expected = fk.cross_entropy(**call, num_items=items)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, call["input"])[0])
    assert torch.equal(call["input"], before)
    assert len(graphs) <= 2


@needs_kernels
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_operators_with_all_options_pass_opcheck(reduction: str) -> None:
    call = _call(torch.float32, **EVERYTHING)
    numbers = (-100, 0.1, 0.3, 2.5, False)
    items = None if reduction == "none" else torch.tensor(3, device=DEVICE)
    inputs = (call["input"], call["target"], call["weight"], items, reduction, *numbers)
    assert set(torch.library.opcheck(kernels.cross_entropy_forward.op, inputs).values()) == {"SUCCESS"}


@needs_kernels
def test_a_row_of_two_to_the_18_classes() -> None:
    """bf16, walked in blocks; the target last but one."""
    x = (3 * torch.randn(1, 2**18, generator=torch.Generator().manual_seed(2))).to(DEVICE, torch.bfloat16)
    target = torch.tensor([2**18 - 2], device=DEVICE)
    leaf = x.requires_grad_()
    loss = fk.cross_entropy(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf)
    wide = x.detach().double().requires_grad_()
    truth = F.cross_entropy(wide, target)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(truth, wide)[0], rtol=2**-7, atol=1e-12)


@needs_kernels
@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("rows", [40, 77, 300])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows_are_summed_in_one_pass_or_two(reduction: str, rows: int) -> None:
    """One program in several steps; several programs, the last with fewer rows, whose sums one program adds."""
    call = _call(torch.float32, rows=rows, z_loss=0.1, weight=True, reduction=reduction, return_z_loss=True)
    torch.testing.assert_close(fk.cross_entropy(**call), kernels.cross_entropy_reference(**call))


# What linear_cross_entropy builds on.


@needs_kernels
@pytest.mark.parametrize("tiles", ["whole", "long"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.3, "softcap": 2.5}], ids=_names)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("upstream", ["none", "one", "rows"])
def test_chunks_and_blocks_of_classes(
    upstream: str, weighted: bool, options: dict[str, Any], tiles: str, request: pytest.FixtureRequest
) -> None:
    """Two chunks of rows, their gradients in the logits' place; then the same by blocks of classes from lse."""
    if tiles == "long":
        request.getfixturevalue("long_rows")
    call = _call(torch.float32, 9, 21, weight=weighted, **options, reduction="none")
    leaf, target, weight = call["input"], call["target"], call["weight"]
    factor = {"none": None, "one": torch.tensor(1.5), "rows": torch.linspace(-1, 2, 18)[::2]}[upstream]
    factor = None if factor is None else factor.to(DEVICE)
    expected = kernels.cross_entropy_reference(**call)
    (wanted,) = torch.autograd.grad(expected, leaf, torch.ones(9, device=DEVICE) * (1.0 if factor is None else factor))

    choices, buffer, x = (
        kernels.Options(**options),
        torch.full((kernels.ROW_VALUES, 9), torch.nan),
        leaf.detach().clone(),
    )
    buffer = buffer.to(DEVICE)
    for first, last in ((0, 4), (4, 9)):
        part = factor[first:last] if upstream == "rows" and factor is not None else factor
        rows = slice(first, last)
        kernels.launch_rows(x[rows], target[rows], weight, choices, buffer[:, rows], x[rows], part)
    torch.testing.assert_close(buffer[0], expected.detach())
    torch.testing.assert_close(x, wanted)

    for first in range(0, 21, 8):
        block = leaf.detach()[:, first : first + 8].clone()
        kernels.launch_gradient(
            *(block, target, weight, choices, buffer[kernels.LSE], block, factor),
            denominator=torch.tensor(1.0, device=DEVICE),
            first_class=first,
            classes=21,
        )
        torch.testing.assert_close(block, wanted[:, first : first + 8])
    for reduction in ("mean", "sum"):
        loss, z, _ = kernels.launch_reduce(buffer, reduction, None)
        truth = kernels.cross_entropy_reference(**{**call, "reduction": reduction}, return_z_loss=True)
        torch.testing.assert_close((loss, z), tuple(part.detach() for part in truth))
