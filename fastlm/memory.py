"""The bytes of a training step: pure arithmetic on a configuration, held against real steps by tests and the trainer.

    peak = weights + gradients + optimizer + activations + the larger of (head, one block's backward, the update's own)

What a block keeps for backward, in rows of D values a token, with g = n_kv_head / n_head:

    norm_attn's input and output 2, merged q k v 1 + 2g, rotated q and k 1 + g (modern), attention's output 1,
    norm_mlp's input and output 2, the MLP before and after its activation 4 + 4

and fp32 statistics: a log-sum-exp a head, one number a norm (modern) or two (gpt2). Recomputing drops
`activation` 4 rows, `mlp` 8, `block` everything but two rows, to which one whole block comes back in backward.

With dropout a byte a number of both branches; and where no kernel of ours attends, PyTorch's operators one by one keep
each attention weight twice in fp32 and its mask, and a row in fp32 (modern: two).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlm.config import Config, ModelConfig, micro_batch_size, recompute_part
from fastlm.flops import parameters
from fastlm_kernels.optim.states import adam_bytes

KERNELS_PLAN_SHARE = 1 / 8  # of logits and their gradient: the most that our linear cross-entropy works in
FP32 = 4
WORD_BYTES = 3 * 8  # of a weight's dropout while PyTorch's operators hash it


@dataclass(frozen=True)
class StepMemory:
    """Bytes of each part."""

    weights: int  # parameters and, in 16 bits, their fp32 masters
    gradients: int
    optimizer: int  # moments
    activations: int  # kept from forward to backward
    head: int  # logits, or the part of them that is there at a time
    block: int  # gradients inside one block, and what it recomputes
    update: int  # the optimizer's own buffers

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + max(self.activations + max(self.head, self.block), self.update)


def step_memory(cfg: Config, vocab_size: int) -> StepMemory:
    """The estimate for a resolved configuration (an open micro-batch counts as the whole batch)."""
    micro = micro_batch_size(cfg, otherwise=cfg.train.batch_size)
    tokens, total = micro * cfg.data.seq_len, parameters(cfg.model, vocab_size).total
    size = 2 if cfg.train.precision == "bf16" else FP32
    gradient_size = FP32 if micro < cfg.train.batch_size else size
    recompute = recompute_part(cfg.train.recompute)
    model, whole = cfg.model, block_bytes(cfg.model, tokens, size, "none", cfg.data.seq_len)
    kept = block_bytes(model, tokens, size, recompute, cfg.data.seq_len)
    words = WORD_BYTES * model.n_head * cfg.data.seq_len * tokens if _holds_weights(model) else 0
    backward = 10 * tokens * model.n_embd * size  # gradients of both sides of the activation, and two rows
    return StepMemory(
        weights=total * (FP32 if size == FP32 else size + FP32),
        gradients=total * gradient_size,
        optimizer=moment_bytes(cfg, total),
        activations=stem_bytes(model, tokens, size) + model.n_layer * kept,
        head=_head(cfg, vocab_size, tokens, size),
        block=whole - kept + backward + words,
        update=_update(cfg),
    )


def _holds_weights(cfg: ModelConfig) -> bool:
    return cfg.dropout > 0 and cfg.attention != "triton"


def block_bytes(cfg: ModelConfig, tokens: int, size: int, recompute: str, seq_len: int = 0) -> int:
    """What one block keeps for backward, activations of `size` bytes each; sequences of `seq_len` matter to dropout."""
    modern, share = cfg.family == "modern", (cfg.n_kv_head or cfg.n_head) / cfg.n_head
    numbers = 1 if modern else 2
    if recompute == "block":
        return int(tokens * (2 * cfg.n_embd * size + numbers * FP32))
    rows = 2 + (1 + 2 * share) + (1 + share) * modern + 1 + 2 + {"none": 8, "activation": 4, "mlp": 0}[recompute]
    dropout = 2 * cfg.n_embd if cfg.dropout > 0 else 0
    if _holds_weights(cfg):
        dropout += (2 * FP32 + 1) * cfg.n_head * seq_len + (1 + modern) * FP32 * cfg.n_embd
    return int(tokens * (rows * cfg.n_embd * size + (cfg.n_head + 2 * numbers) * FP32 + dropout))


def stem_bytes(cfg: ModelConfig, tokens: int, size: int) -> int:
    """What embedding and final norm keep: token ids, the norms' inputs."""
    rows = 2 if cfg.family == "modern" else 1
    return tokens * (rows * cfg.n_embd * size + 8 + 2 * FP32 + (cfg.n_embd if cfg.dropout > 0 else 0))


def _head(cfg: Config, vocab_size: int, tokens: int, size: int) -> int:
    """Bytes for the loss: the whole logits several times over on PyTorch's path (measured on a CPU), parts on ours."""
    model = cfg.model
    if cfg.model.kernels != "triton":
        return tokens * vocab_size * (18 if model.logit_softcap else 12)
    logits = 2 * tokens * vocab_size * size
    sums = model.n_embd * (vocab_size * FP32 + tokens * size)
    return int(logits * KERNELS_PLAN_SHARE) + sums


def moment_bytes(cfg: Config, total: int) -> int:
    """The optimizer's state: fp32, or Adam's averages in 8 bits (as if small parameters had them too)."""
    optim = cfg.optim
    adam = adam_bytes(optim.state_bits)
    if optim.name == "muon":
        matrices = _matrices(cfg.model)
        return int(FP32 * matrices + adam * (total - matrices))
    if optim.name in ("adam", "adamw"):
        return int(adam * total)
    momentum = optim.momentum > 0
    moments = {"adadelta": 2, "adagrad": 1, "sgd": momentum, "rmsprop": 1 + momentum}
    return FP32 * int(moments[optim.name]) * total


def _update(cfg: Config) -> int:
    """Muon's matrices of one shape are orthogonalised together: stack, two products and the result, in 16 bits."""
    if cfg.optim.name != "muon":
        return 0
    return 4 * 2 * cfg.model.n_layer * 4 * cfg.model.n_embd**2 * 2  # up and down are one shape, transposed


def _matrices(cfg: ModelConfig) -> int:
    width = cfg.n_embd + 2 * (cfg.n_kv_head or cfg.n_head) * (cfg.n_embd // cfg.n_head)
    return cfg.n_layer * cfg.n_embd * (width + 9 * cfg.n_embd)
