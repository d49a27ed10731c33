"""A text corpus as shards: split, duplicates, separators, and a cache that is never believed unread."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlm import corpus as module
from fastlm import text
from fastlm.config import DataConfig
from fastlm.corpus import Scan, choose_validation, evenly, remembered
from fastlm.data import Dataset, open_dataset
from fastlm.errors import InputError
from fastlm.tokenizer import EOT, Tokenizer, cache_root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, documents: dict[str, str]) -> Path:
    for name, content in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, newline="")
    return folder


def many(count: int) -> dict[str, str]:
    return {f"{i:03d}.txt": f"document {i} " * (i % 7 + 3) for i in range(count)}


def open_bytes(path: Path, **options: object) -> Dataset:
    return open_dataset(DataConfig(path=str(path), tokenizer="byte", seq_len=4, **options))  # type: ignore[arg-type]


def spelled(dataset: Dataset) -> tuple[str, str]:
    """The text of both streams, separators spelled out."""
    assert dataset.tokenizer is not None
    train, val = (dataset.tokenizer.decode(s.read(0, len(s))) for s in (dataset.train, dataset.val))
    return train, val


# One text


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_one_text_keeps_its_end_for_validation(tmp_path: Path, tokenizer: str, fraction: float) -> None:
    sample = "".join(f"line {i}: naïve 中\n" for i in range(211))
    path = write(tmp_path, {"a.txt": sample}) / "a.txt"
    cfg = DataConfig(path=str(path), tokenizer=tokenizer, vocab_size=300, seq_len=4, val_fraction=fraction)
    dataset = open_dataset(cfg)
    cut = int(len(sample) * (1 - fraction))
    assert spelled(dataset) == (sample[:cut], sample[cut:])
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.name == tokenizer
    assert (dataset.tokenizer.eot_id is None) == (tokenizer == "char")


def test_char_vocabulary_of_one_text_is_all_its_characters(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.txt": "abcd" * 50 + "XYZ"}) / "a.txt"
    dataset = open_dataset(DataConfig(path=str(path), tokenizer="char", seq_len=8))
    assert dataset.vocab_size == 7, "the characters of the validation part too, and no separator"


def test_topics_has_103_characters() -> None:
    import pydoc_data.topics as topics

    source = text.TextSource("--data.path", "topics", (Path(str(topics.__file__)),))
    plain = Path(str(topics.__file__)).read_text()
    assert module.scan(source, with_alphabet=True).alphabet == set(plain)
    assert "".join(piece for d in text.documents(source) for piece in d.pieces) == plain


@pytest.mark.parametrize("piece", [7, 64, 1 << 20])
def test_streaming_in_small_pieces_gives_the_same_text(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", piece)
    monkeypatch.setattr(module, "BATCH_CHARS", 3 * piece)
    sample = "".join(f"e\u0301 {i}\r\n" for i in range(300))
    dataset = open_bytes(write(tmp_path, {"a.txt": sample}) / "a.txt")
    assert "".join(spelled(dataset)) == sample.replace("\r", "").replace("e\u0301", "\u00e9")


# Several documents


def test_documents_are_separated_and_in_order(tmp_path: Path) -> None:
    documents = many(40)
    train, val = spelled(open_bytes(write(tmp_path / "d", documents)))
    assert train.startswith(EOT)
    assert val.startswith(EOT)
    kept, held_out = train.split(EOT)[1:], val.split(EOT)[1:]
    assert kept == [x for x in documents.values() if x not in held_out]
    assert held_out == [x for x in documents.values() if x in held_out]
    share = sum(map(len, held_out)) / sum(map(len, documents.values()))
    assert 0.05 < share < 0.15


def test_a_document_of_many_pieces_has_one_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 10)
    both = "".join(spelled(open_bytes(write(tmp_path / "d", many(5)))))
    assert both.count(EOT) == 4, "the four for training; the one held out is a text alone"
    for document in many(5).values():
        assert document in both


def test_exact_duplicates_are_dropped_once_cleaned(tmp_path: Path) -> None:
    documents = many(10) | {"dup.txt": many(10)["003.txt"], "crlf.txt": "a\r\nb\n" * 9, "lf.txt": "a\nb\n" * 9}
    said: list[str] = []
    cfg = DataConfig(path=str(write(tmp_path / "d", documents | {"e.txt": ""})), tokenizer="byte", seq_len=4)
    both = "".join(spelled(open_dataset(cfg, said.append)))
    assert both.count("document 3 " * 6) == 1
    assert both.count("a\nb\n" * 9) == 1
    assert any("3 empty or duplicate left out" in line for line in said)


def test_repeated_lines_stay(tmp_path: Path) -> None:
    sample = "same line\n" * 100
    assert "".join(spelled(open_bytes(write(tmp_path, {"a.txt": sample}) / "a.txt"))) == sample


def test_duplicates_of_one_document_are_one_text(tmp_path: Path) -> None:
    sample = "0123456789" * 10
    dataset = open_bytes(write(tmp_path / "d", {"a.txt": sample, "b.txt": sample}))
    assert spelled(dataset) == (sample[:90], sample[90:])


def test_split_ignores_names_and_order(tmp_path: Path) -> None:
    documents = list(many(30).values())
    names = [f"{i:02d}.txt" for i in range(30)]
    first = spelled(open_bytes(write(tmp_path / "a", dict(zip(names, documents, strict=True)))))
    second = spelled(open_bytes(write(tmp_path / "b", dict(zip(reversed(names), documents, strict=True)))))
    assert sorted(first[1].split(EOT)) == sorted(second[1].split(EOT))
    assert first[1] != second[1], "the order within the part is that of the files"


def test_char_separator_comes_with_several_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "d", {"a.txt": "ab" * 9, "b.txt": "bc" * 8, "c.txt": "cd" * 7})
    dataset = open_dataset(DataConfig(path=str(path), tokenizer="char", seq_len=4))
    assert dataset.vocab_size == 5
    assert dataset.train.read(0, 1).tolist() == [4]


def test_jsonl_rows_and_text_key(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"body": x, "text": "no"}) for x in many(20).values())
    dataset = open_bytes(write(tmp_path, {"a.jsonl": rows}) / "a.jsonl", text_key="body")
    assert "document 7" in "".join(spelled(dataset))
    assert "no" not in "".join(spelled(dataset))


def test_validation_text_of_its_own(tmp_path: Path) -> None:
    train = write(tmp_path, {"train.txt": "train " * 20}) / "train.txt"
    val = write(tmp_path, {"val.txt": "val!" * 5}) / "val.txt"
    cfg = DataConfig(path=str(train), val_path=str(val), tokenizer="char", seq_len=4)
    dataset = open_dataset(cfg)
    assert spelled(dataset) == ("train " * 20, "val!" * 5)
    assert dataset.vocab_size == len(set("train val!"))


def scan_of(lengths: list[int], seed: int = 0) -> Scan:
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(lengths)).astype(np.uint64)
    return Scan(hashes, np.array(lengths), frozenset())


@pytest.mark.parametrize("count", [2, 3, 5, 10, 50, 1000])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_validation_documents_come_close_to_the_fraction(count: int, fraction: float, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 1000, count)
    found = scan_of(lengths.tolist(), seed)
    chosen = choose_validation(found, np.ones(count, bool), fraction)
    assert 0 < chosen.sum() < count
    share = lengths[chosen].sum() / lengths.sum()
    assert abs(share - fraction) <= max(0.01, 2 * lengths.max() / lengths.sum())


def test_a_document_far_too_long_is_not_held_out() -> None:
    for seed in range(20):
        chosen = choose_validation(scan_of([10_000, 300, 5], seed), np.ones(3, bool), 0.1)
        assert not chosen[0]


def test_only_distinct_documents_are_held_out() -> None:
    distinct = np.array([True, False, True, False])
    chosen = choose_validation(scan_of([10, 10, 10, 10]), distinct, 0.9)
    assert not chosen[~distinct].any()
    assert chosen.sum() == 1


# The tokenizer's training


def test_bpe_sees_the_training_part_only(tmp_path: Path) -> None:
    sample = "abcdefgh " * 400 + "zyxwvuts " * 40
    path = write(tmp_path, {"a.txt": sample}) / "a.txt"
    dataset = open_dataset(DataConfig(path=str(path), tokenizer="bpe", vocab_size=290, seq_len=4))
    assert dataset.tokenizer is not None
    assert len(dataset.tokenizer.encode("abcdefgh abcdefgh")) <= 3
    assert len(dataset.tokenizer.encode("zyxwvuts")) == 8


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_sampling_is_even(share: float) -> None:
    taken = [int(x) for x in evenly(map(str, range(1000)), share)]
    assert abs(len(taken) - 1000 * share) <= 1
    assert max(np.diff([-1, *taken, 1000])) <= 1 / share + 1


def test_bpe_sample_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BPE_TRAINING_CHARS", 500)
    seen: list[str] = []
    real = module.train_bpe

    def watched(pieces: Iterator[str], vocab_size: int) -> Tokenizer:
        seen.extend(pieces)
        return real(iter(seen), vocab_size)

    monkeypatch.setattr(module, "train_bpe", watched)
    path = write(tmp_path / "d", many(100))
    open_dataset(DataConfig(path=str(path), tokenizer="bpe", vocab_size=300, seq_len=4))
    assert 300 < sum(map(len, seen)) < 700


# The cache


def folders() -> list[Path]:
    return sorted((cache_root() / "data").iterdir())


@pytest.fixture
def corpus_path(tmp_path: Path) -> Path:
    return write(tmp_path / "d", many(20))


def counting_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    builds: list[int] = []
    real = module.build_shards
    monkeypatch.setattr(module, "build_shards", lambda *args: builds.append(1) or real(*args))
    return builds


def test_second_start_builds_nothing(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counting_builds(monkeypatch)
    first, second = open_bytes(corpus_path), open_bytes(corpus_path)
    assert len(builds) == 1
    assert first.fingerprint == second.fingerprint
    assert spelled(first) == spelled(second)
    assert len(folders()) == 1


def test_cache_key_covers_what_the_shards_depend_on(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = DataConfig(path=str(corpus_path), tokenizer="bpe", vocab_size=300, seq_len=4)
    other_val = str(write(corpus_path.parent, {"v.txt": "validation text"}) / "v.txt")
    changes = [{}, {"vocab_size": 310}, {"tokenizer": "byte"}, {"val_fraction": 0.2}, {"val_path": other_val}]
    prints = [open_dataset(replace(base, **change)).fingerprint for change in changes]
    monkeypatch.setattr(module, "CLEANING_VERSION", 99)
    prints.append(open_dataset(base).fingerprint)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus_path.parent / "cache"))
    file = corpus_path / "003.txt"
    file.write_text(file.read_text().replace("3", "4", 1))
    prints.append(open_dataset(base).fingerprint)
    assert len(set(prints)) == len(changes) + 2
    assert open_dataset(replace(base, seq_len=8)).fingerprint == prints[-1]


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_damaged_cache_is_built_again(corpus_path: Path, name: str, harm: str) -> None:
    before = spelled(open_bytes(corpus_path))
    path = folders()[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if name == "meta.json":  # a flipped space would do no harm
        content = bytearray(content.replace(b'"digest": "', b'"digest": "0'))
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(content), "cut": content[:-3], "empty": b""}[harm])
    said: list[str] = []
    cfg = DataConfig(path=str(corpus_path), tokenizer="byte", seq_len=4)
    assert spelled(open_dataset(cfg, said.append)) == before
    assert any("damaged" in line for line in said)
    assert spelled(open_bytes(corpus_path)) == before
    assert len(folders()) == 1, "nothing is left beside the new one"


def test_builders_may_race(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    real = module.build_shards

    def slow(*args: Any) -> dict[str, list[str]]:
        names = real(*args)
        together.wait(timeout=30)
        return names

    monkeypatch.setattr(module, "build_shards", slow)
    results: list[tuple[str, str]] = []
    threads = [threading.Thread(target=lambda: results.append(spelled(open_bytes(corpus_path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    assert len(folders()) == 1


def test_the_first_builder_stands(corpus_path: Path) -> None:
    before = spelled(open_bytes(corpus_path))
    (folder,) = folders()
    inode = folder.stat().st_ino
    late = folder.with_name(".tmp-late")
    late.mkdir()
    (late / "other").write_text("of a slower builder")
    assert module.publish(late, folder)["parts"]["train"] == ["train_000000.bin"]
    assert folder.stat().st_ino == inode, "others may be reading it"
    assert spelled(open_bytes(corpus_path)) == before


def test_same_bytes_of_another_kind_are_another_corpus(tmp_path: Path) -> None:
    rows = "".join(
        json.dumps({"text": f"row {i} of the text", "body": f"{i} body of the row"}) + "\n" for i in range(9)
    )
    paths = [write(tmp_path, {name: rows}) / name for name in ("a.txt", "a.jsonl")]
    found = ["".join(spelled(open_bytes(path))) for path in paths]
    found.append("".join(spelled(open_bytes(paths[1], text_key="body"))))
    assert found[0] == rows
    assert "row 3 of the text" in found[1]
    assert "{" not in found[1] + found[2]
    assert "3 body of the row" in found[2]


def test_failed_build_leaves_nothing(corpus_path: Path) -> None:
    (corpus_path / "zzz.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"zzz\.txt with bytes that are not UTF-8 at byte 3"):
        open_bytes(corpus_path)
    assert folders() == []


def test_what_a_killed_builder_left_is_swept(corpus_path: Path) -> None:
    import socket

    root = cache_root() / "data"
    dead, mine, other = (
        root / f".tmp-{host}-{pid}-x"
        for host, pid in [(socket.gethostname(), 2**22 + 1), (socket.gethostname(), os.getpid()), ("elsewhere", 1)]
    )
    for folder in (dead, mine, other):
        folder.mkdir(parents=True)
    open_bytes(corpus_path)
    assert not dead.exists()
    assert mine.exists()
    assert other.exists()


def test_text_that_changes_underneath_is_refused(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.make_tokenizer

    def meddle(*args: Any) -> Tokenizer:
        (corpus_path / "001.txt").write_text("something else entirely")
        return real(*args)

    monkeypatch.setattr(module, "make_tokenizer", meddle)
    with pytest.raises(InputError, match="changed while it was read"):
        open_bytes(corpus_path)


def test_cache_that_cannot_be_written(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus_path.parent / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus_path.parent / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        open_bytes(corpus_path)


# What is remembered of large files


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "REMEMBER_BYTES", 10)
    path = write(tmp_path, {"large.txt": "x" * 100}) / "large.txt"
    os.utime(path, ns=(10**18, 10**18))
    return path


def never() -> str:
    raise AssertionError("read again")


def test_large_files_are_not_read_again(large: Path) -> None:
    assert remembered("digest", [large], lambda: "value") == "value"
    assert remembered("digest", [large], never) == "value"
    assert remembered("another question", [large], lambda: "b") == "b"


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, ns=(10**18, 10**18 + 1)),
        lambda path: (path.write_text("x" * 101), os.utime(path, ns=(10**18, 10**18))),
        lambda path: (
            path.rename(path.with_name("other")) and path.with_name("other").rename(path) and os.utime(path, ns=(1, 2))
        ),
    ],
    ids=["time", "size", "moved"],
)
def test_changed_files_are_read_again(large: Path, change: Callable[[Path], object]) -> None:
    remembered("digest", [large], lambda: "old")
    change(large)
    assert remembered("digest", [large], lambda: "new") == "new"


def test_small_and_fresh_files_are_always_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(large)
    remembered("digest", [large], lambda: "old")
    assert remembered("digest", [large], lambda: "new") == "new"
    os.utime(large, ns=(10**18, 10**18))
    monkeypatch.setattr(module, "REMEMBER_BYTES", 1000)
    remembered("digest", [large], lambda: "old")
    assert remembered("digest", [large], lambda: "new") == "new"


def test_damaged_memory_is_computed_again(large: Path) -> None:
    remembered("digest", [large], lambda: "old")
    (memo,) = (cache_root() / "memo").iterdir()
    memo.write_text("{")
    assert remembered("digest", [large], lambda: "new") == "new"
    assert remembered("digest", [large], never) == "new"
