"""The README is true: its commands run, its tables list what there is, its figures are those on record.

So are the tables of the pages in docs that it leads to.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm_kernels as fk
from fastlm.config import parse_config, presets
from fastlm.errors import InputError
from fastlm.flops import training_flops
from fastlm.resolve import resolve_model
from fastlm_kernels.optim.steps import bytes_per_parameter
from fastlm_kernels.registry import KERNELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def table(first_column: str, text: str = README) -> list[list[str]]:
    """The rows, cell by cell, of the table whose header begins with `first_column`."""
    lines = text.split(f"| {first_column} |", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_two_commands_do_all_the_set_up():
    installs = [command for command in COMMANDS if command.startswith("pip install")]
    assert installs == [
        "pip install -e . && python -m fastlm.train",
        "pip install -e '.[test]' && pytest -n auto --dist loadgroup",
    ]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the first command leaves behind once the package is installed: (run directory, what it printed)."""
    folder = tmp_path_factory.mktemp("first_command")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Its share of the cores: a thread more than there are free cores makes it many times slower.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    command = COMMANDS[0].split("&& ")[1].replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(
        [*shlex.split(command), "--device", "cpu"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run, done.stdout


# One worker runs it for all that use it.
@pytest.mark.xdist_group("first command")
def test_the_first_command_trains_a_model_worth_having(default_run: tuple[Path, str]):
    run, out = default_run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = next(line for line in lines if line.get("full"))
    assert final["bits_per_byte"] < 2.3
    sample = [line for line in lines if line["event"] == "sample"][-1]
    assert sample["tokenizes"] >= 0.5
    assert f"{final['bits_per_byte']:.4f} bits per byte (whole validation split)" in out
    assert f"{sample['tokenizes']:.0%} of its lines tokenize" in out
    assert lines[-1]["event"] == "end"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("config.yaml", "samples.md"):
        assert (run / name).stat().st_size > 0
    newest = max((run / "checkpoints").iterdir())
    files = {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "config.yaml",
        "tokenizer.json",
        "MANIFEST.json",
    }
    assert {path.name for path in newest.iterdir()} == files


@pytest.mark.xdist_group("first command")
@pytest.mark.parametrize("module", ["generate", "evaluate"])
def test_its_model_can_be_used(module: str, default_run: tuple[Path, str]):
    command = next(command for command in COMMANDS if f"fastlm.{module}" in command)
    words = shlex.split(command.replace("runs/notes", str(default_run[0])))
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # set for other programs, it must not slow this one down
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    if module == "generate":
        assert done.stdout.startswith("Once")
    else:
        assert set(json.loads(done.stdout)) >= {"loss", "perplexity", "bits_per_byte", "accuracy"}


def test_the_default_stays_within_its_budget():
    cfg = parse_config(["--device", "cpu"])
    resolve_model(cfg)
    assert training_flops(cfg, 2048, cfg.train.steps) <= 8e12


def test_training_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = [command for command in COMMANDS if command.startswith("python -m fastlm.train")]
    assert len(commands) >= 2
    for command in commands:
        parse_config([*shlex.split(command)[3:], "--device", "cpu"])


def test_the_error_shown_is_the_error_given():
    shown = re.search(r"^    (error: .*)$", README, re.MULTILINE)
    assert shown is not None
    with pytest.raises(InputError) as error:
        parse_config(["--train.step", "500"])
    assert f"error: {error.value}" == shown[1]


def test_figures_are_those_on_record():
    record = json.loads((ROOT / "bench/results/cpu/training.json").read_text())
    value = {row["name"]: row["value"] for row in record["rows"]}
    seeds = [number for name, number in value.items() if ".seed" in name]
    assert value["nanogpt-cpu.val_loss.mean"] == pytest.approx(sum(seeds) / len(seeds), abs=5e-5)
    assert [row[1] for row in table("run")] == [
        f"{value['default.bits_per_byte']:.3f} bits per byte",
        f"{value['default.lines_that_tokenize']:.0%}".replace("%", " %"),
        f"{value['nanogpt-cpu.val_loss.mean']:.3f} nats a character",
    ]
    assert not re.search(r"[A-Z]+_TABLE|TODO|TBD", README)


def test_every_preset_is_listed():
    listed = [name for row in table("preset") for name in names(row[0])]
    assert sorted(listed) == sorted(presets())


def test_every_public_function_is_listed_with_its_kernel():
    with_kernel = [name for row in table("function") if row[1] != "not yet" for name in names(row[0])]
    with_kernel.remove("optim.*")  # no function of tensors: its kernels stand in optim/steps.py
    with_kernel.remove("varlen_attn")  # by the kernels of scaled_dot_product_attention, the entry before it
    assert with_kernel == [kernel.name for kernel in KERNELS]
    listed = {name for row in table("function") for name in names(row[0])}
    functions = {name for name in fk.__all__ if callable(getattr(fk, name)) and name.islower()}
    assert listed - {"optim.*"} == functions - {"backend", "explain", "patch", "unpatch"}


def test_the_bytes_of_an_update_are_the_reports():
    fp32, bf16 = torch.float32, torch.bfloat16
    clip, both = {"max_grad_norm": 1.0}, {"skip_nonfinite": True, "zero_grads": True}
    eight, rounding = {"state_bits": 8}, {"stochastic_rounding": True}
    cases = [({}, fp32), (clip, fp32), (both, fp32), (eight, fp32), ({"master_weights": True}, bf16)]
    cases += [(rounding, bf16), (rounding | eight, bf16), ({}, bf16)]
    rows = table("AdamW", (ROOT / "docs" / "optimizers.md").read_text())
    assert [int(row[1]) for row in rows] == [bytes_per_parameter("AdamW", *case) for case in cases]
    assert [int(row[2]) for row in rows] == [state_bytes(*case) for case in cases]


def state_bytes(options: dict[str, object], dtype: torch.dtype) -> int:
    """Whole bytes that AdamW keeps for each element of a large parameter, the step count left out."""
    p = torch.zeros(64, 128, dtype=dtype, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = fk.optim.AdamW([p], **options)  # type: ignore[arg-type]
    optimizer.step()
    return sum(t.numel() * t.element_size() for key, t in optimizer.state[p].items() if key != "step") // p.numel()


def test_the_python_example_runs():
    x, branch, h = torch.randn(3, 4, 1024).unbind()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    scope = {"x": x, "branch": branch, "h": h, "weight": torch.randn(1024), "model": model}
    scope |= {"head": torch.randn(50, 1024), "targets": torch.arange(4)}
    exec(PYTHON[0], scope)
    assert torch.equal(scope["h"], branch + h)
