"""The vision encoder's hyperparameters, under Hugging Face's names; see `config.py`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

from llama4_eqx import config_checks, config_file, hf_config


@no_type_check  # __post_init__ checks the types, with better errors
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
        config_checks.normalize(
            self,
            "vision_config",
            positive="hidden_size num_hidden_layers num_attention_heads num_channels "
            "intermediate_size vision_output_dim image_size patch_size norm_eps rope_theta "
            "pixel_shuffle_ratio projector_input_dim projector_output_dim",
        )
        sizes = self.projector_input_dim, self.projector_output_dim, self.vision_output_dim
        dropouts = self.projector_dropout, self.attention_dropout
        config_checks.require(
            "vision_config",
            [
                (
                    self.num_hidden_layers <= config_checks.MAX_LAYERS,
                    f"num_hidden_layers must be at most {config_checks.MAX_LAYERS}, but is "
                    f"{self.num_hidden_layers}",
                ),
                (
                    self.hidden_act == "gelu",
                    f"hidden_act must be 'gelu', but is {config_file.shown(self.hidden_act)}",
                ),
                (
                    self.norm_eps == 1e-5,
                    f"norm_eps must be 1e-05, which transformers uses in the vision encoder "
                    f"whatever the file says, but is {self.norm_eps}",
                ),
                (
                    round(self.hidden_size / self.pixel_shuffle_ratio**2) == self.intermediate_size,
                    f"intermediate_size ({self.intermediate_size}), which is also the adapter's "
                    f"input, must be hidden_size / pixel_shuffle_ratio², of {self.hidden_size} and "
                    f"{self.pixel_shuffle_ratio}",
                ),
                (
                    len(set(sizes)) == 1,
                    "projector_input_dim, projector_output_dim and vision_output_dim must be "
                    f"equal, but are {sizes[0]}, {sizes[1]} and {sizes[2]}",
                ),
                (
                    max(dropouts) < 1,
                    "projector_dropout and attention_dropout must be in [0, 1), but are "
                    f"{dropouts[0]} and {dropouts[1]}",
                ),
                (
                    self.hidden_size % (4 * self.num_attention_heads) == 0,
                    f"hidden_size ({self.hidden_size}) must be a multiple of 4 x "
                    f"num_attention_heads ({self.num_attention_heads}) for the 2-D RoPE",
                ),
                (
                    self.image_size % self.patch_size == 0,
                    f"image_size ({self.image_size}) must be a multiple of "
                    f"patch_size ({self.patch_size})",
                ),
            ],
        )

    @classmethod
    def from_hf(cls, source: config_file.Source) -> "VisionConfig":
        """Reads a `vision_config`, alone or as the part of a whole `config.json`."""
        with config_file.reading(source) as raw:
            part = hf_config.parts(raw).vision if hf_config.is_whole(raw) else raw
            if part is None:
                raise ValueError("config.json has no vision_config: its model is text-only.")
            return cls._from_part(hf_config.vision_part(part))

    @classmethod
    def _from_part(cls, part: Mapping[str, Any]) -> "VisionConfig":
        fields = hf_config.vision_fields(part)
        config = config_checks.from_known(cls, fields)
        config_checks.refuse_unknown(config_checks.without_fields_of(cls, fields), "vision_config")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`'s `vision_config`."""
        return {"model_type": "llama4_vision_model", **hf_config.written(dataclasses.asdict(self))}
