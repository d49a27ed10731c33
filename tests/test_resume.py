"""A run continued from a checkpoint is the run that was never stopped."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_model import build
from tiny import events, final_weights, flags, record, spawn, train, write_corpus

from fastlm import checkpoint
from fastlm import train as train_module
from fastlm.arguments import build as build_config
from fastlm.arguments import flatten
from fastlm.config import Config, OptimConfig, load_config
from fastlm.errors import InputError
from fastlm.optim import build_optimizer
from fastlm.train import Trainer, main

EVERY = ["--train.eval_every", "3", "--train.save_every", "2", "--train.sample_every", "4"]
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


class Crash(BaseException):
    """What a killed process looks like from inside: no handler runs, no file is closed in order."""


def train_until(step: int, corpus: Path, out: Path, *more: str) -> None:
    """Train and die in the middle of the update after `step`."""
    original = Trainer._update

    def update(self: Trainer, batch: object) -> object:
        if self.state.step == step:
            raise Crash
        return original(self, batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Crash):
            train(corpus, out, *more, steps=STEPS)


VARIANTS = {
    "modern-muon": [],
    "modern-dropout-micro": ["--model.dropout", "0.1", "--train.micro_batch_size", "2"],
    "modern-bf16-micro": ["--train.precision", "bf16", "--train.micro_batch_size", "2"],
    "gpt2-adamw": ["--model.family", "gpt2", "--optim.name", "adamw", "--optim.lr", "0.01"],
    "adamw-8-bits": ["--optim.name", "adamw", "--optim.state_bits", "8", "--optim.lr", "0.01", "--model.n_embd", "32"],
    **{
        name: ["--optim.name", name, "--optim.lr", "0.01"] for name in ("adam", "sgd", "adagrad", "adadelta", "rmsprop")
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("step", [5, 8])
def test_bit_for_bit(name: str, step: int, corpus: Path, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(corpus, whole, *EVERY, *VARIANTS[name], steps=STEPS)
    train_until(step, corpus, broken, *EVERY, *VARIANTS[name])
    assert train(corpus, broken, *EVERY, *VARIANTS[name], steps=STEPS) == 0
    assert record(broken) == record(whole)
    assert final_weights(broken) == final_weights(whole)
    for file in ("optimizer.safetensors", "config.yaml", "tokenizer.json"):
        newest = f"checkpoints/step_{STEPS:08d}/{file}"
        assert (broken / newest).read_bytes() == (whole / newest).read_bytes(), file
    assert (broken / "samples.md").read_text() == (whole / "samples.md").read_text()
    starts = [line["step"] for line in events(broken, "start")]
    assert starts == [0, step // 2 * 2]


def test_killed_three_times_and_a_flipped_byte(corpus: Path, tmp_path: Path):
    """The real thing: SIGKILL from outside, after a checkpoint, three times; then the newest checkpoint goes bad."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = 400
    arguments = [*EVERY[:2], "--train.save_every", "20", "--train.log_every", "7"]
    train(corpus, whole, *arguments, steps=steps)
    for kill in range(3):
        process = spawn(flags(corpus, broken, *arguments, steps=steps), OMP_NUM_THREADS="1")
        wait_for_save(broken, process, at_least=60 * (kill + 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    newest = max((broken / "checkpoints").glob("step_*"))
    flip_byte(newest / "model.safetensors")
    process = spawn(flags(corpus, broken, *arguments, steps=steps), OMP_NUM_THREADS="1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"skipped {newest.name}: model.safetensors differs from its hash" in out
    assert record(broken) == record(whole)
    assert final_weights(broken) == final_weights(whole)
    assert len(events(broken, "start")) == 4
    seconds = [line["seconds"] for line in events(broken)]
    assert seconds == sorted(seconds), "time adds up over restarts"


def wait_for_save(out: Path, process: "subprocess.Popen[str]", at_least: int) -> None:
    """Until a checkpoint of step `at_least` or later is complete."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if any(int(path.name[5:]) >= at_least for path in (out / "checkpoints").glob("step_*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {at_least}: {process.communicate()}")


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_boundary(number: int, code: int, corpus: Path, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ["--train.save_every", "null", "--train.eval_every", "null"]
    train(corpus, whole, *arguments, steps=300)
    process = spawn(flags(corpus, broken, *arguments, steps=300), OMP_NUM_THREADS="1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "saved at step" in out
    assert train(corpus, broken, *arguments, steps=300) == 0
    final = [[line for line in record(run) if line["event"] != "save"] for run in (broken, whole)]
    assert final[0] == final[1]
    assert final_weights(broken) == final_weights(whole)


def test_the_second_signal_leaves_at_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both signals arrive within one update: the process must not wait for its end."""
    left: list[int] = []

    def leave(code: int) -> None:
        left.append(code)
        raise Crash

    def update(self: Trainer, batch: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(Crash):
        train(corpus, tmp_path / "run")
    assert left == [143]


def test_handlers_are_put_back(corpus: Path, tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(corpus, tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_says_so_in_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(corpus, tmp_path / "run")
    before = record(tmp_path / "run")
    capsys.readouterr()
    assert train(corpus, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "finished at step 6" in out
    assert out.count("\n") <= 2
    assert record(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change",
    [
        ["--optim.lr", "0.5"],
        ["--model.n_layer", "2"],
        ["--seed", "9"],
        ["--data.seq_len", "8"],
        ["--train.batch_size", "4"],
        ["--train.steps", "99"],
    ],
    ids=lambda change: change[0],
)
def test_another_configuration_is_refused(change: list[str], corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(corpus, out)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError) as error:
        main(flags(corpus, out, *change))
    old = {"--optim.lr": 0.03, "--model.n_layer": 1, "--seed": 1234, "--data.seq_len": 16}
    old |= {"--train.batch_size": 8, "--train.steps": 6}
    assert str(error.value).startswith(f"{change[0]}: got {change[1]}; ")
    assert f" has {old[change[0]]}; " in str(error.value)
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("typed", [[], ["--train.cuda_graphs", "auto"], ["--model.kernels", "torch"]], ids=str)
def test_a_run_begun_on_a_gpu_goes_on_without_one(
    typed: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What was decided for the GPU is decided anew; the checkpoint is one that says what a GPU's would."""
    gpu = {"model.kernels": "triton", "model.attention": "flash", "train.cuda_graphs": True, "train.compile": True}
    dump = train_module.dump_config
    with monkeypatch.context() as patch:
        there = lambda cfg: dump(build_config(Config, flatten(cfg) | gpu | {"device": "cuda"}))  # noqa: E731
        patch.setattr(train_module, "dump_config", there)
        train_until(3, corpus, tmp_path / "run", "--train.save_every", "2")
    capsys.readouterr()
    assert train(corpus, tmp_path / "run", *typed, steps=STEPS) == 0
    told = capsys.readouterr().out
    assert "device: cpu, begun on cuda: results agree within rounding" in told
    assert "CUDA graphs: off (not on cpu)" in told
    cfg = load_config(max((tmp_path / "run/checkpoints").glob("step_*")) / "config.yaml")
    assert (cfg.model.kernels, cfg.model.attention, cfg.train.cuda_graphs) == ("torch", "sdpa", False)


def test_changed_data_is_refused(tmp_path: Path):
    corpus, out = write_corpus(tmp_path / "corpus.txt"), tmp_path / "run"
    train_until(5, corpus, out, *EVERY)
    corpus.write_text(corpus.read_text().replace("cat", "cow"))
    with pytest.raises(InputError, match="changed since"):
        train(corpus, out, *EVERY, steps=STEPS)


def test_a_kill_behind_the_last_checkpoint_leaves_no_gap(corpus: Path, tmp_path: Path):
    """The record is completed by the next start, which has nothing else to do."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(corpus, whole)
    train(corpus, broken)
    path = broken / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True)[:-2]))
    (broken / "loss.png").unlink()
    assert train(corpus, broken) == 0
    assert record(broken) == record(whole)
    assert (broken / "loss.png").exists()


def test_a_run_whose_checkpoints_are_all_bad_is_left_alone(corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(corpus, out, "--train.save_every", "2")
    for manifest in out.glob("checkpoints/*/MANIFEST.json"):
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="format 2"):
        train(corpus, out, "--train.save_every", "2")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path):
    """A name that we use too does not make it ours."""
    out = tmp_path / "project"
    (out / "checkpoints/step_00000500").mkdir(parents=True)
    (out / "checkpoints/step_00000500/weights").write_text("mine")
    (out / "config.yaml").write_text("my: precious\n")
    with pytest.raises(InputError, match="project"):
        train(corpus, out)
    (out / "checkpoints/step_00000500/weights").unlink()
    (out / "checkpoints/step_00000500").rmdir()
    with pytest.raises(InputError, match="my"):
        train(corpus, out)
    assert (out / "config.yaml").read_text() == "my: precious\n"
    (out / "config.yaml").unlink()
    (out / "metrics.jsonl").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        train(corpus, out)
    assert (out / "metrics.jsonl").read_text() == "mine"


def test_a_bad_checkpoint_is_put_aside_and_kept(corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train_until(5, corpus, out, *EVERY)
    flip_byte(out / "checkpoints/step_00000004/optimizer.safetensors")
    train(corpus, out, *EVERY, steps=STEPS)
    assert len(list(out.glob("checkpoints/bad-step_00000004-*"))) == 1
    assert events(out, "start")[-1]["step"] == 2


def test_a_run_without_a_checkpoint_is_still_a_run(corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train_until(1, corpus, out, *EVERY)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="--seed"):
        train(corpus, out, *EVERY, "--seed", "77", steps=STEPS)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_second_process_is_refused(corpus: Path, tmp_path: Path):
    from fastlm.run import lock_directory

    out = tmp_path / "run"
    train_until(5, corpus, out, *EVERY)
    before = (out / "metrics.jsonl").read_bytes()
    with lock_directory(out), pytest.raises(InputError, match="another process"):
        train(corpus, out, *EVERY, steps=STEPS)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert train(corpus, out, *EVERY, steps=STEPS) == 0, "the lock goes with its holder"


def test_several_processes_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for size in ("2", "many"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match="later version"):
            train(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_muons_step_counters_go_back_where_the_parameters_are():
    """As on a GPU: what is restored lies on the parameters' device, here `meta`."""
    model = build()
    optimizer = build_optimizer(OptimConfig(name="muon"), model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = checkpoint.optimizer_tensors(optimizer, model.named_parameters())
    elsewhere = build().to("meta")
    restored = build_optimizer(OptimConfig(name="muon"), elsewhere)
    checkpoint.restore_optimizer(restored, elsewhere.named_parameters(), saved)
    devices = {value.device.type for state in restored.state.values() for value in state.values()}
    assert devices == {"meta"}


def test_never_is_refused_where_a_run_is(corpus: Path, tmp_path: Path):
    train(corpus, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run"):
        train(corpus, tmp_path / "run", "--resume", "never")
    assert train(corpus, tmp_path / "new", "--resume", "never") == 0


def test_a_path_may_differ_and_branch(corpus: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(corpus, first)
    code = train(corpus, second, "--resume", str(first), "--optim.lr", "0.001", "--train.steps", "9")
    assert code == 0
    assert [line["step"] for line in events(second, "train")] == [7, 8, 9]
    assert events(second, "end")
    with pytest.raises(InputError, match="give more"):
        train(corpus, tmp_path / "third", "--resume", str(first))
    with pytest.raises(InputError, match=r"embed\.weight"):
        train(corpus, tmp_path / "third", "--resume", str(first), "--model.n_embd", "32", steps=9)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("bits", [("8", "32"), ("32", "8")], ids=str)
def test_the_averages_width_may_differ(
    bits: tuple[str, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wide = ["--optim.name", "adamw", "--model.n_embd", "64", "--optim.state_bits"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(corpus, first, *wide, bits[0], steps=3)
    assert train(corpus, second, "--resume", str(first), *wide, bits[1], steps=5) == 0
    assert f"optimizer: averages of {bits[0]} bits, kept in {bits[1]} from here on" in capsys.readouterr().out
    found = checkpoint.load(max((second / "checkpoints").glob("step_*"))).optimizer
    assert ("blocks.0.mlp.up.weight/fastlm/exp_avg" in found) == (bits[1] == "8")
    assert ("blocks.0.mlp.up.weight/exp_avg" in found) == (bits[1] == "32")


def test_a_run_without_a_checkpoint_starts_again(corpus: Path, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(corpus, whole, *EVERY, steps=STEPS)
    train_until(1, corpus, broken, *EVERY)
    train(corpus, broken, *EVERY, steps=STEPS)
    assert record(broken) == record(whole)


def test_what_a_killed_save_left_is_removed(corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train_until(5, corpus, out, *EVERY)
    shutil.copytree(out / "checkpoints/step_00000004", out / "checkpoints/.tmp-step_00000006-1")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    train(corpus, out, *EVERY, steps=STEPS)
    assert not list((out / "checkpoints").glob(".tmp*"))
    assert [line["step"] for line in events(out, "train")] == list(range(1, STEPS + 1))


def test_nothing_auto_is_left_in_the_stored_configuration(corpus: Path, tmp_path: Path):
    train(corpus, tmp_path / "run")
    stored = load_config(tmp_path / "run/config.yaml")
    assert stored.device == "cpu"
    assert stored.train.precision == "fp32"
    assert stored.train.compile is False
    assert (stored.model.kernels, stored.model.attention) == ("torch", "sdpa")
    assert (stored.model.n_kv_head, stored.model.max_seq_len) == (2, 16)
    assert (stored.model.tie_embeddings, stored.model.logit_softcap) == (False, 15.0)
    assert stored.train.micro_batch_size == 8
