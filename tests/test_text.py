"""Finding, reading, cutting and cleaning text."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import random
import unicodedata
from pathlib import Path

import pytest

from fastlm import text
from fastlm.errors import InputError
from fastlm.text import TextSource, clean, documents, find_files


def read(*files: Path, text_key: str = "text") -> list[str]:
    """The text of each document."""
    source = TextSource("--data.path", "here", files, text_key)
    return ["".join(document.pieces) for document in documents(source)]


def refusal(*files: Path, text_key: str = "text") -> str:
    with pytest.raises(InputError) as caught:
        read(*files, text_key=text_key)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def wild_text(seed: int, length: int) -> str:
    """Text with accents apart from their letters, Hangul letters, control characters and few line breaks."""
    draw = random.Random(seed)
    alphabet = "ab \ne\u0301\u0323\u1100\u1161\u11a8\x00\r\x85\u4e2d\U0001f600"
    return "".join(draw.choice(alphabet) for _ in range(length))


# Cleaning


def test_clean_leaves_ordinary_text_alone() -> None:
    sample = "def f(x):\n\treturn 'naïve — 中文 😀'  \n\n\n"
    assert clean(sample) == sample


def test_clean_composes_accents() -> None:
    assert clean("e\u0301 \u1100\u1161\u11a8") == "\u00e9 \uac01"


def test_clean_drops_every_control_character_but_tab_and_newline() -> None:
    controls = "".join(map(chr, [*range(32), *range(0x7F, 0xA0)]))
    assert all(unicodedata.category(c) == "Cc" for c in controls)
    assert clean(f"a{controls}b") == "a\t\nb"


def test_clean_turns_crlf_into_newlines() -> None:
    assert clean("a\r\nb\r\n") == "a\nb\n"


def test_clean_composes_what_a_control_character_kept_apart() -> None:
    assert clean("e\x00\u0301") == "\u00e9"


@pytest.mark.parametrize("seed", range(20))
def test_clean_twice_is_clean_once(seed: int) -> None:
    once = clean(wild_text(seed, 300))
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)


# Cutting


@pytest.mark.parametrize("seed", range(30))
def test_cleaned_pieces_make_the_cleaned_text(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 7)
    sample = wild_text(seed, 400)
    pieces = list(text.cut_pieces([sample]))
    assert len(pieces) > 10
    assert "".join(pieces) == sample
    assert "".join(map(clean, pieces)) == clean(sample)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64, 1000])
def test_cuts_do_not_depend_on_how_the_text_arrives(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 11)
    sample = wild_text(5, 700)
    chunks = [sample[i : i + chunk] for i in range(0, len(sample), chunk)]
    assert list(text.cut_pieces(chunks)) == list(text.cut_pieces([sample]))


def test_pieces_end_with_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    sample = "".join(f"line {i} of some text\n" for i in range(100))
    pieces = list(text.cut_pieces([sample]))
    assert len(pieces) > 20
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(50 <= len(piece) < 75 for piece in pieces[:-1])


def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    assert [len(piece) for piece in text.cut_pieces(["x" * 1000])] == [100] * 10


# Reading


def test_file_longer_than_its_chunks_reads_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 13)
    sample = clean(wild_text(1, 5000))
    assert read(write(tmp_path / "a.txt", sample)) == [sample]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compressed_text(tmp_path: Path, suffix: str, pack, kind: str) -> None:
    content = "one\ntwo\n" if kind == ".txt" else '{"text": "one\\ntwo\\n"}\n'
    assert read(write(tmp_path / f"a{kind}{suffix}", pack(content.encode()))) == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_damaged_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    packed = pack(bytes(random.Random(0).randrange(97, 122) for _ in range(5000)))
    path = write(tmp_path / f"a.txt{suffix}", packed[: len(packed) // 2])
    assert str(path) in refusal(path)
    other = write(tmp_path / f"b.txt{suffix}", b"this was never compressed")
    assert str(other) in refusal(other)


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfab")) == ["ab"]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "ab"}')) == ["ab"]


@pytest.mark.parametrize("offset", [0, 1, 9, 10, 11, 999])
def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 10)
    path = write(tmp_path / "latin.txt", b"a" * offset + b"\xe9" + b"bc" * 20)
    message = refusal(path)
    assert f"{path} with bytes that are not UTF-8 at byte {offset};" in message
    assert "iconv" in message


def test_text_cut_inside_a_character_is_placed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abc中".encode()[:-1])
    assert "at byte 3;" in refusal(path)


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    rows = ['{"text": "one\\n"}', "", '{"id": 3, "text": "e\\u0301\\r\\n"}', '{"text": ""}']
    assert read(write(tmp_path / "a.jsonl", "\n".join(rows))) == ["one\n", "\u00e9\n", ""]


def test_jsonl_text_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "x", "text": "y"}\n')
    assert read(path, text_key="body") == ["x"]


@pytest.mark.parametrize("row", ['{"text": "cut', "[1, 2]", '{"body": "x"}', '{"text": 3}', '"text"', "nan"])
def test_bad_jsonl_row_is_named_by_line(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{row}\n')
    message = refusal(path)
    assert f"{path}:2;" in message
    assert "\n" not in message


def test_missing_text_key_names_the_keys_there_are(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", '{"title": "x", "body": "y"}\n'))
    assert "it has title, body" in message
    assert "--data.text_key" in message


def test_jsonl_bytes_that_are_not_utf8_are_placed_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "ab"}\n{"text": "\xe9"}\n')
    assert "at byte 25;" in refusal(path)


def test_half_a_surrogate_pair_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}\n'))
    assert found == "a?b \U0001f600"


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    message = refusal(path)
    monkeypatch.undo()
    assert str(path) in message
    assert "Permission denied" in message


# Finding


def names(spec: object) -> list[str]:
    return [path.name for path in find_files("--data.path", str(spec))]


def test_directory_is_searched_recursively_in_order(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.py", "a/b/c.md", "a.jsonl", "c.txt.gz", "skip.csv", ".hidden.txt", ".git/x.txt"]:
        write(tmp_path / name, "x")
    assert names(tmp_path) == ["a.jsonl", "c.md", "z.py", "b.txt", "c.txt.gz"]


def test_glob_and_single_file(tmp_path: Path) -> None:
    for name in ["b.log", "a.log", "d/c.log"]:
        write(tmp_path / name, "x")
    assert names(tmp_path / "*.log") == ["a.log", "b.log"]
    assert names(f"{tmp_path}/**/*.log") == ["a.log", "b.log", "c.log"]
    assert names(tmp_path / "b.log") == ["b.log"]


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", "x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("missing.txt", "no such file"),
        ("*.txt", "no file matches"),
        ("empty", "the directory holds no"),
        ("rows.parquet", "later version"),
        ("tables", "later version"),
        ("a.txt.zst", "decompress"),
        ("a\0b", "no such file"),
    ],
)
def test_refused_paths(tmp_path: Path, spec: str, remedy: str) -> None:
    write(tmp_path / "rows.parquet", "x")
    write(tmp_path / "tables/rows.parquet", "x")
    write(tmp_path / "a.txt.zst", "x")
    write(tmp_path / "empty/photo.jpg", "x")
    with pytest.raises(InputError, match=remedy) as caught:
        find_files("--data.val_path", f"{tmp_path}/{spec}")
    assert caught.value.key == "--data.val_path"


def test_hugging_face_names_are_refused() -> None:
    with pytest.raises(InputError, match="later version"):
        find_files("--data.path", "hf:some/dataset")


# The embedded corpus


def test_embedded_corpus_is_the_library_without_its_tests() -> None:
    source = text.embedded_source()
    parts = {part for path in source.files for part in path.parts}
    stems = {path.name for path in source.files}
    assert {"argparse.py", "topics.py", "decoder.py"} <= stems
    assert not {"test", "tests", "idle_test", "site-packages"} & parts
    assert source.is_code
    assert 8e6 < sum(path.stat().st_size for path in source.files) < 20e6
    assert len(source.files) == len(set(source.files))


def test_embedded_corpus_order_is_that_of_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["b.py", "a/z.py", "a-b.py", "test/t.py", "x/tests/t.py", "x/y.py", "data.txt", "__pycache__/b.py"]:
        write(tmp_path / name, "pass\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    found = [path.relative_to(tmp_path).as_posix() for path in text.embedded_source().files]
    assert found == ["a-b.py", "a/z.py", "b.py", "x/y.py"]


def test_embedded_corpus_leaves_out_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.py", "a\n")
    write(tmp_path / "b.py", b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert ["".join(d.pieces) for d in documents(text.embedded_source())] == ["a\n"]


def test_no_library_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=r"--data\.path FILE"):
        text.embedded_source()


def test_is_code_means_every_file(tmp_path: Path) -> None:
    code, gz, prose = tmp_path / "a.py", tmp_path / "b.py.gz", tmp_path / "c.md"
    for files, expected in [((code, gz), True), ((code, prose), False), ((prose,), False)]:
        assert TextSource("--data.path", "x", files).is_code is expected


# Content hashes


def test_content_hash_does_not_depend_on_the_cuts() -> None:
    sample = "some text, 中文\n" * 10
    whole = text.content_hash([sample])
    assert whole[1] == len(sample)
    assert text.content_hash(list(sample)) == whole
    assert text.content_hash([sample + " "]) != whole
    some = [json.dumps(i) for i in range(200)]
    assert len({text.content_hash([x]) for x in some}) == 200
    assert all(text.content_hash([a])[0] != text.content_hash([b])[0] for a, b in itertools.pairwise(some))


def test_a_row_nested_too_deep_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match="not JSON"):
        text.row_text(path.read_text(), "deep.jsonl:1", "--data.path", "text")
    with pytest.raises(InputError, match="it is null"):
        text.row_text('{"text": null}', "x.jsonl:1", "--data.path", "text")
