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
    """One implementation of both products, for a number of rows that is a multiple of `block`.

    `skips_others` says that the outer product leaves out rows of no expert, whatever they hold."""

    grouped: GroupedProduct
    outer: OuterProduct
    block: int = 1
    skips_others: bool = False


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
    x = _in_blocks(products, rows, sizes)
    gated, upped = (
        save_residual(_of_experts(products, products.grouped(x, weight, sizes), sizes))
        for weight in (gate, up)
    )
    inner = gated_product(activation, gated, upped)
    out = _zero_others(products.grouped(inner, down, sizes), sizes)
    return out[: len(rows)], (rows, gated, upped, gate, up, down, sizes)


def _backward(products, activation, residuals, d_out):
    rows, gated, upped, gate, up, down, sizes = residuals
    x, d_out = (_in_blocks(products, each, sizes) for each in (rows, d_out))
    act, gated_vjp = jax.vjp(partial(gated_product, activation), gated, upped)
    d_act = products.grouped(d_out, down, sizes, transposed=True)
    d_act = _of_experts(products, d_act, sizes)
    d_gated, d_upped = gated_vjp(d_act)
    d_rows = products.grouped(d_gated, gate, sizes, transposed=True)
    d_rows += products.grouped(d_upped, up, sizes, transposed=True)
    d_weights = (
        products.outer(left, right, sizes)
        for left, right in ((x, d_gated), (x, d_upped), (act, d_out))
    )
    return _zero_others(d_rows, sizes)[: len(rows)], *d_weights, None


mlp_by_products.defvjp(_forward, _backward)


def _in_blocks(products: Products, rows: Array, sizes: Array) -> Array:
    """The rows in whole blocks, without what others hold."""
    rows = jnp.pad(rows, ((0, -len(rows) % products.block), (0, 0)))
    return _of_experts(products, rows, sizes)


def _of_experts(products: Products, rows: Array, sizes: Array) -> Array:
    """The rows with zeros in those of no expert, where an outer product would take them in: what
    products leave there depends on the platform, and may be NaN."""
    return rows if products.skips_others else _zero_others(rows, sizes)


def _zero_others(rows: Array, sizes: Array) -> Array:
    return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, 0)


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


RAGGED = Products(_ragged_grouped, _ragged_outer)
MEGABLOX = Products(megablox.grouped_product, megablox.outer_product, skips_others=True)
HOPPER = Products(hopper.grouped_product, hopper.outer_product, hopper.BLOCK)
