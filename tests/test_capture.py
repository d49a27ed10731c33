"""Graph capture of the GPU path on a machine without one: fake CUDA tensors.

Forward only: a CPU build of PyTorch aborts as soon as autograd records an operation on a CUDA tensor, fake or not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastlm_kernels as fk
from fastlm_kernels import _runtime
from fastlm_kernels.check import outputs_of
from fastlm_kernels.registry import KERNELS, Arguments, Kernel

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
pytestmark = pytest.mark.needs_triton


def fake_inputs(kernel: Kernel, dtype: torch.dtype) -> Arguments:
    """The kernel's arguments as fake CUDA tensors; call under a FakeTensorMode."""
    real = kernel.inputs(dtype, "meta", 0, rows=6, columns=32)
    return {
        name: torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
        for name, a in real.items()
    }


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_cuda_results_have_the_references_form(kernel: Kernel, dtype: torch.dtype) -> None:
    """Shapes, dtypes and devices of the outputs."""
    with FakeTensorMode():
        arguments = fake_inputs(kernel, dtype)
        assert _runtime.explain(kernel.fused, **arguments).path == "triton"
        ours, theirs = (outputs_of(fn, arguments) for fn in (kernel.fused, kernel.reference))
        assert [(t.shape, t.dtype, t.device) for t in ours] == [(t.shape, t.dtype, t.device) for t in theirs]


@every_kernel
def test_captured_graph_holds_the_operator(kernel: Kernel) -> None:
    """Traced into a graph: our operator, and nothing of PyTorch's that does its work."""
    with FakeTensorMode() as mode:
        arguments = fake_inputs(kernel, torch.bfloat16)
        tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}

    def step(*given: Tensor) -> Any:
        return kernel.fused(**arguments | dict(zip(tensors, given, strict=True)))

    with mode:
        code = make_fx(step)(*tensors.values()).code
    assert code.count(f"ops.{_runtime.NAMESPACE}.") == 1
    assert f"aten.{kernel.name}" not in code
    assert "aten.native_" not in code
    assert "aten.mm" not in code


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_pytorchs_dtype(name: str, dtype: torch.dtype) -> None:
    """On CUDA norms are in autocast's fp32 list: the kernel reads 16 bits and writes 32."""
    outer = torch.is_autocast_enabled("cuda")
    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=dtype, device="cuda")
        w = torch.empty(16, dtype=dtype, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            ours, theirs = getattr(fk, name)(x, (16,), w), getattr(F, name)(x, (16,), w)
            sums = fk.add_rms_norm(x, x, (16,), w)
        finally:
            torch.set_autocast_enabled("cuda", outer)
        assert ours.dtype == theirs.dtype == torch.float32
        assert [t.dtype for t in sums] == [dtype, dtype]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_cpu_autocast_gives_pytorchs_dtype(name: str) -> None:
    """The CPU's list does not hold them."""
    x, w = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(fk, name)(x, (16,), w).dtype == getattr(F, name)(x, (16,), w).dtype == torch.bfloat16
        mixed = getattr(fk, name)(x, (16,), w.float())
    assert mixed.dtype == torch.bfloat16
