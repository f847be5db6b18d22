"""What optimisers need to know of a model's parameters, from their axis words."""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import KeyPath
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from llama4_eqx.axes import axis_words, leaf_name, matrix_axes

# Sides of a matrix that index something discrete, as those of embeddings, heads and routers do.
_DISCRETE = {"vocab", "patches", "experts"}


def decay_mask(parameters: PyTree) -> PyTree:
    """True for matrices, False for vectors such as norms and biases: `mask` of `optax.adamw`."""
    matrices = matrix_axes(parameters)
    return _map_with_names(lambda name: matrices[name] is not None, parameters)


def muon_dimensions(parameters: PyTree) -> PyTree:
    """The axes that make each weight a matrix: `muon_weight_dimension_numbers` of
    `optax.contrib.muon`.

    None for vectors and for embeddings, heads and routers, which Muon leaves to Adam.
    """
    words, matrices = axis_words(parameters), matrix_axes(parameters)

    def dimensions(name: str) -> MuonDimensionNumbers | None:
        axes = matrices[name]
        if axes is None or _DISCRETE & {words[name][axis] for side in axes[1:] for axis in side}:
            return None
        return MuonDimensionNumbers(axes.rows, axes.columns)

    return _map_with_names(dimensions, parameters)


def _map_with_names(function: Callable[[str], Any], parameters: PyTree) -> PyTree:
    def of_leaf(path: KeyPath, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"parameters must be a model's arrays, as eqx.filter(model, eqx.is_array) gives "
                f"them, but hold a {type(leaf).__name__}."
            )
        return function(leaf_name(path))

    return jax.tree_util.tree_map_with_path(of_leaf, parameters)
