"""Scout and Maverick at full size, by their shapes alone: seconds, on any laptop.

    python examples/shapes.py

Prints parameters and memory, then makes a mistake on purpose to show what the shape checks say.
"""

from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook("llama4_eqx", "beartype.beartype"):  # this turns the shape checks on
    import llama4_eqx as l4

import equinox as eqx
import jax
import jax.numpy as jnp

GIB = 2**30


def main() -> None:
    configs = {"Scout": l4.Llama4Config.scout(), "Maverick": l4.Llama4Config.maverick()}
    for name, config in configs.items():
        describe(name, config)
    make_a_mistake()


def describe(name: str, config: l4.Llama4Config) -> None:
    """Parameters, cache and one forward call of a full-size model."""
    model = eqx.filter_eval_shape(l4.Llama4, config, dtype=jnp.bfloat16, key=jax.random.key(0))
    total = count(model)
    vision = count((model.vision_model, model.multi_modal_projector))
    text = config.text_config
    expert = 3 * text.hidden_size * text.intermediate_size
    moe_layers = sum(text.layer_is_moe(i) for i in range(text.num_hidden_layers))
    idle = moe_layers * (text.num_local_experts - text.num_experts_per_tok) * expert
    print(
        f"{name}: {(total - vision) / 1e9:.1f} billion parameters of text, of which a token meets "
        f"{(total - vision - idle) / 1e9:.1f}; {vision / 1e9:.1f} of vision"
    )
    print(f"  parameters in bfloat16: {2 * total / GIB:,.0f} GiB")
    for tokens in (8_192, 131_072, 1_048_576):
        cache = eqx.filter_eval_shape(lambda model, n=tokens: model.empty_cache((1,), n), model)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        everything = (
            tokens * text.num_hidden_layers * 2 * (text.num_key_value_heads * text.head_dim * 2)
        )
        print(
            f"  cache of {tokens:9,} tokens: {size / GIB:6.2f} GiB "
            f"(if every layer kept every token: {everything / GIB:6.2f})"
        )
    tokens = jax.ShapeDtypeStruct((4, 8192), jnp.int32)
    output = eqx.filter_eval_shape(lambda model, tokens: model(tokens), model, tokens)
    print(f"  logits of 4 × 8192 tokens: {output.logits.dtype.name}{list(output.logits.shape)}")
    print(f"  router logits: {output.router_logits.dtype.name}{list(output.router_logits.shape)}\n")


def count(module: object) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(module))


def make_a_mistake() -> None:
    """Gives a mask for one token too few."""
    model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    tokens = jnp.zeros((2, 10), jnp.int32)
    print("A mask of 9 tokens for rows of 10:")
    try:
        model(tokens, mask=jnp.ones((2, 9), bool))
    except TypeCheckError as error:
        told = ("The problem", "Actual value", "Expected type")
        print("\n".join(f"  {line}" for line in str(error).splitlines() if line.startswith(told)))


if __name__ == "__main__":
    main()
