"""The worker of a full run: says what there is to do, does what it is handed.   See `conductor` for the protocol.

Started by `bench.full_run`; by hand, `echo '{"item": "adamw.step 124M", "seconds": 60}' | python -m bench.full_items`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import traceback
from typing import IO, Any

import torch

from bench import device, hf_items, kernel_items, training_items
from bench.kernel_items import Task
from fastlm.errors import EXIT_BAD_INPUT

_GRACE_SECONDS = 30  # beyond an item's time, should nobody be left to end this process
_FATAL = ("CUDA error", "Triton Error [CUDA]", "device-side assert", "CUDNN_STATUS_INTERNAL", "CUBLAS_STATUS_INTERNAL")


def tasks() -> dict[str, list[Task]]:
    """Everything that this device has to prove, by part, the most important first."""
    return {**kernel_items.tasks(), **training_items.tasks(), **hf_items.tasks()}


def main() -> int:
    """Announce, then do item after item until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.full_items")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    # Whatever libraries print must not fall among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if arguments.device == "cuda" and not device.GPU:
        _say(answers, {"refused": ["--device", "cuda", "PyTorch sees no GPU here that it can use; give auto or cpu"]})
        return EXIT_BAD_INPUT
    parts = tasks()
    listed = {
        part: [{"item": task.name, "needs": task.needs, "limit": task.limit, "call": task.call} for task in found]
        for part, found in parts.items()
    }
    named = {"commit": arguments.commit} if arguments.commit else {}
    _say(answers, {"about": device.provenance() | named, "items": listed})
    by_name = {task.name: task for found in parts.values() for task in found}
    for line in sys.stdin:
        order = json.loads(line)
        signal.alarm(int(order["seconds"]) + _GRACE_SECONDS)
        _do(by_name[order["item"]], order["seconds"], answers)
        signal.alarm(0)
    return 0


def _do(task: Task, seconds: float, answers: IO[str]) -> None:
    try:
        for found in task.run(seconds):
            _say(answers, {"note": found} if isinstance(found, str) else {"rows": [vars(found)]})
        _tidy()
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        fatal = any(words in text for words in _FATAL)
        _say(answers, {"error": f"{type(error).__name__}: {text}", "fatal": fatal})
        error.__traceback__ = None  # holds every tensor of the frames above
        if not fatal:
            _tidy()
        return
    _say(answers, {"done": True})


def _tidy() -> None:
    """Leave the next item what this one had: memory, and a compiler that has seen no shape."""
    kernel_items.forget()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
