"""Every kind of tokenizer: round trips, byte counts, files, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastlm import tokenizer as module
from fastlm.config import check_tokenizer_name
from fastlm.errors import InputError
from fastlm.tokenizer import (
    EOT,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    ready_tokenizer,
    train_bpe,
)

CODE = Path(json.__file__).read_text()
HARD = [
    "",
    "\n",
    "   \n\t\n    x",
    "def f(self):\n    return 1234567890\n\n\nclass A:\r\n",
    "naïve — 中文 😀 \u0301 \x00\x7f\ufeff",
    f"before {EOT} after",
    "a" * 5000,
    " " * 5000 + "b",
    "'s 'll I'M it's",
    "_private.__dunder__[0]->x!=y",
]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter([CODE]), 400)


def gpt2_like(folder: Path) -> Path:
    """Vocabulary files in GPT-2's own two-file form, with two merges."""
    folder.mkdir(parents=True)
    alphabet = module.byte_alphabet()
    tokens = [*sorted(alphabet), "he", "\u0120a", EOT]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 a\n")
    return folder


def all_kinds(bpe: Tokenizer, tmp_path: Path) -> list[Tokenizer]:
    return [bpe, byte_tokenizer(), load_tokenizer(gpt2_like(tmp_path / "gpt2"))]


# Round trips


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["bpe", "byte", "gpt2"])
@pytest.mark.parametrize("sample", HARD, ids=range(len(HARD)))
def test_any_text_round_trips(bpe: Tokenizer, tmp_path: Path, kind: int, sample: str) -> None:
    tokenizer = all_kinds(bpe, tmp_path)[kind]
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample
    assert tokenizer.eot_id not in ids, "text must not turn into the separator"
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(sample.encode())


def test_batch_equals_one_by_one(bpe: Tokenizer) -> None:
    batch = bpe.encode_batch(HARD)
    assert [ids.tolist() for ids in batch] == [bpe.encode(sample) for sample in HARD]
    assert all(ids.dtype == np.int64 for ids in batch)


def test_separator_is_spelled_out_by_decode(bpe: Tokenizer) -> None:
    assert bpe.eot_id is not None
    assert bpe.decode(np.array([bpe.eot_id])) == EOT
    assert bpe.decode([bpe.line_break]) == "\n"


# Kinds


def test_bpe_compresses_and_has_the_size_asked_for(bpe: Tokenizer) -> None:
    assert (bpe.name, bpe.vocab_size, bpe.eot_id) == ("bpe", 400, 0)
    assert len(bpe.encode(CODE)) < len(CODE) / 1.8


def test_bpe_of_a_tiny_text_is_smaller() -> None:
    tokenizer = train_bpe(iter(["abc abc"]), 4096)
    assert 257 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("new words, ü")) == "new words, ü"


def test_bpe_words_keep_indentation_with_the_line_break(bpe: Tokenizer) -> None:
    pieces = [word for word, _ in bpe.backend.pre_tokenizer.pre_tokenize_str("f(x):\n    return 12345.6")]
    assert pieces == ["f", "(x", "):\u010a\u0120\u0120\u0120\u0120", "return", "\u0120", "123", "45", ".", "6"]


def test_bpe_training_is_repeatable_in_another_process(bpe: Tokenizer) -> None:
    script = (
        "import json, pathlib\nfrom fastlm.tokenizer import train_bpe\n"
        "t = train_bpe(iter([pathlib.Path(json.__file__).read_text()]), 400)\nprint(t.backend.to_str())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(bpe.backend.to_str())


def test_bpe_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="at least 257") as caught:
        train_bpe(iter(["x"]), 256)
    assert caught.value.key == "--data.vocab_size"


def test_byte_ids_are_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("byte", 257, 256)
    assert tokenizer.encode("é\n\x00a") == list("é\n\x00a".encode())
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    every = "".join(map(chr, range(1, 0x3000)))
    assert tokenizer.encode(every) == list(every.encode())


def test_char_vocabulary_is_the_sorted_characters() -> None:
    tokenizer = char_tokenizer("hello\nwörld😀", separator=False)
    order = sorted(set("hello\nwörld😀"))
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("char", len(order), None)
    assert tokenizer.encode("".join(order)) == list(range(len(order)))
    assert tokenizer.decode(tokenizer.encode("wöl\n\nd😀")) == "wöl\n\nd😀"
    assert tokenizer.token_bytes().tolist() == [len(c.encode()) for c in order]
    assert tokenizer.line_break == order.index("\n")
    assert char_tokenizer("ab", separator=False).line_break == 0


def test_char_with_separator() -> None:
    tokenizer = char_tokenizer("ab<|endoftx>", separator=True)
    assert tokenizer.eot_id is not None
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes()[-1] == 0
    assert tokenizer.eot_id not in tokenizer.encode(f"a{EOT}")
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("ba")]) == f"{EOT}ba"


@pytest.mark.parametrize("reload", [False, True])
def test_char_names_unknown_characters(tmp_path: Path, reload: bool) -> None:
    tokenizer = char_tokenizer("abc ", separator=True)
    if reload:
        tokenizer.save(tmp_path / "tokenizer.json")
        tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\)") as caught:
        tokenizer.encode("a é")
    assert caught.value.key == "--prompt"
    with pytest.raises(InputError, match="only the 4 characters"):
        tokenizer.encode_batch(["ab", "aX"])


# Files


@pytest.mark.parametrize("make", [lambda: train_bpe(iter([CODE]), 300), byte_tokenizer], ids=["bpe", "byte"])
def test_saved_and_loaded(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.eot_id,
        )
        assert [loaded.encode(x) for x in HARD] == [tokenizer.encode(x) for x in HARD]
        assert loaded.token_bytes().tolist() == tokenizer.token_bytes().tolist()


def test_sentencepiece_like_file_counts_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocab = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "\u2581the": 3, "é": 4}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eot_id == 1
    assert loaded.token_bytes().tolist() == [0, 0, 1, 4, 2]


def test_file_with_a_token_for_the_unknown_takes_any_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"?": 0, "a": 1}, [], unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.name == "file"
    assert loaded.encode("axa") == [1, 0, 1]


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe"])
def test_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a tokenizer\.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path)


# GPT-2's


def test_gpt2_without_files_prints_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="curl -L --create-dirs -o") as caught:
        ready_tokenizer("gpt2")
    assert str(tmp_path / "cache/fastlm/gpt2/tokenizer.json") in caught.value.remedy


@pytest.mark.parametrize("place", ["cache/fastlm/gpt2", "hf/hub/models--openai-community--gpt2/snapshots/abc"])
def test_gpt2_from_local_files(tmp_path: Path, place: str) -> None:
    gpt2_like(tmp_path / place)
    tokenizer = ready_tokenizer("gpt2")
    assert tokenizer is not None
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("gpt2", 259, 258)
    assert len(tokenizer.encode("he a")) == 2


def test_gpt2_from_one_file(tmp_path: Path) -> None:
    target = tmp_path / "cache/fastlm/gpt2"
    target.mkdir(parents=True)
    load_tokenizer(gpt2_like(tmp_path / "from")).save(target / "tokenizer.json")
    tokenizer = ready_tokenizer("gpt2")
    assert tokenizer is not None
    assert tokenizer.encode("he") == [256]


# Names


def test_names(tmp_path: Path) -> None:
    for name in ("bpe", "byte", "char", "gpt2", str(tmp_path)):
        check_tokenizer_name(name)
    assert ready_tokenizer("bpe") is None
    assert ready_tokenizer("char") is None
    with pytest.raises(InputError, match="did you mean byte"):
        check_tokenizer_name("bytes")
    with pytest.raises(InputError, match="one of bpe, byte, char, gpt2"):
        check_tokenizer_name("qwertyuiop")
