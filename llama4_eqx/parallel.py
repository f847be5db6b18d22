"""How the model's parts run on devices: the interface, and the plain single device.

`llama4_eqx.distributed` has the implementation for a mesh. Both give the same values.
"""

from abc import abstractmethod
from typing import Protocol, TypeVar, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.decoder import Decoder
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.collectives import AxisNames
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.linear import linear, lookup
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.layers.remat import RematPolicy
from llama4_eqx.layers.sites import Readings, Sites
from llama4_eqx.projector import MultiModalProjector
from llama4_eqx.vision import VisionModel

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


@runtime_checkable
class TokenSums(Protocol[T_co]):
    """Computes sums over tokens; along `vocab_axes` each device holds a shard of the vocabulary."""

    def __call__(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        weights: Float[Array, "*batch"],
        head: Float[Array, "vocab hidden"],
        vocab_axes: AxisNames,
        /,
    ) -> T_co: ...


class Parallel(eqx.Module):
    """Runs the parts of a model. `llama4_eqx.distributed.shard` puts a `MeshParallel` in place."""

    @abstractmethod
    def embed(
        self, table: Float[Array, "vocab hidden"], tokens: Int[Array, "*batch seq"]
    ) -> Float[Array, "*batch seq hidden"]:
        """The tokens' rows of the table."""

    @abstractmethod
    def decode(
        self,
        decoder: Decoder,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: KVCache | None,
        *,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch seq hidden"], KVCache | None, Readings]:
        """`decoder(x, context, cache, …)`."""

    @abstractmethod
    def unembed(
        self, hidden: Float[Array, "*batch hidden"], head: Float[Array, "vocab hidden"] | Quantized
    ) -> Float[Array, "*batch vocab"]:
        """Logits of final hidden states."""

    @abstractmethod
    def token_sums(
        self,
        sums: TokenSums[T],
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        weights: Float[Array, "*batch"],
        head: Float[Array, "vocab hidden"],
    ) -> T:
        """`sums(hidden, labels, weights, head, vocab_axes)` over all devices' tokens."""

    @abstractmethod
    def encode_images(
        self,
        vision_model: VisionModel,
        projector: MultiModalProjector,
        pixel_values: Float[Array, "tiles channels height width"],
        *,
        sites: Sites,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "tiles image_tokens hidden"]:
        """`projector(vision_model(pixel_values, …))`."""


class SingleDevice(Parallel):
    """Everything on one device."""

    def embed(
        self, table: Float[Array, "vocab hidden"], tokens: Int[Array, "*batch seq"]
    ) -> Float[Array, "*batch seq hidden"]:
        return lookup(table, tokens)

    def decode(
        self,
        decoder: Decoder,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: KVCache | None,
        *,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch seq hidden"], KVCache | None, Readings]:
        return decoder(x, context, cache, remat=remat, key=key)

    def unembed(
        self, hidden: Float[Array, "*batch hidden"], head: Float[Array, "vocab hidden"] | Quantized
    ) -> Float[Array, "*batch vocab"]:
        return linear(hidden, head)

    def token_sums(
        self,
        sums: TokenSums[T],
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        weights: Float[Array, "*batch"],
        head: Float[Array, "vocab hidden"],
    ) -> T:
        return sums(hidden, labels, weights, head, ())

    def encode_images(
        self,
        vision_model: VisionModel,
        projector: MultiModalProjector,
        pixel_values: Float[Array, "tiles channels height width"],
        *,
        sites: Sites,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "tiles image_tokens hidden"]:
        return projector(vision_model(pixel_values, sites=sites, remat=remat, key=key))
