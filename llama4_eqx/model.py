"""The whole model: tokens in, logits out."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.config import Llama4Config
from llama4_eqx.decoder import Decoder
from llama4_eqx.layers.cache import Filled, KVCache
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.mask import Places
from llama4_eqx.layers.mask import places as make_places
from llama4_eqx.layers.remat import Keep
from llama4_eqx.projector import MultiModalProjector
from llama4_eqx.vision import VisionModel


class Output(eqx.Module):
    """What a forward call gives; always all three."""

    logits: Float[Array, "*batch seq vocab"]
    cache: KVCache | None
    router_logits: Float[Array, "layers *batch seq experts"]


@runtime_checkable
class Parallel(Protocol):
    """Runs parts of a model on many devices: see `llama4_eqx.parallel.MeshParallel`."""

    embed: Callable[..., Array]
    decode: Callable[..., Any]
    unembed: Callable[..., Array]
    token_sums: Callable[..., Any]
    images: Callable[..., Array]


class Llama4(eqx.Module):
    """Llama 4. Every array leaf is a parameter, and a tensor of the checkpoint but for its shape.

    A text-only model has no `vision_model` and no `multi_modal_projector`. `parallel` runs it on
    many devices, once `llama4_eqx.sharding.shard` has set it.
    """

    vision_model: VisionModel | None
    multi_modal_projector: MultiModalProjector | None
    embed_tokens: Float[Array, "vocab hidden"]
    decoder: Decoder
    lm_head: Float[Array, "vocab hidden"] | None
    config: Llama4Config = eqx.field(static=True)
    parallel: Parallel | None

    def __init__(
        self, config: Llama4Config, *, dtype: DTypeLike = jnp.float32, key: PRNGKeyArray
    ) -> None:
        """A model with random weights. For the shapes alone, at any size, wrap the call in
        `eqx.filter_eval_shape`."""
        embed_key, decoder_key, head_key, vision_key, projector_key = jax.random.split(key, 5)
        text, vision = config.text_config, config.vision_config
        if vision is None:
            self.vision_model = self.multi_modal_projector = None
        else:
            self.vision_model = VisionModel(vision, dtype=dtype, key=vision_key)
            self.multi_modal_projector = MultiModalProjector(
                vision.vision_output_dim,
                text.hidden_size,
                init_std=text.initializer_range,
                dtype=dtype,
                key=projector_key,
            )
        init, shape = normal(text.initializer_range), (text.vocab_size, text.hidden_size)
        self.embed_tokens = init(embed_key, shape, dtype)
        self.decoder = Decoder(text, dtype=dtype, key=decoder_key)
        self.lm_head = None if text.tie_word_embeddings else init(head_key, shape, dtype)
        self.config = config
        self.parallel = None

    def __call__(
        self,
        tokens: Int[Array, "*batch seq"],
        *,
        mask: Bool[Array, "*batch seq"] | None = None,
        positions: Int[Array, "*batch seq"] | None = None,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        pixel_values: Float[Array, "tiles channels height width"] | None = None,
        image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
        cache: KVCache | None = None,
        keep: Keep = "products",
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """The logits of each token's successor.

        `mask` is True at real tokens: pad on any side. `segment_ids` packs documents into a row:
        each is a run of one non-negative id, sees only itself and counts its positions from 0.
        `positions` overrides the count from each row's (or document's) first real token.
        `pixel_values` are the tiles of all rows' images in reading order; `image_embeddings` are
        what `encode_images` makes of them, to be passed instead. With a `cache`, the tokens
        continue what it holds. With a `key`, dropout is on. `keep` says what of each layer is kept
        for the backward pass: its matrix `"products"`, `"nothing"` (smallest) or `"everything"`.

        Raises a `ValueError` for arguments that exclude each other, and at run time for a token
        outside the vocabulary, for image tokens that are not as many as the images' features, and
        for a cache too small.
        """
        hidden, cache, router_logits = self.hidden_states(
            tokens,
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            pixel_values=pixel_values,
            image_embeddings=image_embeddings,
            cache=cache,
            keep=keep,
            key=key,
        )
        return Output(self.unembed(hidden), cache, router_logits)

    def hidden_states(
        self,
        tokens: Int[Array, "*batch seq"],
        *,
        mask: Bool[Array, "*batch seq"] | None = None,
        positions: Int[Array, "*batch seq"] | None = None,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        pixel_values: Float[Array, "tiles channels height width"] | None = None,
        image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
        cache: KVCache | None = None,
        keep: Keep = "products",
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        KVCache | None,
        Float[Array, "layers *batch seq experts"],
    ]:
        """All of `__call__` but the last product, for those who need few of the logits."""
        tokens = _inside_vocabulary(tokens, self.embed_tokens.shape[0])
        if cache is None:
            places = make_places(
                tokens.shape, mask=mask, segment_ids=segment_ids, positions=positions
            )
            filled = None
        else:
            if segment_ids is not None or positions is not None:
                raise ValueError(
                    "A cache decides positions itself, so it excludes positions and segment_ids: "
                    "prefill each document as a row of its own, and pass start= to empty_cache "
                    "to begin at a later position."
                )
            places, filled, cache = _continue(cache, tokens.shape, mask)
        image_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        if self.parallel is None:
            embedded, decode = self.embed_tokens[tokens], Decoder.__call__
        else:
            embedded = self.parallel.embed(self.embed_tokens, tokens)
            decode = self.parallel.decode
        if pixel_values is not None:
            if image_embeddings is not None:
                raise ValueError("Pass pixel_values or image_embeddings, not both.")
            image_embeddings = encode_images(self, pixel_values, keep=keep, key=image_key)
        if image_embeddings is not None:
            is_image = tokens == self.config.image_token_index
            embedded = _place_images(embedded, is_image, image_embeddings)
        return decode(self.decoder, embedded, places, cache, filled, keep=keep, key=decoder_key)

    def unembed(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return (
            linear(hidden, head) if self.parallel is None else self.parallel.unembed(hidden, head)
        )

    def empty_cache(
        self, batch_shape: tuple[int, ...], capacity: int, *, start: int = 0
    ) -> KVCache:
        """A cache for rows of at most `capacity` real tokens, the first at position `start`.

        Global layers keep every token, chunk-local ones a chunk at most.
        """
        return self.decoder.empty_cache(batch_shape, capacity, start=start)

    def unstacked(self) -> "Llama4":
        """The same model with each layer's weights as arrays of their own; see
        `Decoder.unstacked`."""
        return eqx.tree_at(lambda model: model.decoder, self, self.decoder.unstacked())


def encode_images(
    model: Llama4,
    pixel_values: Float[Array, "tiles channels height width"],
    *,
    keep: Keep = "products",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "tiles image_tokens hidden"]:
    """What takes the place of each tile's image tokens, in the decoder's width."""
    if model.vision_model is None or model.multi_modal_projector is None:
        raise ValueError("This model is text-only: load the whole checkpoint to give it images.")
    encoder = model.vision_model, model.multi_modal_projector

    def encode(encoder, pixel_values):
        vision_model, projector = encoder
        return projector(vision_model(pixel_values, keep=keep, key=key))

    if model.parallel is None:
        return encode(encoder, pixel_values)
    return model.parallel.images(encode, encoder, pixel_values)


def _place_images(
    embedded: Float[Array, "*batch seq hidden"],
    is_image: Bool[Array, "*batch seq"],
    image_embeddings: Float[Array, "tiles image_tokens hidden"],
) -> Float[Array, "*batch seq hidden"]:
    """The embeddings with images' features at image tokens, both in reading order."""
    features = image_embeddings.reshape(-1, image_embeddings.shape[-1]).astype(embedded.dtype)
    order = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    order += _require_equal_counts(jnp.sum(is_image), len(features))
    return jnp.where(is_image[..., None], features[order], embedded)


# What the checks below return is added to what depends on them. They are of single numbers, as the
# error's way out of the device would otherwise take whole arrays to one device.


def _require_equal_counts(wanted: Int[Array, ""], given: int) -> Int[Array, ""]:
    """0, or an error."""

    def refuse(wanted):
        raise ValueError(
            f"The tokens have {wanted} image tokens, but the images give {given} features: tokens "
            "and pixel_values must come from the same call of process()."
        )

    # Not eqx.error_if, whose sentence can't name a number that is known only at run time.
    return jax.lax.cond(
        wanted == given,
        jnp.zeros_like,
        lambda wanted: jax.pure_callback(refuse, wanted, wanted),
        wanted,
    )


def _refuse_if(wrong: Bool[Array, ""], sentence: str) -> Int[Array, ""]:
    """0, or an error."""
    return eqx.error_if(jnp.zeros((), jnp.int32), wrong, sentence)


def _inside_vocabulary(tokens: Int[Array, "*batch seq"], vocab: int) -> Int[Array, "*batch seq"]:
    checked = _refuse_if(
        jnp.any((tokens < 0) | (tokens >= vocab)),
        f"A token id is outside the vocabulary: ids go from 0 to {vocab - 1}.",
    )
    return tokens + checked.astype(tokens.dtype)


def _continue(
    cache: KVCache, shape: tuple[int, ...], mask: Bool[Array, "*batch seq"] | None
) -> tuple[Places, Filled, KVCache]:
    """Where new tokens stand after those in the cache, and the cache with them counted."""
    if cache.length.shape != shape[:-1]:
        raise ValueError(
            f"The cache was made for the batch shape {cache.length.shape}, but the tokens have "
            f"{shape[:-1]}."
        )
    before = cache.start + cache.length
    places = make_places(shape, mask=mask, start=before)
    length = cache.length + jnp.sum(places.segments >= 0, axis=-1, dtype=jnp.int32)
    length += _refuse_if(
        jnp.any(length > cache.capacity),
        f"The cache holds {cache.capacity} tokens of a row, and a row would need more: make it "
        "larger with model.empty_cache(batch_shape, capacity).",
    )
    filled = Filled(cache.start, before, cache.start + length)
    return places, filled, eqx.tree_at(lambda c: c.length, cache, length)
