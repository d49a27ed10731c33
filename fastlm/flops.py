"""Parameters and FLOPs of a model: pure arithmetic on a configuration, no tensor is made."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastlm.config import Config, ModelConfig

# Dense bf16 tensor-core peaks in FLOP/s from the makers' data sheets, by words of the device's name; first match wins.
PEAK_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("A10", 125e12),
    ("MI300X", 1307e12),
)

# Memory bandwidth in bytes/s from the same sheets.
PEAK_BANDWIDTH = (
    ("B200", 8.0e12),
    ("H200", 4.8e12),
    ("H100 PCIe", 2.0e12),
    ("H100 NVL", 3.9e12),
    ("H100", 3.35e12),
    ("A100-SXM4-80GB", 2.04e12),
    ("L40S", 864e9),
    ("L40", 864e9),
    ("L4", 300e9),
    ("RTX 5090", 1792e9),
    ("RTX 4090", 1008e9),
    ("RTX 3090", 936e9),
    ("A10", 600e9),
    ("MI300X", 5.3e12),
)


@dataclass(frozen=True)
class Parameters:
    """How many there are, and how many take part in a matrix product for every token."""

    total: int
    matmul: int


def parameters(cfg: ModelConfig, vocab_size: int) -> Parameters:
    """Count the parameters of `GPT(cfg, vocab_size)`, tied ones once."""
    D, head_dim = cfg.n_embd, cfg.n_embd // cfg.n_head
    qkv_width = D + 2 * (cfg.n_kv_head or cfg.n_head) * head_dim
    matrices = cfg.n_layer * D * (qkv_width + D + 8 * D)  # qkv, proj, up and down
    head = vocab_size * D
    total = matrices + head + (0 if cfg.tie_embeddings else head)
    if cfg.family == "gpt2":
        assert cfg.max_seq_len is not None
        norms = 2 * cfg.n_layer + 1
        total += cfg.max_seq_len * D + norms * D
        if cfg.bias:
            total += norms * D + cfg.n_layer * (qkv_width + D + 4 * D + D)
    return Parameters(total=total, matmul=matrices + head)


def flops_per_token(cfg: ModelConfig, vocab_size: int, seq_len: int, *, causal: bool = False) -> int:
    """Training FLOPs a token, forward and backward: 6 N + 12 L D T.

    N counts the parameters that multiply every token (matrices and head, not looked-up rows). The second term is
    attention's two products over full rows, the common convention; `causal=True` counts half of it.
    """
    attention = 12 * cfg.n_layer * cfg.n_embd * seq_len
    return 6 * parameters(cfg, vocab_size).matmul + (attention // 2 if causal else attention)


def training_flops(cfg: Config, vocab_size: int, steps: int | None) -> float:
    """FLOPs of a whole run of `steps` updates; infinite under a time limit, which nobody can convert."""
    if steps is None:
        return math.inf
    tokens = steps * cfg.train.batch_size * cfg.data.seq_len
    return float(tokens) * flops_per_token(cfg.model, vocab_size, cfg.data.seq_len)


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None where it is not tabled."""
    return _tabled(PEAK_FLOPS, device_name)


def peak_bandwidth(device_name: str) -> float | None:
    """The device's memory bandwidth in bytes/s, None where it is not tabled."""
    return _tabled(PEAK_BANDWIDTH, device_name)


def _tabled(table: Sequence[tuple[str, float]], device_name: str) -> float | None:
    if re.search(r"\b(Ti|Laptop|Mobile|Max-Q|D)\b", device_name):  # other chips under the names of these
        return None
    return next((peak for words, peak in table if re.search(rf"\b{words}\b", device_name)), None)
