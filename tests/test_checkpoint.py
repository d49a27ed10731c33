"""Checkpoints: exact round trips, verification, crashes and full disks, what is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastlm import checkpoint
from fastlm.checkpoint import (
    DTYPES,
    SaveFailed,
    check_free_space,
    find_checkpoint,
    list_checkpoints,
    load,
    newest_verified,
    optimizer_tensors,
    prune,
    remove_after,
    remove_partial,
    restore_optimizer,
    save,
    verify,
)
from fastlm.errors import InputError


class FakeTokenizer:
    def save(self, path: Path) -> None:
        path.write_text('{"model": "fake"}')


def write(run_dir: Path, step: int, *, model: dict[str, Tensor] | None = None, **state: object) -> Path:
    return save(
        run_dir,
        step,
        model=model or {"w": torch.full((3, 2), float(step))},
        optimizer={"w/step": torch.tensor(float(step)), "w/flag": True},
        state=state,
        config="seed: 1\n",
        tokenizer=FakeTokenizer(),
    )


def hard_tensors() -> dict[str, Tensor]:
    """One tensor of every dtype, and views whose memory is not what their values suggest."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPES:
        values = torch.randint(0, 2, (3, 5), generator=g) if dtype == torch.bool else torch.randn(3, 5, generator=g) * 9
        found[f"dtype {dtype}"] = values.to(dtype)
    base = torch.randn(7, 6, generator=g)
    found |= {"transposed": base.T, "offset": base[2:, 1::2], "expanded": base[:1].expand(4, 6), "0-d": torch.tensor(3)}
    found |= {"empty": torch.empty(0, 4), "nan": torch.tensor([math.nan, -0.0, math.inf]), "ключ": base[0]}
    found["parameter"] = nn.Parameter(base.clone())
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    as_bytes = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*as_bytes)


def tree_digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Round trips


def test_every_dtype_and_view_comes_back_bit_for_bit(tmp_path: Path):
    model = hard_tensors()
    path = write(tmp_path, 7, model=model, samples=84)
    loaded = load(path)
    assert loaded.step == 7
    assert loaded.state == {"step": 7, "samples": 84}
    assert set(loaded.model) == set(model)
    for name, tensor in model.items():
        assert same_bits(loaded.model[name], tensor), name
    by_library = safetensors.torch.load_file(path / "model.safetensors")
    for name, tensor in model.items():
        assert same_bits(by_library[name], tensor), name
    assert loaded.optimizer["w/flag"] is True
    assert torch.equal(loaded.optimizer["w/step"], torch.tensor(7.0))  # type: ignore[arg-type]
    assert load(path, optimizer=False).optimizer == {}


def test_the_directory_is_what_its_manifest_says(tmp_path: Path):
    path = write(tmp_path, 200)
    assert path == tmp_path / "checkpoints" / "step_00000200"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer.json"}
    assert {file.name for file in path.iterdir()} == names | {"MANIFEST.json"}
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert set(manifest) == {"files", "format"}
    assert manifest["format"] == 1
    assert manifest["files"] == {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in names
    }
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step_00000200"]


def test_two_equal_runs_write_equal_bytes(tmp_path: Path):
    first = write(tmp_path / "a", 5, model=hard_tensors())
    shuffled = dict(reversed(hard_tensors().items()))
    assert list(shuffled) != list(hard_tensors())
    second = write(tmp_path / "b", 5, model=shuffled)
    assert tree_digest(first) == tree_digest(second)
    one_bit = hard_tensors()
    one_bit["0-d"] = torch.tensor(2)
    assert tree_digest(write(tmp_path / "c", 5, model=one_bit)) != tree_digest(first)


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path):
    path = write(tmp_path, 1)
    loaded = load(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\0" * os.path.getsize(file.name))  # a view of the mapped file would now hold zeros
    assert torch.equal(loaded.model["w"], torch.full((3, 2), 1.0))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path):
    head = nn.Linear(64, 64, bias=False)
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 64), "head": head})
    head.weight = model["embedding"].weight  # type: ignore[assignment]
    view = {"first half": head.weight[:32], "again": head.weight}
    path = write(tmp_path, 1, model=model.state_dict() | view)
    size = (path / "model.safetensors").stat().st_size
    assert 64 * 64 * 4 * 1.5 < size < 64 * 64 * 4 * 2  # the whole once, and half of it
    loaded = load(path).model
    assert loaded["head.weight"] is loaded["embedding.weight"] is loaded["again"]
    assert torch.equal(loaded["first half"], head.weight[:32])
    assert set(safetensors.torch.load_file(path / "model.safetensors")) == {"embedding.weight", "first half"}


def test_separate_empty_tensors_are_not_tied(tmp_path: Path):
    loaded = load(write(tmp_path, 1, model={"a": torch.empty(0), "b": torch.empty(0)})).model
    assert loaded["a"] is not loaded["b"]


def test_a_dtype_that_a_checkpoint_cannot_hold_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"z: got dtype torch\.complex128"):
        write(tmp_path, 1, model={"z": torch.zeros(2, dtype=torch.complex128)})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_is_strict_json(tmp_path: Path):
    path = write(tmp_path, 1, val_loss=math.nan, nested={"x": [math.inf, 0.1]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    state = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert state == {"step": 1, "val_loss": None, "nested": {"x": [None, 0.1]}}


# Verification


def damage(path: Path, how: str) -> None:
    name, _, what = how.partition(" ")
    file = path / name
    data = bytearray(file.read_bytes())
    if what == "flipped first":
        data[0] ^= 1
    elif what == "flipped middle":
        data[len(data) // 2] ^= 0x80
    elif what == "flipped last":
        data[-1] ^= 1
    elif what == "cut":
        del data[-1]
    elif what == "longer":
        data += b"\0"
    elif what == "empty":
        data.clear()
    elif what == "gone":
        file.unlink()
        return
    else:
        raise AssertionError(what)
    file.write_bytes(data)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer.json"]
DAMAGES = ["flipped first", "flipped middle", "flipped last", "cut", "longer", "empty", "gone"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", DAMAGES)
def test_every_damage_is_seen_and_the_one_before_is_taken(tmp_path: Path, name: str, what: str):
    good, bad = write(tmp_path, 200), write(tmp_path, 400)
    assert verify(bad) is None
    assert newest_verified(tmp_path) == (bad, [])
    damage(bad, f"{name} {what}")
    newest, skipped = newest_verified(tmp_path)
    assert newest == good
    ((path, reason),) = skipped
    assert path == bad
    assert name in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "is missing"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 1, "files": {"state.json": 5}}', "is damaged"),
        ('{"format": 1, "files": {}}', "lacks config.yaml"),
        ('{"format": 2, "files": {}}', "has format 2, this version reads 1"),
    ],
)
def test_a_manifest_that_says_too_little_is_not_trusted(tmp_path: Path, text: str | None, reason: str):
    path = write(tmp_path, 1)
    if text is None:
        (path / "MANIFEST.json").unlink()
    else:
        (path / "MANIFEST.json").write_text(text)
    assert reason in str(verify(path))
    assert newest_verified(tmp_path)[0] is None


def test_every_flipped_bit_of_a_small_checkpoint_is_seen_or_harmless(tmp_path: Path):
    path = write(tmp_path, 1)
    expected = load(path)
    manifest = (path / "MANIFEST.json").read_bytes()
    for position in range(len(manifest)):
        broken = bytearray(manifest)
        broken[position] ^= 1
        (path / "MANIFEST.json").write_bytes(broken)
        if verify(path) is None:  # a blank that became another blank, for one
            assert torch.equal(load(path).model["w"], expected.model["w"])


def test_nothing_but_checkpoints_is_taken_for_one(tmp_path: Path):
    good = write(tmp_path, 5)
    folder = good.parent
    for name in (".tmp-step_00000009-1", "step_9", "step_x", "best"):
        shutil.copytree(good, folder / name)
    (folder / "step_00000010").write_text("a file")
    assert list_checkpoints(tmp_path) == [(5, good)]
    assert newest_verified(tmp_path) == (good, [])
    assert newest_verified(tmp_path / "elsewhere") == (None, [])


def test_steps_past_eight_digits_sort_by_number(tmp_path: Path):
    old, new = write(tmp_path, 99_999_999), write(tmp_path, 100_000_000)
    assert [path for _, path in list_checkpoints(tmp_path)] == [old, new]
    assert newest_verified(tmp_path)[0] == new


def test_a_run_or_a_checkpoint_can_be_named(tmp_path: Path):
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    assert find_checkpoint(tmp_path) == (new, [])
    assert find_checkpoint(old) == (old, [])
    damage(new, "state.json cut")
    assert find_checkpoint(tmp_path)[0] == old
    with pytest.raises(InputError, match=rf"--resume: got {new}; .* state\.json has"):
        find_checkpoint(new, "--resume")
    damage(old, "model.safetensors gone")
    with pytest.raises(InputError, match=r"step_00000001: model\.safetensors is missing"):
        find_checkpoint(tmp_path)
    for path in (tmp_path / "nowhere", old / "state.json"):
        with pytest.raises(InputError, match=r"RUN: got .*no such directory"):
            find_checkpoint(path)


# Crashes and full disks


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_leaves_the_earlier_ones(tmp_path: Path, monkeypatch, call: int, number: int):
    good = write(tmp_path, 200)
    before = tree_digest(tmp_path)
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    if call == 8:  # the last flush, of checkpoints/ itself: the new one is whole already
        with pytest.raises(SaveFailed):
            write(tmp_path, 400)
        assert calls == 8
        assert newest_verified(tmp_path)[0] == tmp_path / "checkpoints" / "step_00000400"
        return
    with pytest.raises(SaveFailed, match=f"step 400 not written: {os.strerror(number)}"):
        write(tmp_path, 400)
    assert tree_digest(tmp_path) == before
    assert newest_verified(tmp_path) == (good, [])
    monkeypatch.undo()
    assert newest_verified(tmp_path)[0] != write(tmp_path, 400)
    assert verify(tmp_path / "checkpoints" / "step_00000400") is None


def test_a_file_system_that_takes_no_more_bytes(tmp_path: Path):
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import write
from fastlm.checkpoint import SaveFailed
run = Path({str(tmp_path)!r})
write(run, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write(run, 2, model={{"w": torch.zeros(100_000)}})
except SaveFailed as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "checkpoint of step 2 not written: File too large\n", done.stderr
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert verify(tmp_path / "checkpoints" / "step_00000001") is None


@pytest.mark.parametrize("call", [1, 5, 7])  # in the model, in the tokenizer, before the rename
def test_a_process_killed_while_saving_leaves_the_earlier_ones(tmp_path: Path, call: int):
    program = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import write
run = Path({str(tmp_path)!r})
write(run, 1)
calls, fsync = 0, os.fsync
def kill(descriptor):
    global calls
    calls += 1
    if calls == {call}:
        os._exit(9)
    fsync(descriptor)
os.fsync = kill
write(run, 2)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    folder = tmp_path / "checkpoints"
    assert len(list(folder.glob(".tmp-*"))) == 1
    assert newest_verified(tmp_path) == (folder / "step_00000001", [])
    remove_partial(tmp_path)
    assert [entry.name for entry in folder.iterdir()] == ["step_00000001"]


def test_an_interrupt_while_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch):
    write(tmp_path, 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush_directory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_of_its_step(tmp_path: Path):
    path = write(tmp_path, 2)
    damage(path, "model.safetensors flipped last")
    assert verify(path) is not None
    assert write(tmp_path, 2) == path
    assert verify(path) is None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_free_space_is_asked_of_the_place_to_be(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    check_free_space(tmp_path / "not" / "there" / "yet", free // 2)
    with pytest.raises(InputError, match=r"--out: got .*yet; .* need [0-9.]+ GB, [0-9.]+ GB are free"):
        check_free_space(tmp_path / "not" / "there" / "yet", free * 2 + 10**12)
    assert list(tmp_path.iterdir()) == []


# Keeping


@pytest.mark.parametrize(
    ("losses", "keep", "keep_best", "kept"),
    [
        ([3.0, 2.0, 1.0, 4.0, 5.0], 2, True, [3, 4, 5]),
        ([3.0, 2.0, 1.0, 4.0, 5.0], 2, False, [4, 5]),
        ([3.0, 2.0, 1.0, 0.5, 5.0], 2, True, [4, 5]),
        ([1.0, 1.0, 1.0, 2.0, 2.0], 2, True, [3, 4, 5]),  # the newest among equals
        ([None, None, None, None], 3, True, [2, 3, 4]),
        ([math.nan, 1.0, None, None, 2.0], 2, True, [2, 4, 5]),
        ([-1.0, 1.0, 0.0, 3.0], 2, True, [1, 3, 4]),
        ([2.0], 2, True, [1]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, losses: list[float | None], keep, keep_best, kept):
    paths = [write(tmp_path, step, val_loss=loss) for step, loss in enumerate(losses, start=1)]
    removed = prune(tmp_path, keep, keep_best)
    assert [step for step, _ in list_checkpoints(tmp_path)] == kept
    assert removed == [path for step, path in enumerate(paths, start=1) if step not in kept]
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(kept)


def test_another_history_s_checkpoints_go(tmp_path: Path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [path.name for path in remove_after(tmp_path, 1)] == ["step_00000002", "step_00000003"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    assert remove_after(tmp_path, 1) == []


# Optimizer state

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.1),
}


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str):
    model = small_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, range(3))
    state = optimizer_tensors(optimizer, model.named_parameters())
    path = save(tmp_path, 3, model=model.state_dict(), optimizer=state, state={}, config="")
    train(model, optimizer, range(3, 6))

    resumed, loaded = small_model(), load(path)
    resumed.load_state_dict(loaded.model)
    fresh = OPTIMIZERS[name](list(resumed.parameters()))
    restore_optimizer(fresh, resumed.named_parameters(), loaded.optimizer)
    restored = optimizer_tensors(fresh, resumed.named_parameters())
    for key, value in state.items():  # taken before the last three steps, so only what is not updated in place agrees
        assert type(restored[key]) is type(value), key
        if isinstance(value, Tensor):
            assert (restored[key].dtype, restored[key].shape) == (value.dtype, value.shape)  # type: ignore[union-attr]
    train(resumed, fresh, range(3, 6))
    for (key, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert same_bits(a, b), key
    if state:
        with_gap = small_model()
        with_gap.load_state_dict(loaded.model)
        train(with_gap, OPTIMIZERS[name](list(with_gap.parameters())), range(3, 6))
        assert not same_bits(
            *(m.state_dict()["0.weight"] for m in (with_gap, model))
        )  # the state matters, so the test can fail


def test_state_keeps_its_own_dtype_and_every_kind_of_scalar(tmp_path: Path):
    weight = nn.Parameter(torch.randn(3, 2).bfloat16())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    values = {"master": torch.randn(3, 2), "count": 3, "rate": 0.1, "nothing": None, "on": True, "word": "é/x"}
    values |= {"tiny": 5e-324, "infinite": math.inf, "fastlm/bits": torch.arange(6, dtype=torch.uint8)}
    optimizer.state[weight] = dict(values)
    named = [("layer.weight", weight)]
    path = save(tmp_path, 1, model={}, optimizer=optimizer_tensors(optimizer, named), state={}, config="")
    fresh = torch.optim.SGD([weight], lr=0.1)
    restore_optimizer(fresh, named, load(path).optimizer)
    state = fresh.state[weight]
    assert set(state) == set(values)
    for key, value in values.items():
        if isinstance(value, Tensor):
            assert same_bits(state[key], value), key
        else:
            assert (type(state[key]), state[key]) == (type(value), value), key


def test_state_that_is_there_is_filled_in_place():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, model.named_parameters()).items()}  # type: ignore[union-attr]
    train(model, optimizer, range(2, 4))
    addresses = [state["exp_avg"].data_ptr() for state in optimizer.state.values()]
    restore_optimizer(optimizer, model.named_parameters(), saved)
    assert [state["exp_avg"].data_ptr() for state in optimizer.state.values()] == addresses
    for key, value in optimizer_tensors(optimizer, model.named_parameters()).items():
        assert torch.equal(value, saved[key]), key  # type: ignore[arg-type]
    restore_optimizer(optimizer, model.named_parameters(), {})  # a checkpoint from before the first step
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(("capturable", "step_device"), [(False, "cpu"), (True, "meta")])
def test_state_goes_where_torch_keeps_it(capturable: bool, step_device: str):
    weight = nn.Parameter(torch.randn(3, device="meta"))  # stands for any accelerator
    optimizer = torch.optim.AdamW([weight], foreach=False)
    optimizer.param_groups[0]["capturable"] = capturable
    tensors = {"w/step": torch.tensor(4.0), "w/exp_avg": torch.zeros(3)}
    restore_optimizer(optimizer, [("w", weight)], tensors)
    state = optimizer.state[weight]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (step_device, "meta")


def test_several_optimizers_share_one_mapping():
    model = small_model()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    first, second = torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.Adam(vectors, lr=0.1)
    train(model, first, range(1))
    train(model, second, range(1))
    named = list(model.named_parameters())
    both = optimizer_tensors(first, named) | optimizer_tensors(second, named)
    again = torch.optim.Adam(vectors, lr=0.1)
    restore_optimizer(again, named, both)
    assert optimizer_tensors(again, named).keys() == optimizer_tensors(second, named).keys()


def test_a_parameter_without_a_name_and_state_without_a_form_are_refused():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"a parameter of shape \(7, 5\) has no name"):
        optimizer_tensors(optimizer, [])
    optimizer.state[next(model.parameters())]["history"] = [torch.zeros(1)]
    with pytest.raises(ValueError, match=r"0\.weight/history: got list"):
        optimizer_tensors(optimizer, model.named_parameters())
