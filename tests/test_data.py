"""From a configuration to batches: data sets, refusals, the order of samples, reading ahead."""

from __future__ import annotations

import gc
import itertools
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm import data as module
from fastlm.config import DataConfig
from fastlm.data import (
    BatchLoader,
    WindowOrder,
    eval_windows,
    open_dataset,
    open_for_evaluation,
)
from fastlm.errors import InputError
from fastlm.shards import ShardWriter, TokenStream, open_shard
from fastlm.tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def counting_stream(folder: Path, n_tokens: int, per_shard: int = 37) -> TokenStream:
    """0, 1, ..., n_tokens - 1 over shards of an odd size."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "s", max(n_tokens, 2), tokens_per_shard=per_shard)
    writer.write(np.arange(n_tokens))
    writer.close()
    return TokenStream([open_shard(path, "header") for path in writer.paths])


def write_ids(path: Path, ids: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"<{len(ids)}H", *ids))
    return path


def open_at(path: object, **options: Any) -> module.Dataset:
    return open_dataset(DataConfig(**({"path": str(path), "seq_len": 4} | options)))


def refusal(**options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        open_dataset(DataConfig(**options))
    assert "\n" not in str(caught.value)
    return caught.value


# The order of samples


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 31, 100, 101, 255, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_an_epoch_holds_each_window_once(windows: int, seed: int) -> None:
    L = 5
    for tail in (0, 3):
        order = WindowOrder(windows * L + 1 + tail, L, seed)
        assert order.windows_per_epoch == windows
        for epoch in range(3):
            starts = order.starts(epoch * windows, windows)
            offsets = set((starts % L).tolist())
            assert len(offsets) == 1, "one offset an epoch"
            assert sorted(starts - starts.min()) == [i * L for i in range(windows)]
            assert 0 <= starts.min() <= tail
            assert starts.max() + L + 1 <= windows * L + 1 + tail


def test_order_looks_random() -> None:
    order = WindowOrder(10_001, 1, 7)
    first, second = order.starts(0, 10_000), order.starts(10_000, 10_000)
    for shuffled in (first, second):
        assert abs(np.corrcoef(shuffled, np.arange(10_000))[0, 1]) < 0.05
        assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 0.05
        steps = np.abs(np.diff(shuffled))
        assert abs(steps.mean() - 10_000 / 3) < 150
        assert len(np.unique(steps)) > 5000
    assert (first == second).mean() < 0.01
    other = WindowOrder(10_001, 1, 8).starts(0, 10_000)
    assert (first == other).mean() < 0.01


def test_small_orders_differ_by_epoch_and_seed() -> None:
    orders = {tuple(WindowOrder(6, 1, seed).starts(5 * epoch, 5)) for seed in range(40) for epoch in range(40)}
    assert len(orders) > 110, "of the 120 orders of 5 windows nearly all turn up"


@pytest.mark.parametrize("first", [0, 1, 99, 100, 101, 12_345, 10**12])
def test_seeking_equals_iterating(first: int) -> None:
    order = WindowOrder(1003, 10, 3)
    assert order.starts(first, 250).tolist() == [order.start(first + i) for i in range(250)]


def test_order_is_fixed_across_versions() -> None:
    # A resumed run must see the samples that it would have seen: change this and old runs no longer continue.
    assert WindowOrder(1000, 7, 1234).starts(140, 6).tolist() == [808, 472, 911, 36, 449, 155]


def test_every_token_is_read_sometime() -> None:
    order = WindowOrder(2 * 8 + 1 + 5, 8, 0)
    firsts = {int(order.starts(2 * epoch, 2).min()) for epoch in range(100)}
    assert firsts == set(range(6))


def test_seeds_of_any_size() -> None:
    assert WindowOrder(1000, 3, -1).start(5) == WindowOrder(1000, 3, 2**64 - 1).start(5)


def test_less_than_a_window_is_refused() -> None:
    with pytest.raises(InputError, match="shorter than one window of 9 tokens"):
        WindowOrder(8, 8, 0)
    assert WindowOrder(9, 8, 0).starts(0, 3).tolist() == [0, 0, 0]


def test_order_of_a_huge_corpus() -> None:
    order = WindowOrder(10**13, 1024, 1)
    starts = order.starts(10**9, 1000)
    assert len(np.unique(starts)) == 1000
    assert starts.max() < 10**13
    assert starts.min() >= 0


# Batches


def take(loader: BatchLoader, count: int) -> list[module.Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def test_batches_are_windows_and_their_successors(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 400)
    order = WindowOrder(len(stream), 9, 5)
    for k, batch in enumerate(take(BatchLoader(stream, order, 6), 20)):
        assert batch.first_sample == 6 * k
        assert batch.inputs.shape == batch.targets.shape == (6, 9)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.is_contiguous()
        assert batch.targets.is_contiguous()
        starts = torch.from_numpy(order.starts(6 * k, 6))
        assert torch.equal(batch.inputs, starts[:, None] + torch.arange(9))
        assert torch.equal(batch.targets, batch.inputs + 1)


@pytest.mark.parametrize("resume_at", [0, 1, 6, 43, 44, 45, 1000])
def test_resuming_gives_the_same_samples(tmp_path: Path, resume_at: int) -> None:
    stream = counting_stream(tmp_path / "s", 400)
    order = WindowOrder(len(stream), 9, 5)
    assert order.windows_per_epoch == 44
    whole = torch.cat([b.inputs for b in take(BatchLoader(stream, order, 50, 0), 22)])
    resumed = torch.cat([b.inputs for b in take(BatchLoader(stream, order, 7, resume_at), 12)])
    assert torch.equal(resumed, whole[resume_at : resume_at + 84])


def test_batch_larger_than_the_corpus(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 21)
    (batch,) = take(BatchLoader(stream, WindowOrder(21, 10, 0), 8), 1)
    assert sorted(batch.inputs[:, 0].tolist()) == [0, 0, 0, 0, 10, 10, 10, 10]


def test_errors_of_the_thread_reach_the_consumer(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 100)
    loader = BatchLoader(stream, WindowOrder(1000, 9, 0), 64)
    with pytest.raises(IndexError, match="of a stream of 100"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_close_ends_the_thread_and_the_iteration(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 100)
    loader = BatchLoader(stream, WindowOrder(100, 9, 0), 2)
    next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
    assert list(loader) == []


def test_forgotten_loader_ends_its_thread(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 100)
    loader = BatchLoader(stream, WindowOrder(100, 9, 0), 2)
    (thread,) = loader_threads()
    del loader
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_batches_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Semaphore(0)
    real = module.read_batch
    monkeypatch.setattr(module, "read_batch", lambda *args: (real(*args), read.release())[0])
    stream = counting_stream(tmp_path / "s", 100)
    with BatchLoader(stream, WindowOrder(100, 9, 0), 2) as loader:
        for _ in range(module.READ_AHEAD + 1):  # with no call of next
            assert read.acquire(timeout=30)
        time.sleep(0.05)
        assert not read.acquire(blocking=False), "and no further"
        next(loader)
        assert read.acquire(timeout=30)


# Evaluation windows


@pytest.mark.parametrize("n_tokens", [2, 3, 8, 9, 10, 17, 18, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_token_but_the_first_is_a_target_once(tmp_path: Path, n_tokens: int, batch_size: int) -> None:
    stream = counting_stream(tmp_path / "s", n_tokens)
    counted: list[int] = []
    for inputs, targets in eval_windows(stream, 8, batch_size):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == 8
        assert len(inputs) <= batch_size
        assert inputs.dtype == targets.dtype == torch.int64
        real = targets != module.IGNORE
        assert real.any()
        assert torch.equal(inputs[real] + 1, targets[real])
        assert not inputs[~real].any()
        counted += targets[real].tolist()
    assert counted == list(range(1, n_tokens))


def test_limited_evaluation_is_spread_and_fixed(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path / "s", 801)
    starts = torch.cat([inputs[:, 0] for inputs, _ in eval_windows(stream, 8, 5, limit_windows=10)])
    assert starts.tolist() == [80 * i for i in range(10)]
    everything = list(eval_windows(stream, 8, 5))
    assert len(list(eval_windows(stream, 8, 5, limit_windows=1000))) == len(everything) == 20


# Token shards


def test_shards_with_validation_by_name(tmp_path: Path) -> None:
    write_ids(tmp_path / "d/fineweb_val_000000.bin", [1, 2, 3])
    write_ids(tmp_path / "d/fineweb_train_000001.bin", list(range(10, 20)))
    write_ids(tmp_path / "d/fineweb_train_000002.bin", list(range(20, 30)))
    dataset = open_at(tmp_path / "d")
    assert dataset.train.read(0, 20).tolist() == list(range(10, 30))
    assert dataset.val.read(0, 3).tolist() == [1, 2, 3]
    assert (len(dataset.train), len(dataset.val)) == (20, 3)
    assert dataset.tokenizer is None
    assert dataset.vocab_size == 50257
    assert not dataset.is_code


@pytest.mark.parametrize("name", ["tokens.bin", "val.bin"])
def test_shards_without_names_keep_their_end(tmp_path: Path, name: str) -> None:
    write_ids(tmp_path / name, list(range(100)))
    dataset = open_at(tmp_path / name, val_fraction=0.2)
    assert dataset.train.read(0, 80).tolist() == list(range(80))
    assert dataset.val.read(0, 20).tolist() == list(range(80, 100))


def test_shards_with_a_validation_path(tmp_path: Path) -> None:
    write_ids(tmp_path / "a/x.bin", list(range(50)))
    write_ids(tmp_path / "b/y.bin", [7, 8, 9])
    dataset = open_at(tmp_path / "a", val_path=str(tmp_path / "b/*.bin"))
    assert len(dataset.train) == 50
    assert dataset.val.read(0, 3).tolist() == [7, 8, 9]


def test_headerless_shards(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<40H", *range(40)))
    assert "--data.bin_format uint16" in refusal(path=str(path)).remedy
    assert open_at(path, bin_format="uint16").train.read(0, 36).tolist() == list(range(36))


def test_wide_shards(tmp_path: Path) -> None:
    path = tmp_path / "llama.bin"
    header = struct.pack("<3i", 20240801, 7, 50).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack("<50I", *range(128_000, 128_050)))
    dataset = open_at(path)
    assert dataset.vocab_size == 128_256
    assert dataset.train.read(0, 2).tolist() == [128_000, 128_001]


def test_id_past_the_vocabulary_is_placed(tmp_path: Path) -> None:
    write_ids(tmp_path / "d/train.bin", list(range(50)))
    write_ids(tmp_path / "d/val.bin", [1, 2, 50257, 3])
    error = refusal(path=str(tmp_path / "d"), seq_len=4)
    assert "val.bin with id 50257 at token 2; past the vocabulary of 50257" in str(error)


@pytest.mark.parametrize("vocab_size", [300, 60_000])
def test_chosen_vocabulary_holds_for_shards(tmp_path: Path, vocab_size: int) -> None:
    path = write_ids(tmp_path / "a.bin", [vocab_size - 1] * 50)
    assert open_at(path, vocab_size=vocab_size).vocab_size == vocab_size
    write_ids(path, [1] * 49 + [vocab_size])
    assert f"past the vocabulary of {vocab_size}" in str(refusal(path=str(path), vocab_size=vocab_size, seq_len=4))


def test_tokenizer_beside_the_shards(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "train.bin", list(b"some text of bytes" * 9))
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    for name in ("bpe", "char", "byte", "gpt2"):
        dataset = open_at(path, tokenizer=name)
        assert dataset.vocab_size == 257
        assert dataset.tokenizer is not None
        assert dataset.tokenizer.decode(dataset.train.read(0, 9)) == "some text"
    write_ids(path, [257] * 50)
    assert "past the vocabulary of 257" in str(refusal(path=str(path), seq_len=4))


def test_tokenizer_named_for_the_shards(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d/train.bin", list(b"some text of bytes" * 9))
    (tmp_path / "t").mkdir()
    byte_tokenizer().save(tmp_path / "t/tokenizer.json")
    assert open_at(path, tokenizer=str(tmp_path / "t")).vocab_size == 257
    assert open_at(path, tokenizer="byte").vocab_size == 257
    assert refusal(path=str(path), tokenizer="char").key == "--data.tokenizer"


def test_fingerprint_of_shards_is_their_content(tmp_path: Path) -> None:
    one = open_at(write_ids(tmp_path / "a.bin", list(range(50)))).fingerprint
    assert open_at(write_ids(tmp_path / "b.bin", list(range(50)))).fingerprint == one
    assert open_at(write_ids(tmp_path / "c.bin", list(range(49, -1, -1)))).fingerprint != one
    assert open_at(tmp_path / "b.bin", val_fraction=0.2).fingerprint != one


def test_checks_of_large_shards_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("fastlm.corpus.REMEMBER_BYTES", 1)
    path = write_ids(tmp_path / "a.bin", list(range(50)))
    os.utime(path, ns=(10**18, 10**18))
    first = open_at(path)
    monkeypatch.setattr(module, "largest_id", None)
    monkeypatch.setattr(module, "file_digest", None)
    assert open_at(path).fingerprint == first.fingerprint


# Refusals


@pytest.mark.parametrize(
    ("options", "key", "told"),
    [
        ({"path": "missing.txt"}, "--data.path", "no such file"),
        ({"path": "empty.txt"}, "--data.path", "it is empty"),
        ({"path": "nothing"}, "--data.path", "the directory holds no"),
        ({"path": "*.none"}, "--data.path", "no file matches"),
        ({"path": "latin.txt"}, "--data.path", "not UTF-8 at byte 3"),
        ({"path": "folder"}, "--data.path", "not UTF-8 at byte 3"),
        ({"path": "short.txt"}, "--data.path", "shorter than one window"),
        ({"path": "one.txt", "seq_len": 1}, "--data.path", "shorter than one window"),
        ({"path": "mixed"}, "--data.path", "both shards and text"),
        ({"path": "long.txt", "val_path": "missing"}, "--data.val_path", "no such file"),
        ({"path": "long.txt", "val_path": "empty.txt"}, "--data.val_path", "it is empty"),
        ({"path": "long.txt", "val_path": "one.txt"}, "--data.val_path", "at least 2 tokens"),
        ({"path": "long.txt", "val_path": "mixed/a.bin"}, "--data.val_path", "must be text"),
        ({"path": "mixed/a.bin", "val_path": "long.txt"}, "--data.val_path", "must be token shards"),
        ({"path": "long.txt", "tokenizer": "bytes"}, "--data.tokenizer", "did you mean byte"),
        ({"path": "long.txt", "tokenizer": "gpt2"}, "--data.tokenizer", "curl"),
        ({"path": "long.txt", "tokenizer": "bpe", "vocab_size": 256}, "--data.vocab_size", "at least 257"),
        ({"path": "long.txt", "val_fraction": 0.0}, "--data.val_fraction", "between 0 and 1"),
        ({"path": "long.txt", "val_fraction": 1.0}, "--data.val_fraction", "between 0 and 1"),
        ({"path": "long.txt", "seq_len": 0}, "--data.seq_len", "at least 1"),
        ({"path": "hf:x/y"}, "--data.path", "later version"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, key: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"empty.txt": b"", "latin.txt": b"abc\xff", "short.txt": b"abcdefgh", "one.txt": b"a"}
    contents |= {"long.txt": b"some text " * 20, "nothing/a.csv": b"1", "folder/a.txt": b"x", "mixed/b.txt": b"x"}
    for name, content in (contents | {"folder/b.txt": b"abc\xff"}).items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    write_ids(Path("mixed/a.bin"), list(range(50)))
    error = refusal(**({"tokenizer": "byte", "seq_len": 8} | options))
    assert error.key == key
    assert told in str(error)


def test_one_window_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 2)
    dataset = open_at(path, tokenizer="byte", seq_len=17)
    assert (len(dataset.train), len(dataset.val)) == (18, 2)
    error = refusal(path=str(path), tokenizer="byte", seq_len=18)
    assert "(18 training tokens); shorter than one window of 19 tokens" in str(error)


def test_control_characters_alone_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x00\x01\r" * 10)
    assert "it is empty" in str(refusal(path=str(tmp_path), seq_len=4))


# Evaluation on other data


def test_evaluation_streams(tmp_path: Path) -> None:
    train, other = tmp_path / "train.txt", tmp_path / "other"
    other.mkdir()
    train.write_text("0123456789" * 10)
    for name in "ab":
        (other / f"{name}.txt").write_text(f"text {name}\r\n")
    cfg = DataConfig(path=str(train), tokenizer="byte", seq_len=4)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(open_for_evaluation(cfg, None, tokenizer, 257).read(0, 10)) == "0123456789"
    for _ in range(2):
        stream = open_for_evaluation(cfg, str(other), tokenizer, 257)
        assert tokenizer.decode(stream.read(0, len(stream))) == "<|endoftext|>text a\n<|endoftext|>text b\n"
    shard = write_ids(tmp_path / "x.bin", [1, 2, 256])
    assert open_for_evaluation(cfg, str(shard), None, 257).read(0, 3).tolist() == [1, 2, 256]
    for path, vocab_size, told in [(shard, 256, "past the vocabulary"), (train, 257, "no tokenizer")]:
        with pytest.raises(InputError, match=told):
            open_for_evaluation(cfg, str(path), None, vocab_size)


# The embedded corpus


def test_embedded_corpus_trains_on_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sysconfig

    library = tmp_path / "lib"
    library.mkdir()
    for name in ("json/decoder.py", "json/encoder.py", "textwrap.py", "bisect.py"):
        target = library / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((Path(sysconfig.get_path("stdlib")) / name).read_bytes())
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    dataset = open_dataset(DataConfig(vocab_size=400, seq_len=16))
    assert dataset.is_code
    assert dataset.vocab_size == 400
    assert "4 files" in dataset.source
    assert dataset.tokenizer is not None
    length = dataset.tokenizer.token_bytes()
    total = sum(length[s.read(0, len(s))].sum() for s in (dataset.train, dataset.val))
    assert total == sum(path.stat().st_size for path in library.rglob("*.py"))


def test_texts_begin_after_what_training_met(tmp_path: Path) -> None:
    """The separator stands before each of several documents; in a single text it never occurs."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n" * 20)
    several, single = (open_at(path, tokenizer="byte", seq_len=4) for path in (tmp_path, tmp_path / "a.txt"))
    assert several.tokenizer is not None
    assert several.document_start == several.tokenizer.eot_id
    assert single.document_start == ord("\n")
