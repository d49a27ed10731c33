"""Tokenizers: text to ids and back, every kind held by a Hugging Face `tokenizers` object.

    bpe    byte-level BPE trained on the corpus           any text round-trips
    byte   id = UTF-8 byte, and one separator             any text round-trips
    char   the sorted characters of the corpus            other characters are an InputError
    gpt2   GPT-2's, from local vocabulary files           any text round-trips
    PATH   any `tokenizer.json`, or its directory

Text that happens to spell a special token is ordinary text: only `eot_id` itself separates documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.config import TOKENIZERS, check_tokenizer_name
from fastlm.errors import InputError

EOT = "<|endoftext|>"
# Separators by which other families know the end of a document, looked up in this order.
SEPARATORS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
FILE_NAME = "tokenizer.json"
BYTES = 256

# BPE merges within these words only. A word takes one symbol or space before it; punctuation takes the line
# break and the indentation after it, so code spends less on layout: 3.70 bytes per token on Python's library
# at 4096 entries, against 3.55 without the latter, 3.48 for GPT-2's words and 3.46 for GPT-4's.
WORDS = (
    r"[^\s\p{L}\p{N}]?\p{L}+| \p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:\n[ \t]*)*|\s*\n[ \t]*|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back. Attributes: `name`, `vocab_size`, `eot_id` (None where there is no separator)."""

    def __init__(self, backend: Any, name: str | None = None):
        """Wrap a `tokenizers.Tokenizer`; `name` says its kind, read off its structure when None."""
        self.backend = backend
        backend.encode_special_tokens = True  # text never turns into a special token
        backend.no_padding()
        backend.no_truncation()
        self._spec = json.loads(backend.to_str())
        self.name = name or kind_of(self._spec)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = map(backend.token_to_id, SEPARATORS)
        self.eot_id: int | None = next((i for i in ids if i is not None), None)
        self._characters = frozenset(self._spec["model"]["vocab"]) if drops_unknown(self._spec) else None

    @property
    def line_break(self) -> int:
        """The id to begin a text from nothing with: a line break's where there is one, else 0."""
        if self._characters is not None and "\n" not in self._characters:
            return 0
        return next(iter(self.encode("\n")), 0)

    def encode(self, text: str, key: str = "--prompt") -> list[int]:
        """Ids of `text`. Raises InputError, about `key`, for a character that a char tokenizer does not know."""
        self._check_characters(text, key)
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], key: str = "--data.path") -> list[np.ndarray]:
        """Ids of each text, int64, by as many threads as the machine has; raises as `encode` does."""
        for text in texts:
            self._check_characters(text, key)
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int64 (vocab_size,); 0 for special tokens, unused ids."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = is_byte_level(self._spec)
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            counts[i] = spelled_bytes(token, byte_level)
        for added in self._spec["added_tokens"]:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return counts

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` (Hugging Face `tokenizers` format) to `path`, a file."""
        path.write_text(self.backend.to_str(), encoding="utf-8")

    def _check_characters(self, text: str, key: str) -> None:
        if self._characters is None or (unknown := set(text) - self._characters) == set():
            return
        shown = " ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(unknown)[:3])
        remedy = f"the char tokenizer knows only the {len(self._characters)} characters of its training text"
        raise InputError(key, f"the character {shown}", remedy)


def kind_of(spec: dict) -> str:
    """The kind of a serialised tokenizer, by its structure."""
    if is_byte_level(spec) and spec["model"]["type"] == "BPE":
        return "bpe" if spec["model"]["merges"] else "byte"
    return "char" if drops_unknown(spec) else "file"


def components(part: dict | None) -> Iterator[dict]:
    """A pre-tokenizer or decoder, its `Sequence` unfolded."""
    part = part or {}
    yield from part.get("pretokenizers") or part.get("decoders") or [part]


def is_byte_level(spec: dict) -> bool:
    """Whether tokens are spelled in GPT-2's alphabet of one character per byte."""
    return any(part.get("type") == "ByteLevel" for part in components(spec["decoder"]))


def drops_unknown(spec: dict) -> bool:
    """Whether encoding would silently drop what the vocabulary lacks."""
    model = spec["model"]
    plain = model["type"] == "BPE" and model["unk_token"] is None and not model["byte_fallback"]
    return plain and spec["normalizer"] is None and not is_byte_level(spec)


def spelled_bytes(token: str, byte_level: bool) -> int:
    """UTF-8 bytes that one vocabulary entry stands for, sentencepiece's spaces and bytes included."""
    if byte_level:
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


def byte_alphabet() -> list[str]:
    """The character by which byte b is spelled in byte-level vocabularies, at index b.

    Printable Latin-1 characters spell themselves; the other bytes take U+0100 onward, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(BYTES) if b not in plain]
    return [chr(b) if b in plain else chr(BYTES + shifted.index(b)) for b in range(BYTES)]


def byte_tokenizer() -> Tokenizer:
    """id = byte; 256 = the document separator."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {char: b for b, char in enumerate(byte_alphabet())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOT])
    return Tokenizer(backend)


def char_tokenizer(characters: Iterable[str], separator: bool) -> Tokenizer:
    """One id per character, in sorted order; with `separator`, one more id that parts documents."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {char: i for i, char in enumerate(sorted(set(characters)))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    if separator:
        backend.add_special_tokens([EOT])
    return Tokenizer(backend)


def train_bpe(pieces: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries: separator (id 0), 256 bytes, merges.

    A text too small for that many merges gives fewer. Raises InputError when the bytes do not fit.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    check_vocab_size(vocab_size)
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(backend)


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError when a byte-level BPE cannot be that small."""
    if vocab_size < BYTES + 1:
        remedy = f"a byte-level BPE needs at least {BYTES + 1} (256 bytes and the separator); or use byte, char"
        raise InputError("--data.vocab_size", vocab_size, remedy)


def load_tokenizer(path: Path, key: str = "--data.tokenizer") -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a directory; `vocab.json` with `merges.txt` as GPT-2's.

    Raises InputError when there is none or when it cannot be read.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        if not file.exists() and (path / "vocab.json").exists():
            return from_vocab_and_merges(path)
        from tokenizers import Tokenizer as Backend

        return Tokenizer(Backend.from_str(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        remedy = f"no such file: one of {', '.join(TOKENIZERS)}, or a tokenizer.json or its directory"
        raise InputError(key, path, remedy) from error
    except Exception as error:  # the library raises plain Exception for a file that it cannot parse
        remedy = f"not a tokenizer.json of Hugging Face's tokenizers library ({one_line(error)})"
        raise InputError(key, file, remedy) from error


def one_line(error: Exception) -> str:
    """An error's text on one line of at most 100 characters."""
    return " ".join(str(error).split())[:100]


def from_vocab_and_merges(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from its two original files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOT])
    return Tokenizer(backend)


def gpt2_folders() -> list[Path]:
    """Where GPT-2's vocabulary files are looked for, in order: our cache, then Hugging Face's."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or hugging_face_home() / "hub")
    snapshots = [
        folder
        for name in ("models--openai-community--gpt2", "models--gpt2")
        for folder in sorted((hub / name / "snapshots").glob("*"))
    ]
    return [cache_root() / "gpt2", *snapshots]


def cache_root() -> Path:
    """The folder of this program's caches: `$XDG_CACHE_HOME/fastlm`, by default `~/.cache/fastlm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def hugging_face_home() -> Path:
    """Hugging Face's cache: `$HF_HOME`, by default `~/.cache/huggingface`."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def find_gpt2() -> Path:
    """The folder with GPT-2's vocabulary files. Raises InputError with the command that gets them."""
    for folder in gpt2_folders():
        if (folder / FILE_NAME).exists() or all((folder / n).exists() for n in ("vocab.json", "merges.txt")):
            return folder
    url = "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json"
    target = cache_root() / "gpt2" / FILE_NAME
    remedy = f"its files are not on this machine: curl -L --create-dirs -o {target} {url}"
    raise InputError("--data.tokenizer", "gpt2", remedy)


def ready_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that needs no corpus (byte, gpt2, PATH); None for those that do (bpe, char)."""
    if name in ("bpe", "char"):
        return None
    if name == "byte":
        return byte_tokenizer()
    if name == "gpt2":
        tokenizer = load_tokenizer(find_gpt2())
        tokenizer.name = "gpt2"
        return tokenizer
    check_tokenizer_name(name)
    return load_tokenizer(Path(name).expanduser())
