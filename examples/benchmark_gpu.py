"""Times the forms of experts and attention on this machine's GPU, at the width of Scout's layers.

    python examples/benchmark_gpu.py

Alternatives take turns and the median of each is printed: what the platform chooses against the
forms that any device has (`lax.ragged_dot`, blockwise attention). Floors: the rate of one plain
matrix product in the same run, and the rate at which weights are copied. Takes about four minutes
and 40 GB of GPU memory; most of the time is compiling.
"""

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import llama4_eqx as l4
from llama4_eqx.layers import Backends, grouped_mlp
from llama4_eqx.training import next_token_loss

FORMS = {"any device's": Backends("blockwise", "ragged"), "the platform's": Backends()}
LAYERS, TOKENS = 4, 8192


def interleaved(alternatives: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each alternative, run in turn after one round of warming up."""
    times = {name: [] for name in alternatives}
    for i in range(rounds + 1):
        for name, run in alternatives.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def compare(name: str, function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Times `function(backends, *arguments)` in both forms."""
    compiled = {
        form: jax.jit(lambda *arguments, b=backends: function(b, *arguments))
        .lower(*arguments)
        .compile()
        for form, backends in FORMS.items()
    }
    seconds = interleaved({form: lambda c=c: c(*arguments) for form, c in compiled.items()})
    old, new = (seconds[form] * 1e3 for form in FORMS)
    analyses: list[Any] = [c.memory_analysis() for c in compiled.values()]
    memory = [analysis.temp_size_in_bytes / 2**20 for analysis in analyses]
    print(
        f"{name:36} {old:7.1f} -> {new:6.1f} ms, {old / new:4.1f} times; "
        f"temporaries {memory[0]:5.0f} -> {memory[1]:5.0f} MiB",
        flush=True,
    )
    return seconds


def scout(layers: int, experts: int = 16, vocab: int = 202048) -> l4.Llama4:
    """Layers as wide as Scout's, in bfloat16, made on the GPU."""
    text = dataclasses.replace(
        l4.Llama4Config.scout().text_config,
        num_hidden_layers=layers,
        num_local_experts=experts,
        vocab_size=vocab,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    make = eqx.filter_jit(lambda key: l4.Llama4(l4.Llama4Config(text), dtype="bfloat16", key=key))
    return make(jax.random.key(0))


def experts() -> None:
    """One layer's routed experts, evenly loaded, against the rate of a plain product."""
    config = l4.Llama4Config.scout().text_config
    number, hidden, ff = config.num_local_experts, config.hidden_size, config.intermediate_size
    keys = jax.random.split(jax.random.key(0), 4)
    rows = jax.random.normal(keys[0], (TOKENS, hidden), "bfloat16")
    gate, up = (jax.random.normal(k, (number, hidden, ff), "bfloat16") * 0.02 for k in keys[1:3])
    down = jax.random.normal(keys[3], (number, ff, hidden), "bfloat16") * 0.02
    sizes = jnp.full(number, TOKENS // number)
    product = jax.jit(jnp.matmul)
    plain = interleaved({"product": lambda: product(rows, gate[0])})["product"]

    def forward(backends, rows, gate, up, down):
        return grouped_mlp(rows, gate, up, down, sizes, backend=backends.experts)

    def gradient(backends, *operands):
        def loss(*operands):
            return forward(backends, *operands).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*operands)

    for name, function, products in (("forward", forward, 3), ("and backward", gradient, 9)):
        seconds = compare(f"experts, {name}", function, rows, gate, up, down)
        share = products * plain / seconds["the platform's"]
        print(f"{'':36} {share:.0%} of the plain product's rate")


def serving() -> None:
    """Prefill and single steps of a few layers."""
    arrays, static = eqx.partition(scout(LAYERS), eqx.is_array)
    model = eqx.combine(arrays, static)

    def step(backends, arrays, tokens, cache):
        output = eqx.combine(arrays, static)(tokens, cache=cache, backends=backends)
        return output.logits[:, -1]

    prompt = jax.random.randint(jax.random.key(1), (1, TOKENS), 0, model.embed_tokens.shape[0])
    empty = model.empty_cache((1,), TOKENS)
    compare(f"prefill of {TOKENS}, {LAYERS} layers", step, arrays, prompt, empty)
    for rows in (1, 4, 16):
        cache = model.empty_cache((rows,), TOKENS)
        cache = eqx.tree_at(lambda c: c.length, cache, jnp.full(rows, TOKENS - 1, jnp.int32))
        name = f"decoding {rows} rows after {TOKENS - 1}"
        compare(name, step, arrays, jnp.arange(rows)[:, None], cache)


def training() -> None:
    """The gradient of a next-token loss."""
    arrays, static = eqx.partition(scout(2, experts=8, vocab=32768), eqx.is_array)
    tokens = jax.random.randint(jax.random.key(1), (1, TOKENS), 0, 32768)

    def gradient(backends, arrays, tokens):
        def loss(arrays):
            model = eqx.combine(arrays, static)
            return next_token_loss(model, tokens, backends=backends).token.total

        return jax.grad(loss)(arrays)

    compare("gradient, 2 layers of 8 experts", gradient, arrays, tokens)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind)
    for part in (experts, serving, training):
        part()
