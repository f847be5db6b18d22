"""Drawing large parameters without large temporaries."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PRNGKeyArray

# A parameter of fewer numbers is drawn at once.
LARGE = 2**20
# A draw's temporaries take up to eight times its result: an eighth of all for a piece this small.
_LEAST_PIECES = 64

Initializer = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Float[Array, "..."]]


def normal(stddev: float) -> Initializer:
    """Draws from a normal distribution of mean 0, as `jax.nn.initializers.normal` does it.

    JAX's generator takes several times the memory of what it draws. So large parameters are drawn
    in pieces, one after another. A piece has every n-th row, so that devices that share the rows
    have equally many of each piece.
    """
    draw = jax.nn.initializers.normal(stddev)

    def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
        if math.prod(shape) < LARGE:
            return draw(key, shape, dtype)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        axis = max(range(max(1, len(shape) - 1)), key=lambda axis: shape[axis])
        pieces = _pieces(shape[axis])
        piece = (*shape[:axis], shape[axis] // pieces, *shape[axis + 1 :])

        @custom_vmap  # JAX would make a scatter of the update, which copies 16-bit numbers on CPUs
        def by_pieces(keys: Key[Array, "..."]) -> Float[Array, "..."]:
            def put(i: Array, out: Array) -> Array:
                own = jax.vmap(lambda key: draw(jax.random.fold_in(key, i), piece, dtype))
                drawn = own(keys.reshape(-1)).reshape(*keys.shape, *piece)
                return lax.dynamic_update_index_in_dim(out, drawn, i, keys.ndim + axis + 1)

            in_pieces = (*piece[: axis + 1], pieces, *piece[axis + 1 :])
            out = jnp.zeros((*keys.shape, *in_pieces), dtype)
            return lax.fori_loop(0, pieces, put, out).reshape(*keys.shape, *shape)

        @by_pieces.def_vmap
        def _(_size, _batched, keys):
            return by_pieces(keys), True

        return jax.jit(by_pieces)(key)

    return init


def _pieces(size: int) -> int:
    """A divisor of the size that leaves a power of two, the smallest one of `_LEAST_PIECES`."""
    pieces = size
    while pieces % 2 == 0 and pieces // 2 >= _LEAST_PIECES:
        pieces //= 2
    return pieces
