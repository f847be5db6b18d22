"""Another mixer in one layer: linear attention in place of softmax attention.

    python examples/swap_attention.py

Layer 5 of a small model gets linear attention (https://arxiv.org/abs/2006.16236), whose state has
the same size for any length. The rest stays stacked and scanned. The model learns the facts of
`facts.py`, answers with a state instead of a cache in that layer, and is saved and loaded.
"""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
from facts import answer, byte_tokenizer, config, fit, prompt
from jaxtyping import Array, Float, PRNGKeyArray

import llama4_eqx as l4
from llama4_eqx.layers import Context, SequenceMixer
from llama4_eqx.layers.collectives import psum_over, pvary
from llama4_eqx.research import replaced

STEPS, LAYER = 160, 5


class State(eqx.Module):
    """What linear attention remembers of the tokens read: sums over them."""

    weighted: Float[Array, "*batch heads head_dim value_dim"]
    total: Float[Array, "*batch heads head_dim"]


class LinearAttention(SequenceMixer):
    """`φ(q) · Σ φ(k) vᵀ / φ(q) · Σ φ(k)` with `φ = elu + 1`, over the tokens up to each one.

    One document a row: packed rows would need sums that restart.
    """

    q_proj: Float[Array, "heads head_dim hidden"]
    k_proj: Float[Array, "heads head_dim hidden"]
    v_proj: Float[Array, "heads head_dim hidden"]
    o_proj: Float[Array, "hidden heads head_dim"]

    def __init__(self, hidden: int, heads: int, head_dim: int, *, key: PRNGKeyArray) -> None:
        *keys, o_key = jax.random.split(key, 4)
        self.q_proj, self.k_proj, self.v_proj = (
            jax.random.normal(k, (heads, head_dim, hidden)) * hidden**-0.5 for k in keys
        )
        self.o_proj = jax.random.normal(o_key, (hidden, heads, head_dim)) * hidden**-0.5

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: State | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq hidden"], State | None]:
        heads_axes = context.execution.mesh_axes.heads  # of a mesh, if the heads are sharded
        x = pvary(x, heads_axes)
        q, k, v = (
            jnp.einsum("...sd,hkd->...shk", x, w) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        real = (context.tokens.segments >= 0)[..., None, None]
        q, k = jax.nn.elu(q) + 1, jnp.where(real, jax.nn.elu(k) + 1, 0)
        weighted = jnp.cumsum(jnp.einsum("...shk,...shv->...shkv", k, v), axis=-4)
        total = jnp.cumsum(k, axis=-3)
        if cache is not None:
            weighted += cache.weighted[..., None, :, :, :]
            total += cache.total[..., None, :, :]
            cache = State(weighted[..., -1, :, :, :], total[..., -1, :, :])
        out = jnp.einsum("...shk,...shkv->...shv", q, weighted)
        out /= jnp.einsum("...shk,...shk->...sh", q, total)[..., None] + 1e-6
        out = jnp.einsum("...shv,dhv->...sd", out, self.o_proj)
        return psum_over(out, heads_axes), cache

    def empty_cache(self, batch_shape: tuple[int, ...], capacity: int) -> State:
        heads, head_dim, _ = self.q_proj.shape[-3:]
        shape = (*batch_shape, heads, head_dim)
        return State(jnp.zeros((*shape, head_dim)), jnp.zeros(shape))


def swap(model: l4.Llama4) -> l4.Llama4:
    def make(old: SequenceMixer) -> LinearAttention:
        return LinearAttention(96, 4, 24, key=jax.random.key(5))

    return replaced(model, "self_attn", make, layers=[LAYER])


def main(steps: int = STEPS) -> None:
    tokenizer = byte_tokenizer()
    model = l4.Llama4(config(tokenizer), key=jax.random.key(0))
    model = swap(model)
    for block in model.decoder.blocks:
        how = "once" if block.repeats is None else f"scanned {block.repeats} times"
        print(f"{len(block.layers)} layers, {how}")
    model = fit(model, steps)
    for relation, country in (("capital", "Norway"), ("currency", "Russia")):
        text = prompt(relation, country)
        print(f"{text}{answer(model, tokenizer, text)}")
    with tempfile.TemporaryDirectory() as folder:
        l4.save_checkpoint(model, folder)
        loaded = l4.load_checkpoint(folder, make=swap)
    print(f"loaded again: {answer(loaded, tokenizer, prompt('capital', 'Poland'))}")


if __name__ == "__main__":
    main()
