"""A text corpus as token shards: scanned, split, tokenised once, kept in the cache.

Three passes over the text, each a stream, so that memory stays constant in the corpus (but for some 20 bytes
a document): scan (hash and length of each document), train the tokenizer, encode. The cache's folder is named
by content, tokenizer and cleaning version; it is built under a temporary name and renamed into place, so
builders may race and a torn build is never seen; what it holds is held against a digest at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastlm.config import DataConfig
from fastlm.errors import InputError
from fastlm.shards import ShardWriter
from fastlm.text import (
    CLEANING_VERSION,
    READ_ERRORS,
    TextSource,
    content_hash,
    documents,
    text_suffix,
    unreadable,
)
from fastlm.tokenizer import (
    FILE_NAME,
    WORDS,
    Tokenizer,
    cache_root,
    char_tokenizer,
    ready_tokenizer,
    train_bpe,
)

T = TypeVar("T", str, int)
Notify = Callable[[str], None]

# A BPE's size where nobody chose one: (text of fewer bytes than this, entries). Rare entries learn nothing.
BPE_VOCAB_BY_BYTES = ((64 << 20, 2048), (1 << 30, 8192), (float("inf"), 32768))
BPE_TRAINING_CHARS = 1_000_000_000
# Text in flight while encoding, a piece for each core: the library's own objects take some 100 times as much.
BATCH_CHARS = max(4, os.cpu_count() or 1) << 20
META = "meta.json"
META_FORMAT = 1
REMEMBER_BYTES = 64 << 20  # files smaller than this together are read anew at every start
RACY_SECONDS = 2.0  # a file changed so lately may change again within its time stamp's resolution
NOTIFY_SECONDS = 5.0


@dataclass(frozen=True)
class TextCorpus:
    """What is to be tokenised, and how."""

    train: TextSource
    val: TextSource | None  # None = split off `train`
    val_fraction: float
    tokenizer: str
    vocab_size: int

    @classmethod
    def from_config(cls, cfg: DataConfig, train: TextSource, val: TextSource | None) -> TextCorpus:
        """The corpus that the data section asks for."""
        size = sum(path.stat().st_size for path in train.files)
        suited = next(entries for limit, entries in BPE_VOCAB_BY_BYTES if size < limit)
        return cls(train, val, cfg.val_fraction, cfg.tokenizer, cfg.vocab_size or suited)

    def key(self) -> str:
        """32 hex digits that name everything the shards depend on."""
        ready = ready_tokenizer(self.tokenizer)
        trained = f"bpe {self.vocab_size} {WORDS}" if self.tokenizer == "bpe" else self.tokenizer
        parts = {
            "cleaning": CLEANING_VERSION,
            "tokenizer": trained if ready is None else ready.backend.to_str(),
            "train": source_digest(self.train),
            "val": self.val_fraction if self.val is None else source_digest(self.val),
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Scan:
    """What the first pass learns of a source's documents."""

    hashes: np.ndarray  # uint64 (documents,), of the cleaned text
    lengths: np.ndarray  # int64 (documents,), characters
    alphabet: frozenset[str]  # empty unless asked for

    def distinct(self) -> np.ndarray:
        """bool (documents,): not empty, and the first with this text."""
        first = np.zeros(len(self.hashes), bool)
        first[np.unique(self.hashes, return_index=True)[1]] = True
        return first & (self.lengths > 0)


@dataclass(frozen=True)
class Part:
    """Documents of a source that make one token stream: whole ones, or part of the only one."""

    source: TextSource
    members: np.ndarray  # bool (documents,)
    chars: int
    start: int = 0
    stop: int | None = None

    @property
    def separated(self) -> bool:
        """Whether a separator stands before each document: there is more than one."""
        return int(self.members.sum()) > 1

    def pieces(self) -> Iterator[tuple[bool, str]]:
        """(whether a document begins here, text), in order."""
        found = documents(self.source)
        for member in self.members:
            document = next(found, None)
            if document is None:
                raise changed_while_read(self.source)
            if not member:
                continue
            begins = True
            for piece in clip(document.pieces, self.start, self.stop):
                yield begins, piece
                begins = False


def clip(pieces: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """The characters [start, stop) of a text given in pieces."""
    at = 0
    for piece in pieces:
        low = max(start - at, 0)
        high = len(piece) if stop is None else min(stop - at, len(piece))
        if low < high:
            yield piece[low:high]
        at += len(piece)
        if stop is not None and at >= stop:
            return


def changed_while_read(source: TextSource) -> InputError:
    """The InputError for files that do not hold still."""
    return InputError(source.key, source.label, "the text changed while it was read: run again when it is at rest")


def scan(source: TextSource, with_alphabet: bool) -> Scan:
    """Read every document once. Raises InputError when there is no text at all."""
    hashes, lengths, alphabet = [], [], set()

    def watched(pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            alphabet.update(piece)
            yield piece

    for document in documents(source):
        value, length = content_hash(watched(document.pieces) if with_alphabet else document.pieces)
        hashes.append(value)
        lengths.append(length)
    found = Scan(np.array(hashes, np.uint64), np.array(lengths, np.int64), frozenset(alphabet))
    if not found.lengths.any():
        raise InputError(source.key, source.label, "it is empty: give files that hold text")
    return found


def split(corpus: TextCorpus, train: Scan, val: Scan | None) -> tuple[Part, Part]:
    """The training and the validation part.

    With a source of its own, that; else of one text its last `val_fraction` of characters, and of several
    documents those that `choose_validation` picks.
    """
    distinct = train.distinct()
    total = int(train.lengths[distinct].sum())
    if val is not None and corpus.val is not None:
        kept = val.distinct()
        return Part(corpus.train, distinct, total), Part(corpus.val, kept, int(val.lengths[kept].sum()))
    if distinct.sum() == 1:
        cut = int(total * (1 - corpus.val_fraction))
        head = Part(corpus.train, distinct, cut, 0, cut)
        return head, Part(corpus.train, distinct, total - cut, cut, None)
    chosen = distinct & choose_validation(train, distinct, corpus.val_fraction)
    chars = int(train.lengths[chosen].sum())
    return Part(corpus.train, distinct & ~chosen, total - chars), Part(corpus.train, chosen, chars)


def choose_validation(found: Scan, distinct: np.ndarray, fraction: float) -> np.ndarray:
    """bool (documents,): those kept for validation, whatever their order and the run's seed.

    Documents are taken in the order of their hashes; one that would lead away from `fraction` of the
    characters is passed over; if all would, the shortest is taken. At least one is taken and one left.
    """
    order = np.flatnonzero(distinct)
    order = order[np.argsort(found.hashes[order])]
    target = fraction * float(found.lengths[order].sum())
    chosen, taken, left = np.zeros(len(distinct), bool), 0, len(order)
    for i in order:
        if left > 1 and found.lengths[i] < 2 * (target - taken):
            chosen[i] = True
            taken += int(found.lengths[i])
            left -= 1
    if taken == 0:
        chosen[order[np.argmin(found.lengths[order])]] = True
    return chosen


def build_shards(corpus: TextCorpus, folder: Path, notify: Notify) -> dict[str, list[str]]:
    """Write train_*.bin, val_*.bin and tokenizer.json into `folder`; returns the names of each part's shards."""
    before = [stamps(source.files) for source in sources(corpus)]
    wants_alphabet = corpus.tokenizer == "char"
    train_scan = scan(corpus.train, wants_alphabet)
    val_scan = scan(corpus.val, wants_alphabet) if corpus.val else None
    parts = split(corpus, train_scan, val_scan)
    dropped = len(train_scan.hashes) - int(train_scan.distinct().sum())
    left_out = f", {dropped} empty or duplicate left out" if dropped else ""
    notify(f"text: {len(train_scan.hashes)} documents, {train_scan.lengths.sum():,} characters{left_out}")
    alphabet = train_scan.alphabet | (val_scan.alphabet if val_scan else frozenset())
    tokenizer = make_tokenizer(corpus, parts, alphabet, notify)
    tokenizer.save(folder / FILE_NAME)
    names = {
        name: encode_part(part, tokenizer, ShardWriter(folder, name, tokenizer.vocab_size), notify)
        for name, part in zip(("train", "val"), parts, strict=True)
    }
    for source, stamp in zip(sources(corpus), before, strict=True):
        if any(not path.exists() for path in source.files) or stamps(source.files) != stamp:
            raise changed_while_read(source)
    return names


def sources(corpus: TextCorpus) -> list[TextSource]:
    """The corpus's sources: the text, and the validation text if that is apart."""
    return [corpus.train] if corpus.val is None else [corpus.train, corpus.val]


def make_tokenizer(corpus: TextCorpus, parts: tuple[Part, Part], alphabet: frozenset[str], notify: Notify) -> Tokenizer:
    """The tokenizer asked for; BPE sees the training part only, at most 1e9 characters of it."""
    if corpus.tokenizer == "char":
        return char_tokenizer(alphabet, separator=any(part.separated for part in parts))
    if corpus.tokenizer == "bpe":
        used = min(parts[0].chars, BPE_TRAINING_CHARS)
        notify(f"tokenizer: training a BPE of {corpus.vocab_size} entries on {used:,} characters")
        share = used / max(parts[0].chars, 1)
        tokenizer = train_bpe(evenly((text for _, text in parts[0].pieces()), share), corpus.vocab_size)
        if tokenizer.vocab_size < corpus.vocab_size:
            notify(f"tokenizer: the text holds only {tokenizer.vocab_size} entries, not {corpus.vocab_size}")
        return tokenizer
    ready = ready_tokenizer(corpus.tokenizer)
    assert ready is not None
    return ready


def evenly(pieces: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the pieces, spread evenly over all of them."""
    for i, piece in enumerate(pieces):
        if int((i + 1) * share) > int(i * share):
            yield piece


def encode_part(part: Part, tokenizer: Tokenizer, writer: ShardWriter, notify: Notify) -> list[str]:
    """Tokenise a part into shards, a separator before each document where there are several.

    Returns the shards' file names.
    """
    separator = tokenizer.eot_id if part.separated else None
    done, told = 0, time.monotonic()
    for batch in batches(part.pieces()):
        texts = [text for _, text in batch]
        for (begins, _), ids in zip(batch, tokenizer.encode_batch(texts, part.source.key), strict=True):
            if begins and separator is not None:
                writer.write(np.array([separator]))
            writer.write(ids)
        done += sum(map(len, texts))
        if time.monotonic() - told > NOTIFY_SECONDS:
            told = time.monotonic()
            notify(f"{writer.name}: {done:,} of {part.chars:,} characters tokenised")
    writer.close()
    notify(f"{writer.name}: {writer.tokens:,} tokens of {part.chars:,} characters")
    return [path.name for path in writer.paths]


def batches(pieces: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Pieces in groups of about BATCH_CHARS characters: enough work for every core, little memory."""
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# The cache


def cached_shards(corpus: TextCorpus, notify: Notify) -> tuple[Path, dict]:
    """`cached` for a corpus: shards of `train` and `val`, and their tokenizer.json."""
    return cached(corpus.key(), lambda folder: build_shards(corpus, folder, notify), notify)


def cached_text(source: TextSource, tokenizer: Tokenizer, notify: Notify) -> tuple[Path, dict]:
    """`cached` for all documents of a source and a tokenizer at hand: shards of `text`."""

    def build(folder: Path) -> dict[str, list[str]]:
        found = scan(source, with_alphabet=False)
        part = Part(source, found.distinct(), int(found.lengths[found.distinct()].sum()))
        tokenizer.save(folder / FILE_NAME)
        writer = ShardWriter(folder, "text", tokenizer.vocab_size)
        return {"text": encode_part(part, tokenizer, writer, notify)}

    parts = [CLEANING_VERSION, source_digest(source), tokenizer.backend.to_str()]
    return cached(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32], build, notify)


def cached(key: str, build: Callable[[Path], dict[str, list[str]]], notify: Notify) -> tuple[Path, dict]:
    """The cache's folder of this name and its meta.json; built first where it is missing or damaged.

    `build` fills a folder and returns the names of the shards of each part.
    """
    root = cache_root() / "data"
    folder = root / key
    if meta := intact(folder):
        return folder, meta
    if folder.exists():
        notify(f"cache: {folder} is damaged; building it again")
    with cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        temporary = root / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            write_meta(temporary, build(temporary))
            meta = publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder, meta


def write_meta(folder: Path, parts: dict[str, list[str]]) -> None:
    """Write meta.json: which shards make which part, and a digest of all files."""
    files = [FILE_NAME, *(name for names in parts.values() for name in names)]
    digest = file_digest([folder / name for name in files])
    meta = {"format": META_FORMAT, "parts": parts, "files": files, "digest": digest}
    (folder / META).write_text(json.dumps(meta, indent=1))


@contextlib.contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turn a cache that cannot be written into an InputError."""
    try:
        yield
    except OSError as error:
        remedy = f"the cache cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder with room"
        raise InputError("XDG_CACHE_HOME", root, remedy) from error


def intact(folder: Path) -> dict | None:
    """The meta.json of a cache folder whose files are what it says, else None."""
    try:
        meta = json.loads((folder / META).read_text())
        if meta["format"] != META_FORMAT or not meta["parts"]:
            return None
        files = [folder / name for name in meta["files"]]
        digest = remembered("digest", files, lambda: file_digest(files))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if digest == meta["digest"] else None


def publish(temporary: Path, folder: Path) -> dict:
    """Rename a finished folder into place; where another builder was first, that one's stands."""
    while True:
        try:
            temporary.rename(folder)
        except OSError:
            if meta := intact(folder):
                return meta
            if not folder.exists():
                raise
            # Renamed before it is removed: a reader never meets a folder half gone under its final name.
            aside = temporary.with_name(f"{temporary.name}-old-{uuid.uuid4().hex[:8]}")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            continue
        return json.loads((folder / META).read_text())


def sweep(root: Path) -> None:
    """Remove what builders on this machine left when they were killed."""
    mine = f".tmp-{socket.gethostname()}-"
    for path in root.glob(".tmp-*"):
        pid = path.name.removeprefix(mine).split("-")[0]
        if path.name.startswith(mine) and pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process of this number runs; where that cannot be asked, yes."""
    if os.name != "posix":
        return True  # elsewhere signal 0 would end the process that it asks about
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# Content hashes


def source_digest(source: TextSource) -> str:
    """Hash of what a source's documents depend on: each file's bytes and kind, and the JSONL field."""
    kinds = [(text_suffix(path) == ".jsonl", path.suffix) for path in source.files]
    field = source.text_key if any(is_jsonl for is_jsonl, _ in kinds) else None
    try:
        content = remembered("digest", source.files, lambda: file_digest(source.files))
    except READ_ERRORS as error:
        raise unreadable(Path(getattr(error, "filename", None) or source.label), source.key, error) from error
    kind = json.dumps([kinds, field, source.skip_undecodable])
    return hashlib.sha256(f"{content} {kind}".encode()).hexdigest()


def file_digest(files: Sequence[Path]) -> str:
    """sha256 over the lengths and bytes of files, in order."""
    digest = hashlib.sha256()
    for path in files:
        inner = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                inner.update(block)
        digest.update(inner.digest())
    return digest.hexdigest()


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """(path, bytes, nanoseconds of the last change, inode) of each file."""
    found = []
    for path in files:
        state = path.stat()
        found.append((str(path), state.st_size, state.st_mtime_ns, state.st_ino))
    return found


def remembered(name: str, files: Sequence[Path], compute: Callable[[], T]) -> T:
    """`compute()`, a str or int that depends on the bytes of `files` only.

    For files of REMEMBER_BYTES or more the result is kept under their paths, sizes and times of change, so
    that a start does not read gigabytes again.
    """
    before = stamps(files)
    if sum(size for _, size, _, _ in before) < REMEMBER_BYTES:
        return compute()
    key = hashlib.sha256(json.dumps([name, before]).encode()).hexdigest()[:32]
    path = cache_root() / "memo" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(path.read_text())["value"]
    value = compute()
    newest = max(changed for _, _, changed, _ in before) / 1e9
    if stamps(files) == before and time.time() - newest > RACY_SECONDS:
        with contextlib.suppress(OSError):  # only speed is lost without it
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            temporary.write_text(json.dumps({"value": value}))
            temporary.replace(path)
    return value
