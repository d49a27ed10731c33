"""The GPT: owns parameters and order of operations; every op that has a kernel is called through `fastlm_kernels`.

Shape suffixes: B batch, T time (tokens), D width (n_embd), H query heads, K key/value heads, C head dimension,
V vocabulary, F hidden width of the MLP (4 D). `x_BTD` is a tensor of shape (B, T, D).

Two families share the skeleton  h <- h + attention(norm(h));  h <- h + mlp(norm(h)):

    modern  RMSNorm without weights, rotary positions, QK-norm, ReLU², no biases, zero-initialised output
            projections, soft-capped logits, a head of its own, optionally grouped-query attention
    gpt2    LayerNorm, learned positions, GELU (tanh), biases (optional), tied head; GPT-2's shapes

The residual stream h travels unnormalised beside the branch output, so that each add meets the norm that
follows it in one fused call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm_kernels as fk
from fastlm.config import ModelConfig, Recompute, recompute_part
from fastlm.products import linear
from fastlm_kernels.attention import scaled_dot_product_attention_reference as sdpa
from fastlm_kernels.attention.dropout import hash32

NORM_EPS = 1e-5  # GPT-2's, and small beside the mean square of any trained activation
ROPE_BASE = 10_000.0
VOCABULARY = ("embed.weight", "head.weight")  # parameters with a row for each token


class Linear(nn.Linear):
    """A linear layer whose weights are cast to its input's dtype where they have another: (..., in) -> (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return linear(input, self.weight.to(input.dtype), bias)


class Norm(nn.Module):
    """LayerNorm with parameters (gpt2) or RMSNorm without (modern), alone or fused with the residual add.

    The parameters stay fp32 beside 16-bit activations: the op reads them as they are, and their gradients are fp32.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.shape = (cfg.n_embd,)
        self.centered = cfg.family == "gpt2"
        self.weight = nn.Parameter(torch.ones(self.shape)) if self.centered else None
        self.bias = nn.Parameter(torch.zeros(self.shape)) if self.centered and cfg.bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.centered:
            return fk.layer_norm(x_BTD, self.shape, self.weight, self.bias, NORM_EPS)
        return fk.rms_norm(x_BTD, self.shape, None, NORM_EPS)

    def add(self, branch_BTD: Tensor, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """-> (norm(h + branch), h + branch)."""
        if self.centered:
            return fk.add_layer_norm(branch_BTD, h_BTD, self.shape, self.weight, self.bias, NORM_EPS)
        return fk.add_rms_norm(branch_BTD, h_BTD, self.shape, None, NORM_EPS)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, K, max_seq_len, C) buffers a layer."""

    def __init__(self, cfg: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        n_kv_head, head_dim = cfg.n_kv_head or cfg.n_head, cfg.n_embd // cfg.n_head
        assert cfg.max_seq_len is not None
        shape = (cfg.n_layer, 2, batch_size, n_kv_head, cfg.max_seq_len, head_dim)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model advances it after its last layer

    def append(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens of one layer -> all keys and values up to and including them."""
        end = self.length + k_BKTC.size(2)
        keys, values = self.buffer[layer]
        keys[:, :, self.length : end] = k_BKTC
        values[:, :, self.length : end] = v_BKTC
        return keys[:, :, :end], values[:, :, :end]


def flash_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, **options: Any) -> Tensor:
    """flash-attn's kernel for 16-bit tensors of a GPU; PyTorch's elsewhere, where such a run may be opened, too.

    And where there is dropout, whose seeds flash-attn does not take.
    """
    if not q_BHTC.is_cuda or q_BHTC.dtype == torch.float32 or options.get("dropout_p"):
        return sdpa(q_BHTC, k_BKSC, v_BKSC, **options)
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    # Its causal mask ends at the last key, as a cache wants it; without a cache both corners are one.
    q_BTHC, k_BSKC, v_BSKC = (x.transpose(1, 2) for x in (q_BHTC, k_BKSC, v_BKSC))
    return flash_attn_func(q_BTHC, k_BSKC, v_BSKC, causal=True, deterministic=True).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention over merged Q, K, V projections: (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, cfg.n_head, cfg.n_kv_head or cfg.n_head
        self.dropout = cfg.dropout
        self.head_dim = cfg.n_embd // cfg.n_head
        self.rotary = cfg.family == "modern"
        kinds = {"triton": fk.scaled_dot_product_attention, "flash": flash_attention}
        self.attend = kinds.get(cfg.attention, sdpa)
        bias = cfg.family == "gpt2" and cfg.bias
        self.sizes = [self.n_head, self.n_kv_head, self.n_kv_head]
        self.qkv = Linear(cfg.n_embd, sum(self.sizes) * self.head_dim, bias=bias)
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=bias)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        key_B: Tensor | None = None,
    ) -> Tensor:
        """`key_B`: the samples' keys for dropout of the attention weights."""
        B, T, D = x_BTD.shape
        qkv_BTHC = self.qkv(x_BTD).view(B, T, sum(self.sizes), self.head_dim)
        # Split before transposed: the three gradients are then joined by one copy, not three.
        q_BHTC, k_BKTC, v_BKTC = (x.transpose(1, 2) for x in qkv_BTHC.split(self.sizes, dim=2))
        if self.rotary:
            assert rotation is not None
            q_BHTC, k_BKTC = fk.rotary_embedding(q_BHTC, k_BKTC, *rotation, qk_norm_eps=NORM_EPS)
        align = "top_left"
        if cache is not None:
            k_BKTC, v_BKTC = cache.append(self.layer, k_BKTC, v_BKTC)
            align = "bottom_right"  # the T queries are the newest of the S tokens held
        y_BHTC = self.attend(
            q_BHTC,
            k_BKTC,
            v_BKTC,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
            causal_align=align,
            **({} if key_B is None else {"dropout_p": self.dropout, "dropout_seed": key_B}),
        )
        return self.proj(y_BHTC.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """down(activation(up(x))): ReLU² in the modern family, GELU's tanh form in gpt2. (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: ModelConfig, recompute: Recompute = "none"):
        super().__init__()
        self.gelu = cfg.family == "gpt2"
        self.recompute_activation = recompute == "activation"
        bias = self.gelu and cfg.bias
        self.up = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=bias)
        self.down = Linear(4 * cfg.n_embd, cfg.n_embd, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTF = self.up(x_BTD)
        if self.recompute_activation:  # stops once the input of `down` is there again: its product is not repeated
            return rematerialized(self._activate_and_down, x_BTF)
        return self._activate_and_down(x_BTF)

    def _activate_and_down(self, x_BTF: Tensor) -> Tensor:
        return self.down(fk.gelu(x_BTF, approximate="tanh") if self.gelu else fk.relu_squared(x_BTF))


class Block(nn.Module):
    """One layer: (norm_attn's output y, stream h) -> (the MLP's branch, not yet added, and h).

    The forward begins behind `norm_attn`, which the first layer calls without an add, and reads no number of its layer:
    all layers are one compiled graph.
    """

    def __init__(self, cfg: ModelConfig, layer: int, recompute: Recompute):
        super().__init__()
        self.dropout = cfg.dropout
        self.norm_attn, self.attn = Norm(cfg), Attention(cfg, layer)
        self.norm_mlp, self.mlp = Norm(cfg), MLP(cfg, recompute)
        self.recompute_mlp = recompute == "mlp"

    def forward(
        self,
        y_BTD: Tensor,
        h_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        keys_B: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        """`keys_B`: the samples' dropout keys at this layer's three sites, (B,) each."""
        branch_BTD = self.attn(y_BTD, rotation, cache, None if keys_B is None else keys_B[0])
        if keys_B is not None:
            branch_BTD = keyed_dropout(branch_BTD, self.dropout, keys_B[1])
        y_BTD, h_BTD = self.norm_mlp.add(branch_BTD, h_BTD)
        branch_BTD = rematerialized(self.mlp, y_BTD) if self.recompute_mlp else self.mlp(y_BTD)
        if keys_B is not None:
            branch_BTD = keyed_dropout(branch_BTD, self.dropout, keys_B[2])
        return branch_BTD, h_BTD


class GPT(nn.Module):
    """A decoder-only transformer.

    `cfg` has every `None` resolved (`fastlm.resolve`); `vocab_size` comes from the tokenizer. Parameters are made in
    fp32; activations have `compute_dtype`. `recompute` says what backward computes again rather than keeps:

        none   activation (of the MLP)   mlp (from its normed input)   block (all but each block's input; also True)

    The head has a multiple of `vocab_multiple` rows, for the tensor cores. The rows past `vocab_size` are zeros and
    stand for no token: they enter no softmax, get gradients of zero, and are not in the state_dict.
    """

    rope: Tensor  # (2, max_seq_len, C/2): cosines, sines

    def __init__(
        self,
        cfg: ModelConfig,
        vocab_size: int,
        *,
        compute_dtype: torch.dtype = torch.float32,
        recompute: Recompute | bool = "none",
        vocab_multiple: int = 1,
    ):
        super().__init__()
        assert cfg.max_seq_len is not None, "resolve the configuration first"
        part = recompute_part(recompute)
        self.cfg, self.vocab_size = cfg, vocab_size
        self.compute_dtype, self.recompute_block = compute_dtype, part == "block"
        self.compiled_block: Callable[..., tuple[Tensor, Tensor]] | None = None  # what training calls for Block.forward
        rows = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.embed = nn.Embedding(rows if cfg.tie_embeddings else vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer, part) for layer in range(cfg.n_layer))
        self.norm_out = Norm(cfg)
        self.head = Linear(cfg.n_embd, rows, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.positions = nn.Embedding(cfg.max_seq_len, cfg.n_embd) if cfg.family == "gpt2" else None
        if cfg.family == "modern":
            table = rotary_table(cfg.max_seq_len, cfg.n_embd // cfg.n_head)
            self.register_buffer("rope", table, persistent=False)
        self.register_state_dict_post_hook(_cut_vocabulary)
        self.register_load_state_dict_pre_hook(_pad_vocabulary)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        num_items: Tensor | int | None = None,
        reduction: str = "mean",
        seeds_B: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in fp32, or with `targets_BT` (int64, -100 = no target) the loss in nats.

        `reduction="mean"` divides by `num_items`, the target tokens of the whole update, so that micro-batches
        add up to one batch; `"none"` gives one loss a token, (B, T). `seeds_B` (int64) turns dropout on, one seed
        a sample. `cache` appends the tokens to those that it holds.
        """
        y_BTD = self.hidden(tokens_BT, seeds_B=seeds_B, cache=cache)
        if targets_BT is None:
            return self.logits(y_BTD)
        options: dict[str, Any] = {"reduction": reduction, "softcap": self.cfg.logit_softcap or None}
        options["num_items"] = num_items
        if self.cfg.kernels == "torch":  # the logits are whole either way; the product is `products`' choice
            logits_BTV = self._token_logits(y_BTD)
            loss = fk.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), **options)
            return loss.view(targets_BT.shape) if reduction == "none" else loss
        padded = self.vocab_size < self.head.weight.size(0)
        options["num_classes"] = self.vocab_size if padded else None
        return fk.linear_cross_entropy(y_BTD, self.head.weight.to(y_BTD.dtype), targets_BT, **options)

    def _token_logits(self, y_BTD: Tensor) -> Tensor:
        """The head over what stands for a token, (B, T, V), in its own dtype."""
        logits_BTV = self.head(y_BTD)
        # A view that cuts nothing would have its gradient copied.
        return logits_BTV if logits_BTV.size(-1) == self.vocab_size else logits_BTV[..., : self.vocab_size]

    def logits(self, y_BTD: Tensor) -> Tensor:
        """Head and soft-cap over the output of `hidden`: (B, T, V) in fp32."""
        logits_BTV = self._token_logits(y_BTD).float()
        softcap = self.cfg.logit_softcap
        return softcap * fk.tanh(logits_BTV / softcap) if softcap else logits_BTV

    def hidden(self, tokens_BT: Tensor, *, seeds_B: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The normed output of the last layer, (B, T, D) in `compute_dtype`: what the head reads."""
        start, T = (cache.length if cache is not None else 0), tokens_BT.size(1)
        h_BTD, rotation = self._embed(tokens_BT, start)
        site_keys_B = None
        if seeds_B is not None and self.cfg.dropout > 0:
            site_keys_B = site_keys(seeds_B, 1 + 3 * len(self.blocks))
            h_BTD = keyed_dropout(h_BTD, self.cfg.dropout, site_keys_B[0])
        run = Block.__call__
        if torch.is_grad_enabled():
            run = self.compiled_block or run
            if self.recompute_block:
                run = functools.partial(rematerialized, run)
        branch_BTD = None
        blocks: list[Any] = list(self.blocks)
        for layer, block in enumerate(blocks):
            if branch_BTD is None:  # the first layer has nothing to add yet
                y_BTD = block.norm_attn(h_BTD)
            else:
                y_BTD, h_BTD = block.norm_attn.add(branch_BTD, h_BTD)
            keys_B = None if site_keys_B is None else site_keys_B[3 * layer + 1 : 3 * layer + 4]
            branch_BTD, h_BTD = run(block, y_BTD, h_BTD, rotation, cache, keys_B)
        if cache is not None:
            cache.length += T
        assert branch_BTD is not None
        return self.norm_out.add(branch_BTD, h_BTD)[0]

    def _embed(self, tokens_BT: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The stream's first state, (B, T, D) in `compute_dtype`, and the rotation of its positions from `start` on."""
        T = tokens_BT.size(1)
        h_BTD = self.embed(tokens_BT)
        if self.positions is not None:
            positions_TD = self.positions.weight
            if positions_TD.size(0) != T:  # a view's gradient would be a copy of the whole table
                positions_TD = positions_TD.narrow(0, start, T)
            return (h_BTD.float() + positions_TD.float()).to(self.compute_dtype), None
        # Rows of the embedding may grow at will: only their direction enters.
        cos, sin = self.rope.narrow(1, start, T).unbind()
        return self.norm_out(h_BTD.to(self.compute_dtype)), (cos, sin)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> GPT:
        """Draw every weight from `generator`, in the order of `named_parameters`: the same on every machine."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() >= 2:
                std = self._init_std(name, parameter)
                rows = self.vocab_size if name in VOCABULARY else parameter.size(0)
                parameter[rows:].zero_()
                parameter[:rows].zero_() if std == 0 else parameter[:rows].normal_(0, std, generator=generator)
        return self

    def _init_std(self, name: str, parameter: Tensor) -> float:
        residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
        if self.cfg.family == "gpt2":
            return 0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02
        if residual or name == "head.weight":
            return 0.0  # every block starts as the identity, every token as equally likely
        if name == "embed.weight":  # only rows' directions enter, unless the head reads them too
            return 0.02 if self.cfg.tie_embeddings else 1.0
        return parameter.size(1) ** -0.5


def _cut_vocabulary(model: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """What leaves the model has the tokenizer's size: views of the rows that stand for tokens."""
    for name in VOCABULARY:
        if prefix + name in state:
            state[prefix + name] = cut_vocabulary(name, state[prefix + name], model.vocab_size)  # type: ignore[arg-type]


def _pad_vocabulary(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in VOCABULARY:
        if prefix + name in state:
            state[prefix + name] = pad_vocabulary(name, state[prefix + name], own[name])


def cut_vocabulary(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A parameter called `name`, or a state of its shape, without the rows that stand for no token."""
    return tensor[:vocab_size] if name in VOCABULARY and tensor.dim() == 2 else tensor


def pad_vocabulary(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """`cut_vocabulary`'s inverse: rows of zeros up to those of the parameter `like`."""
    if name not in VOCABULARY or tensor.dim() != 2 or tensor.shape == like.shape or tensor.size(1) != like.size(1):
        return tensor
    return F.pad(tensor, (0, 0, 0, max(0, like.size(0) - tensor.size(0))))


def rematerialized(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments are kept for backward."""
    from torch.utils.checkpoint import checkpoint  # its import brings Dynamo along

    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def rotary_table(length: int, head_dim: int) -> Tensor:
    """cos and sin of  t / base^(2i/C)  for t < length, i < C/2: (2, length, C/2) in fp32."""
    frequencies = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).float()


def sample_dropout(x_BTD: Tensor, p: float, seeds_B: Tensor, site: int) -> Tensor:
    """Dropout whose mask is a pure function of (seed of the sample, site, position).

    However samples are cut into micro-batches or spread over devices, each meets the same mask.
    """
    return keyed_dropout(x_BTD, p, site_keys(seeds_B, site + 1)[site])


def site_keys(seeds_B: Tensor, sites: int) -> tuple[Tensor, ...]:
    """For each dropout site one key a sample, (B,) int64 in [0, 2^32)."""
    return hash32(hash32(seeds_B) + torch.arange(sites, device=seeds_B.device).unsqueeze(1)).unbind()


def keyed_dropout(x_BTD: Tensor, p: float, key_B: Tensor) -> Tensor:
    """Dropout of (B, ...) by one key a sample. The bits come from `hash32` of key and position."""
    if p == 0.0:
        return x_BTD
    shape = x_BTD.shape[1:]
    position = torch.arange(shape.numel(), device=x_BTD.device).view(shape)
    bits = hash32(hash32(position) ^ key_B.view(-1, *[1] * (x_BTD.dim() - 1)))
    keep = bits >= round(p * 2**32)
    return torch.where(keep, x_BTD / (1 - p), 0)
