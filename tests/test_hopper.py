"""The Gluon forward for Hopper: its text under random schedules, its binaries, and which calls it takes."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gluon_emulator
import pytest
import torch
from torch import Tensor

from fastlm_kernels import _runtime, aot, configs, tune
from fastlm_kernels.attention._launch import Options
from fastlm_kernels.attention._operators import launch_forward
from fastlm_kernels.attention._reference import scaled_dot_product_attention_reference
from fastlm_kernels.configs import AttentionConfig
from fastlm_kernels.registry import case_name

pytestmark = pytest.mark.needs_triton

KERNEL = "attention_hopper_kernel"
SMALL = AttentionConfig(128, 128, 64, 4, 2, "gluon")
RESIDENT = replace(SMALL, loads="gluon-resident")


def heads(
    T: int, S: int, D: int = 64, batch: int = 1, group: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """q, k and v, positions outside heads in memory; between NaN on a CPU, so that none of it may be read."""
    generator = torch.Generator().manual_seed(T + S)

    def one(n: int, count: int) -> Tensor:
        if device == "meta":
            return torch.empty(batch, n, count, D, dtype=dtype, device=device).transpose(1, 2)
        around = torch.full((batch, n + 260, count, D), math.nan, dtype=dtype)
        around[:, 130:-130] = torch.randn(batch, n, count, D, generator=generator).to(dtype)
        return around[:, 130:-130].transpose(1, 2)

    return [one(T, 2 * group), one(S, 2), one(S, 2)]


def launched(
    tensors: list[Tensor], config: AttentionConfig, options: Options, architecture: str = "sm_90", **extras: Any
) -> _runtime.Launch:
    """What the call launches on `architecture` under this configuration."""
    given = [extras.get(name) for name in ("mask", "key_mask", "cu_q", "cu_k", "used_k", "seed")]
    rows = (replace(config, head_dim=256),)
    with (
        configs.trying("ATTENTION_FORWARD", architecture, rows),
        _runtime.recording(architecture) as launches,
    ):
        launch_forward(*tensors, *given, *options, True)
    (launch,) = launches
    return launch


def options(case: dict[str, Any], D: int) -> Options:
    left, right = case.get("window", (-1, 0 if case.get("causal") else -1))
    bottom_right = case.get("align") == "bottom_right"
    return Options(-1, -1, left, right, bottom_right, D**-0.5, case.get("softcap", 0.0), 0.0, True)


def emulated(case: dict[str, Any], config: AttentionConfig, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse in natural units, q k v) of a call, by the emulator."""
    sizes = {name: case[name] for name in ("T", "S", "D", "batch", "group") if name in case}
    tensors = heads(**sizes)
    launch = launched(tensors, config, options(case, sizes.get("D", 64)))
    assert launch.kernel.fn.__name__ == KERNEL
    found = gluon_emulator.run(launch, seed)
    return found["OUT"], found["LSE"].view(tensors[0].shape[:3]) * math.log(2), tensors


def expected(case: dict[str, Any], tensors: list[Tensor]) -> Any:
    """The same in fp64."""
    opts = options(case, tensors[0].shape[-1])
    q, k, v = (x.double() for x in tensors)
    return scaled_dot_product_attention_reference(
        q,
        k,
        v,
        window_size=(opts.left, opts.right),
        softcap=opts.softcap or None,
        causal_align="bottom_right" if opts.bottom_right else "top_left",
        enable_gqa=True,
        return_lse=True,
    )


CASES: tuple[dict[str, Any], ...] = (
    {"T": 1, "S": 1},
    {"T": 1, "S": 200, "causal": True},
    {"T": 63, "S": 64, "batch": 2},
    {"T": 64, "S": 65, "causal": True, "align": "bottom_right"},
    {"T": 65, "S": 63, "causal": True, "group": 3},
    {"T": 127, "S": 127, "causal": True, "D": 128},
    {"T": 257, "S": 400, "causal": True, "group": 2, "batch": 2},
    {"T": 300, "S": 140, "causal": True, "align": "bottom_right"},
    {"T": 300, "S": 300, "window": (100, 30), "softcap": 3.0},
    {"T": 257, "S": 420, "window": (70, -1), "align": "bottom_right"},
    {"T": 140, "S": 300, "window": (-1, 20), "D": 128},
    {"T": 1000, "S": 1000, "causal": True},
)


@pytest.mark.parametrize("config", [SMALL, replace(RESIDENT, num_stages=3, block_n=32)], ids=lambda c: c.loads)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_kernels_text_computes_attention(case: dict[str, Any], config: AttentionConfig) -> None:
    """Output and log-sum-exp, to what tanh's polynomial gives with a soft-cap and to fp64's last bits without."""
    out, lse, tensors = emulated(case, config, seed=case["T"])
    tolerance = 1e-6 if "softcap" in case else 1e-12
    wanted, wanted_lse = expected(case, tensors)
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "config", [replace(SMALL, block_n=128), replace(RESIDENT, num_stages=4)], ids=lambda c: c.loads
)
def test_no_schedule_changes_a_bit(config: AttentionConfig) -> None:
    """Copies that arrive late and in any order, warp groups that overtake each other, several tiles a program."""
    case = {"T": 300, "S": 450, "window": (200, 0), "align": "bottom_right", "group": 2}
    out, lse, tensors = emulated(case, config, 0)
    torch.testing.assert_close(out, expected(case, tensors)[0], rtol=1e-12, atol=1e-12)
    for seed in range(1, 17):
        again, lse_again, _ = emulated(case, config, seed)
        assert torch.equal(again, out), seed
        assert torch.equal(lse_again, lse), seed


OTHERS: dict[str, dict[str, Any]] = {
    "a mask": {"mask": torch.ones(1, 1, 300, 300, dtype=torch.bool, device="meta")},
    "a key mask": {"key_mask": torch.ones(1, 300, dtype=torch.bool, device="meta")},
    "40 channels": {"D": 40},
    "256 channels": {"D": 256},
    "one stage": {"config": replace(SMALL, num_stages=1)},
    "64 queries": {"config": replace(SMALL, block_m=64)},
    "sm_100": {"architecture": "sm_100"},
    "dropout": {"seed": torch.zeros(1, dtype=torch.int64, device="meta"), "dropout": 0.5},
    "wider values": {"values": 128},
    "one key for all": {"expand": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_it_does_not_cover_keeps_the_plain_kernel(other: str) -> None:
    """By pointers, with a tile for eight warps."""
    given = dict(OTHERS[other])
    q, k, v = heads(300, 300, given.pop("D", 64), device="meta")
    if "values" in given:
        v = torch.empty(*v.shape[:3], given.pop("values"), dtype=v.dtype, device="meta")
    if given.pop("expand", False):
        k = k[:, :, :1].expand_as(k)
    opts = options({"causal": True}, 64)._replace(dropout=given.pop("dropout", 0.0))
    launch = launched([q, k, v], given.pop("config", SMALL), opts, given.pop("architecture", "sm_90"), **given)
    assert launch.kernel.fn.__name__ == "attention_forward_kernel"
    assert not launch.constexprs["DESCRIPTORS"]
    assert launch.options["num_warps"] == 8


def test_a_resident_launch_has_a_program_a_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not more than there are tiles; the other kind has one a tile."""
    tensors, opts = heads(1000, 1000, device="meta"), options({"causal": True}, 64)
    assert launched(tensors, SMALL, opts).grid == (16,)
    for there_are, programs in ((5, 5), (132, 16)):
        monkeypatch.setattr(_runtime, "multiprocessors", lambda device, n=there_are: n)
        assert launched(tensors, RESIDENT, opts).grid == (programs,)


def test_no_shipped_table_asks_for_it() -> None:
    """But one that a GPU has measured: `tune` and the bench may try it, and nobody else."""
    measured = json.loads(configs.TUNED.read_text()) if configs.TUNED.exists() else {}
    guessed = [table for name, table in configs.ATTENTION_FORWARD.items() if name not in measured]
    assert {config.loads for table in guessed for config in table} == {"pointers"}
    for present in configs.ATTENTION_FORWARD["sm_90"]:
        tried = list(tune.gluon_candidates(present))
        assert {config.loads for config in tried} == ({SMALL.loads, RESIDENT.loads} if tried else set())
        assert bool(tried) == (present.head_dim in (64, 128))
    assert {(c.num_stages, c.block_m) for c in tune.candidates(SMALL, loops=True)} == {(2, 128), (3, 128), (4, 128)}


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    return aot.collect(list(aot.trial_jobs(False, ["sm_90"])), workers=1)


@pytest.mark.needs_compiler
@pytest.mark.xdist_group("ahead of time")
def test_its_binaries_fit_and_do_not_spill(rows: list[aot.Row]) -> None:
    """At 64 and 128 channels; all launch options are the kernel's own."""
    assert {re.search(r"columns(\d+)", row.call).group(1) for row in rows} == {"64", "128"}  # type: ignore[union-attr]
    assert all(row.kernel == KERNEL and row.ok and row.num_warps == 4 for row in rows)
    assert list(aot.trial_jobs(True, ["sm_89", "sm_100"])) == []


@pytest.mark.needs_compiler
@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("config", configs.ATTENTION_GLUON[:3:2], ids=lambda config: str(config.head_dim))
def test_its_code_is_what_hopper_is_for(config: AttentionConfig) -> None:
    """Products by warp groups and no more of them than there must be, loads and stores by the copy engine, registers
    moved from the loading warp to the others; each softmax between the issue of P V and the wait for it.
    """
    import triton
    from triton.backends import nvidia

    D = config.head_dim
    launch = launched(heads(300, 300, D, device="meta", dtype=torch.bfloat16), config, options({"causal": True}, D))
    source, settings = aot.specialise(launch, "sm_90", True)
    binary = triton.compile(source, target=aot._target("sm_90"), options=settings.__dict__).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "nvdisasm"
        code = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Za-z0-9_.]+)([^;]*);", code)
    # Of 16 channels or keys at once: S before the loops, S and P V in a masked and a whole loop, P V after them; twice.
    products = 2 * (D // 16 + 2 * (D // 16 + config.block_n // 16) + config.block_n // 16)
    assert sum(name.startswith("HGMMA.64x") for name, _ in names) == products
    for instruction in ("UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS"):
        assert any(name.startswith(instruction) for name, _ in names), instruction
    assert not any(name.startswith(("LDL", "STL")) for name, _ in names)
    beside = []
    waits = [i for i, (name, _) in enumerate(names) if name == "WARPGROUP.DEPBAR.LE"]
    for one, next_one in itertools.pairwise(waits):
        if names[one][1].strip().endswith("0x1"):
            beside.append(sum(name == "MUFU.EX2" for name, _ in names[one:next_one]))
    # 64 rows x block_n scores of 128 threads, and two of a thread's rows to shrink.
    assert beside == [64 * config.block_n // 128 + 2] * 4
