"""LoRA (https://arxiv.org/abs/2106.09685): training low-rank updates of frozen weights."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.axes import leaf_name
from llama4_eqx.layers.lowrank import LowRank, merged
from llama4_eqx.model import Llama4
from llama4_eqx.tensor_names import tensors
from llama4_eqx.train import select


class Update(eqx.Module):
    """The factors of one weight's update; see `LowRank`."""

    left: Float[Array, "... rows rank"]
    right: Float[Array, "... rank columns"]


class LoRA(eqx.Module):
    """A model, and low-rank updates of the weights whose paths fit the patterns of `select`.

        lora = LoRA(model, "decoder.*_proj", rank=8, key=key)

    is all of the decoder's attention, feed-forward networks and experts: each expert has an update
    of its own. Train it with `trainable=select(lora, "updates.*")` and a loss of `lora.attached()`.
    A new LoRA changes nothing: its left factors are zero.
    """

    model: Llama4
    updates: dict[str, Update]
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        model: Llama4,
        *patterns: str,
        rank: int,
        alpha: float | None = None,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ) -> None:
        """Updates are scaled by `alpha / rank`; `alpha` is twice the rank where None.

        Raises a `ValueError` for a pattern that fits no leaf, and for a leaf that isn't a matrix.
        """
        self.model = model
        self.scale = 2.0 if alpha is None else alpha / rank
        self.updates = {}
        chosen = jax.tree.leaves(select(model, *patterns))
        leaves = jax.tree_util.tree_leaves_with_path(model)
        shapes = _matrix_shapes(model)
        for i, (path, _) in enumerate(leaves):
            if not chosen[i]:
                continue
            name = leaf_name(path)
            stack, shape = shapes[i]
            if len(shape) < 2:
                raise ValueError(f"{name} isn't a matrix: choose patterns that leave it out.")
            *lead, rows, columns = (*stack, *shape)
            right = jax.random.normal(jax.random.fold_in(key, i), (*lead, rank, columns), dtype)
            self.updates[name] = Update(
                jnp.zeros((*lead, rows, rank), dtype), right / math.sqrt(columns)
            )

    def attached(self) -> Llama4:
        """The model with its updates, for training.

        Those of layers are `LowRank` leaves, which each layer adds up when it runs, and again in
        the backward pass: no second copy of the weights is ever held. (On a mesh, one is.)
        """

        def attach(name: str, leaf: Array) -> Any:
            lowrank = self._lowrank(name, leaf)
            in_a_layer = ".layers." in name
            return lowrank if in_a_layer or lowrank is leaf else merged(lowrank)

        return _map_with_names(attach, self.model)

    def merged(self) -> Llama4:
        """A plain model, with the updates added to the weights: to be saved, or to generate."""
        return _map_with_names(lambda name, leaf: merged(self._lowrank(name, leaf)), self.model)

    def _lowrank(self, name: str, leaf: Array) -> Any:
        update = self.updates.get(name)
        return leaf if update is None else LowRank(leaf, update.left, update.right, self.scale)


def _map_with_names(function: Any, model: Llama4) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf), model
    )


def _matrix_shapes(model: Llama4) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each leaf: how many layers are stacked in it, and the shape of the checkpoint's tensor."""
    return {
        tensor.leaf: (() if tensor.stack_index is None else (1 + tensor.stack_index,), tensor.shape)
        for tensor in tensors(model)  # of a stack, the last layer comes last
    }
