"""Does a Hugging Face model compute the same once patched, and in what time and memory?   check.py's --model DIR.

The model in DIR is loaded without dropout, takes one batch of random tokens (the second row padded on the right, labels
of its task), and is then patched by `hf.patch`. The loss and every parameter's gradient are compared with a run of the
unpatched model in fp64. The unit of error of a result is

    u = eps(dtype) rms(ref) + rms(change of ref under a relative eps(dtype) perturbation of all parameters)
      + eps(dtype) / 100 of the root mean square of all gradients

and the rule check.py's, for the root mean square: rms(err) / u <= 2 rms(err of the unpatched model) / u + 4. The last
term of u is for gradients that are zero but for rounding: those of the bias of attention's keys. Parameters are bf16 on
a GPU and fp32 elsewhere; the fp64 run takes 8 bytes a parameter, and as much again for its gradients.

Time and memory are of forward and backward in training mode: the best of several runs, the peak on a GPU, gradients
included, and the bytes that forward keeps for backward; parameters are left out.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _runtime, hf
from ._command import BadInput
from .check import where
from .norm import rms_norm

_DRAWS = 2
_ROUNDS = 5
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


class Cost(NamedTuple):
    """What a forward and backward takes; `peak` is None where no GPU counts it."""

    seconds: float
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
    class takes them. (rows, tokens), less where the model has fewer positions.
    """
    config = model.config
    # Two positions stay free: RoBERTa's begin behind the padding index.
    tokens = max(2, min(tokens, getattr(config, "max_position_embeddings", tokens + 2) - 2))
    generator = torch.Generator().manual_seed(0)
    low = min(3, config.vocab_size - 1)  # ids below 3 are often special, the pad token among them
    ids = torch.randint(low, config.vocab_size, (rows, tokens), generator=generator)
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        real[1:2, -(ids.shape[1] // 4) :] = False
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


def cost(model: Any, batch: Batch) -> Cost:
    """What one forward and backward of `model` takes on its device."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, batch).backward()
    on_gpu = next(iter(batch.values())).is_cuda
    seconds, at_rest = float("inf"), 0
    model.zero_grad()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
    for _ in range(_ROUNDS):
        model.zero_grad()
        seconds = min(seconds, _seconds(lambda: loss_of(model, batch).backward(), on_gpu))
    model.zero_grad()
    peak = torch.cuda.max_memory_allocated() - at_rest if on_gpu else None
    return Cost(seconds, sum(kept.values()), peak)


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


def _print_costs(before: Cost, after: Cost, batch: Batch) -> None:
    rows, tokens = batch["input_ids"].shape
    sys.stdout.write(
        f"{f'forward and backward of {rows} x {tokens} tokens':40}{'before':>10}{'after':>10}{'ratio':>8}\n"
    )
    table = [
        ("milliseconds", before.seconds * 1e3, after.seconds * 1e3),
        ("MiB kept for backward", before.kept / 2**20, after.kept / 2**20),
    ]
    if before.peak is not None and after.peak is not None:
        table.append(("MiB at the peak, parameters left out", before.peak / 2**20, after.peak / 2**20))
    for name, old, new in table:
        sys.stdout.write(f"{name:40}{old:10.2f}{new:10.2f}{old / new if new else float('inf'):8.2f}\n")


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
    _print_costs(cost(before, timed), cost(after, timed), timed)
    return 0 if all(line.ok for line in lines) else 1
