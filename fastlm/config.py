"""What a run is made of: typed dataclasses, and how the command line, files and presets fill them.

Precedence, whatever the order typed: dataclass defaults < preset < --config file < dotted flags.
`None` (YAML `null`) means off, or "derive it" where the comment says so; `auto` is resolved once by
`fastlm.resolve`, written to the run's config.yaml, and never decided again.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastlm.arguments import (
    Values,
    build,
    complaint,
    convert,
    flatten,
    help_text,
    leaves,
    read_flags,
    read_yaml,
)
from fastlm.arguments import parse_arguments as parse_arguments  # a command needs only this module
from fastlm.errors import InputError

# What backward computes again, from nothing to all but each block's input (fastlm.model).
Recompute = Literal["none", "activation", "mlp", "block"]


@dataclass
class DataConfig:
    """Text or token shards, and how text becomes tokens."""

    path: str | None = None  # file, directory or glob; null = the Python standard library's own sources
    val_path: str | None = None  # null = split off `path`
    val_fraction: float = 0.1  # share of the text kept for validation
    tokenizer: str = "bpe"  # bpe, byte, char, gpt2, or a path to a tokenizer.json / its directory
    vocab_size: int | None = None  # of a BPE to be trained (null: by the text's size), or of shards without a tokenizer
    seq_len: int = 256  # tokens per training window
    text_key: str = "text"  # the field of a JSONL row that holds the text
    bin_format: Literal["header", "uint16"] = "header"  # layout of .bin shards


@dataclass
class ModelConfig:
    """The shape of the network; the vocabulary comes from the tokenizer."""

    family: Literal["modern", "gpt2", "lstm"] = "modern"  # lstm: not yet
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # query heads; must divide n_embd
    n_kv_head: int | None = None  # null = n_head; fewer = grouped-query attention (modern)
    n_embd: int = 256  # width of the residual stream
    max_seq_len: int | None = None  # positions the model can hold; null = data.seq_len
    dropout: float = 0.0  # on the embedding, the attention weights and each residual branch
    tie_embeddings: bool | None = None  # null = the family's own: gpt2 ties, modern does not
    bias: bool = True  # gpt2: biases in linears and norms; modern has none
    logit_softcap: float | None = None  # null = the family's own: modern 15, gpt2 off; 0 = off
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: ours where they run
    attention: Literal["auto", "triton", "sdpa", "flash"] = "auto"  # auto: measured fastest, else ours


@dataclass
class OptimConfig:
    """Which update each parameter gets, and the schedule that scales it."""

    name: Literal["muon", "adamw", "adam", "sgd", "adagrad", "adadelta", "rmsprop"] = "muon"  # muon: AdamW beside it
    lr: float = 0.03  # muon: the matrices' rate; others: every parameter's
    adam_lr: float = 0.01  # muon only: embedding, head and scalars
    betas: tuple[float, float] = (0.9, 0.95)  # adam, adamw, and the AdamW part of muon
    eps: float = 1e-8  # beside the root of the second average
    momentum: float = 0.95  # muon, sgd, rmsprop
    state_bits: Literal[32, 8] = 32  # adamw, adam, and the AdamW part of muon: bits of each of the two averages
    weight_decay: float = 0.0  # on tensors with two or more dimensions
    grad_clip: float | None = 1.0  # global norm; null = off
    schedule: Literal["constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd"] = "wsd"  # after warm-up
    warmup_steps: int = 0  # updates over which the rate rises from nearly 0
    min_lr_ratio: float = 0.0  # the schedule's end, as a share of its peak
    decay_fraction: float = 0.6  # wsd: share of the steps, at the end, over which the rate falls


@dataclass
class TrainConfig:
    """How long, in which portions, and what is written on the way."""

    steps: int | None = None  # updates; exactly one of steps, epochs, max_seconds sets the length
    epochs: float | None = None  # passes over the training text
    max_seconds: float | None = None  # of training
    batch_size: int = 32  # sequences per update, all devices together
    micro_batch_size: Literal["auto"] | int | None = "auto"  # sequences per forward pass and device; auto = what fits
    eval_every: int | None = 100  # null = only before the first and after the last step
    save_every: int | None = 200  # null = only after the last step
    sample_every: int | None = None  # null = only after the last step
    log_every: int = 10  # updates between two lines of the log
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of activations; auto: bf16 on a GPU that has it
    compile: Literal["auto"] | bool = "auto"  # by torch.compile; auto: where it pays
    check_compile: bool = False  # compare compiled with eager gradients in the first updates; exit 3 if they differ
    cuda_graphs: Literal["auto"] | bool = "auto"  # replay the whole step as recorded, on a GPU
    recompute: Recompute | bool = "none"  # computed again in backward: less memory, more time; true = block
    profile: bool = False  # write a trace of a few early updates, and a table of where their time goes
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # one device so far; ddp, fsdp: not yet


@dataclass
class Config:
    """One run. Sections are reached by dotted keys: `--optim.lr 0.01`."""

    preset: str = "default"
    out: str | None = None  # null = runs/<preset>-<time>
    resume: str = "auto"  # auto, never, or a run directory / checkpoint
    seed: int = 1234  # of weights, data order and dropout
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


LENGTHS = ("train.steps", "train.epochs", "train.max_seconds")  # exactly one is set
RUN_KEYS = ("out", "resume")  # where a run goes, not what it is: kept out of its config.yaml
TOKENIZERS = ("bpe", "byte", "char", "gpt2")
DEFAULT_CUDA = "default-cuda.yaml"  # the size in which the preset `default` comes on a GPU
# Null or `auto` here means "derived": a resumed run may leave them open where the stored one has the result.
DERIVED = ("model.n_kv_head", "model.max_seq_len", "model.tie_embeddings", "model.logit_softcap")


class Bound(NamedTuple):
    """The numbers a key may hold: an interval, each end open or closed."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def remedy(self) -> str:
        low = f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return f"give {low}"
        return f"give {low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


POSITIVE, NOT_NEGATIVE, COUNT = Bound(0, open_low=True), Bound(0), Bound(1)
SHARE = Bound(0, 1)  # both ends included
BELOW_ONE = Bound(0, 1, open_high=True)

BOUNDS: dict[str, Bound] = {
    "seed": Bound(0, 2**63, open_high=True),
    "data.val_fraction": Bound(0, 1, open_low=True, open_high=True),
    "data.vocab_size": Bound(1, 2**18),
    "data.seq_len": COUNT,
    "model.n_layer": COUNT,
    "model.n_head": COUNT,
    "model.n_kv_head": COUNT,
    "model.n_embd": COUNT,
    "model.max_seq_len": COUNT,
    "model.dropout": BELOW_ONE,
    "model.logit_softcap": NOT_NEGATIVE,
    "optim.lr": NOT_NEGATIVE,
    "optim.adam_lr": NOT_NEGATIVE,
    "optim.betas": BELOW_ONE,
    "optim.eps": POSITIVE,  # 0 divides 0 by 0 where a row got no gradient yet
    "optim.momentum": BELOW_ONE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.grad_clip": POSITIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.min_lr_ratio": SHARE,
    "optim.decay_fraction": Bound(0, 1, open_low=True),
    "train.steps": COUNT,
    "train.epochs": POSITIVE,
    "train.max_seconds": POSITIVE,
    "train.batch_size": COUNT,
    "train.micro_batch_size": COUNT,
    "train.eval_every": COUNT,
    "train.save_every": COUNT,
    "train.sample_every": COUNT,
    "train.log_every": COUNT,
    "train.keep": Bound(2),  # one alone would be lost with a file that goes bad
}

# What this version does not do yet: (key, values refused, what to write instead).
LATER: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("model.family", ("lstm",), "the LSTM comes with a later version; use modern or gpt2"),
    ("train.parallel", ("ddp", "fsdp"), "more than one device comes with a later version; use auto"),
    (
        "data.path",
        ("hf:*",),
        "Hugging Face data sets come with a later version; give a file, directory or glob",
    ),
    (
        "data.val_path",
        ("hf:*",),
        "Hugging Face data sets come with a later version; give a file, directory or glob",
    ),
)


class Rule(NamedTuple):
    """What must hold between keys: the key to blame, whether `cfg` keeps the rule, and the remedy if not."""

    key: str
    holds: Callable[[Config], bool]
    remedy: Callable[[Config], str]


def _head_dim(cfg: Config) -> int:
    return cfg.model.n_embd // cfg.model.n_head


def _kv_heads(cfg: Config) -> int:
    return cfg.model.n_kv_head or cfg.model.n_head


def recompute_part(value: Recompute | bool) -> Recompute:
    """`--train.recompute` by name: true is "block", false "none"."""
    if isinstance(value, bool):
        return "block" if value else "none"
    return value


def micro_batch_size(cfg: Config, otherwise: int) -> int:
    """The configured number of sequences a forward pass; `otherwise` where it is left to be decided."""
    size = cfg.train.micro_batch_size
    return size if isinstance(size, int) else otherwise


RULES: tuple[Rule, ...] = (
    Rule(
        "model.n_head",
        lambda c: c.model.n_embd % c.model.n_head == 0,
        lambda c: (
            f"--model.n_embd {c.model.n_embd} must be a multiple of it; "
            f"try --model.n_head {largest_divisor(c.model.n_embd, c.model.n_head)}"
        ),
    ),
    Rule(
        "model.n_kv_head",
        lambda c: c.model.n_head % _kv_heads(c) == 0,
        lambda c: (
            f"--model.n_head {c.model.n_head} must be a multiple of it; "
            f"try --model.n_kv_head {largest_divisor(c.model.n_head, _kv_heads(c))}"
        ),
    ),
    Rule(
        "model.n_kv_head",
        lambda c: c.model.family != "gpt2" or _kv_heads(c) == c.model.n_head,
        lambda c: f"the gpt2 family has as many as --model.n_head {c.model.n_head}; leave it null",
    ),
    Rule(
        "model.n_embd",
        lambda c: c.model.family != "modern" or _head_dim(c) % 2 == 0,
        lambda c: (
            f"rotary positions need an even width per head, here {_head_dim(c)}; "
            f"give a multiple of {2 * c.model.n_head}"
        ),
    ),
    Rule(
        "model.max_seq_len",
        lambda c: c.model.max_seq_len is None or c.model.max_seq_len >= c.data.seq_len,
        lambda c: f"give at least --data.seq_len {c.data.seq_len}, or null for just that",
    ),
    Rule(
        "optim.min_lr_ratio",
        lambda c: c.optim.schedule != "exponential" or c.optim.min_lr_ratio > 0,
        lambda c: "an exponential schedule never reaches 0; give more, 0.1 for one",
    ),
    Rule(
        "optim.state_bits",
        lambda c: c.optim.state_bits == 32 or c.optim.name in ("muon", "adamw", "adam"),
        lambda c: f"--optim.name {c.optim.name} knows 32 alone; leave it out, or use adamw, adam or muon",
    ),
    Rule(
        "train.micro_batch_size",
        lambda c: c.train.batch_size % micro_batch_size(c, otherwise=1) == 0,
        lambda c: (
            f"--train.batch_size {c.train.batch_size} must be a multiple of it; try "
            f"{largest_divisor(c.train.batch_size, micro_batch_size(c, otherwise=1))}"
        ),
    ),
)


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most` (both at least 1)."""
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def check_bounds(options: object) -> None:
    """Raise InputError where a dataclass holds a number outside BOUNDS, an empty path or a name of LATER."""
    for key, value in flatten(options).items():
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            bound = BOUNDS.get(key)
            if bound and isinstance(number, int | float) and not bound.holds(number):
                raise InputError(f"--{key}", value, bound.remedy())
        if value == "":
            raise InputError(f"--{key}", value, "give a text, or leave the option out")
    for key, refused, remedy in LATER:
        value = flatten(options).get(key)
        if isinstance(value, str) and any(fnmatch.fnmatchcase(value, pattern) for pattern in refused):
            raise InputError(f"--{key}", value, remedy)


def validate(cfg: Config) -> None:
    """Raise InputError where `cfg` holds a value out of bounds, or two that do not go together."""
    check_bounds(cfg)
    lengths = {key: value for key, value in flatten(cfg).items() if key in LENGTHS and value is not None}
    if len(lengths) != 1:
        key, value = (LENGTHS[0], None) if not lengths else list(lengths.items())[-1]
        raise InputError(f"--{key}", value, f"give exactly one of {', '.join(f'--{name}' for name in LENGTHS)}")
    for rule in RULES:
        if not rule.holds(cfg):
            raise InputError(f"--{rule.key}", flatten(cfg)[rule.key], rule.remedy(cfg))


class Layer(NamedTuple):
    """Settings of one origin: a file, or the command line where `file` is None."""

    file: str | None
    values: Values


def parse_config(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for: defaults < preset < --config file < dotted flags.

    `--help` and `--print_config` print to stdout and exit with 0. Raises InputError for everything a user can
    get wrong in text; nothing on disk is touched.
    """
    fields = leaves(Config)
    flags = read_flags(argv, fields, options=("config",), switches=("help", "print_config"))
    if "help" in flags:
        sys.stdout.write(config_help())
        raise SystemExit(0)
    layers = []
    if "config" in flags:
        layers = [Layer(flags["config"], read_yaml(Path(flags["config"]), fields))]
    layers.append(Layer(None, {key: convert(fields[key], text) for key, text in flags.items() if key in fields}))
    cfg, origin = merge_layers([_preset_layer(layers), *layers])
    _check(cfg, origin, flags)
    if "print_config" in flags:
        sys.stdout.write(dump_config(cfg, omit=()))
        raise SystemExit(0)
    return cfg


def merge_layers(layers: Sequence[Layer]) -> tuple[Config, dict[str, str | None]]:
    """One Config from layers in rising precedence, and the file that set each key (None: a flag).

    Two settings follow what a higher layer sets: a length (steps, epochs or max_seconds) replaces the length
    of lower layers, and a lower layer's micro-batch shrinks to the largest divisor of a higher layer's batch.
    """
    values: Values = {}
    origin: dict[str, str | None] = {}
    for file, given in layers:
        if any(given.get(key) is not None for key in LENGTHS):
            values |= dict.fromkeys(LENGTHS)
        values |= given
        origin |= dict.fromkeys(given, file)
        batch, micro = values.get("train.batch_size"), values.get("train.micro_batch_size")
        if "train.batch_size" in given and "train.micro_batch_size" not in given and isinstance(micro, int):
            assert isinstance(batch, int)
            values["train.micro_batch_size"] = largest_divisor(batch, micro) if batch > 0 else micro
    for key in ("out", "data.path", "data.val_path", "data.tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = os.path.expanduser(str(values[key]))
    return build(Config, values), origin


def _check(cfg: Config, origin: Mapping[str, str | None], flags: Mapping[str, str]) -> None:
    """`validate`, what only a typed line can get wrong, and each error told in the words of its origin."""
    try:
        validate(cfg)
        check_tokenizer_name(cfg.data.tokenizer)
        # A preset's warm-up may outlast a short trial run; one typed beside that length is a mistake.
        warmup, steps = cfg.optim.warmup_steps, cfg.train.steps
        if "optim.warmup_steps" in flags and steps is not None and warmup >= steps:
            raise InputError("--optim.warmup_steps", warmup, f"give less than --train.steps {steps}")
    except InputError as error:
        key = error.key.removeprefix("--")
        raise complaint(key, flags.get(key, error.value), error.remedy, origin.get(key)) from None


def check_tokenizer_name(name: str) -> None:
    """Raise InputError unless `name` is one of TOKENIZERS, or a path that exists."""
    if name in TOKENIZERS or os.path.exists(os.path.expanduser(name)):
        return
    near = difflib.get_close_matches(name, TOKENIZERS, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]}?" if near else ""
    choices = f"choose one of {', '.join(TOKENIZERS)}, or the path of a tokenizer.json or its directory"
    raise InputError("--data.tokenizer", name, choices + guess)


def presets() -> dict[str, Path]:
    """Preset files by name, in alphabetical order; `default` stands for DEFAULT_CUDA too."""
    files = sorted((Path(__file__).parent / "presets").glob("*.yaml"))
    return {path.stem: path for path in files if path.name != DEFAULT_CUDA}


def _preset_layer(layers: Sequence[Layer]) -> Layer:
    """The preset that the highest of `layers` names; `default` comes in a size for each device."""
    name, file, device = "default", None, "auto"
    for layer in layers:
        if "preset" in layer.values:
            name, file = str(layer.values["preset"]), layer.file
        device = str(layer.values.get("device", device))
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise complaint("preset", name, f"choose one of {', '.join(known)}{guess}", file)
    if name == "default" and resolve_device(device) == "cuda":
        return Layer("preset default", read_yaml(known[name].with_name(DEFAULT_CUDA), leaves(Config)))
    return Layer(f"preset {name}", read_yaml(known[name], leaves(Config)))


def resolve_device(name: str) -> str:
    """The device type (cpu, cuda, mps) that `name` stands for here; `auto` takes the fastest there is.

    Raises InputError where this machine has no such device.
    """
    if name == "cpu":
        return name
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in present.items() if there)
    if not present[name]:
        raise InputError("--device", name, f"no {name.upper()} device here, use --device cpu or auto")
    return name


def config_help() -> str:
    """The text of `--help`."""
    extra = f"""\
presets: {", ".join(presets())}

  --config FILE.yaml       settings of a file, over the preset's and under the flags'
  --print_config           print the whole configuration as YAML and exit
  --help                   print this and exit"""
    return help_text(Config, "fastlm.train", extra=extra)


def dump_config(cfg: Config, omit: Sequence[str] = RUN_KEYS) -> str:
    """`cfg` as YAML in order of definition, paths absolute: `--config` on it repeats the run.

    `omit` names keys to leave out; by default those that say where a run goes, not what it is.
    """
    import yaml

    tree: dict[str, Any] = {}
    for key, value in flatten(absolute_paths(cfg)).items():
        if key in omit:
            continue
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = list(value) if isinstance(value, tuple) else value
    header = "# The configuration of a run; to repeat it: python -m fastlm.train --config THIS_FILE\n"
    return header + yaml.dump(tree, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=1000)


def _dumper() -> Any:
    """PyYAML's safe dumper: one key a line, lists on the line of their key."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def one_line(dumper: Any, items: list[object]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    Dumper.add_representer(list, one_line)
    return Dumper


def absolute_paths(cfg: Config) -> Config:
    """`cfg` with every path absolute, so that it means the same from any directory."""
    data = dataclasses.replace(cfg.data, path=_absolute(cfg.data.path), val_path=_absolute(cfg.data.val_path))
    if data.tokenizer not in TOKENIZERS:
        data.tokenizer = os.path.abspath(data.tokenizer)
    return dataclasses.replace(cfg, data=data, out=_absolute(cfg.out))


def _absolute(path: str | None) -> str | None:
    return path if path is None or path.startswith("hf:") else os.path.abspath(path)


def load_config(path: Path) -> Config:
    """The Config that a run wrote to `path`; keys it lacks have their defaults. Raises InputError."""
    return build(Config, read_yaml(path, leaves(Config)))


def config_difference(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """Where `new` is another run than `old`, as (key, old value, new value).

    Compared are model, data, optim, seed, batch size and length; `auto`, and null that means "derived", in
    `new` agree with whatever `old` made of them.
    """
    before, after = flatten(absolute_paths(old)), flatten(absolute_paths(new))
    different = []
    for key in before:
        if key not in (*LENGTHS, "seed", "train.batch_size") and not key.startswith(("model.", "data.", "optim.")):
            continue
        open_ = after[key] == "auto" or (after[key] is None and key in DERIVED)
        if before[key] != after[key] and not open_:
            different.append((key, before[key], after[key]))
    return different
