"""One update, the loop, and what a run leaves behind."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import build, some_tokens
from tiny import SHAPE, events, final_weights, flags, record, spawn, train, write_corpus

from fastlm import checkpoint, log
from fastlm import train as train_module
from fastlm.config import OptimConfig
from fastlm.data import Batch
from fastlm.errors import GuardStop, InputError
from fastlm.model import GPT, hash32
from fastlm.optim import build_optimizer, qkv_split, set_lr
from fastlm.run import State, open_run
from fastlm.train import SKIPS_BEFORE_STOP, Trainer, main, train_step

OPTIMIZERS = ("muon", "adamw", "adam", "sgd", "adagrad", "adadelta", "rmsprop")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


def one_batch(batch_size: int = 8) -> Batch:
    tokens = some_tokens(batch_size)
    targets = tokens.roll(-1, 1)
    targets[1, 5:] = -100  # micro-batches hold unequal numbers of targets
    return Batch(tokens, targets, 0)


class TestStep:
    @pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
    @pytest.mark.parametrize("name", ["modern", "gpt2"])
    def test_micro_batches_add_up_to_the_batch(self, name: str, micro_batch_size: int):
        """1 x 8 = 8 x 1, dropout and ignored targets included, to the rounding of a sum taken in another order."""
        results = []
        for size in (8, micro_batch_size):
            model = build(name, dropout=0.2)
            optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.5, grad_clip=None), model)
            loss, norm = train_step(
                model, optimizer, one_batch(), micro_batch_size=size, seeds_B=hash32(torch.arange(8))
            )
            results.append((loss, norm, *model.parameters()))
        for whole, cut in zip(*results, strict=True):
            torch.testing.assert_close(cut.detach(), whole.detach(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_optimizer_lowers_the_loss(self, name: str):
        model = build()
        lr = {"muon": 0.02, "sgd": 0.1, "adadelta": 20.0, "adagrad": 0.03}.get(name, 0.003)
        optimizer = build_optimizer(OptimConfig(name=name, lr=lr, momentum=0.9), model)  # type: ignore[arg-type]
        losses = [float(train_step(model, optimizer, one_batch(), micro_batch_size=8)[0]) for _ in range(30)]
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_nan_changes_nothing(self, name: str):
        model = build()
        optimizer = build_optimizer(OptimConfig(name=name), model)  # type: ignore[arg-type]
        train_step(model, optimizer, one_batch(), micro_batch_size=8)
        named = list(model.named_parameters())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in checkpoint.optimizer_tensors(optimizer, named).items()
        }
        broken = model.blocks[0].mlp.up.weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[union-attr]
        _, norm = train_step(model, optimizer, one_batch(), micro_batch_size=8)
        broken.remove()
        assert not math.isfinite(float(norm))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        after = checkpoint.optimizer_tensors(optimizer, named)
        assert state.keys() == after.keys()
        for key, value in after.items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key

    def test_clipping_scales_the_gradient_to_the_bound(self):
        moves = []
        for clip in (None, 0.1):
            model = build()
            start = model.embed.weight.detach().clone()
            optimizer = build_optimizer(OptimConfig(name="sgd", lr=1.0, momentum=0.0, grad_clip=clip), model)
            _, norm = train_step(model, optimizer, one_batch(), micro_batch_size=8)
            moves.append(model.embed.weight.detach() - start)
        assert float(norm) > 0.1, "the norm is reported before clipping"
        torch.testing.assert_close(moves[1], moves[0] * 0.1 / float(norm), rtol=1e-4, atol=1e-6)


class TestOptimizerGroups:
    def test_muon_takes_the_blocks_matrices_and_nothing_else(self):
        model = build("modern-gqa")
        groups = build_optimizer(OptimConfig(name="muon", lr=0.5, adam_lr=0.25), model).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        muon = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
        rest = {names[id(p)] for group in groups if not group["use_muon"] for p in group["params"]}
        assert muon == {name for name in names.values() if name.startswith("blocks.")}
        assert rest == {"embed.weight", "head.weight"}
        assert {group["use_muon"]: group["lr"] for group in groups} == {True: 0.5, False: 0.25}
        assert all(sizes == [32, 16, 16] for sizes in qkv_split(model).values())

    def test_vectors_do_not_decay_and_embeddings_do(self):
        groups = build_optimizer(OptimConfig(name="adamw", weight_decay=0.1), build("gpt2")).param_groups
        assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [
            (0.1, {2}),
            (0.0, {1}),
        ]

    def test_the_schedule_scales_every_group(self):
        optimizer = build_optimizer(OptimConfig(name="muon", lr=0.5, adam_lr=0.25), build())
        assert set_lr(optimizer, 0.5) == 0.25
        assert set_lr(optimizer, 0.1) == 0.05, "from the base, not from the last value"
        assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.025}


class TestRun:
    def test_what_a_run_leaves(self, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        out = tmp_path / "run"
        every = ["--train.eval_every", "2", "--train.save_every", "2", "--train.sample_every", "4"]
        assert train(corpus, out, *every) == 0
        kinds = [(line["event"], line["step"]) for line in events(out)]
        assert kinds == [
            ("start", 0),
            ("eval", 0),
            ("train", 1),
            ("train", 2),
            ("eval", 2),
            ("save", 2),
            ("train", 3),
            ("train", 4),
            ("eval", 4),
            ("sample", 4),
            ("save", 4),
            ("train", 5),
            ("train", 6),
            ("eval", 6),
            ("sample", 6),
            ("save", 6),
            ("end", 6),
        ]
        train_keys = {"event", "step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
        assert all(set(line) == train_keys for line in events(out, "train"))
        assert [line["tokens"] for line in events(out, "train")] == [8 * 16 * k for k in range(1, 7)]
        assert [line["full"] for line in events(out, "eval")] == [False, False, False, True]
        assert {path.name for path in out.iterdir() if "tfevents" not in path.name} == {
            "config.yaml",
            "metrics.jsonl",
            "loss.png",
            "samples.md",
            "checkpoints",
            ".lock",
        }
        assert any("tfevents" in path.name for path in out.iterdir())
        assert len(list((out / "checkpoints").iterdir())) == 2, "the two newest; the best is among them"
        text = capsys.readouterr().out
        assert "parameters" in text
        assert "whole validation split" in text
        assert "kernels:" in text
        assert "attention:" in text

    def test_its_configuration_repeats_it(self, corpus: Path, tmp_path: Path):
        first, second = tmp_path / "first", tmp_path / "second"
        train(corpus, first, "--optim.lr", "0.02")
        assert main(["--config", str(first / "config.yaml"), "--out", str(second)]) == 0
        assert record(first) == record(second)
        assert final_weights(first) == final_weights(second)
        assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()

    def test_the_seed_matters(self, corpus: Path, tmp_path: Path):
        train(corpus, tmp_path / "a")
        train(corpus, tmp_path / "b", "--seed", "8")
        assert final_weights(tmp_path / "a") != final_weights(tmp_path / "b")

    def test_the_full_evaluation_covers_the_split(self, corpus: Path, tmp_path: Path):
        """Nats of every predicted character, over their bytes: recomputed here from the checkpoint's logits."""
        out = tmp_path / "run"
        train(corpus, out)
        run = open_run(str(out), "cpu")
        assert run.tokenizer is not None
        text = corpus.read_text()
        ids = torch.tensor(run.tokenizer.encode(text[int(len(text) * 0.9) :]))
        nats = []
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            logits = run.model(window[None, :-1])[0].detach().double()
            nats.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        loss = float(torch.cat(nats).mean())
        final = events(out, "eval")[-1]
        assert final["val_loss"] == pytest.approx(loss, rel=1e-5)
        assert final["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5), "ASCII: a byte a character"

    @pytest.mark.parametrize("family", ["modern", "gpt2"])
    def test_training_learns(self, family: str, corpus: Path, tmp_path: Path):
        out = tmp_path / "run"
        more = ["--model.family", family, "--optim.name", "muon" if family == "modern" else "adamw"]
        train(corpus, out, *more, "--optim.lr", "0.02", steps=80)
        first, last = (events(out, "eval")[k]["val_loss"] for k in (0, -1))
        assert last < 0.75 * first

    def test_epochs_count_windows(self, corpus: Path, tmp_path: Path):
        from tiny import SHAPE

        out = tmp_path / "run"
        arguments = ["--data.path", str(corpus), "--out", str(out), *SHAPE, "--train.epochs", "0.5"]
        assert main([*arguments, "--train.batch_size", "16"]) == 0
        characters = int(len(corpus.read_text()) * 0.9)
        assert events(out, "train")[-1]["step"] == math.ceil(0.5 * ((characters - 1) // 16) / 16)

    def test_a_time_limit_ends_the_run_whole(self, corpus: Path, tmp_path: Path):
        from tiny import SHAPE

        out = tmp_path / "run"
        arguments = ["--data.path", str(corpus), "--out", str(out), *SHAPE, "--train.max_seconds", "0.3"]
        assert main(arguments) == 0
        assert [line["event"] for line in events(out)][-4:] == ["eval", "sample", "save", "end"]
        assert events(out, "end")[0]["seconds"] >= 0.3
        rates = [line["lr"] for line in events(out, "train")]
        assert rates[-1] < rates[0], "the schedule follows the clock"

    def test_a_time_limit_needs_no_log_line_to_be_seen(self, corpus: Path, tmp_path: Path):
        quiet = ["--train.log_every", "1000000", "--train.eval_every", "null", "--train.save_every", "null"]
        arguments = ["--data.path", str(corpus), "--out", str(tmp_path / "run"), *SHAPE, *quiet]
        assert main([*arguments, "--train.max_seconds", "0.5"]) == 0
        assert events(tmp_path / "run", "end")

    def test_fewer_windows_than_a_batch(self, tmp_path: Path):
        corpus = write_corpus(tmp_path / "small.txt", sentences=5)
        assert train(corpus, tmp_path / "run", "--data.val_fraction", "0.3") == 0
        assert events(tmp_path / "run", "end")

    def test_foreign_shards_train_without_a_tokenizer(self, tmp_path: Path):
        import numpy as np

        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 4000
        ids = np.random.default_rng(0).integers(0, 50, 4000).astype("<u2")
        (tmp_path / "train.bin").write_bytes(header.tobytes() + ids.tobytes())
        out = tmp_path / "run"
        assert train(tmp_path / "train.bin", out, "--data.tokenizer", "bpe", "--data.vocab_size", "300") == 0
        assert events(out, "eval")[-1]["bits_per_byte"] is None


class TestGuards:
    def poison(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        """Make the gradient of the updates after `steps` not finite."""
        original = Trainer._update

        def update(self: Trainer, batch: Batch) -> object:
            handle = None
            if self.state.step in steps:
                handle = self.model.embed.weight.register_hook(lambda gradient: gradient / 0)
            try:
                return original(self, batch)
            finally:
                if handle is not None:
                    handle.remove()

        monkeypatch.setattr(Trainer, "_update", update)

    def test_a_skip_is_counted_and_training_goes_on(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        self.poison(monkeypatch, {2, 4})
        out = tmp_path / "run"
        assert train(corpus, out) == 0
        assert [(line["step"], line["skipped"]) for line in events(out, "skip")] == [(3, 1), (5, 2)]
        norms = {line["step"]: line["grad_norm"] for line in events(out, "train")}
        assert norms[3] is None
        assert norms[4] > 0
        state = json.loads((out / "checkpoints/step_00000006/state.json").read_text())
        assert state["skipped"] == 2
        assert state["samples"] == 48, "a skipped update consumes its samples"

    def test_many_in_a_row_stop_the_run(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        self.poison(monkeypatch, set(range(4, 99)))
        out = tmp_path / "run"
        with pytest.raises(GuardStop, match=r"step_00000012"):
            train(corpus, out, "--train.save_every", "4", steps=60)
        assert len(events(out, "skip")) == SKIPS_BEFORE_STOP
        assert events(out)[-1]["event"] == "skip"

    @pytest.mark.parametrize(("full_at", "saved", "code"), [(4, [2, 6], 0), (6, [2, 4], 1)])
    def test_a_full_disk_stops_saves_and_not_training(
        self,
        full_at: int,
        saved: list[int],
        code: int,
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        original = checkpoint.save

        def save(run_dir: Path, step: int, **parts: object) -> Path:
            if step == full_at:
                raise checkpoint.SaveFailed("checkpoint not written: No space left on device")
            return original(run_dir, step, **parts)  # type: ignore[arg-type]

        monkeypatch.setattr(checkpoint, "save", save)
        out = tmp_path / "run"
        assert train(corpus, out, "--train.save_every", "2") == code
        assert [line["step"] for line in events(out, "save")] == saved
        err = capsys.readouterr().err
        assert "No space left on device" in err
        assert ("last step's checkpoint is missing" in err) == bool(code)


def test_what_cannot_be_written_beside_the_record_stops_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "append_sample", full)
    monkeypatch.setattr(log.EventFile, "_write_waiting", full)
    assert train(corpus, tmp_path / "run") == 0
    err = capsys.readouterr().err
    assert "samples.md cannot be written" in err
    assert err.count("TensorBoard's file cannot be written") == 1
    assert events(tmp_path / "run", "end")


def test_output_that_the_terminal_cannot_show_stops_nothing(tmp_path: Path):
    corpus = tmp_path / "emoji.txt"
    corpus.write_text("smile 😀 and wave 👋\n" * 300)
    process = spawn(flags(corpus, tmp_path / "run", steps=2), PYTHONIOENCODING="ascii")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_tied_weights_are_one_tensor_after_loading(corpus: Path, tmp_path: Path):
    train(corpus, tmp_path / "run", "--model.family", "gpt2", "--optim.name", "adamw")
    model: GPT = open_run(str(tmp_path / "run"), "cpu").model
    assert model.head.weight is model.embed.weight


def test_state_is_all_json(corpus: Path, tmp_path: Path):
    train(corpus, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step_00000006/state.json").read_text())
    assert {field.name for field in dataclasses.fields(State)} <= set(state)


def test_wrong_values_leave_nothing(corpus: Path, tmp_path: Path):
    with pytest.raises(InputError, match="seq_len"):
        train(corpus, tmp_path / "run", "--data.seq_len", "999999")
    assert not (tmp_path / "run").exists()


class TestPaths:
    """The same mathematics by other means."""

    @pytest.mark.needs_interpreter
    @pytest.mark.parametrize("family", ["modern", "gpt2"])
    def test_kernels_train_as_pytorchs_ops_do(self, family: str, corpus: Path, tmp_path: Path):
        """The Triton kernels, in the interpreter, inside a whole run."""
        more = ["--model.family", family, "--optim.name", "adamw", "--optim.lr", "0.01", "--train.eval_every", "null"]
        train(corpus, tmp_path / "torch", *more, "--model.kernels", "torch", steps=3)
        more += ["--model.kernels", "triton", "--model.attention", "triton"]
        arguments = flags(corpus, tmp_path / "triton", *more, steps=3)
        # The interpreter takes a third of a second for a token: the sample at the end is a short one.
        short = "import fastlm.samples, runpy; fastlm.samples.SAMPLE_TOKENS = 8; "
        short += "runpy.run_module('fastlm.train', run_name='__main__')"
        command, environment = [sys.executable, "-c", short, *arguments], os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "kernels: fastlm's Triton kernels" in done.stdout
        assert "attention: fastlm's Triton kernel, as asked" in done.stdout
        losses = [[line["loss"] for line in events(tmp_path / name, "train")] for name in ("torch", "triton")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        same = final_weights(tmp_path / "torch") == final_weights(tmp_path / "triton")
        assert not same, "bitwise equal sums would mean that no kernel ran"

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo asks non-leaf tensors, and hides it elsewhere
    def test_compiled_equals_eager(self, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        import torch._dynamo

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        dropout = ["--model.dropout", "0.1"]
        train(corpus, tmp_path / "eager", *dropout, steps=4)
        more = ["--train.compile", "true", "--train.check_compile", "true", "--train.recompute", "activation"]
        train(corpus, tmp_path / "compiled", *dropout, *more, steps=4)
        out = capsys.readouterr().out
        assert "compile: the first update took" in out
        assert out.count("check_compile: at most") == 3
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "evaluations and samples compile nothing"
        assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
        losses = [[line["loss"] for line in events(tmp_path / name, "train")] for name in ("eager", "compiled")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    @pytest.mark.parametrize("name", ["gpt2", "gpt2-no-bias"])
    def test_a_forward_pass_on_a_gpu_in_bf16_type_checks(self, name: str):
        """Shapes, dtypes and devices on CUDA by fake tensors: no GPU is needed.

        A CPU build of torch has no autograd for CUDA tensors and cannot slice them, which the rotary reference does.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        cfg = build(name, dropout=0.1, attention="triton").cfg
        with FakeTensorMode(), torch.no_grad():
            model = GPT(cfg, 61, compute_dtype=torch.bfloat16)
            for module in model.modules():
                for group in (module._parameters, module._buffers):
                    for key, value in group.items():
                        if value is not None:
                            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                            group[key] = torch.nn.Parameter(fake) if group is module._parameters else fake  # type: ignore[assignment]
            tokens = torch.empty(4, 24, dtype=torch.int64, device="cuda")
            seeds = torch.empty(4, dtype=torch.int64, device="cuda")
            hidden = model.hidden(tokens, seeds_B=seeds)
            assert (hidden.device.type, hidden.dtype, hidden.shape) == ("cuda", torch.bfloat16, (4, 24, 32))
            loss = model(tokens, tokens, num_items=(tokens != -100).sum(), seeds_B=seeds)
            assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
