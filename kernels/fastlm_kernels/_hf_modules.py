"""Modules of transformers models with this package's functions in `forward`.

`hf.patch` gives an instance a class made by `patched`: one of the classes below in front of the instance's own, of the
same name, so that isinstance, state_dict, hooks, save_pretrained and whatever looks a class up by name see no change.
Whatever a forward here does not cover it leaves to the class behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from . import _hf_attention
from .activation import geglu, gelu, relu_squared, silu, swiglu
from .linear_cross_entropy import linear_cross_entropy
from .norm import rms_norm
from .rotary import rotary_embedding

# What a model's loss reads of its keyword arguments; the layers below have no use for them.
_LOSS_ARGUMENTS = ("labels", "logits_to_keep", "num_items_in_batch", "shift_labels", "ignore_index", "return_dict")
# A module's attribute: the configuration that it had before `hf.patch`.
ORIGINAL_CONFIG = "_fastlm_config"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "silu": silu,
    "relu_squared": relu_squared,
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": geglu,
    "gelu_tanh": functools.partial(geglu, approximate="tanh"),
    "silu": swiglu,
}
# What a module holds: projections apart, or merged in one (Phi3).
GATED_PARTS = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("gate_up_proj", "down_proj", "activation_fn"))
_ROTARY_PARTS = ("head_dim", "scaling", "layer_idx")
ROTARY_PARTS = (("q_proj", "k_proj", "v_proj", *_ROTARY_PARTS), ("qkv_proj", "num_key_value_heads", *_ROTARY_PARTS))


def activation_of(module: Any) -> Any:
    """The module of a gated MLP's activation function, None where there is none."""
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


class Patched:
    """In front of a module's own class; `options` are the values of the subclass's other annotations."""

    _fastlm_original: type
    _fastlm_options: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new module of this class is one of the original's: `type(model).from_pretrained` patches nothing."""
        return cls._fastlm_original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the classes that can be found by name: the made one cannot."""
        _, _, *state = super().__reduce_ex__(protocol)
        ours = next(base for base in type(self).__mro__ if base in ROLES)
        return restored, (ours, self._fastlm_original, self._fastlm_options), *state

    def _replicate_for_data_parallel(self: Any) -> Any:
        """nn.DataParallel's copy for one device: it makes an empty object by `__new__`, which here takes arguments."""
        bare = object.__new__(self._fastlm_original)
        bare.__dict__ = self.__dict__
        replica = self._fastlm_original._replicate_for_data_parallel(bare)
        replica.__class__ = type(self)
        return replica


def restored(ours: type, original: type, options: tuple[Any, ...]) -> Any:
    """An empty instance of `patched(...)`, for unpickling: in a new process transformers must know our key."""
    _hf_attention.register()
    return object.__new__(patched(ours, original, options))


@functools.cache
def patched(ours: type, original: type, options: tuple[Any, ...] = ()) -> type:
    """The class `ours` in front of `original`, under the original's name."""
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastlm_original": original,
        "_fastlm_options": options,
    }
    prepare = getattr(ours, "prepare", None)
    if prepare is not None:
        namespace |= prepare(original)
    return type(original.__name__, (ours, original), namespace)


class RMSNorm(Patched):
    """An RMS norm; options: the weight's offset, and whether a wider weight widens the result."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """x / rms(x) * (offset + weight), in the dtype of the module's own."""
        offset, widens = self._fastlm_options
        weight, x = self.weight, hidden_states
        eps = eps_of(self)
        dtype = torch.promote_types(x.dtype, weight.dtype) if widens else x.dtype
        return rms_norm(x.to(dtype), weight.shape, weight, eps, weight_offset=offset).to(dtype)


def eps_of(norm: Any) -> float:
    """The eps of an RMS norm, by either of its names."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


class Activation(Patched):
    """An activation function without parameters; options: its name in ACTIVATIONS."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The function, elementwise."""
        return ACTIVATIONS[self._fastlm_options[0]](input)


class GatedMLP(Patched):
    """down(activation(gate(x)) * up(x)); options: the activation's name in GATED."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The projections and one kernel between them."""
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(GATED[self._fastlm_options[0]](gate, up))


def norms_heads(module: Any) -> bool:
    """Whether an attention normalises each head of its q and k, as Qwen 3 does: OLMo 2 takes all heads at once."""
    return hasattr(module, "q_norm") and module.q_norm.weight.shape == (module.head_dim,)


class RotaryAttention(Patched):
    """Attention with rotary positions; options: the offset of the QK-norms' weights, None to leave these alone."""

    @staticmethod
    def prepare(original: Any) -> dict[str, Any]:
        """Whether the original's forward passes its soft-cap on: Gemma 3 has one, and does not."""
        return {"_fastlm_softcaps": "attn_logit_softcapping" in inspect.unwrap(original.forward).__code__.co_names}

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Project, normalise and rotate q and k in one kernel, attend, project: as the class behind it does."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (x.view(shape) for x in self._fastlm_projected(hidden_states))
        query, key = (x.transpose(1, 2) for x in self._fastlm_rotated(query, key, *position_embeddings))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            # transformers 4's static caches need the positions.
            extra = () if cache_position is None else ({"cache_position": cache_position},)
            key, value = past_key_values.update(key, value, self.layer_idx, *extra)
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        elif getattr(self.config, "sliding_window", None) is not None:
            kwargs["sliding_window"] = self.config.sliding_window
        if self._fastlm_softcaps:
            kwargs["softcap"] = self.attn_logit_softcapping
        dropout = self.attention_dropout if self.training else 0.0
        attend = _attention_of(self)
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return (self.o_proj if hasattr(self, "o_proj") else self.dense)(out), weights

    def _fastlm_projected(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v (B, T, H x D), normalised where the model does so over all heads at once (OLMo 2)."""
        if hasattr(self, "qkv_proj"):
            keys = self.num_key_value_heads * self.head_dim
            merged = self.qkv_proj(x)
            return merged.split((merged.shape[-1] - 2 * keys, keys, keys), dim=-1)
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if hasattr(self, "q_norm") and not norms_heads(self):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _fastlm_rotated(self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (B, T, H, D), normalised where the model does so, and rotated."""
        offset = self._fastlm_options[0]
        options: dict[str, Any] = {"head_dim_axis": 2, "rotary_dim": cos.shape[-1]}
        if getattr(self, "qk_layernorm", False):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        elif norms_heads(self):
            norms = (self.q_norm, self.k_norm)
            # A wider weight widens the model's own q and k, which the fused norm does not.
            if offset is None or any(not _is_bare(norm) or norm.weight.dtype != query.dtype for norm in norms):
                query, key = self.q_norm(query), self.k_norm(key)
            else:
                eps = eps_of(self.q_norm)
                weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
                options |= {**weights, "qk_norm_eps": eps, "weight_offset": offset}
        return rotary_embedding(query, key, cos, sin, **options)


def _attention_of(module: Any) -> Callable[..., Any]:
    """What the model's own forward would call by its configuration."""
    name = module.config._attn_implementation
    if name == _hf_attention.KEY:
        return _hf_attention.attention
    if name in (None, "eager"):
        return sys.modules[module._fastlm_original.__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else, so that its parameters may be used alone."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and not _has_any_global_hook() and "forward" not in vars(module)


class Model(Patched):
    """A transformers model; options: (the head's name in HEADS, keep_logits), None for one without a loss of ours."""

    @staticmethod
    def prepare(original: Any) -> dict[str, Any]:
        """What the class needs to know of the original's forward, read once."""
        forward = inspect.unwrap(original.forward)
        parameters = inspect.signature(forward).parameters
        names = set(forward.__code__.co_names)
        output = output_class(original)
        fields = () if output is None else dataclasses.fields(output)

        @functools.wraps(original.forward)
        def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
            return Model.forward(self, *args, **kwargs)

        return _masks_of_version_4(original) | {
            # generate and Trainer read the signature.
            "forward": signed,
            "_fastlm_names": tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:],
            "_fastlm_masks": bool(names & {"create_causal_mask", "create_sliding_window_causal_mask"})
            and {"attention_mask", "position_ids", "past_key_values"} <= set(parameters),
            "_fastlm_output": output,
            "_fastlm_rest": tuple(field.name for field in fields if field.name not in ("loss", "logits")),
            "_fastlm_loss_function": "loss_function" in names,
        }

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own, but for a plain causal mask, which is none, and the loss while training.

        A call for attention weights, or with a mask of heads, has the attention that the model had before.
        """
        given = dict(zip(self._fastlm_names, args, strict=False))
        if len(given) < len(args) or given.keys() & kwargs.keys():
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # which says what is wrong
        kwargs |= given
        if self.config._attn_implementation == _hf_attention.KEY:
            if kwargs.get("output_attentions") or kwargs.get("head_mask") is not None:
                with _attention_of_before(self):
                    return Model.forward(self, **kwargs)
            if self._fastlm_masks:
                _skip_mask(kwargs)
        if self._fastlm_options is not None and self.training and isinstance(kwargs.get("labels"), Tensor):
            head, keep_logits = self._fastlm_options
            shift = None if keep_logits else shift_of(self)
            if shift is not None and _head_is_ours(self, HEADS[head], kwargs):
                return _with_loss(self, HEADS[head], kwargs, shift)
        return super().forward(**kwargs)  # type: ignore[misc]


def _masks_of_version_4(original: Any) -> dict[str, Any]:
    """A method for those (OPT of transformers 4) that make their own mask, T x T for an attention they do not know."""
    theirs = getattr(original, "_update_causal_mask", None)
    if theirs is None:
        return {}

    def _update_causal_mask(
        self: Any, attention_mask: Any, tokens: Tensor, positions: Any, cache: Any, *rest: Any
    ) -> Any:
        # A static cache has keys that are not yet written: the mask has to say which.
        static = cache is not None and cache.is_compileable
        known = attention_mask is None or attention_mask.dim() == 2
        if self.config._attn_implementation != _hf_attention.KEY or static or not known:
            return theirs(self, attention_mask, tokens, positions, cache, *rest)
        return None if attention_mask is None else _hf_attention.padding(attention_mask)

    return {"_update_causal_mask": _update_causal_mask}


@contextlib.contextmanager
def _attention_of_before(model: Any) -> Iterator[None]:
    """Meanwhile the model's configuration, and so its masks and its layers, name the attention that it had before."""
    held = [vars(module) for module in model.modules() if ORIGINAL_CONFIG in vars(module)]
    for attributes in held:
        attributes["config"]._attn_implementation = attributes[ORIGINAL_CONFIG]._attn_implementation
    try:
        yield
    finally:
        for attributes in held:
            attributes["config"]._attn_implementation = _hf_attention.KEY


def _skip_mask(kwargs: dict[str, Any]) -> None:
    """Pass no mask where the model would make the plain causal one, or where the caller says where documents begin.

    Positions that the model counts itself hold no packed documents: looking for them would wait for the device.
    """
    told = kwargs.get("cu_seq_lens_q") is not None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return
    embeds = kwargs.get("inputs_embeds")
    tokens = kwargs.get("input_ids") if embeds is None else embeds[..., 0]
    if tokens is None or (kwargs.get("position_ids") is not None and not told):
        return
    kwargs["attention_mask"] = _hf_attention.no_mask(tokens)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(tokens.shape[-1], device=tokens.device)[None]


def output_class(original: Any) -> Any:
    """The class of results that the original's forward names, None if it names none."""
    from transformers.utils.generic import ModelOutput

    named = inspect.unwrap(original.forward).__annotations__.get("return")
    kinds = typing.get_args(named) or (named,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)), None)


def shift_of(model: Any) -> int | None:
    """By how many positions the model's loss shifts its labels; None for a loss that the user set."""
    if not model._fastlm_loss_function:
        return 0
    if hasattr(model, "_loss_function"):
        return None
    # Models without a type have transformers' default, the causal one.
    return {None: 1, "ForCausalLM": 1, "ForMaskedLM": 0}.get(getattr(model, "loss_type", None))


@dataclasses.dataclass(frozen=True)
class Head:
    """What stands between the last hidden state and the head's matrix, and the modules around both that are skipped.

    caches: whether a decoder keeps a cache while it trains.
    """

    before: Callable[[Any, Tensor], Tensor]
    around: tuple[str, ...] = ()
    caches: bool = True


def _head_is_ours(model: Any, head: Head, kwargs: dict[str, Any]) -> bool:
    """Whether the head is a plain matrix and the call asks for nothing but the loss."""
    matrix = model.get_output_embeddings()
    skipped = [matrix, *(model.get_submodule(name) for name in head.around)]
    if type(matrix) is not torch.nn.Linear or type(matrix.weight) not in (Tensor, torch.nn.Parameter):
        return False
    keep, wants_tuple = kwargs.get("logits_to_keep"), kwargs.get("return_dict")
    wants_tuple = not model.config.return_dict if wants_tuple is None else not wants_tuple
    return (
        all(map(_is_bare, skipped))
        and (keep is None or (isinstance(keep, int) and keep == 0))
        and not wants_tuple
        and _is_count(kwargs.get("num_items_in_batch"))
        and not _adds_routers_loss(model, kwargs)
    )


def _adds_routers_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a mixture of experts adds to its loss how unevenly they are used."""
    asked = kwargs.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


def _is_count(items: Any) -> bool:
    """Whether `linear_cross_entropy` knows it: the model's own loss divides by whatever can be divided by."""
    if isinstance(items, Tensor):
        return items.dim() == 0
    return items is None or type(items) is int


def _with_loss(model: Any, head: Head, kwargs: dict[str, Any], shift: int) -> Any:
    """The model's result with the loss and without logits: the head's product and the loss in one function."""
    inputs = {name: value for name, value in kwargs.items() if name not in _LOSS_ARGUMENTS}
    if not head.caches and "use_cache" in model._fastlm_names:
        inputs["use_cache"] = False
    # transformers 4's Gemma 3 is called its own base model.
    base = model.get_decoder() if model.base_model is model else model.base_model
    outputs = base(**inputs, return_dict=True)
    hidden = head.before(model, outputs[0])
    matrix = model.get_output_embeddings()
    labels, ignored, items = kwargs["labels"].to(hidden.device), -100, None
    if model._fastlm_loss_function:
        # The others' own loss knows neither.
        ignored, items = kwargs.get("ignore_index", -100), kwargs.get("num_items_in_batch")
    if shift:
        given = kwargs.get("shift_labels")
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:] if given is None else given
    loss = linear_cross_entropy(
        hidden.flatten(0, -2),
        matrix.weight,
        labels.reshape(-1).to(hidden.device),
        linear_bias=matrix.bias,
        ignore_index=ignored,
        num_items=items,
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )
    rest = {name: getattr(outputs, name, None) for name in model._fastlm_rest}
    return model._fastlm_output(loss=loss, logits=None, **rest)


def _roberta_head(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden)))


HEADS = {
    "linear": Head(lambda model, hidden: hidden),
    "bert": Head(
        lambda model, hidden: model.cls.predictions.transform(hidden), ("cls", "cls.predictions"), caches=False
    ),
    "roberta": Head(_roberta_head, ("lm_head",), caches=False),
}
ROLES = (RMSNorm, Activation, GatedMLP, RotaryAttention, Model)
