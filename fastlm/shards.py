"""Token shards: little-endian `.bin` files of ids, and a stream that reads many as one.

    header 20240520, version 1   256 int32, then uint16 ids     (llm.c, modded-nanogpt)
    header 20240801, version 7   256 int32, then uint32 ids     (llm.c, vocabularies past 2^16)
    uint16                       ids only                       (nanoGPT; `--data.bin_format uint16`)

The header holds magic, version, number of tokens, zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlm.errors import InputError

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
# magic -> (version, dtype of the ids, vocabulary of the tokenizer that this layout was made for)
LAYOUTS = {20240520: (1, np.dtype("<u2"), 50257), 20240801: (7, np.dtype("<u4"), 128256)}
MAGIC_OF = {dtype: magic for magic, (_, dtype, _) in LAYOUTS.items()}
HEADERLESS_VOCAB = 50257
TOKENS_PER_SHARD = 100_000_000
SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Shard:
    """`count` ids of type `dtype`, `offset` bytes into the file."""

    path: Path
    dtype: np.dtype
    offset: int
    count: int
    vocab_size: int  # of the tokenizer that the layout was made for

    def open(self) -> np.ndarray:
        """The ids, memory-mapped, read-only: (count,) of `dtype`."""
        if self.count == 0:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))


def open_shard(path: Path, bin_format: str, key: str = "--data.path") -> Shard:
    """Read a shard's header and hold its length against the file's.

    Raises InputError for a magic or version that is not known, and a file that is cut short or too long.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InputError(key, path, f"cannot be read ({error.strerror}): check the file") from error
    if size == 0:
        raise InputError(key, path, "the shard is empty")
    ints = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    layout = LAYOUTS.get(int(ints[0])) if len(ints) else None
    if bin_format == "uint16":
        return headerless(path, size, layout is not None, key)
    if layout is None:
        remedy = (
            "not the magic of a known shard (20240520 or 20240801): prepare it again, or give "
            "--data.bin_format uint16 if the file is ids without a header"
        )
        raise InputError(key, f"{path} (magic {ints[0] if len(ints) else None})", remedy)
    version, dtype, vocab_size = layout
    if len(head) < HEADER_BYTES:
        raise InputError(key, f"{path} ({size} bytes)", "cut short inside its header: copy or prepare it again")
    if ints[1] != version:
        remedy = f"magic {ints[0]} goes with version {version}: prepare it again"
        raise InputError(key, f"{path} (version {ints[1]})", remedy)
    count = int(ints[2])
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        how = "cut short" if size < expected else "longer than its header says"
        remedy = f"{how}: {count} tokens make {expected} bytes; copy or prepare it again"
        raise InputError(key, f"{path} ({size} bytes)", remedy)
    return Shard(path, dtype, HEADER_BYTES, count, vocab_size)


def headerless(path: Path, size: int, has_magic: bool, key: str) -> Shard:
    """A file of uint16 ids and nothing else."""
    if has_magic:
        raise InputError("--data.bin_format", "uint16", f"{path} has a header: drop --data.bin_format uint16")
    dtype = np.dtype("<u2")
    if size % dtype.itemsize:
        remedy = "an odd number of bytes is no file of uint16 ids: it is cut short; copy or prepare it again"
        raise InputError(key, f"{path} ({size} bytes)", remedy)
    return Shard(path, dtype, 0, size // dtype.itemsize, HEADERLESS_VOCAB)


def largest_id(shards: Iterable[Shard]) -> int:
    """The largest id in the shards, -1 if they hold none; reads them once, in constant memory."""
    largest = -1
    for shard in shards:
        ids = shard.open()
        for start in range(0, shard.count, SCAN_TOKENS):
            largest = max(largest, int(ids[start : start + SCAN_TOKENS].max()))
    return largest


def check_ids(shards: Sequence[Shard], vocab_size: int, key: str = "--data.path") -> None:
    """Raise InputError naming file, place and id of the first token past the vocabulary."""
    for shard in shards:
        ids = shard.open()
        for start in range(0, shard.count, SCAN_TOKENS):
            block = ids[start : start + SCAN_TOKENS]
            if int(block.max()) < vocab_size:
                continue
            at = int(np.argmax(block >= vocab_size))
            remedy = (
                f"past the vocabulary of {vocab_size}: give the tokenizer that made the shards with "
                "--data.tokenizer PATH, or their --data.vocab_size"
            )
            raise InputError(key, f"{shard.path} with id {block[at]} at token {start + at}", remedy)


class ShardWriter:
    """Writes ids to `folder/NAME_000000.bin`, ..., each of at most `tokens_per_shard`."""

    def __init__(self, folder: Path, name: str, vocab_size: int, tokens_per_shard: int = TOKENS_PER_SHARD):
        self.folder, self.name, self.tokens_per_shard = folder, name, tokens_per_shard
        self.dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        self.paths: list[Path] = []
        self.tokens = 0
        self._stream = None
        self._count = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids, any integer dtype, all below the vocabulary's size."""
        start = 0
        while start < len(ids):
            if self._stream is None:
                self._begin()
            assert self._stream is not None
            part = ids[start : start + self.tokens_per_shard - self._count]
            self._stream.write(part.astype(self.dtype).tobytes())
            start += len(part)
            self._count += len(part)
            self.tokens += len(part)
            if self._count == self.tokens_per_shard:
                self.close()

    def close(self) -> None:
        """Finish the shard under way: its header gets the number of tokens."""
        if self._stream is None:
            return
        header = np.zeros(HEADER_INTS, "<i4")
        magic = MAGIC_OF[self.dtype]
        header[:3] = magic, LAYOUTS[magic][0], self._count
        self._stream.seek(0)
        self._stream.write(header.tobytes())
        self._stream.close()
        self._stream, self._count = None, 0

    def _begin(self) -> None:
        path = self.folder / f"{self.name}_{len(self.paths):06d}.bin"
        self.paths.append(path)
        self._stream = path.open("wb")
        self._stream.write(bytes(HEADER_BYTES))


class TokenStream:
    """The ids of several shards, read as one sequence; a `[start, stop)` part of it may stand alone."""

    def __init__(self, shards: Sequence[Shard], start: int = 0, stop: int | None = None):
        self.shards = tuple(shards)
        self._ends = np.cumsum([shard.count for shard in shards], dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        self._start = start
        self._stop = total if stop is None else stop
        self._maps: list[np.ndarray | None] = [None] * len(self.shards)

    def __len__(self) -> int:
        return self._stop - self._start

    def part(self, start: int, stop: int) -> TokenStream:
        """The tokens [start, stop) of this stream as a stream."""
        return TokenStream(self.shards, self._start + start, self._start + stop)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64 (count,). Raises IndexError outside the stream."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens [{start}, {start + count}) of a stream of {len(self)}")
        out = np.empty(count, np.int64)
        begin = self._start + start
        index = int(np.searchsorted(self._ends, begin, side="right"))
        filled = 0
        while filled < count:
            shard_begin = int(self._ends[index]) - self.shards[index].count
            at = begin + filled - shard_begin
            block = self._map(index)[at : at + count - filled]
            out[filled : filled + len(block)] = block
            filled += len(block)
            index += 1
        return out

    def _map(self, index: int) -> np.ndarray:
        # Opened on first use: a corpus may have more shards than a process may have open files.
        opened = self._maps[index]
        if opened is None:
            opened = self._maps[index] = self.shards[index].open()
        return opened
