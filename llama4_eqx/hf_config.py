"""Reading and writing `config.json`: its spellings, and the strictness about its fields.

Works on plain dicts; `config.py` turns them into configs. Sources: the released files of Scout and
Maverick, and what `transformers` 4.51 to 5.x writes.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

Source = Mapping[str, Any] | str | os.PathLike[str]

# Fields of released files that change nothing here, by part of the file.
_IGNORED_ANYWHERE = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attn_implementation "
    "cache_implementation chunk_size_feed_forward dtype for_llm_compressor id2label "
    "is_encoder_decoder label2id model_type output_attentions output_hidden_states "
    "output_router_logits problem_type return_dict router_aux_loss_coef router_jitter_noise "
    "torch_dtype transformers_version use_cache".split()
)
_IGNORED_IN_VISION = _IGNORED_ANYWHERE | frozenset(
    "multi_modal_projector_bias vision_feature_layer vision_feature_select_strategy".split()
)
_IGNORED_AT_TOP = _IGNORED_IN_VISION | {"initializer_range"}
_PER_LAYER = ("no_rope_layers", "moe_layers", "layer_types")
_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_config(source: Source) -> Mapping[str, Any]:
    """The content of a `config.json`: a dict, the file, or the folder that holds it."""
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: give a config.json or the folder with it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, but holds a {type(raw).__name__}.")
    return raw


def text_fields(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`TextConfig`'s arguments from a `text_config`, with `rope_scaling` as a dict or None.

    `known`, here and below, gives each field's declared type.
    """
    fields = _with_rope(raw)
    if "attn_temperature_tuning" in fields:  # the releases say `true` or `4`
        fields["attn_temperature_tuning"] = bool(fields["attn_temperature_tuning"])
    # transformers reads an empty list of MoE layers as "none is", of the others as "the default".
    for name in ("no_rope_layers", "layer_types"):
        if not fields.get(name):
            fields.pop(name, None)
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("head_dim", 0) is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return _checked(fields, known, _IGNORED_ANYWHERE, "text_config")


def vision_fields(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`VisionConfig`'s arguments from a `vision_config`."""
    if raw.get("multi_modal_projector_bias"):
        raise ValueError(
            "multi_modal_projector_bias is true, but no released projector has a bias."
        )
    fields = _with_rope(raw)
    if fields.pop("rope_scaling", None) is not None:
        raise ValueError("vision_config asks for RoPE scaling, which the vision encoder lacks.")
    return _checked(fields, known, _IGNORED_IN_VISION, "vision_config")


def top_fields(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`Llama4Config`'s own arguments from a whole `config.json`."""
    return _checked(raw, known, _IGNORED_AT_TOP, "config.json")


def written(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields as the releases spell them."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    scaling = plain.get("rope_scaling")
    if isinstance(scaling, dict):
        plain["rope_scaling"] = {"rope_type": "llama3", **scaling}
    # Absent means "the default" to every reader; null is refused by some.
    return {k: v for k, v in plain.items() if v is not None or k not in _PER_LAYER}


def as_declared(value: Any, kind: Any) -> Any:
    """A value of JSON as the dataclass field of this type wants it."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if kind is float else value


def _with_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of RoPE as `rope_theta` and `rope_scaling`."""
    fields = dict(raw)
    newer = fields.pop("rope_parameters", None) or {}
    older = fields.pop("rope_scaling", None) or {}
    if newer and older and newer != older:
        raise ValueError("rope_parameters and rope_scaling disagree: keep one of them.")
    rope = dict(newer or older)
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope}
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        fields["rope_theta"] = theta
    if not kinds <= {"default", "llama3"} or len(kinds) > 1:
        raise ValueError(f"RoPE type must be 'default' or 'llama3', but is {sorted(kinds)}.")
    if kinds == {"llama3"} or (rope and not kinds):
        if set(rope) != set(_SCALING):
            raise ValueError(
                f"llama3 RoPE scaling needs exactly {_SCALING}, but has {sorted(rope)}."
            )
        fields["rope_scaling"] = rope
    elif rope:
        raise ValueError(f"Default RoPE takes no scaling, but the config has {sorted(rope)}.")
    return fields


def _checked(
    fields: Mapping[str, Any], known: Mapping[str, Any], ignored: Collection[str], where: str
) -> dict[str, Any]:
    if fields.get("quantization_config"):
        raise ValueError(
            "The checkpoint is quantised (quantization_config), which isn't supported yet: "
            "use the bf16 release."
        )
    unknown = sorted(set(fields) - set(known) - set(ignored) - {"quantization_config"})
    if unknown:
        raise ValueError(
            f"{where} has fields that this package doesn't know: {', '.join(unknown)}. "
            "Remove them if they change nothing, or ask for support if they do."
        )
    return {k: as_declared(v, known[k]) for k, v in fields.items() if k in known}
