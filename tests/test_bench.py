"""`pytest bench --benchmark-only` collects, checks, times and labels."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk
from bench import bench_kernels, device, timing
from bench import providers as rivals
from bench.bench_kernels import plan
from bench.cases import TIMED, Entry, entries
from bench.conftest import Recorder
from bench.results import load
from bench.timing import DIRECTIONS, Inputs, Measured, copies, device_seconds, measure, repeats, spreads
from fastlm_kernels import _runtime
from fastlm_kernels.registry import case_name, random_tensor

ROOT = Path(__file__).parent.parent


# One small case each of a few kernels, of what a binary uses, and of the optimizer.
RUN = ("cross_entropy", "scaled_dot_product_attention")
SELECTED = (
    "(test_time and ([cross_entropy-rows128-columns256 or rows64-columns64))"
    " or (test_resources and sm_90 and log_softmax) or (test_adamw and clipped) or test_host_time"
)
FIGURES = {
    "kernel",
    "provider",
    "shape",
    "dtype",
    "ratio",
    "direction",
    "seconds",
    "bytes_per_second",
    "device",
    "checked",
}


def run_benches(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`pytest bench --benchmark-only` on this machine's CPU."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    # Timing the interpreter would say nothing and take minutes.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    fixed = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    fixed += [f"--benchmark-json={folder / 'bench.json'}", f"--bench-records={folder / 'bench.jsonl'}"]
    command = [sys.executable, "-m", "pytest", "bench", *fixed, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_benches_run_and_say_what_they_timed(tmp_path: Path) -> None:
    """Every direction and provider; what it tells names the device, and no machine."""
    run = run_benches(tmp_path, "-k", SELECTED)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout
    assert len(re.findall(r"^not measured here: \d+ benchmarks that need a GPU", run.stdout, re.MULTILINE)) == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    infos = [benchmark["extra_info"] for benchmark in written["benchmarks"]]
    timed = [info for info in infos if info["provider"] != "aot"]
    hosts = [info for info in timed if info["kernel"] == "adamw.host"]
    assert {info["path"] for info in hosts} == {"torch", "triton, launches recorded"}
    assert all(info["ratio"] > 0 and info["seconds"] > 0 for info in timed)
    assert all(set(info) >= FIGURES for info in timed if info not in hosts)
    for provider in ("fastlm", "eager"):
        found = {info["kernel"] for info in timed if info["provider"] == provider and "adamw" not in info["kernel"]}
        assert found == {f"{name}.{direction}" for name in RUN for direction in DIRECTIONS}
    optimizers = {(info["kernel"], info["provider"]) for info in timed if "adamw" in info["kernel"]}
    providers = ("fastlm", "fused", "foreach")
    assert optimizers == {(f"adamw.{what}", provider) for what in ("clipped", "host") for provider in providers}
    assert {"sdpa-flash", "sdpa-math"} <= {info["provider"] for info in timed}
    resources = [info for info in infos if info["provider"] == "aot"]
    assert len(resources) == _runtime.HAS_TRITON
    assert all(row["spill_bytes"] == 0 for info in resources for row in info["binaries"])
    assert set(written["machine_info"]) == {"device", "torch", "triton", "python", "commit", "date", "rates"}
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["source"]
    assert [line["seconds"] for line in lines[1:] if "seconds" in line] == [info["seconds"] for info in timed]


def source(**changed: str) -> dict[str, str]:
    return {"device": "a GPU", "commit": "abc", "date": "2026-01-01", **changed}


def test_records_go_on_where_they_stopped(tmp_path: Path) -> None:
    """What is on record of the same source is known; of another commit nothing is; a reason counts as a result."""
    path = tmp_path / "records.jsonl"
    first = Recorder(path, source())
    first.add("a", {"seconds": 1.0, "ratio": 2.0})
    first.add("b", {"seconds": None, "reason": "out of memory"})
    assert first.not_timed == [{"seconds": None, "reason": "out of memory"}]
    assert Recorder(path, source(date="2026-01-02")).known == {"a", "b"}
    assert Recorder(path, source(commit="def")).known == set()
    assert Recorder(path, source()).known == {"a", "b"}
    again = Recorder(path, source())
    again.add("c", {"seconds": 1.0, "ratio": 2.0})
    assert Recorder(path, source()).known == {"a", "b", "c"}
    assert Recorder(path, source(commit="def")).known == set()
    assert Recorder(None, source()).known == set()


@pytest.mark.parametrize("cut", [1, 30, 75], ids="{} bytes".format)
def test_records_cut_short_go_on_and_are_read(cut: int, tmp_path: Path) -> None:
    """By a kill in the middle of a line, or in front of its end: the rest is known, and what comes is a line."""
    path, info = tmp_path / "records.jsonl", {"kernel": "softmax.forward", "provider": "eager", "dtype": "float32"}
    origin = source(torch="2", triton="3")
    first = Recorder(path, origin)
    for name in "ab":
        first.add(name, info | {"shape": name, "seconds": 1.0, "ratio": 2.0})
    os.truncate(path, path.stat().st_size - cut)
    kept = {"a", "b"} if cut == 1 else {"a"}
    assert {info["shape"] for info in load([path]).timed.values()} == kept
    again = Recorder(path, origin)
    assert again.known == kept
    again.add("c", info | {"shape": "c", "seconds": 1.0, "ratio": 2.0})
    assert Recorder(path, origin).known == {*kept, "c"}
    assert {info["shape"] for info in load([path]).timed.values()} == {*kept, "c"}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next result, once there is room again, stands on a line of its own."""
    path = tmp_path / "records.jsonl"
    recorder = Recorder(path, source())

    def full(self: Path, mode: str) -> Any:
        file = open_file(self, mode)

        def write(text: str) -> None:
            os.write(file.fileno(), text[:9].encode())
            raise OSError(28, "No space left on device")

        file.write = write  # type: ignore[method-assign]
        return file

    open_file = Path.open
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        recorder.add("a", {"seconds": 1.0})
    monkeypatch.undo()
    recorder.add("b", {"seconds": 1.0})
    assert [json.loads(line).get("id") for line in path.read_text().splitlines()] == [None, "b"]


def test_readme_says_how_many_a_gpu_has() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    said = re.search(r"about ([\d,]+) benchmarks", text)
    assert said is not None
    assert int(said[1].replace(",", "")) == round(len(plan(gpu=True)), -2)


def test_every_kernel_is_timed_on_a_cpu() -> None:
    """Ours and eager, in every direction; one feature of attention in each of its cases."""
    planned = plan(gpu=False)
    for name in ("fastlm", "eager"):
        found = {(e.kernel.name, direction) for e, direction, provider in planned if provider.name == name}
        assert found == {(kernel.name, direction) for kernel in TIMED for direction in DIRECTIONS}
    assert {provider.name for _, _, provider in planned} == {"fastlm", "eager", "sdpa-flash", "sdpa-math"}


def test_a_gpu_times_every_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan for a GPU: all shapes that the design names, and per case all that could run it."""
    monkeypatch.setattr(rivals, "installed", lambda module: True)
    planned = plan(gpu=True)
    assert planned[0][0].kernel.name == "scaled_dot_product_attention"
    by_case = {}
    for entry, direction, provider in planned:
        by_case.setdefault((entry.kernel.name, direction, case_name(dict(entry.case))), set()).add(provider.name)
    assert all({"fastlm", "eager", "compile"} <= names for names in by_case.values())
    first = list(dict.fromkeys(entry.kernel.name for entry, _, _ in planned[: len(planned) // 10]))
    assert set(first) == {kernel.name for kernel in TIMED}  # in little time something of everything
    backends = {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math"}
    for columns in (64, 128):
        for rows in (1024, 2048, 4096, 8192, 16384):
            shape = f"rows{rows}-columns{columns}-batch{16384 // rows}-heads{2048 // columns}-kv_heads{2048 // columns}"
            names = by_case["scaled_dot_product_attention", "backward", f"{shape}-causal"]
            assert names >= backends | {"flash-attn-2", "flash-attn-3", "flash-attn-4", "fastlm-unordered"}
            assert names >= {"sdpa-flash-deterministic", "flash-attn-2-deterministic"}
            assert "fastlm-gluon" not in names
            assert "fastlm-gluon" in by_case["scaled_dot_product_attention", "forward", f"{shape}-causal"]
    assert "liger" in by_case["rms_norm", "forward_backward", "rows8192-columns768"]
    features = {name for kernel, _, name in by_case if kernel == "scaled_dot_product_attention"}
    for feature in ("window", "kv_heads4", "softcap", "padded", "masked", "lse", "dropout", "keys32768"):
        assert any(feature in name for name in features), feature


def test_a_rival_that_does_another_task_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that fails; the reason is told. Ours raises."""
    monkeypatch.setattr(bench_kernels, "GPU", False)
    index = next(i for i, kernel in enumerate(TIMED) if kernel.name == "rms_norm")
    entry = Entry(index, (("rows", 4), ("columns", 8)))

    def broken(**arguments: object) -> Tensor:
        raise RuntimeError("No available kernel\nmore")

    def late(**arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def told(name: str, fn: Callable[..., Tensor]) -> object:
        return bench_kernels._measured(entry, "forward", rivals.Provider(name, lambda kernel: fn))

    assert str(told("rival", lambda **a: 2 * fk.rms_norm(**a))).startswith("differs from PyTorch by")
    assert str(told("rival", lambda **a: fk.rms_norm(**a)[:1])).startswith("gives (1, 8)")
    assert told("rival", broken) == "RuntimeError: No available kernel"
    assert told("rival", late) == "out of memory"
    with pytest.raises(RuntimeError, match="No available"):
        told("fastlm", broken)
    assert isinstance(told("rival", lambda **a: fk.rms_norm(**a)), Measured)


def test_packed_documents_are_checked_and_timed() -> None:
    """Which the registry does not hold."""
    entry = next(entry for entry in entries(gpu=False) if entry.kernel.name == "varlen_attn")
    bench_kernels._check(*entry)
    fastlm = next(rivals.providers(entry.kernel, dict(entry.case), "backward", gpu=False))
    measured = bench_kernels._measured(entry, "backward", fastlm)
    assert isinstance(measured, Measured)
    # Documents of 9, 19, 29 and 39 tokens; half of each square, 2 heads of 32 channels, five products.
    pairs = sum(n * (n + 1) // 2 for n in (9, 19, 29, 39))
    assert sum((9, 19, 29, 39)) == 96
    assert entry.kernel.flops(dict(entry.case), True) == 2 * 5 * 32 * 2 * pairs


def test_dropout_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not scale what it keeps, and one whose backward keeps other weights, are refused."""
    index = next(i for i, kernel in enumerate(TIMED) if kernel.name == "scaled_dot_product_attention")
    case = {"rows": 64, "columns": 8, "heads": 4, "kv_heads": 4, "dropout": 0.2}
    entry = Entry(index, tuple(case.items()))
    bench_kernels._check(*entry)
    good = TIMED[index].fused

    def changed(fn: Callable[..., Tensor]) -> tuple[object, ...]:
        return (*TIMED[:index], replace(TIMED[index], fused=fn), *TIMED[index + 1 :])

    def other_weights(value: Tensor, **arguments: Any) -> Tensor:
        kept, other = good(value=value.detach(), **arguments), good(value=0.9 * value, **arguments)
        return kept + other - other.detach()

    for bad in (lambda **a: 0.8 * good(**a), lambda dropout_p, **a: good(**a), other_weights):
        monkeypatch.setattr(bench_kernels, "TIMED", changed(bad))
        with pytest.raises(AssertionError):
            bench_kernels._check.__wrapped__(*entry)


def test_the_spread_of_a_call() -> None:
    """Median and quantiles of enough stretches, each of enough calls, whatever one call takes."""
    asked: list[int] = []

    seconds = itertools.cycle([1e-5, 2e-5, 3e-5, 4e-5, 5e-5])

    def stretch(calls: int) -> float:
        asked.append(calls)
        return next(seconds)

    found = spreads([stretch])[0]
    assert found.rounds == 40 == len(asked) - 2
    assert set(asked[2:]) == {250}  # 5 ms of calls that took 20 us each
    assert (found.median, found.best) == (pytest.approx(3e-5), 1e-5)
    assert found.best <= found.low < found.median < found.high <= 5e-5
    assert spreads([lambda calls: 3.0]) == [(3.0, 3.0, 3.0, 3.0, 5)]


def test_calls_that_are_compared_take_turns() -> None:
    """Each as often as fills a stretch of its own."""
    order: list[str] = []
    slow, fast = spreads([lambda n: order.append(f"slow {n}") or 1e-2, lambda n: order.append(f"fast {n}") or 1e-3])
    assert order[4:] == ["slow 1", "fast 5"] * 20
    assert (slow.median, fast.median) == (1e-2, 1e-3)


def test_the_deterministic_mode_is_left_as_it_was() -> None:
    """In force inside, errors as errors, no memory filled; afterwards as before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with rivals.deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not rivals._memory.fill_uninitialized_memory
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert rivals._memory.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_attention_is_called_by_its_own_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, causality, windows and options reach flash-attn's functions as they understand them."""
    seen: dict[str, Any] = {}

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.update(options, shape=tuple(q.shape))
        return q, None

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "some_flash", module)  # type: ignore[arg-type]
    q = torch.randn(2, 3, 5, 4)
    arguments = {"query": q, "key": q, "value": q, "is_causal": True, "enable_gqa": False}
    assert torch.equal(rivals._flash("some_flash", None, True, **arguments), q)
    assert seen == {"causal": True, "deterministic": True, "shape": (2, 5, 3, 4)}
    rivals._flash("some_flash", None, False, **arguments, window_size=(7, -1), softcap=3.0, dropout_p=0.1)
    assert (seen["window_size"], seen["softcap"], seen["dropout_p"]) == ((7, None), 3.0, 0.1)
    assert not seen["deterministic"]


def test_the_commit_and_the_processor_are_named(tmp_path: Path) -> None:
    """Outside of git the sources stand for the commit; the processor's model is read, never the machine's name."""
    assert re.fullmatch("sources-[0-9a-f]{12}", device._commit(tmp_path))
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\nflags: x\n")
    assert device._processor(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"


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


@pytest.mark.parametrize(
    ("direction", "expected"), [("forward", [1, 2, 3]), ("backward", []), ("forward_backward", [1, 2, 3])]
)
def test_measured_call_runs_once_a_set(direction: str, expected: list[float]) -> None:
    """And its seconds are those of one run; a backward alone runs no forward."""
    seen: list[float] = []
    gradients: list[float] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x.item())
        y = 2 * x
        if y.requires_grad:
            y.register_hook(lambda dy: gradients.append(dy.item()))
        return y

    sets = [Inputs({"x": torch.tensor(i + 1.0, requires_grad=True)}, (torch.tensor(5.0 + i),)) for i in range(3)]
    measured = measure(double, direction, sets)
    seen.clear()
    gradients.clear()
    measured.call()
    assert seen == expected
    assert gradients == ([] if direction == "forward" else [5.0, 6.0, 7.0])
    assert measured.seconds.median > 0
    assert (measured.timed_by, measured.repeats, measured.launches) == ("host", True, None)


class FakeCuda:
    """Stands for torch.cuda. A graph keeps what runs while it is captured; a second passes between two events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waiting: bool):
        self.waiting, self.warned, self.mode, self.clock = waiting, False, 0, 0.0
        self.log: list[str] = []
        names = ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "Event", "synchronize")
        names += ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
        for name in (*names, "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def run(self, x: Tensor) -> Tensor:
        if self.mode == "error" and self.waiting:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.log.append(f"run {x.item():g}")
        return 2 * x

    def Stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    current_stream = Stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def CUDAGraph(self, keep_graph: bool) -> Any:
        assert keep_graph
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"), instantiate=lambda: None)

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture")
        yield
        self.log.append("captured")

    def Event(self, enable_timing: bool) -> Any:
        event = types.SimpleNamespace(at=0.0, synchronize=lambda: None)

        def record() -> None:
            self.clock += 1.0
            event.at = self.clock

        event.record, event.elapsed_time = record, lambda end: 1000 * (end.at - event.at)
        return event

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.log.append("reset")

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 164

    def get_sync_debug_mode(self) -> int:
        return 0

    def set_sync_debug_mode(self, mode: Any) -> None:
        if not self.warned:  # as torch does, once a process
            self.warned = True
            warnings.warn("Synchronization debug mode is a prototype feature and may miss some", stacklevel=2)
        self.mode = mode


@pytest.mark.parametrize("waiting", [False, True])
def test_a_call_on_a_gpu_is_captured_unless_it_waits(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set once in the graph, after warm-up; a second between events is a third a set; memory is the extra."""
    cuda = FakeCuda(monkeypatch, waiting)
    monkeypatch.setattr(timing, "nodes", lambda graph: 6)
    sets = [Inputs({"x": torch.tensor(i + 1.0, requires_grad=True)}, (torch.tensor(1.0),)) for i in range(3)]
    measured = timing._measure_on_gpu(cuda.run, "forward_backward", sets)
    assert cuda.mode == 0
    assert measured.seconds.median == pytest.approx(1 / 3)
    assert (measured.peak_bytes, measured.repeats) == (64, True)
    assert 0 < measured.host_seconds < 0.1  # seconds of these events are no host's
    assert (measured.timed_by, measured.launches) == (("events", None) if waiting else ("graph", 2))
    if not waiting:
        start = cuda.log.index("capture")
        assert cuda.log[start:][:5] == ["capture", "run 1", "run 2", "run 3", "captured"]
        assert set(cuda.log[start + 5 :]) == {"replay"}
    cuda.log.clear()
    measured.call()
    ran = ["wait", "run 1", "run 2", "run 3", "wait"] if waiting else ["replay"]
    assert cuda.log == [*ran, "synchronize"]


def test_what_a_graph_reads_outlives_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward saved for a captured backward stays as long as the call that replays it, no longer."""
    cuda, kept = FakeCuda(monkeypatch, waiting=False), []
    monkeypatch.setattr(timing, "nodes", lambda graph: None)

    def fn(x: Tensor) -> Tensor:
        y = cuda.run(x)
        kept.append(weakref.ref(y))
        return y

    sets = [Inputs({"x": torch.tensor(1.0, requires_grad=True)}, (torch.tensor(1.0),)) for _ in range(2)]
    measured = timing._measure_on_gpu(fn, "backward", sets)
    gc.collect()
    assert [ref() is not None for ref in kept] == [True, True]
    assert measured.launches is None
    del measured
    gc.collect()
    assert [ref() is not None for ref in kept] == [False, False]


def test_a_driver_counts_what_a_graph_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address of the graph it was given; an error is no count."""
    seen: list[int] = []

    def count_nodes(graph: Any, nodes: None, count: Any) -> int:
        seen.append(graph.value)
        count._obj.value = 12
        return 0 if graph.value == 77 else 1

    driver = types.SimpleNamespace(cuGraphGetNodes=count_nodes)
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: driver)
    found = [timing.nodes(types.SimpleNamespace(raw_cuda_graph=lambda at=at: at)) for at in (77, 78)]  # type: ignore[arg-type]
    assert (found, seen) == ([12, None], [77, 78])


def test_runs_that_differ_do_not_repeat() -> None:
    """NaN in the same places is the same."""
    numbers = iter([1.0, 2.0])
    assert not repeats(lambda: (torch.tensor(next(numbers)),))
    assert repeats(lambda: (torch.tensor([1.0, torch.nan]),))


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
