"""`python -m bench.report`: what was measured, in tables and plots; what was not, said so; the README's tables."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import bench_hf, plots, report, tables
from bench.cases import TIMED
from bench.results import load
from bench.timing import DIRECTIONS
from fastlm.errors import run_command

ROOT = Path(__file__).parent.parent
SOURCE = {
    "device": "Some GPU",
    "torch": "2.11",
    "triton": "3.6",
    "python": "3.12",
    "commit": "abc1234",
    "date": "2026-01-02",
}
CAPTION = "Some GPU, torch 2.11, triton 3.6, commit abc1234, 2026-01-02"
PNG = b"\x89PNG"


def info(
    kernel: str, provider: str, seconds: float | None, shape: str = "rows8-columns16", **more: Any
) -> dict[str, Any]:
    """A benchmark's extra_info; eager takes 3 us."""
    found: dict[str, Any] = {"kernel": kernel, "provider": provider, "shape": shape, "dtype": "bfloat16"}
    found |= {"seconds": seconds, "ratio": None if seconds is None else 3e-6 / seconds, "bytes": 4000, "flops": 2000}
    if seconds is not None:
        found |= {"bytes_per_second": 4000 / seconds, "bandwidth_share": 4000 / seconds / 4e9}
        found |= {"flops_per_second": 2000 / seconds, "matmul_share": 2000 / seconds / 1e12}
        found |= {"low_seconds": 0.9 * seconds, "high_seconds": 1.2 * seconds, "repeats": True, "timed_by": "graph"}
    return {**found, **more}


NORM = [
    info("rms_norm.forward_backward", "fastlm", 2e-6, peak_bytes=3 << 20, launches=2, host_seconds=7e-6),
    info("rms_norm.forward_backward", "eager", 3e-6, repeats=False),
    info("rms_norm.forward_backward", "compile", 1e-6),
    info("rms_norm.forward", "fastlm", 1.5e-6),
]
BINARY = {"kernel": "k", "registers": 40, "spill_bytes": 0, "shared_bytes": 512, "loads": "128x3"}


def benchmark_file(folder: Path, infos: list[dict[str, Any]], not_timed: list[dict[str, Any]] | None = None) -> Path:
    path = folder / "bench.json"
    benchmarks = [{"extra_info": found, "stats": {}} for found in infos]
    document = {"machine_info": SOURCE | {"rates": {}}, "benchmarks": benchmarks, "not_timed": not_timed or []}
    path.write_text(json.dumps(document))
    return path


def full_run_file(folder: Path, **changed: str) -> Path:
    def row(name: str, value: float | None, **more: Any) -> dict[str, Any]:
        base = {"name": name, "shape": "T1024", "dtype": "bfloat16", "provider": "fastlm", "value": value}
        return (
            base
            | {"unit": "tokens/s", "higher_is_better": True, "baseline": None, "ratio": None, "target": None}
            | more
        )

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "full_run.json"
    rows = [row("train_124m.tokens_per_second", 651_000.0, baseline=490_000.0, ratio=1.33, target=650_000.0)]
    rows += [row("attention.forward", 300.0, unit="TFLOP/s", ratio=0.9, target=330.0)] * 2
    rows += [row("train_350m.mfu", None, unit="", provider="error: out of memory")]
    path.write_text(json.dumps({**SOURCE, **changed, "rows": rows}))
    return path


def cells(text: str, start: str) -> list[str]:
    """The cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_report_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    """Times, ratios, shares, memory; a reason where a rival failed; every table and every kernel accounted for."""
    failed = [info("softmax.forward", "compile", None, reason="out of memory")]
    resources = [
        {"kernel": "rms_norm", "provider": "aot", "shape": "s", "architecture": "sm_90", "binaries": [BINARY] * 2}
    ]
    path = benchmark_file(tmp_path, [*NORM, info("softmax.forward", "fastlm", 1e-6), *resources], failed)
    out = tmp_path / "some-gpu"
    assert report.main([str(path), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    norm = text.split("## rms_norm")[1].split("### forward + backward")[1]
    expected = [
        "rows8-columns16 bfloat16",
        "2 us",
        "1.8 us - 2.4 us",
        "1.50x",
        "0.50x",
        "50 %",
        "0.1 %",
        "3 MiB",
        "2",
        "7 us",
    ]
    assert cells(norm, "rows8") == [*expected, "3 us *", "1 us", "not measured"]
    assert cells(text.split("## softmax")[1], "rows8")[-3:] == ["not measured", "none: out of memory", "not measured"]
    assert text.split("## layer_norm\n\n")[1].startswith("not measured\n")
    assert text.split("## Full run\n\n")[1].startswith("not measured\n")
    assert cells(text, "rms_norm | sm_90") == ["rms_norm", "sm_90", "s", "2", "40", "0", "512"]
    assert "a large copy, 4 GB/s,\nand a large matrix product, 1 TFLOP/s" in text
    assert len(re.findall(r"^\| ---", text, re.MULTILINE)) == text.count(f"\n\n{CAPTION}\n") == 4
    assert {path.name for path in out.iterdir()} == {"report.md", "kernels.json", "roofline.png", "ratios.png"}
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))


def test_a_report_can_be_made_again_from_what_it_leaves(tmp_path: Path) -> None:
    """kernels.json gives the same report, to the byte; plots of what is no longer there go."""
    path, first, second = benchmark_file(tmp_path, NORM), tmp_path / "first", tmp_path / "second"
    report.main([str(path), "--out", str(first)])
    second.mkdir()
    (second / "attention.png").write_bytes(PNG)
    report.main([str(first / "kernels.json"), "--out", str(second)])
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def test_records_are_read_and_the_last_word_counts(tmp_path: Path) -> None:
    """Two sessions in one file, of two commits: the later replaces the earlier, and each table names its own."""
    path = tmp_path / "records.jsonl"
    later = SOURCE | {"commit": "def5678"}
    slow = info("rms_norm.forward", "fastlm", 9e-6)
    softmax = info("softmax.forward", "fastlm", 4e-6)
    lines = [{"source": SOURCE}, {"id": "a", **slow}, {"id": "b", **softmax}, {"source": later}, {"id": "a", **NORM[3]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = load([path])
    assert {key[0]: found["seconds"] for key, found in results.timed.items()} == {
        "rms_norm.forward": 1.5e-6,
        "softmax.forward": 4e-6,
    }
    assert "def5678" in tables.kernel_section(results, "rms_norm")
    assert "abc1234" not in tables.kernel_section(results, "rms_norm")
    assert [source["commit"] for source in results.sources] == ["abc1234", "def5678"]


def test_the_readmes_tables_come_from_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of kernels a GPU, or a line; training on any device; a full run's figures beside their targets."""
    monkeypatch.setattr(report, "PLOTS", {})
    text = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n"
    root = tmp_path / "results"
    cpu, gpu = root / "cpu", root / "some-gpu"
    document = {"machine_info": SOURCE | {"device": "Some CPU, 2 threads"}, "benchmarks": [{"extra_info": NORM[0]}]}
    update = info("train_step", "fastlm", 2.4e-6, "nanogpt-cpu-T64-batch12", tokens_per_second=4450.0)
    document["benchmarks"].append({"extra_info": update})
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    report.main([str(tmp_path / "cpu.json"), "--out", str(cpu), "--readme", str(readme)])
    written = readme.read_text()
    assert written.startswith("# Title\n\n")
    assert written.endswith("\n\nrest\n")
    assert "old" not in written
    assert "Kernels on a GPU: not measured." in written
    assert "(`python -m bench.full_run`) on a GPU: not measured." in written
    assert "| kernel |" not in written, "a CPU runs no kernels"
    assert cells(written, "`nanogpt-cpu`") == ["`nanogpt-cpu`", "Some CPU, 2 threads", "4,450", "1.25x"]
    report.main([str(full_run_file(tmp_path / "elsewhere")), str(benchmark_file(tmp_path, NORM)), "--out", str(gpu)])
    written = report.with_tables(written, root)
    assert cells(written, "kernel") == ["kernel", "Some GPU"]
    assert cells(written, "`rms_norm`") == ["`rms_norm`", "1.50x (1 shape), 50 %"]
    assert cells(written, "`adamw`") == ["`adamw`", "not measured"]
    assert cells(written, "`train_124m.tokens") == [
        "`train_124m.tokens_per_second`",
        "651,000 tokens/s",
        "1.33x",
        "1 of 1",
    ]
    assert cells(written, "`attention.forward`") == ["`attention.forward`", "2 shapes", "0.90x", "0 of 2"]
    assert "a GPU |" not in written.replace("Some GPU", "")
    full = (gpu / "report.md").read_text().split("## Full run")[1]
    assert cells(full, "train_124m")[4:] == ["651,000 tokens/s", "490,000", "1.33x", "650,000", "yes"]
    assert cells(full, "attention")[-1] == "no"
    assert cells(full, "train_350m")[3:5] == ["error: out of memory", "not measured"]


def test_attention_is_drawn_over_the_length(tmp_path: Path) -> None:
    """A panel a head dimension and direction, a line a provider; grouped heads, other cases and failures left out."""
    infos = []
    for rows, columns in ((1024, 64), (2048, 64), (1024, 128)):
        heads = 2048 // columns
        shape = f"rows{rows}-columns{columns}-batch{16384 // rows}-heads{heads}-kv_heads{heads}"
        lines = ("fastlm", "sdpa-cudnn", "sdpa-flash-deterministic")
        infos += [info("scaled_dot_product_attention.forward", name, 1e-3, f"{shape}-causal") for name in lines]
        infos.append(info("scaled_dot_product_attention.forward", "eager", 1e-3, shape))
        infos.append(
            info("scaled_dot_product_attention.forward", "sdpa-math", None, f"{shape}-causal", reason="memory")
        )
    results = load([benchmark_file(tmp_path, infos)])
    series = plots._series(results)
    assert {key: sorted(points) for key, points in series.items()} == {
        ((columns, "forward"), provider): lengths
        for columns, lengths in ((64, [1024, 2048]), (128, [1024]))
        for provider in ("fastlm", "sdpa-cudnn", "sdpa-flash-deterministic")
    }
    assert plots.attention(results, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(PNG)
    assert not plots.attention(load([benchmark_file(tmp_path, NORM)]), tmp_path / "none.png")


def kernel_names() -> list[str]:
    """What the benches write under `kernel`, names quoted and expressions as they stand."""
    found: list[ast.expr] = []
    for path in sorted([*(ROOT / "bench").glob("bench_*.py"), ROOT / "bench/training.py"]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = (getattr(key, "value", None) for key in node.keys)
                found += [value for key, value in zip(keys, node.values, strict=True) if key == "kernel"]
            elif isinstance(node, ast.Call):
                found += [word.value for word in node.keywords if word.arg == "kernel"]
    branches = ((value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,) for value in found)
    return [ast.unparse(value) for either in branches for value in either]


# What stands for an expression that a bench writes under `kernel`.
EXPRESSIONS = {
    "f'{entry.kernel.name}.{direction}'": [f"{k.name}.{d}" for k in TIMED for d in DIRECTIONS],
    "f'hf.{name}'": [f"hf.{name}" for name in bench_hf.LARGE],
    "KERNELS[index].name": [],  # of binaries, which no table of times holds
}


def test_whatever_a_bench_writes_stands_in_the_report(tmp_path: Path) -> None:
    """One record of every `kernel` in the benches' sources, and of one that nobody knows yet."""
    names = ["adamw.new"]
    for written in kernel_names():
        names += EXPRESSIONS[written] if written in EXPRESSIONS else [ast.literal_eval(written)]
    assert len(names) > len(TIMED) * len(DIRECTIONS) + 6
    infos = [info(name, "fastlm", 2e-6, f"shape-{number}-") for number, name in enumerate(names)]
    out = tmp_path / "out"
    report.main([str(benchmark_file(tmp_path, infos)), "--out", str(out)])
    text = (out / "report.md").read_text()
    assert [name for number, name in enumerate(names) if f"| shape-{number}- " not in text] == []
    titles = re.findall("^### (.*)$", text.split("## adamw")[1].split("\n## ")[0], re.MULTILINE)
    assert titles == ["step", "clipped", "host time of a step over many small tensors", "new"]


def test_training_stands_in_a_table_of_its_own(tmp_path: Path) -> None:
    """Tokens a second, MFU, a ratio that does not count; what was skipped is not measured."""
    update = {"tokens_per_second": 1000.0, "mfu": 0.5, "mfu_causal": 0.45, "valid": False}
    update |= {"kernels": "triton", "attention": "sdpa", "compiled": False, "cuda_graphs": True}
    found = [info("train_step", "fastlm", 2.0, "gpt2-T1024", **update), info("train_step", "baseline", None, "xl")]
    found[1]["reason"] = "not measured: needs a GPU that holds it"
    found += [info("time_to_loss", "fastlm", 3.0, "L2", tokens=5000, reached=True)]
    text = tables.training_section(load([benchmark_file(tmp_path, found)]))
    expected = ["gpt2-T1024 bfloat16", "fastlm", "1,000", "0.00x (does not count)", "50 %", "45 %"]
    assert cells(text, "gpt2") == [*expected, *["not measured"] * 3, "triton kernels, sdpa attention, CUDA graphs"]
    assert cells(text, "xl")[2] == "not measured"
    assert cells(text, "L2")[2:5] == ["5,000", "3 s", "yes"]
    assert CAPTION in text


def test_hugging_face_models_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    """Tokens a second and memory beside the unpatched model's; who could not be measured says why."""
    ours = info("hf.llama", "fastlm", 2.0, "2x8", tokens_per_second=3000.0, peak_bytes=1 << 20, memory_ratio=1.6)
    rival = info("hf.llama", "liger", None, "2x8", reason="Liger is not installed")
    out = tmp_path / "out"
    report.main([str(benchmark_file(tmp_path, [ours], [rival])), "--out", str(out)])
    text = (out / "report.md").read_text().split("## Hugging Face models")[1].split("\n## ")[0]
    assert cells(text, "llama | 2x8 bfloat16 | fastlm")[3:] == ["3,000", "0.00x", "1 MiB", "1.60x"]
    assert cells(text, "llama | 2x8 bfloat16 | liger")[3:5] == ["none: Liger is not installed", "not measured"]
    assert text.endswith(f"{CAPTION}\n")


def bad_files(folder: Path) -> dict[str, Path]:
    contents = {
        "text": "hello\n",
        "list": "[1, 2]",
        "layout": '{"a": 1}',
        "empty": "",
        "row": json.dumps(SOURCE | {"rows": [{}]}),
    }
    contents |= {"nothing": json.dumps({"machine_info": SOURCE, "benchmarks": []})}
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(content)
    paths["binary"] = folder / "binary.json"
    paths["binary"].write_bytes(b"\xff\xfe\x00")
    return paths | {"missing": folder / "missing.json", "folder": folder}


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        "list",
        "layout",
        "empty",
        "row",
        "nothing",
        "binary",
        "missing",
        "folder",
        "other",
        "out",
        "below",
        "readme",
        "flag",
    ],
)
def test_bad_input_costs_one_line(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and nothing written."""
    good, out = benchmark_file(tmp_path, NORM), tmp_path / "out"
    arguments = [str(good), "--out", str(out)]
    if bad == "other":
        arguments.insert(1, str(full_run_file(tmp_path / "other", device="Another GPU")))
    elif bad == "out":
        arguments[2] = str(good)
    elif bad == "below":
        arguments[2] = str(good / "below")
    elif bad == "readme":
        arguments += ["--readme", str(good)]
    elif bad == "flag":
        arguments += ["--nonsense"]
    else:
        arguments[0] = str(bad_files(tmp_path)[bad])
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: report.main(arguments))
    assert exit.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert not out.exists()


def test_the_readme_is_what_the_report_would_write() -> None:
    """After a change of results, kernels or tables:
    python -m bench.report bench/results/cpu/kernels.json --out bench/results/cpu --readme README.md"""
    text = (ROOT / "README.md").read_text()
    assert text == report.with_tables(text, ROOT / "bench/results")


def test_the_committed_reports_are_what_the_report_would_write() -> None:
    """Their tables; and no result names a machine or a path."""
    folders = [path for path in (ROOT / "bench/results").iterdir() if (path / "report.md").exists()]
    assert folders
    for folder in folders:
        results = load(path for path in (folder / "kernels.json", folder / "full_run.json") if path.exists())
        drawn = [name for name in plots.PLOTS if (folder / name).exists()]
        text = (folder / "report.md").read_text()
        assert text == tables.report(results, drawn)
        assert not any(word in text + (folder / "kernels.json").read_text() for word in ("/home", "/root", "/tmp"))
