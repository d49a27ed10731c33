"""linear_cross_entropy: equal to logits and cross_entropy in float64, in every shape that DESIGN 3.1 names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm_kernels as fk


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    input = torch.randn(2, 6, 7, dtype=dtype)
    linear_weight = torch.randn(11, 7, dtype=dtype)
    bias = torch.randn(11, dtype=dtype)
    target = torch.randint(0, 11, (2, 6))
    target[0, 3] = -100
    return input, linear_weight, bias, target, 0.2 + torch.rand(11, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 4.0}, {"z_loss": 0.2}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_formula(reduction: str, options: dict[str, Any], dims: int) -> None:
    input, linear_weight, bias, target, weight = _inputs()
    input, target = (input, target) if dims == 3 else (input.flatten(0, 1), target.flatten())
    leaves = [t.clone().requires_grad_() for t in (input, linear_weight, bias)]
    loss = fk.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weight, reduction=reduction, **options
    )
    copies = [t.clone().requires_grad_() for t in (input, linear_weight, bias)]
    logits = torch.einsum("...d,vd->...v", copies[0], copies[1]) + copies[2]
    cap = options.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    flat, flat_target = logits.reshape(-1, 11), target.flatten()
    smoothing = options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(flat, flat_target, weight, reduction="none", label_smoothing=smoothing)
    counted = flat_target != -100
    expected = expected + torch.where(counted, options.get("z_loss", 0.0) * flat.logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        expected = expected.view(target.shape)
    else:
        expected = expected.sum() / (weight[flat_target[counted]].sum() if reduction == "mean" else 1.0)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, leaves, upstream)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, copies, upstream), strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_gradcheck_with_our_options() -> None:
    input, linear_weight, bias, target, weight = _inputs()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return fk.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight, softcap=3.0, z_loss=0.1, num_items=torch.tensor(9)
        )

    leaves = tuple(t.requires_grad_() for t in (input, linear_weight, bias))
    assert torch.autograd.gradcheck(loss, leaves)


def test_num_items_makes_micro_batches_add_up() -> None:
    input, linear_weight, _, target, _ = _inputs()
    whole = fk.linear_cross_entropy(input, linear_weight, target, softcap=5.0)
    items = int((target != -100).sum())
    parts = [
        fk.linear_cross_entropy(input[i : i + 1], linear_weight, target[i : i + 1], softcap=5.0, num_items=items)
        for i in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_return_z_loss_keeps_the_tokens_shape() -> None:
    input, linear_weight, _, target, _ = _inputs()
    loss, z = fk.linear_cross_entropy(input, linear_weight, target, reduction="none", z_loss=0.5, return_z_loss=True)
    assert loss.shape == z.shape == target.shape
    plain = fk.linear_cross_entropy(input, linear_weight, target, reduction="none")
    torch.testing.assert_close(loss - z, plain)
    assert z[0, 3] == 0


def test_probabilities_per_token() -> None:
    input, linear_weight, _, _, _ = _inputs()
    probabilities = torch.randn(2, 6, 11, dtype=torch.float64).softmax(-1)
    loss = fk.linear_cross_entropy(input, linear_weight, probabilities)
    logits = input @ linear_weight.T
    torch.testing.assert_close(loss, -(probabilities * logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_difference_a_losses_are_fp32(dtype: torch.dtype) -> None:
    input, linear_weight, _, target, _ = _inputs(dtype)
    loss = fk.linear_cross_entropy(input, linear_weight, target)
    assert loss.dtype == torch.float32
    logits = (input @ linear_weight.T).double().flatten(0, 1)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, target.flatten()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 0.1}], ids=["plain", "ours"])
def test_difference_b_nothing_counted(options: dict[str, Any]) -> None:
    input, linear_weight, _, target, _ = _inputs()
    leaves = [input.requires_grad_(), linear_weight.requires_grad_()]
    ignored = torch.full_like(target, -100)
    loss = fk.linear_cross_entropy(leaves[0], leaves[1], ignored, **options)
    assert loss.isnan()
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))
    loss = fk.linear_cross_entropy(leaves[0], leaves[1], ignored, num_items=12, **options)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("target_shape", "words"),
    [((2, 5), "target: got shape (2, 5)"), ((12,), "target: got shape (12,)"), ((2, 6, 10), "calls for (2, 6)")],
    ids=str,
)
def test_targets_that_do_not_fit_three_dimensions(target_shape: tuple[int, ...], words: str) -> None:
    input, linear_weight, _, _, _ = _inputs()
    with pytest.raises(RuntimeError) as error:
        fk.linear_cross_entropy(input, linear_weight, torch.zeros(target_shape, dtype=torch.long))
    assert words in str(error.value)


def test_bad_options_are_value_errors() -> None:
    input, linear_weight, _, target, _ = _inputs()
    calls: Any = ({"softcap": -2.0}, {"z_loss": -1.0}, {"num_items": 3, "reduction": "none"})
    for options in calls:
        with pytest.raises(ValueError, match=r"give|use"):
            fk.linear_cross_entropy(input, linear_weight, target, **options)
