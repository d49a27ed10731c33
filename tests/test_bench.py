"""`pytest bench --benchmark-only` collects, checks, times and labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.timing import Inputs, copies, device_seconds, measure, step
from fastlm_kernels import _runtime
from fastlm_kernels.registry import KERNELS, random_tensor

ROOT = Path(__file__).parent.parent


def test_kernel_benches_run_and_say_what_they_timed(tmp_path: Path) -> None:
    """One small shape of every kernel, each provider, and the binaries' resources where they can be built."""
    file = tmp_path / "bench.json"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={file}"]
    selected = "columns256 or (test_time and (rotary or linear_cross or scaled_dot)) or (test_resources and sm_90)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    # Timing the interpreter would say nothing and take minutes.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *options, "-k", selected],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    infos = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    assert all({"kernel", "provider", "shape", "dtype", "ratio"} <= set(info) for info in infos)
    names = {kernel.name for kernel in KERNELS}
    for provider in ("fastlm", "eager"):
        timed = [info for info in infos if info["provider"] == provider]
        assert {info["kernel"] for info in timed} == {
            f"{n}.{direction}" for n in names for direction in ("forward", "forward_backward")
        }
        assert all(info["ratio"] > 0 and info["seconds"] > 0 for info in timed)
    if _runtime.HAS_TRITON:
        resources = [info for info in infos if info["provider"] == "aot"]
        assert {info["kernel"] for info in resources} == names
        assert all(row["spill_bytes"] == 0 for info in resources for row in info["binaries"])


def test_the_optimizer_bench_runs_and_says_what_it_timed(tmp_path: Path) -> None:
    """Every provider, with and without clipping, on a small model."""
    file = tmp_path / "bench.json"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={file}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "bench/bench_optim.py", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    infos = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    found = {(info["kernel"], info["provider"]) for info in infos}
    assert found == {(f"adamw.{k}", p) for k in ("step", "clipped") for p in ("fastlm", "fused", "foreach")}
    assert all(info["ratio"] > 0 and info["seconds"] > 0 and info["host_seconds"] > 0 for info in infos)


def test_every_run_reads_inputs_and_upstream_gradients_of_its_own() -> None:
    """Copies of all tensors, leaves as before, together larger than a cache; few of large ones."""
    x = torch.ones(1 << 20, requires_grad=True)  # 4 MiB, as is the upstream gradient
    sets = copies(Inputs({"x": x, "shape": (8,), "y": None}, (torch.ones(1 << 20),)))
    assert len(sets) == 64
    tensors = [t for inputs in sets for t in (inputs.arguments["x"], *inputs.upstream)]
    assert len({t.data_ptr() for t in tensors}) == 128
    assert sum(t.nbytes for t in tensors) >= 512 << 20
    assert all(inputs.arguments["x"].requires_grad for inputs in sets)
    assert all({**inputs.arguments, "x": 0} == {"x": 0, "shape": (8,), "y": None} for inputs in sets)
    assert len(copies(Inputs({"x": x.repeat(8)}, (torch.ones(1),)))) == 16
    assert len(copies(Inputs({"shape": (8,)}, ()))) == 1


def test_measured_call_runs_once_a_set() -> None:
    """And its seconds are those of one run."""
    seen: list[float] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x.item())
        return 2 * x

    sets = [Inputs({"x": torch.tensor(float(i), requires_grad=True)}, (torch.tensor(1.0),)) for i in range(3)]
    call, taken = measure(step(double, True), sets)
    seen.clear()
    call()
    assert seen == [0.0, 1.0, 2.0]
    assert taken > 0


def test_large_inputs_are_drawn_on_the_device_in_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator draws there, in 16 bits: no fp64 numbers on the host that would be copied over."""
    drawn: list[dict[str, object]] = []
    numbers = torch.zeros(3, dtype=torch.bfloat16)

    class Generator:
        device = torch.device("cuda", 0)

    def randn(shape: tuple[int, ...], **options: object) -> Tensor:
        drawn.append(options)
        return numbers

    monkeypatch.setattr(torch, "randn", randn)
    generator = Generator()
    found = random_tensor((3,), torch.bfloat16, "cpu", generator, shift=2.0)  # type: ignore[arg-type]
    assert found.tolist() == [2.0] * 3
    assert drawn == [{"generator": generator, "dtype": torch.bfloat16, "device": generator.device}]


@pytest.mark.needs_gpu
def test_device_time_is_the_devices() -> None:
    """A copy of 1 GiB cannot be done at 100 TB/s, however quickly it is asked for."""
    x, y = (torch.empty(1 << 28, device="cuda") for _ in range(2))

    def copy() -> None:
        y.copy_(x)

    assert device_seconds(copy) > 2 * x.nbytes / 100e12
