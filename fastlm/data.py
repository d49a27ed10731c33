"""Batches for training: the data set behind a configuration, the order of samples, reading ahead.

Sample i is a pure function of (seed, i), whatever the batch size, the number of devices or where a run was
resumed. Targets are the inputs moved on by one token.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastlm.config import TOKENIZERS, DataConfig, check_tokenizer_name
from fastlm.corpus import Notify, TextCorpus, cached_shards, cached_text, file_digest, remembered
from fastlm.errors import InputError
from fastlm.shards import Shard, TokenStream, check_ids, largest_id, open_shard
from fastlm.text import SHARD_SUFFIX, TextSource, embedded_source, find_files
from fastlm.tokenizer import (
    FILE_NAME,
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    ready_tokenizer,
)

IGNORE = -100  # a target that no loss counts
READ_AHEAD = 4  # batches


@dataclass(frozen=True)
class Dataset:
    """Token streams and what their ids mean."""

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer | None  # None: foreign shards that brought none
    vocab_size: int
    fingerprint: str  # hash of content, tokenizer, cleaning and split: the same data, the same fingerprint
    source: str  # for people
    is_code: bool  # all the text is Python source

    @property
    def document_start(self) -> int | None:
        """The id after which a text begins, None without a tokenizer.

        The separator where training met it, that is before each of several documents; else a line break's.
        """
        if self.tokenizer is None:
            return None
        first = int(self.train.read(0, 1)[0])
        return first if first == self.tokenizer.eot_id else self.tokenizer.line_break


def silent(_: str) -> None:
    """A `notify` that says nothing."""


def open_dataset(cfg: DataConfig, notify: Notify = silent) -> Dataset:
    """The data set that a configuration names; text is tokenised at first, then found in the cache.

    `notify` gets lines on the progress. Nothing depends on the run's seed. Raises InputError for what the
    user must mend: no such file, no text, not UTF-8, less than one window, an unknown tokenizer, a broken
    shard.
    """
    check_data_config(cfg)
    files = find_files("--data.path", cfg.path) if cfg.path is not None else []
    val_files = find_files("--data.val_path", cfg.val_path) if cfg.val_path is not None else []
    if holds_shards("--data.path", cfg.path, files):
        if val_files and not holds_shards("--data.val_path", cfg.val_path, val_files):
            raise InputError("--data.val_path", cfg.val_path, "must be token shards, as --data.path is")
        dataset = open_shards(cfg, files, val_files)
    else:
        if holds_shards("--data.val_path", cfg.val_path, val_files):
            raise InputError("--data.val_path", cfg.val_path, "must be text, as --data.path is")
        dataset = open_text(cfg, files, val_files, notify)
    check_lengths(cfg, dataset)
    return dataset


def check_data_config(cfg: DataConfig) -> None:
    """Raise InputError for values out of range, before any file is read."""
    if not 0 < cfg.val_fraction < 1:
        raise InputError("--data.val_fraction", cfg.val_fraction, "must lie between 0 and 1, both excluded")
    if cfg.seq_len < 1:
        raise InputError("--data.seq_len", cfg.seq_len, "must be at least 1 token")
    check_tokenizer_name(cfg.tokenizer)
    if cfg.vocab_size is not None and cfg.vocab_size < 1:
        raise InputError("--data.vocab_size", cfg.vocab_size, "must be at least 1")


def holds_shards(key: str, spec: str | None, files: Sequence[Path]) -> bool:
    """Whether the files are token shards. Raises InputError for a mixture with text."""
    kinds = {path.suffix == SHARD_SUFFIX for path in files}
    if len(kinds) == 2:
        remedy = f"holds both shards and text: name one kind, e.g. {key} '{Path(spec or '.') / '*.bin'}'"
        raise InputError(key, spec, remedy)
    return kinds == {True}


def open_text(cfg: DataConfig, files: list[Path], val_files: list[Path], notify: Notify) -> Dataset:
    """Text, tokenised or from the cache; without files, the embedded corpus."""
    corpus = text_corpus(cfg, files, val_files)
    folder, meta = cached_shards(corpus, notify)
    tokenizer = load_tokenizer(folder)
    if cfg.tokenizer in TOKENIZERS:
        tokenizer.name = cfg.tokenizer
    train, val = (stored_stream(folder, meta["parts"][part]) for part in ("train", "val"))
    size = sum(path.stat().st_size for path in corpus.train.files)
    return Dataset(
        train=train,
        val=val,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        fingerprint=folder.name,
        source=describe(corpus.train.label, len(corpus.train.files), size),
        is_code=corpus.train.is_code,
    )


def stored_stream(folder: Path, names: Sequence[str]) -> TokenStream:
    """Shards of the cache as one stream."""
    return TokenStream([open_shard(folder / name, "header") for name in names])


def open_for_evaluation(
    cfg: DataConfig,
    path: str | None,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    notify: Notify = silent,
) -> TokenStream:
    """What a run is evaluated on: its own validation split, or all of the text or shards at `path`.

    `cfg`, `tokenizer` and `vocab_size` are the run's. Raises InputError as `open_dataset` does.
    """
    if path is None:
        return open_dataset(cfg, notify).val
    files = find_files("--data.path", path)
    if holds_shards("--data.path", path, files):
        shards = [open_shard(file, cfg.bin_format) for file in files]
        check_ids(shards, vocab_size)
        stream = TokenStream(shards)
    elif tokenizer is None:
        remedy = "the run has no tokenizer, it was trained on shards: give shards of the same vocabulary"
        raise InputError("--data.path", path, remedy)
    else:
        source = TextSource("--data.path", path, tuple(files), cfg.text_key)
        folder, meta = cached_text(source, tokenizer, notify)
        stream = stored_stream(folder, meta["parts"]["text"])
    if len(stream) < 2:
        raise InputError("--data.path", f"{path} ({len(stream)} tokens)", "give at least 2 tokens")
    return stream


def text_corpus(cfg: DataConfig, files: list[Path], val_files: list[Path]) -> TextCorpus:
    """The corpus of a configuration whose paths name text."""
    if cfg.tokenizer == "bpe" and cfg.vocab_size is not None:
        check_vocab_size(cfg.vocab_size)
    train = embedded_source()
    if cfg.path is not None:
        train = TextSource("--data.path", cfg.path, tuple(files), cfg.text_key)
    val = None
    if cfg.val_path is not None:
        val = TextSource("--data.val_path", cfg.val_path, tuple(val_files), cfg.text_key)
    return TextCorpus.from_config(cfg, train, val)


def describe(label: str, count: int, size: int) -> str:
    """A source for people: `corpus/ (12 files, 3.4 MB)`."""
    files = f"{count} files, " if count > 1 else ""
    return f"{label} ({files}{size / 1e6:.1f} MB)"


def open_shards(cfg: DataConfig, files: list[Path], val_files: list[Path]) -> Dataset:
    """Token shards: headers, lengths and every id are checked here, before the first step.

    Validation: `val_files`; else the files with `val` in their name, where not all have it; else the last
    `val_fraction` of the tokens.
    """
    named = [path for path in files if "val" in path.name]
    if not val_files and 0 < len(named) < len(files):
        files, val_files = [path for path in files if path not in named], named
    train = [open_shard(path, cfg.bin_format) for path in files]
    val = [open_shard(path, cfg.bin_format, "--data.val_path") for path in val_files]
    tokenizer, vocab_size = shard_vocabulary(cfg, [*train, *val])
    paths = [*files, *val_files]
    if remembered("largest id", paths, lambda: largest_id([*train, *val])) >= vocab_size:
        check_ids([*train, *val], vocab_size)
    train_stream, val_stream = TokenStream(train), TokenStream(val)
    if not val:
        cut = int(len(train_stream) * (1 - cfg.val_fraction))
        train_stream, val_stream = train_stream.part(0, cut), train_stream.part(cut, len(train_stream))
    digest = remembered("digest", paths, lambda: file_digest(paths))
    identity = f"{digest} {cfg.bin_format} {vocab_size} {len(train_stream)} {len(val_stream)}"
    return Dataset(
        train=train_stream,
        val=val_stream,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
        source=describe(str(cfg.path), len(paths), sum(path.stat().st_size for path in paths)),
        is_code=False,
    )


def shard_vocabulary(cfg: DataConfig, shards: Sequence[Shard]) -> tuple[Tokenizer | None, int]:
    """(tokenizer or None, vocabulary size) of token shards, the first of these that exists:

    the tokenizer that `--data.tokenizer PATH` names; a tokenizer.json beside the first shard, as
    `fastlm.prepare` writes it; `--data.tokenizer byte` or `gpt2`; `--data.vocab_size`; the vocabulary that the
    layout was made for (uint16: GPT-2's 50257, uint32: Llama 3's 128256).
    """
    beside = shards[0].path.parent / FILE_NAME
    tokenizer = None
    if cfg.tokenizer in TOKENIZERS and beside.exists():
        tokenizer = load_tokenizer(beside, "--data.path")
    elif cfg.tokenizer == "char":
        remedy = f"shards hold no text to take characters from: put their {FILE_NAME} beside them, or name it"
        raise InputError("--data.tokenizer", cfg.tokenizer, remedy)
    else:
        tokenizer = ready_tokenizer(cfg.tokenizer)
    if tokenizer is not None:
        return tokenizer, tokenizer.vocab_size
    return None, cfg.vocab_size or max(shard.vocab_size for shard in shards)


def check_lengths(cfg: DataConfig, dataset: Dataset) -> None:
    """Raise InputError unless there is one whole training window and one token to predict in validation."""
    spec = cfg.path or "null"
    need = cfg.seq_len + 1
    if len(dataset.train) < need:
        remedy = f"shorter than one window of {need} tokens: give more text or a smaller --data.seq_len"
        if cfg.val_path is None and len(dataset.train) + len(dataset.val) >= need:
            remedy += " or --data.val_fraction"
        raise InputError("--data.path", f"{spec} ({len(dataset.train)} training tokens)", remedy)
    if len(dataset.val) < 2:
        key, spec = ("--data.path", spec) if cfg.val_path is None else ("--data.val_path", cfg.val_path)
        remedy = "shorter than one window: validation needs at least 2 tokens; give more text"
        remedy += " or a larger --data.val_fraction" if cfg.val_path is None else ""
        raise InputError(key, f"{spec} ({len(dataset.val)} validation tokens)", remedy)


class WindowOrder:
    """Which window each sample reads: one permutation of all windows per epoch.

    A window is `seq_len` inputs and the target after the last one; (n_tokens - 1) // seq_len of them stand
    end to end. Up to `seq_len - 1` tokens are over; how many of them come before the first window varies by
    epoch, so that each is seen sometime. The permutation is a Feistel network over a rectangle that just
    holds the windows, walked until it lands on one: O(1) in time and memory for any sample number.
    """

    ROUNDS = 8

    def __init__(self, n_tokens: int, seq_len: int, seed: int):
        """Raises InputError when there is not one whole window."""
        self.seq_len = seq_len
        self.windows_per_epoch = (n_tokens - 1) // seq_len
        if self.windows_per_epoch < 1:
            remedy = f"shorter than one window of {seq_len + 1} tokens: give more text or a smaller --data.seq_len"
            raise InputError("--data.path", f"{n_tokens} tokens", remedy)
        self._tail = (n_tokens - 1) % seq_len
        self._rows = int(np.ceil(np.sqrt(self.windows_per_epoch)))
        self._columns = -(-self.windows_per_epoch // self._rows)
        self._seed = mix(np.array([seed % (1 << 64)], np.uint64))

    def start(self, i: int) -> int:
        """First token of sample i >= 0."""
        return int(self.starts(i, 1)[0])

    def starts(self, first: int, count: int) -> np.ndarray:
        """First tokens of samples [first, first + count), int64 (count,)."""
        samples = np.arange(first, first + count, dtype=np.uint64)
        windows = np.uint64(self.windows_per_epoch)
        keys = mix(self._seed ^ mix(samples // windows))
        at = self._permute(samples % windows, keys)
        while (outside := at >= windows).any():
            at[outside] = self._permute(at[outside], keys[outside])
        offsets = mix(~keys) % np.uint64(self._tail + 1)
        return (offsets + at * np.uint64(self.seq_len)).astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A bijection of [0, rows * columns) for each key."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = values // columns, values % columns
        for number in range(self.ROUNDS):
            key = mix(keys + np.uint64(number))
            if number % 2:
                column = (column + mix(key ^ row) % columns) % columns
            else:
                row = (row + mix(key ^ column) % rows) % rows
        return row * columns + column


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 of each element (uint64): neighbouring inputs give unrelated outputs.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batch(NamedTuple):
    """Samples [first_sample, first_sample + batch)."""

    inputs: torch.Tensor  # int64 (batch, seq_len)
    targets: torch.Tensor  # int64 (batch, seq_len)
    first_sample: int


class BatchLoader:
    """An endless iterator over batches, one per update, read ahead in a background thread.

    Batch k holds samples first_sample + [k * batch_size, (k + 1) * batch_size), so a run resumed at any
    sample goes on as if never stopped. An error while reading is raised by `next`. Also a context manager.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: WindowOrder,
        batch_size: int,
        first_sample: int = 0,
        pin_memory: bool = False,
    ):
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(READ_AHEAD)
        self._stop = threading.Event()
        # The thread holds no reference to the loader, so one that is forgotten is collected and stops it.
        args = (stream, order, batch_size, first_sample, pin_memory, self._queue, self._stop)
        self._thread = threading.Thread(target=fill_queue, args=args, name="batches", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; further `next` calls end the iteration."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fill_queue(
    stream: TokenStream,
    order: WindowOrder,
    batch_size: int,
    first_sample: int,
    pin_memory: bool,
    out: queue.Queue[Batch | BaseException],
    stop: threading.Event,
) -> None:
    """Read batches into `out` until `stop`; an error goes in as the last item."""
    sample = first_sample
    while not stop.is_set():
        item: Batch | BaseException
        try:
            item = read_batch(stream, order, batch_size, sample)
            if pin_memory:
                item = Batch(item.inputs.pin_memory(), item.targets.pin_memory(), sample)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        sample += batch_size


def read_batch(stream: TokenStream, order: WindowOrder, batch_size: int, first_sample: int) -> Batch:
    """Samples [first_sample, first_sample + batch_size) of the order."""
    windows = np.empty((batch_size, order.seq_len + 1), np.int64)
    for row, start in zip(windows, order.starts(first_sample, batch_size), strict=True):
        row[:] = stream.read(int(start), order.seq_len + 1)
    tokens = torch.from_numpy(windows)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), first_sample)


def eval_windows(
    stream: TokenStream, seq_len: int, batch_size: int, limit_windows: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets), int64 (batch_size, seq_len), of windows end to end: all tokens but the first are targets.

    The last batch may have fewer rows; past the end of the last window targets are -100 and inputs 0.
    `limit_windows` takes that many, spread evenly, always the same.
    """
    total = -(-(len(stream) - 1) // seq_len)
    chosen = np.arange(total)
    if limit_windows is not None and limit_windows < total:
        chosen = np.arange(limit_windows) * total // limit_windows
    for begin in range(0, len(chosen), batch_size):
        windows = chosen[begin : begin + batch_size]
        inputs = torch.zeros(len(windows), seq_len, dtype=torch.int64)
        targets = torch.full((len(windows), seq_len), IGNORE, dtype=torch.int64)
        for row, window in enumerate(windows):
            start = int(window) * seq_len
            tokens = torch.from_numpy(stream.read(start, min(seq_len + 1, len(stream) - start)))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        yield inputs, targets
