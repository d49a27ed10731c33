"""Where an update's time goes: `--train.profile true` traces a few early updates of a run.

    RUN/profile/trace.json     for the PyTorch profiler's viewer (chrome://tracing, Perfetto)
    RUN/profile/families.txt   milliseconds an update by family of operations, against each one's floor

Time is the device's own: of kernels on a GPU, of operators on a CPU. A floor is what the family's arithmetic, or its
bytes, would take at the device's peak; it is shown where both are known.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastlm.config import Config, micro_batch_size
from fastlm.flops import flops_per_token, parameters, peak_bandwidth, peak_flops
from fastlm.log import warn
from fastlm.memory import moment_bytes

SKIPPED, TRACED = 2, 3  # updates: compilation and recording come first

# The first pattern found in the name of a kernel or an operator decides.
FAMILIES = (
    ("attention", r"attention|flash|fmha|sdpa"),
    ("loss", r"cross_entropy|log_softmax|\bsoftmax_(forward|backward)_kernel|nll_loss"),
    ("norm", r"rms_norm|layer_norm|add_norm|rsqrt|\bnorm_(forward|backward|weight)|sum_partials"),
    ("rotary", r"rotary|rope"),
    ("optimizer", r"fused_adam|update_kernel|norm_partial|control_kernel|momentum|newton|symmetric|foreach|optimizer"),
    ("embedding", r"embedding|index_select|radixsort"),
    ("activation", r"gelu|relu|silu|\b(unary|gated)_"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|\b(add)?mm\b|\bbmm\b|linear|matmul"),
    ("copies", r"memcpy|memset|copy|clone|\bcat\b|contiguous|fill|zero"),
)
OTHER = "other"
NAMED_OTHERS = 3  # of what has no family, the largest by name
TRACERS_OWN = b"USDT:"  # how lines begin that PyTorch's tracer writes to stderr for itself

Result = TypeVar("Result")


def family(name: str) -> str:
    """The family of a kernel or an operator."""
    return next((family for family, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), OTHER)


class StepProfile:
    """Runs updates, and traces those after the first few; a context manager, which writes a trace cut short."""

    def __init__(self, cfg: Config, vocab_size: int, device: torch.device, out: Path, note: Callable[[str], None]):
        self.cfg, self.vocab_size, self.device, self.out, self.note = cfg, vocab_size, device, out / "profile", note
        self.calls, self.profiler = 0, None

    def run(self, update: Callable[..., Result], *arguments: Any) -> Result:
        """update(*arguments), traced if it is its turn."""
        if not self.cfg.train.profile:
            return update(*arguments)
        self.calls += 1
        if self.calls == SKIPPED + 1:
            self._start()
        result = update(*arguments)
        if self.calls == SKIPPED + TRACED:
            self.close()
        return result

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.cfg.train.profile and self.calls <= SKIPPED:
            self.note(f"profile: none, the run ended before update {SKIPPED + 1} of this start")
        self.close()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)  # earlier updates are no part of it
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        self.profiler = profile(activities=activities, acc_events=True)  # one cycle; torch 2.11 warns otherwise
        with _without_tracers_lines():
            self.profiler.__enter__()

    def close(self) -> None:
        """Stop, write both files and note the table; nothing where no trace is open."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with _without_tracers_lines():
            profiler.__exit__(None, None, None)
        updates = self.calls - SKIPPED
        names = milliseconds(profiler.key_averages(), updates, self.device)
        table = render(names, floors(self.cfg, self.vocab_size))
        try:
            self.out.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.out / "trace.json"))
            (self.out / "families.txt").write_text(table, encoding="utf-8")
        except OSError as error:
            warn(f"the profile cannot be written ({error.strerror}); training goes on")
        self.note(f"profile of {updates} updates, trace in {self.out}\n{table.rstrip()}")


@contextlib.contextmanager
def _without_tracers_lines() -> Iterator[None]:
    """Hold back stderr of the whole process for a moment, and then let it go without the tracer's own lines."""
    try:
        kept = os.dup(2)
    except OSError:  # closed by whoever started us
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not line.startswith(TRACERS_OWN):
                    os.write(2, line)


def milliseconds(averages: Iterable[Any], updates: int, device: torch.device) -> dict[str, float]:
    """Milliseconds an update of each kernel or operator by its name, from the profiler's `key_averages`."""
    times: dict[str, float] = {}
    for event in averages:
        if device.type == "cuda":  # operators carry their kernels' time too: count kernels alone
            counts = event.device_type.name == "CUDA" and not event.is_user_annotation  # a range spans kernels
            own = event.self_device_time_total if counts else 0.0
        else:
            own = event.self_cpu_time_total
        if own:
            times[event.key] = times.get(event.key, 0.0) + own / 1e3 / updates
    return times


def floors(cfg: Config, vocab_size: int) -> dict[str, float]:
    """Least milliseconds an update, by family, at the peaks of this run's device; only what is known."""
    name = torch.cuda.get_device_name() if cfg.device == "cuda" else ""
    found = {}
    if (flops := peak_flops(name)) is not None:
        found |= {family: 1e3 * work / flops for family, work in arithmetic(cfg, vocab_size).items()}
    if (bandwidth := peak_bandwidth(name)) is not None:
        found |= {family: 1e3 * moved / bandwidth for family, moved in traffic(cfg, vocab_size).items()}
    return found


def arithmetic(cfg: Config, vocab_size: int) -> dict[str, float]:
    """FLOPs an update of the families that compute; attention's over the triangle that is needed."""
    tokens, seq_len = cfg.train.batch_size * cfg.data.seq_len, cfg.data.seq_len
    products = 6 * parameters(cfg.model, vocab_size).matmul
    attention = flops_per_token(cfg.model, vocab_size, seq_len, causal=True) - products
    return {"matrix products": float(tokens * products), "attention": float(tokens * attention)}


def traffic(cfg: Config, vocab_size: int) -> dict[str, float]:
    """Bytes an update of the families that only move them.

    A norm with its add reads two rows and writes two, its backward reads three and writes one. The loss reads and
    writes each logit once, with its gradient in the same place. The optimizer reads and writes what README counts.
    """
    tokens, size = cfg.train.batch_size * cfg.data.seq_len, 2 if cfg.train.precision == "bf16" else 4
    norms = (2 * cfg.model.n_layer + 1) * 8 * cfg.model.n_embd * size * tokens
    return {
        "norm": float(norms),
        "loss": 2.0 * tokens * vocab_size * size,
        "optimizer": float(_optimizer_bytes(cfg, parameters(cfg.model, vocab_size).total, size)),
    }


def _optimizer_bytes(cfg: Config, total: int, size: int) -> int:
    """A step with the norm's pass over the gradients; every average is read and written."""
    gradient = 4 if micro_batch_size(cfg, cfg.train.batch_size) < cfg.train.batch_size else size
    copy = size if size < 4 else 0
    plain = 2 * gradient + 8 + copy  # gradients twice, the master read and written
    return total * plain + 2 * moment_bytes(cfg, total)


def render(names: dict[str, float], least: dict[str, float]) -> str:
    """The table as text, the largest share first; `names` is `milliseconds`, what has no family is named in part."""
    times: dict[str, float] = {}
    for name, spent in names.items():
        times[family(name)] = times.get(family(name), 0.0) + spent
    others = sorted((name for name in names if family(name) == OTHER), key=lambda name: -names[name])
    total = sum(times.values()) or 1.0
    lines = [f"{'family':<16} {'ms/update':>10} {'share':>6} {'floor ms':>9} {'of floor':>8}"]
    for name, spent in sorted(times.items(), key=lambda item: -item[1]):
        floor = least.get(name)
        reach = ("-", "-") if floor is None else (f"{floor:.3f}", f"{floor / spent:.0%}")
        lines.append(f"{name:<16} {spent:>10.3f} {spent / total:>6.1%} {reach[0]:>9} {reach[1]:>8}")
        parts = others[:NAMED_OTHERS] if name == OTHER else ()
        lines += [f"{'  of it':<16} {names[part]:>10.3f} {names[part] / total:>6.1%}  {part[:70]}" for part in parts]
    return "\n".join([*lines, f"{'sum':<16} {total:>10.3f}"]) + "\n"
