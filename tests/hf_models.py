"""Tiny random models of every family that hf.patch knows, and the cases in which each has to keep its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from fastlm_kernels.check import exact, in_units, results, upstream_gradients

tf: Any = transformers  # its constructors take more than they declare
VOCAB, LENGTH = 97, 16
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 16}
BERT = {**SMALL, "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# transformers' eager attention alone caps the scores.
CAPPED = {"attn_logit_softcapping": 2.0, "attn_implementation": "eager"}
GEMMA2 = {"sliding_window": 5, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0}
# PyTorch's grouped products, which transformers 5 takes for experts, know no float64.
EAGER = {"experts_implementation": "eager"} if transformers.__version__.startswith("5.") else {}
GEMMA3 = {"sliding_window": 5, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2, **EAGER}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2, **EAGER}

FAMILIES: dict[str, Callable[..., Any]] = {
    "gpt2": lambda **more: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL | NO_DROPOUT | more)),
    "llama": lambda **more: tf.LlamaForCausalLM(tf.LlamaConfig(**GATED | more)),
    "mistral": lambda **more: tf.MistralForCausalLM(tf.MistralConfig(**GATED | {"sliding_window": 5} | more)),
    "qwen2": lambda **more: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GATED | WINDOWS | more)),
    "qwen3": lambda **more: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GATED | more)),
    "gemma": lambda **more: tf.GemmaForCausalLM(tf.GemmaConfig(**GATED | more)),
    "gemma2": lambda **more: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GATED | GEMMA2 | CAPPED | more)),
    "phi": lambda **more: tf.PhiForCausalLM(
        tf.PhiConfig(**SMALL | {"intermediate_size": 24, "resid_pdrop": 0.0, "qk_layernorm": True} | more)
    ),
    "gemma3_text": lambda **more: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GATED | GEMMA3 | more)),
    "phi3": lambda **more: tf.Phi3ForCausalLM(tf.Phi3Config(**GATED | {"sliding_window": 5} | more)),
    "mixtral": lambda **more: tf.MixtralForCausalLM(tf.MixtralConfig(**GATED | MIXTRAL | more)),
    "qwen3_moe": lambda **more: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GATED | EXPERTS | more)),
    "olmo2": lambda **more: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GATED | more)),
    "smollm3": lambda **more: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**GATED | {"no_rope_layers": [1, 0]} | more)),
    "opt": lambda **more: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL | {"ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 32} | more)
    ),
    "bert": lambda **more: tf.BertForMaskedLM(tf.BertConfig(**BERT | more)),
    "roberta": lambda **more: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT | more)),
}
ENCODERS = ("bert", "roberta")
TWO_KINDS_OF_LAYERS = ("qwen2", "gemma2", "gemma3_text")
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass(frozen=True)
class Case:
    """A batch (see `make_batch`), the dtype in which the model computes, and how it is run.

    Under autocast the parameters are fp32, of values that 16 bits hold.
    """

    batch: str
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    compiled: bool = False


CASES = {
    "plain": Case("plain"),
    "left": Case("left"),
    "right": Case("right"),
    "packed": Case("packed"),
    "bf16": Case("both", torch.bfloat16),
    "bf16-packed": Case("packed", torch.bfloat16),
    "autocast": Case("both", torch.bfloat16, autocast=True),
    "compiled": Case("both", compiled=True),
}
# Families that are another one but for some lines: that one, and the cells that they run; the other runs them all.
_KIN = {
    "mixtral": ("mistral", ("left", "packed")),
    "qwen3_moe": ("qwen3", ("left", "packed")),
    "gemma3_text": ("gemma2", ("left", "packed", "bf16", "compiled")),
    "phi3": ("llama", ("left", "packed", "bf16", "compiled")),
    "olmo2": ("llama", ("left", "packed", "bf16")),
    "smollm3": ("llama", ("left", "packed", "bf16")),
}
MIXTURES = ("mixtral", "qwen3_moe")
# Cells that are not run: (family, case) -> the reason.
LEFT_OUT = {
    (family, case): f"{kin}'s, but for what {', '.join(run)} show"
    for family, (kin, run) in _KIN.items()
    for case in CASES
    if case not in run
}
LEFT_OUT |= {
    (family, case): reason
    for family in MIXTURES
    for case, reason in {
        "bf16": "rounding may send a token to other experts",
        "compiled": "the experts that have tokens are counted on the host, patched or not",
    }.items()
}
LEFT_OUT |= {
    (family, case): "an encoder's positions do not say where documents begin: each text is a row"
    for family in ENCODERS
    for case in ("packed", "bf16-packed")
}
if transformers.__version__.startswith("4."):
    LEFT_OUT["opt", "compiled"] = "draws on the host which layers to drop: not whole for the compiler, patched or not"


def cells(*cases: str) -> list[tuple[str, str]]:
    """Every family with each of the cases, but for the cells that are left out."""
    return [(family, case) for case in cases for family in FAMILIES if (family, case) not in LEFT_OUT]


def make_model(family: str, **changes: Any) -> Any:
    """A model in training mode, its parameters neither 0 nor 1."""
    torch.manual_seed(0)
    model = FAMILIES[family](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False
    return model.train()


def make_batch(kind: str, length: int = LENGTH) -> dict[str, Any]:
    """Two sequences, some of their labels left out.

    plain; padded on the left, on the right, or on both (the first row on the left, the second on the right); packed:
    two documents a row.
    """
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}
    if kind in ("left", "right", "both"):
        real = torch.ones_like(ids)
        if kind != "right":
            real[0, : length // 3] = 0
        if kind != "left":
            real[1, length // 2 + 1 :] = 0
        # A causal loss at the first real token would judge what a padding token predicts.
        judged = real.bool() & ((real.cumsum(1) > 1) | (real[:, :1] == 1))
        batch |= {"attention_mask": real, "labels": batch["labels"].masked_fill(~judged, -100)}
    if kind == "packed":
        documents = [(length // 2 - 2, length // 2 + 2), (length - 3, 3)]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    return batch


def _finite_masks(real: Tensor, window: int) -> dict[str, Tensor]:
    """gemma2's masks, as it makes them of real (B, T), but finite: transformers' own become NaN in float64.

    There the least float64 is cast to float32, so that the softmax of a padding token's row has nothing but -inf.
    """
    at = torch.arange(real.shape[1], device=real.device)
    sees = (at[:, None] >= at) & real[:, None, None]
    masks = {"full_attention": sees, "sliding_attention": sees & (at[:, None] - at < window)}
    return {name: torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -1e30) for name, mask in masks.items()}


def _outputs(model: Any, batch: dict[str, Any], case: Case, masks: Any = None) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the model's parameters: the training loss, the hidden states behind each layer, and the logits.

    The model is given `masks`, or the batch's.
    """
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    batch = batch if masks is None else {**batch, "attention_mask": masks}
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def run(**parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(real.device.type, torch.bfloat16, enabled=case.autocast):
            model.train()
            out = torch.func.functional_call(model, parameters, (), {**batch, "output_hidden_states": True})
            model.eval()
            # Compiling is dear: in training, where the loss is ours.
            with torch.compiler.set_stance("force_eager") if case.compiled else contextlib.nullcontext():
                logits = torch.func.functional_call(model, parameters, (), inputs).logits
        return out.loss, *(state[real] for state in out.hidden_states[1:]), logits[real]

    return run


def _units(
    found: dict[str, Tensor], truth: dict[str, Tensor], change: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Errors in units; a gradient's unit is no less than eps(dtype) of its typical element.

    Sums that cancel (the biases of keys) round as what they are sums of, which no nudge of the inputs shows.
    """
    typical = {name: t.square().mean().sqrt() for name, t in truth.items()}
    largest = max(size for name, size in typical.items() if name.startswith("gradient"))
    units = {}
    for name, result in found.items():
        size = typical[name] if typical[name] > 1e-12 * largest else largest
        floor = torch.finfo(dtype).eps * size * name.startswith("gradient")
        units[name] = in_units(result, truth[name], change[name].clamp(min=float(floor)))
    return units


def assert_equal_numbers(
    change: Callable[[Any], Any], family: str, case: Case, length: int = LENGTH, device: str = "cpu"
) -> None:
    """Loss, hidden states, logits and every gradient of change(model): each kernel's rule, for the whole model.

    Compiled or of short texts, where each layer takes its time, one of each kind will do.
    """
    few = (case.compiled or length < LENGTH) and family not in TWO_KINDS_OF_LAYERS
    changes = {"num_hidden_layers": 1} if few else {}
    batch = {name: tensor.to(device) for name, tensor in make_batch(case.batch, length).items()}
    model = make_model(family, **changes).to(device)
    parameters = {name: p.detach().to(case.dtype).requires_grad_() for name, p in model.named_parameters()}
    reference = _outputs(model, batch, case)
    if family == "gemma2" and "attention_mask" in batch:
        masks = _finite_masks(batch["attention_mask"].bool(), model.config.sliding_window)
        reference = _outputs(model, batch, case, masks)
    changed = change(make_model(family, **changes).to(device))
    if case.compiled:
        changed(**batch, output_hidden_states=True)  # transformers' hooks for these are not set while compiling
        changed.compile(backend="aot_eager", fullgraph=True)
    upstream = upstream_gradients(reference, parameters, 2)
    truth, moved = exact(reference, parameters, upstream)
    if case.autocast:
        parameters = {name: p.detach().float().requires_grad_() for name, p in parameters.items()}
    mine = _units(results(_outputs(changed, batch, case), parameters, upstream), truth, moved, case.dtype)
    theirs = _units(results(reference, parameters, upstream), truth, moved, case.dtype)
    assert mine.keys() == theirs.keys()
    assert len(mine) == 2 + model.config.num_hidden_layers + len(parameters)
    for name, unit in mine.items():
        base = theirs[name]
        assert unit.max() <= 2 * base.max() + 4, name
        assert unit.square().mean().sqrt() <= 2 * base.square().mean().sqrt() + (1 if unit.numel() >= 8 else 4), name


def loss_and_gradients(model: Any, **batch: Any) -> list[Tensor]:
    """The loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(got: Any, expected: Any) -> None:
    """Tensors, or sequences of them, that differ by rounding alone."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Tensors that are equal bit for bit."""
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
