"""Direct logit attribution: how much each layer writes into a logit."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llama4_eqx.input_checks import TokenIds, token_ids
from llama4_eqx.layers.probe import Probe
from llama4_eqx.model import Llama4


class LogitAttribution(eqx.Module):
    """What each part of the model adds to a logit. The sum over parts is the logit."""

    embedding: Float[Array, "*batch seq"]
    attn_out: Float[Array, "layers *batch seq"]
    ff_out: Float[Array, "layers *batch seq"]

    def total(self) -> Float[Array, "*batch seq"]:
        """The logit."""
        return self.embedding + self.attn_out.sum(0) + self.ff_out.sum(0)


def direct_logit_attribution(
    model: Llama4, tokens: TokenIds, targets: TokenIds
) -> LogitAttribution:
    """Splits each position's logit of its target token into what the embedding, and each layer's
    attention and feed-forward network, have written into the residual stream.

    The final norm divides by the root mean square of the whole stream, which counts as given.
    """
    targets = token_ids(targets, model.config.text_config.vocab_size)
    sites = ("embedding", "attn_out", "ff_out", "resid_post")
    readings = model(tokens, probe=Probe(read=sites)).readings
    norm = model.decoder.norm
    stream = readings["resid_post"][-1].astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(stream), axis=-1, keepdims=True) + norm.eps)
    directions = scale * norm.weight * model.head[targets]
    return LogitAttribution(*(jnp.sum(readings[site] * directions, axis=-1) for site in sites[:3]))
