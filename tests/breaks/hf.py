"""Breaks of what drops into others' models: hf, `patch`, the kernel loader's layers, the check of a whole model."""

from __future__ import annotations

from breaks import Mutation

_STEP = "test_hf_calls.py::test_one_step_of_a_model_with_everything[{}]"
_CALLS = "test_hf_calls.py::"
_LEFT = "test_hf_left_alone.py::"
_OWN = _LEFT + "test_models_with_something_of_their_own_keep_their_numbers[{}]"
_CELL = "test_hf.py::test_loss_states_logits_and_gradients_are_the_models_own[{}]"
_HUB = "test_hub.py::"
_CHECK = "test_check_model.py::"

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
    Mutation(
        "merged gate and up taken for each other",
        "_hf_modules.py",
        "gate, up = self.gate_up_proj",
        "up, gate = self.gate_up_proj",
        _CELL.format("phi3-left"),
        interpret=False,
    ),
    Mutation(
        "merged q, k and v split in thirds",
        "_hf_modules.py",
        "merged.split((merged.shape[-1] - 2 * keys, keys, keys), dim=-1)",
        "merged.chunk(3, dim=-1)",
        _CELL.format("phi3-left"),
        interpret=False,
    ),
    Mutation(
        "all heads' norms left out",
        "_hf_modules.py",
        'if hasattr(self, "q_norm") and not norms_heads(self):',
        "if False:",
        _CELL.format("olmo2-left"),
        interpret=False,
    ),
    Mutation(
        "a soft-cap passed on that the model does not",
        "_hf_modules.py",
        "if self._fastlm_softcaps:",
        'if getattr(self, "attn_logit_softcapping", None):',
        _LEFT + "test_a_soft_cap_that_a_model_does_not_apply_is_not_applied",
        interpret=False,
    ),
    Mutation(
        "the routers' loss forgotten",
        "_hf_modules.py",
        "and not _adds_routers_loss(model, kwargs)",
        "",
        _LEFT + "test_a_mixture_asked_for_its_routers_adds_their_loss[mixtral]",
        interpret=False,
    ),
    # hf.py
    Mutation(
        "rotary positions where the model has none",
        "hf.py",
        'if not getattr(module, "use_rope", True):',
        "if False:",
        _CELL.format("smollm3-left"),
        interpret=False,
    ),
    Mutation(
        "OLMo 2's norms widen",
        "hf.py",
        '"olmo2": Family(keeps_dtype=True)',
        '"olmo2": Family()',
        "test_hf_whole.py::test_norms_keep_the_dtype_of_their_own",
        interpret=False,
    ),
    Mutation(
        "another model's configuration kept",
        "hf.py",
        "    _leave_foreign_configs(model)\n    return model",
        "    return model",
        "test_hf_whole.py::test_a_model_of_a_patched_ones_configuration_can_be_patched_and_unpatched[from_config]",
        interpret=False,
    ),
    Mutation(
        "gemma2's norms without their offset",
        "hf.py",
        '"gemma2": Family(weight_offset=1.0, keeps_dtype=True)',
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
    Mutation(
        "a subclass's norm taken for its parent's",
        "hf.py",
        "family is None or not _is_transformers(kind) or not has_eps",
        "family is None or not has_eps",
        _LEFT + "test_what_is_not_known_is_left_alone_and_reported",
    ),
    Mutation(
        "a forward of an instance's own passed over",
        "hf.py",
        'if made is not None and "forward" in vars(module):',
        "if False:",
        _LEFT + "test_what_is_not_known_is_left_alone_and_reported",
    ),
    Mutation(
        "a classifier's loss taken for a language model's",
        "hf.py",
        'switches["loss"] and kind.__name__.endswith(_WITH_LOSS) and',
        'switches["loss"] and',
        _LEFT + "test_heads_of_other_kinds_keep_their_loss_and_say_so[BertForTokenClassification]",
    ),
    Mutation(
        "a head of whole numbers read as a matrix",
        "_hf_modules.py",
        "type(matrix) is not torch.nn.Linear or ",
        "",
        _OWN.format("_in_eight_bits-True"),
    ),
    Mutation(
        "hooks around the head passed over",
        "_hf_modules.py",
        "all(map(_is_bare, skipped))",
        "True",
        _CALLS + "test_a_hook_around_the_head_is_called[bert-cls]",
    ),
    Mutation(
        "attention weights asked of a kernel",
        "_hf_modules.py",
        'kwargs.get("output_attentions") or',
        "False or",
        _LEFT + "test_a_call_for_attention_weights_has_the_models_own_attention[llama-eager]",
    ),
    Mutation(
        "the attention of before left in place",
        "_hf_modules.py",
        'attributes["config"]._attn_implementation = _hf_attention.KEY',
        "pass",
        _LEFT + "test_a_call_for_attention_weights_has_the_models_own_attention[llama-eager]",
    ),
    # patching.py
    Mutation(
        "patch changes what has a forward of its own",
        "patching.py",
        ' and "forward" not in vars(child)',
        "",
        "test_patch.py::test_a_single_module_and_an_instance_with_its_own_forward",
    ),
    Mutation(
        "patch stops below the first level",
        "patching.py",
        "for child in module.modules():",
        "for child in (module, *module.children()):",
        "test_patch.py::test_patched_model_computes_the_same_with_the_same_parameters",
    ),
    # layers.py
    Mutation(
        "Gemma's layer without its offset",
        "layers.py",
        "weight_offset=1.0",
        "weight_offset=0.0",
        _HUB + "test_a_layer_equals_the_module_it_stands_in_for[RMSNormZeroCentered]",
    ),
    Mutation(
        "a layer of another dtype than its module",
        "layers.py",
        "if x.dtype == weight.dtype:",
        "if True:",
        _HUB + "test_a_layer_equals_the_module_it_stands_in_for[RMSNorm bf16 input]",
    ),
    # hub.py
    Mutation(
        "every content one module",
        "hub.py",
        'f"{name}:{digest};" for',
        'f"{name};" for',
        _HUB + "test_another_content_is_another_module",
    ),
    Mutation(
        "a repository written over another",
        "hub.py",
        "if directory.exists() or directory.is_symlink():",
        "if False:",
        _HUB + "test_bad_arguments_are_one_line_and_write_nothing[a directory that exists]",
    ),
    # check_model.py
    Mutation(
        "a missing gradient passes",
        "check_model.py",
        'Compared(name, float("nan"), 0.0)',
        "Compared(name, 0.0, 0.0)",
        _CHECK + "test_a_wrong_model_fails[_drop_gradient]",
    ),
    Mutation(
        "parameters counted as kept for backward",
        "check_model.py",
        "if storage.data_ptr() not in own:",
        "if True:",
        _CHECK + "test_bytes_kept_for_backward_are_counted_once",
    ),
    Mutation(
        "padding longer than a window",
        "check_model.py",
        'min(tokens // 4, (getattr(config, "sliding_window", None) or tokens) - 1)',
        "tokens // 4",
        _CHECK + "test_padding_is_shorter_than_a_window",
        interpret=False,
    ),
    Mutation(
        "a ratio of any times",
        "check_model.py",
        "self.high - self.low <= _WIDEST_SPREAD * self.median",
        "True",
        _CHECK + "test_a_ratio_of_times_says_something_or_is_not_printed[under load]",
        interpret=False,
    ),
)
