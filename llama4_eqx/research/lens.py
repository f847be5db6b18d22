"""The logit lens: what the model would say after each layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama4_eqx.model import Llama4


def logit_lens(
    model: Llama4, residuals: Float[Array, "layers *batch seq hidden"]
) -> Float[Array, "layers *batch seq vocab"]:
    """The logits that the final norm and the head make of each layer's residual stream.

    `residuals` are a probe's readings at `"resid_post"`; the last layer's logits are the model's.
    """
    return model.unembed(model.decoder.norm(residuals))


class TunedLens(eqx.Module):
    """A logit lens with a learned affine map for each layer (https://arxiv.org/abs/2303.08112),
    which begins as the plain lens: `lens(x + x · weightᵀ + bias)`."""

    weight: Float[Array, "layers hidden hidden"]
    bias: Float[Array, "layers hidden"]

    def __init__(self, layers: int, hidden: int, *, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = jnp.zeros((layers, hidden, hidden), dtype)
        self.bias = jnp.zeros((layers, hidden), dtype)

    def __call__(
        self, model: Llama4, residuals: Float[Array, "layers *batch seq hidden"]
    ) -> Float[Array, "layers *batch seq vocab"]:
        def translate(weight, bias, x):
            return x + x @ weight.T + bias

        return logit_lens(model, jax.vmap(translate)(self.weight, self.bias, residuals))


def tuned_lens_loss(
    lens: TunedLens,
    model: Llama4,
    residuals: Float[Array, "layers *batch seq hidden"],
    logits: Float[Array, "*batch seq vocab"],
) -> Float[Array, "layers"]:
    """Each layer's mean Kullback–Leibler divergence of the lens from the model's own logits, in
    nats a token."""
    ours = jax.nn.log_softmax(lens(model, residuals).astype(jnp.float32), axis=-1)
    theirs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return divergence.reshape(len(divergence), -1).mean(-1)
