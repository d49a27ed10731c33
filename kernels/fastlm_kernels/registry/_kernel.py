"""One entry of the registry, and what the families' entries are made of."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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
        """Where its kernels stand."""
        return modules_of(self.fused.__module__)


def modules_of(name: str) -> list[ModuleType]:
    """The module of that full name, and those in its folder if it is a package."""
    own = importlib.import_module(name)
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


class Draw:
    """Random tensors of one dtype on one device, one after another from a seed or a generator."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int | torch.Generator):
        self.dtype, self.device, self.generator = dtype, torch.device(device), generator_of(seed)

    @property
    def empty(self) -> bool:
        """Whether tensors are shapes alone."""
        return self.device.type == "meta"

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """`random_tensor` of this shape, of another dtype if one is given."""
        return random_tensor(shape, dtype or self.dtype, self.device, self.generator, scale, shift)

    def classes(self, rows: int, classes: int) -> Tensor:
        """int64 (rows,) in [0, classes)."""
        if self.empty:
            return torch.empty(rows, dtype=torch.int64, device=self.device)
        return torch.randint(classes, (rows,), generator=self.generator, device=self.generator.device).to(self.device)


def drawn(make: Callable[..., Arguments]) -> Callable[..., Arguments]:
    """`Kernel.inputs` from a function that takes a `Draw` in the place of dtype, device and seed."""

    def inputs(dtype: torch.dtype, device: torch.device | str, seed: int | torch.Generator, **case: Any) -> Arguments:
        return make(Draw(dtype, device, seed), **case)

    return inputs


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator from a seed; a generator as it is."""
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
