"""The text decoder's hyperparameters, under Hugging Face's names; see `config.py`."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

from llama4_eqx import config_checks, config_file, hf_config


def determine_is_nope_layer(layer_id: int, nope_layer_interval: int) -> bool:
    """Whether the layer has no position embedding: one in `nope_layer_interval` (0: none)."""
    return nope_layer_interval > 0 and (layer_id + 1) % nope_layer_interval == 0


def determine_is_moe_layer(layer_id: int, interleave_moe_layer_step: int) -> bool:
    """Whether the layer is a mixture of experts: one in `interleave_moe_layer_step` (0: none)."""
    return interleave_moe_layer_step > 0 and (layer_id + 1) % interleave_moe_layer_step == 0


@no_type_check  # __post_init__ checks the types, with better errors
@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the slow RoPE frequencies: wavelengths above
    `original_max_position_embeddings / low_freq_factor` turn `factor` times slower, those below
    `original_max_position_embeddings / high_freq_factor` stay, and those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        names = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
        config_checks.normalize(self, "rope_scaling", positive=names)
        ordered = self.low_freq_factor <= self.high_freq_factor
        config_checks.require(
            "rope_scaling",
            [(ordered, "low_freq_factor must not exceed high_freq_factor")],
        )


@no_type_check  # __post_init__ checks the types, with better errors
@dataclass(frozen=True)
class TextConfig:
    """The text decoder's hyperparameters. `no_rope_layers` (1 = RoPE, 0 = NoPE), `moe_layers`
    (indices) and `layer_types` override the intervals; the `layer_*` methods say what holds."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16384
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    attention_chunk_size: int | None = 8192
    attn_temperature_tuning: bool = True
    attn_scale: float = 0.1
    floor_scale: int = 8192
    use_qk_norm: bool = True
    no_rope_layer_interval: int = 4
    no_rope_layers: tuple[int, ...] | None = None
    layer_types: tuple[str, ...] | None = None
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 200000
    eos_token_id: int | tuple[int, ...] | None = (200001, 200007, 200008)
    pad_token_id: int | None = 200018

    def __post_init__(self) -> None:
        config_checks.normalize(
            self,
            "text_config",
            positive="vocab_size hidden_size intermediate_size intermediate_size_mlp "
            "num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings rms_norm_eps rope_theta attention_chunk_size floor_scale "
            "num_local_experts num_experts_per_tok",
            signed="attn_scale",
        )
        layers = self.num_hidden_layers
        chunk, kinds = self.attention_chunk_size, self.layer_types
        unknown_kinds = set(kinds or ()) - {"chunked_attention", "full_attention"}
        config_checks.require(
            "text_config",
            [
                (
                    layers <= config_checks.MAX_LAYERS,
                    f"num_hidden_layers must be at most {config_checks.MAX_LAYERS}, but is "
                    f"{layers}",
                ),
                (
                    self.hidden_act == "silu",
                    f"hidden_act must be 'silu', but is {config_file.shown(self.hidden_act)}",
                ),
                (
                    self.num_attention_heads % self.num_key_value_heads == 0,
                    f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                    f"num_key_value_heads ({self.num_key_value_heads})",
                ),
                (self.head_dim % 2 == 0, f"head_dim must be even for RoPE, but is {self.head_dim}"),
                (
                    self.num_experts_per_tok <= self.num_local_experts,
                    f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                    f"num_local_experts ({self.num_local_experts})",
                ),
                (
                    self.attention_dropout < 1,
                    f"attention_dropout must be in [0, 1), but is {self.attention_dropout}",
                ),
                (
                    set(self.no_rope_layers or ()) <= {0, 1},
                    "no_rope_layers must hold 1 (RoPE) or 0 (none) for each layer, but is "
                    f"{config_file.shown(self.no_rope_layers)}",
                ),
                (
                    self.no_rope_layers is None or len(self.no_rope_layers) >= layers,
                    f"no_rope_layers must have an entry for each of the {layers} layers, but has "
                    f"{len(self.no_rope_layers or ())}",
                ),
                (
                    kinds is None or len(kinds) >= layers,
                    f"layer_types must have an entry for each of the {layers} layers, but has "
                    f"{len(kinds or ())}",
                ),
                (
                    not unknown_kinds,
                    "layer_types must be 'chunked_attention' or 'full_attention', but have "
                    f"{config_file.shown(sorted(unknown_kinds))}",
                ),
                (
                    chunk is not None or "chunked_attention" not in (kinds or ()),
                    "layer_types asks for chunked_attention, but attention_chunk_size is null",
                ),
                (
                    all(i < layers for i in self.moe_layers or ()),
                    f"moe_layers must be indices below {layers}, but are "
                    f"{config_file.shown(self.moe_layers)}",
                ),
                (
                    self.no_rope_layer_interval > 0,
                    "no_rope_layer_interval must be positive, but is 0: for RoPE in every layer "
                    "set no_rope_layers to a 1 for each",
                ),
            ],
        )
        # Keep the spelling that transformers reads: it refuses entries beyond the last layer, and a
        # step of 0 unless moe_layers is given.
        for name in ("no_rope_layers", "layer_types"):
            entries = getattr(self, name)
            object.__setattr__(self, name, entries and entries[:layers])
        if self.interleave_moe_layer_step == 0 and self.moe_layers is None:
            object.__setattr__(self, "moe_layers", ())

    def layer_is_nope(self, layer_id: int) -> bool:
        """Whether this layer has no position embedding."""
        if self.no_rope_layers is not None:
            return not self.no_rope_layers[layer_id]
        return determine_is_nope_layer(layer_id, self.no_rope_layer_interval)

    def layer_is_moe(self, layer_id: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        if self.moe_layers is not None:
            return layer_id in self.moe_layers
        return determine_is_moe_layer(layer_id, self.interleave_moe_layer_step)

    def layer_chunk_size(self, layer_id: int) -> int | None:
        """The tokens in one of this layer's attention chunks, or None where it sees everything."""
        if self.layer_types is not None:
            chunked = self.layer_types[layer_id] == "chunked_attention"
        else:
            chunked = not self.layer_is_nope(layer_id)
        return self.attention_chunk_size if chunked else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a generated text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @classmethod
    def from_hf(cls, source: config_file.Source) -> "TextConfig":
        """Reads a text-only `config.json` or the text part of a whole one."""
        with config_file.reading(source) as raw:
            return cls._from_parts(hf_config.parts(raw))

    @classmethod
    def _from_parts(cls, parts: hf_config.Parts) -> "TextConfig":
        fields = hf_config.text_fields(parts.text, parts.top)
        config = cls._from_fields(fields)
        if not parts.identified:
            raise hf_config.unidentified(parts.text)
        config_checks.refuse_unknown(config_checks.without_fields_of(cls, fields), "text_config")
        # transformers reads no copies of these fields beside text_config, so they must be equal.
        copies = hf_config.text_fields(parts.top, {})
        config_checks.refuse_unknown(config_checks.without_fields_of(cls, copies), "config.json")
        repeated = cls._from_fields(fields | copies)
        read_apart = {*hf_config.TOKEN_IDS, "tie_word_embeddings", "initializer_range"}
        for name in sorted((config_checks.field_set(cls) & copies.keys()) - read_apart):
            inner, outer = getattr(config, name), getattr(repeated, name)
            if inner != outer:
                raise hf_config.disagreement(f"{name} in text_config", inner, "beside it", outer)
        return config

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "TextConfig":
        fields = dict(fields)
        heads = fields.get("num_attention_heads", cls.num_attention_heads)
        if fields.get("num_key_value_heads", heads) is None:
            fields["num_key_value_heads"] = heads
        if fields.get("head_dim", cls.head_dim) is None:
            # If that fails, the checks of values name the invalid fields.
            with contextlib.suppress(TypeError, ArithmeticError):
                fields["head_dim"] = fields.get("hidden_size", cls.hidden_size) // heads
        scaling = fields.get("rope_scaling")
        if scaling is not None:
            longest = fields.get("max_position_embeddings", cls.max_position_embeddings)
            scaling = {"original_max_position_embeddings": longest} | scaling
            fields["rope_scaling"] = RopeScaling(**scaling)
        return config_checks.from_known(cls, fields)

    def to_hf(self) -> dict[str, Any]:
        """The content of a text-only `config.json`, which `transformers` opens."""
        return {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            **hf_config.written(dataclasses.asdict(self)),
        }
