"""The training step's forms: captured, with masters, padded, compiled; what none of them may do."""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import build, some_tokens
from test_resume import STEPS, train_until
from tiny import events, final_weights, record, train, write_corpus
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm_kernels as fk
from fastlm import resolve, step_profile
from fastlm import train as train_module
from fastlm.capture import CapturedStep, CaptureFailed
from fastlm.compiled import check_compiled, compile_block, compile_note
from fastlm.config import Config, ModelConfig, OptimConfig, TrainConfig
from fastlm.data import Batch
from fastlm.errors import GuardStop, InputError
from fastlm.flops import flops_per_token
from fastlm.memory import block_bytes, stem_bytes, step_memory
from fastlm.model import GPT, Block, flash_attention, hash32
from fastlm.optim import build_optimizer, set_lr
from fastlm.resolve import resolve_model
from fastlm.train import accumulate, train_step
from fastlm.upload import AHEAD, uploaded
from fastlm.weights import MASTER, model_tensors, narrow, optimizer_tensors, restore_optimizer

SEEDS = hash32(torch.arange(8))


def model_of(name: str = "modern", dtype: torch.dtype = torch.float32, multiple: int = 1, **options: Any) -> GPT:
    """`build`'s model, computing in `dtype`, its head padded."""
    plain = build(name, dropout=0.1, n_layer=options.pop("n_layer", 2))
    model = GPT(plain.cfg, 61, compute_dtype=dtype, vocab_multiple=multiple, **options)
    model.load_state_dict(plain.state_dict())
    return model


def batches(count: int) -> list[Batch]:
    found = []
    for seed in range(count):
        tokens = some_tokens(8, seed=seed)
        targets = tokens.roll(-1, 1)
        targets[1, 5:] = -100
        found.append(Batch(tokens, targets, 8 * seed))
    return found


class Replays:
    """A recorder whose replays run the work; `silent` ones do nothing, as recording itself does nothing."""

    def __init__(self, silent: bool = False):
        self.silent = silent

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        return (lambda: None) if self.silent else work


def captured(model: GPT, optimizer: torch.optim.Optimizer, micro: int, silent: bool = False) -> CapturedStep:
    return CapturedStep(partial(accumulate, model), optimizer, Replays(silent), micro_batch_size=micro)


class TestCapture:
    @pytest.mark.parametrize("micro", [8, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["muon", "adamw"])
    def test_replays_are_the_eager_step_bit_for_bit(self, name: str, dtype: torch.dtype, micro: int):
        """The schedule, dropout and gradients at fixed addresses included."""
        results = []
        rule = OptimConfig(name=name, lr=0.02, weight_decay=0.1)  # type: ignore[arg-type]
        for capture in (False, True):
            model = model_of(dtype=dtype)
            optimizer = build_optimizer(rule, model, captured=True)
            narrow(model, optimizer, accumulate=micro < 8)
            eager = partial(train_step, model, optimizer, micro_batch_size=micro)
            step = captured(model, optimizer, micro) if capture else eager
            seen, addresses = [], set()
            for number, batch in enumerate(uploaded(batches(4), torch.device("cpu"))):
                set_lr(optimizer, 1 / (number + 1))
                assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02 / (number + 1))
                seen.append(step(batch, seeds_B=SEEDS + number))
                addresses.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.grad is not None))
            assert len(addresses) == 1
            if capture:
                summed = {p.grad.dtype for p in model.parameters() if p.grad is not None}
                assert summed == {torch.float32 if micro < 8 else dtype}
            assert len({float(loss) for loss, _ in seen}) == 4, "results are tensors of their own"
            results.append([*sum(seen, ()), *model_tensors(model, optimizer).values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("name", ["muon", "adamw", "adagrad", "sgd"])
    def test_warming_up_and_recording_leave_no_trace(self, name: str):
        model = model_of()
        rule = OptimConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
        optimizer = build_optimizer(rule, model, captured=True)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = {key: torch.as_tensor(v).clone() for key, v in optimizer_tensors(model, optimizer).items()}
        generator = torch.get_rng_state()
        captured(model, optimizer, 4, silent=True)(batches(1)[0], SEEDS)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        for key, value in optimizer_tensors(model, optimizer).items():
            assert torch.equal(torch.as_tensor(value), state.get(key, torch.zeros_like(torch.as_tensor(value)))), key
        assert int(optimizer.skipped_steps) == 0  # type: ignore[attr-defined]
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), generator)

    def test_the_host_is_a_few_updates_ahead_at_most(self, monkeypatch: pytest.MonkeyPatch):
        """Streams that keep order: of the updates handed out, all but the last few must be over."""
        ends: list[int] = []  # of the updates queued, in order; those waited for are over

        def event(number: int) -> Any:
            return types.SimpleNamespace(synchronize=lambda: ends.append(number))

        number = itertools.count()
        side = types.SimpleNamespace(record_event=lambda: None)
        current = types.SimpleNamespace(wait_event=lambda _: None, record_event=lambda: event(next(number)))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
        here = types.SimpleNamespace(to=lambda *_, **__: here, record_stream=lambda _: None, device="cuda")
        given = [Batch(here, here, n) for n in range(12)]  # type: ignore[arg-type]
        for n, batch in enumerate(uploaded(given, torch.device("cuda"))):
            assert batch.first_sample == n
            assert ends == list(range(max(0, n - AHEAD)))

    def test_a_run_of_replays_resumes_bit_for_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A whole run with a recorder of this file's, stopped and continued; one that cannot record trains as well."""
        corpus = write_corpus(tmp_path / "corpus.txt")
        monkeypatch.setattr(resolve, "_cuda_graphs", lambda cfg, device: (True, "CUDA graphs: on"))
        more = ["--train.micro_batch_size", "4", "--train.precision", "bf16", "--train.save_every", "2"]
        for name, recorder in (("whole", Replays), ("broken", Replays), ("failing", Failing)):
            monkeypatch.setattr(train_module, "CudaRecorder", lambda device, recorder=recorder: recorder())
            if name == "broken":
                train_until(5, corpus, tmp_path / name, *more)
            train(corpus, tmp_path / name, *more, steps=3 if name == "failing" else STEPS)
        assert final_weights(tmp_path / "broken") == final_weights(tmp_path / "whole")
        assert record(tmp_path / "broken") == record(tmp_path / "whole")
        losses = [[line["loss"] for line in events(tmp_path / name, "train")][:2] for name in ("whole", "failing")]
        assert losses[0] == losses[1], "the rate falls sooner in the shorter run, from its third update on"
        assert [line["step"] for line in events(tmp_path / "broken", "start")] == [0, 4]

    def test_what_does_not_fit_says_what_would(self):
        model = model_of()
        optimizer = build_optimizer(OptimConfig(), model, captured=True)
        recorder = Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        step = CapturedStep(partial(accumulate, model), optimizer, recorder, micro_batch_size=4)
        with pytest.raises(CaptureFailed, match=r"^out of memory; a smaller --train\.micro_batch_size"):
            step(batches(1)[0], SEEDS)

    @pytest.mark.parametrize(("graphs", "times"), [(True, 1), (False, 3)])
    def test_compiled_is_compared_before_the_step_is_recorded(
        self, graphs: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        steps: list[int] = []
        monkeypatch.setattr(resolve, "_cuda_graphs", lambda cfg, device: (graphs, "CUDA graphs: a test's"))
        monkeypatch.setattr(train_module, "CudaRecorder", lambda device: Replays())
        monkeypatch.setattr(train_module, "compile_block", lambda model: None)
        monkeypatch.setattr(train_module.Trainer, "_check_compiled", lambda self, batch: steps.append(self.state.step))
        more = ["--train.compile", "true", "--train.check_compile", "true"]
        train(write_corpus(tmp_path / "corpus.txt"), tmp_path / "run", *more, steps=4)
        assert steps == list(range(times))


class Failing(Replays):
    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error or RuntimeError("operation not permitted when stream is capturing")

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        raise self.error


class TestWeights:
    @pytest.mark.parametrize(("dtype", "multiple"), [(torch.bfloat16, 1), (torch.float32, 128), (torch.bfloat16, 128)])
    @pytest.mark.parametrize("name", ["modern", "gpt2"])
    def test_a_checkpoint_goes_on_bit_for_bit(self, name: str, dtype: torch.dtype, multiple: int):
        """Masters, moments and the head's padding are made anew from what a checkpoint holds."""
        rule = OptimConfig(name="muon" if name == "modern" else "adamw", lr=0.02, weight_decay=0.1)

        def start(weights: dict[str, Any], state: dict[str, Any]) -> tuple[GPT, torch.optim.Optimizer]:
            model = model_of(name, dtype, multiple)
            model.load_state_dict(weights)
            optimizer = build_optimizer(rule, model)
            restore_optimizer(model, optimizer, state)
            narrow(model, optimizer, accumulate=False)
            return model, optimizer

        def run(pair: tuple[GPT, torch.optim.Optimizer], part: list[Batch]) -> tuple[dict[str, Any], dict[str, Any]]:
            for batch in part:
                train_step(*pair, batch, micro_batch_size=8, seeds_B=SEEDS)
            weights, state = model_tensors(*pair), optimizer_tensors(*pair)
            return (*({key: torch.as_tensor(v).clone() for key, v in part.items()} for part in (weights, state)),)  # type: ignore[return-value]

        initial = model_of(name).state_dict()
        whole = run(start(initial, {}), batches(5))
        halves = run(start(*run(start(initial, {}), batches(5)[:3])), batches(5)[3:])
        for a, b in zip(whole, halves, strict=True):
            assert a.keys() == b.keys()
            assert [key for key in a if not torch.equal(a[key], b[key])] == []
        assert {tensor.dtype for tensor in whole[0].values()} == {torch.float32}
        assert whole[0]["head.weight"].shape == (61, 32)
        assert not any(MASTER in key for key in whole[1])
        assert whole[1]["embed.weight/exp_avg"].shape == (61, 32)

    @pytest.mark.parametrize(("before", "after"), [(1, 128), (128, 1)])
    @pytest.mark.parametrize("width", [32, 128])
    def test_averages_of_8_bits_follow_the_padding(self, before: int, after: int, width: int):
        """Of a width of 32 the head has 8 bits with its padding only."""

        def start(multiple: int) -> tuple[GPT, torch.optim.Optimizer]:
            model = GPT(build("modern", n_layer=1, n_embd=width).cfg, 61, vocab_multiple=multiple)
            return model, build_optimizer(OptimConfig(name="adamw", state_bits=8), model)

        def state_of(pair: tuple[GPT, torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
            return {key: torch.as_tensor(value).clone() for key, value in optimizer_tensors(*pair).items()}

        first, second = start(before), start(after)
        first[0].init_weights(torch.Generator().manual_seed(0))
        for batch in batches(2):
            train_step(*first, batch, micro_batch_size=8)
        saved = state_of(first)
        restore_optimizer(*second, saved)
        second[0].load_state_dict(model_tensors(*first))
        again = start(before)
        restore_optimizer(*again, state_of(second))
        whole, back = (pair[1].state[pair[0].head.weight] for pair in (first, again))
        low = "fastlm/exp_avg_low"
        if width == 128:
            assert saved[f"head.weight/{low}"].numel() == 61
            assert second[1].state[second[0].head.weight][low].numel() == (61 if after == 1 else 128)
            assert all(torch.equal(whole[key][:61], back[key][:61]) for key in whole if key != "step")
        for pair in (first, second):
            train_step(*pair, batches(3)[2], micro_batch_size=8)
        assert not second[0].head.weight[61:].any()
        for a, b in zip(model_tensors(*first).values(), model_tensors(*second).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-3 if width == 32 else 1e-6)  # a step goes 0.03

    def test_masters_keep_what_bf16_loses(self):
        model = model_of(dtype=torch.bfloat16)
        optimizer = build_optimizer(OptimConfig(name="sgd", lr=1e-6, momentum=0.0), model)
        before = model.state_dict()["embed.weight"].clone()
        narrow(model, optimizer, accumulate=False)
        for batch in batches(2):
            train_step(model, optimizer, batch, micro_batch_size=8, seeds_B=SEEDS)
        after = model_tensors(model, optimizer)["embed.weight"]
        assert model.embed.weight.dtype == torch.bfloat16
        assert torch.equal(model.embed.weight, after.bfloat16())
        assert 0 < float((after - before).abs().max()) < 1e-5

    @pytest.mark.parametrize("name", ["modern", "gpt2"])
    def test_padding_stands_for_no_token(self, name: str):
        """Loss, logits and the start are those without it, and its rows stay 0 under every part of an update."""
        plain, padded = model_of(name), model_of(name, multiple=128)
        tokens = some_tokens(8)
        torch.testing.assert_close(padded(tokens), plain(tokens), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(padded(tokens, tokens), plain(tokens, tokens), rtol=1e-6, atol=0)
        optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.1, weight_decay=0.5), padded)
        for batch in batches(2):
            train_step(padded, optimizer, batch, micro_batch_size=4)
        assert padded.head.weight.shape == (128, 32)
        assert not padded.head.weight[61:].any()
        starts = [GPT(plain.cfg, 61, vocab_multiple=m).init_weights(torch.Generator().manual_seed(1)) for m in (1, 128)]
        first, second = (model.state_dict() for model in starts)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not starts[1].head.weight[61:].any()


class Watch(TorchDispatchMode):
    """Notes operators that make the host wait for the device, those that copy, and casts of parameters."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
    COPYING = ("_to_copy", "copy_", "clone", "cat", "slice_backward", "select_backward", "as_strided_scatter")

    def __init__(self, parameters: list[torch.Tensor]):
        super().__init__()
        self.places = {p.data_ptr() for p in parameters}
        self.waits: list[str] = []
        self.casts: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.waits.append(name)
        if name in self.COPYING:
            self.copies.append(name)
        if name == "_to_copy" and args[0].data_ptr() in self.places:
            self.casts.append(str(tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


class TestInvariants:
    def test_the_host_waits_for_nothing_and_no_weight_is_cast(self):
        model = model_of(dtype=torch.bfloat16)
        optimizer = build_optimizer(OptimConfig(name="muon"), model, captured=True)
        narrow(model, optimizer, accumulate=True)
        step = captured(model, optimizer, 4)
        step(batches(1)[0], SEEDS)
        with Watch(list(model.parameters())) as watch:
            set_lr(optimizer, 0.5)
            step(batches(2)[1], SEEDS)
        assert watch.waits == []
        assert watch.casts == []

    def test_a_cpu_step_copies_only_to_join_the_gradients_of_q_k_and_v(self):
        model = build("gpt2")
        optimizer = build_optimizer(OptimConfig(name="adamw"), model)
        with Watch([]) as watch:
            train_step(model, optimizer, batches(1)[0], micro_batch_size=8)
        assert watch.copies == ["cat"] * model.cfg.n_layer

    @pytest.mark.needs_kernels
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_the_host_waits_for_no_update(self, name: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch):
        """The optimizers' kernels: PyTorch's AdamW reads a flag, which is why graphs need ours.

        Under a dispatch mode they step aside, so that the reads themselves are forbidden here.
        """

        def read(x: torch.Tensor) -> Any:
            raise AssertionError(f"read on the host: {x.shape} of {x.dtype}")

        model = model_of("gpt2", n_layer=1).to(kernel_device)
        rule = OptimConfig(name=name)  # type: ignore[arg-type]
        optimizer = build_optimizer(rule, model, captured=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for method in ("item", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, method, read)
        set_lr(optimizer, 0.5)
        optimizer.step()

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo asks non-leaf tensors, and hides it elsewhere
    @pytest.mark.parametrize("recompute", ["none", "mlp"])
    def test_one_graph_serves_all_layers_steps_and_evaluations(self, recompute: str):
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        model = model_of(recompute=recompute)
        compile_block(model)
        model.compiled_block = torch.compile(model.compiled_block.__wrapped__, backend="aot_eager", dynamic=False)  # type: ignore[union-attr]
        optimizer = build_optimizer(OptimConfig(), model, captured=True)
        for number, batch in enumerate(batches(3)):
            set_lr(optimizer, 1 / (number + 1))
            train_step(model, optimizer, batch, micro_batch_size=4, seeds_B=SEEDS)
            with torch.no_grad():
                model(batch.inputs[: number + 1, : number + 5])
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        batch = batches(1)[0]
        assert "check_compile: at most" in check_compiled(model, batch.inputs, batch.targets, SEEDS)

    @pytest.mark.filterwarnings("ignore:The .grad attribute")
    def test_gradients_summed_in_fp32_break_no_graph(self):
        """The step as a GPU takes it: Dynamo refuses parameters of 16 bits beside gradients of 32."""
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        model = model_of(dtype=torch.bfloat16, multiple=128)
        model.compiled_block = torch.compile(Block.forward, backend="aot_eager", dynamic=False, fullgraph=True)
        optimizer = build_optimizer(OptimConfig(), model, captured=True)
        narrow(model, optimizer, accumulate=True)
        step = captured(model, optimizer, 4)
        for batch in batches(3):
            step(batch, SEEDS)
        assert model.head.weight.grad is not None
        assert model.head.weight.grad.dtype == torch.float32
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]

    @pytest.mark.parametrize("chosen", [False, True])
    def test_what_was_compiled_lies_in_the_users_cache(
        self, chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
        if not chosen:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        compile_block(model_of())
        folder = tmp_path / ("chosen" if chosen else "fastlm/inductor")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)

    def test_check_compile_stops_a_run_whose_compiled_gradient_is_another(self):
        model, batch = model_of(), batches(1)[0]

        def wrong(block: Any, *arguments: Any) -> Any:
            branch, h = block(*arguments)
            return branch * 1.01, h

        model.compiled_block = wrong
        with pytest.raises(GuardStop, match=r"differs by .* --train\.compile false"):
            check_compiled(model, batch.inputs, batch.targets, SEEDS)
        assert model.compiled_block is wrong
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "seconds", "asked", "compiled"),
    [
        ("modern", 600, "auto", True),
        ("modern", 500, "auto", False),
        ("gpt2", 6000, "auto", False),
        ("gpt2", 10, True, True),
    ],
)
def test_a_cpu_compiles_where_it_pays(
    family: str, seconds: float, asked: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.which", lambda name: f"/{name}")
    cfg = Config(model=ModelConfig(family))  # type: ignore[arg-type]
    cfg.train.max_seconds, cfg.train.compile = seconds, asked
    assert resolve._compile(cfg, torch.device("cpu"), 0.0)[0] is compiled
    monkeypatch.setattr("shutil.which", lambda name: None)
    if asked is True:
        with pytest.raises(InputError, match="no C"):
            resolve._compile(cfg, torch.device("cpu"), 0.0)
    else:
        assert resolve._compile(cfg, torch.device("cpu"), 0.0) == (False, "compile: off (no C++ compiler found)")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"inductor": {"fxgraph_cache_miss": 2}, "aot_autograd": {"autograd_cache_miss": 1}}, "2 graphs made, 0 from"),
        ({"inductor": {"fxgraph_cache_hit": 2}, "aot_autograd": {"autograd_cache_miss": 1}}, "0 graphs made, 2 from"),
        ({"aot_autograd": {"autograd_cache_hit": 1}}, "0 graphs made, 1 from"),
        ({}, "0 graphs made, 0 from"),
    ],
)
def test_what_was_compiled_is_told_from_what_was_kept(
    counts: dict[str, dict[str, int]], said: str, monkeypatch: pytest.MonkeyPatch
):
    from torch._dynamo import utils

    monkeypatch.setattr(utils, "counters", defaultdict(Counter, {name: Counter(of) for name, of in counts.items()}))
    assert said in compile_note(1.0)


class TestResolved:
    def resolve(self, **keys: Any) -> tuple[Config, list[str]]:
        cfg = Config(train=TrainConfig(steps=5, batch_size=8))
        for key, value in keys.items():
            setattr(cfg.model if hasattr(cfg.model, key) else cfg.train, key, value)
        return resolve.resolve(cfg, torch.device("cpu"), 61, 5)

    def test_what_is_open_is_decided_and_said(self):
        cfg, notes = self.resolve(recompute=True, check_compile=True)
        assert (cfg.train.micro_batch_size, cfg.train.recompute, cfg.train.cuda_graphs) == (8, "block", False)
        text = "\n".join(notes)
        assert "none measured on this cpu yet" in text
        assert "CUDA graphs: off (not on cpu)" in text
        assert "check_compile: nothing to compare" in text
        assert "micro-batch: 8 of 8 sequences" in text

    def test_the_micro_batch_is_the_largest_that_fits(self, monkeypatch: pytest.MonkeyPatch):
        cfg = Config(train=TrainConfig(batch_size=8, micro_batch_size=4))
        resolve_model(cfg)
        needed = step_memory(cfg, 61).peak / resolve.MEMORY_SHARE
        monkeypatch.setattr(os, "sysconf", lambda name: 4096 if "SIZE" in name else int(needed / 4096) + 1)
        assert self.resolve(kernels="torch")[0].train.micro_batch_size == 4

    def test_the_fastest_measured_attention_is_taken(self, monkeypatch: pytest.MonkeyPatch):
        fastest = resolve.Fastest("triton", "bench/results/x/full_run.json")
        monkeypatch.setattr(resolve, "FASTEST_ATTENTION", {"cpu": fastest})
        assert self.resolve(kernels="torch")[0].model.attention == "sdpa", "no kernels, no kernel's attention"
        monkeypatch.setattr(resolve, "_kernels", lambda cfg, device: ("triton", "kernels: ours"))
        cfg, notes = self.resolve()
        assert cfg.model.attention == "triton"
        assert any("the fastest measured on cpu, bench/results/x" in note for note in notes)

    def test_where_none_is_measured_ours_keeps_runs_repeatable(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(resolve, "_kernels", lambda cfg, device: ("triton", "kernels: ours"))
        cfg, notes = self.resolve()
        assert cfg.model.attention == "triton"
        assert any("repeat bit for bit (none measured on this cpu yet)" in note for note in notes)

    def test_dropout_takes_what_seeds_it_by_sample(self, monkeypatch: pytest.MonkeyPatch):
        """Our kernel before what was measured faster without it; PyTorch's operators one by one; never flash-attn."""
        told = "PyTorch's operators one by one, every weight held"
        for keys in ({}, {"attention": "sdpa"}):
            cfg, notes = self.resolve(kernels="torch", dropout=0.1, **keys)
            assert cfg.model.attention == "sdpa"
            assert any(told in note for note in notes)
        monkeypatch.setattr(resolve, "FASTEST_ATTENTION", {"cpu": resolve.Fastest("flash", "a record")})
        monkeypatch.setattr(resolve, "_kernels", lambda cfg, device: ("triton", "kernels: ours"))
        cfg, notes = self.resolve(dropout=0.1)
        assert cfg.model.attention == "triton"
        assert any("which seeds dropout by sample" in note for note in notes)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(InputError, match="got flash; flash-attn's dropout takes no seed of each sample; use auto"):
            self.resolve(attention="flash", dropout=0.1)
        assert any("is flash, but flash-attn computes in bf16" in note for note in self.resolve()[1])

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"attention": "flash"}, r"--model.attention: got flash; flash-attn is not installed .*; use auto or sdpa"),
            ({"attention": "triton", "kernels": "torch"}, r"no Triton kernels in this run on cpu; use auto or sdpa"),
            ({"cuda_graphs": True}, r"--train.cuda_graphs: got true; not on cpu; use auto"),
        ],
    )
    def test_what_cannot_be_is_refused(self, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=message):
            self.resolve(**keys)

    def test_flash_attn_where_it_is_but_not_for_this_run(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(InputError, match="bf16 on a GPU, this run in fp32 on cpu"):
            self.resolve(attention="flash")

    def test_flash_attn_is_called_in_its_own_layout(self, monkeypatch: pytest.MonkeyPatch):
        """By a stand-in: the trainer's layout in, flash-attn's inside, the trainer's out."""

        def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options == {"causal": True, "deterministic": True}
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
        q, kv = torch.randn(2, 4, 6, 8, dtype=torch.bfloat16), torch.randn(2, 2, 6, 8, dtype=torch.bfloat16)
        options = {"is_causal": True, "enable_gqa": True, "causal_align": "top_left"}
        expected = flash_attention(q, kv, kv, **options)

        class OnGpu(torch.Tensor):
            is_cuda = True  # type: ignore[assignment]

        y = flash_attention(q.as_subclass(OnGpu), kv, kv, **options)
        assert torch.equal(y.as_subclass(torch.Tensor), expected)


class TestProfile:
    def test_a_trace_and_a_table_of_families(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        out = tmp_path / "run"
        train(write_corpus(tmp_path / "corpus.txt"), out, "--train.profile", "true", steps=6)
        trace = json.loads((out / "profile/trace.json").read_text())
        assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
        table = (out / "profile/families.txt").read_text()
        told = capfd.readouterr()
        assert "profile of 3 updates" in told.out
        assert "USDT" not in told.err
        named = [line for line in table.splitlines() if line.startswith("  of it")]
        assert len(named) == step_profile.NAMED_OTHERS
        table = "".join(line + "\n" for line in table.splitlines() if line not in named)
        rows = [line.split("  ") for line in table.splitlines()[1:]]
        assert {"matrix products", "attention", "norm", "optimizer"} <= {row[0] for row in rows}
        spent = [float(line[16:].split()[0]) for line in table.splitlines()[1:]]
        assert sum(spent[:-1]) == pytest.approx(spent[-1], abs=0.01)
        assert spent[:-1] == sorted(spent[:-1], reverse=True)

    def test_floors_are_work_over_peaks(self, monkeypatch: pytest.MonkeyPatch):
        cfg = Config(device="cuda", train=TrainConfig(batch_size=8, micro_batch_size=8, precision="bf16"))
        resolve_model(cfg)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        found = step_profile.floors(cfg, 50257)
        tokens = 8 * cfg.data.seq_len
        work = tokens * flops_per_token(cfg.model, 50257, cfg.data.seq_len, causal=True)
        assert found["matrix products"] + found["attention"] == pytest.approx(1e3 * work / 989e12)
        assert found["loss"] == pytest.approx(1e3 * 2 * tokens * 50257 * 2 / 4.8e12)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "unheard of")
        assert step_profile.floors(cfg, 50257) == {}

    @pytest.mark.parametrize(
        ("name", "family"),
        [
            ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
            ("nvjet_sm90_tst_128x256_64x4", "matrix products"),
            ("flash_fwd_kernel", "attention"),
            ("cross_entropy_forward_kernel", "loss"),
            ("norm_weight_gradient_kernel", "norm"),
            ("rotary_norm_backward_kernel", "rotary"),
            ("gated_forward_kernel", "activation"),
            ("unary_backward_kernel", "activation"),
            ("sum_partials_kernel", "norm"),
            ("norm_partial_kernel", "optimizer"),
            ("Memcpy DtoD (Device -> Device)", "copies"),
            ("aten::addmm", "matrix products"),
            ("update_kernel", "optimizer"),
            ("vectorized_elementwise_kernel", "other"),
        ],
    )
    def test_names_tell_families(self, name: str, family: str):
        assert step_profile.family(name) == family

    def test_every_kernel_of_ours_has_a_family(self):
        """Those that the committed report of binaries names: every one that a public function launches."""
        report = next(Path(fk.__file__).parent.glob("aot_report_triton_*.csv"))
        with report.open() as file:
            next(file)  # what it was made from
            names = {row["kernel"] for row in csv.DictReader(file)}
        assert {"norm_forward_kernel", "update_kernel", "unary_forward_kernel"} <= names
        assert {name for name in names if step_profile.family(name) == step_profile.OTHER} == set()

    def test_a_range_that_spans_kernels_is_not_counted(self):
        def event(key: str, spans: bool) -> Any:
            kind = types.SimpleNamespace(name="CUDA")
            return types.SimpleNamespace(
                key=key, device_type=kind, self_device_time_total=3e3, is_user_annotation=spans
            )

        events = [event("update_kernel", False), event("Optimizer.step#AdamW.step", True)]
        assert step_profile.milliseconds(events, 3, torch.device("cuda")) == {"update_kernel": 1.0}

    def test_what_has_no_family_is_named_in_part(self):
        """The largest three, under the line of all of them; their shares are of the whole update."""
        spent = {"strange_a": 1.0, "strange_b": 3.0, "strange_c": 4.0, "strange_d": 2.0, "update_kernel": 20.0}
        lines = step_profile.render(spent, {}).splitlines()
        shown = [line.split() for line in lines if line.startswith("  of it")]
        assert [(row[-1], row[2], row[3]) for row in shown] == [
            ("strange_c", "4.000", "13.3%"),
            ("strange_b", "3.000", "10.0%"),
            ("strange_d", "2.000", "6.7%"),
        ]
        assert lines.index(next(line for line in lines if line.startswith("other"))) == 2

    def test_only_the_tracers_own_lines_are_held_back(self, capfd: pytest.CaptureFixture[str]):
        with step_profile._without_tracers_lines():
            os.write(2, b"USDT:2026 x.cpp:1] profiler_start\nCUPTI could not start: no privileges\n")
        os.write(2, b"later\n")
        assert capfd.readouterr().err == "CUPTI could not start: no privileges\nlater\n"

    def test_a_run_too_short_to_profile_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        out = tmp_path / "run"
        train(write_corpus(tmp_path / "corpus.txt"), out, "--train.profile", "true", steps=2)
        assert "profile: none, the run ended before update 3" in capsys.readouterr().out
        assert not (out / "profile").exists()


class TestMemory:
    @pytest.mark.parametrize("recompute", ["none", "activation", "mlp", "block"])
    @pytest.mark.parametrize(
        ("name", "dropout"), [("modern", 0.0), ("modern-gqa", 0.0), ("gpt2", 0.0), ("modern", 0.2), ("gpt2", 0.2)]
    )
    def test_what_blocks_keep_is_what_the_estimate_says(self, name: str, dropout: float, recompute: str):
        """Distinct storages that autograd saves, without parameters. PyTorch's rotary keeps some more than ours."""
        model, tokens = build(name, recompute=recompute, n_embd=128, dropout=dropout), some_tokens()
        known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(tokens, seeds_B=SEEDS[: len(tokens)])
        measured = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place and place not in known)
        count = tokens.numel()
        estimate = stem_bytes(model.cfg, count, 4) + 2 * block_bytes(model.cfg, count, 4, recompute, tokens.size(1))
        assert estimate == pytest.approx(measured, rel=0.05)

    @pytest.mark.parametrize(("name", "bits"), [("muon", 32), ("muon", 8), ("adamw", 32), ("adamw", 8), ("sgd", 32)])
    def test_averages_take_what_the_estimate_says(self, name: str, bits: int):
        """In memory, and read and written once each against the floor of the optimizer's time."""
        rule = OptimConfig(name=name, state_bits=bits)  # type: ignore[arg-type]
        model = build("modern", n_embd=128, vocab_size=509)
        optimizer = build_optimizer(rule, model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        kept = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        measured = sum(value.numel() * value.element_size() for value in kept)
        cfg = Config(model=model.cfg, optim=rule, train=TrainConfig(micro_batch_size=32, precision="fp32"))
        assert step_memory(cfg, 509).optimizer == pytest.approx(measured, rel=0.01)
        total = sum(p.numel() for p in model.parameters())
        moved = step_profile.traffic(cfg, 509)["optimizer"]
        assert moved == pytest.approx(16 * total + 2 * measured, rel=0.01)

    def test_the_parts_follow_the_run(self):
        def parts(**train: Any) -> Any:
            cfg = Config(train=TrainConfig(batch_size=8, **{"micro_batch_size": 8, "precision": "bf16", **train}))
            resolve_model(cfg)
            return step_memory(cfg, 50257)

        base = parts()
        assert base.weights == 6 * (base.gradients // 2), "a bf16 copy and its fp32 master"
        assert parts(micro_batch_size=4).gradients == 2 * base.gradients, "summed in fp32"
        assert parts(micro_batch_size=4).activations == base.activations // 2
        peaks = [parts(recompute=dial).peak for dial in ("none", "activation", "mlp", "block")]
        assert peaks == sorted(peaks, reverse=True)
        assert len(set(peaks)) == 4
        assert parts(recompute=True) == parts(recompute="block")
        wide = ModelConfig(n_embd=4096, n_head=1)
        rows = [round(block_bytes(wide, 1, 2, dial) / 8192) for dial in ("none", "activation", "mlp", "block")]
        told = f"of {rows[0]} rows of activations a layer (modern) it keeps {', '.join(map(str, rows))} "
        assert told in (Path(__file__).parents[1] / "README.md").read_text()
