"""Checks of hyperparameters: which fields a `config.json` may have, and which values."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from llama4_eqx.config_file import field_names, listed, shown

# Far above any model's: a damaged file must not cause lists of billions of layers.
MAX_LAYERS = 10_000

_Config = TypeVar("_Config")

# Fields that never change the function, whatever their value. First what transformers writes into
# any config.json. The dtype of the weights is that of the tensors, so `dtype` isn't needed.
_HARMLESS = frozenset(
    "architectures attn_implementation auto_map chunk_size_feed_forward custom_pipelines dtype "
    "experts_implementation finetuning_task for_llm_compressor gradient_checkpointing id2label "
    "is_decoder label2id model_type name_or_path num_labels output_attentions output_hidden_states "
    "output_router_logits prefix problem_type return_dict router_aux_loss_coef sep_token_id "
    "task_specific_params tf_legacy_loss tie_last_hidden_states tokenizer_class torch_dtype "
    "torchscript transformers_version use_bfloat16 use_return_dict vision_feature_select_strategy "
    "xla_device "
    # Settings of text generation, which older versions wrote there too.
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation "
    "compile_config constraints continuous_batching_config decoder_start_token_id disable_compile "
    "diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "force_words_ids forced_bos_token_id forced_eos_token_id generation_config guidance_scale "
    "is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size "
    "max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size "
    "num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams "
    "num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size "
    "prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty "
    "return_dict_in_generate return_legacy_cache sequence_bias speculation_type stop_strings "
    "suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p typical_p "
    "use_cache use_model_defaults use_mtp watermarking_config "
    # What `checkpoints.foreign` notes, and checks itself.
    "llama4_eqx_parts".split()
)
# A leading underscore marks private state of the program that wrote the file; the other prefix is
# the bookkeeping of a training tool. transformers reads no hyperparameter from either.
_HARMLESS_PREFIXES = ("_", "unsloth_")
# Fields that change nothing at these values; at any other they ask for what isn't Llama 4.
_HARMLESS_AT: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_cross_attention": ((False, None), "cross-attention"),
    "attn_logit_softcapping": ((None,), "capped attention scores"),
    "cross_attention_hidden_size": ((None,), "cross-attention"),
    "embd_pdrop": ((0, None), "dropout of embeddings"),
    "final_logit_softcapping": ((None,), "capped logits"),
    "hidden_dropout": ((0, None), "dropout of hidden states"),
    "is_encoder_decoder": ((False, None), "an encoder-decoder"),
    "mlp_bias": ((False, None), "biases in the MLPs"),
    "mlp_layer_types": ((None,), "a choice of MLPs that isn't in moe_layers"),
    "multi_modal_projector_bias": ((False, None), "a bias in the projector"),
    "partial_rotary_factor": ((1, None), "RoPE on a part of each head"),
    "per_layer_config": ((None, {}), "layers of different hyperparameters"),
    "pretraining_tp": ((1, None), "matrix products in slices"),
    "compression_config": ((None,), "quantisation"),
    "quantization": ((None,), "quantisation"),
    "quantization_config": ((None,), "quantisation"),
    "pruned_heads": ((None, {}), "pruned attention heads"),
    "resid_pdrop": ((0, None), "dropout of residuals"),
    "router_jitter_noise": ((0, None), "noise on the router's inputs"),
    "sliding_window": ((None,), "sliding-window attention"),
    "tie_encoder_decoder": ((False, None), "an encoder-decoder"),
    "transformers_weights": ((None,), "a weights file of another name"),
    "use_sliding_window": ((False, None), "sliding-window attention"),
    "vision_feature_layer": ((-1, None), "features of an inner vision layer"),
}
# JAX computes positions and token ids in int32, and hyperparameters enter float32 arithmetic.
_INT_END = 2**31
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_INVALID = object()


def normalize(config: Any, part: str, *, positive: str, signed: str = "") -> None:
    """Checks the type and the range of every field and stores its plain Python value.

    Whole numbers may come as `48.0` (JSON has one type of number) or as NumPy scalars, lists as any
    list, tuple or range; strings are never numbers, booleans are never integers. Numbers must not
    be negative, except the fields named in `signed`; those named in `positive` must not be 0.

    Raises one `ValueError` that lists every invalid field; `part` says where they are.
    """
    broken = []
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        sign = "positive" if field.name in positive.split() else "non-negative"
        sign = "" if field.name in signed.split() else sign
        value = _converted(given, field.type, sign)
        if value is _INVALID:
            expected = _description(field.type, sign)
            broken.append(f"{field.name} must be {expected}, but is {shown(given)}")
        else:
            object.__setattr__(config, field.name, value)
    _raise(part, broken)


def require(part: str, rules: Iterable[tuple[bool, str]]) -> None:
    """Raises one `ValueError` that lists the sentence of every rule that doesn't hold."""
    _raise(part, [sentence for holds, sentence in rules if not holds])


def refuse_unknown(fields: Mapping[str, Any], where: str) -> None:
    """Raises a `ValueError` unless all these fields are known to change nothing."""
    unknown = []
    for name, value in fields.items():
        if name in _HARMLESS_AT:
            values, meaning = _HARMLESS_AT[name]
            if value not in values:
                raise ValueError(
                    f"{where} has {name} = {shown(value)}, which asks for {meaning}, but only "
                    f"{' or '.join(map(shown, values))} is supported."
                )
        elif name not in _HARMLESS and not str(name).startswith(_HARMLESS_PREFIXES):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{where} has fields that this package doesn't know: {field_names(unknown)}. "
            "Remove them if they change nothing, or ask for support if they do."
        )


def field_set(cls: type) -> frozenset[str]:
    """The names of a config's fields."""
    return frozenset(field.name for field in dataclasses.fields(cls))


def from_known(cls: type[_Config], fields: Mapping[str, Any]) -> _Config:
    """A config from those of the fields that it has."""
    return cls(**{name: fields[name] for name in field_set(cls) & fields.keys()})


def without_fields_of(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a config doesn't have."""
    return {name: value for name, value in fields.items() if name not in field_set(cls)}


def _raise(part: str, broken: list[str]) -> None:
    if broken:
        raise ValueError(f"In {part}, {listed(broken, '; ', limit=5)}.")


def _converted(value: Any, kind: Any, sign: str) -> Any:
    """The value as the annotated type, or `_INVALID`."""
    options = typing.get_args(kind)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(kind, types.UnionType):
        found = (_converted(value, option, sign) for option in options)
        return next((x for x in found if x is not _INVALID), _INVALID)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple | range):
            return _INVALID
        items = tuple(_converted(item, options[0], sign) for item in value)
        return _INVALID if _INVALID in items else items
    if kind in (int, float):
        return _number(value, kind, sign)
    if kind is bool:
        return value if isinstance(value, bool) else _INVALID
    return value if isinstance(value, kind) else _INVALID


def _number(value: Any, kind: type, sign: str) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _INVALID
    if (sign == "positive" and value <= 0) or (sign == "non-negative" and value < 0):
        return _INVALID
    if kind is int:
        return int(value) if abs(value) < _INT_END and value == int(value) else _INVALID
    in_range = value == 0 or _TINY <= abs(value) <= _HUGE
    return float(value) if in_range else _INVALID


def _description(kind: Any, sign: str) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_description(option, sign) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        noun = "strings" if typing.get_args(kind)[0] is str else f"{sign} whole numbers below 2³¹"
        return f"a list of {noun}"
    if kind in (int, float):
        noun = "whole number below 2³¹" if kind is int else "finite number that float32 holds"
        return f"a {sign} {noun}" if sign else f"a {noun}"
    names = {bool: "true or false", str: "a string", types.NoneType: "null"}
    return names.get(kind) or f"a {kind.__name__}"
