"""Which experts tokens are sent to."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.probe import Probe
from llama4_eqx.model import Llama4


def routing_counts(
    model: Llama4,
    batches: Iterable[Int[Array, "*batch seq"]],
    kinds: Int[Array, "vocab"] | None = None,
    *,
    probe: Probe | None = None,
) -> Float[Array, "kinds layers experts"]:
    """How many tokens of each kind each expert of each MoE layer gets, over a corpus.

    `kinds` numbers the kinds of token ids from 0, such as letters and digits; without it there is
    one kind. Ids of a negative kind, such as padding, aren't counted. The edits of a `probe` apply.
    """
    if kinds is None:
        kinds = jnp.zeros(model.embed_tokens.shape[0], jnp.int32)
    number = int(kinds.max()) + 1
    total = None
    for tokens in batches:
        counts = _counts(model, jnp.asarray(tokens), kinds, number, probe)
        total = counts if total is None else total + counts
    if total is None:
        raise ValueError("There are no batches to count: the corpus is empty.")
    return total


@eqx.filter_jit
def _counts(
    model: Llama4,
    tokens: Int[Array, "*batch seq"],
    kinds: Int[Array, "vocab"],
    number: int,
    probe: Probe | None,
) -> Float[Array, "kinds layers experts"]:
    edits = () if probe is None else probe.edit
    output = model(tokens, probe=Probe(read="expert_ids", edit=edits))
    experts = output.router_logits.shape[-1]
    sent = jax.nn.one_hot(output.readings["expert_ids"], experts).sum(-2)
    kind = jax.nn.one_hot(kinds[tokens], number)
    sent, kind = sent.reshape(len(sent), -1, experts), kind.reshape(-1, number)
    return jnp.einsum("lte,tk->kle", sent, kind)
