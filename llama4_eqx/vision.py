"""The vision encoder: a tile's pixels in, features of its image tokens out."""

from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.lowrank import merged
from llama4_eqx.layers.norm import LayerNorm
from llama4_eqx.layers.probe import Probe
from llama4_eqx.layers.remat import RematPolicy, rematerialise
from llama4_eqx.layers.rope import Rotation
from llama4_eqx.layers.sites import NO_SITES, Readings, Sites
from llama4_eqx.layers.vision_attention import VisionAttention, rotation_2d
from llama4_eqx.projector import PixelShuffleMLP, VisionMLP2
from llama4_eqx.vision_config import VisionConfig


class UnfoldConvolution(eqx.Module):
    """Splits an image into non-overlapping patches in row-major order, and maps the pixels of each
    (ordered by channel, row, column) to a vector. No bias."""

    linear: Float[Array, "vision_hidden channels patch patch"]

    def __init__(
        self,
        vision_hidden: int,
        channels: int,
        patch: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        self.linear = normal(init_std)(key, (vision_hidden, channels, patch, patch), dtype)

    def __call__(
        self, pixels: Float[Array, "*batch channels height width"]
    ) -> Float[Array, "*batch patches vision_hidden"]:
        *batch, channels, height, width = pixels.shape
        patch = self.linear.shape[-1]
        if height % patch or width % patch:
            raise ValueError(
                f"An image of {height} x {width} pixels can't be split into patches of "
                f"{patch} x {patch}: resize it to multiples of {patch}."
            )
        rows, columns = height // patch, width // patch
        patches = pixels.reshape(*batch, channels, rows, patch, columns, patch)
        # channels, rows, patch, columns, patch -> rows, columns, channels, patch, patch
        patches = jnp.moveaxis(patches, (-4, -2), (-5, -4)).reshape(*batch, rows * columns, -1)
        return linear(patches, self.linear.reshape(len(self.linear), -1))


class VisionMLP(eqx.Module):
    """`fc2(gelu(fc1(x)))` with biases and the exact GELU."""

    fc1: Float[Array, "vision_ff vision_hidden"]
    fc2: Float[Array, "vision_hidden vision_ff"]
    fc1_bias: Float[Array, "vision_ff"]
    fc2_bias: Float[Array, "vision_hidden"]

    def __init__(
        self,
        vision_hidden: int,
        vision_ff: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        fc1_key, fc2_key = jax.random.split(key)
        self.fc1 = normal(init_std)(fc1_key, (vision_ff, vision_hidden), dtype)
        self.fc2 = normal(init_std)(fc2_key, (vision_hidden, vision_ff), dtype)
        self.fc1_bias = jnp.zeros(vision_ff, dtype)
        self.fc2_bias = jnp.zeros(vision_hidden, dtype)

    def __call__(
        self, x: Float[Array, "*batch vision_hidden"]
    ) -> Float[Array, "*batch vision_hidden"]:
        inner = jax.nn.gelu(linear(x, self.fc1) + self.fc1_bias, approximate=False)
        return linear(inner, self.fc2) + self.fc2_bias


class VisionEncoderLayer(eqx.Module):
    """`h = x + self_attn(norm(x))`, then `h + mlp(norm(h))`."""

    input_layernorm: LayerNorm
    self_attn: VisionAttention
    post_attention_layernorm: LayerNorm
    mlp: VisionMLP
    sites: ClassVar[dict[str, str]] = {
        "vision_resid_post": "*batch patches vision_hidden",
        "vision_pattern": "*batch heads patches patches",
    }

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> None:
        attention_key, mlp_key = jax.random.split(key)
        hidden, init_std = config.hidden_size, config.initializer_range
        self.input_layernorm = LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)
        self.self_attn = VisionAttention(
            hidden,
            config.num_attention_heads,
            dropout=config.attention_dropout,
            init_std=init_std,
            dtype=dtype,
            key=attention_key,
        )
        self.post_attention_layernorm = LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)
        self.mlp = VisionMLP(
            hidden, config.intermediate_size, init_std=init_std, dtype=dtype, key=mlp_key
        )

    def __call__(
        self,
        x: Float[Array, "*batch patches vision_hidden"],
        rotation: Rotation,
        *,
        sites: Sites = NO_SITES,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch patches vision_hidden"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, sites=sites, key=key)
        return sites("vision_resid_post", x + self.mlp(self.post_attention_layernorm(x)))


class VisionEncoder(eqx.Module):
    """The encoder's layers: one `VisionEncoderLayer` whose leaves are stacked along a leading
    `layers` axis, scanned."""

    blocks: VisionEncoderLayer

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> None:
        self.blocks = eqx.filter_vmap(lambda key: VisionEncoderLayer(config, dtype=dtype, key=key))(
            jax.random.split(key, config.num_hidden_layers)
        )

    def __call__(
        self,
        x: Float[Array, "*batch patches vision_hidden"],
        rotation: Rotation,
        *,
        sites: Sites = NO_SITES,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch patches vision_hidden"]:
        """The last layer's output. `sites` gets what is read of the layers."""
        # Traced and compiled once for all calls; but a function that edits is called each time.
        run = _run_encoder if sites.probe.has_functions else _run_encoder_jit
        x, readings = run(self.blocks, x, rotation, sites.probe, remat, key)
        sites.readings.update(readings)
        return x


def _run_encoder(
    blocks: VisionEncoderLayer,
    x: Float[Array, "*batch patches vision_hidden"],
    rotation: Rotation,
    probe: Probe,
    remat: RematPolicy,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch patches vision_hidden"], Readings]:
    arrays, static = eqx.partition(blocks, eqx.is_array)
    depth = jax.tree.leaves(arrays)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)
    numbers = jnp.arange(depth) if probe.edit else None

    @partial(rematerialise, policy=remat)
    def run(layer, x, key, number):
        sites = Sites(probe, layer.sites, layer=number)
        x = merged(layer)(x, rotation, sites=sites, key=key)
        return x, sites.readings

    def step(x, layer):
        arrays, key, number = layer
        return run(eqx.combine(arrays, static), x, key, number)

    return lax.scan(step, x, (arrays, keys, numbers))


_run_encoder_jit = eqx.filter_jit(_run_encoder)


class VisionModel(eqx.Module):
    """Patch embedding, a class token *after* the patches, learned positions, the encoder between
    two norms, and the pixel-shuffle adapter, before which the class token is dropped."""

    patch_embedding: UnfoldConvolution
    class_embedding: Float[Array, "vision_hidden"]
    positional_embedding_vlm: Float[Array, "patches vision_hidden"]
    layernorm_pre: LayerNorm
    model: VisionEncoder
    layernorm_post: LayerNorm
    vision_adapter: PixelShuffleMLP
    rope_theta: float = eqx.field(static=True)
    sites: ClassVar[dict[str, str]] = VisionEncoderLayer.sites | {
        "vision_features": "*batch patches vision_hidden",
        "adapter_out": "*batch image_tokens vision_out",
    }

    def __init__(
        self, config: VisionConfig, *, dtype: DTypeLike = jnp.float32, key: PRNGKeyArray
    ) -> None:
        patch_key, class_key, position_key, encoder_key, adapter_key = jax.random.split(key, 5)
        hidden, init_std = config.hidden_size, config.initializer_range
        patches = (config.image_size // config.patch_size) ** 2 + 1
        around_one = normal(hidden**-0.5)
        self.patch_embedding = UnfoldConvolution(
            hidden,
            config.num_channels,
            config.patch_size,
            init_std=init_std,
            dtype=dtype,
            key=patch_key,
        )
        self.class_embedding = around_one(class_key, (hidden,), dtype)
        self.positional_embedding_vlm = around_one(position_key, (patches, hidden), dtype)
        self.layernorm_pre = LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)
        self.model = VisionEncoder(config, dtype=dtype, key=encoder_key)
        self.layernorm_post = LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)
        adapter = VisionMLP2(
            config.intermediate_size,
            config.projector_input_dim,
            config.projector_output_dim,
            dropout=config.projector_dropout,
            init_std=init_std,
            dtype=dtype,
            key=adapter_key,
        )
        self.vision_adapter = PixelShuffleMLP(adapter, config.pixel_shuffle_ratio)
        self.rope_theta = config.rope_theta

    def __call__(
        self,
        pixel_values: Float[Array, "*batch channels height width"],
        *,
        sites: Sites = NO_SITES,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch image_tokens vision_out"]:
        """The features of each tile's image tokens, in row-major order. With a `key`, dropout is
        on.

        Raises a `ValueError` for a tile with another number of patches than learned positions.
        """
        encoder_key, adapter_key = (None, None) if key is None else jax.random.split(key)
        x = self.patch_embedding(pixel_values)
        patch = self.patch_embedding.linear.shape[-1]
        rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        positions = self.positional_embedding_vlm.shape[0] - 1
        if rows * columns != positions:
            raise ValueError(
                f"A tile has {rows} x {columns} patches, but the encoder has learned positions for "
                f"{positions}: resize the tile."
            )
        class_token = jnp.broadcast_to(self.class_embedding, (*x.shape[:-2], 1, x.shape[-1]))
        x = jnp.concatenate([x, class_token], axis=-2) + self.positional_embedding_vlm
        heads_dim = self.model.blocks.self_attn.q_proj.shape[-2]
        rotation = rotation_2d(rows, columns, heads_dim, self.rope_theta)
        x = self.model(self.layernorm_pre(x), rotation, sites=sites, remat=remat, key=encoder_key)
        features = sites("vision_features", self.layernorm_post(x)[..., :-1, :])
        return sites("adapter_out", self.vision_adapter(features, rows=rows, key=adapter_key))
