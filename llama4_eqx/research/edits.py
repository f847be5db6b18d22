"""Ready edits for a `Probe`. They are values: their arrays can be traced, differentiated and
vmapped, and several in one probe apply in order."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.layers.attention import Attention
from llama4_eqx.layers.moe import MoE
from llama4_eqx.layers.probe import Edit, LayerNumber
from llama4_eqx.vision import VisionModel

_WORDS = DecoderLayer.stream_sites | Attention.sites | MoE.sites | VisionModel.sites
_TOKEN_WORDS = {"seq", "q_seq", "patches", "image_tokens"}


def _as_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    return (sites,) if isinstance(sites, str) else tuple(sites)


def _as_numbers(numbers: int | Sequence[int] | Int[Array, "..."] | None) -> Int[Array, "n"] | None:
    return None if numbers is None else jnp.atleast_1d(jnp.asarray(numbers, jnp.int32))


class LocalEdit(Edit):
    """An edit of some layers' values at some tokens.

    `layers` are numbers of decoder layers, and `positions` places in the sequence of the call, from
    its end if negative; None means all. A step of generation is a call of one token, at -1 and 0.
    """

    sites: tuple[str, ...] = eqx.field(static=True, converter=_as_sites)
    layers: Int[Array, "n"] | None = eqx.field(kw_only=True, default=None, converter=_as_numbers)
    positions: Int[Array, "n"] | None = eqx.field(kw_only=True, default=None, converter=_as_numbers)

    @abstractmethod
    def change(self, site: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """The new value, wherever it applies."""

    def __call__(self, site: str, value: Array, layer: LayerNumber) -> Array:
        new = jnp.asarray(self.change(site, value))
        lined_up = zip(reversed(new.shape), reversed(value.shape), strict=False)
        if new.ndim > value.ndim or any(size not in (1, own) for size, own in lined_up):
            raise ValueError(
                f"{type(self).__name__} has a value of shape {new.shape} for {site}, of shape "
                f"{value.shape}: give one that broadcasts to it."
            )
        new = jnp.broadcast_to(new, value.shape).astype(value.dtype)
        applies = jnp.asarray(True) if self.layers is None else jnp.any(self.layers == layer)
        if self.positions is not None:
            axis = token_axis(site)
            length = value.shape[axis]
            counted = jnp.where(self.positions < 0, self.positions + length, self.positions)
            at = jnp.any(jnp.arange(length)[:, None] == counted, axis=-1)
            applies &= at.reshape(-1, *[1] * (-axis - 1))
        return jnp.where(applies, new, value)


class Add(LocalEdit):
    """Adds `value`, which broadcasts against the site's, such as a steering vector."""

    value: Float[Array, "..."] = eqx.field(converter=jnp.asarray)

    def change(self, site: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        return value + self.value.astype(value.dtype)


class Patch(LocalEdit):
    """Puts `value` in place, which broadcasts against the site's: what another run has read."""

    value: Array = eqx.field(converter=jnp.asarray)

    def change(self, site: str, value: Array) -> Array:
        return self.value


class Scale(LocalEdit):
    """Multiplies by `factor`."""

    factor: ArrayLike = eqx.field(converter=jnp.asarray)

    def change(self, site: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        return value * jnp.asarray(self.factor, value.dtype)


class Ablate(LocalEdit):
    """Sets to zero, or to `mean`, which broadcasts against the site's value."""

    mean: ArrayLike = eqx.field(default=0.0, converter=jnp.asarray)

    def change(self, site: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.asarray(self.mean, value.dtype)


class At(Edit):
    """A function `edit(site, value, layer)` that is called at the given sites only."""

    sites: tuple[str, ...] = eqx.field(static=True, converter=_as_sites)
    edit: Callable[[str, Array, LayerNumber], Array]

    def __call__(self, site: str, value: Array, layer: LayerNumber) -> Array:
        return self.edit(site, value, layer)


def ban_experts(
    experts: Bool[ArrayLike, "*batch seq experts"] | Bool[ArrayLike, "experts"] | Sequence[bool],
    *,
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
) -> Add:
    """Keeps tokens from the experts where True: their router logits become -inf."""
    banned = jnp.where(jnp.asarray(experts), -jnp.inf, 0.0)
    return Add("router_logits", banned, layers=layers, positions=positions)


def force_experts(
    expert_ids: int | Int[Array, "*batch seq top_k"] | Int[Array, "top_k"],
    *,
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
) -> Patch:
    """Sends tokens to the given experts, each with the weight that its own router logit gives."""
    ids = jnp.asarray(expert_ids, jnp.int32)
    return Patch("expert_ids", ids, layers=layers, positions=positions)


def token_axis(site: str) -> int:
    """Which axis of a site's value, counted from the end, runs over tokens."""
    words = _WORDS.get(site, "*batch seq hidden").split()
    return next(i - len(words) for i, word in enumerate(words) if word in _TOKEN_WORDS)
