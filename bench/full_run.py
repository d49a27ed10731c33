"""Everything that one GPU has to prove, in one call of under 9 minutes.   python -m bench.full_run --out DIR

One call leaves a figure for every target: the accuracy rule on every kernel in bf16, once in fp32; attention at T 1024
and 16384 beside each SDPA backend forced alone; 124M training beside a plain compiled model, with the largest
micro-batch of each read off one peak; the heads of 124M, norms, AdamW; the MFU of 350M and 1.5B, ours alone; the tokens
to a loss. Most important first; what is quick leaves its time to the next.

The same call again goes on with what is missing. The second one brings all checks in fp32 and the suite's own tests of
a GPU, attention at T 4096, Triton's attention beside SDPA in training, the baseline at its best micro-batch, and a 7B
model's head. About five more bring everything: fp16, every length, width and vocabulary, the modern models, the larger
ones beside the baseline, memory from two peaks, seconds to a loss, and Hugging Face models where transformers is
installed. Each figure is in DIR/full_run.json the moment it is known, and the call may be stopped or killed at any
time. A short table comes last.

Needs torch, triton, numpy, pytest and pytest-benchmark; nothing has to be installed, nothing is fetched. Without a GPU
the same is done on the CPU at small sizes, in about a minute.

Exit codes: 0 everything was done, 1 something failed or is missing, 2 bad input, 130 / 143 after SIGINT / SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
for _folder in (str(ROOT / "kernels"), str(ROOT)):  # also where this file is run by its path
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

from bench.conductor import Conductor  # noqa: E402
from bench.plan import PARTS  # noqa: E402
from bench.record import RESULTS, Record, Row, sources_hash  # noqa: E402
from fastlm.errors import InputError, run_command  # noqa: E402

_WORKER = ("-m", "bench.full_items")
_MOST_WORKERS = 12  # side by side while kernels are checked, which is mostly compiling
_SHORTEST_SECONDS = 5


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError("arguments", " ".join(sys.argv[1:]) or "none", f"{message}; see --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench.full_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="where full_run.json goes, or goes on (bench/results/DEVICE)")
    parser.add_argument("--seconds", type=float, default=520, help="the whole call's time (520)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"these parts: {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--commit", help="what to call the sources where git cannot tell")
    arguments = parser.parse_args(argv)
    for part in arguments.only or ():
        if part not in PARTS:
            raise InputError("--only", part, f"give some of {', '.join(PARTS)}")
    if not _SHORTEST_SECONDS <= arguments.seconds < float("inf"):
        raise InputError("--seconds", arguments.seconds, f"give a number of at least {_SHORTEST_SECONDS}")
    arguments.out = arguments.out or ROOT / "bench" / "results" / _device_folder(arguments.device)
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise InputError("--out", arguments.out, "name a directory; this is a file")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Do what is missing in `--out`, as far as the time lasts -> exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out = Path(arguments.out)
    new = next((path for path in (*reversed(out.parents), out) if not path.exists()), None)
    conductor = _conductor(arguments, out)
    record = conductor.record
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        conductor.run()
    except InputError:  # the worker's answer to what was asked for: leave nothing
        if new is not None:
            shutil.rmtree(new)
        raise
    except BaseException:
        _say(table(record, conductor.missing()))
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    _say(table(record, conductor.missing()))
    return 1 if conductor.missing() else 0


def _conductor(arguments: argparse.Namespace, out: Path) -> Conductor:
    """Of what is asked for, with what an earlier call has left in `out`."""
    parts = [part for part in PARTS if part in (arguments.only or PARTS)]
    command = [*_WORKER, "--device", arguments.device, *(("--commit", arguments.commit) if arguments.commit else ())]
    try:
        record = Record(out, sources_hash(ROOT))
        return Conductor(record, command, seconds=arguments.seconds, parts=parts, workers=_workers(), say=_say)
    except OSError as error:
        raise InputError("--out", out, f"it cannot be used ({error.strerror}); name another directory") from None
    except ValueError as error:
        raise InputError("--out", out, f"{error}; name another directory") from None


def _device_folder(device: str) -> str:
    """A folder's name for the first GPU, "nvidia-h200", without loading torch; "cpu" where NVIDIA's tool finds none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if device == "cpu" or shutil.which(query[0]) is None:
        return "cpu"
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    return re.sub(r"[^a-z0-9]+", "-", names[0].lower()).strip("-") or "cpu"


def _workers() -> int:
    return max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 1))


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(record: Record, missing: list[str]) -> str:
    """What was found, ours alone: each figure beside the best rival's and the target; what failed, what is missing."""
    rows = [row for row in record.rows.values() if row.value is not None and row.provider.startswith("fastlm")]
    checks = [row for row in record.rows.values() if row.name.startswith("check.") and row.value is not None]
    right = sum(row.checked for row in checks)
    lines = [f"\n{', '.join(f'{key} {value}' for key, value in record.about.items())}"]
    lines.append(f"{right} of {len(checks)} checks are right")
    lines += [f"  WRONG {row.name} {row.dtype} {row.shape}" for row in checks if not row.checked]
    lines += [_line(row) for row in rows if not row.name.startswith("check.")]
    lines += [f"  FAILED {item}: {reason}" for item, reason in record.failed.items()]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        lines.append(f"{len(missing)} items are missing ({shown}): the same call goes on with them")
    return "\n".join([*lines, str(record.out / RESULTS)])


def _line(row: Row) -> str:
    rival = "" if row.baseline is None else f" rival {_short(row.baseline)}"
    ratio = "" if row.ratio is None else f" x{row.ratio:.2f}"
    assert row.value is not None
    better = row.target is None or (row.value >= row.target if row.higher_is_better else row.value <= row.target)
    target = "" if row.target is None else f" target {_short(row.target)} {'met' if better else 'MISSED'}"
    own = "" if row.provider == "fastlm" else f" [{row.provider}]"
    return f"  {row.name} {row.shape}{own}: {_short(row.value)} {row.unit}{rival}{ratio}{target}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    run_command(main)
