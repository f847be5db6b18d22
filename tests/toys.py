"""Toy configs in which every rule of the model bites within 64 tokens, and the oracle's models."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from llama4_eqx.config import Llama4Config
from llama4_eqx.text_config import RopeScaling, TextConfig
from llama4_eqx.vision_config import VisionConfig

SCOUT = replace(Llama4Config.tiny().text_config, num_hidden_layers=4, no_rope_layer_interval=2)
MAVERICK = replace(
    SCOUT,
    rope_scaling=None,
    use_qk_norm=False,
    interleave_moe_layer_step=2,
    num_local_experts=8,
)
TOYS: dict[str, TextConfig] = {
    "scout": SCOUT,
    "maverick": replace(MAVERICK, num_hidden_layers=8, no_rope_layer_interval=4),
    "irregular": replace(
        MAVERICK,
        use_qk_norm=True,
        no_rope_layers=(1, 0, 0, 1, 1),
        moe_layers=(0, 1, 3),
        num_hidden_layers=5,
    ),
    "tail": replace(SCOUT, num_hidden_layers=5),
    "top-2": replace(MAVERICK, num_experts_per_tok=2),
    "bias": replace(SCOUT, attention_bias=True),
    "tied": replace(SCOUT, tie_word_embeddings=True),
    "mha": replace(SCOUT, num_key_value_heads=4, head_dim=24),
    "mqa": replace(MAVERICK, num_key_value_heads=1),
    "scaled-1-4": replace(SCOUT, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    "layer-types": replace(
        SCOUT,
        layer_types=("full_attention", "chunked_attention", "chunked_attention") * 2,
        num_hidden_layers=6,
    ),
    "dense": replace(SCOUT, moe_layers=()),
    "unchunked": replace(SCOUT, attention_chunk_size=None, attn_temperature_tuning=False),
}


VISION = VisionConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=128,
    vision_output_dim=24,
    image_size=28,
    patch_size=7,
    projector_input_dim=24,
    projector_output_dim=24,
)
IMAGE_TOKEN, TOKENS_PER_TILE = 250, 4
MULTIMODAL = Llama4Config(SCOUT, VISION, image_token_index=IMAGE_TOKEN)


def reference_model(
    config: TextConfig | Llama4Config, *, seed: int = 0, dtype: torch.dtype = torch.float32
):
    """`transformers`' model of the config, with random weights large enough that all rules show."""
    torch.manual_seed(seed)
    if isinstance(config, TextConfig):
        hf_config = transformers.Llama4TextConfig(**config.to_hf(), attn_implementation="eager")
        model = transformers.Llama4ForCausalLM(hf_config)
    else:
        hf_config = transformers.Llama4Config(**config.to_hf(), attn_implementation="eager")
        model = transformers.Llama4ForConditionalGeneration(hf_config)
    if (
        dtype != torch.float32
    ):  # a cast to float32, too, would spoil the vision model's complex table
        model = model.to(dtype)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "router" in name or "lm_head" in name or "embed" in name:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5 * 4)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model


def random_tokens(*shape: int, vocab: int = 256, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocab, shape, dtype=np.int32))


def relative_error(value, truth) -> float:
    """The largest error over the largest magnitude of the truth."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert value.shape == truth.shape
    return float(np.abs(value - truth).max() / np.abs(truth).max())


def as_torch(array, dtype=None):
    return torch.tensor(np.asarray(array), dtype=dtype)


def their_embeddings(reference, tokens, pixels):
    """What `transformers` feeds to its decoder. Put together from its parts, since the forward call
    of its 5.24 looks for a field of the output that isn't there."""
    tokens = as_torch(tokens, torch.long)[None]
    embedded = reference.get_input_embeddings()(tokens)
    if len(pixels):
        features = reference.get_image_features(as_torch(pixels)).last_hidden_state
        projected = reference.multi_modal_projector(features).flatten(0, 1)
        where = reference.get_placeholder_mask(tokens, embedded, projected)
        embedded = embedded.masked_scatter(where, projected)
    return embedded
