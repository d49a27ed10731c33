"""Checkpoints: directories that are either whole and verified, or not there.

    checkpoints/step_00000200/  model.safetensors  optimizer.safetensors  state.json  config.yaml
                                tokenizer.json  MANIFEST.json

One is written under `checkpoints/.tmp-*`, hashed while its bytes go out, flushed to the disk and renamed, so
that a crash at any point leaves the earlier ones untouched. Nothing is ever unpickled. Tensors are written in
the safetensors format by `write_tensors` rather than by its library: a checkpoint needs the hash of the bytes
sent (not of what the disk gives back), one tensor in memory at a time, the same bytes for the same run, and
an OSError when the disk is full. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from fastlm.errors import InputError

FORMAT = 1
MODEL, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
TOKENIZER, MANIFEST = "tokenizer.json", "MANIFEST.json"
Scalar = None | bool | int | float | str
Json = dict[str, object]

# The safetensors names of the dtypes it can hold and torch has.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SaveFailed(RuntimeError):
    """A checkpoint could not be written (disk full, for one); nothing half-written is left."""


class SavesItself(Protocol):
    def save(self, path: Path) -> object: ...


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory, tensors on the CPU."""

    path: Path
    step: int  # updates done
    model: dict[str, Tensor]  # tied names map to one tensor
    optimizer: dict[str, Tensor | Scalar]  # "parameter name/state key"; empty if not asked for
    state: Json  # what the trainer handed to `save`


# Writing


def save(
    run_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor | Scalar],
    state: Mapping[str, object],
    config: str,
    tokenizer: SavesItself | None = None,
) -> Path:
    """Write `run_dir/checkpoints/step_<step>` and return it; one of that step is replaced.

    `model` is a state_dict, `optimizer` what `optimizer_tensors` gives, `state` JSON (a "val_loss" in it
    decides which checkpoint is best; numbers that are not finite become null), `config` config.yaml's text.
    Raises SaveFailed where the file system refuses; `run_dir` is then as before.
    """
    final = checkpoint_path(run_dir, step)
    temporary = final.parent / f".tmp-{final.name}-{os.getpid()}"
    try:
        remove_partial(run_dir)
        temporary.mkdir(parents=True)
        files = _write_tensor_files(temporary, model, optimizer) | {
            STATE: _write(temporary / STATE, lambda f: f.write(json_bytes({**state, "step": step}))),
            CONFIG: _write(temporary / CONFIG, lambda f: f.write(config.encode())),
        }
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER)
            files[TOKENIZER] = _flush_and_hash(temporary / TOKENIZER)
        _write(temporary / MANIFEST, lambda f: f.write(json_bytes({"files": files, "format": FORMAT})))
        _flush_directory(temporary)
        if final.exists():
            final.rename(final.parent / f".tmp-old-{final.name}-{os.getpid()}")
        temporary.rename(final)
        _flush_directory(final.parent)
    except OSError as error:
        raise SaveFailed(f"checkpoint of step {step} not written: {error.strerror or error}") from error
    finally:
        remove_partial(run_dir)
    return final


def _write_tensor_files(
    folder: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor | Scalar]
) -> dict[str, Json]:
    """Both safetensors files, with their entries in the manifest."""
    tensors, tied = split_tied(model)
    scalars = {key: value for key, value in optimizer.items() if not isinstance(value, Tensor)}
    moments = {key: value for key, value in optimizer.items() if isinstance(value, Tensor)}
    return {
        MODEL: _write(folder / MODEL, lambda f: write_tensors(f, tensors, {"tied": tied})),
        OPTIMIZER: _write(folder / OPTIMIZER, lambda f: write_tensors(f, moments, {"scalars": scalars})),
    }


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def split_tied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state_dict as (each tensor once, under its first name; {other name: first name})."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor
    return tensors, tied


def write_tensors(file: Hashed, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write `tensors` (any device, strides and dtype of DTYPES) to `file` in the safetensors format.

    Each metadata value is stored as JSON text. The bytes are a function of names, values and metadata alone:
    the widest dtypes come first, which keeps every tensor aligned, then by name.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {key: json.dumps(metadata[key]) for key in sorted(metadata)}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: got dtype {tensor.dtype}; a checkpoint holds {', '.join(map(str, DTYPES))}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        plain = tensors[name].detach().cpu().contiguous()
        file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


class Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        self.file.write(data)
        self.bytes += len(data)


def _write(path: Path, produce: Callable[[Hashed], None]) -> Json:
    """Write a file through `produce` and onto the disk; its entry in the manifest."""
    with open(path, "wb") as file:
        hashed = Hashed(file)
        produce(hashed)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest()}


def _flush_and_hash(path: Path) -> Json:
    """The manifest entry of a small file that somebody else wrote, now on the disk too."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        data = file.read()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _flush_directory(path: Path) -> None:
    """Put a directory's entries on the disk, where the platform can (Windows cannot open one)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: object) -> bytes:
    """Strict JSON on one line; numbers that are not finite become null."""
    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def finite(value: object) -> object:
    """`value` with every float that JSON cannot hold (NaN, infinities) replaced by None, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


# Reading


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, oldest first, verified or not."""
    paths = (run_dir / "checkpoints").glob("step_*")
    return sorted((int(p.name[5:]), p) for p in paths if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir())


def verify(path: Path) -> str | None:
    """Why the checkpoint `path` cannot be trusted; None if every file is there and as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    absent = {MODEL, OPTIMIZER, STATE, CONFIG} - set(entries)
    if absent:
        return f"{MANIFEST} lacks {', '.join(sorted(absent))}"
    for name, entry in entries.items():
        reason = _verify_file(path / Path(name).name, *entry)
        if reason:
            return reason
    return None


def _verify_file(path: Path, size: int, sha256: str) -> str | None:
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                return f"{path.name} has {actual} bytes, not the {size} of its manifest"
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"{path.name} differs from its hash"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def newest_verified(run_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and those newer ones that do not, with the reason."""
    skipped = []
    for _, path in reversed(list_checkpoints(run_dir)):
        reason = verify(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def find_checkpoint(path: Path, key: str = "RUN") -> tuple[Path, list[tuple[Path, str]]]:
    """The checkpoint that `path`, a run directory or a checkpoint, stands for, and the newer ones skipped.

    Raises InputError, naming `key`, where there is none that verifies.
    """
    if not path.is_dir():
        raise InputError(key, path, "name a run directory or a checkpoint; there is no such directory")
    if (path / MANIFEST).exists() or re.fullmatch(r"step_\d{8,}", path.name):
        reason = verify(path)
        if reason:
            raise InputError(key, path, f"name a whole checkpoint; in this one {reason}")
        return path, []
    found, skipped = newest_verified(path)
    if found is None:
        why = "; ".join(f"{bad.name}: {reason}" for bad, reason in skipped[:3]) or "there is none"
        raise InputError(key, path, f"name a run directory that holds a whole checkpoint ({why})")
    return found, skipped


def load(path: Path, *, optimizer: bool = True) -> Checkpoint:
    """Read the checkpoint directory `path`, tensors onto the CPU; the optimizer's only where asked for.

    Verification is `verify`'s; whoever chose `path` has called it.
    """
    state = json.loads((path / STATE).read_bytes())
    model, metadata = read_tensors(path / MODEL)
    model |= {name: model[first] for name, first in metadata.get("tied", {}).items()}
    moments: dict[str, Tensor | Scalar] = {}
    if optimizer:
        tensors, metadata = read_tensors(path / OPTIMIZER)
        moments = {**tensors, **metadata.get("scalars", {})}
    return Checkpoint(path, state["step"], model, moments, state)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and its metadata values read as JSON where they are JSON.

    Each tensor has memory of its own: views of the mapped file would keep it open, at addresses whose
    alignment can change which vector kernels run on them.
    """
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata: dict[str, Any] = {}
        for key, text in (file.metadata() or {}).items():
            try:
                metadata[key] = json.loads(text)
            except ValueError:
                metadata[key] = text
    return tensors, metadata


# Keeping


def remove_partial(run_dir: Path) -> None:
    """Remove what an interrupted save left: call it before a run's first step."""
    for path in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(run_dir: Path, keep: int, keep_best: bool = True) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and, with `keep_best`, the one of lowest "val_loss".

    Between equals the newer one is best. Returns what was removed.
    """
    checkpoints = [path for _, path in list_checkpoints(run_dir)]
    kept = set(checkpoints[-keep:])
    losses = [(loss, path) for path in reversed(checkpoints) if (loss := _val_loss(path)) is not None]
    if keep_best and losses:
        kept.add(min(losses, key=lambda pair: pair[0])[1])
    removed = [path for path in checkpoints if path not in kept]
    for path in removed:
        _remove(path)
    return removed


def remove_after(run_dir: Path, step: int) -> list[Path]:
    """Remove checkpoints past `step`, where a resumed run goes on: they are another history's, or damaged."""
    removed = [path for found, path in list_checkpoints(run_dir) if found > step]
    for path in removed:
        _remove(path)
    return removed


def _val_loss(path: Path) -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        loss = json.loads((path / STATE).read_bytes()).get("val_loss")
        return float(loss) if isinstance(loss, int | float) else None
    return None


def _remove(path: Path) -> None:
    """Remove a checkpoint under another name, so that a crash half-way leaves nothing that looks like one."""
    doomed = path.parent / f".tmp-old-{path.name}-{os.getpid()}"
    with suppress(OSError):  # one that cannot go is no reason to stop a run
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Raise InputError where the file system that `path` is or will be on lacks `needed_bytes`."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        needs = f"the run's checkpoints need {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there"
        raise InputError("--out", path, f"{needs}; free some, or name another disk")


# Optimizer state


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor | Scalar]:
    """The state of a torch optimizer as {"parameter name/state key": tensor, number, text or None}.

    Hyperparameters are not in it: they are the configuration's. Raises ValueError for a parameter without a
    name, and for state that is neither a tensor nor a scalar.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    found: dict[str, Tensor | Scalar] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = tuple(parameter.shape)
                raise ValueError(f"a parameter of shape {shape} has no name; pass all of model.named_parameters()")
            for key, value in optimizer.state.get(parameter, {}).items():
                name = f"{names[id(parameter)]}/{key}"
                if not isinstance(value, Tensor | bool | int | float | str | None):
                    raise ValueError(f"{name}: got {type(value).__name__}; a checkpoint holds tensors and scalars")
                found[name] = value.detach() if isinstance(value, Tensor) else value
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor | Scalar],
) -> None:
    """Put back what `optimizer_tensors` gave, every dtype as it was (torch's own loader casts).

    State goes to its parameter's device, but for a "step" that torch keeps on the CPU. A tensor that is there
    already, of the same shape and dtype, is filled in place: captured graphs hold its address. Entries of
    parameters that this optimizer lacks are left alone, so that several optimizers can share one mapping.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    by_parameter: dict[str, dict[str, Tensor | Scalar]] = {}
    for name, value in tensors.items():
        parameter_name, _, key = name.partition("/")
        by_parameter.setdefault(parameter_name, {})[key] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            saved = by_parameter.get(names[id(parameter)], {})
            state = optimizer.state.get(parameter, {})
            on_cpu = not (group.get("capturable") or group.get("fused"))
            restored: dict[str, object] = {}
            for key, value in saved.items():
                device = torch.device("cpu") if key == "step" and on_cpu else parameter.device
                restored[key] = _restored(value, state.get(key), device)
            if restored:
                optimizer.state[parameter] = restored
            else:
                optimizer.state.pop(parameter, None)


def _restored(value: Tensor | Scalar, present: object, device: torch.device) -> object:
    if not isinstance(value, Tensor):
        return value
    if isinstance(present, Tensor) and (present.shape, present.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            return present.copy_(value)
    return value.detach().to(device, copy=True)
