"""Activation patching: which layer's value at which token carries an answer."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from llama4_eqx.input_checks import TokenIds, token_ids
from llama4_eqx.layers.probe import Probe
from llama4_eqx.model import Llama4
from llama4_eqx.research.edits import At, Patch

Metric = Callable[[Float[Array, "seq vocab"]], Float[Array, ""]]


def patch_sweep(
    model: Llama4,
    tokens: TokenIds,
    source: Float[ArrayLike, "layers seq ..."],
    metric: Metric,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Float[Array, "layers positions"]:
    """`metric(logits)` after patching one layer's value at one token, for each pair of both.

    `source` is what a probe has read at `site` in another run of the same length, such as the one
    with the right answer. By default all layers that have the site, and all positions, are patched.
    One forward call's cost a pair: `batch_size` of them are rows of one batch, all in one program
    under `jit`.
    """
    tokens, source = _row(model, tokens), jnp.asarray(source)
    numbers = _layers_with(model, site)
    layers = list(numbers) if layers is None else list(layers)
    positions = range(len(tokens)) if positions is None else positions
    index_of = {number: index for index, number in enumerate(numbers)}
    missing = [layer for layer in layers if layer not in index_of]
    if missing:
        raise ValueError(f"Layer {missing[0]} has no site {site!r}: the layers {numbers} have.")
    pairs = np.array([(layer, p) for layer in layers for p in positions], np.int32)
    index = np.array([index_of[layer] for layer, _ in pairs], np.int32)
    rows = -len(pairs) % batch_size

    def padded(x: np.ndarray) -> Array:
        return jnp.asarray(np.pad(x, (0, rows), mode="edge").reshape(-1, batch_size))

    def run(batch):
        layer, index, position = batch

        def edit(site, value, number):
            def one(value, layer, index, position):
                patch = Patch(site, source[index], layers=layer, positions=position)
                return patch(site, value, number)

            return jax.vmap(one)(value, layer, index, position)

        copies = jnp.broadcast_to(tokens, (batch_size, len(tokens)))
        return jax.vmap(metric)(model(copies, probe=Probe(edit=At(site, edit))).logits)

    batches = padded(pairs[:, 0]), padded(index), padded(pairs[:, 1])
    found = lax.map(run, batches).reshape(-1)[: len(pairs)]
    return found.reshape(len(layers), -1)


def attribution_patching(
    model: Llama4,
    tokens: TokenIds,
    source: Float[ArrayLike, "layers seq ..."],
    metric: Metric,
    *,
    site: str = "resid_post",
) -> Float[Array, "layers seq"]:
    """A linear estimate of how much each patch of `patch_sweep` changes the metric, for all layers
    and tokens by one gradient (https://arxiv.org/abs/2310.10348): `(source - value) · ∂metric`."""
    numbers = jnp.asarray(_layers_with(model, site))

    def run(change):
        def edit(site, value, layer):
            return value + change[jnp.searchsorted(numbers, layer)]

        output = model(tokens, probe=Probe(read=site, edit=At(site, edit)))
        return metric(output.logits), output.readings[site]

    gradients, values = jax.grad(run, has_aux=True)(jnp.zeros_like(source))
    effects = (source - values) * gradients
    return effects.reshape(*effects.shape[:2], -1).sum(-1)


def _row(model: Llama4, tokens: TokenIds) -> Int[Array, "seq"]:
    row = token_ids(tokens, model.config.text_config.vocab_size)
    if row.ndim != 1:
        raise ValueError(f"Patching takes one row of tokens, not an array of shape {row.shape}.")
    return row


def _layers_with(model: Llama4, site: str) -> list[int]:
    """The numbers of the decoder layers that have the site, as `Output.readings` orders them."""
    numbers, first = [], 0
    for block in model.decoder.blocks:
        for i in range(block.depth):
            if site in block.layers[i % len(block.layers)].sites:
                numbers.append(first + i)
        first += block.depth
    if not numbers:
        raise ValueError(f"No layer has the site {site!r}: model.sites() lists those that exist.")
    return numbers
