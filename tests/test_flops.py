"""Arithmetic on a configuration against the model that it describes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlm.config import Config, ModelConfig, parse_config
from fastlm.flops import flops_per_token, parameters, peak_flops
from fastlm.model import GPT
from fastlm.resolve import resolve_model

SHAPES = {
    "modern": ModelConfig(n_layer=3, n_head=4, n_embd=64, max_seq_len=32),
    "modern-gqa": ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=32),
    "modern-tied": ModelConfig(n_layer=2, n_head=4, n_embd=64, max_seq_len=32, tie_embeddings=True),
    "gpt2": ModelConfig(family="gpt2", n_layer=3, n_head=4, n_embd=64, max_seq_len=32),
    "gpt2-no-bias": ModelConfig(family="gpt2", n_layer=2, n_head=2, n_embd=64, max_seq_len=32, bias=False),
}


def resolved(model: ModelConfig) -> ModelConfig:
    cfg = Config(model=model)
    resolve_model(cfg)
    return cfg.model


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_equal_the_models(name: str):
    cfg = resolved(SHAPES[name])
    assert parameters(cfg, 101).total == sum(p.numel() for p in GPT(cfg, 101).parameters())


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_flops_equal_what_pytorch_counts(name: str):
    """PyTorch's counter sees every matrix product; forward alone is a third of training."""
    cfg, T = resolved(SHAPES[name]), 32
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        GPT(cfg, 101)(torch.zeros(2, T, dtype=torch.int64))
    assert 3 * counter.get_total_flops() == 2 * T * flops_per_token(cfg, 101, T)


def test_causal_convention_halves_attention_alone():
    cfg = resolved(SHAPES["modern"])
    full, causal = (flops_per_token(cfg, 101, 32, causal=causal) for causal in (False, True))
    assert full - causal == 6 * 3 * 64 * 32


def test_gpt2_has_its_published_size():
    cfg = parse_config(["--preset", "gpt2"])
    resolve_model(cfg)
    assert parameters(cfg.model, 50257).total == 124_439_808


def test_peak_is_known_by_the_devices_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L40") == 181e12
    for other in ("some CPU", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"):
        assert peak_flops(other) is None
