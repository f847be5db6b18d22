"""Which weights of a model are kept in few bits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from llama4_eqx.argument_checks import check_type, dtype_name
from llama4_eqx.axes import axis_words, leaf_name, matrix_axes, select
from llama4_eqx.layers.quantized import LARGEST, Quantized, is_quantized, quantized
from llama4_eqx.model import Llama4


@dataclass(frozen=True)
class Quantization:
    """Weights to be quantised: those whose names match the patterns of `select`, by default the
    decoder's attention, feed-forward networks and experts, and the head. Router, norms and
    embeddings stay as they are. `dtype` is `jnp.int8`, `jnp.float8_e4m3fn` or `jnp.int4`. With a
    `group_size`, each group of so many inputs of a weight has its own scale, not all of them: 32 by
    default for int4, which is stored two numbers in a byte.
    """

    patterns: tuple[str, ...] = ("decoder.*_proj", "lm_head")
    dtype: DTypeLike = jnp.int8
    group_size: int | None = None

    def __post_init__(self) -> None:
        if dtype_name(self.dtype) not in LARGEST:
            raise ValueError(
                f"Weights can be quantised to {', '.join(LARGEST)}, not to "
                f"{dtype_name(self.dtype)}."
            )
        if jnp.dtype(self.dtype) == jnp.int4 and self.group_size is None:
            object.__setattr__(self, "group_size", 32)
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, but is {self.group_size}.")

    def of(
        self, weight: Float[Array, "..."], inputs: tuple[int, ...], shardings: Any = None
    ) -> Quantized:
        """The weight in few bits, sharded if wanted; `inputs` are the axes that its product sums
        over. It is compiled once for weights of equal shapes."""
        rounded = jax.jit(quantized, static_argnums=(1, 2, 3), out_shardings=shardings)
        return rounded(weight, inputs, self.dtype, self.group_size)

    def inputs(self, model: PyTree) -> dict[str, tuple[int, ...]]:
        """The names of the weights, and the axes of each that its product sums over. `model` may
        hold shapes.

        Raises a `ValueError` for a pattern that matches no weight, or one that isn't a matrix.
        """
        leaves = jax.tree_util.tree_leaves_with_path(model)
        patterns = self.patterns
        if getattr(model, "lm_head", True) is None:  # tied to the embeddings, which are looked up
            patterns = tuple(p for p in patterns if p != "lm_head")
        matches = jax.tree.leaves(select(model, *patterns))
        matrices, words, found = matrix_axes(model), axis_words(model), {}
        for (path, _), wanted in zip(leaves, matches, strict=True):
            name = leaf_name(path)
            axes = matrices.get(name)
            if wanted and axes is None:
                raise ValueError(f"{name} isn't a matrix: choose patterns that leave it out.")
            if wanted and axes is not None:
                of_experts = any(words[name][axis] == "experts" for axis in axes.stack)
                found[name] = axes.rows if of_experts else axes.columns
        return found


def quantize(model: Llama4, quantization: Quantization | None = None) -> Llama4:
    """The model with `Quantized` weights, one after another, in place of some of its own.

    To save memory already while loading, use `load_checkpoint(folder, quantize=Quantization())`.
    """
    check_type("model", model, Llama4, "quantise the base of a LoRA")
    quantization = Quantization() if quantization is None else quantization
    check_type("quantization", quantization, Quantization, "such as Quantization(dtype=jnp.int4)")
    inputs = quantization.inputs(model)

    def convert(path, leaf):
        axes = inputs.get(leaf_name(path))
        return leaf if axes is None else quantization.of(leaf, axes)

    return jax.tree_util.tree_map_with_path(convert, model, is_leaf=is_quantized)
