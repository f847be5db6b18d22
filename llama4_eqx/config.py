"""The model's hyperparameters, under Hugging Face's names. Defaults live here and nowhere else.

`from_hf` reads every spelling that the releases and `transformers` use. It refuses a field that it
doesn't know: a field skipped in silence is a wrong model. Every config checks the types and ranges
of its values, however it is made.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

from llama4_eqx import config_checks, config_file, hf_config
from llama4_eqx.text_config import RopeScaling, TextConfig
from llama4_eqx.vision_config import VisionConfig


@no_type_check  # __post_init__ checks the types, with better errors
@dataclass(frozen=True)
class Llama4Config:
    """The whole model's hyperparameters; `vision_config` is None for a text-only model."""

    text_config: TextConfig = dataclasses.field(default_factory=TextConfig)
    vision_config: VisionConfig | None = None
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092

    def __post_init__(self) -> None:
        config_checks.normalize(self, "the config", positive="")

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
    def from_hf(cls, source: config_file.Source) -> "Llama4Config":
        """Reads a `config.json`, whole or text-only: a dict, the file, or the folder that holds it.

        Missing fields have the defaults of `transformers`. Token ids beside `text_config` override
        those inside it, and `tie_word_embeddings` counts only inside it, as in `transformers`.

        Raises a `ValueError` for values of a wrong type, for fields that contradict each other, for
        fields that aren't known, for other families' files and for quantised checkpoints.
        """
        with config_file.reading(source) as raw:
            parts = hf_config.parts(raw)
            text = TextConfig._from_parts(parts)
            vision = None if parts.vision is None else VisionConfig._from_part(parts.vision)
            config = cls(text, vision, **hf_config.image_tokens(parts.top))
            for name, copy in hf_config.image_tokens(parts.text).items():
                if copy != getattr(config, name):
                    own = getattr(config, name)
                    raise hf_config.disagreement(f"{name} in text_config", copy, "beside it", own)
            return config

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` and this package open.

        That of a text-only model has the ids of image tokens only where they aren't the released
        ones.
        """
        tokens = {name: getattr(self, name) for name in hf_config.IMAGE_TOKENS}
        if self.vision_config is None:
            own = {
                name: token for name, token in tokens.items() if token != getattr(type(self), name)
            }
            return self.text_config.to_hf() | own
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            **tokens,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            "text_config": self.text_config.to_hf(),
            "vision_config": self.vision_config.to_hf(),
        }
