"""The baseline computes what our model computes, and what is timed and said of both is what it claims."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_train, learning, training, training_items
from bench.baseline import PlainGPT, plain_optimizers, plain_step
from bench.learning import Race
from bench.training import PRESETS, Comparison, Contender, Workload, preset_config, workload
from fastlm import run, train
from fastlm.arguments import flatten
from fastlm.config import Config, ModelConfig, load_config
from fastlm.config import __file__ as config_file
from fastlm.resolve import resolve_model

CPU = torch.device("cpu")
SHAPES = {
    "gpt2": ModelConfig("gpt2", n_layer=2, n_head=2, n_embd=16),
    "gpt2-no-bias": ModelConfig("gpt2", n_layer=2, n_head=2, n_embd=16, bias=False),
    "modern": ModelConfig("modern", n_layer=2, n_head=4, n_kv_head=2, n_embd=32),
}


def tiny(model: ModelConfig, **optim: Any) -> Workload:
    """Eight sequences of twelve tokens, vocabulary 128."""
    cfg = Config(seed=3, device="cpu", model=replace(model, kernels="torch", attention="sdpa"))
    cfg.data.seq_len, cfg.train.batch_size, cfg.train.micro_batch_size, cfg.train.steps = 12, 8, 4, 10
    cfg.train.precision, cfg.train.compile = "fp32", False
    cfg.optim = replace(cfg.optim, schedule="constant", **optim)
    resolve_model(cfg)
    return Workload("gpt2", cfg, 128, CPU)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_baseline_is_the_same_function(shape: str) -> None:
    """On equal weights: logits, loss and every gradient."""
    work = tiny(SHAPES[shape])
    plain, ours = PlainGPT(work.cfg.model, 128), training.build_model(work.cfg, 128, CPU)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(plain.state_dict())
    inputs, targets = work.batch()
    torch.testing.assert_close(plain(inputs), ours(inputs), rtol=1e-4, atol=1e-5)
    losses = plain(inputs, targets), ours(inputs, targets)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    theirs, mine = (
        torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (plain, ours), strict=True)
    )
    by_name = dict(zip((name for name, _ in ours.named_parameters()), mine, strict=True))
    for (name, _), gradient in zip(plain.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(gradient, by_name[name], rtol=1e-3, atol=1e-6)
    assert training.same_function(work) < 1e-5


def test_an_update_of_the_baseline_is_the_trainers() -> None:
    """AdamW, clipping and accumulation included: three updates from the same weights end at the same weights."""
    work = tiny(SHAPES["gpt2"], name="adamw", lr=1e-2, weight_decay=0.1, grad_clip=0.5)
    ours = training.fastlm_update(work)
    plain = PlainGPT(work.cfg.model, 128)
    plain.load_state_dict(ours.model.state_dict())
    optimizers = plain_optimizers(work.cfg.optim, plain)
    theirs = plain_step(plain, plain, optimizers, micro_batch_size=2, grad_clip=work.cfg.optim.grad_clip)
    for seed in range(3):
        losses = ours.step(*work.batch(seed)), theirs(*work.batch(seed))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for name, parameter in ours.model.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], parameter, rtol=1e-3, atol=1e-5)


def test_an_update_that_goes_on_without_its_graph_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would note it and go on eagerly: that is not what the figure is said to be of."""

    class Fails:
        def __init__(self, device: torch.device):
            pass

        def warm_up(self, work: Any) -> None:
            work()

        def record(self, work: Any) -> None:
            raise RuntimeError("no room")

    work = tiny(SHAPES["gpt2"], name="adamw")
    training.start_ours(work)
    work.cfg.train.cuda_graphs = True
    monkeypatch.setattr(train, "CudaRecorder", Fails)
    monkeypatch.setattr(run, "resolve", lambda cfg, *_: (cfg, []))  # which knows that a CPU has none
    with pytest.raises(RuntimeError, match=r"CUDA graphs: off from here on.*no room"):
        training.start_ours(work)


def test_muon_and_adamw_share_the_modern_baselines_parameters() -> None:
    work = tiny(SHAPES["modern"], name="muon")
    plain = PlainGPT(work.cfg.model, 128)
    muon, adamw = plain_optimizers(work.cfg.optim, plain)
    held = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sorted(held[0] + held[1]) == sorted(id(p) for p in plain.parameters())
    assert len(held[0]) == 4 * work.cfg.model.n_layer
    assert adamw.param_groups[0]["lr"] == work.cfg.optim.adam_lr


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_the_trainer(preset: str) -> None:
    """Shape, optimizer and batch of the preset's file; rates and schedule are the bench's own."""
    folder = training.Path(config_file).parent / "presets"
    file, own = (flatten(cfg) for cfg in (load_config(folder / f"{preset}.yaml"), preset_config(preset)))
    keys = [key for key in file if key.startswith("model.")]
    keys += [
        "data.seq_len",
        "train.batch_size",
        "optim.name",
        "optim.weight_decay",
        "optim.grad_clip",
        "optim.momentum",
    ]
    assert {key: own[key] for key in keys} == {key: file[key] for key in keys}


@pytest.mark.parametrize(
    ("preset", "device", "speed", "counts"),
    [
        ("gpt2", "NVIDIA H200", 469_999.0, False),
        ("gpt2", "NVIDIA H200", 470_000.0, True),
        ("modern-124m", "NVIDIA H200", 100_000.0, False),
        ("gpt2", "NVIDIA A100-SXM4-80GB", 100_000.0, True),
        ("gpt2-xl", "NVIDIA H200", 50_000.0, True),
    ],
)
def test_a_ratio_counts_only_against_a_real_baseline(preset: str, device: str, speed: float, counts: bool) -> None:
    valid, why = training.verdict(preset, device, speed)
    assert valid is counts
    assert counts or f"{speed:,.0f} tokens/s, 470,000 wanted" in why


def contender(provider: str, seconds: list[float], log: list[str] | None = None, micro: int = 8) -> Contender:
    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        if log is not None:
            log.append(provider)
        return torch.zeros(())

    return Contender(provider, micro, step, 9.0, 5.0, 1.0, 1000, 4.0, list(seconds))


def compared(preset: str = "gpt2") -> Comparison:
    work = replace(tiny(SHAPES["gpt2"]), preset=preset)
    return Comparison(work, contender("fastlm", [1.0, 2.0, 4.0]), contender("baseline", [2.0, 3.0, 16.0]))


def test_rounds_alternate_and_the_ratio_is_the_median_of_rounds() -> None:
    log: list[str] = []
    pair = [contender("a", [], log), contender("b", [], log)]
    training.interleave(pair, tiny(SHAPES["gpt2"]), rounds=2, updates=2)
    assert log == ["a"] * 3 + ["b"] * 6 + ["a"] * 3, "one that does not count, two that do; who begins changes"
    assert [len(c.seconds) for c in pair] == [2, 2]
    found = compared()
    assert found.ratio == 2.0, "of 2, 1.5 and 4"
    assert found.tokens_per_second(found.ours) == 8 * 12 / 2.0


def test_a_ratio_that_does_not_count_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared()
    rows = {(row.name, row.provider): row for row in training_items.comparison_rows(found)}
    ours = rows["train_124m.tokens_per_second", "fastlm"]
    assert (ours.value, ours.baseline, ours.ratio) == (48.0, 32.0, 2.0)
    assert rows["train_124m.peak_memory", "fastlm"].ratio == 1.0
    assert rows["train_124m.mfu", "fastlm"].ratio is None, "where no peak is known"
    assert found.facts(found.ours)["ratio"] == 2.0
    monkeypatch.setattr(Comparison, "verdict", lambda self: (False, "too slow"))
    assert all(row.ratio is None for row in training_items.comparison_rows(found))
    assert (found.facts(found.ours)["ratio"], found.facts(found.ours)["valid"]) == (None, False)


def test_on_a_gpu_one_comparison_tells_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each holds at any size, and its peak: the largest micro-batches, and the targets, without another model."""
    monkeypatch.setattr(training_items, "GPU", True)
    total = SimpleNamespace(total_memory=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    found = compared()
    for each, fixed, peak in ((found.ours, 200, 1000), (found.baseline, 200, 2600)):
        each.fixed_bytes, each.peak_bytes = fixed, peak
    rows = {(row.name, row.provider): row for row in training_items.comparison_rows(found)}
    largest = rows["train_124m.largest_micro_batch", "fastlm"]
    assert (largest.value, largest.baseline, largest.target) == (948, 316, 632), "(95,000 - 200) / 100 and / 300"
    assert rows["train_124m.tokens_per_second", "fastlm"].target == training_items.TARGET_TOKENS_PER_SECOND
    assert rows["train_124m.cuda_graphs", "fastlm"].target == 1.0


def test_ours_alone_gives_the_figures_without_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it has started, and again by its rounds; a later comparison's rows take their places."""
    work = replace(tiny(SHAPES["gpt2"]), preset="gpt2-xl")
    monkeypatch.setattr(training_items, "GPU", True)
    monkeypatch.setattr(training, "workload", lambda *_, **__: work)
    monkeypatch.setattr(training, "start_ours", lambda work: contender("fastlm", []))
    rows = [row for row in training_items._alone("gpt2-xl", 8, 60.0) if not isinstance(row, str)]
    names = {"tokens_per_second", "mfu", "mfu_causal", "peak_memory", "first_step_seconds", "compiled", "cuda_graphs"}
    assert {row.name for row in rows} == {f"train_1.5b.{name}" for name in names}
    assert {row.target for row in rows if row.name == "train_1.5b.mfu"} == {training_items.TARGET_MFU}
    assert all(row.ratio is None and row.baseline is None for row in rows)
    assert len(rows) == 2 * len(names)
    found = replace(compared(), work=work)
    assert {row.key for row in rows} <= {row.key for row in training_items.comparison_rows(found)}


def test_weights_are_drawn_where_they_stay_as_a_run_draws_them() -> None:
    """On a CPU both are one: same distribution, same order, same seed."""
    work = tiny(SHAPES["modern"], name="adamw")
    there, here = training._drawn_in_place(work.cfg, 128, CPU), training.build_model(work.cfg, 128, CPU)
    assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))


def test_the_baselines_micro_batch_is_searched_while_memory_and_time_last(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def start_plain(work: Workload, size: int) -> Contender:
        tried.append(size)
        if size == 64:
            raise torch.cuda.OutOfMemoryError("full")
        return contender("baseline", [], micro=size)

    monkeypatch.setattr(training, "start_plain", start_plain)
    monkeypatch.setattr(training, "_plain_sizes", lambda work: [32, 64, 16, 128])
    work = tiny(SHAPES["gpt2"])
    assert [c.micro_batch_size for c in training.plain_candidates(work)] == [32, 16, 128]
    tried.clear()
    assert [c.micro_batch_size for c in training.plain_candidates(work, seconds=0.0)] == [32]
    assert tried == [32]
    monkeypatch.setattr(training, "_plain_sizes", lambda work: [64])
    with pytest.raises(RuntimeError, match="fits at none"):
        list(training.plain_candidates(work))


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "same_function", lambda work: math.nan)
    with pytest.raises(RuntimeError, match="the two losses differ"):
        next(training.compare(tiny(SHAPES["gpt2"]), rounds=1, updates=1))


def test_memory_of_a_sequence_is_the_slope() -> None:
    assert training.bytes_per_sequence([(16, 1160), (32, 1320)]) == (1000.0, 10.0)
    assert training.bytes_per_sequence([(16, 1160), (16, 1160)]) is None


def bench_double() -> tuple[Any, list[object]]:
    """Stands in for pytest-benchmark's fixture; the list gets what the timed calls return."""
    calls: list[object] = []
    return SimpleNamespace(extra_info={}, pedantic=lambda call, rounds: calls.append(call())), calls


@pytest.mark.parametrize("preset", ["nanogpt-cpu", "gpt2"])
def test_the_bench_says_what_it_timed(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the small preset is timed; the others say that they were not."""
    monkeypatch.setattr(bench_train, "_ROUNDS", 1)
    monkeypatch.setattr(bench_train, "_UPDATES", 1)
    small = workload("nanogpt-cpu", CPU, batch_size=2)
    monkeypatch.setattr(training, "workload", lambda preset, device, **_: small)
    bench_train._comparison.cache_clear()
    shown = {}
    for provider in ("fastlm", "baseline"):
        fake, calls = bench_double()
        if preset == "gpt2":
            with pytest.raises(pytest.skip.Exception, match="not measured"):
                bench_train.test_train_step(fake, preset, provider)
            assert not calls
            assert (fake.extra_info["ratio"], fake.extra_info["shape"]) == (None, "gpt2")
            continue
        bench_train.test_train_step(fake, preset, provider)
        assert calls == [None]
        shown[provider] = fake.extra_info
    for provider, info in shown.items():
        assert (info["kernel"], info["provider"], info["dtype"]) == ("train_step", provider, "float32")
        assert info["shape"] == "nanogpt-cpu-T64-batch2-micro2"
        assert info["tokens_per_second"] == 2 * 64 / info["seconds"]
        assert info["ratio"] > 0
        assert info["first_step_seconds"] > 0
        assert (info["mfu"], info["peak_bytes"], info["valid"]) == (None, None, True)
    ours = shown.get("fastlm", {"cuda_graphs": False, "attention": "sdpa", "decisions": small.decisions})
    assert (ours["cuda_graphs"], ours["attention"], ours["decisions"]) == (False, "sdpa", small.decisions)
    assert any(line.startswith("CUDA graphs: off") for line in small.decisions)


def test_a_race_ends_at_the_target_or_with_its_time() -> None:
    course = Race(1, 1, 8, 16, 4, text_bytes=4000, val_windows=4, eval_every=2, target=5.4)
    ours, plain = course.recipes()
    finish = learning.race(course, plain, CPU, seconds=20, compiles=False)
    assert finish.reached
    assert finish.loss <= 5.4
    assert finish.tokens % (2 * 4 * 16) == 0
    lost = learning.race(replace(course, target=0.0), ours, CPU, seconds=0.05, compiles=False)
    assert not lost.reached
    assert lost.seconds >= 0.05
    assert 0 < lost.loss < math.log(256) + 1


def test_the_library_is_read_as_bytes() -> None:
    text = learning.library_bytes(1000)
    assert (text.dtype, len(text)) == (torch.uint8, 1000)
    inputs, targets = learning._windows(text, torch.tensor([0, 10]), 5, CPU)
    assert torch.equal(inputs[1], text[10:15].long())
    assert torch.equal(targets[1], text[11:16].long())
