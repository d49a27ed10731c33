"""Token shards: the three layouts, their checks, and reading many as one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from fastlm.errors import InputError
from fastlm.shards import Shard, ShardWriter, TokenStream, check_ids, largest_id, open_shard


def shard_bytes(magic: int, version: int, count: int, ids: list[int], letter: str) -> bytes:
    """A shard as its format's description says, by struct."""
    header = struct.pack("<3i", magic, version, count).ljust(1024, b"\0")
    return header + struct.pack(f"<{len(ids)}{letter}", *ids)


def write16(path: Path, ids: list[int]) -> Path:
    path.write_bytes(shard_bytes(20240520, 1, len(ids), ids, "H"))
    return path


def refusal(path: Path, bin_format: str = "header") -> str:
    with pytest.raises(InputError) as caught:
        open_shard(path, bin_format)
    return str(caught.value)


@pytest.mark.parametrize(
    ("magic", "version", "letter", "ids"),
    [(20240520, 1, "H", [0, 5, 65535, 258]), (20240801, 7, "I", [0, 70000, 2**31, 128255])],
)
def test_headers(tmp_path: Path, magic: int, version: int, letter: str, ids: list[int]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes(magic, version, len(ids), ids, letter))
    shard = open_shard(path, "header")
    assert shard.open().tolist() == ids
    assert TokenStream([shard]).read(0, len(ids)).tolist() == ids


def test_ids_without_header(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<4H", 3, 50256, 0, 1))
    assert open_shard(path, "uint16").open().tolist() == [3, 50256, 0, 1]
    assert "--data.bin_format uint16" in refusal(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"\x01", "magic"),
        (struct.pack("<3i", 20240520, 1, 4), "cut short inside its header"),
        (shard_bytes(20240521, 1, 2, [1, 2], "H"), "magic 20240521"),
        (shard_bytes(20240520, 2, 2, [1, 2], "H"), "version 2"),
        (shard_bytes(20240801, 1, 2, [1, 2], "I"), "version 1"),
        (shard_bytes(20240520, 1, 3, [1, 2], "H"), "cut short"),
        (shard_bytes(20240520, 1, 3, [1, 2, 3], "H")[:-1], "cut short"),
        (shard_bytes(20240520, 1, 1, [1, 2], "H"), "longer than its header"),
        (shard_bytes(20240520, 1, -1, [1, 2], "H"), "tokens make"),
    ],
)
def test_broken_shards_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert told in message


def test_uint16_refusals(tmp_path: Path) -> None:
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"\1\0\2")
    assert "odd number of bytes" in refusal(odd, "uint16")
    assert "drop --data.bin_format uint16" in refusal(write16(tmp_path / "a.bin", [1, 2]), "uint16")
    assert "cannot be read" in refusal(tmp_path / "missing.bin")


def test_largest_id_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlm.shards.SCAN_TOKENS", 4)
    paths = [write16(tmp_path / "a.bin", list(range(10))), write16(tmp_path / "b.bin", [1, 2, 3, 4, 5, 6, 77, 78])]
    shards = [open_shard(path, "header") for path in paths]
    assert largest_id(shards) == 78
    assert largest_id([open_shard(write16(tmp_path / "c.bin", []), "header")]) == -1
    check_ids(shards, 79)
    with pytest.raises(InputError, match=r"b\.bin with id 77 at token 6; past the vocabulary of 77") as caught:
        check_ids(shards, 77)
    assert "--data.vocab_size" in caught.value.remedy


@pytest.mark.parametrize(("vocab_size", "magic", "letter"), [(65536, 20240520, "H"), (65537, 20240801, "I")])
def test_writer_layout(tmp_path: Path, vocab_size: int, magic: int, letter: str) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size)
    for block in ([1, 2, 3], [], [vocab_size - 1]):
        writer.write(np.array(block, dtype=np.int64))
    writer.close()
    (path,) = writer.paths
    assert path.name == "train_000000.bin"
    version = {20240520: 1, 20240801: 7}[magic]
    assert path.read_bytes() == shard_bytes(magic, version, 4, [1, 2, 3, vocab_size - 1], letter)
    assert writer.tokens == 4


@pytest.mark.parametrize("block", [1, 3, 7, 50])
def test_writer_fills_shards(tmp_path: Path, block: int) -> None:
    writer = ShardWriter(tmp_path, "x", 100, tokens_per_shard=7)
    ids = np.arange(50)
    for start in range(0, 50, block):
        writer.write(ids[start : start + block])
    writer.close()
    shards = [open_shard(path, "header") for path in writer.paths]
    assert [shard.count for shard in shards] == [7] * 7 + [1]
    assert TokenStream(shards).read(0, 50).tolist() == ids.tolist()


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """0..29 over shards of 5, 0, 1, 24 tokens."""
    shards: list[Shard] = []
    start = 0
    for i, count in enumerate([5, 0, 1, 24]):
        path = write16(tmp_path / f"{i}.bin", list(range(start, start + count)))
        shards.append(open_shard(path, "header"))
        start += count
    return TokenStream(shards)


def test_stream_reads_across_shards(stream: TokenStream) -> None:
    assert len(stream) == 30
    for start in range(30):
        for count in range(31 - start):
            found = stream.read(start, count)
            assert found.dtype == np.int64
            assert found.tolist() == list(range(start, start + count))


def test_part_of_a_stream(stream: TokenStream) -> None:
    part = stream.part(3, 20).part(1, 10)
    assert len(part) == 9
    assert part.read(0, 9).tolist() == list(range(4, 13))
    with pytest.raises(IndexError):
        part.read(0, 10)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 31), (30, 1), (5, -1)])
def test_stream_refuses_what_it_lacks(stream: TokenStream, start: int, count: int) -> None:
    with pytest.raises(IndexError, match="of a stream of 30"):
        stream.read(start, count)


def test_what_is_read_is_the_readers_own(stream: TokenStream) -> None:
    stream.read(0, 10)[:] = -1
    assert stream.read(0, 10).tolist() == list(range(10))
