"""A weight with a low-rank update, as a leaf in place of the weight itself."""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float

from llama4_eqx.layers.quantized import Quantized, plain_weight

_T = TypeVar("_T")


class LowRank(eqx.Module):
    """`weight + scale · left · right`, in place of a weight.

    The weight counts as a matrix, or as one for each expert: several of its axes may together be
    the rows or the columns (see `llama4_eqx.axes.matrix_axes`). All three may be stacked by layers.
    """

    weight: Float[Array, "..."] | Quantized
    left: Float[Array, "... rows rank"]
    right: Float[Array, "... rank columns"]
    scale: float = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.weight.dtype

    def merged(self) -> Float[Array, "..."]:
        """The sum, in the weight's shape and dtype."""
        update = self.scale * (self.left @ self.right).reshape(self.weight.shape)
        return plain_weight(self.weight) + update.astype(self.weight.dtype)


def merged(module: _T) -> _T:
    """The module with a plain weight for each `LowRank`."""
    return jax.tree.map(
        lambda leaf: leaf.merged() if isinstance(leaf, LowRank) else leaf,
        module,
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )


def has_updates(module: Any) -> bool:
    """Whether the module contains a `LowRank`."""
    nodes = jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    return any(isinstance(leaf, LowRank) for leaf in nodes)
