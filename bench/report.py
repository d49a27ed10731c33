"""Tables and plots from benchmark results.   python -m bench.report FILE.json [FILE...] --out bench/results/DEVICE

    FILE        pytest-benchmark's JSON, records of `pytest bench --bench-records`, full_run.json, or a kernels.json
    --out DIR   gets report.md, roofline.png, ratios.png, attention.png (where measured) and kernels.json;
                a full_run.json is copied there
    --readme R  rewrites the tables between the markers in the file R from all results in the folders beside DIR

All files of one call are of one device; a later file replaces what an earlier one says of the same. Bad input costs one
line and exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from bench.plots import PLOTS
from bench.results import FULL_RUN_FILE, KERNELS_FILE, Results, load, save
from bench.tables import readme_block, report
from fastlm.errors import InputError, run_command

BEGIN, END = "<!-- bench.report writes from here -->", "<!-- to here -->"


class _Parser(argparse.ArgumentParser):
    """One line for bad input, as all commands here."""

    def error(self, message: str) -> NoReturn:
        raise InputError("bench.report", "these arguments", f"{message}; see --help")


def collect(root: Path) -> list[Results]:
    """The results of every device that has a folder below `root`, by the folders' names."""
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = [folder / name for name in (KERNELS_FILE, FULL_RUN_FILE) if (folder / name).exists()]
        if files:
            found.append(load(files))
    return found


def with_tables(text: str, root: Path) -> str:
    """README's text with its tables as the results below `root` give them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError("--readme", "a file without markers", f"put the lines {BEGIN} and {END} where tables belong")
    return f"{before}{BEGIN}\n\n{readme_block(collect(root))}\n\n{END}{after}"


def write(results: Results, out: Path) -> None:
    """Everything into the folder `out`."""
    plots = [name for name, draw in PLOTS.items() if draw(results, out / name)]
    for name in set(PLOTS) - set(plots):
        (out / name).unlink(missing_ok=True)  # of an earlier report
    if results.timed or results.resources:
        save(results, out / KERNELS_FILE)
    (out / "report.md").write_text(report(results, plots))


def main(argv: list[str] | None = None) -> int:
    """Read, write, say where."""
    parser = _Parser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--readme", type=Path, metavar="README.md")
    options = parser.parse_args(argv)
    results = load(options.files)
    if options.out.exists() and not options.out.is_dir():
        raise InputError("--out", options.out, "it is a file; name a folder")
    if options.readme is not None:
        if not options.readme.is_file():
            raise InputError("--readme", options.readme, "there is no such file")
        if BEGIN not in options.readme.read_text() or END not in options.readme.read_text():
            raise InputError("--readme", options.readme, f"put the lines {BEGIN} and {END} where tables belong")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", options.out, f"it cannot be made ({error.strerror}); name another folder") from None
    write(results, options.out)
    for path in options.files:
        if path.name == FULL_RUN_FILE and path.resolve().parent != options.out.resolve():
            shutil.copyfile(path, options.out / FULL_RUN_FILE)
    sys.stdout.write(f"{len(results.timed)} times, {len(results.rows)} figures of {results.device}: {options.out}\n")
    if options.readme is not None:
        options.readme.write_text(with_tables(options.readme.read_text(), options.out.resolve().parent))
        sys.stdout.write(f"tables written into {options.readme}\n")
    return 0


if __name__ == "__main__":
    run_command(main)
