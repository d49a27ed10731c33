"""fp32 products by oneDNN: right in value and every gradient, taken where they are faster, the same bits each time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import machine, products
from fastlm.model import Linear

# (M, K, N): as in training, odd, one row, one column of weights; which of the two is the smaller decides who is copied.
SHAPES = [(96, 32, 48), (96, 48, 16), (7, 5, 3), (1, 9, 4), (6, 4, 1)]


@pytest.fixture
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 0)


class Operators(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called = Counter[str]()
        self.odd_weights = 0  # neither dense nor the transpose of what is

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[str(func)] += 1
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.odd_weights += not (args[1].is_contiguous() or args[1].t().is_contiguous())
        return func(*args, **(kwargs or {}))


def inputs(shape: tuple[int, int, int], *, bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    M, K, N = shape
    generator = torch.Generator().manual_seed(M)
    sizes = [(2, M, K), (N, K), (N,)][: 2 + bias]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def results(fn: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    y = fn(*leaves)
    first = torch.autograd.grad(y, leaves, upstream.to(y.dtype), retain_graph=True)
    again = torch.autograd.grad(y, leaves, y.tanh(), create_graph=True)
    second = torch.autograd.grad(torch.stack([(g**2).sum() for g in again]).sum(), leaves)
    return [found.detach() for found in (y, *first, *second)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_of_two_orders(
    everything_by_onednn: None, shape: tuple[int, int, int], layout: str, bias: bool
):
    M, _, N = shape
    leaves, exact = inputs(shape, bias=bias), inputs(shape, bias=bias, dtype=torch.float64)
    upstream = {
        "dense": torch.randn(2, M, N),
        "transposed": torch.randn(N, M, 2).permute(2, 1, 0),
        "expanded": torch.ones(()).expand(2, M, N),
        "sliced": torch.randn(2, M, 3 * N + 1)[..., 1 : 1 + 2 * N : 2],
    }[layout]
    with Operators() as seen:
        found = results(products.linear, leaves, upstream)
    assert seen.called["mkldnn._linear_pointwise.default"] >= 7, "forward, backward, and the backward of that"
    assert seen.called["aten.mm.default"] == 0
    assert seen.odd_weights == 0, "they cost a thousand times as much"
    for value, truth in zip(found, results(F.linear, exact, upstream), strict=True):
        assert value.shape == truth.shape
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_gradients_lie_as_their_parameters_do(everything_by_onednn: None):
    x, weight = inputs((96, 32, 48), bias=False)
    products.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize(("fast", "rows", "taken"), [(True, 512, True), (True, 64, False), (False, 512, False)])
def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, fast: bool, rows: int, taken: bool):
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", fast)
    layer, x = Linear(64, 64, bias=False), torch.randn(rows, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with Operators() as seen, torch.no_grad():
            y = layer.to(dtype)(x.to(dtype))
        assert ("mkldnn._linear_pointwise.default" in seen.called) == (taken and dtype == torch.float32)
        assert y.dtype == dtype
    with Operators() as seen, torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    assert "mkldnn._linear_pointwise.default" not in seen.called


@pytest.mark.parametrize(
    ("maker", "width", "faster"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, maker: str, width: str, faster: bool):
    monkeypatch.setattr(machine, "processor", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    assert products._is_faster() == faster
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products._is_faster()


def test_functorch_goes_by_pytorchs_operator(everything_by_onednn: None):
    x, weight = (leaf.detach() for leaf in inputs((8, 4, 4), bias=False))
    loss = torch.func.grad(lambda w: products.linear(x, w).square().sum())
    torch.testing.assert_close(loss(weight), torch.func.grad(lambda w: F.linear(x, w).square().sum())(weight))
    assert torch.vmap(lambda row: products.linear(row, weight))(x).shape == (2, 8, 4)


def test_compiled_it_is_one_operator(everything_by_onednn: None):
    leaves = inputs((96, 32, 48), bias=True)
    torch._dynamo.reset()
    called = Counter[str]()

    def look(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(products.linear, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    y = compiled(*leaves)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert called["fastlm.product.default"] == 3, "forward and two gradients"
    assert called["mkldnn._linear_pointwise.default"] == called["aten.mm.default"] == 0
    expected = torch.autograd.grad(products.linear(*leaves), leaves, torch.ones_like(y))
    for value, eager in zip((y, *found), (products.linear(*leaves), *expected), strict=True):
        assert torch.equal(value, eager)
    for a, b in ((torch.randn(9, 4), torch.randn(5, 4)), (torch.randn(4, 9).t(), torch.randn(4, 5).t())):
        torch.library.opcheck(torch.ops.fastlm.product.default, (a.requires_grad_(), b, None))
