"""The baseline: a plain GPT and its update, the way nanoGPT trains one.   torch.compile + SDPA + fused AdamW

PyTorch alone, nothing of ours: fp32 parameters, bf16 autocast on a GPU, logits held whole, gradients clipped by
`clip_grad_norm_`. The same two families as `fastlm.model`, with the same names of parameters, so that one's
`state_dict` loads into the other. gpt2 gets fused AdamW; modern gets `torch.optim.Muon` for the blocks' matrices (the
merged Q, K, V as one) and fused AdamW for the rest.

Shape suffixes as in `fastlm.model`: B batch, T time, D width, H heads, C head dimension, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.config import ModelConfig, OptimConfig
from fastlm.flops import parameters

_EPS = 1e-5
_ROPE_BASE = 10_000.0


class PlainNorm(nn.Module):
    """LayerNorm with parameters, or RMSNorm without."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.centered = cfg.family == "gpt2"
        self.weight = nn.Parameter(torch.ones(cfg.n_embd)) if self.centered else None
        self.bias = nn.Parameter(torch.zeros(cfg.n_embd)) if self.centered and cfg.bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        shape = x_BTD.shape[-1:]
        if self.centered:
            return F.layer_norm(x_BTD, shape, self.weight, self.bias, _EPS)
        return F.rms_norm(x_BTD, shape, None, _EPS)


class PlainAttention(nn.Module):
    """Causal self-attention by `F.scaled_dot_product_attention`, whichever backend PyTorch picks."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.rotary = cfg.n_head, cfg.family == "modern"
        self.kv_heads = cfg.n_kv_head or cfg.n_head
        self.head_dim = cfg.n_embd // cfg.n_head
        bias = cfg.family == "gpt2" and cfg.bias
        self.qkv = nn.Linear(cfg.n_embd, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=bias)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (x.view(B, T, -1, self.head_dim).transpose(1, 2) for x in self.qkv(x_BTD).split(widths, dim=2))
        if self.rotary:
            q, k = (rotate(F.rms_norm(x, (self.head_dim,), None, _EPS), cos, sin).to(v.dtype) for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class PlainMLP(nn.Module):
    """GELU (tanh) or ReLU² between two linears."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gelu = cfg.family == "gpt2"
        bias = self.gelu and cfg.bias
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=bias)
        self.down = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTF = self.up(x_BTD)
        return self.down(F.gelu(x_BTF, approximate="tanh") if self.gelu else F.relu(x_BTF).square())


class PlainBlock(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm_attn, self.attn = PlainNorm(cfg), PlainAttention(cfg)
        self.norm_mlp, self.mlp = PlainNorm(cfg), PlainMLP(cfg)

    def forward(self, h_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h_BTD = h_BTD + self.attn(self.norm_attn(h_BTD), cos, sin)
        return h_BTD + self.mlp(self.norm_mlp(h_BTD))


class PlainGPT(nn.Module):
    """`fastlm.model.GPT` in PyTorch's own words; `cfg` is resolved. Weights are drawn as nanoGPT does, N(0, 0.02)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        assert cfg.max_seq_len is not None
        self.softcap, self.modern = cfg.logit_softcap or 0.0, cfg.family == "modern"
        self.embed = nn.Embedding(vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm_out = PlainNorm(cfg)
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.positions = None if self.modern else nn.Embedding(cfg.max_seq_len, cfg.n_embd)
        C = cfg.n_embd // cfg.n_head
        frequencies = _ROPE_BASE ** -(torch.arange(0, C, 2, dtype=torch.float64) / C)
        angles = torch.outer(torch.arange(cfg.max_seq_len, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, 0, 0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, 0, 0.02 / (2 * cfg.n_layer) ** 0.5)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or with `targets_BT` (int64, -100 = no target) their mean cross-entropy in nats."""
        T = tokens_BT.size(1)
        h_BTD = self.embed(tokens_BT)
        h_BTD = self.norm_out(h_BTD) if self.positions is None else h_BTD + self.positions.weight[:T]
        for block in self.blocks:
            h_BTD = block(h_BTD, self.cos[:T], self.sin[:T])
        logits_BTV = self.head(self.norm_out(h_BTD))
        if self.softcap:
            logits_BTV = self.softcap * torch.tanh(logits_BTV.float() / self.softcap)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: channel i turns with channel i + C/2 by the angles of `cos` and `sin`, (T, C/2)."""
    a, b = x_BHTC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def plain_bytes(cfg: ModelConfig, vocab_size: int, tokens: int) -> int:
    """About the peak of an update in bf16 with `tokens` in a micro-batch: which sizes are worth trying, no more.

    16 bytes a parameter; a block keeps its fp32 stream twice and 14 values of 16 bits a channel (two norms' outputs,
    q, k, v, attention's output, the MLP before and after its activation); logits lie there in 16 bits and in fp32, with
    both gradients.
    """
    return 16 * parameters(cfg, vocab_size).total + tokens * (36 * cfg.n_layer * cfg.n_embd + 12 * vocab_size)


def plain_optimizers(cfg: OptimConfig, model: PlainGPT) -> list[torch.optim.Optimizer]:
    """Fused AdamW (on a GPU) over everything, or beside `torch.optim.Muon` where `cfg` says muon."""
    params = list(model.parameters())
    found: list[torch.optim.Optimizer] = []
    rate = cfg.lr
    if cfg.name == "muon":
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        found.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum))
        chosen, rate = {id(p) for p in matrices}, cfg.adam_lr
        params = [p for p in params if id(p) not in chosen]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # nanoGPT's choice: the fused step on a GPU, PyTorch's default elsewhere.
    options = {"fused": True} if params[0].is_cuda else {}
    found.append(torch.optim.AdamW(groups, lr=rate, betas=cfg.betas, eps=cfg.eps, **options))
    return found


def plain_step(
    forward: Callable[[Tensor, Tensor], Tensor],
    model: PlainGPT,
    optimizers: list[torch.optim.Optimizer],
    *,
    micro_batch_size: int,
    grad_clip: float | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (B, T) inputs and targets that does one update -> its mean loss, 0-d, not waited for.

    `forward` is the model, compiled or not. B is a multiple of `micro_batch_size`.
    """
    params = list(model.parameters())
    on_gpu = params[0].is_cuda

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        parts = inputs_BT.size(0) // micro_batch_size
        loss = torch.zeros((), device=inputs_BT.device)
        for inputs, targets in zip(inputs_BT.chunk(parts), targets_BT.chunk(parts), strict=True):
            with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
                part = forward(inputs, targets) / parts
            part.backward()
            loss += part.detach()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(params, grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step
