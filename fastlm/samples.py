"""Text sampled while training: samples.md, and for code the share of lines that are Python tokens."""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from fastlm.generate import generate
from fastlm.model import GPT
from fastlm.tokenizer import Tokenizer

SAMPLES = 4
SAMPLE_TOKENS = 256
TEMPERATURE, TOP_K = 0.7, 50
LOGGED_LINES = 6


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a document's start; `tokenizes` is None where the data is not code."""

    texts: list[str]
    tokenizes: float | None


def draw_sample(model: GPT, tokenizer: Tokenizer, start: int, *, seed: int, is_code: bool) -> Sample:
    """Sample texts behind the token `start`; a function of the weights and `seed` alone."""
    ids = generate(
        model,
        [start],
        max_new_tokens=SAMPLE_TOKENS,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        seed=seed,
        num_samples=SAMPLES,
        eot_id=tokenizer.eot_id,
    )
    texts = [printable(tokenizer.decode(row)) for row in ids]
    return Sample(texts, tokenizable_share(texts) if is_code else None)


def printable(text: str) -> str:
    """Control characters but tab and newline spelled out: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


def tokenizable_share(texts: list[str]) -> float | None:
    """Share of the non-blank lines that Python's `tokenize` accepts, each by itself; None without such lines."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return sum(map(tokenizes, lines)) / len(lines) if lines else None


def tokenizes(line: str) -> bool:
    """Whether one line, alone and without its indentation, is a sequence of Python tokens."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)  # 3.11 marks what 3.12 raises


def append_sample(path: Path, sample: Sample, *, step: int, tokens: int) -> None:
    """Add one section to samples.md."""
    title = f"## Step {step}, {tokens:,} tokens seen"
    if sample.tokenizes is not None:
        title += f": {sample.tokenizes:.0%} of the lines tokenize"
    blocks = "\n".join(f"{_fenced(text)}\n" for text in sample.texts)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{title}\n\n{blocks}\n")


def opening(text: str) -> str:
    """The first lines of a text, for the log; all of it stands in samples.md."""
    lines = text.strip().splitlines()
    rest = len(lines) - LOGGED_LINES
    return "\n".join(lines[:LOGGED_LINES] + ([f"... {rest} more lines in samples.md"] if rest > 0 else []))


def drop_samples_after(path: Path, step: int) -> None:
    """On resume: forget sections of steps after the checkpoint's."""
    if not path.exists():
        return
    kept, keep, fence = [], True, ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        heading = re.match(r"## Step (\d+),", line)
        if heading and not fence:  # a model may write headings too, inside its fence
            keep = int(heading[1]) <= step
        if line.startswith("```"):
            marks = line.rstrip().removesuffix("text")
            fence = marks if not fence else ("" if line.rstrip() == fence else fence)
        if keep:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
