"""`pytest bench --benchmark-only` collects, checks, times and labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastlm_kernels import _runtime
from fastlm_kernels.registry import KERNELS

ROOT = Path(__file__).parent.parent


def test_kernel_benches_run_and_say_what_they_timed(tmp_path: Path) -> None:
    """One small shape of every kernel, each provider, and the binaries' resources where they can be built."""
    file = tmp_path / "bench.json"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={file}"]
    selected = "columns256 or (test_resources and sm_90)"
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
