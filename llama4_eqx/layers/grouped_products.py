"""The experts' SwiGLU by grouped products: `lax.ragged_dot`, or kernels for TPUs and GPUs."""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from llama4_eqx.layers import hopper, megablox
from llama4_eqx.layers.activation import Activation, gated_product
from llama4_eqx.layers.remat import save_residual


class GroupedProduct(Protocol):
    """`x · weight[expert]` for each expert's rows, or `x · weight[expert]ᵀ`."""

    def __call__(
        self, x: Array, weight: Array, sizes: Array, *, transposed: bool = False
    ) -> Array: ...


class OuterProduct(Protocol):
    """`leftᵀ · right` over each expert's rows."""

    def __call__(self, left: Array, right: Array, sizes: Array) -> Array: ...


class Products(NamedTuple):
    """One implementation of both products, for a number of rows that is a multiple of `block`."""

    grouped: GroupedProduct
    outer: OuterProduct
    block: int


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mlp_by_products(
    products: Products,
    activation: Activation,
    rows: Float[Array, "tokens hidden"],
    gate: Float[Array, "experts hidden ff"],
    up: Float[Array, "experts hidden ff"],
    down: Float[Array, "experts ff hidden"],
    sizes: Int[Array, "experts"],
) -> Float[Array, "tokens hidden"]:
    """See `grouped.grouped_mlp`. Has no forward-mode derivative."""
    return _forward(products, activation, rows, gate, up, down, sizes)[0]


def _forward(products, activation, rows, gate, up, down, sizes):
    has_expert, x = _in_blocks(products, rows, sizes)
    gated, upped = (
        save_residual(jnp.where(has_expert, products.grouped(x, weight, sizes), 0))
        for weight in (gate, up)
    )
    inner = gated_product(activation, gated, upped)
    out = jnp.where(has_expert, products.grouped(inner, down, sizes), 0)
    return out[: len(rows)], (rows, gated, upped, gate, up, down, sizes)


def _backward(products, activation, residuals, d_out):
    rows, gated, upped, gate, up, down, sizes = residuals
    has_expert, x = _in_blocks(products, rows, sizes)
    _, d_out = _in_blocks(products, d_out, sizes)
    act, gated_vjp = jax.vjp(partial(gated_product, activation), gated, upped)
    d_act = jnp.where(has_expert, products.grouped(d_out, down, sizes, transposed=True), 0)
    d_gated, d_upped = gated_vjp(d_act)
    d_rows = products.grouped(d_gated, gate, sizes, transposed=True)
    d_rows += products.grouped(d_upped, up, sizes, transposed=True)
    d_weights = (
        products.outer(left, right, sizes)
        for left, right in ((x, d_gated), (x, d_upped), (act, d_out))
    )
    return jnp.where(has_expert, d_rows, 0)[: len(rows)], *d_weights, None


mlp_by_products.defvjp(_forward, _backward)


def _in_blocks(products: Products, rows: Array, sizes: Array) -> tuple[Array, Array]:
    """Which rows have an expert, and the rows in whole blocks, with zeros for all others.

    What products leave in rows of no expert depends on the platform.
    """
    rows = jnp.pad(rows, ((0, -len(rows) % products.block), (0, 0)))
    has_expert = (jnp.arange(len(rows)) < sizes.sum())[:, None]
    return has_expert, jnp.where(has_expert, rows, 0)


def _ragged_grouped(x: Array, weight: Array, sizes: Array, *, transposed: bool = False) -> Array:
    return _ragged_dot(x, weight, sizes, contract=(1, 2 if transposed else 1), groups=(0,))


def _ragged_outer(left: Array, right: Array, sizes: Array) -> Array:
    return _ragged_dot(left, right, sizes, contract=(0, 0), groups=())


def _ragged_dot(
    left: Array, right: Array, sizes: Array, *, contract: tuple[int, int], groups: tuple[int, ...]
) -> Array:
    axes = (((contract[0],), (contract[1],)), ((), ()))
    numbers = lax.RaggedDotDimensionNumbers(axes, [0], groups)

    # One after another under vmap: of its own, ragged_dot wants a copy of the weights for each.
    @sequential_vmap
    def product(left, right, sizes):
        return lax.ragged_dot_general(left, right, sizes, numbers)

    return product(left, right, sizes)


RAGGED = Products(_ragged_grouped, _ragged_outer, 1)
MEGABLOX = Products(_ragged_grouped, megablox.outer_product, 1)
HOPPER = Products(hopper.grouped_product, hopper.outer_product, hopper.BLOCK)
