"""Text to token shards, once, for many runs: `python -m fastlm.prepare --data.path TEXT --out DIR`.

DIR gets train_*.bin, val_*.bin (uint16, or uint32 past 65,536 entries, with the public header) and the tokenizer
that made them; `--data.path DIR` trains on it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastlm.arguments import parse_arguments
from fastlm.config import DataConfig, check_bounds
from fastlm.corpus import Notify, build_shards
from fastlm.data import check_data_config, holds_shards, text_corpus
from fastlm.errors import InputError, run_command
from fastlm.text import find_files


@dataclass
class PrepareConfig:
    """Write text as token shards, with the tokenizer that made them."""

    out: str  # the folder to be made
    data: DataConfig = field(default_factory=DataConfig)


def prepare(cfg: DataConfig, out: Path, notify: Notify) -> None:
    """Tokenise the text that `cfg` names into shards in `out`, which appears when all is done.

    Raises InputError for the text as `fastlm.data.open_dataset` does, and for a folder that holds something.
    """
    check_data_config(cfg)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("--out", out, "is there already and not an empty folder: name a new one")
    files = [[] if spec is None else find_files(key, spec) for key, spec in text_options(cfg)]
    for (key, spec), found in zip(text_options(cfg), files, strict=True):
        if holds_shards(key, spec, found):
            raise InputError(key, spec, "these are token shards already: train on them with --data.path")
    corpus = text_corpus(cfg, *files)
    temporary = out.absolute().with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        build_shards(corpus, temporary, notify)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}): name a folder with room that you may write"
        raise InputError("--out", out, remedy) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def text_options(cfg: DataConfig) -> list[tuple[str, str | None]]:
    """The options that name text, with their values."""
    return [("--data.path", cfg.path), ("--data.val_path", cfg.val_path)]


def say(line: str) -> None:
    """Print a line of progress at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what the command line names; says how to train on it."""
    arguments = sys.argv[1:] if argv is None else argv
    cfg = parse_arguments(PrepareConfig, arguments, command="fastlm.prepare")
    check_bounds(cfg)
    prepare(cfg.data, Path(cfg.out).expanduser(), say)
    say(f"train on it: python -m fastlm.train --data.path {cfg.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
