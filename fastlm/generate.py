"""Text from a trained model: `python -m fastlm.generate RUN --prompt TEXT`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlm.errors import InputError, run_command
from fastlm.model import GPT, KVCache


@dataclass
class GenerateConfig:
    """Sample from a run's newest checkpoint. Temperature 0 takes the likeliest token."""

    run: str  # a run directory or one checkpoint
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50  # sample among the k likeliest tokens; null = all
    top_p: float | None = None  # sample among the likeliest tokens that hold this probability; null = all
    seed: int = 1234
    num_samples: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    eot_id: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue `prompt` (at least one token id) `num_samples` times -> the new ids, cut before `eot_id`.

    A model sees at most `max_seq_len` tokens: when its context is full it starts again from the newest half, with or
    without the cache, so that both give the same tokens. Draws come from a CPU generator: a seed means the same
    on every device.
    """
    device = next(model.parameters()).device
    capacity = model.cfg.max_seq_len
    assert prompt, "a prompt holds at least one token"
    assert capacity is not None
    generator = torch.Generator().manual_seed(seed)
    tokens_NS = torch.tensor(prompt, dtype=torch.int64).expand(num_samples, -1)
    ended_N = torch.zeros(num_samples, dtype=torch.bool)
    start, cache = max(0, len(prompt) - capacity), None
    for _ in range(max_new_tokens):
        if tokens_NS.size(1) - start > capacity:
            start, cache = tokens_NS.size(1) - max(1, capacity // 2), None
        context_NT = tokens_NS[:, start:]
        if use_cache:
            cache = cache or KVCache(model.cfg, num_samples, device, model.compute_dtype)
            context_NT = context_NT[:, cache.length :]
        y_NTD = model.hidden(context_NT.to(device), cache=cache)
        logits_NV = model.logits(y_NTD[:, -1:])[:, 0].cpu()
        next_N1 = draw(logits_NV, temperature, top_k, top_p, generator)
        tokens_NS = torch.cat([tokens_NS, next_N1], dim=1)
        if eot_id is not None:
            ended_N |= next_N1[:, 0] == eot_id
            if ended_N.all():
                break
    new_tokens = tokens_NS[:, len(prompt) :].tolist()
    return [ids[: ids.index(eot_id)] if eot_id in ids else ids for ids in new_tokens]


def draw(
    logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token a row of fp32 logits -> (N, 1) int64."""
    if temperature == 0:
        return logits_NV.argmax(dim=-1, keepdim=True)
    logits_NV = (logits_NV - logits_NV.amax(dim=-1, keepdim=True)).double() / temperature  # a small one overflows
    if top_k is not None and top_k < logits_NV.size(-1):
        least_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p is not None:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
        p_NV = sorted_NV.softmax(dim=-1)
        outside_NV = p_NV.cumsum(dim=-1) - p_NV >= top_p  # what came before already holds top_p
        logits_NV = logits_NV.masked_fill(outside_NV.gather(-1, order_NV.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits_NV.softmax(dim=-1), 1, generator=generator)


def main(argv: list[str] | None = None) -> int:
    """Print `num_samples` continuations of the prompt, each with the prompt before it."""
    from fastlm.config import parse_arguments
    from fastlm.log import encodable
    from fastlm.run import open_run
    from fastlm.text import clean

    arguments = sys.argv[1:] if argv is None else argv
    cfg = parse_arguments(GenerateConfig, arguments, command="fastlm.generate", positional="run")
    check(cfg)
    run = open_run(cfg.run, cfg.device)
    if run.tokenizer is None:
        raise InputError("RUN", cfg.run, "it was trained on shards without a tokenizer; nothing can decode its tokens")
    prompt = run.tokenizer.encode(clean(cfg.prompt)) or [run.document_start]
    with run.kernels():
        samples = generate(
            run.model,
            prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            seed=cfg.seed,
            num_samples=cfg.num_samples,
            eot_id=run.tokenizer.eot_id,
        )
    for number, ids in enumerate(samples, start=1):
        if cfg.num_samples > 1:
            sys.stdout.write(f"--- sample {number} of {cfg.num_samples}\n")
        sys.stdout.write(encodable(cfg.prompt + run.tokenizer.decode(ids), sys.stdout) + "\n")
    return 0


def check(cfg: GenerateConfig) -> None:
    """Refuse values that mean nothing, by name."""
    from fastlm.text import is_encodable

    rules = (
        ("max_new_tokens", cfg.max_new_tokens >= 1, "give at least 1"),
        ("temperature", cfg.temperature >= 0, "give 0 (the likeliest token) or more"),
        ("top_k", cfg.top_k is None or cfg.top_k >= 1, "give at least 1, or null for all tokens"),
        (
            "top_p",
            cfg.top_p is None or 0 < cfg.top_p <= 1,
            "give more than 0 and at most 1, or null for all tokens",
        ),
        ("seed", 0 <= cfg.seed < 2**63, "give at least 0 and less than 2^63"),
        ("prompt", is_encodable(cfg.prompt), "give text in UTF-8"),
        ("num_samples", cfg.num_samples >= 1, "give at least 1"),
    )
    for key, holds, remedy in rules:
        if not holds:
            raise InputError(f"--{key}", getattr(cfg, key), remedy)


if __name__ == "__main__":
    run_command(main)
