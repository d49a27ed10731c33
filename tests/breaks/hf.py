"""Breaks of hf: its attention and mask functions, its modules, what it finds and undoes."""

from __future__ import annotations

from breaks import Mutation

_STEP = "test_hf_calls.py::test_one_step_of_a_model_with_everything[{}]"
_CALLS = "test_hf_calls.py::"

MUTATIONS = (
    # _hf_attention.py
    Mutation(
        "padding left out of hf's attention",
        "_hf_attention.py",
        'options["key_mask"] = attention_mask.bool()',
        "pass",
        _STEP.format("left"),
    ),
    Mutation(
        "hf's windows one key too wide",
        "_hf_attention.py",
        "else sliding_window - causal",
        "else sliding_window",
        _STEP.format("plain"),
    ),
    Mutation(
        "hf's bidirectional windows one key too narrow",
        "_hf_attention.py",
        "else sliding_window - causal",
        "else sliding_window - 1",
        _CALLS + "test_attention_that_is_bidirectional_by_half_is_left_alone",
    ),
    Mutation(
        "hf's scores without a cap",
        "_hf_attention.py",
        '"scale": scaling, "softcap": softcap,',
        '"scale": scaling, "softcap": None,',
        _STEP.format("plain"),
    ),
    Mutation(
        "the mask function not registered",
        "_hf_attention.py",
        "transformers.AttentionMaskInterface.register(KEY, mask)",
        "pass",
        _STEP.format("packed"),
    ),
    Mutation(
        "hf's cross-attention causal",
        "_hf_attention.py",
        'getattr(module, "is_causal", True) and not getattr(module, "is_cross_attention", False)',
        "True",
        _CALLS + "test_a_decoder_with_cross_attention[gpt2-GPT2LMHeadModel]",
    ),
    # _hf_modules.py
    Mutation(
        "hf's labels not shifted",
        "_hf_modules.py",
        '"ForCausalLM": 1,',
        '"ForCausalLM": 0,',
        _STEP.format("plain"),
    ),
    Mutation(
        "hf's loss without the number of items",
        "_hf_modules.py",
        "num_items=items,",
        "num_items=None,",
        _CALLS + "test_counts_of_labels_of_any_type_divide_the_loss",
    ),
    Mutation(
        "positions counted along the choices",
        "_hf_modules.py",
        "torch.arange(tokens.shape[-1]",
        "torch.arange(tokens.shape[1]",
        _CALLS + "test_choices_count_positions_along_the_tokens[shape0]",
    ),
    # hf.py
    Mutation(
        "gemma2's norms without their offset",
        "hf.py",
        '"gemma2": Family(weight_offset=1.0)',
        '"gemma2": Family()',
        _STEP.format("plain"),
    ),
    Mutation(
        "a class made since taken for none",
        "hf.py",
        "if type(module) is not _patched_class(module):",
        "if False:",
        _CALLS + "test_a_class_made_from_a_patched_one_is_reported_and_not_half_undone",
    ),
)
