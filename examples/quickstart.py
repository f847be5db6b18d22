"""The library in a minute: a small model's forward call, generation, a training step and a folder.

    python examples/quickstart.py

No weights, no network, ten seconds on a laptop.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax

import llama4_eqx as l4
from llama4_eqx.training import init_train_state, make_train_step, next_token_loss


def main() -> None:
    # A model is a pytree of its parameters. This one has Scout's pattern at a toy's size.
    model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(model)):,} parameters")

    # One forward call: any leading batch axes, padding on any side, packing, images, a cache.
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 256)
    output = jax.jit(lambda tokens: model(tokens).logits)(tokens)
    print(f"logits {output.shape}")

    # Reading token by token with a cache gives the same as reading all at once.
    logits, cache = l4.prefill(model, tokens[:, :-1], model.empty_cache((2,), 24))
    logits, cache = l4.decode_step(model, tokens[:, -1], cache)
    print(f"decode equals prefill: {jnp.allclose(logits, output[:, -1], atol=1e-5)}")

    # Greedy by default; a sampler and a key draw instead.
    print(f"greedy {l4.generate(model, tokens, max_new_tokens=6).tolist()}")
    sampler = l4.Sample(temperature=0.6, top_p=0.9)
    drawn = l4.generate(model, tokens, max_new_tokens=6, sampler=sampler, key=jax.random.key(2))
    print(f"drawn  {drawn.tolist()}")

    # Training: the loop is yours, a step is a pure function of state and batch.
    def loss_function(model, tokens, key):
        loss = next_token_loss(model, tokens, key=key).token
        return loss.total, loss.num_tokens, None

    optimizer = optax.adamw(1e-2)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)
    state = init_train_state(model, optimizer, key=jax.random.key(3))
    state, metrics = step(state, tokens)
    for _ in range(9):
        state, metrics = step(state, tokens)
    print(f"loss after ten steps {metrics.loss:.2f} nats, by chance {jnp.log(256):.2f}")

    # A folder that transformers opens, too.
    with tempfile.TemporaryDirectory() as folder:
        l4.save_checkpoint(state.model, f"{folder}/model")
        loaded = l4.load_checkpoint(f"{folder}/model")
    print(f"loaded again: {loaded.config == state.model.config}")


if __name__ == "__main__":
    main()
