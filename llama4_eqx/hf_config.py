"""The parts of a `config.json` and the spellings of its fields, read and written.

Works on plain dicts; `config.py` turns them into configs. Sources: the released files of Scout and
Maverick, and what `transformers` 4.51 to 5.24 reads and writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama4_eqx.config_file import field_names, shown

_QUANTIZED = ("quantization_config", "compression_config", "quantization")
_READABLE = ("compressed-tensors", "bitsandbytes")

# Fields that only Llama 4 has: they identify a file that lacks a model_type.
_OWN = frozenset(
    "attention_chunk_size attn_scale attn_temperature_tuning floor_scale intermediate_size_mlp "
    "interleave_moe_layer_step no_rope_layer_interval no_rope_layers pixel_shuffle_ratio "
    "projector_input_dim projector_output_dim vision_output_dim".split()
)
_TEXT_ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration", "Llama4TextModel")
_VISION_ARCHITECTURES = ("Llama4VisionModel",)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
IMAGE_TOKENS = ("boi_token_index", "eoi_token_index", "image_token_index")
_PER_LAYER = ("no_rope_layers", "moe_layers", "layer_types")
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What transformers takes a missing field for, where that isn't the released value.
_MISSING_IN_TEXT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_MISSING_IN_VISION = {"hidden_size": 768, "image_size": 448, "vision_output_dim": 7680}


class Parts(NamedTuple):
    """A `config.json`'s own fields and those of its parts."""

    top: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None
    identified: bool  # whether the file says that it is Llama 4's, or has a field that only it has


def parts(raw: Mapping[str, Any]) -> Parts:
    """Splits a `config.json`, whole or text-only, and refuses other families', and quantised ones
    that can't be read.

    A whole one without a `vision_config` is a text-only model.
    """
    raw = _without_readable_quantization(raw)
    types = ("llama4", "llama4_text")
    identified = _check_family(raw, "config.json", types, _TEXT_ARCHITECTURES)
    kind = raw.get("model_type") or ("llama4" if is_whole(raw) else "llama4_text")
    rest = {k: v for k, v in raw.items() if k not in ("text_config", "vision_config")}
    text, vision = raw.get("text_config"), raw.get("vision_config")
    if kind == "llama4_text":
        for name in ("text_config", "vision_config"):
            if raw.get(name) is not None:
                raise ValueError(
                    f"config.json is of model_type 'llama4_text', a text decoder alone, but has a "
                    f"{name}: the model_type of a whole model is 'llama4'."
                )
        return Parts(rest, rest, None, identified)
    if text is None:
        raise ValueError(
            "config.json is a whole model's, but has no text_config: put the text decoder's fields "
            "there, or set model_type to 'llama4_text' if the file has nothing else."
        )
    _require_object(text, "text_config")
    identified |= _check_family(text, "text_config", ("llama4_text",), _TEXT_ARCHITECTURES)
    if vision is not None:
        vision = vision_part(vision)
        identified |= bool(_OWN & vision.keys())
    return Parts(rest, text, vision, identified)


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of quantised tensors, if they are of a kind that can be read: those of
    the libraries `compressed-tensors` and `bitsandbytes`. None if they aren't quantised."""
    for part in (raw, raw.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping) and settings.get("quant_method") in _READABLE:
            return settings
    return None


def _without_readable_quantization(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    if quantization(raw) is None:
        return raw
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        raw = {**raw, "text_config": {k: v for k, v in text.items() if k != _QUANTIZED[0]}}
    return {k: v for k, v in raw.items() if k != _QUANTIZED[0]}


def vision_part(raw: Any) -> Mapping[str, Any]:
    """A `vision_config`, once it is known to be Llama 4's."""
    _require_object(raw, "vision_config")
    _check_family(raw, "vision_config", ("llama4_vision_model",), _VISION_ARCHITECTURES)
    return raw


def is_whole(raw: Mapping[str, Any]) -> bool:
    """Whether a config has parts."""
    return raw.get("model_type") == "llama4" or bool({"text_config", "vision_config"} & raw.keys())


def text_fields(text: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`TextConfig`'s arguments from a text part, with `rope_scaling` as a dict or None.

    The file's own token ids go before those of its text part, as in `transformers`' `generate`.
    """
    fields = _MISSING_IN_TEXT | _with_rope(text, "text_config")
    for name in IMAGE_TOKENS:
        for spelling in (name, _alias(name)):
            fields.pop(spelling, None)
    for name in TOKEN_IDS:
        if top.get(name) is not None:
            fields[name] = top[name]
        if fields[name] == -1:  # an older spelling of "there is none"
            fields[name] = None
    tuning = fields.get("attn_temperature_tuning")
    if isinstance(tuning, int) and tuning >= 0:  # releases have `true` or `4`
        fields["attn_temperature_tuning"] = bool(tuning)
    # transformers reads an empty list of MoE layers as "none", of the others as "the default".
    for name in ("no_rope_layers", "layer_types"):
        if fields.get(name) in (None, [], ()):
            fields.pop(name, None)
    return fields


def vision_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`VisionConfig`'s arguments from a vision part."""
    fields = _MISSING_IN_VISION | _with_rope(raw, "vision_config")
    if fields.pop("rope_scaling", None) is not None:
        raise ValueError("vision_config asks for RoPE scaling, which the vision encoder lacks.")
    return fields


def image_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The image tokens' ids under one spelling: `transformers` reads `image_token_id` as well."""
    found = {}
    for name in IMAGE_TOKENS:
        values = [fields[key] for key in (name, _alias(name)) if key in fields]
        if len(values) == 2 and values[0] != values[1]:
            raise disagreement(name, values[0], _alias(name), values[1])
        if values:
            found[name] = values[0]
    return found


def unidentified(fields: Mapping[str, Any]) -> ValueError:
    """The error for a config that nothing shows to be Llama 4's."""
    return ValueError(
        "config.json has no model_type and no field that only Llama 4 has, so it may be another "
        f"family's (its fields: {field_names(fields)}): if it is Llama 4's, add "
        '"model_type": "llama4_text".'
    )


def disagreement(name: str, value: Any, other: str, other_value: Any) -> ValueError:
    """The error for two fields that must say the same."""
    return ValueError(
        f"{name} is {shown(value)}, but {other} is {shown(other_value)}: keep the right one."
    )


def written(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields as the releases spell them."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    scaling = plain.get("rope_scaling")
    if isinstance(scaling, dict):
        plain["rope_scaling"] = {"rope_type": "llama3", **scaling}
    # Absent means "the default" to every reader; null is refused by some.
    return {k: v for k, v in plain.items() if v is not None or k not in _PER_LAYER}


def _alias(name: str) -> str:
    return name.replace("_index", "_id")


def _require_object(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, but is {shown(value)}.")


def _check_family(
    raw: Mapping[str, Any], where: str, model_types: Sequence[str], architectures: Sequence[str]
) -> bool:
    """Refuses what isn't Llama 4's or can't be dequantised; returns whether it shows to be its."""
    for name in _QUANTIZED:
        if raw.get(name) is not None:
            settings = raw[name] if isinstance(raw[name], Mapping) else {}
            method = settings.get("quant_method")
            method = "an unnamed method" if method is None else shown(method)
            raise ValueError(
                f"The checkpoint is quantised with {method} ({name} in {where}), which isn't "
                f"supported: use the bf16 release, or one of {' or '.join(_READABLE)}."
            )
    if "peft_type" in raw:
        raise ValueError(
            f"{where} describes an adapter ({shown(raw['peft_type'])}), not a model: merge the "
            "adapter into its base model and load that."
        )
    expected = " or ".join(map(repr, model_types))
    kind, names = raw.get("model_type"), raw.get("architectures")
    if kind == "llama4_vision_model" and kind not in model_types:
        raise ValueError(
            f"{where} is a vision encoder's alone (model_type 'llama4_vision_model'), but a text "
            f"decoder's is needed, of model_type {expected}."
        )
    if kind is not None and kind not in model_types:
        raise ValueError(
            f"{where} is of another family, model_type {shown(kind)}, but only Llama 4's can be "
            f"read, of model_type {expected}."
        )
    if names is not None and not isinstance(names, list | tuple):
        raise ValueError(f"architectures in {where} must be a list, but is {shown(names)}.")
    # A class that PyTorch's FSDP wrapped is saved under a longer name.
    known = {prefix + name for name in architectures for prefix in ("", "FSDP")}
    foreign = [name for name in names or () if not isinstance(name, str) or name not in known]
    if foreign:
        raise ValueError(
            f"{where} is of another family, architectures {shown(names)}, but only Llama 4's can "
            f"be read: {', '.join(architectures)}."
        )
    return kind is not None or bool(names) or bool(_OWN & raw.keys())


def _with_rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both spellings of RoPE as `rope_theta` and `rope_scaling`."""
    fields = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_parameters")}
    found = {
        name: _rope(raw[name], fields.get("rope_theta"), f"{name} in {where}")
        for name in ("rope_scaling", "rope_parameters")
        if raw.get(name) not in (None, {})
    }
    if not found:
        return fields
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        both = raw["rope_scaling"], raw["rope_parameters"]
        raise disagreement("rope_scaling", both[0], "rope_parameters", both[1])
    theta, scaling = next(iter(found.values()))
    if fields.get("rope_theta") not in (None, theta):
        inside = f"that inside {next(iter(found))}"
        raise disagreement("rope_theta", fields["rope_theta"], inside, theta)
    if theta is not None:
        fields["rope_theta"] = theta
    return fields | {"rope_scaling": scaling}


def _rope(settings: Any, theta: Any, where: str) -> tuple[Any, dict[str, Any] | None]:
    """The base and the scaling (None: plain RoPE) of one spelling of RoPE."""
    _require_object(settings, where)
    rest = {name: value for name, value in settings.items() if value is not None}
    kinds = [rest.pop(name) for name in ("rope_type", "type") if name in rest]
    theta = rest.pop("rope_theta", theta)
    if rest.get("partial_rotary_factor") == 1:
        del rest["partial_rotary_factor"]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise disagreement(f"rope_type of {where}", kinds[0], "type", kinds[1])
    names = field_names(rest)
    if not kinds and rest:
        raise ValueError(f"{where} has no rope_type, but has {names}: add 'llama3' if it is that.")
    if kinds and kinds[0] not in ("default", "llama3"):
        raise ValueError(f"{where} must be of type 'default' or 'llama3', not {shown(kinds[0])}.")
    if not kinds or kinds[0] == "default":
        if rest:
            raise ValueError(
                f"{where} is of type 'default', which takes no scaling, but has {names}."
            )
        return theta, None
    if not set(_SCALING[:3]) <= rest.keys() <= set(_SCALING):
        raise ValueError(
            f"{where} is of type 'llama3', which needs exactly {', '.join(_SCALING)}, but has "
            f"{names}."
        )
    return theta, rest
