"""Every kernel, once. Tests, benches, `check`, `aot` and the README's table iterate over `KERNELS`.

Adding a kernel is one file and one entry here. Every case names rows and columns, whatever these are to the family
(tokens and classes, positions and head dimension); all other options have defaults, so that the tests of what holds for
every kernel can ask any of them for a size.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation, attention, configs, norm, rotary
from .cross_entropy import cross_entropy, cross_entropy_reference
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .softmax import log_softmax, softmax

Case = dict[str, Any]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One public function with everything needed to test and time it.

    fused      the public function
    reference  the same signature in plain PyTorch: CPU path, truth (in fp64) and baseline
    inputs     (dtype, device, seed or generator, **case) -> arguments by parameter name, the differentiable ones
               requiring grad
    small      cases for tests: odd lengths, views, every branch of the kernel
    quick      cases of moderate size: benches on a CPU; the last is what the quick ahead-of-time report compiles
    large      cases for benches on a GPU
    compiled   cases that reach every shipped configuration: the full ahead-of-time report
    traffic    (case, dtype, backward) -> bytes that must move
    flops      (case, backward) -> floating-point operations
    realigns   the launcher copies what does not lie on 16-byte boundaries: no kernel reads such tensors
    """

    fused: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Arguments]
    small: tuple[Case, ...]
    quick: tuple[Case, ...]
    large: tuple[Case, ...]
    compiled: tuple[Case, ...]
    traffic: Callable[[Case, torch.dtype, bool], int]
    flops: Callable[[Case, bool], int]
    realigns: bool = False

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.fused.__name__

    @property
    def modules(self) -> list[ModuleType]:
        """Where its kernels stand: the public function's module, and those in its folder if it is a package."""
        own = sys.modules[self.fused.__module__]
        inside = pkgutil.iter_modules(getattr(own, "__path__", ()), f"{own.__name__}.")
        return [own, *(importlib.import_module(module.name) for module in inside)]


def case_name(case: Case) -> str:
    """A test's or benchmark's name made from its values: "rows3-columns100-weight"."""
    return "-".join(
        key if value is True else f"{key}{str(value).removeprefix('torch.')}"
        for key, value in case.items()
        if value is not False
    )


def random_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """Normal numbers requiring grad, drawn where the generator lives; on "meta" the shape alone.

    A CPU generator's are drawn in fp64, the same for every device and dtype; a GPU's in `dtype`, as large tensors need.
    """
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    drawn = torch.float64 if generator.device.type == "cpu" else dtype
    values = torch.randn(shape, generator=generator, dtype=drawn, device=generator.device)
    return values.mul_(scale).add_(shift).to(device=device, dtype=dtype).requires_grad_()


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator from a seed; a generator as it is."""
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


# rows x columns: one, odd and even lengths, several tiles a program, and rows too long for registers.
_SMALL_SIZES = ((1, 1), (3, 5), (70, 64), (9, 100), (5, 768), (2, 1023), (11, 2048), (2, 8300))
_LARGE_SIZES = tuple(
    (rows, columns) for rows in (1, 128, 8192, 65536) for columns in (256, 768, 1024, 2048, 4096, 8192)
)
_QUICK = ({"rows": 128, "columns": 256}, {"rows": 128, "columns": 768})
_LARGE = tuple({"rows": rows, "columns": columns} for rows, columns in _LARGE_SIZES)
_OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def _small(*extra: Case) -> tuple[Case, ...]:
    sizes = tuple({"rows": rows, "columns": columns} for rows, columns in _SMALL_SIZES)
    return sizes + tuple({"rows": 6, "columns": 130, **case} for case in extra)


def _norm_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    residual: bool = False,
    bias: bool = False,
    weight: bool = True,
    mixed: bool = False,
    eps: float = 1e-5,
) -> Arguments:
    """Arguments of the norms; `mixed` gives the parameters another dtype.

    The input's mean is far from 0 against its spread: a variance without the mean subtracted, or one lost to
    cancellation, shows.
    """
    g = generator_of(seed)
    other = _OTHER[dtype] if mixed else dtype
    arguments: Arguments = {"input": random_tensor((rows, columns), dtype, device, g, scale=0.7, shift=1.5)}
    if residual:
        arguments["residual"] = random_tensor((rows, columns), other, device, g, scale=2.0, shift=-0.5)
    arguments["normalized_shape"] = (columns,)
    arguments["weight"] = random_tensor((columns,), other, device, g, shift=0.3) if weight else None
    if bias:
        arguments["bias"] = random_tensor((columns,), other, device, g) if weight else None
    return {**arguments, "eps": eps}


def _norm_traffic(residual: bool) -> Callable[[Case, torch.dtype, bool], int]:
    def traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
        # Forward: x in, y out; x, r in, h, y out. Backward: x, dy in, dx out; h, dy, dh in, dx out.
        passes = 4 if residual else (3 if backward else 2)
        return case["rows"] * case["columns"] * passes * dtype.itemsize

    return traffic


def _norm_flops(per_element: int) -> Callable[[Case, bool], int]:
    def flops(case: Case, backward: bool) -> int:
        return math.prod((case["rows"], case["columns"], per_element, 2 if backward else 1))

    return flops


def _layer_norm_inputs(*args: Any, **case: Any) -> Arguments:
    return _norm_inputs(*args, bias=True, **case)


def _add_rms_norm_inputs(*args: Any, **case: Any) -> Arguments:
    return _norm_inputs(*args, residual=True, **case)


def _add_layer_norm_inputs(*args: Any, **case: Any) -> Arguments:
    return _norm_inputs(*args, residual=True, bias=True, **case)


_NORM_CASES = _small({"weight": False}, {"mixed": True}, {"eps": 0.1})
# One row length for each tile of the tables, and one past the last, which is walked in blocks.
_NORM_TILES = tuple(config.block_n for config in configs.NORM_FORWARD["generic"])
_NORM_COMPILED = (
    *({"rows": 4096, "columns": columns} for columns in (*_NORM_TILES, 2 * _NORM_TILES[-1])),
    # Two dtypes need the most registers, which are scarce in the widest tiles.
    *({"rows": 4096, "columns": columns, "mixed": True} for columns in _NORM_TILES[-3:]),
)


def _rotary_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    head_dim_axis: int = 1,
    apart: bool = False,
    plain: bool = False,
    unweighted: bool = False,
    mixed: bool = False,
    eps: float = 1e-5,
    weight_offset: float = 0.5,
    full_tables: bool = False,
    batched_tables: bool = False,
    table_dtype: torch.dtype | None = None,
) -> Arguments:
    """Arguments of rotary_embedding: `rows` positions of heads of `columns` channels.

    q and k are views of one projection, (batch, rows, heads, columns) in memory, or two tensors `apart`; `plain` is
    without the norm; `mixed` gives the weights another dtype. The tables are no cosines: a kernel that took one for
    another, or a channel for its partner, shows.
    """
    g = generator_of(seed)
    rotated = columns - columns % 2 if rotary_dim is None else rotary_dim
    shape = (batch, rows, heads + kv_heads, columns)
    both = random_tensor(shape, dtype, device, g, shift=0.5).detach()
    both = both.transpose(1, 2) if head_dim_axis == 1 else both
    parts = both.split([heads, kv_heads], head_dim_axis)
    q, k = ((x.contiguous() if apart else x).detach().requires_grad_() for x in parts)
    tables = ((batch,) if batched_tables else ()) + (rows, rotated if full_tables else rotated // 2)
    cos, sin = (random_tensor(tables, table_dtype or torch.float32, device, g).detach() for _ in range(2))
    if dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    arguments: Arguments = {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": interleaved}
    arguments |= {"head_dim_axis": head_dim_axis, "rotary_dim": rotated}
    if not plain:
        arguments["qk_norm_eps"] = eps
    if not (plain or unweighted):
        other = _OTHER[dtype] if mixed else dtype
        weight_q, weight_k = (random_tensor((columns,), other, device, g, shift=0.3) for _ in range(2))
        arguments |= {"q_weight": weight_q, "k_weight": weight_k, "weight_offset": weight_offset}
    return arguments


def _rotary_elements(case: Case) -> int:
    heads = case.get("heads", 2) + case.get("kv_heads", 1)
    return math.prod((case.get("batch", 1), case["rows"], heads, case["columns"]))


def _rotary_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x in, y out. Backward: dy in, dx out, and x in where it was normed. Both: cos and sin once.
    passes = 3 if backward and not case.get("plain") else 2
    rotated = case.get("rotary_dim") or case["columns"]
    positions = case["rows"] * (case.get("batch", 1) if case.get("batched_tables") else 1)
    table = positions * rotated * (2 if case.get("full_tables") else 1)
    return _rotary_elements(case) * passes * dtype.itemsize + table * case.get("table_dtype", torch.float32).itemsize


def _rotary_flops(case: Case, backward: bool) -> int:
    # A rotation is 3 a channel; the norm 4 more, its backward 9.
    norm = 0 if case.get("plain") else (9 if backward else 4)
    return _rotary_elements(case) * (3 + norm)


_ROTARY_SMALL: tuple[Case, ...] = (
    {"rows": 1, "columns": 2},
    {"rows": 5, "columns": 12, "batch": 2, "heads": 3},
    {"rows": 37, "columns": 64, "batch": 2},
    {"rows": 3, "columns": 80, "unweighted": True},
    {"rows": 9, "columns": 40, "plain": True},
    {"rows": 4, "columns": 256, "apart": True},
    {"rows": 7, "columns": 24, "rotary_dim": 10, "heads": 2, "kv_heads": 2, "batch": 2, "batched_tables": True},
    {"rows": 7, "columns": 24, "rotary_dim": 8, "plain": True, "full_tables": True, "table_dtype": torch.bfloat16},
    {
        "rows": 6,
        "columns": 20,
        "interleaved": True,
        "full_tables": True,
        "batch": 2,
        "batched_tables": True,
        "eps": 0.1,
    },
    {"rows": 6, "columns": 20, "interleaved": True, "rotary_dim": 12, "head_dim_axis": 2, "mixed": True},
    {"rows": 6, "columns": 20, "interleaved": True, "plain": True, "heads": 1, "batch": 2},
    {"rows": 5, "columns": 16, "full_tables": True, "head_dim_axis": 2, "apart": True, "batch": 3, "heads": 1},
)
_ROTARY_QUICK: tuple[Case, ...] = ({"rows": 128, "columns": 128, "plain": True}, {"rows": 128, "columns": 64})
# 32k tokens: 12 heads of 64 as in the 124M class, 32 over 8 of 128 as in larger ones; and one token a sequence.
_ROTARY_SHAPES = (
    *(
        {"rows": rows, "columns": columns, "batch": 32768 // rows, "heads": heads, "kv_heads": kv_heads}
        for rows in (1024, 4096, 16384)
        for columns, heads, kv_heads in ((64, 12, 12), (128, 32, 8))
    ),
    {"rows": 1, "columns": 128, "batch": 32, "heads": 32, "kv_heads": 8},
)
_ROTARY_LARGE: tuple[Case, ...] = tuple(
    {**shape, **norm} for shape in _ROTARY_SHAPES for norm in ({"unweighted": True}, {"plain": True}, {})
)
# Each tile; at the common widths each switch too.
_ROTARY_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": config.block_n} for config in configs.ROTARY["generic"][:-1]),
    {"rows": 4096, "columns": 1024, "rotary_dim": 514},
    *({"rows": 4096, "columns": columns, "unweighted": True} for columns in (40, 64, 80, 96, 128, 160, 192)),
    *(
        {"rows": 4096, "columns": columns, **switches}
        for columns in (64, 128)
        for switches in (
            {"plain": True},
            {"plain": True, "interleaved": True},
            {"plain": True, "full_tables": True},
            {"interleaved": True},
            {"rotary_dim": columns // 2},
            {"rotary_dim": columns // 2, "interleaved": True},
            {"full_tables": True, "table_dtype": torch.bfloat16},
            {"full_tables": True, "interleaved": True},
            {"mixed": True},
        )
    ),
)


def _with_extremes(values: Tensor) -> Tensor:
    """The same with exact zeros, numbers close to it and numbers far out among them, requiring grad."""
    flat = values.detach().view(-1)
    for start, value in ((2, 0.0), (4, 20.0), (7, -20.0), (9, 1e-3)):
        flat[start::11] = value
    return flat.view(values.shape).requires_grad_()


def _activation_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    names: tuple[str, ...] = ("input",),
    bf16_bound: float = 20.0,
    halves: bool = False,
    approximate: str | None = None,
) -> Arguments:
    """Arguments called `names` of the activations; in `halves` they are parts of tensors with rows twice as long.

    bf16_bound  no larger number in bf16: Triton's interpreter cuts results off there instead of rounding them, which
                for an output close to 1 is more than all that is left of the derivative
    """
    g = generator_of(seed)
    drawn = [random_tensor((rows, columns), dtype, device, g, scale=2.0) for _ in names]
    drawn = [_with_extremes(values) for values in drawn]
    if dtype == torch.bfloat16:
        drawn = [values.detach().clamp_(-bf16_bound, bf16_bound).requires_grad_() for values in drawn]
    if halves:
        wide = torch.cat([values.detach() for values in (drawn * 2)[:2]], dim=1)
        drawn = [part.requires_grad_() for part in wide.detach().chunk(2, 1)[: len(names)]]
    arguments: Arguments = dict(zip(names, drawn, strict=True))
    return arguments if approximate is None else {**arguments, "approximate": approximate}


def _elementwise_traffic(passes: int) -> Callable[[Case, torch.dtype, bool], int]:
    def traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
        # One tensor: x in, y out; x, dy in, dx out. Two: g, u in, y out; g, u, dy in, dg, du out.
        tensors = passes + (passes - 1 if backward else 0)
        return case["rows"] * case["columns"] * tensors * dtype.itemsize

    return traffic


_ACTIVATION_CASES: tuple[Case, ...] = (
    {"rows": 1, "columns": 1},
    {"rows": 3, "columns": 5},
    {"rows": 11, "columns": 1023},
    {"rows": 9, "columns": 96, "halves": True},
)
_ACTIVATION_COMPILED: tuple[Case, ...] = (
    {"rows": 4096, "columns": 1024},
    {"rows": 4096, "columns": 768, "halves": True},
    {"rows": 4096, "columns": 2048, "halves": True},
)
_GELU_FORMS: tuple[Case, ...] = ({"approximate": "tanh"},)


def _activation(
    fused: Callable[..., Any], reference: Callable[..., Any], flops: int, options: tuple[Case, ...] = (), **fixed: Any
) -> Kernel:
    passes = 1 + len(fixed.get("names", ("input",)))
    return Kernel(
        fused,
        reference,
        partial(_activation_inputs, **fixed),
        _ACTIVATION_CASES + tuple({"rows": 6, "columns": 130, **case} for case in options),
        _QUICK,
        _LARGE,
        _ACTIVATION_COMPILED + tuple({"rows": 4096, "columns": 1024, **case} for case in options),
        _elementwise_traffic(passes),
        _norm_flops(flops),
    )


_ACTIVATIONS = (
    _activation(activation.gelu, F.gelu, 26, _GELU_FORMS),
    _activation(activation.silu, F.silu, 4),
    # Beyond these bf16 holds no number between the output and 1.
    _activation(activation.sigmoid, F.sigmoid, 3, bf16_bound=5.0),
    _activation(activation.tanh, F.tanh, 14, bf16_bound=2.5),
    _activation(activation.relu_squared, activation.relu_squared_reference, 2, names=("x",)),
    _activation(activation.swiglu, activation.swiglu_reference, 5, names=("gate", "up")),
    _activation(activation.geglu, activation.geglu_reference, 27, _GELU_FORMS, names=("gate", "up")),
)


def _softmax_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    masked: bool = False,
    out: torch.dtype | None = None,
) -> Arguments:
    """Arguments of the softmaxes; `masked` rows begin with -inf, `out` is the result's dtype."""
    x = _with_extremes(random_tensor((rows, columns), dtype, device, generator_of(seed), scale=3.0))
    if dtype == torch.bfloat16:
        # As in _activation_inputs: an output that takes nearly the whole row.
        x.detach().clamp_(-20.0, 4.0)
    if masked:
        x.detach()[:, : columns // 2] = -math.inf
    return {"input": x, "dim": -1, "dtype": out}


def _softmax_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x in, y out. Backward: y, dy in, dx out.
    out = case.get("out", dtype).itemsize
    return case["rows"] * case["columns"] * (dtype.itemsize + (2 if backward else 1) * out)


_SOFTMAX_TILES = tuple(config.block_n for config in configs.SOFTMAX_FORWARD["generic"])
_SOFTMAX_COMPILED = (
    *({"rows": 4096, "columns": columns} for columns in (*_SOFTMAX_TILES, 2 * _SOFTMAX_TILES[-1])),
    *({"rows": 4096, "columns": columns, "out": torch.float32} for columns in (1024, _SOFTMAX_TILES[-1])),
)
# Attention scores and vocabularies.
_SOFTMAX_LONG = tuple({"rows": 4096, "columns": columns} for columns in (16384, 50304, 128256, 262144))


def _cross_entropy_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    weight: bool = False,
    **options: Any,
) -> Arguments:
    """Arguments of cross_entropy: `rows` tokens, `columns` classes; options by the function's own names.

    Every third token is confident, as most are late in training; one in five is ignored, never the first.
    """
    g = generator_of(seed)
    x = random_tensor((rows, columns), dtype, device, g, scale=3.0)
    if torch.device(device).type == "meta":
        target = torch.empty(rows, dtype=torch.int64, device=device)
    else:
        target = torch.randint(columns, (rows,), generator=g, device=g.device).to(device)
        peaks = x.detach()[::3]
        peaks.scatter_(1, target[::3, None], 9.0)
        target[1::5] = -100
    weights = random_tensor((columns,), dtype, device, g).detach().abs() + 0.1 if weight else None
    return {"input": x, "target": target, "weight": weights, **options}


def _cross_entropy_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: logits in. Backward: logits in, their gradient out. Ignored rows are not counted as saved.
    return case["rows"] * case["columns"] * (2 if backward else 1) * dtype.itemsize


# Multiply-add, power, sum; multiply-adds and power, twice.
_cross_entropy_flops = _norm_flops(4)
_CROSS_ENTROPY_OPTIONS: tuple[Case, ...] = (
    {"weight": True},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"weight": True, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "num_items": 3},
    {"z_loss": 0.1, "reduction": "none"},
    {"reduction": "sum"},
)
_CROSS_ENTROPY_LARGE: tuple[Case, ...] = (
    *({"rows": rows, "columns": columns} for rows in (1, 128, 8192) for columns in (50304, 128256, 262144)),
    {"rows": 65536, "columns": 50304},
    *({"rows": 65536, "columns": columns} for columns in (256, 1024, 8192)),
)
_CROSS_ENTROPY_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": config.block_n} for config in configs.CROSS_ENTROPY["generic"]),
    {"rows": 65536, "columns": 50304},
    {"rows": 4096, "columns": 50257},
    *({"rows": 4096, "columns": columns, **options} for columns in (1024, 50304) for options in _CROSS_ENTROPY_OPTIONS),
)


def _linear_cross_entropy_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    classes: int = 40,
    bias: bool = False,
    weight: bool = False,
    **options: Any,
) -> Arguments:
    """Hidden states (rows, columns) and a head of `classes`; one token in seven is ignored, the first one never."""
    g = generator_of(seed)
    arguments: Arguments = {"input": random_tensor((rows, columns), dtype, device, g)}
    scale = 2.0 / math.sqrt(max(columns, 1))
    arguments["linear_weight"] = random_tensor((classes, columns), dtype, device, g, scale)
    arguments["target"] = torch.empty(rows, dtype=torch.int64, device=device)
    if torch.device(device).type != "meta":
        target = torch.randint(classes, (rows,), generator=g, device=g.device)
        arguments["target"] = target.masked_fill_(torch.arange(rows, device=g.device) % 7 == 5, -100).to(device)
    if bias:
        arguments["linear_bias"] = random_tensor((classes,), dtype, device, g)
    if weight:
        arguments["weight"] = random_tensor((classes,), dtype, device, g).detach().abs_().add_(0.2)
    return {**arguments, **options}


def _linear_cross_entropy_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x and W in. Backward: their gradients out. The logits need not leave the chip.
    return (case["rows"] + case.get("classes", 40)) * case["columns"] * dtype.itemsize


def _linear_cross_entropy_flops(case: Case, backward: bool) -> int:
    return (4 if backward else 2) * case["rows"] * case.get("classes", 40) * case["columns"]


_EVERY_TERM = {"bias": True, "weight": True, "label_smoothing": 0.1, "z_loss": 0.05, "softcap": 4.0}
_LINEAR_CROSS_ENTROPY_CASES = (
    {"rows": 1, "columns": 2, "classes": 2},
    {"rows": 7, "columns": 24, "classes": 100},
    {"rows": 33, "columns": 17, "reduction": "sum", "num_items": 23},
    {"rows": 12, "columns": 16, "reduction": "none", "bias": True},
    {"rows": 9, "columns": 12, **_EVERY_TERM},
    {"rows": 9, "columns": 12, "reduction": "none", **_EVERY_TERM},
)
_LINEAR_CROSS_ENTROPY_LARGE = (
    *(
        {"rows": rows, "columns": columns, "classes": classes}
        for rows in (8192, 65536)
        for columns in (768, 2048, 4096)
        for classes in (50304, 128256)
    ),
    # In chunks, and by blocks of classes. Of 64k tokens PyTorch would hold 206 GB of logits: in 16 bits, in 32 twice.
    *({"rows": 8192, "columns": columns, "classes": 262144} for columns in (2048, 4096)),
)
_LINEAR_CROSS_ENTROPY_COMPILED = tuple(
    {"rows": 512, "columns": 768, "classes": 50304, "reduction": reduction, **terms}
    for reduction in ("mean", "none")
    for terms in ({}, _EVERY_TERM)
)


def _attention_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int | torch.Generator,
    *,
    rows: int,
    columns: int,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    keys: int | None = None,
    values: int | None = None,
    causal: bool = True,
    align: str = "top_left",
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    scale: float | None = None,
    padded: bool = False,
    masked: tuple[int, ...] | None = None,
    lse: bool = False,
    one_pass: bool = False,
) -> Arguments:
    """Arguments of scaled_dot_product_attention: `rows` queries of heads of `columns` channels, `keys` keys.

    Tensors are (batch, positions, heads, channels) in memory. `padded` gives a key_mask; `masked` names the axes over
    which a bool mask is broadcast, and its first query sees nothing. `one_pass` gives deterministic=False.
    """
    g = generator_of(seed)
    S = rows if keys is None else keys

    def heads_of(count: int, length: int, channels: int) -> Tensor:
        memory = random_tensor((batch, length, count, channels), dtype, device, g, scale=1.2, shift=0.2)
        return memory.detach().transpose(1, 2).requires_grad_()

    arguments: Arguments = {
        "query": heads_of(heads, rows, columns),
        "key": heads_of(kv_heads, S, columns),
        "value": heads_of(kv_heads, S, values or columns),
        "is_causal": causal,
        "enable_gqa": heads != kv_heads,
    }
    options = {"causal_align": align, "window_size": window, "softcap": softcap, "scale": scale, "return_lse": lse}
    off = {"causal_align": "top_left", "window_size": (-1, -1), "return_lse": False}
    arguments |= {name: value for name, value in options.items() if value != off.get(name)}
    if one_pass:
        arguments["deterministic"] = False
    # Two keys stay visible: of one alone the gradient of a query is 0, which PyTorch misses by its rounding too.
    if padded:
        arguments["key_mask"] = _random_mask((batch, S), device, g)
    if masked is not None:
        shape = [batch, heads, rows, S]
        mask = _random_mask(tuple(1 if axis in masked else size for axis, size in enumerate(shape)), device, g)
        mask[..., :1, :] &= 2 in masked
        arguments["attn_mask"] = mask
    return arguments


def _random_mask(shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator) -> Tensor:
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=torch.bool, device=device)
    mask = torch.rand(shape, generator=generator, device=generator.device) < 0.7
    mask[..., :2] = True
    return mask.to(device)


def _attention_pairs(case: Case) -> int:
    """How many (query, key) pairs the positions of one head leave visible."""
    rows, keys = case["rows"], case.get("keys") or case["rows"]
    left, right = case.get("window", (-1, -1))
    right = 0 if case.get("causal", True) else right
    shift = keys - rows if case.get("align") == "bottom_right" else 0
    pairs = 0
    for at in range(shift, shift + rows):
        first = 0 if left < 0 else max(0, at - left)
        stop = keys if right < 0 else min(keys, at + right + 1)
        pairs += max(0, stop - first)
    return pairs


def _attention_traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: q, k, v in, out out. Backward: those and the upstream gradient in, dq, dk, dv out.
    D, E = case["columns"], case.get("values") or case["columns"]
    rows, keys = case["rows"], case.get("keys") or case["rows"]
    queries = rows * case.get("heads", 2)
    key_rows = keys * case.get("kv_heads", 1)
    elements = queries * (D + E) + key_rows * (D + E)
    if backward:
        elements = queries * 2 * (D + E) + key_rows * 2 * (D + E)
    return case.get("batch", 1) * elements * dtype.itemsize


def _attention_flops(case: Case, backward: bool) -> int:
    # Two products forward; backward five, of which three are over the channels of queries and keys.
    D, E = case["columns"], case.get("values") or case["columns"]
    products = 3 * D + 2 * E if backward else D + E
    return 2 * products * case.get("batch", 1) * case.get("heads", 2) * _attention_pairs(case)


_ATTENTION_SMALL: tuple[Case, ...] = (
    {"rows": 1, "columns": 8},
    {"rows": 37, "columns": 16, "batch": 2, "heads": 4, "kv_heads": 2},
    {"rows": 70, "columns": 64, "heads": 1, "causal": False},
    {"rows": 33, "columns": 40, "values": 24, "keys": 50, "heads": 1, "window": (7, 3), "causal": False},
    {"rows": 20, "columns": 16, "keys": 70, "align": "bottom_right", "window": (40, -1), "lse": True},
    {"rows": 40, "columns": 16, "keys": 20, "align": "bottom_right"},
    {"rows": 33, "columns": 16, "heads": 2, "lse": True},
    {"rows": 33, "columns": 16, "heads": 2, "lse": True, "one_pass": True},
    {"rows": 19, "columns": 20, "keys": 40, "softcap": 3.0, "padded": True, "batch": 2, "causal": False},
    {"rows": 33, "columns": 16, "keys": 67, "masked": (), "batch": 2, "causal": False, "scale": 0.4},
    {"rows": 33, "columns": 16, "keys": 67, "masked": (0, 1), "window": (-1, 40), "causal": False, "softcap": 2.0},
    {"rows": 2, "columns": 16, "keys": 300, "heads": 4, "align": "bottom_right", "lse": True},
    {"rows": 9, "columns": 160, "heads": 1, "keys": 34, "masked": (1, 2), "padded": True, "causal": False},
    {"rows": 67, "columns": 24, "keys": 131, "heads": 4, "kv_heads": 2, "align": "bottom_right", "one_pass": True},
)
_ATTENTION_QUICK: tuple[Case, ...] = (
    {"rows": 64, "columns": 64, "heads": 2, "kv_heads": 2},
    {"rows": 128, "columns": 64, "heads": 4, "kv_heads": 4},
)
# 16k tokens of a model of width 2048; then one case a feature, and one token a sequence against a long cache.
_ATTENTION_16K: Case = {"rows": 4096, "columns": 128, "batch": 4, "heads": 16, "kv_heads": 16}
_ATTENTION_LARGE: tuple[Case, ...] = (
    *(
        {
            "rows": rows,
            "columns": columns,
            "batch": 16384 // rows,
            "heads": 2048 // columns,
            "kv_heads": 2048 // columns,
            "causal": causal,
        }
        for causal in (True, False)
        for columns in (64, 128)
        for rows in (1024, 2048, 4096, 8192, 16384)
    ),
    *(
        _ATTENTION_16K | feature
        for feature in (
            {"kv_heads": 4},
            {"window": (1023, -1)},
            {"softcap": 30.0},
            {"padded": True, "causal": False},
            {"masked": (0, 1), "causal": False},
            {"lse": True},
            {"one_pass": True},
            {"one_pass": True, "columns": 64, "heads": 32, "kv_heads": 32},
            {"columns": 80},
            {"columns": 256, "heads": 8, "kv_heads": 8},
        )
    ),
    {"rows": 1, "columns": 128, "batch": 8, "heads": 32, "kv_heads": 8, "keys": 32768, "causal": False},
)
_ATTENTION_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": columns, "kv_heads": 2} for columns in (16, 32, 64, 80, 96, 128, 192, 256)),
    *(
        {"rows": 4096, "columns": columns, "kv_heads": 2, **switches}
        for columns in (64, 128)
        for switches in (
            {"causal": False},
            {"window": (1023, -1)},
            {"softcap": 30.0},
            {"padded": True, "causal": False},
            {"masked": (0, 1), "causal": False},
        )
    ),
    *({"rows": 4096, "columns": columns, "kv_heads": 2, "one_pass": True} for columns in (64, 128)),
    *(
        {"rows": 4096, "columns": columns, "kv_heads": 2, "one_pass": True, **switches}
        for columns in (64, 128)
        for switches in (
            {"window": (1023, -1)},
            {"softcap": 30.0},
            {"padded": True, "causal": False},
            {"masked": (0, 1), "causal": False},
        )
    ),
    {"rows": 1, "columns": 128, "heads": 8, "kv_heads": 2, "keys": 32768, "causal": False},
)


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        norm.rms_norm,
        norm.rms_norm_reference,
        _norm_inputs,
        _NORM_CASES,
        _QUICK,
        _LARGE,
        _NORM_COMPILED,
        _norm_traffic(residual=False),
        _norm_flops(4),
    ),
    Kernel(
        norm.add_rms_norm,
        norm.add_rms_norm_reference,
        _add_rms_norm_inputs,
        _NORM_CASES,
        _QUICK,
        _LARGE,
        _NORM_COMPILED,
        _norm_traffic(residual=True),
        _norm_flops(5),
    ),
    Kernel(
        norm.layer_norm,
        norm.layer_norm_reference,
        _layer_norm_inputs,
        _NORM_CASES,
        _QUICK,
        _LARGE,
        _NORM_COMPILED,
        _norm_traffic(residual=False),
        _norm_flops(7),
    ),
    Kernel(
        norm.add_layer_norm,
        norm.add_layer_norm_reference,
        _add_layer_norm_inputs,
        _NORM_CASES,
        _QUICK,
        _LARGE,
        _NORM_COMPILED,
        _norm_traffic(residual=True),
        _norm_flops(8),
    ),
    Kernel(
        rotary.rotary_embedding,
        rotary.rotary_embedding_reference,
        _rotary_inputs,
        _ROTARY_SMALL,
        _ROTARY_QUICK,
        _ROTARY_LARGE,
        _ROTARY_COMPILED,
        _rotary_traffic,
        _rotary_flops,
    ),
    *_ACTIVATIONS,
    Kernel(
        softmax,
        F.softmax,
        _softmax_inputs,
        _small({"masked": True}, {"out": torch.float32}),
        _QUICK,
        _LARGE + _SOFTMAX_LONG,
        _SOFTMAX_COMPILED,
        _softmax_traffic,
        _norm_flops(5),
    ),
    Kernel(
        log_softmax,
        F.log_softmax,
        _softmax_inputs,
        _small({"out": torch.float32}),
        _QUICK,
        _LARGE + _SOFTMAX_LONG,
        _SOFTMAX_COMPILED,
        _softmax_traffic,
        _norm_flops(5),
    ),
    Kernel(
        cross_entropy,
        cross_entropy_reference,
        _cross_entropy_inputs,
        _small(*_CROSS_ENTROPY_OPTIONS),
        ({"rows": 128, "columns": 256}, {"rows": 128, "columns": 5024}),
        _CROSS_ENTROPY_LARGE,
        _CROSS_ENTROPY_COMPILED,
        _cross_entropy_traffic,
        _cross_entropy_flops,
    ),
    Kernel(
        linear_cross_entropy,
        linear_cross_entropy_reference,
        _linear_cross_entropy_inputs,
        _LINEAR_CROSS_ENTROPY_CASES,
        ({"rows": 128, "columns": 64, "classes": 512}, {"rows": 256, "columns": 128, "classes": 1024}),
        _LINEAR_CROSS_ENTROPY_LARGE,
        _LINEAR_CROSS_ENTROPY_COMPILED,
        _linear_cross_entropy_traffic,
        _linear_cross_entropy_flops,
    ),
    Kernel(
        attention.scaled_dot_product_attention,
        attention.scaled_dot_product_attention_reference,
        _attention_inputs,
        _ATTENTION_SMALL,
        _ATTENTION_QUICK,
        _ATTENTION_LARGE,
        _ATTENTION_COMPILED,
        _attention_traffic,
        _attention_flops,
        realigns=True,
    ),
)
