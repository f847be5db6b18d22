"""Scout and Maverick at full size, by their shapes alone: seconds, on any laptop.

    python examples/shapes.py

Prints parameters and memory, then makes mistakes on purpose to show what is said about them.
"""

import functools
from collections.abc import Callable
from functools import partial

from jaxtyping import TypeCheckError, install_import_hook

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
CACHES = {"bfloat16": None, "int8": jnp.int8}


def main() -> None:
    configs = {"Scout": l4.Llama4Config.scout(), "Maverick": l4.Llama4Config.maverick()}
    for name, config in configs.items():
        describe(name, config)
    for name, config in configs.items():
        for cache in CACHES:
            fits(name, config, cache)
    make_mistakes()


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


def fits(name: str, config: l4.Llama4Config, cache: str) -> None:
    """On which devices the text model runs, shared out evenly, and with how long a row."""
    text = l4.Llama4Config(config.text_config)
    make = partial(l4.Llama4, text, dtype=jnp.bfloat16, key=jax.random.key(0))
    model = eqx.filter_eval_shape(make)

    @functools.cache
    def cache_size(thousands: int) -> int:
        empty = partial(model.empty_cache, (1,), thousands * 1024, dtype=CACHES[cache])
        return size_of(eqx.filter_eval_shape(empty))

    print(f"The longest row for which {name}'s text model leaves room, with a cache in {cache}:")
    print("  weights   " + "".join(f"{device:>18}" for device in DEVICES))
    for weights, quantization in WEIGHTS.items():
        size = size_of(
            eqx.filter_eval_shape(l4.quantize, model, quantization) if quantization else model
        )
        room = [
            longest_row(cache_size, memory * GIB * USABLE - size) for memory in DEVICES.values()
        ]
        shown = "".join(f"{tokens:18,}" if tokens else f"{'-':>18}" for tokens in room)
        print(f"  {weights:10}{shown}   ({size / GIB:,.0f} GiB)")
    print()


def longest_row(cache_size: Callable[[int], int], room: float) -> int:
    """The most tokens, in whole 1,024s and at most 10 million, whose cache takes so many bytes."""
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


def make_mistakes() -> None:
    """Gives the model a mask for one token too few, and one of its layers two swapped axes."""
    config = l4.Llama4Config.tiny()
    model = l4.Llama4(config, key=jax.random.key(0))
    tokens = jnp.zeros((2, 10), jnp.int32)
    print("A mask of 9 tokens for rows of 10:")
    try:
        model(tokens, mask=jnp.ones((2, 9), bool))
    except ValueError as error:
        print(f"  {error}\n")

    hidden = config.text_config.hidden_size
    mlp = l4.MLP(hidden, 32, init_std=0.02, dtype=jnp.float32, key=jax.random.key(0))
    print("Two rows of 10 tokens with their axes in the wrong order:")
    try:
        mlp(jnp.zeros((2, hidden, 10)))
    except TypeCheckError as error:
        print(f"  {error}")


if __name__ == "__main__":
    main()
