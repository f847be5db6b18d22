"""The whole model: tokens and images in, logits out."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from llama4_eqx.argument_checks import check_key, check_type, float_dtype, whole_number
from llama4_eqx.config import Llama4Config
from llama4_eqx.decoder import Decoder
from llama4_eqx.input_checks import (
    LAST_POSITION,
    Mask,
    Number,
    Pixels,
    TokenIds,
    check_image_tokens,
    check_positions,
    integers_of,
    mask_of,
    pixels_of,
    token_ids,
)
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.backends import BY_PLATFORM, Backends
from llama4_eqx.layers.context import Context, Execution
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.mask import TokenPositions, token_positions
from llama4_eqx.layers.probe import Probe
from llama4_eqx.layers.quantized import plain_weight
from llama4_eqx.layers.remat import RematPolicy
from llama4_eqx.layers.sites import NO_SITES, Readings, Sites
from llama4_eqx.parallel import Parallel, SingleDevice
from llama4_eqx.projector import MultiModalProjector
from llama4_eqx.summary import model_repr
from llama4_eqx.vision import VisionModel


class Output(eqx.Module):
    """What a forward call returns; always all six. Under `jit`, what you don't use isn't computed:
    take `hidden` alone and there is no product with the vocabulary.

    `readings` has what a probe read, by site: with a leading axis of the layers that have it, in
    order, if it is a site of layers.
    """

    logits: Float[Array, "*batch seq vocab"]
    hidden: Float[Array, "*batch seq hidden"]
    cache: KVCache | None
    router_logits: Float[Array, "layers *batch seq experts"]
    token_positions: TokenPositions
    readings: Readings = eqx.field(default_factory=dict)


class Llama4(eqx.Module):
    """Llama 4. Every array leaf is a parameter, and (part of) a tensor of the checkpoint.

    A text-only model has no `vision_model` and no `multi_modal_projector`. `parallel` says how the
    model runs on devices; `llama4_eqx.distributed.shard` sets it for a mesh.
    """

    vision_model: VisionModel | None
    multi_modal_projector: MultiModalProjector | None
    embed_tokens: Float[Array, "vocab hidden"]
    decoder: Decoder
    lm_head: Float[Array, "vocab hidden"] | None
    config: Llama4Config = eqx.field(static=True)
    parallel: Parallel

    def __init__(
        self, config: Llama4Config, *, dtype: DTypeLike = jnp.float32, key: PRNGKeyArray
    ) -> None:
        """A model with random weights. For the shapes alone, at any size, wrap the call in
        `eqx.filter_eval_shape`."""
        check_type("config", config, Llama4Config, "a text-only one is Llama4Config(text_config)")
        check_key(key)
        dtype = float_dtype(dtype)
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
        self.parallel = SingleDevice()

    def __call__(
        self,
        tokens: TokenIds,
        *,
        mask: Mask | None = None,
        positions: TokenIds | None = None,
        segment_ids: TokenIds | None = None,
        pixel_values: Pixels | None = None,
        image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
        cache: KVCache | None = None,
        probe: Probe | None = None,
        backends: Backends = BY_PLATFORM,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Predicts each token's successor.

        `mask` is True at real tokens; padding may be on any side. `segment_ids` packs documents
        into a row: each is a run of one non-negative id, attends only to itself and counts its
        positions from 0. `positions` overrides the count from each row's (or document's) first real
        token; without `segment_ids`, a position that doesn't rise begins a new document.
        `pixel_values` are the tiles of all rows' images in reading order;
        `image_embeddings`, as `encode_images` returns them, can be passed instead. With a `cache`,
        the tokens continue what it holds. A `probe` reads and changes what is computed inside.
        `backends` choose how attention and experts are computed. With a `key`, dropout is on.
        `remat` says what of each layer the backward pass recomputes: all but its matrix products
        (`"dots"`), everything (`"full"`), or nothing (`"none"`).

        Raises a `ValueError` for arguments that exclude each other, and at run time for a token
        outside the vocabulary, a number of image tokens that differs from the images' features, and
        a cache too small.
        """
        tokens = token_ids(tokens, self.embed_tokens.shape[0])
        mask = mask_of("mask", mask, tokens.shape)
        positions = integers_of("positions", positions, tokens.shape)
        segment_ids = integers_of("segment_ids", segment_ids, tokens.shape)
        if cache is None:
            span = None
            placed = token_positions(
                tokens.shape, mask=mask, segment_ids=segment_ids, positions=positions
            )
            if positions is not None:
                checked = placed.positions + check_positions(placed.positions)
                placed = eqx.tree_at(lambda p: p.positions, placed, checked)
        else:
            if segment_ids is not None or positions is not None:
                raise ValueError(
                    "A cache decides positions itself, so it excludes positions and segment_ids: "
                    "prefill each document as a row of its own, and pass start= to empty_cache "
                    "to begin at a later position."
                )
            check_type("cache", cache, KVCache, "make one with model.empty_cache")
            cache.check_fits(
                eqx.filter_eval_shape(
                    self.empty_cache, cache.length.shape, cache.capacity, dtype=cache.dtype
                )
            )
            placed, span, cache = cache.extended(tokens.shape, mask)
        available = self.sites(images=pixel_values is not None)
        check_type("backends", backends, Backends)
        if probe is not None:
            check_type("probe", probe, Probe, "write Probe(read=…, edit=…)")
            probe.check_sites(available)
        sites = Sites(probe, available)
        image_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        embedded = self.parallel.embed(self.embed_tokens, tokens)
        if pixel_values is not None:
            if image_embeddings is not None:
                raise ValueError("Pass pixel_values or image_embeddings, not both.")
            image_embeddings = encode_images(
                self, pixel_values, sites=sites, remat=remat, key=image_key
            )
        is_image = tokens == self.config.image_token_index
        if image_embeddings is not None:
            embedded = _place_images(embedded, is_image, image_embeddings)
        elif self.vision_model is not None and tokens.shape[-1] > 1:  # a single one may be drawn
            embedded += check_image_tokens(jnp.sum(is_image), 0).astype(embedded.dtype)
        embedded = sites("embedding", embedded)
        rotation = self.decoder.rope(placed.positions)
        context = Context(placed, rotation, span, Execution(backends=backends, sites=sites))
        hidden, cache, readings = self.parallel.decode(
            self.decoder, embedded, context, cache, remat=remat, key=decoder_key
        )
        hidden, router_logits = sites("final_norm", hidden), readings["router_logits"]
        if "router_logits" not in sites.probe.read:
            del readings["router_logits"]
        readings |= sites.readings
        return Output(self.unembed(hidden), hidden, cache, router_logits, placed, readings)

    def sites(self, *, images: bool = True) -> dict[str, str]:
        """The sites that a probe can read and edit, and the axes of their values; those of the
        vision encoder only if there are `images`."""
        ends = {"embedding": "*batch seq hidden", "final_norm": "*batch seq hidden"}
        vision = self.vision_model.sites if images and self.vision_model is not None else {}
        return ends | self.decoder.sites() | vision

    @property
    def head(self) -> Float[Array, "vocab hidden"]:
        """The output embedding: `lm_head`, or `embed_tokens` if they are tied."""
        return plain_weight(self.embed_tokens if self.lm_head is None else self.lm_head)

    def unembed(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return self.parallel.unembed(hidden, head)

    def empty_cache(
        self,
        batch_shape: Number | tuple[Number, ...],
        capacity: Number,
        *,
        start: int = 0,
        dtype: DTypeLike | None = None,
    ) -> KVCache:
        """A cache for rows of at most `capacity` real tokens, the first at position `start`.

        Global layers keep every token, chunk-local ones at most a chunk. In `dtype` int8 or
        float8_e4m3fn it takes half of bfloat16's memory, or a quarter of float32's, and is less
        exact; see `KVCache.quantized`.
        """
        shape = (batch_shape,) if isinstance(batch_shape, Number) else batch_shape
        shape = tuple(whole_number("batch_shape", size, least=0) for size in shape)
        capacity = whole_number("capacity", capacity)
        if start < 0 or start + capacity > LAST_POSITION:
            raise ValueError(
                f"A cache holds positions from 0 to {LAST_POSITION}, but got capacity={capacity}, "
                f"start={start}."
            )
        empty = partial(self.decoder.empty_cache, shape, capacity, start=start)
        if dtype is None:
            return empty()
        return jax.jit(lambda: empty().quantized(dtype))()  # the wide one is never made

    def __repr__(self) -> str:
        return model_repr(self)

    def unstacked(self, *, experts: bool = False) -> "Llama4":
        """The same model with each layer's weights as separate arrays, for decoding; with
        `experts`, each expert's, too, for CPUs. See `Decoder.unstacked`."""
        decoder = self.decoder.unstacked(experts=experts)
        return eqx.tree_at(lambda model: model.decoder, self, decoder)


def encode_images(
    model: Llama4,
    pixel_values: Pixels,
    *,
    sites: Sites = NO_SITES,
    remat: RematPolicy = "dots",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "tiles image_tokens hidden"]:
    """The embeddings that replace each tile's image tokens. `sites` show a probe the encoder."""
    if model.vision_model is None or model.multi_modal_projector is None:
        raise ValueError("This model is text-only: load the whole checkpoint to give it images.")
    return model.parallel.encode_images(
        model.vision_model,
        model.multi_modal_projector,
        pixels_of(pixel_values),
        sites=sites,
        remat=remat,
        key=key,
    )


def _place_images(
    embedded: Float[Array, "*batch seq hidden"],
    is_image: Bool[Array, "*batch seq"],
    image_embeddings: Float[Array, "tiles image_tokens hidden"],
) -> Float[Array, "*batch seq hidden"]:
    """The embeddings with the images' features at image tokens, both in reading order."""
    features = image_embeddings.reshape(-1, image_embeddings.shape[-1]).astype(embedded.dtype)
    order = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    order += check_image_tokens(jnp.sum(is_image), len(features))
    if len(features) == 0:
        return embedded + 0 * order[..., None].astype(embedded.dtype)
    return jnp.where(is_image[..., None], features[order], embedded)
