"""The command line and configuration files: precedence, round trips, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from fastlm import config
from fastlm.arguments import flatten, leaves, nearest_key, parse_arguments
from fastlm.config import (
    BOUNDS,
    LATER,
    Config,
    DataConfig,
    config_difference,
    dump_config,
    load_config,
    parse_config,
    presets,
    resolve_device,
    validate,
)
from fastlm.errors import InputError, run_command

CPU = ["--device", "cpu"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parse a command line as a command would, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def parse(*argv: str) -> Outcome:
        with pytest.raises(SystemExit) as ending:
            run_command(lambda: parse_config([*CPU, *argv]) and 0)
        captured = capsys.readouterr()
        code = ending.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return parse


def test_a_lone_word_is_taken_for_a_path():
    with pytest.raises(InputError, match=r"argument: got t; options are written --KEY VALUE; .* --data\.path t\?"):
        parse_config(["t"])


def assert_refused(outcome: Outcome, key: str, value: str, remedy: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith(f"error: {key}: got {value}; "), outcome.err
    assert remedy in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


# Bad command lines: what is typed, the key and value named, and a piece of the remedy.
BAD_FLAGS = [
    # no such option
    (["--train.step", "5"], "--train.step", "5", "did you mean --train.steps?"),
    (["--train.step=5"], "--train.step", "5", "did you mean --train.steps?"),
    (["--data", "X"], "--data", "X", "did you mean --data.path X?"),
    (["--model=lstm"], "--model", "lstm", "did you mean --model.family lstm?"),
    (["--lr", "1"], "--lr", "1", "did you mean --optim.lr?"),
    (["--train.batch-size", "5"], "--train.batch-size", "5", "did you mean --train.batch_size?"),
    (["--optim.lrr", "5"], "--optim.lrr", "5", "did you mean --optim.lr?"),
    (["--model.heads", "5"], "--model.heads", "5", "did you mean --model.n_head?"),
    (["--train.n_head", "5"], "--train.n_head", "5", "did you mean --model.n_head?"),
    (["--betass", "5"], "--betass", "5", "did you mean --optim.betas?"),
    (["--zzzzzz", "5"], "--zzzzzz", "5", "see --help"),
    (["--zzzzzz"], "--zzzzzz", "no value", "see --help"),
    (["--print-config"], "--print-config", "no value", "did you mean --print_config?"),
    (["--helpp"], "--helpp", "no value", "did you mean --help?"),
    # the shape of a command line
    (["text.txt"], "argument", "text.txt", "did you mean --data.path text.txt?"),
    (["-x"], "-x", "no value", "options start with --"),
    (["-lr", "5"], "-lr", "no value", "options start with --"),
    (["--seed"], "--seed", "no value", "--seed VALUE"),
    (["--seed", "--train.steps", "5"], "--seed", "no value", "--seed VALUE"),
    (["--optim.betas", "0.9", "0.95"], "argument", "0.95", "--optim.betas takes one value"),
    (["--data.path", ""], "--data.path", "an empty text", "leave the option out"),
    # names
    (["--preset", "gpt3"], "--preset", "gpt3", "did you mean gpt2?"),
    (["--preset", "zzz"], "--preset", "zzz", "nanogpt-cpu"),
    (["--optim.name", "adamww"], "--optim.name", "adamww", "did you mean adamw?"),
    (["--optim.name", "zzz"], "--optim.name", "zzz", "rmsprop"),
    (["--optim.schedule", "cosin"], "--optim.schedule", "cosin", "did you mean cosine?"),
    (["--model.family", "GPT2"], "--model.family", "GPT2", "did you mean gpt2?"),
    (["--data.tokenizer", "bpee"], "--data.tokenizer", "bpee", "did you mean bpe?"),
    (["--data.tokenizer", "no/such.json"], "--data.tokenizer", "no/such.json", "path of a tokenizer.json"),
    (["--data.bin_format", "uint32"], "--data.bin_format", "uint32", "did you mean uint16?"),
    (["--device", "gpu"], "--device", "gpu", "choose one of auto, cpu, cuda, mps"),
    (["--train.precision", "fp16"], "--train.precision", "fp16", "did you mean bf16?"),
    (["--train.compile", "maybe"], "--train.compile", "maybe", "auto, true, false"),
    (["--train.recompute", "maybe"], "--train.recompute", "maybe", "true, false"),
    (["--train.recompute", "1"], "--train.recompute", "1", "true, false"),
    (["--train.recompute", "blok"], "--train.recompute", "blok", "did you mean block?"),
    (["--train.cuda_graphs", "maybe"], "--train.cuda_graphs", "maybe", "auto, true, false"),
    (["--train.profile", "5"], "--train.profile", "5", "true, false"),
    (["--train.check_compile", "auto"], "--train.check_compile", "auto", "true, false"),
    (["--train.micro_batch_size", "fits"], "--train.micro_batch_size", "fits", "a whole number, or auto"),
    (["--train.micro_batch_size", "1.5"], "--train.micro_batch_size", "1.5", "a whole number, or auto"),
    # numbers
    (["--train.batch_size", "0"], "--train.batch_size", "0", "at least 1"),
    (["--train.batch_size", "-3"], "--train.batch_size", "-3", "at least 1"),
    (["--train.batch_size", "8.0"], "--train.batch_size", "8.0", "whole number"),
    (["--train.batch_size", "null"], "--train.batch_size", "null", "whole number"),
    (["--train.batch_size", "true"], "--train.batch_size", "true", "whole number"),
    (["--optim.lr", "-1e-3"], "--optim.lr", "-1e-3", "at least 0"),
    (["--optim.lr", "fast"], "--optim.lr", "fast", "a number"),
    (["--optim.lr", "null"], "--optim.lr", "null", "a number"),
    (["--optim.lr", ".nan"], "--optim.lr", ".nan", "finite"),
    (["--optim.lr", "nan"], "--optim.lr", "nan", "a number"),
    (["--optim.grad_clip", ".inf"], "--optim.grad_clip", ".inf", "finite"),
    (["--optim.grad_clip", "0"], "--optim.grad_clip", "0", "more than 0"),
    (["--optim.betas", "[0.9, .nan]"], "--optim.betas", "[0.9, .nan]", "finite"),
    (["--optim.betas", "[0.9]"], "--optim.betas", "[0.9]", "[0.9, 0.95]"),
    (["--optim.betas", "0.9"], "--optim.betas", "0.9", "[0.9, 0.95]"),
    (["--optim.betas", "[0.9, 1.0]"], "--optim.betas", "[0.9, 1.0]", "less than 1"),
    (["--data.val_fraction", "0"], "--data.val_fraction", "0", "more than 0 and less than 1"),
    (["--data.val_fraction", "1"], "--data.val_fraction", "1", "more than 0 and less than 1"),
    (["--model.dropout", "1"], "--model.dropout", "1", "less than 1"),
    (["--train.keep", "1"], "--train.keep", "1", "at least 2"),
    (["--train.eval_every", "0"], "--train.eval_every", "0", "at least 1"),
    (["--train.steps", "0"], "--train.steps", "0", "at least 1"),
    (["--train.epochs", "0"], "--train.epochs", "0", "more than 0"),
    (["--train.max_seconds", "-1"], "--train.max_seconds", "-1", "more than 0"),
    (["--seed", "-1"], "--seed", "-1", "at least 0"),
    (["--seed", str(2**64)], "--seed", str(2**64), "less than"),
    (["--optim.decay_fraction", "0"], "--optim.decay_fraction", "0", "more than 0"),
    # two keys that do not go together
    (["--model.n_embd", "128", "--model.n_head", "5"], "--model.n_head", "5", "try --model.n_head 4"),
    (["--model.n_head", "4", "--model.n_kv_head", "3"], "--model.n_kv_head", "3", "try --model.n_kv_head 2"),
    (["--model.family", "gpt2", "--model.n_kv_head", "2"], "--model.n_kv_head", "2", "leave it null"),
    (["--model.n_embd", "12", "--model.n_head", "4"], "--model.n_embd", "12", "a multiple of 8"),
    (["--model.max_seq_len", "64", "--data.seq_len", "65"], "--model.max_seq_len", "64", "at least --data.seq_len 65"),
    (["--train.batch_size", "12", "--train.micro_batch_size", "5"], "--train.micro_batch_size", "5", "try 4"),
    (["--train.steps", "5", "--train.epochs", "1"], "--train.epochs", "1", "exactly one of --train.steps"),
    (["--optim.warmup_steps", "9", "--train.steps", "9"], "--optim.warmup_steps", "9", "less than --train.steps 9"),
    (["--optim.schedule", "exponential"], "--optim.min_lr_ratio", "0.0", "0.1 for one"),
    (["--optim.state_bits", "16"], "--optim.state_bits", "16", "choose one of 32, 8"),
    (["--optim.state_bits", "8", "--optim.name", "sgd"], "--optim.state_bits", "8", "--optim.name sgd knows 32 alone"),
    # what a later version brings
    (["--model.family", "lstm"], "--model.family", "lstm", "later version; use modern or gpt2"),
    (["--train.parallel", "ddp"], "--train.parallel", "ddp", "later version; use auto"),
    (["--train.parallel", "fsdp"], "--train.parallel", "fsdp", "later version; use auto"),
    (["--data.path", "hf:a/b"], "--data.path", "hf:a/b", "later version; give a file"),
    (["--data.val_path", "hf:a/b"], "--data.val_path", "hf:a/b", "later version; give a file"),
]


@pytest.mark.parametrize(("argv", "key", "value", "remedy"), BAD_FLAGS, ids=[" ".join(bad[0]) for bad in BAD_FLAGS])
def test_bad_flags_are_refused_in_one_line(run, tmp_path: Path, argv: list[str], key: str, value: str, remedy: str):
    assert_refused(run("--out", "never", *argv), key, value, remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_long_or_holds_line_breaks_still_gives_one_line(run):
    outcome = run("--optim.lr", "1\n2\x1b[31m" + "x" * 10_000)
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 400
    assert "\x1b" not in outcome.err


# Bad files: the text, the key and value named, and a piece of the remedy.
BAD_FILES = [
    ("train: {step: 5}", "train.step", "5", "no such key; did you mean train.steps?"),
    ("trian: {steps: 5}", "trian", "{'steps': 5}", "did you mean train?"),
    ("train.step: 5", "train.step", "5", "did you mean train.steps?"),
    ("data: corpus.txt", "data", "corpus.txt", "did you mean data.path?"),
    ("preset: gpt3", "preset", "gpt3", "did you mean gpt2?"),
    ("config: other.yaml", "config", "other.yaml", "no such key"),
    ("optim: {name: adamww}", "optim.name", "adamww", "did you mean adamw?"),
    ("optim: {lr: fast}", "optim.lr", "fast", "a number"),
    ("optim: {lr: -1}", "optim.lr", "-1.0", "at least 0"),
    ("optim: {lr: .nan}", "optim.lr", "nan", "finite"),
    ("optim: {lr: [1]}", "optim.lr", "[1]", "a number"),
    ("optim: {lr: {a: 1}}", "optim.lr", "{'a': 1}", "a number"),
    ("optim: {betas: [0.9, .inf]}", "optim.betas", "[0.9, inf]", "finite"),
    ("data: {text_key: 5}", "data.text_key", "5", "in quotes"),
    ("data: {path: hf:a/b}", "data.path", "hf:a/b", "later version"),
    ("train: {batch_size: 0}", "train.batch_size", "0", "at least 1"),
    ("train: {batch_size: null}", "train.batch_size", "null", "whole number"),
    ("train: {recompute: 1}", "train.recompute", "1", "true, false"),
    ("train: {steps: 5, max_seconds: 6}", "train.max_seconds", "6.0", "exactly one"),
    ("train: {steps: 5}\ntrain.steps: 6", "train.steps", "6", "second time"),
]


@pytest.mark.parametrize(("text", "key", "value", "remedy"), BAD_FILES, ids=[bad[0] for bad in BAD_FILES])
def test_bad_keys_and_values_of_a_file_are_refused_naming_it(run, tmp_path: Path, text, key, value, remedy):
    (tmp_path / "my.yaml").write_text(text)
    outcome = run("--config", "my.yaml")
    assert_refused(outcome, key, value, remedy)
    assert "(in my.yaml)" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"optim:\n  lr: [1\n", "not valid YAML, line 3"),
        (b"optim:\n\tlr: 1\n", "not valid YAML, line 2"),
        (b"seed: 1\nseed: 2\n", "not valid YAML, line 2: the key seed stands here a second time"),
        (b"- 1\n", "KEY: VALUE"),
        (b"seed\n", "KEY: VALUE"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(run, tmp_path: Path, content: bytes | None, remedy: str):
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content)
    assert_refused(run("--config", "my.yaml"), "--config", "my.yaml", remedy)


def test_a_directory_as_configuration_is_refused(run, tmp_path: Path):
    assert_refused(run("--config", str(tmp_path)), "--config", str(tmp_path), "readable YAML file")


def test_bad_input_in_a_real_process():
    code = "import sys; from fastlm.errors import run_command; from fastlm.config import parse_config; "
    code += "run_command(lambda: parse_config(sys.argv[1:]) and 0)"
    for argv, start in [
        (["--train.step", "5"], "error: --train.step: got 5; "),
        (["--device", "cpu", "--optim.lr", "fast"], "error: --optim.lr: got fast; "),
    ]:
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(start)
        assert done.stderr.count("\n") == 1


def test_precedence_is_the_same_in_every_order(tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("optim: {lr: 0.5, eps: 0.25}\nseed: 5\n")
    parts = [["--preset", "nanogpt-cpu"], ["--config", str(file)], ["--optim.lr", "0.125"], ["--seed=6"]]
    for order in itertools.permutations(parts):
        cfg = parse_config(list(itertools.chain(*order)))
        assert (cfg.preset, cfg.optim.name) == ("nanogpt-cpu", "adamw")  # the preset over the defaults
        assert cfg.optim.eps == 0.25  # the file over the preset
        assert (cfg.optim.lr, cfg.seed) == (0.125, 6)  # flags over all
        assert cfg.data.text_key == "text"  # the dataclass's own


def test_a_preset_in_a_file_acts_as_the_flag_and_the_flag_goes_over_it(tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("preset: nanogpt-cpu\n")
    assert parse_config(["--config", str(file)]) == parse_config(["--preset", "nanogpt-cpu"])
    assert parse_config(["--config", str(file), "--preset", "gpt2"]) == parse_config(["--preset", "gpt2"])


def test_the_last_of_two_equal_flags_wins():
    assert parse_config([*CPU, "--seed", "1", "--seed=2"]).seed == 2
    assert parse_config([*CPU, "--preset", "gpt2", "--preset", "nanogpt-cpu"]).preset == "nanogpt-cpu"


def test_values_are_read_as_yaml_but_text_as_typed():
    cfg = parse_config(
        [
            *CPU,
            *["--optim.grad_clip", "null", "--optim.lr", "1e-3", "--optim.betas", "[0.5,1e-1]"],
            *["--train.compile", "true", "--train.recompute", "false", "--train.eval_every=null"],
            *["--data.path", "7", "--data.text_key", "true", "--out", "#1", "--data.val_path", "a: b"],
        ]
    )
    assert cfg.optim.grad_clip is None
    assert (cfg.optim.lr, cfg.optim.betas) == (0.001, (0.5, 0.1))
    assert (cfg.train.compile, cfg.train.recompute, cfg.train.eval_every) == (True, False, None)
    assert (cfg.data.path, cfg.data.text_key, cfg.out, cfg.data.val_path) == ("7", "true", "#1", "a: b")
    assert parse_config([*CPU, "--data.path", "null"]).data.path is None


def test_a_negative_number_is_a_value_not_a_flag():
    with pytest.raises(InputError, match=r"--optim\.lr: got -5; give at least 0"):
        parse_config([*CPU, "--optim.lr", "-5"])


@pytest.mark.parametrize("length", ["train.epochs", "train.max_seconds", "train.steps"])
def test_a_length_replaces_the_length_of_lower_layers(tmp_path: Path, length: str):
    lengths = ("train.steps", "train.epochs", "train.max_seconds")
    expected = dict.fromkeys(lengths) | {length: 7}
    by_flag = flatten(parse_config(["--preset", "nanogpt-cpu", f"--{length}", "7"]))
    assert {key: by_flag[key] for key in lengths} == expected
    file = tmp_path / "my.yaml"
    file.write_text(f"{length}: 7\n")
    by_file = flatten(parse_config(["--preset", "nanogpt-cpu", "--config", str(file)]))
    assert {key: by_file[key] for key in lengths} == expected


def test_no_length_at_all_is_refused():
    with pytest.raises(InputError, match=r"--train\.steps: got null; give exactly one"):
        validate(Config())


@pytest.mark.parametrize(("batch", "micro"), [(100, 25), (8, 8), (512, 32), (7, 7), (37, 1)])
def test_a_files_micro_batch_fits_itself_to_a_higher_layers_batch(batch: int, micro: int, tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("train: {batch_size: 512, micro_batch_size: 32}\n")
    arguments = ["--preset", "gpt2", "--config", str(file), *CPU]
    assert parse_config(arguments).train.micro_batch_size == 32
    assert parse_config([*arguments, "--train.batch_size", str(batch)]).train.micro_batch_size == micro


def test_a_presets_warm_up_may_outlast_a_short_run():
    assert parse_config(["--preset", "nanogpt-cpu", "--train.steps", "5"]).optim.warmup_steps == 100


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_run_is_repeated_by_its_own_configuration(name: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    cfg = parse_config(["--preset", name, *CPU, "--data.path", str(text), "--optim.betas", "[0.8,0.9]", "--seed", "3"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(cfg))
    assert parse_config(["--config", str(file)]) == cfg
    assert load_config(file) == cfg
    assert dump_config(parse_config(["--config", str(file)])) == file.read_text()


def test_a_dumped_configuration_has_absolute_paths_and_no_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").mkdir()
    argv = [
        "--out",
        "o",
        "--resume",
        "never",
        "--data.path",
        "a/*.txt",
        "--data.val_path",
        "v",
        "--data.tokenizer",
        "tok",
    ]
    dumped = yaml.safe_load(dump_config(parse_config([*CPU, *argv])))
    assert "out" not in dumped
    assert "resume" not in dumped
    paths = [dumped["data"][name] for name in ("path", "val_path", "tokenizer")]
    assert paths == [str(tmp_path / name) for name in ("a/*.txt", "v", "tok")]
    assert yaml.safe_load(dump_config(parse_config(CPU)))["data"]["tokenizer"] == "bpe"


def test_a_dumped_configuration_stands_in_order_of_definition():
    cfg = parse_config(CPU)
    dumped = yaml.safe_load(dump_config(cfg, omit=()))
    keys = [
        f"{k}.{i}" if isinstance(v, dict) else k for k, v in dumped.items() for i in (v if isinstance(v, dict) else [k])
    ]
    assert keys == list(flatten(cfg))


def test_home_directories_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_config([*CPU, "--data.path", "~/text"]).data.path == "/home/someone/text"


def test_print_config_prints_what_can_be_fed_back(run, tmp_path: Path):
    outcome = run("--print_config", "--preset", "gpt2", "--out", str(tmp_path / "o"), "--seed", "9")
    assert (outcome.code, outcome.err) == (0, "")
    file = tmp_path / "my.yaml"
    file.write_text(outcome.out)
    cfg = parse_config(["--config", str(file)])
    assert cfg == parse_config([*CPU, "--preset", "gpt2", "--out", str(tmp_path / "o"), "--seed", "9"])


def test_help_names_every_setting_with_default_and_meaning(run):
    outcome = run("--help")
    assert run("-h") == outcome
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert len(lines) < 75
    for key in leaves(Config):
        assert any(line.strip().startswith(f"--{key} ") for line in lines), key
    assert any("--optim.betas" in line and "[0.9, 0.95]" in line and "adam" in line for line in lines)
    assert any("--optim.schedule" in line and "constant | linear | cosine" in line for line in lines)
    for name in ("--preset", "--config", "--print_config", "nanogpt-cpu"):
        assert name in outcome.out


def test_every_numeric_setting_has_bounds():
    numeric = {
        key
        for key, leaf in leaves(Config).items()
        if {int, float} & set(getattr(leaf.hint, "__args__", (leaf.hint,))) or key == "optim.betas"
    }
    assert numeric == set(BOUNDS)


def test_refusals_of_later_features_name_keys_and_values_that_exist():
    for key, values, _ in LATER:
        words = config.leaves(Config)[key].hint
        assert all(":" in value or value in words.__args__ for value in values)


# Presets


def test_the_character_preset_is_the_published_recipe():
    cfg = parse_config(["--preset", "nanogpt-cpu"])
    assert (cfg.data.tokenizer, cfg.data.seq_len, cfg.data.val_fraction) == ("char", 64, 0.1)
    model = cfg.model
    assert (model.family, model.n_layer, model.n_head, model.n_embd) == ("gpt2", 4, 4, 128)
    assert (model.tie_embeddings, model.bias, model.dropout) == (True, False, 0.0)
    optim = cfg.optim
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 1e-3, (0.9, 0.99), 0.1)
    assert (optim.grad_clip, optim.schedule, optim.warmup_steps) == (1.0, "cosine", 100)
    assert optim.lr * optim.min_lr_ratio == pytest.approx(1e-4)
    assert (cfg.train.steps, cfg.train.batch_size, cfg.train.eval_every) == (2000, 12, 250)
    assert (cfg.train.precision, cfg.train.compile) == ("fp32", False)


@pytest.mark.parametrize(
    ("gpt2", "modern", "shape"),
    [
        ("gpt2", "modern-124m", (12, 12, 768)),
        ("gpt2-medium", "modern-350m", (24, 16, 1024)),
        ("gpt2-large", "modern-774m", (36, 20, 1280)),
        ("gpt2-xl", "modern-1.5b", (48, 25, 1600)),
    ],
)
def test_sizes(gpt2: str, modern: str, shape: tuple[int, int, int]):
    for name, family, optimizer in ((gpt2, "gpt2", "adamw"), (modern, "modern", "muon")):
        cfg = parse_config(["--preset", name])
        assert (cfg.model.n_layer, cfg.model.n_head, cfg.model.n_embd) == shape
        assert (cfg.model.family, cfg.optim.name, cfg.data.tokenizer) == (family, optimizer, "gpt2")
        assert cfg.train.batch_size * cfg.data.seq_len == 524_288


@pytest.mark.parametrize(("device", "file"), [("cpu", "default"), ("mps", "default"), ("cuda", "default-cuda")])
def test_the_default_preset_is_sized_by_device(monkeypatch, device: str, file: str):
    monkeypatch.setattr(config, "resolve_device", lambda name: device if name == "auto" else name)
    expected = yaml.safe_load((Path(config.__file__).parent / "presets" / f"{file}.yaml").read_text())
    cfg = parse_config([])
    assert (cfg.preset, cfg.device) == ("default", "auto")
    assert (cfg.model.n_layer, cfg.model.n_embd) == (expected["model"]["n_layer"], expected["model"]["n_embd"])
    assert parse_config(["--device", device]).model == cfg.model
    assert parse_config(["--preset", "gpt2"]).model.n_layer == 12  # only `default` comes in sizes
    explicit = parse_config(["--device", "cpu"])
    assert (explicit.model == cfg.model) == (file == "default")


def test_a_file_s_device_sizes_the_default_too(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(config, "resolve_device", lambda name: name)
    file = tmp_path / "my.yaml"
    file.write_text("device: cuda\n")
    assert parse_config(["--config", str(file)]).model == parse_config(["--device", "cuda"]).model


# Devices


@pytest.fixture
def devices(monkeypatch) -> Callable[..., None]:
    def present(*, cuda: bool, mps: bool) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return present


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_fastest_device(devices, cuda: bool, mps: bool, best: str):
    devices(cuda=cuda, mps=mps)
    assert resolve_device("auto") == best
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(devices, run, name: str):
    devices(cuda=False, mps=False)
    assert_refused(run("--device", name), "--device", name, "use --device cpu or auto")
    with pytest.raises(InputError, match="use --device cpu or auto"):
        resolve_device(name)
    devices(cuda=True, mps=True)
    assert resolve_device(name) == name


# Comparing two configurations


def changed(cfg: Config, key: str, value: object) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(cfg, **{name: value})
    inner = dataclasses.replace(getattr(cfg, section), **{name: value})
    return dataclasses.replace(cfg, **{section: inner})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("model.n_layer", 5),
        ("model.tie_embeddings", True),
        ("data.path", "elsewhere"),
        ("data.tokenizer", "byte"),
        ("optim.lr", 0.5),
        ("optim.grad_clip", None),
        ("train.steps", 77),
        ("train.steps", None),
        ("train.batch_size", 4),
    ],
)
def test_a_different_run_is_told_with_both_values(key: str, value: object):
    old = parse_config(CPU)
    difference = config_difference(old, changed(old, key, value))
    (found,) = difference
    before = flatten(old)[key]
    assert found[:2] == (key, before)
    assert found[2] == (str(Path("elsewhere").absolute()) if key == "data.path" else value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("out", "o"), ("resume", "never"), ("train.log_every", 3), ("train.keep", 5), ("train.micro_batch_size", 1)],
)
def test_what_does_not_make_another_run(key: str, value: object):
    old = parse_config(CPU)
    assert config_difference(old, changed(old, key, value)) == []


def test_what_is_left_to_be_derived_agrees_with_what_was_derived():
    new = parse_config(CPU)
    old = new
    resolved = {"kernels": "torch", "attention": "sdpa", "n_kv_head": 4, "max_seq_len": 256, "tie_embeddings": False}
    for name, value in resolved.items():
        old = changed(old, f"model.{name}", value)
    assert config_difference(old, new) == []
    assert [key for key, _, _ in config_difference(old, changed(new, "model.n_kv_head", 2))] == ["model.n_kv_head"]


# Other commands


@dataclass
class Options:
    """Options of a command for this test."""

    run: str  # a run directory
    count: int = 3  # how many
    mode: Literal["fast", "slow"] = "fast"
    temperature: float | None = None
    data: DataConfig = field(default_factory=DataConfig)


def parse_options(*argv: str) -> Options:
    return parse_arguments(Options, argv, command="fastlm.x", positional="run")


def test_another_command_parses_its_own_dataclass():
    expected = Options("runs/a", count=4, temperature=0.5, data=DataConfig(path="f"))
    words = ["--count", "4", "--temperature=0.5", "--data.path", "f"]
    for place in range(0, 6, 5):
        assert parse_options(*words[:place], "runs/a", *words[place:]) == expected


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "RUN: got nothing; name it, as in python -m fastlm.x RUN"),
        (["--count", "4"], "RUN: got nothing; name it, as in python -m fastlm.x RUN"),
        (["a", "b"], "argument: got b; options are written --KEY VALUE"),
        (["--run", "a"], "--run: got a; no such option"),
        (["a", "--mode", "fst"], "--mode: got fst; choose one of fast, slow; did you mean fast?"),
        (["a", "--temperature", ".inf"], "--temperature: got .inf; give a finite number"),
        (["a", "--data", "f"], "--data: got f; no such option; did you mean --data.path f?"),
        (["a", "--coun", "4"], "--coun: got 4; no such option; did you mean --count?"),
    ],
)
def test_another_command_refuses_in_the_same_form(argv: list[str], error: str):
    with pytest.raises(InputError) as caught:
        parse_options(*argv)
    assert str(caught.value).startswith(error)


def test_another_command_s_help(capsys):
    with pytest.raises(SystemExit) as ending:
        parse_options("--help")
    assert ending.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m fastlm.x RUN [--KEY VALUE ...]\n")
    for words in (["RUN", "required", "a run directory"], ["--count", "3", "how many"], ["--data.path", "null"]):
        assert any(all(word in line for word in words) for line in out.splitlines()), words


@pytest.mark.parametrize(
    ("name", "near"),
    [("optim", "optim.name"), ("n_embd", "model.n_embd"), ("modl.n_embd", "model.n_embd"), ("xyzzy", None)],
)
def test_nearest_key(name: str, near: str | None):
    fields = leaves(Config)
    assert nearest_key(name, fields, fields) == near


def test_bounds_are_tight():
    cfg = parse_config(CPU)
    for key, bound in BOUNDS.items():
        if key == "optim.betas":
            continue
        step = 1 if isinstance(flatten(cfg)[key], int) or "n_" in key else 1e-9
        for edge, is_open, out in ((bound.low, bound.open_low, -step), (bound.high, bound.open_high, step)):
            if edge == math.inf:
                continue
            assert bound.holds(edge) != is_open, key
            assert not bound.holds(edge + out), key
            assert bound.holds(edge - out), key


def test_importing_needs_only_numpy_torch_and_the_standard_library():
    block = "import sys\nfor m in ('yaml jsonargparse rich tensorboard matplotlib safetensors tokenizers'.split()):\n"
    block += "    sys.modules[m] = None\n"
    block += "import fastlm.config, fastlm.checkpoint, fastlm.log, fastlm.plot, fastlm.errors, fastlm.arguments"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{[1]: 2}: 3\n", "[" * 3000], ids=["list", "nested", "deep"])
def test_a_key_that_is_no_word_is_one_clear_line(text: str, tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"my\.yaml"):
        parse_config(["--config", str(file), *CPU])
