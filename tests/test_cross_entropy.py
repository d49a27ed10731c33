"""cross_entropy: our keywords against the formulas written out in float64, and the named differences of DESIGN 3.1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm_kernels as fk

pytestmark = pytest.mark.both_paths


def _inputs(seed: int = 0, rows: int = 9, classes: int = 13, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[2], target[5] = -100, -100
    weight = (0.2 + torch.rand(classes, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, target, weight


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


def test_options_pass_gradcheck() -> None:
    logits, target, weight = _inputs(1, rows=6, classes=5)

    def loss(x: Tensor) -> Any:
        return fk.cross_entropy(x, target, weight, z_loss=0.1, softcap=2.0, num_items=torch.tensor(7))

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


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


def test_num_items_makes_micro_batches_add_up() -> None:
    logits, target, _ = _inputs(4, rows=12)
    whole = fk.cross_entropy(logits, target, z_loss=0.1)
    counted = int((target != -100).sum())
    for items in (counted, torch.tensor(counted), torch.tensor(float(counted))):
        parts = [
            fk.cross_entropy(logits[i : i + 3], target[i : i + 3], z_loss=0.1, num_items=items) for i in range(0, 12, 3)
        ]
        torch.testing.assert_close(sum(parts), whole)


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


def test_difference_a_keeps_a_confident_tokens_gradient() -> None:
    """p - 1 formed in fp32: in half precision p rounds to 1 and the gradient to 0."""
    x = torch.tensor([[10.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(fk.cross_entropy(x, torch.tensor([0])), x)
    exact = -2 * torch.exp(torch.tensor(-10.0)) / (1 + 2 * torch.exp(torch.tensor(-10.0)))
    torch.testing.assert_close(grad[0, 0].float(), exact, rtol=1e-2, atol=0.0)


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


def test_target_outside_the_classes_is_an_index_error_with_our_options_too() -> None:
    x = torch.randn(2, 5)
    for bad in (5, -1, 2**40):
        with pytest.raises(IndexError):
            fk.cross_entropy(x, torch.tensor([0, bad]), z_loss=0.1, softcap=3.0, num_items=2)


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
        ({"num_items": 7, "reduction": "none"}, "num_items=7 with reduction='none'"),
    ],
    ids=str,
)
def test_bad_options_are_value_errors_with_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"give|use") as error:
        fk.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), **options)
    assert words in str(error.value)


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


def test_legacy_reductions_warn_as_pytorch_does() -> None:
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="reduction='sum'"):
        ours = fk.cross_entropy(x, target, None, False)
    torch.testing.assert_close(ours, F.cross_entropy(x, target, reduction="sum"))


def test_transforms_work_on_the_pytorch_path() -> None:
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, -100])

    def loss(row: Tensor, y: Tensor) -> Any:
        return fk.cross_entropy(row, y, softcap=3.0, z_loss=0.1, reduction="sum")

    per_row = torch.func.vmap(torch.func.grad(loss))(x, target)
    together = torch.func.grad(loss)(x, target)
    torch.testing.assert_close(per_row, together)
