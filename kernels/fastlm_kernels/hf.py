"""Hugging Face models on this package's functions: `patch(model)`, `unpatch(model)`, `report(model)`.

A patched model is the same object with the same parameters; some of its modules have another forward. Nothing outside
the given model changes but two entries in transformers' tables of attention and mask functions: another model, also one
made from the same configuration object, computes as before. transformers is imported only for its own models.

FAMILIES says which architectures are known. Within one of these, modules are found by what they hold; of any other
architecture nothing is touched, and `report` says so. Modules outside transformers are those of `fastlm_kernels.patch`.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _hf_attention, _hf_modules
from ._runtime import backend
from .patching import _ORIGINALS, REPLACEMENTS, AnyModule, check_module


@dataclass(frozen=True)
class Family:
    """What a family of architectures differs in.

    weight_offset   of its RMS norms
    keeps_dtype     whether an RMS norm with a wider weight gives its input's dtype, not the weight's
    head            what stands before the loss (in HEADS)
    """

    weight_offset: float = 0.0
    keeps_dtype: bool = False
    head: str = "linear"


# By `config.model_type`.
FAMILIES = {
    "gpt2": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "gemma": Family(weight_offset=1.0, keeps_dtype=True),
    "gemma2": Family(weight_offset=1.0, keeps_dtype=True),
    "gemma3_text": Family(weight_offset=1.0, keeps_dtype=True),
    "phi": Family(),
    "phi3": Family(),
    "olmo2": Family(keeps_dtype=True),
    "smollm3": Family(),
    "opt": Family(),
    "bert": Family(head="bert"),
    "roberta": Family(head="roberta"),
}
_WITH_LOSS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")


@dataclass(frozen=True)
class ReportLine:
    """One module of a model: its dotted name ("" is the model), its class, whether it is patched, and why (not)."""

    name: str
    module: str
    patched: bool
    reason: str


class Report(tuple[ReportLine, ...]):
    """What `report` found, a line a module; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (line.name or "(model)", line.module, "patched" if line.patched else "left alone", line.reason)
            for line in self
        ]
        if not rows:
            return "nothing here that a kernel could replace"
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


@dataclass(frozen=True)
class _Find:
    """What could be done with one module: the class it would get (None: nothing), by which switch, and what or why."""

    name: str
    module: torch.nn.Module
    replacement: type | None
    switch: str
    reason: str


def patch(
    model: AnyModule,
    *,
    attention: bool = True,
    norm: bool = True,
    mlp: bool = True,
    rotary: bool = True,
    loss: bool = True,
    keep_logits: bool = False,
) -> AnyModule:
    """Let the modules of `model` run on this package's functions, in place, and return it.

    attention    every mask of the model's own: causal, padding on either side, packed position_ids, sliding windows.
                 The model gets a copy of its configuration. A call for attention weights (output_attentions) takes
                 the attention that the model had before.
    norm         LayerNorm and RMSNorm, also with an offset weight
    mlp          gated MLPs, and the activation functions of others
    rotary       rotary embedding, in one kernel with the norms of q and k where the model has them
    loss         while training with labels, the loss of a language model without its logits: `logits` is None.
                 keep_logits=True keeps the model's own loss and logits. In eval mode both are the model's own.

    Patching again is harmless: the last call's switches hold. Of an architecture outside FAMILIES nothing is touched;
    `report(model)` says what was done and why. ValueError for anything but a module, or a switch that is not a bool.
    """
    switches = {"attention": attention, "norm": norm, "mlp": mlp, "rotary": rotary, "loss": loss}
    for name, value in {**switches, "keep_logits": keep_logits}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}; give True or False")
    unpatch(model)
    for find in list(_finds(model)):
        made = find.replacement
        if find.switch == "model":
            made = _model_class(find.module, switches, keep_logits)
        elif find.switch == "rotary" and made is not None and not norm:
            made = _hf_modules.patched(_hf_modules.RotaryAttention, type(find.module), (None,))
        if made is not None and switches.get(find.switch, True):
            find.module.__class__ = made
    if attention:
        _take_attention(model)
    return model


def unpatch(model: AnyModule) -> AnyModule:
    """Undo `patch`, exactly, in place, and return the model; harmless where nothing was patched.

    The configuration it had comes back too, unless the model's copy was changed meanwhile: then the copy stays.
    A model made from the configuration of a patched one names our attention, and nothing else of it is patched: it gets
    a copy that names transformers' default.
    ValueError, with nothing changed, where a class was made from a patched one, as fully_shard does.
    """
    check_module(model)
    patched = [module for module in model.modules() if _patched_class(module) is not None]
    for module in patched:
        if type(module) is not _patched_class(module):
            raise ValueError(
                f"module: got one of class {type(module).__name__}, made from a patched one; "
                "patch and unpatch before fully_shard"
            )
    for module in patched:
        module.__class__ = _original(module)
    _return_configs(model)
    _leave_foreign_configs(model)
    return model


def report(model: torch.nn.Module) -> Report:
    """Which modules of `model` are patched, which are not, and why; print it for a table.

    ValueError for anything but a module.
    """
    check_module(model)
    return Report(ReportLine(find.name, _original(find.module).__name__, *_state(find)) for find in _finds(model))


def _state(find: _Find) -> tuple[bool, str]:
    """Whether the module is patched, and the report's reason."""
    module: Any = find.module
    if find.switch == "model":
        return _model_state(module)
    if find.switch == "attention":
        done = getattr(module, "config", None) is not None and _has_our_attention(module.config)
        return done, find.reason if done else _not_called("attention")
    if _patched_class(module) is not None:
        attends = find.switch == "rotary" and _has_our_attention(getattr(module, "config", None))
        return True, find.reason + (", attention" if attends else "")
    return False, find.reason if find.replacement is None else _not_called(find.switch)


def _not_called(switch: str) -> str:
    return f"not patched: call patch(model) with {switch}=True"


def _model_state(model: Any) -> tuple[bool, str]:
    kind, config = _original(model), model.config
    if _family(model) is None:
        known = ", ".join(FAMILIES)
        return False, f"architecture {config.model_type!r} is not known (known: {known}); this class is left alone"
    done = ["attention"] if _has_our_attention(config) else []
    options = None if _patched_class(model) is None else model._fastlm_options
    if options is not None:
        done.append("the model's own loss, with logits" if options[1] else "loss without logits")
    why = _why_no_attention(model)
    left = [] if why is None else [why]
    if not kind.__name__.endswith(_WITH_LOSS):
        if "labels" in inspect.signature(kind.forward).parameters:
            left.append("the loss: not a language model's, its own stays")
    elif _hf_modules.output_class(kind) is None:
        left.append("the loss: no class of results is known")
    return bool(done), "; ".join([", ".join(done) or _not_called("attention=True or loss"), *left])


def _original(module: Any) -> Any:
    """The module's own class, behind ours."""
    kind: Any = _patched_class(module)
    return type(module) if kind is None else _ORIGINALS.get(kind) or kind._fastlm_original


def _patched_class(module: torch.nn.Module) -> type | None:
    """The class that `patch` gave the module: its own, or behind one that others made since (FSDP); None without."""
    kinds = type(module).__mro__
    return next((kind for kind in kinds if "_fastlm_original" in vars(kind) or kind in _ORIGINALS), None)


def _pretrained() -> Any:
    """transformers' class of models; where it was never imported there are none."""
    utils = sys.modules.get("transformers.modeling_utils")
    return () if utils is None else utils.PreTrainedModel


def _family(model: Any) -> Family | None:
    return FAMILIES.get(model.config.model_type)


def _finds(model: torch.nn.Module) -> Iterator[_Find]:
    """Every module of `model` that this package knows something of."""
    pretrained = _pretrained()
    owner: dict[int, Family | None] = {}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, pretrained):
            # Inner models come later, and have the say.
            owner |= dict.fromkeys(map(id, module.modules()), _family(module))
    for name, module in model.named_modules():
        known = id(module) not in owner or owner[id(module)] is not None
        if isinstance(module, pretrained):
            yield _Find(name, module, None, "model", "")
        elif known:
            find = None if id(module) in inside else _find(name, module, owner.get(id(module)))
            if find is not None:
                yield find
                activation = _hf_modules.activation_of(module)
                if find.replacement is not None and activation is not None:
                    inside.add(id(activation))  # a part of the gated MLP's kernel


def _find(name: str, module: torch.nn.Module, family: Family | None) -> _Find | None:
    kind = _original(module)
    for rule in (_find_torch, _find_norm, _find_gated, _find_rotary, _find_attention, _find_activation):
        found = rule(kind, module, family)
        if found is not None:
            made, switch, reason = found
            if made is not None and "forward" in vars(module):
                made, reason = None, "has a forward of its own"
            return _Find(name, module, made, switch, reason)
    return None


_Found = tuple[type | None, str, str] | None


def _find_torch(kind: Any, module: Any, family: Family | None) -> _Found:
    if kind not in REPLACEMENTS:
        return None
    switch = "norm" if "Norm" in kind.__name__ else "loss" if "Loss" in kind.__name__ else "mlp"
    return REPLACEMENTS[kind], switch, "torch.nn module"


def _is_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _find_norm(kind: Any, module: Any, family: Family | None) -> _Found:
    if not kind.__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if family is None or not _is_transformers(kind) or not has_eps or weight is None or weight.dim() != 1:
        return None, "norm", "an RMS norm of an unknown kind"
    options = (family.weight_offset, not family.keeps_dtype)
    return _hf_modules.patched(_hf_modules.RMSNorm, kind, options), "norm", "RMS norm"


def _holds(module: Any, alternatives: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the module has all attributes of one of the alternatives."""
    return any(all(hasattr(module, part) for part in parts) for parts in alternatives)


def _find_gated(kind: Any, module: Any, family: Family | None) -> _Found:
    if family is None or not _is_transformers(kind) or not _holds(module, _hf_modules.GATED_PARTS):
        return None
    activation = _hf_modules.activation_of(module)
    function = _function_of(activation)
    if function not in _hf_modules.GATED:
        return None, "mlp", f"a gated MLP with {type(activation).__name__}: no kernel"
    return _hf_modules.patched(_hf_modules.GatedMLP, kind, (function,)), "mlp", f"MLP gated by {function}"


def _find_rotary(kind: Any, module: Any, family: Family | None) -> _Found:
    if family is None or not _is_transformers(kind) or not _holds(module, _hf_modules.ROTARY_PARTS):
        return None
    if "position_embeddings" not in inspect.signature(kind.forward).parameters:
        return None
    if not getattr(module, "use_rope", True):  # SmolLM3's layers without positions
        return None
    made = _hf_modules.patched(_hf_modules.RotaryAttention, kind, (family.weight_offset,))
    return made, "rotary", "rotary embedding" + (" with QK-norm" if _hf_modules.norms_heads(module) else "")


def _find_attention(kind: Any, module: Any, family: Family | None) -> _Found:
    if family is None or not hasattr(module, "is_causal") or not hasattr(module, "config"):
        return None
    return None, "attention", "attention"


def _find_activation(kind: Any, module: Any, family: Family | None) -> _Found:
    if family is None or (kind is not torch.nn.ReLU and kind.__module__ != "transformers.activations"):
        return None
    function = _function_of(module)
    if function is None:
        return None, "mlp", "an activation without a kernel"
    return _hf_modules.patched(_hf_modules.Activation, kind, (function,)), "mlp", f"activation {function}"


def _function_of(module: torch.nn.Module) -> str | None:
    """The name in ACTIVATIONS of the function that `module` computes, by its values: classes change their names."""
    x = torch.cat([torch.linspace(-8, 8, 65, device="cpu"), torch.tensor([-60.0, 60.0], device="cpu")])
    with torch.no_grad(), backend("torch"):
        y = _original(module).forward(module, x)
        values = {name: function(x) for name, function in _hf_modules.ACTIVATIONS.items()}
    return next((name for name, value in values.items() if torch.allclose(y, value, rtol=1e-5, atol=1e-6)), None)


def _model_class(model: Any, switches: dict[str, bool], keep_logits: bool) -> type | None:
    """The class of a transformers model itself, None if nothing of it changes."""
    kind, family = type(model), _family(model)
    if family is None or not _is_transformers(kind) or "forward" in vars(model):
        return None
    loss = switches["loss"] and kind.__name__.endswith(_WITH_LOSS) and _hf_modules.output_class(kind) is not None
    if not loss and not switches["attention"]:
        return None
    return _hf_modules.patched(_hf_modules.Model, kind, (family.head, keep_logits) if loss else None)


def _why_no_attention(model: Any) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "attention: in this version of transformers the model does not look it up"
    if getattr(model.config, "output_attentions", False):
        return "attention: output_attentions=True wants its weights, which no kernel keeps"
    # Then the masks that transformers builds are causal, and where it builds none its attention functions are not.
    if getattr(model.config, "use_bidirectional_attention", None) and getattr(model.config, "is_causal", True):
        return "attention: use_bidirectional_attention=True without config.is_causal=False depends on who attends"
    return _why_not_in_version_4(model.config) if sys.modules["transformers"].__version__.startswith("4.") else None


def _why_not_in_version_4(config: Any) -> str | None:
    """What eager attention of transformers 4 computes and its sdpa leaves out: ours would differ from one of them."""
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        return "attention: sdpa of transformers 4 leaves the soft-cap out; load it with attn_implementation='eager'"
    plain = getattr(config, "scale_attn_weights", True) and not getattr(
        config, "scale_attn_by_inverse_layer_idx", False
    )
    if implementation == "eager" and not plain:
        return "attention: a scale of the scores that eager alone knows in transformers 4"
    return None


def _has_our_attention(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) == _hf_attention.KEY


def _take_attention(model: torch.nn.Module) -> None:
    """Point every known model's modules to a copy of their configuration that names our attention."""
    pretrained = _pretrained()
    copies: dict[int, Any] = {}
    for known in model.modules():
        if not isinstance(known, pretrained) or _family(known) is None or _why_no_attention(known) is not None:
            continue
        for module in known.modules():
            config: Any = vars(module).get("config")
            # Layers may hold another object than their model, whose configuration was replaced since it was made.
            if type(config) is type(known.config) and id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                copies[id(config)]._attn_implementation = _hf_attention.KEY
    if not copies:
        return
    _hf_attention.register()
    for module in model.modules():
        original = vars(module).get("config")
        if id(original) in copies:
            vars(module)[_hf_modules.ORIGINAL_CONFIG] = original
            vars(module)["config"] = copies[id(original)]


def _return_configs(model: torch.nn.Module) -> None:
    kept: dict[int, Any] = {}
    for module in model.modules():
        if _hf_modules.ORIGINAL_CONFIG not in vars(module):
            continue
        original, ours = vars(module).pop(_hf_modules.ORIGINAL_CONFIG), vars(module)["config"]
        if id(ours) not in kept:
            if _has_our_attention(ours):
                ours._attn_implementation = original._attn_implementation
            kept[id(ours)] = original if ours.to_dict() == original.to_dict() else ours
        vars(module)["config"] = kept[id(ours)]


def _leave_foreign_configs(model: torch.nn.Module) -> None:
    """Copies for configurations that name our attention, but are not ours to give back: of another, patched model."""
    copies: dict[int, Any] = {}
    models: list[Any] = [module for module in model.modules() if isinstance(module, _pretrained())]
    for known in models:
        for module in known.modules():
            config: Any = vars(module).get("config")
            if _has_our_attention(config) and id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                copies[id(config)]._attn_implementation = known.get_correct_attn_implementation(None, True)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            vars(module)["config"] = copies[id(config)]
