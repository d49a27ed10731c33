"""What a run is made of: typed dataclasses, and how the command line, files and presets fill them.

Precedence, whatever the order typed: dataclass defaults < preset < --config file < dotted flags.
`None` (YAML `null`) means off, or "derive it" where the comment says so; `auto` is resolved once by
`fastlm.train.resolve`, written to the run's config.yaml, and never decided again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """Text or token shards, and how text becomes tokens."""

    path: str | None = None  # file, directory or glob; None = the Python standard library's own sources
    val_path: str | None = None  # None = split off `path`
    val_fraction: float = 0.1  # share of the text kept for validation
    tokenizer: str = "bpe"  # bpe, byte, char, gpt2, or a path to a tokenizer.json / its directory
    vocab_size: int = 4096  # of a BPE to be trained; other tokenizers bring their own
    seq_len: int = 256  # tokens per training window
    text_key: str = "text"  # the field of a JSONL row that holds the text
    bin_format: Literal["header", "uint16"] = "header"  # layout of .bin shards


@dataclass
class ModelConfig:
    """The shape of the network; the vocabulary comes from the tokenizer."""

    family: Literal["modern", "gpt2", "lstm"] = "modern"
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None  # None = n_head; fewer = grouped-query attention (modern)
    n_embd: int = 256
    max_seq_len: int | None = None  # positions the model can hold; None = data.seq_len
    dropout: float = 0.0  # on the embedding and on each residual branch
    tie_embeddings: bool | None = None  # None = the family's own: gpt2 ties, modern does not
    bias: bool = True  # gpt2: biases in linears and norms; modern has none
    logit_softcap: float | None = None  # None = the family's own: modern 15, gpt2 off; 0 = off
    kernels: Literal["auto", "triton", "torch"] = "auto"
    attention: Literal["auto", "triton", "sdpa", "flash"] = "auto"


@dataclass
class OptimConfig:
    """Which update each parameter gets, and the schedule that scales it."""

    name: Literal["muon", "adamw", "adam", "sgd", "adagrad", "adadelta", "rmsprop"] = "muon"
    lr: float = 0.03  # muon: the matrices' rate; others: every parameter's
    adam_lr: float = 0.01  # muon only: embedding, head and scalars
    betas: tuple[float, float] = (0.9, 0.95)  # adam, adamw, and the AdamW part of muon
    eps: float = 1e-8
    momentum: float = 0.95  # muon, sgd, rmsprop
    weight_decay: float = 0.0  # on tensors with two or more dimensions
    grad_clip: float | None = 1.0  # global norm; None = off
    schedule: Literal["constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd"] = "wsd"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0  # the schedule's end, as a share of its peak
    decay_fraction: float = 0.6  # wsd: share of the steps, at the end, over which the rate falls


@dataclass
class TrainConfig:
    """How long, in which portions, and what is written on the way."""

    steps: int | None = None  # updates; exactly one of steps, epochs, max_seconds sets the length
    epochs: float | None = None
    max_seconds: float | None = None
    batch_size: int = 32  # sequences per update, all devices together
    micro_batch_size: int | None = None  # sequences per forward pass and device; None = batch_size
    eval_every: int | None = 100  # None = only before the first and after the last step
    save_every: int | None = 200  # None = only after the last step
    sample_every: int | None = None  # None = only after the last step
    log_every: int = 10
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    recompute: bool = False  # recompute each block's activations in backward: less memory, more time
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"


@dataclass
class Config:
    """One run. Sections are reached by dotted keys: `--optim.lr 0.01`."""

    preset: str = "default"
    out: str | None = None  # None = runs/<preset>-<time>
    resume: str = "auto"  # auto, never, or a run directory / checkpoint
    seed: int = 1234
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
