"""The model's hyperparameters, under Hugging Face's names. Defaults live here and nowhere else.

`from_hf` reads every spelling that the releases use and refuses a field that it doesn't know: a
field skipped in silence is a wrong model.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llama4_eqx import hf_config


def determine_is_nope_layer(layer_id: int, nope_layer_interval: int) -> bool:
    """Whether the layer has no position embedding: one in `nope_layer_interval` (0: none)."""
    return nope_layer_interval > 0 and (layer_id + 1) % nope_layer_interval == 0


def determine_is_moe_layer(layer_id: int, interleave_moe_layer_step: int) -> bool:
    """Whether the layer is a mixture of experts: one in `interleave_moe_layer_step` (0: none)."""
    return interleave_moe_layer_step > 0 and (layer_id + 1) % interleave_moe_layer_step == 0


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
        ordered = self.low_freq_factor <= self.high_freq_factor
        _check(
            self,
            "factor low_freq_factor high_freq_factor original_max_position_embeddings",
            [(ordered, "low_freq_factor must not exceed high_freq_factor")],
        )


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
        layers = self.num_hidden_layers
        chunk, kinds = self.attention_chunk_size, self.layer_types
        _check(
            self,
            "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers "
            "num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps "
            "rope_theta floor_scale num_local_experts num_experts_per_tok",
            [
                (self.hidden_act == "silu", f"hidden_act must be 'silu', not {self.hidden_act!r}"),
                (
                    self.num_attention_heads % max(self.num_key_value_heads, 1) == 0,
                    f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                    f"num_key_value_heads ({self.num_key_value_heads})",
                ),
                (self.head_dim % 2 == 0, f"head_dim must be even for RoPE, but is {self.head_dim}"),
                (
                    self.num_experts_per_tok <= self.num_local_experts,
                    f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                    f"num_local_experts ({self.num_local_experts})",
                ),
                (0 <= self.attention_dropout < 1, "attention_dropout must be in [0, 1)"),
                (chunk is None or chunk > 0, f"attention_chunk_size must be positive, not {chunk}"),
                (
                    self.no_rope_layers is None or len(self.no_rope_layers) >= layers,
                    f"no_rope_layers must have an entry for each of the {layers} layers",
                ),
                (
                    kinds is None or len(kinds) >= layers,
                    f"layer_types must have an entry for each of the {layers} layers",
                ),
                (
                    set(kinds or ()) <= {"chunked_attention", "full_attention"},
                    f"layer_types must be 'chunked_attention' or 'full_attention', not {kinds}",
                ),
                (
                    chunk is not None or "chunked_attention" not in (kinds or ()),
                    "layer_types asks for chunked_attention, but attention_chunk_size is null",
                ),
                (
                    all(0 <= i < layers for i in self.moe_layers or ()),
                    f"moe_layers must be indices below {layers}, but are {self.moe_layers}",
                ),
            ],
        )

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
    def from_hf(cls, source: hf_config.Source) -> "TextConfig":
        """Reads a text-only `config.json` or the text part of a whole one."""
        raw = hf_config.read_config(source)
        known = hf_config.text_fields(raw.get("text_config", raw), _types(cls))
        if known.get("rope_scaling") is not None:
            types = _types(RopeScaling)
            scaling = known["rope_scaling"].items()
            known["rope_scaling"] = RopeScaling(
                **{name: hf_config.as_declared(value, types[name]) for name, value in scaling}
            )
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The content of a text-only `config.json`, which `transformers` opens."""
        return {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            **hf_config.written(dataclasses.asdict(self)),
        }


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder's hyperparameters. Sizes of images and patches are in pixels."""

    hidden_size: int = 1408
    hidden_act: str = "gelu"
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    num_channels: int = 3
    intermediate_size: int = 5632
    vision_output_dim: int = 4096
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    projector_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self,
            "hidden_size num_hidden_layers num_attention_heads num_channels intermediate_size "
            "vision_output_dim image_size patch_size norm_eps rope_theta pixel_shuffle_ratio "
            "projector_input_dim projector_output_dim",
            [
                (self.hidden_act == "gelu", f"hidden_act must be 'gelu', not {self.hidden_act!r}"),
                (
                    round(self.hidden_size / self.pixel_shuffle_ratio**2) == self.intermediate_size,
                    f"intermediate_size ({self.intermediate_size}), which is also the adapter's "
                    "input, must be hidden_size / pixel_shuffle_ratio²",
                ),
                (
                    self.projector_input_dim == self.projector_output_dim == self.vision_output_dim,
                    "projector_input_dim, projector_output_dim and vision_output_dim must be equal",
                ),
                (
                    self.hidden_size % (4 * max(self.num_attention_heads, 1)) == 0,
                    f"hidden_size ({self.hidden_size}) must be a multiple of 4 x "
                    f"num_attention_heads ({self.num_attention_heads}) for the 2-D RoPE",
                ),
                (
                    self.image_size % max(self.patch_size, 1) == 0,
                    f"image_size ({self.image_size}) must be a multiple of "
                    f"patch_size ({self.patch_size})",
                ),
            ],
        )

    @classmethod
    def from_hf(cls, source: hf_config.Source) -> "VisionConfig":
        """Reads a `vision_config`, alone or as the part of a whole `config.json`."""
        raw = hf_config.read_config(source)
        return cls(**hf_config.vision_fields(raw.get("vision_config", raw), _types(cls)))

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`'s `vision_config`."""
        return {"model_type": "llama4_vision_model", **hf_config.written(dataclasses.asdict(self))}


@dataclass(frozen=True)
class Llama4Config:
    """The whole model's hyperparameters; `vision_config` is None for a text-only model."""

    text_config: TextConfig = dataclasses.field(default_factory=TextConfig)
    vision_config: VisionConfig | None = None
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092

    @classmethod
    def scout(cls) -> "Llama4Config":
        """Llama 4 Scout (17B active, 16 experts), Instruct: 107.8 billion parameters of text."""
        scaling = RopeScaling(16.0, 1.0, 1.0, original_max_position_embeddings=8192)
        text = TextConfig(rope_scaling=scaling, max_position_embeddings=10485760)
        return cls(text, VisionConfig())

    @classmethod
    def maverick(cls) -> "Llama4Config":
        """Llama 4 Maverick (17B active, 128 experts): 400.7 billion parameters of text."""
        text = TextConfig(
            num_local_experts=128,
            interleave_moe_layer_step=2,
            use_qk_norm=False,
            max_position_embeddings=1048576,
        )
        return cls(text, VisionConfig())

    @classmethod
    def tiny(cls) -> "Llama4Config":
        """A Scout-like text model small enough for a test, in which every rule of attention bites
        within 64 tokens: chunks of 8, temperature steps of 4, RoPE stretched beyond 32."""
        text = TextConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            intermediate_size_mlp=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            rope_scaling=RopeScaling(16.0, 1.0, 1.0, original_max_position_embeddings=32),
            attention_chunk_size=8,
            floor_scale=4,
            num_local_experts=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        return cls(text)

    @classmethod
    def from_hf(cls, source: hf_config.Source) -> "Llama4Config":
        """Reads a `config.json`, whole or text-only: a dict, the file, or the folder that holds it.

        A `ValueError` names every field that it doesn't know; a quantised checkpoint is refused.
        """
        raw = hf_config.read_config(source)
        if "text_config" not in raw:
            return cls(TextConfig.from_hf(raw))
        parts = {"text_config", "vision_config"}
        own = {name: value for name, value in raw.items() if name not in parts}
        known = hf_config.top_fields(own, _types(cls) | {"tie_word_embeddings": bool})
        text = TextConfig.from_hf(raw["text_config"])
        if known.pop("tie_word_embeddings", False):
            text = dataclasses.replace(text, tie_word_embeddings=True)
        vision = raw.get("vision_config")
        return cls(text, None if vision is None else VisionConfig.from_hf(vision), **known)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` and this package open."""
        if self.vision_config is None:
            return self.text_config.to_hf()
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": self.boi_token_index,
            "eoi_token_index": self.eoi_token_index,
            "image_token_index": self.image_token_index,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            "text_config": self.text_config.to_hf(),
            "vision_config": self.vision_config.to_hf(),
        }


def _types(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def _check(config: Any, positive: str, rules: list[tuple[bool, str]]) -> None:
    """Raises one error that lists every broken rule; `positive` names fields that must be > 0."""
    broken = [
        f"{name} must be positive, but is {getattr(config, name)}"
        for name in positive.split()
        if not getattr(config, name) > 0
    ]
    broken += [sentence for holds, sentence in rules if not holds]
    if broken:
        raise ValueError(f"{type(config).__name__}: {'; '.join(broken)}.")
