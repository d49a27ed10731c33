"""Text: finding it, reading it in pieces, cleaning it.

A *document* is a file, or a row of a `.jsonl` file. It is read as a stream of *pieces* of about 1 MiB, cut
after a newline, so that memory stays constant however long the document is, and so that the cuts (which
bound the tokenizer's merges) depend on the text alone, never on the number of workers.

Cleaning: a byte order mark at the start goes, control characters but tab and newline go (so CRLF becomes LF),
what is left is put into Unicode NFC. Nothing else is touched.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastlm.errors import InputError

CLEANING_VERSION = 1  # part of every cache key: raise it with any change to what cleaning or cutting yields
PIECE_CHARS = 1 << 20
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SHARD_SUFFIX = ".bin"
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)

# Parts of the standard library that are data for its own tests, other people's packages, or not source.
NOT_CORPUS = frozenset({"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
# C0 without tab and newline, DEL, and C1: Unicode's whole category Cc but those two.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Document:
    """One document to be read: `name` says where it comes from ("FILE" or "FILE:LINE")."""

    name: str
    pieces: Iterator[str]  # cleaned text; consume before asking for the next document


@dataclass(frozen=True)
class TextSource:
    """Where text comes from. `key` is the option that named it, for errors."""

    key: str
    label: str
    files: tuple[Path, ...]
    text_key: str = "text"
    skip_undecodable: bool = False  # the embedded corpus: a source file in another encoding is left out

    @property
    def is_code(self) -> bool:
        """Whether every file is Python source."""
        return all(text_suffix(path) == ".py" for path in self.files)


def clean(text: str) -> str:
    """Drop control characters but tab and newline, then NFC.

    In that order: dropping a character may bring a letter and its accent together. Cleaning commutes with
    cutting after a newline, because a newline is neither reordered nor composed with what follows it.
    """
    return unicodedata.normalize("NFC", CONTROL.sub("", text))


def text_suffix(path: Path) -> str:
    """The suffix that says what is inside, below one of compression: `.jsonl` for `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix in OPENERS else path
    return inner.suffix


def embedded_source() -> TextSource:
    """The Python standard library's own sources on this machine, in the order of their relative paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in walk_files(root, NOT_CORPUS) if path.suffix == ".py"]
    if not files:
        remedy = "this Python has no library sources: name your own text with --data.path FILE"
        raise InputError("--data.path", f"null ({root})", remedy)
    return TextSource("--data.path", "Python's standard library", tuple(files), skip_undecodable=True)


def find_files(key: str, spec: str) -> list[Path]:
    """Files that `spec` (a file, a directory, a glob) names, in the order of their paths.

    A directory is searched recursively for text and shards, hidden names left out; a file named outright or
    by a glob may have any suffix. Raises InputError when there is none, or when a kind is not supported.
    """
    if spec.startswith("hf:"):
        remedy = "hf: comes with a later version: save the dataset as .jsonl or .txt and name that file"
        raise InputError(key, spec, remedy)
    path = Path(spec).expanduser()
    if os.path.isdir(path):  # unlike Path's methods, False where a parent folder may not be read
        known = (*TEXT_SUFFIXES, ".parquet", SHARD_SUFFIX)
        files = [p for p in walk_files(path) if text_suffix(p) in known and p.is_file()]
    elif os.path.isfile(path):
        files = [path]
    else:
        names = glob.glob(str(path), recursive=True) if glob.has_magic(spec) else []
        files = sorted(p for p in map(Path, names) if p.is_file())
    if not files:
        raise InputError(key, spec, none_found(path, spec))
    for file in files:
        refuse_unsupported(key, file)
    return [file.absolute() for file in files]


def none_found(path: Path, spec: str) -> str:
    """What to do when `spec` names no text."""
    if os.path.isdir(path):
        return f"the directory holds no {' '.join(TEXT_SUFFIXES)} or {SHARD_SUFFIX} file"
    if glob.has_magic(spec):
        return "no file matches: quote the pattern and check the folder"
    return "no such file or directory: give a text file, a directory or a quoted glob"


def refuse_unsupported(key: str, path: Path) -> None:
    """Raise InputError for kinds of file that are recognised but cannot be read."""
    if text_suffix(path) == ".parquet":
        remedy = "parquet comes with a later version: save the text column as .jsonl and name that file"
        raise InputError(key, path, remedy)
    if path.suffix in (".zst", ".zip", ".tar", ".7z"):
        raise InputError(key, path, f"cannot be read: decompress it, or use {' '.join(OPENERS)}")


def walk_files(root: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    """Every file under `root`, sorted by relative path (the same on every system).

    Hidden files and folders are left out, and folders of a `skipped` name.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        within = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if within == "." else f"{within}/"
        found += [prefix + name for name in names if not name.startswith(".")]
    return [root / name for name in sorted(found)]


def documents(source: TextSource) -> Iterator[Document]:
    """Every document of `source`, in order, cleaned; empty and duplicate ones are still there.

    Raises InputError naming the file and the place for bytes that are not UTF-8 and rows that are not JSON.
    """
    for path in source.files:
        if text_suffix(path) == ".jsonl":
            yield from jsonl_documents(path, source.key, source.text_key)
        elif not source.skip_undecodable or decodes(path):
            yield Document(str(path), file_pieces(path, source.key))


def decodes(path: Path) -> bool:
    """Whether the whole file is UTF-8."""
    try:
        path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return False
    return True


def open_bytes(path: Path, key: str) -> IO[bytes]:
    """Open a file for reading, through the decompressor that its last suffix asks for."""
    try:
        return OPENERS.get(path.suffix, open)(path, "rb")
    except OSError as error:
        raise unreadable(path, key, error) from error


def unreadable(path: Path, key: str, error: Exception) -> InputError:
    """The InputError for a file that cannot be opened, read or decompressed."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputError(key, path, f"cannot be read ({reason}): check the file and its permissions")


def file_pieces(path: Path, key: str) -> Iterator[str]:
    """The cleaned text of one file, in pieces."""
    with open_bytes(path, key) as stream:
        for piece in cut_pieces(decoded_chunks(stream, path, key)):
            if cleaned := clean(piece):
                yield cleaned


def decoded_chunks(stream: IO[bytes], path: Path, key: str) -> Iterator[str]:
    """Decode a byte stream chunk by chunk. Raises InputError with the offset of the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    fed = 0
    while True:
        try:
            chunk = stream.read(PIECE_CHARS)
        except READ_ERRORS as error:
            raise unreadable(path, key, error) from error
        fed += len(chunk)
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # The decoder keeps an incomplete tail, so `error.object` may begin before this chunk.
            offset = fed - len(error.object) + error.start
            raise not_utf8(path, offset, key) from error
        if not chunk:
            return


def not_utf8(path: Path, offset: int, key: str) -> InputError:
    """The InputError for bytes that are not UTF-8."""
    remedy = f"convert it: iconv -f ENCODING -t UTF-8 {path.name} > new.txt"
    return InputError(key, f"{path} with bytes that are not UTF-8 at byte {offset}", remedy)


def cut_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Regroup chunks into pieces of at least PIECE_CHARS characters that end with a newline.

    The cuts depend on the text only, not on how it is chunked. A stretch of 2 * PIECE_CHARS without a newline
    is cut where no letter is parted from its accent.
    """
    buffer, start = "", 0
    for chunk in chunks:
        buffer, start = buffer[start:] + chunk, 0
        while len(buffer) - start >= 3 * PIECE_CHARS:
            end = piece_end(buffer, start)
            yield buffer[start:end]
            start = end
    while start < len(buffer):
        end = piece_end(buffer, start)
        yield buffer[start:end]
        start = end


def piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends; looks little further than 2 * PIECE_CHARS ahead."""
    end = text.find("\n", start + PIECE_CHARS - 1, start + 2 * PIECE_CHARS)
    if end >= 0:
        return end + 1
    end = min(len(text), start + 2 * PIECE_CHARS)
    while end < len(text) and not starts_fresh(text[end]):
        end += 1
    return end


def starts_fresh(char: str) -> bool:
    """Whether NFC never joins or reorders `char` with what stands before it.

    Every such joining character is a mark, or a conjoining Hangul letter; the control characters that
    cleaning drops could hide one behind them.
    """
    return unicodedata.category(char)[0] not in "MC" and not "\u1100" <= char <= "\u11ff"


def jsonl_documents(path: Path, key: str, text_key: str) -> Iterator[Document]:
    """One document per row of a `.jsonl` file (blank lines are skipped); a row is held in memory whole."""
    offset = 0
    with open_bytes(path, key) as stream:
        for number, line in enumerate(jsonl_lines(stream, path, key), start=1):
            try:
                row = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset + error.start, key) from error
            offset += len(line)
            if row.strip():
                name = f"{path}:{number}"
                yield Document(name, row_pieces(row_text(row, name, key, text_key)))


def jsonl_lines(stream: IO[bytes], path: Path, key: str) -> Iterator[bytes]:
    """The lines of a byte stream, its read errors as InputError."""
    try:
        yield from stream
    except READ_ERRORS as error:
        raise unreadable(path, key, error) from error


def row_text(row: str, name: str, key: str, text_key: str) -> str:
    """The text field of one JSONL row. Raises InputError naming file and line."""
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise InputError(key, name, f"the line is not JSON ({error}): one JSON object a line") from error
    text = fields.get(text_key) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        keys = f"it has {', '.join(map(str, fields)) or 'none'}" if isinstance(fields, dict) else "not an object"
        if isinstance(fields, dict) and text_key in fields:
            keys = f"it is {json.dumps(text)[:20]}"
        remedy = f"the row has no text under {text_key!r} ({keys}): name the field with --data.text_key"
        raise InputError(key, name, remedy)
    # A row may spell half of a surrogate pair ("\ud800"): no text has one, and no encoder takes it.
    return text.encode("utf-8", "replace").decode() if not is_encodable(text) else text


def is_encodable(text: str) -> bool:
    """Whether the text is free of lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_pieces(text: str) -> Iterator[str]:
    """The pieces of a text that is in memory, cleaned."""
    for piece in cut_pieces([text]):
        if cleaned := clean(piece):
            yield cleaned


def content_hash(pieces: Iterable[str]) -> tuple[int, int]:
    """(64-bit hash, characters) of a document's cleaned text; independent of how it is cut."""
    digest, length = hashlib.blake2b(digest_size=8), 0
    for piece in pieces:
        digest.update(piece.encode())
        length += len(piece)
    return int.from_bytes(digest.digest(), "little"), length
