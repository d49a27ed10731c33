"""Does a Hugging Face model compute the same once patched, and in what time and memory?   check.py's --model DIR.

The model in DIR is loaded without dropout, takes one batch of random tokens (the second row padded on the right, labels
of its task), and is then patched by `hf.patch`. The loss and every parameter's gradient are compared with a run of the
unpatched model in fp64. The unit of error of a result is

    u = eps(dtype) rms(ref) + rms(change of ref under a relative eps(dtype) perturbation of all parameters)
      + eps(dtype) / 100 of the root mean square of all gradients

and the rule that of accuracy.py, for the root mean square: rms(err) / u <= 2 rms(err of the unpatched model) / u + 4.
The last term of u is for gradients that are zero but for rounding: those of the bias of attention's keys. Parameters
are bf16 on a GPU and fp32 elsewhere; the fp64 run takes 8 bytes a parameter, and as much again for its gradients.

Time and memory are of forward and backward in training mode. The two models take turns, after a run apart: the median
time and its quartiles; no ratio where these lie more than a fifth of the median apart, for then other programs are
timed too, nor where nothing was patched. The peak is a GPU's, gradients included, and the bytes are those that forward
keeps for backward; parameters are left out.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _runtime, hf
from ._command import BadInput, where
from .norm import rms_norm

_DRAWS = 2
# Rounds of timing, at least, and until these seconds are over or there is no need of more.
_FEWEST_ROUNDS, _MOST_ROUNDS, _ENOUGH_SECONDS = 10, 100, 2.0
_WIDEST_SPREAD = 0.2  # of a time that is compared with another
_IGNORED = -100
# Rows and tokens of the batch that is compared, and of the one that is timed.
_COMPARED = (2, 64)
_TIMED_ON_GPU = (8, 1024)
# The end of a model class's name -> labels for it, from (tokens, which of them are not padding, number of classes).
_LABELS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "ForCausalLM": lambda tokens, real, classes: tokens.masked_fill(~real, _IGNORED),
    "LMHeadModel": lambda tokens, real, classes: tokens.masked_fill(~real, _IGNORED),
    "ForMaskedLM": lambda tokens, real, classes: tokens.masked_fill(~real, _IGNORED),
    "ForTokenClassification": lambda tokens, real, classes: (tokens % classes).masked_fill(~real, _IGNORED),
    "ForSequenceClassification": lambda tokens, real, classes: (
        torch.arange(len(tokens), device=tokens.device) % classes
    ),
}

Batch = dict[str, Tensor]


class Time(NamedTuple):
    """Seconds: the median of some runs, and the quartiles around it."""

    median: float
    low: float
    high: float

    @property
    def steady(self) -> bool:
        """Whether the runs agree well enough to be compared with others."""
        return self.high - self.low <= _WIDEST_SPREAD * self.median


class Cost(NamedTuple):
    """What a forward and backward takes; `peak` is None where no GPU counts it."""

    time: Time
    kept: int  # bytes
    peak: int | None  # bytes


class Compared(NamedTuple):
    """One line of the table: error and allowance in units."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is a number within what is allowed."""
        return self.error <= self.allowed


def load(directory: Path, dtype: torch.dtype) -> Any:
    """The model in `directory`, of the class that its configuration names, without dropout; BadInput if it is none."""
    if not (directory / "config.json").is_file():
        state = "holds no config.json" if directory.is_dir() else "is no directory"
        raise BadInput("--model", directory, f"that {state}; give a directory that save_pretrained wrote")
    try:
        import transformers
    except ImportError:
        raise BadInput("--model", directory, "it needs transformers; pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "vocab_size"):
            raise BadInput("--model", directory, "it takes more than tokens; give a decoder or an encoder of text")
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return kind.from_pretrained(directory, config=config, local_files_only=True, dtype=dtype)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise BadInput(
            "--model", directory, f"transformers cannot load it ({reason}); give a model's directory"
        ) from None


def batch_for(model: Any, rows: int, tokens: int, device: torch.device, *, padded: bool = True) -> Batch:
    """Random tokens, their mask, in which `padded` makes the second row a quarter shorter, and labels if the model's
    class takes them. (rows, tokens), less where the model has fewer positions. The padding is shorter than a window of
    the model's attention: a query that sees no key at all makes some models' own results NaN.
    """
    config = model.config
    # Two positions stay free: RoBERTa's begin behind the padding index.
    tokens = max(2, min(tokens, getattr(config, "max_position_embeddings", tokens + 2) - 2))
    generator = torch.Generator().manual_seed(0)
    low = min(3, config.vocab_size - 1)  # ids below 3 are often special, the pad token among them
    ids = torch.randint(low, config.vocab_size, (rows, tokens), generator=generator)
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        padding = min(tokens // 4, (getattr(config, "sliding_window", None) or tokens) - 1)
        real[1:2, tokens - padding :] = False
    batch = {"input_ids": ids, "attention_mask": real.long()}
    for end, labels in _LABELS.items():
        if type(model).__name__.endswith(end):
            batch["labels"] = labels(ids, real, max(2, getattr(config, "num_labels", 2)))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The model's loss on its labels; without labels the mean square of its first output."""
    outputs = model(**batch)
    return outputs.loss if "labels" in batch else outputs[0].square().mean()


def results(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The loss and the gradient of each parameter that has one, by name; on the CPU, so that several fit."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    found |= {f"gradient of {name}": p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def rms(tensor: Tensor) -> float:
    """The root mean square, formed in fp64."""
    return tensor.double().square().mean().sqrt().item()


def units(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the results in fp64, the unit of error of each)."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # grouped products know no fp64
    truth, eps = results(exact, batch), torch.finfo(dtype).eps
    gradients = [g for name, g in truth.items() if name != "loss"]
    squares = sum(g.square().sum().item() for g in gradients)
    everywhere = math.sqrt(squares / sum(g.numel() for g in gradients))
    unit = {name: eps * (rms(ref) + (0.0 if name == "loss" else everywhere / 100)) for name, ref in truth.items()}
    start = [p.detach().clone() for p in exact.parameters()]
    generator = torch.Generator().manual_seed(0)
    change = dict.fromkeys(truth, 0.0)
    for _ in range(_DRAWS):
        with torch.no_grad():  # each parameter moves by eps of itself, up or down
            for p, p0 in zip(exact.parameters(), start, strict=True):
                signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1
                p.copy_(p0 * (1 + eps * signs.to(p)))
        moved = results(exact, batch)
        change = {name: max(change[name], rms(moved[name] - ref)) for name, ref in truth.items()}
    return truth, {name: value + change[name] for name, value in unit.items()}


def compare(before: Any, after: Any, batch: Batch, dtype: torch.dtype) -> list[Compared]:
    """The rule, applied to the loss and every gradient of `after`, with `before` as the baseline."""
    truth, unit = units(before, batch, dtype)
    theirs, ours = results(before, batch), results(after, batch)
    lines = []
    for name, ref in truth.items():
        if name not in ours:
            lines.append(Compared(name, float("nan"), 0.0))
            continue
        error, base = (rms(found[name].double() - ref) / unit[name] for found in (ours, theirs))
        lines.append(Compared(name, error, 2 * base + 4))
    return lines


def costs(models: Sequence[Any], batch: Batch) -> list[Cost]:
    """What one forward and backward of each model takes on its device; they take turns, so that load meets them all."""
    on_gpu = next(iter(batch.values())).is_cuda
    kept = [_bytes_kept(model, batch) for model in models]  # the first run, too: compiles and imports
    seconds: list[list[float]] = [[] for _ in models]
    peaks: list[list[int]] = [[] for _ in models]
    begun = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _FEWEST_ROUNDS and time.perf_counter() - begun > _ENOUGH_SECONDS:
            break
        for model, its_seconds, its_peaks in zip(models, seconds, peaks, strict=True):
            at_rest = 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                at_rest = torch.cuda.memory_allocated()
            its_seconds.append(_seconds(lambda model=model: loss_of(model, batch).backward(), on_gpu))
            model.zero_grad()
            if on_gpu:
                its_peaks.append(torch.cuda.max_memory_allocated() - at_rest)
    return [Cost(_time(s), k, max(p, default=None)) for s, k, p in zip(seconds, kept, peaks, strict=True)]


def _time(seconds: list[float]) -> Time:
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Time(median.item(), low.item(), high.item())


def _bytes_kept(model: Any, batch: Batch) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, batch).backward()
    model.zero_grad()
    return sum(kept.values())


def _seconds(call: Callable[[], Any], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _print_head(directory: Path, model: Any, device: torch.device, dtype: torch.dtype) -> None:
    probe = torch.ones(2, 8, device=device, dtype=dtype)
    path = _runtime.explain(rms_norm, probe, (8,)).path
    count = sum(p.numel() for p in model.parameters())
    sys.stdout.write(f"fastlm_kernels {where(device)}; path {path}\n")
    name = str(dtype).removeprefix("torch.")
    sys.stdout.write(f"{type(model).__name__} from {directory}, {count:,} parameters, {name}\n")


def _print_report(model: Any) -> None:
    """What `hf.report` says, the modules of one class and fate in one line."""
    fates = Counter((line.module, line.patched, line.reason) for line in hf.report(model))
    width = max((len(module) for module, _, _ in fates), default=0)
    for (module, patched, reason), count in fates.items():
        sys.stdout.write(f"{count:4} {module:{width}}  {'patched' if patched else 'left alone':12}{reason}\n")


def _print_errors(lines: list[Compared]) -> None:
    failing = [line for line in lines if not line.ok]
    shown = failing or sorted(lines[1:], key=lambda line: line.error / line.allowed)[-3:]
    width = max(len(line.name) for line in lines)
    sys.stdout.write(f"{'result':{width}}{'error':>10}{'allowed':>10}\n")
    for line in [lines[0], *(line for line in shown if line is not lines[0])]:
        sys.stdout.write(f"{line.name:{width}}{line.error:10.2f}{line.allowed:10.2f}  {'ok' if line.ok else 'FAIL'}\n")
    sys.stdout.write(f"{len(lines) - len(failing)} of {len(lines)} results pass, the worst are shown\n")


def _print_costs(before: Cost, after: Cost, batch: Batch, patched: bool) -> None:
    rows, tokens = batch["input_ids"].shape
    title = f"forward and backward of {rows} x {tokens} tokens"
    sys.stdout.write(f"{title:40}{'before':>10}{'after':>10}{'ratio':>8}\n")
    times, steady = (before.time, after.time), before.time.steady and after.time.steady
    table = [
        ("milliseconds, the median", *(time.median * 1e3 for time in times), steady),
        ("  a quarter of the runs took less than", *(time.low * 1e3 for time in times), False),
        ("  a quarter took more than", *(time.high * 1e3 for time in times), False),
        ("MiB kept for backward", before.kept / 2**20, after.kept / 2**20, True),
    ]
    if before.peak is not None and after.peak is not None:
        table.append(("MiB at the peak, parameters left out", before.peak / 2**20, after.peak / 2**20, True))
    for name, old, new, compared in table:
        ratio = f"{old / new:8.2f}" if patched and compared and new else ""
        sys.stdout.write(f"{name:40}{old:10.2f}{new:10.2f}{ratio}\n")
    if not patched:
        sys.stdout.write("nothing was patched: no ratios\n")
    elif not steady:
        sys.stdout.write("no ratio of times that vary by more than a fifth: try again when the machine is idle\n")


def check_model(directory: Path, device: torch.device) -> int:
    """Patch the model in `directory`, compare, print; 0 if every result is as accurate as before, 1 if not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = load(directory, dtype).to(device).train()
    after = hf.patch(copy.deepcopy(before))
    _print_head(directory, before, device, dtype)
    _print_report(after)
    lines = compare(before, after, batch_for(before, *_COMPARED, device), dtype)
    _print_errors(lines)
    size = _TIMED_ON_GPU if device.type == "cuda" else _COMPARED
    timed = batch_for(before, *size, device, padded=False)
    old, new = costs((before, after), timed)
    _print_costs(old, new, timed, any(line.patched for line in hf.report(after)))
    return 0 if all(line.ok for line in lines) else 1
