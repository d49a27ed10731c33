"""A run directory: where a run starts from, and opening one that exists.

config.yaml  metrics.jsonl  loss.png  samples.md  checkpoints/step_00000200/...
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO

import torch

import fastlm_kernels as fk
from fastlm import checkpoint
from fastlm.arguments import build, flatten
from fastlm.checkpoint import Checkpoint
from fastlm.config import DERIVED, Config, config_difference, dump_config, load_config, resolve_device
from fastlm.data import Dataset, WindowOrder, open_dataset
from fastlm.errors import InputError, show
from fastlm.flops import parameters, training_flops
from fastlm.log import METRICS, MetricsLog, draw_loss, read_metrics
from fastlm.memory import step_memory
from fastlm.model import GPT
from fastlm.optim import build_optimizer
from fastlm.resolve import resolve, resolve_model
from fastlm.tokenizer import Tokenizer, load_tokenizer
from fastlm.weights import narrow, restore_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZER_BYTES = 8  # a parameter: two fp32 moments at most
DEVICE_BOUND = ("model.kernels", "model.attention", "train.compile", "train.cuda_graphs")  # decided for a device
TENSOR_CORE_ROWS = 128  # the head's rows are a multiple of this on a GPU


@dataclass
class State:
    """What a run has done. With the parameters and the optimizer's state this is all that a checkpoint holds."""

    step: int = 0  # updates consumed, skipped ones included
    tokens: int = 0  # target tokens seen
    samples: int = 0  # windows consumed: the next update takes [samples, samples + batch_size)
    seconds: float = 0.0  # training time, added up over restarts
    skipped: int = 0  # updates whose gradient was not finite
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Start:
    """Where a run starts: its directory, and the checkpoint that it goes on from (None: from nothing)."""

    out: Path
    checkpoint: Path | None
    stored: Config | None  # the configuration in that checkpoint
    same_run: bool  # it continues the run in `out`, so both configurations must agree
    notes: list[str]
    bad: list[Path] = field(default_factory=list)  # newer checkpoints that do not verify


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs, checked; `cfg` is resolved, `out` exists and is locked until `lock` closes."""

    cfg: Config
    dataset: Dataset
    model: GPT
    optimizer: torch.optim.Optimizer
    state: State
    out: Path
    lock: IO[str]
    may_shrink: bool = False  # the micro-batch was chosen here, and nothing was trained with it yet


def prepare(cfg: Config, note: Callable[[str], None]) -> Prepared | None:
    """Check everything, load or initialise, and only then create `out`; None for a finished run.

    `note` gets one line for each thing worth telling. Raises InputError, with nothing written.
    """
    start = find_start(cfg)
    may_shrink = start.checkpoint is None and not isinstance(cfg.train.micro_batch_size, int)
    if start.stored is not None:
        cfg = adopt(cfg, start.stored)
        if start.same_run:
            refuse_difference(start, cfg)
    device = torch.device(resolve_device(cfg.device))
    refuse_several_processes()
    dataset = open_dataset(cfg.data, note)
    loaded = None if start.checkpoint is None else checkpoint.load(start.checkpoint)
    if loaded is not None:
        compare_surroundings(start, loaded, dataset, device)
    steps = total_steps(cfg, WindowOrder(len(dataset.train), cfg.data.seq_len, cfg.seed).windows_per_epoch)
    cfg, decisions = resolve(cfg, device, dataset.vocab_size, steps)
    state = State() if loaded is None else restore_state(loaded)
    if is_finished(cfg, state, steps):
        if not start.same_run:
            raise InputError("--train.steps", steps, f"{start.checkpoint} is already at step {state.step}; give more")
        complete_record(start.out, state)
        note(f"{start.out}: finished at step {state.step}, nothing to do")
        return None
    model = build_model(cfg, dataset.vocab_size, device)
    optimizer = build_optimizer(cfg.optim, model, captured=cfg.train.cuda_graphs is True)
    if loaded is not None:
        load_weights(model, loaded, start)
        start.notes.extend(load_optimizer(optimizer, model, loaded, start.stored, cfg))
    narrow(model, optimizer, accumulate=cfg.train.micro_batch_size != cfg.train.batch_size)
    size = parameters(cfg.model, dataset.vocab_size).total
    checkpoint.check_free_space(start.out, (cfg.train.keep + 2) * size * (4 + OPTIMIZER_BYTES))
    lock = open_directory(start, cfg, state)
    for line in [*start.notes, *summary(start.out, cfg, dataset, steps), *decisions]:
        note(line)
    return Prepared(cfg, dataset, model, optimizer, state, start.out, lock, may_shrink)


def find_start(cfg: Config) -> Start:
    """Resolve `--out` and `--resume` to a directory and a checkpoint. Raises InputError; creates nothing."""
    named = Path(cfg.out) if cfg.out else None
    if named is not None and os.path.lexists(named) and not os.path.isdir(named):
        raise InputError("--out", cfg.out, "name a directory; this is a file")
    if cfg.resume in ("auto", "never"):
        out = named or Path("runs") / f"{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not holds_run(out):
            return Start(out, None, None, False, [])
        if cfg.resume == "never":
            raise InputError("--resume", "never", f"{out} holds a run; choose another --out, or --resume auto")
        return _continue(out)
    return _start_from(Path(cfg.resume), named)


def _continue(out: Path) -> Start:
    """The newest checkpoint of the run in `out` that verifies; from the beginning where it has none yet."""
    newest, bad = checkpoint.newest_verified(out)
    notes = [f"skipped {path.name}: {reason}" for path, reason in bad]
    if newest is None and bad:
        remedy = f"no checkpoint in it verifies ({bad[0][0].name}: {bad[0][1]}); move it away, or choose another --out"
        raise InputError("--out", out, remedy)
    if newest is None:
        config = out / "config.yaml"
        if not config.exists():
            raise InputError("--out", out, "it holds files of something else than a run; choose another directory")
        notes.append(f"{out} holds a run without a checkpoint: it starts again from step 0")
        return Start(out, None, load_config(config), True, notes)
    notes.append(f"resuming {out} from {newest.name}")
    return Start(out, newest, load_config(newest / checkpoint.CONFIG), True, notes, [path for path, _ in bad])


def _start_from(path: Path, out: Path | None) -> Start:
    """`--resume PATH`: whatever differs in the configuration is taken as meant."""
    found, skipped = checkpoint.find_checkpoint(path, "--resume")
    home = found.parent.parent
    out = out or home
    if out.resolve() != home.resolve() and holds_run(out):
        raise InputError("--out", out, "it holds another run than --resume names; choose another directory")
    notes = [f"skipped {bad.name}: {reason}" for bad, reason in skipped]
    notes.append(f"starting {out} from {found}")
    bad = [path for path, _ in skipped] if out.resolve() == home.resolve() else []
    return Start(out, found, load_config(found / checkpoint.CONFIG), False, notes, bad)


def holds_run(out: Path) -> bool:
    """Whether a run has written here before."""
    return any(os.path.lexists(out / name) for name in ("config.yaml", "metrics.jsonl", "checkpoints"))


def adopt(cfg: Config, stored: Config) -> Config:
    """`cfg` with what it leaves open (`auto`, derived nulls) as the stored run once decided it.

    What was decided for another device stays open.
    """
    before, now = flatten(stored), flatten(cfg)
    kept_open = ("resume", "device", *(DEVICE_BOUND if resolve_device(cfg.device) != stored.device else ()))
    for key, value in now.items():
        derived = value is None and key in (*DERIVED, "train.micro_batch_size")  # null there is auto
        if key not in kept_open and (value == "auto" or derived):
            now[key] = before[key]
    return build(Config, now)


def refuse_difference(start: Start, cfg: Config) -> None:
    """Two configurations in one directory would be two runs mixed."""
    assert start.stored is not None
    elsewhere = resolve_device(cfg.device) != start.stored.device
    for key, old, new in config_difference(start.stored, cfg):
        if elsewhere and key in DEVICE_BOUND:
            continue
        remedy = f"the run in {start.out} has {show(old)}; give that, or choose another --out"
        if start.checkpoint is not None:
            remedy += f", or --resume {start.checkpoint} to go on differently"
        raise InputError(f"--{key}", new, remedy)


def compare_surroundings(start: Start, loaded: Checkpoint, dataset: Dataset, device: torch.device) -> None:
    """Refuse data that changed under a run; note another device."""
    assert start.stored is not None
    if start.stored.device != device.type:
        start.notes.append(f"device: {device.type}, begun on {start.stored.device}: results agree within rounding")
    if start.same_run and loaded.state.get("data") != dataset.fingerprint:
        remedy = f"its content changed since the run in {start.out} began; restore it, or choose another --out"
        raise InputError("--data.path", start.stored.data.path or dataset.source, remedy)


def refuse_several_processes() -> None:
    """Two processes in one run directory would overwrite each other."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        remedy = "training on more than one device comes with a later version; start one process"
        raise InputError("WORLD_SIZE", os.environ["WORLD_SIZE"], remedy)


def complete_record(out: Path, state: State) -> None:
    """Write what a run killed behind its last checkpoint still owes: the lines of that save and of the end."""
    if any(line["event"] == "end" for line in read_metrics(out / METRICS)):
        return
    when = {"tokens": state.tokens, "seconds": state.seconds}
    with lock_directory(out), MetricsLog(out, state.step, saved=when) as metrics:
        metrics.write("end", step=state.step, **when)  # type: ignore[arg-type]
    draw_loss(out)


def restore_state(loaded: Checkpoint) -> State:
    """The counters that a checkpoint holds. Raises InputError where one is missing."""
    try:
        return State(**{f.name: loaded.state[f.name] for f in fields(State)})  # type: ignore[arg-type]
    except KeyError as error:
        remedy = f"its {checkpoint.STATE} lacks {error}; it is another version's, choose another --out"
        raise InputError("--resume", loaded.path, remedy) from None


def total_steps(cfg: Config, windows_per_epoch: int) -> int | None:
    """Updates in the whole run; None under a time limit, where the clock decides."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.epochs is not None:
        return max(1, math.ceil(cfg.train.epochs * windows_per_epoch / cfg.train.batch_size))
    return None


def is_finished(cfg: Config, state: State, steps: int | None) -> bool:
    """Whether the run's length is already reached."""
    if steps is not None:
        return state.step >= steps
    return cfg.train.max_seconds is not None and state.seconds >= cfg.train.max_seconds


def build_model(cfg: Config, vocab_size: int, device: torch.device) -> GPT:
    """A freshly initialised model on `device`: the same weights for the same seed on every device."""
    dtype = DTYPES[cfg.train.precision]
    multiple = TENSOR_CORE_ROWS if device.type == "cuda" else 1
    model = GPT(cfg.model, vocab_size, compute_dtype=dtype, recompute=cfg.train.recompute, vocab_multiple=multiple)
    return model.init_weights(torch.Generator().manual_seed(cfg.seed)).to(device)


def load_weights(model: GPT, loaded: Checkpoint, start: Start) -> None:
    """Copy a checkpoint's weights in place. Raises InputError where the shapes are another model's."""
    own = model.state_dict()
    for name, tensor in own.items():
        there = loaded.model.get(name)
        if there is None or there.shape != tensor.shape:
            shape = "nothing" if there is None else tuple(there.shape)
            remedy = f"its {name} has {shape}, this configuration's {tuple(tensor.shape)}; give its --model options"
            raise InputError("--resume", start.checkpoint, remedy)
    model.load_state_dict({name: loaded.model[name] for name in own})


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: GPT, loaded: Checkpoint, stored: Config | None, cfg: Config
) -> list[str]:
    """Put the optimizer's state back -> what there is to say about it."""
    if stored is not None and stored.optim.name != cfg.optim.name:
        return [f"optimizer: {cfg.optim.name} starts afresh, the checkpoint has the state of {stored.optim.name}"]
    restore_optimizer(model, optimizer, loaded.optimizer)
    if stored is not None and stored.optim.state_bits != cfg.optim.state_bits:
        return [f"optimizer: averages of {stored.optim.state_bits} bits, kept in {cfg.optim.state_bits} from here on"]
    return []


def lock_directory(out: Path) -> IO[str]:
    """Hold `out` for this process until the file returned is closed. Raises InputError if another one does."""
    try:
        lock = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the lock is held
    except OSError as error:
        raise InputError("--out", out, f"cannot write there ({error.strerror}); choose another directory") from None
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no such lock
        pass
    except OSError:
        lock.close()
        raise InputError("--out", out, "another process is training there; wait for it, or choose another") from None
    return lock


def open_directory(start: Start, cfg: Config, state: State) -> IO[str]:
    """Create the directory, or cut an existing one back to where the run goes on from -> its lock."""
    out = start.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(out)
        write_config(out, cfg)
        for path in start.bad:  # kept for whoever wants to know what happened to them
            path.replace(path.with_name(f"bad-{path.name}-{time.time_ns()}"))
    except OSError as error:
        raise InputError("--out", out, f"cannot write there ({error.strerror}); choose another directory") from None
    checkpoint.remove_partial(out)
    checkpoint.remove_after(out, state.step)
    return lock


def write_config(out: Path, cfg: Config) -> None:
    """Put the resolved configuration into the run's directory, whole. Raises OSError."""
    temporary = out / ".config.yaml.tmp"
    temporary.write_text(dump_config(cfg), encoding="utf-8")
    temporary.replace(out / "config.yaml")


def summary(out: Path, cfg: Config, dataset: Dataset, steps: int | None) -> list[str]:
    """What is about to happen, in numbers."""
    size = parameters(cfg.model, dataset.vocab_size)
    batch_tokens = cfg.train.batch_size * cfg.data.seq_len
    flops = training_flops(cfg, dataset.vocab_size, steps)
    memory = step_memory(cfg, dataset.vocab_size).peak
    length = f"{cfg.train.max_seconds:g} seconds" if steps is None else f"{steps:,} updates"
    total = "" if steps is None else f" = {steps * batch_tokens:,} tokens, {flops:.2e} FLOPs (6N + 12LDT a token)"
    return [
        f"run: {out}; to go on after a stop, the same command with --out {out}",
        f"data: {dataset.source}: {len(dataset.train):,} tokens for training, {len(dataset.val):,} for validation, "
        f"vocabulary {dataset.vocab_size:,}",
        f"model: {cfg.model.family}, {size.total:,} parameters, {size.matmul:,} of them in matrix products",
        f"length: {length} of {batch_tokens:,} tokens{total}",
        f"memory: about {memory / 2**30:.2f} GiB for a training step on {cfg.device}",
    ]


@dataclass(frozen=True)
class Run:
    """A trained model, opened for use."""

    cfg: Config
    model: GPT
    tokenizer: Tokenizer | None
    state: dict[str, object]
    checkpoint: Path

    def kernels(self) -> contextlib.AbstractContextManager[object]:
        """What to use the model in: PyTorch's ops on a CPU, where Triton's interpreter would take hours."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return fk.backend("torch") if on_cpu else contextlib.nullcontext()

    @property
    def document_start(self) -> int:
        """The id after which a text begins."""
        start = self.state["document_start"]
        assert isinstance(start, int), "a run with a tokenizer has one"
        return start


def open_run(path: str, device: str = "auto") -> Run:
    """Open a run directory's newest verified checkpoint, or one checkpoint, in fp32. Raises InputError."""
    found, _ = checkpoint.find_checkpoint(Path(path))
    cfg = load_config(found / checkpoint.CONFIG)
    resolve_model(cfg)
    loaded = checkpoint.load(found, optimizer=False)
    tokenizer_path = found / checkpoint.TOKENIZER
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.exists() else None
    vocab_size = loaded.state["vocab_size"]
    assert isinstance(vocab_size, int)
    model = GPT(cfg.model, vocab_size)
    model.load_state_dict(loaded.model)
    return Run(cfg, model.to(resolve_device(device)), tokenizer, loaded.state, found)
