"""Bad calls raise the class that PyTorch raises: at least ten for every function that has an equal in PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn

import fastlm_kernels as fk

pytestmark = pytest.mark.both_paths

Call = Callable[[Callable[..., Any]], Any]


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


EQUALS: dict[str, Callable[..., Any]] = {
    name: getattr(F, name)
    for name in (
        "layer_norm",
        "rms_norm",
        "cross_entropy",
        "scaled_dot_product_attention",
        "gelu",
        "silu",
        "softmax",
        "log_softmax",
        "sigmoid",
        "tanh",
    )
}
EQUALS |= {"relu_squared": _relu_squared, "swiglu": _swiglu, "geglu": _geglu}
# Younger than torch 2.11: there our own definitions stand alone.
if hasattr(F, "linear_cross_entropy"):
    EQUALS["linear_cross_entropy"] = F.linear_cross_entropy
if "enable_gqa" in inspect.signature(torch_varlen_attn).parameters:
    EQUALS["varlen_attn"] = torch_varlen_attn

NORMS: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "no shape": lambda f: f(x(2, 3)),
    "input None": lambda f: f(None, (3,)),
    "input a list": lambda f: f([1.0, 2.0], (2,)),
    "input a string": lambda f: f("x", (3,)),
    "shape does not fit": lambda f: f(x(2, 3), (4,)),
    "shape longer than input": lambda f: f(x(3), (2, 3)),
    "empty shape": lambda f: f(x(2, 3), ()),
    "shape of strings": lambda f: f(x(2, 3), ("3",)),
    "shape of bools": lambda f: f(x(2, 1), (True,)),
    "shape of floats": lambda f: f(x(2, 3), (3.0,)),
    "weight of another size": lambda f: f(x(2, 3), (3,), x(4)),
    "weight a number": lambda f: f(x(2, 3), (3,), 1.0),
    "weight 2-d": lambda f: f(x(2, 3), (3,), x(1, 3)),
    "eps a string": lambda f: f(x(2, 3), (3,), eps="small"),
    "unknown keyword": lambda f: f(x(2, 3), (3,), epsilon=1e-5),
    "integer input": lambda f: f(ids(1, 2, 3), (3,)),
    "too many arguments": lambda f: f(x(2, 3), (3,), x(3), x(3), 1e-5, 1),
}
UNARY: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "None": lambda f: f(None),
    "a number": lambda f: f(1.0),
    "a string": lambda f: f("x"),
    "a list": lambda f: f([1.0, 2.0]),
    "a tuple of tensors": lambda f: f((x(2), x(2))),
    "a dict": lambda f: f({"input": x(2)}),
    "too many arguments": lambda f: f(x(2), True, True, True, True, True),
    "unknown keyword": lambda f: f(x(2), axis=0),
    "given twice": lambda f: f(x(2), input=x(2), x=x(2)),
    "out keyword": lambda f: f(x(2), out=x(2)),
    "a function": lambda f: f(torch.ones),
}
SOFTMAX: dict[str, Call] = UNARY | {
    "dim too large": lambda f: f(x(2, 3), 2),
    "dim too small": lambda f: f(x(2, 3), -3),
    "dim a string": lambda f: f(x(2, 3), "last"),
    "dim a float": lambda f: f(x(2, 3), 1.5),
    "dtype a string": lambda f: f(x(2, 3), 1, dtype="float32"),
    "integer input": lambda f: f(ids(1, 2), 0),
    "no dim is a warning, here an error": lambda f: f(x(2, 3)),
}
GATED: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "one argument": lambda f: f(x(2)),
    "three arguments": lambda f: f(x(2), x(2), x(2)),
    "shapes": lambda f: f(x(2, 3), x(2, 4)),
    "gate None": lambda f: f(None, x(2)),
    "up None": lambda f: f(x(2), None),
    "gate a number": lambda f: f(1.0, x(2)),
    "gate a list": lambda f: f([1.0], x(2)),
    "up a string": lambda f: f(x(2), "x"),
    "gate of integers": lambda f: f(ids(1, 2), x(2)),
    "gate of bools": lambda f: f(x(2, dtype=torch.bool), x(2)),
    "unknown keyword": lambda f: f(x(2), x(2), alpha=1.0),
}
LINEAR: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "no target": lambda f: f(x(2, 3), x(5, 3)),
    "bias positional": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), x(5)),
    "input 0-d": lambda f: f(x(), x(5, 3), ids(0, 1)),
    "input 4-d": lambda f: f(x(1, 1, 2, 3), x(5, 3), ids(0, 1)),
    "weight 1-d": lambda f: f(x(2, 3), x(3), ids(0, 1)),
    "in_features differ": lambda f: f(x(2, 3), x(5, 4), ids(0, 1)),
    "bias of another size": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), linear_bias=x(4)),
    "target too short": lambda f: f(x(2, 3), x(5, 3), ids(0)),
    "target of int32": lambda f: f(x(2, 3), x(5, 3), ids(0, 1).int()),
    "target past the classes": lambda f: f(x(2, 3), x(5, 3), ids(0, 5)),
    "target negative": lambda f: f(x(2, 3), x(5, 3), ids(0, -1)),
    "class weight of another size": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), weight=x(4)),
    "unknown reduction": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), reduction="average"),
    "label smoothing above 1": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), label_smoothing=1.5),
    "probabilities and ignore_index": lambda f: f(x(2, 3), x(5, 3), x(2, 5), ignore_index=0),
    "k-dim weight, unbatched": lambda f: f(x(3), x(5, 2, 3), x(5, 2)),
    "k-dim weight, 3-d input": lambda f: f(x(2, 2, 3), x(5, 2, 3), torch.zeros(2, 2, 2, dtype=torch.long)),
    "mixed dtypes": lambda f: f(x(2, 3), x(5, 3, dtype=torch.float64), ids(0, 1)),
    "ignore_index a float": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), ignore_index=1.5),
    "ignore_index a bool": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), ignore_index=True),
    "ignore_index past int64": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), ignore_index=2**63),
    "ignore_index below int64": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), ignore_index=-(2**63) - 1),
    "options a number": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), options=3),
    "options a dict": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), options={}),
    "uint8, smoothed, weighted": lambda f: f(x(2, 3), x(5, 3), ids(0, 1).byte(), weight=x(5), label_smoothing=0.1),
    "unknown keyword": lambda f: f(x(2, 3), x(5, 3), ids(0, 1), bias=x(5)),
}
CROSS: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "no target": lambda f: f(x(2, 5)),
    "input None": lambda f: f(None, ids(0, 1)),
    "input a list": lambda f: f([[1.0, 2.0]], ids(0)),
    "target a list": lambda f: f(x(2, 5), [0, 1]),
    "input of integers": lambda f: f(x(2, 5).long(), ids(0, 1)),
    "input 0-d": lambda f: f(x(), ids(0)),
    "batch sizes differ": lambda f: f(x(2, 5), ids(0, 1, 2)),
    "target past the classes": lambda f: f(x(2, 5), ids(0, 5)),
    "target negative, not ignored": lambda f: f(x(2, 5), ids(0, -1)),
    "target past the classes, half": lambda f: f(x(2, 5, dtype=torch.float16), ids(0, 5)),
    "target of int32": lambda f: f(x(2, 5), ids(0, 1).int()),
    "target of floats, wrong shape": lambda f: f(x(2, 5), x(2)),
    "probabilities of integers": lambda f: f(x(2, 5), torch.ones(2, 5, dtype=torch.long)),
    "weight of another size": lambda f: f(x(2, 5), ids(0, 1), x(4)),
    "weight of another dtype": lambda f: f(x(2, 5), ids(0, 1), x(5, dtype=torch.float64)),
    "weight of another dtype, half": lambda f: f(x(2, 5, dtype=torch.float16), ids(0, 1), x(5)),
    "weight a list": lambda f: f(x(2, 5), ids(0, 1), [1.0] * 5),
    "unknown reduction": lambda f: f(x(2, 5), ids(0, 1), reduction="average"),
    "ignore_index a float": lambda f: f(x(2, 5), ids(0, 1), ignore_index=0.5),
    "ignore_index a bool": lambda f: f(x(2, 5), ids(0, 1), ignore_index=True),
    "ignore_index past int64": lambda f: f(x(2, 5), ids(0, 1), ignore_index=2**63),
    "ignore_index below int64": lambda f: f(x(2, 5), ids(0, 1), ignore_index=-(2**63) - 1),
    "uint8, smoothed, weighted": lambda f: f(x(2, 5), ids(0, 1).byte(), x(5), label_smoothing=0.1),
    "label smoothing above 1": lambda f: f(x(2, 5), ids(0, 1), label_smoothing=1.1),
    "size_average warns, here an error": lambda f: f(x(2, 5), ids(0, 1), None, True),
    "unknown keyword": lambda f: f(x(2, 5), ids(0, 1), smoothing=0.1),
    "too many arguments": lambda f: f(x(2, 5), ids(0, 1), None, None, -100, None, "mean", 0.0, 0.0),
}
ATTENTION: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "no value": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4)),
    "query None": lambda f: f(None, x(1, 1, 2, 4), x(1, 1, 2, 4)),
    "query a list": lambda f: f([1.0], x(1, 1, 2, 4), x(1, 1, 2, 4)),
    "query 1-d": lambda f: f(x(4), x(4), x(4)),
    "head dims differ": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 5), x(1, 1, 2, 5)),
    "batches differ": lambda f: f(x(2, 1, 2, 4), x(3, 1, 2, 4), x(3, 1, 2, 4)),
    "dtypes differ": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4).half(), x(1, 1, 2, 4)),
    "mask of another shape": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), x(3, 3)),
    "mask of integers": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), torch.ones(2, 2, dtype=torch.long)),
    "mask a list": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), [[1.0]]),
    "scale positional": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), None, 0.0, False, 1.0),
    "scale a string": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), scale="1"),
    "dropout above 1": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), dropout_p=1.5),
    "heads differ without gqa": lambda f: f(x(1, 4, 2, 4), x(1, 2, 2, 4), x(1, 2, 2, 4)),
    "heads do not divide": lambda f: f(x(1, 3, 2, 4), x(1, 2, 2, 4), x(1, 2, 2, 4), enable_gqa=True),
    "unknown keyword": lambda f: f(x(1, 1, 2, 4), x(1, 1, 2, 4), x(1, 1, 2, 4), causal=True),
}
# PyTorch's varlen_attn runs on GPUs alone; these calls fail before it comes to the device.
VARLEN: dict[str, Call] = {
    "no arguments": lambda f: f(),
    "no lengths": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8)),
    "no longest lengths": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4)),
    "query None": lambda f: f(None, x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4),
    "query a list": lambda f: f([1.0], x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4),
    "query 1-d": lambda f: f(x(4), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4),
    "key 1-d": lambda f: f(x(4, 1, 8), x(4), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4),
    "heads differ without gqa": lambda f: f(x(4, 2, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4),
    "heads do not divide": lambda f: f(x(4, 3, 8), x(4, 2, 8), x(4, 2, 8), ids(0, 4), ids(0, 4), 4, 4, enable_gqa=True),
    "window of three": lambda f: f(
        x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4).int(), ids(0, 4).int(), 4, 4, window_size=(1, 2, 3)
    ),
    "window a number": lambda f: f(
        x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4).int(), ids(0, 4).int(), 4, 4, window_size=3
    ),
    "starts in a list": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), [0, 4], ids(0, 4).int(), 4, 4),
    "longest length None": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), None, 4),
    "longest length a float": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4.0),
    "scale positional": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4, None, 1.0),
    "unknown keyword": lambda f: f(x(4, 1, 8), x(4, 1, 8), x(4, 1, 8), ids(0, 4), ids(0, 4), 4, 4, causal=True),
}
BAD_CALLS: dict[str, dict[str, Call]] = {
    "layer_norm": NORMS,
    "rms_norm": {name: call for name, call in NORMS.items() if name != "too many arguments"},
    "cross_entropy": CROSS,
    "linear_cross_entropy": LINEAR,
    "scaled_dot_product_attention": ATTENTION,
    "varlen_attn": VARLEN,
    "gelu": {name: call for name, call in UNARY.items() if name != "out keyword"}
    | {
        "approximate positional": lambda f: f(x(2), "tanh"),
        "approximate unknown": lambda f: f(x(2), approximate="fast"),
        "approximate a bool": lambda f: f(x(2), approximate=True),
        "out a number": lambda f: f(x(2), out=1.0),
        "integer input": lambda f: f(ids(1, 2)),
    },
    "silu": UNARY | {"integer input": lambda f: f(ids(1, 2)), "inplace integers": lambda f: f(ids(1, 2), True)},
    "softmax": SOFTMAX,
    "log_softmax": SOFTMAX,
    "sigmoid": UNARY,
    "tanh": UNARY,
    "relu_squared": UNARY,
    "swiglu": GATED,
    "geglu": GATED
    | {
        "approximate unknown": lambda f: f(x(2), x(2), approximate="fast"),
        "approximate positional": lambda f: f(x(2), x(2), "tanh"),
    },
}
TABLE = [(name, title) for name in EQUALS for title in BAD_CALLS[name]]


def _raised(call: Call, function: Callable[..., Any]) -> type[BaseException] | None:
    try:
        call(function)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("name", EQUALS)
def test_at_least_ten_bad_calls(name: str) -> None:
    assert len(BAD_CALLS[name]) >= 10


@pytest.mark.parametrize(("name", "title"), TABLE, ids=[f"{name}-{title}" for name, title in TABLE])
def test_bad_call_raises_pytorchs_class(name: str, title: str) -> None:
    call = BAD_CALLS[name][title]
    expected = _raised(call, EQUALS[name])
    assert expected is not None, "PyTorch accepts this call: it does not belong into the table"
    assert _raised(call, getattr(fk, name)) is expected
