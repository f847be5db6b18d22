"""Scout and Maverick at full size, by their shapes alone: seconds, on any laptop.

    python examples/shapes.py

Prints parameters and memory, then makes a mistake on purpose to show what the shape checks say.
"""

from functools import partial

from jaxtyping import install_import_hook

with install_import_hook("llama4_eqx", "beartype.beartype"):  # this turns the shape checks on
    import llama4_eqx as l4

import equinox as eqx
import jax
import jax.numpy as jnp

GIB = 2**30
# GiB of memory. Of an accelerator's, a tenth is left for what a step needs.
DEVICES = {
    "one H100": 80,
    "one H200": 141,
    "8 × H100": 640,
    "v5e, 16 chips": 256,
    "v6e, 64 chips": 2048,
}
USABLE = 0.9
WEIGHTS = {
    "bfloat16": None,
    "int8": l4.Quantization(),
    "float8": l4.Quantization(dtype=jnp.float8_e4m3fn),
    "int4": l4.Quantization(dtype=jnp.int4),
}


def main() -> None:
    configs = {"Scout": l4.Llama4Config.scout(), "Maverick": l4.Llama4Config.maverick()}
    for name, config in configs.items():
        describe(name, config)
    for name, config in configs.items():
        fits(name, config)
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
        size = size_of(cache)
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


def fits(name: str, config: l4.Llama4Config) -> None:
    """On which devices the text model runs, shared out evenly, and with how long a row."""
    text = l4.Llama4Config(config.text_config)
    print(f"The longest row for which {name}'s text model leaves room, with a cache in bfloat16:")
    print("  weights   " + "".join(f"{device:>18}" for device in DEVICES))
    for weights, quantization in WEIGHTS.items():

        def make(quantization=quantization):
            model = l4.Llama4(text, dtype=jnp.bfloat16, key=jax.random.key(0))
            return model if quantization is None else l4.quantize(model, quantization)

        model = eqx.filter_eval_shape(make)
        size = size_of(model)
        room = [longest_row(model, memory * GIB * USABLE - size) for memory in DEVICES.values()]
        shown = "".join(f"{tokens:18,}" if tokens else f"{'-':>18}" for tokens in room)
        print(f"  {weights:10}{shown}   ({size / GIB:,.0f} GiB)")
    print()


def longest_row(model: l4.Llama4, room: float) -> int:
    """The most tokens, in whole 1,024s and at most 10 million, whose cache takes so many bytes."""

    def cache_size(thousands: int) -> int:
        make = partial(eqx.filter_eval_shape, model.empty_cache, (1,), thousands * 1024)
        return size_of(make())

    low, high = 0, 10_240
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache_size(middle) <= room else (low, middle - 1)
    return low * 1024


def size_of(tree: object) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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
    except ValueError as error:
        print(f"  {error}")


if __name__ == "__main__":
    main()
