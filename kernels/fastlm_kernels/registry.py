"""Every kernel, once. Tests, benches, `check`, `aot` and the README's table iterate over `KERNELS`.

Adding a kernel of (rows, columns) is one file and one entry here. `check`, `aot` and the benches read any family's
cases from its entry; the tests of what holds for every kernel build their own from rows and columns, so a family of
other shapes brings its own to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import configs, norm

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

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.fused.__name__


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
)
