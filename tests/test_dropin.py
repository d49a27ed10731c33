"""Total drop-in: PyTorch's own operator samples give the same through fastlm_kernels, errors included (DESIGN 3.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import DEVICE
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import check

pytestmark = pytest.mark.both_paths

LOSSES = ("cross_entropy", "linear_cross_entropy")
KERNELS = ("layer_norm", "rms_norm")


def _op_infos() -> dict[str, Any]:
    """'name' or 'name.variant' -> OpInfo, for every operator that has one of our public names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing PyTorch's test tables warns, on our side nothing may
        from torch.testing._internal.common_methods_invocations import op_db
    infos = {}
    for info in op_db:
        name = info.name.removeprefix("nn.functional.")
        known = info.name in (name, f"nn.functional.{name}") and name in fk.__all__ and "." not in name
        if known and not info.variant_test_name.startswith("complex"):
            infos[f"{name}.{info.variant_test_name}".rstrip(".")] = info
    return infos


INFOS = _op_infos()


def _half(name: str, dtype: torch.dtype) -> bool:
    return dtype in INFOS[name].supported_dtypes(DEVICE) and not name.startswith("linear_cross_entropy.")


CASES = [
    (name, dtype)
    for name in sorted(INFOS)
    for dtype in (torch.float32, torch.float16)
    if dtype == torch.float32 or _half(name, dtype)
]


def _leaves(sample: Any) -> list[Tensor]:
    found = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in found if isinstance(t, Tensor) and t.requires_grad]


def _run(fn: Callable[..., Tensor], sample: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Output and the gradients of everything that asks for one, under an upstream gradient that is not 1."""
    torch.manual_seed(5)  # dropout samples draw from the default generator
    out = fn(sample.input, *sample.args, **sample.kwargs)
    leaves = _leaves(sample)
    if not leaves:
        return out.detach(), []
    upstream = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out)
    grads = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return out.detach(), list(grads)


def test_every_operator_with_samples_is_covered() -> None:
    names = {name.partition(".")[0] for name in INFOS}
    expected = {"layer_norm", "rms_norm", "cross_entropy", "scaled_dot_product_attention", "gelu", "silu"}
    expected |= {"softmax", "log_softmax", "sigmoid", "tanh"}
    if hasattr(F, "linear_cross_entropy"):
        expected.add("linear_cross_entropy")
    assert names == expected


# A sample with a negative eps has NaN rows, which numpy, under Triton's interpreter, warns about.
# Rows past the last one have no log-sum-exp, and their weights, never used, overflow.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "dtype"), CASES, ids=[f"{name}-{dtype}".replace("torch.", "") for name, dtype in CASES]
)
def test_samples_give_the_same_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    public = name.partition(".")[0]
    ours, theirs = getattr(fk, public), getattr(F, public)
    samples = list(INFOS[name].sample_inputs(DEVICE, dtype, requires_grad=True))
    assert samples
    for sample in samples:
        if public == "scaled_dot_product_attention" and _on_the_kernels(sample):
            _assert_accurate_attention(sample)
            continue
        out, grads = _run(ours, sample)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own about combinations that its chunked path does not take
            expected, expected_grads = _run(theirs, sample)
        if public in LOSSES and dtype == torch.float16:
            # Named difference (a): fp32 losses; PyTorch's rounds to half on the way and in the result.
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, expected.float(), rtol=4e-3, atol=4e-3, equal_nan=True)
        elif public == "log_softmax" and dtype == torch.float16:
            # PyTorch's on a CPU loses digits of fp16 close to 0, where a result has more than the input.
            torch.testing.assert_close(out, expected, rtol=2e-3, atol=1e-3)
        else:
            torch.testing.assert_close(out, expected, equal_nan=True)
        assert len(grads) == len(expected_grads)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad is None) == (expected_grad is None)
            if grad is not None:
                # PyTorch rounds its half-precision log-probabilities before the gradient is formed from them.
                rounded = public in LOSSES and dtype == torch.float16
                tolerance: Any = {"rtol": 1e-2, "atol": 8e-3} if rounded else {}
                if public == "log_softmax" and dtype == torch.float16:
                    tolerance = {"rtol": 2e-3, "atol": 1e-3}
                if public in KERNELS:
                    # Rows of 1 and 2 elements: where the exact gradient is 0, PyTorch's and ours round differently.
                    half = dtype == torch.float16
                    tolerance = {"rtol": 4e-3, "atol": 2e-3} if half else {"rtol": 1e-5, "atol": 3e-5}
                torch.testing.assert_close(grad, expected_grad, equal_nan=True, **tolerance)


def _on_the_kernels(sample: Any) -> bool:
    return fk.explain(fk.scaled_dot_product_attention, sample.input, *sample.args, **sample.kwargs).path == "triton"


def _assert_accurate_attention(sample: Any) -> None:
    """No farther from float64 than twice PyTorch's op and a few digits. Dropout: PyTorch's op on the kept weights.

    Named difference (e): PyTorch draws another mask. Ours is seen with identity values, drawn from the same seed.
    """
    dropout_p = sample.kwargs.get("dropout_p", 0.0)
    q, k, v = sample.input, *sample.args
    options = {name: value for name, value in sample.kwargs.items() if name != "dropout_p"}
    kept = torch.ones(())
    if dropout_p:
        torch.manual_seed(5)
        eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], k.shape[-2])
        # Equal scores, so that no weight vanishes but by the mask.
        kept = fk.scaled_dot_product_attention(torch.zeros_like(q), k, eye, dropout_p=dropout_p, **options) != 0

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fk.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not dropout_p:
            return F.scaled_dot_product_attention(q, k, v, **options)
        eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], k.shape[-2])
        weights = F.scaled_dot_product_attention(q, k, eye, **options)
        return (weights * kept / (1.0 - dropout_p)) @ v

    arguments = {"q": q, "k": k, "v": v}
    upstream = check.upstream_gradients(reference, arguments, 5)
    ours, theirs = (check.results(fn, arguments, upstream) for fn in (fused, reference))
    wide = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    for name, truth in check.results(reference, wide, tuple(u.double() for u in upstream)).items():
        error, usual = ((found[name].double() - truth).abs().max() for found in (ours, theirs))
        # A gradient of 0 is a difference of products of two inputs, each up to 9.
        scale = max(81.0, truth.abs().max().item())
        assert error <= 2 * usual + 16 * torch.finfo(q.dtype).eps * scale, (name, sample.kwargs)


@pytest.mark.parametrize("name", [name for name in sorted(INFOS) if INFOS[name].error_inputs_func is not None])
def test_error_samples_raise_the_same_class(name: str) -> None:
    public = name.partition(".")[0]
    seen = 0
    for error in INFOS[name].error_inputs(DEVICE):
        sample = error.sample_input
        with pytest.raises(Exception) as expected:
            getattr(F, public)(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(Exception) as got:
            getattr(fk, public)(sample.input, *sample.args, **sample.kwargs)
        assert type(got.value) is type(expected.value), error.error_regex
        seen += 1
    assert seen


@pytest.mark.parametrize("public", sorted({name.partition(".")[0] for name in INFOS}))
def test_positional_signature_is_pytorchs(public: str) -> None:
    """Every positional slot of PyTorch's function is ours, in place: extra positional arguments fail in both."""
    import inspect

    ours = inspect.signature(getattr(fk, public)).parameters.values()
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        theirs = inspect.signature(getattr(F, public)).parameters.values()
    except ValueError:  # a builtin: its documentation holds the signature
        builtin = {
            "gelu": ["input"],
            "scaled_dot_product_attention": ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"],
        }
        assert positional == builtin[public]
        return
    assert positional == [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]


def _calls() -> dict[str, Callable[[Any], Tensor]]:
    """One call a function, with our keywords where it has some; `f` is the module that holds the function."""
    torch.manual_seed(0)
    x, weight, head = torch.randn(6, 8), torch.randn(8), torch.randn(5, 8)
    target, q, cos = torch.tensor([0, 1, 4, -100, 2, 3]), torch.randn(2, 2, 6, 8), torch.randn(6, 4)
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    return {
        "layer_norm": lambda f: f.layer_norm(x, (8,), weight),
        "rms_norm": lambda f: f.rms_norm(x, (8,), weight),
        "cross_entropy": lambda f: f.cross_entropy(x, target),
        "cross_entropy, ours": lambda f: f.cross_entropy(x, target, z_loss=0.1, softcap=3.0, num_items=torch.tensor(7)),
        "linear_cross_entropy, ours": lambda f: f.linear_cross_entropy(x, head, target, z_loss=0.1, softcap=3.0),
        "attention": lambda f: f.scaled_dot_product_attention(q, q, q, is_causal=True),
        "attention, masks": lambda f: f.scaled_dot_product_attention(q, q, q, window_size=(2, 0), key_mask=padding),
        "attention, softcap": lambda f: f.scaled_dot_product_attention(q, q, q, softcap=9.0, is_causal=True),
        "rotary_embedding": lambda f: f.rotary_embedding(q, q, cos, cos, qk_norm_eps=1e-6)[0],
        "gelu": lambda f: f.gelu(x, approximate="tanh"),
        "softmax": lambda f: f.softmax(x, -1),
        "swiglu": lambda f: f.swiglu(x, x),
        "relu_squared": lambda f: f.relu_squared(x),
    }


with torch.device(DEVICE):
    CALLS = _calls()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda: CALLS[name](fk), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), CALLS[name](fk))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "cross_entropy", "attention", "gelu", "softmax"])
def test_autocast_gives_pytorchs_dtype(name: str) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = CALLS[name](fk), CALLS[name](F)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_the_explicit_attention_in_fp32() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, 32, 16, device=DEVICE) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = fk.scaled_dot_product_attention(q, k, v, return_lse=True)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    rounded = [t.bfloat16().double() for t in (q, k, v)]
    expected, expected_lse = fk.scaled_dot_product_attention(*rounded, return_lse=True)  # type: ignore[misc]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
    # The kernel's weights, at most 1, enter its second product in bf16.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8 * v.abs().max().item())


# torch.func.jvp loads decompositions that PyTorch itself compiles with what it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_and_vmap_reach_pytorchs_operators() -> None:
    torch.manual_seed(2)
    x, tangent, target = (t.to(DEVICE) for t in (torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])))
    for ours, theirs in (
        (lambda t: fk.cross_entropy(t, target), lambda t: F.cross_entropy(t, target)),
        (lambda t: fk.rms_norm(t, (5,)), lambda t: F.rms_norm(t, (5,))),
        (lambda t: fk.swiglu(t, t), lambda t: F.silu(t) * t),
    ):
        got = torch.func.jvp(ours, (x,), (tangent,))
        for a, b in zip(got, torch.func.jvp(theirs, (x,), (tangent,)), strict=True):
            torch.testing.assert_close(a, b)
    rows = torch.func.vmap(lambda row: fk.rms_norm(row, (5,)))(x)
    torch.testing.assert_close(rows, F.rms_norm(x, (5,)))
