"""What a decoder layer asks of its two parts. Subclass these to put a part of your own in place,
with `llama4_eqx.research.replaced`.

Their Python code runs once for all layers that are equal, and not again in a later call with the
same shapes: write them as for `jax.jit`.
"""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.layers.context import PLAIN, Context, Execution


class SequenceMixer(eqx.Module):
    """Moves information between tokens: attention, or whatever takes its place.

    `sites` lists what it shows to a probe through `context.execution.sites`, with the axes. Arrays
    of the parameters and of the cache are annotated with axis words, which say how they are
    sharded: a cache's begin with `*batch`.

    `takes_row_shards` says that its `__call__` gathers rows that are sharded along
    `mesh_axes.residual`, and returns such: by `mesh_axes.gather_rows` and `sum_rows`. Where a layer
    has a part that doesn't, rows aren't sharded so.
    """

    sites: ClassVar[dict[str, str]] = {}
    takes_row_shards: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: PyTree | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq hidden"], PyTree | None]:
        """The output, and the cache with these tokens stored.

        `context.tokens` has each token's position and document; padding, in document -1, must not
        reach other tokens. With a cache, `context.span` says which positions a row has read. With a
        `key`, dropout is on.
        """

    @abstractmethod
    def empty_cache(self, batch_shape: tuple[int, ...], capacity: int) -> PyTree:
        """The state of rows that have read nothing, for at most `capacity` tokens a row."""


class FeedForward(eqx.Module):
    """Works on each token by itself: an MLP, a mixture of experts, or whatever takes its place.

    `sites` lists what it shows to a probe through `execution.sites`, with the axes. For
    `takes_row_shards` see `SequenceMixer`.
    """

    sites: ClassVar[dict[str, str]] = {}
    takes_row_shards: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, x: Float[Array, "*batch hidden"], *, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "*batch hidden"], Float[Array, "*batch experts"] | None]:
        """The output, and the router's logits if there is a router."""


def takes_row_shards(module: SequenceMixer | FeedForward) -> bool:
    """Whether the class says so that defines the module's `__call__`: a subclass with a `__call__`
    of its own must say it anew."""
    definer = next(cls for cls in type(module).__mro__ if "__call__" in vars(cls))
    return bool(vars(definer).get("takes_row_shards", False))
