"""Times this package against `transformers` (eager torch) on this machine, in one run.

    python examples/benchmark.py            # everything, about ten minutes
    python examples/benchmark.py decode     # or: forward train decode dtypes vision experts
                                            # length depth; llamacpp, if it is installed

Alternatives take turns and the median of each is printed, with ratios. The floors are measured in
the same run: matmul-bound work against the rate of one plain matrix product, decoding against the
rate at which a matrix-vector product streams weights from memory. Needs the `dev` extra.
"""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.training import init_train_state, make_train_step

CONFIG = l4.TextConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    intermediate_size_mlp=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=16,
    attention_chunk_size=256,
    max_position_embeddings=16384,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
BATCH, SEQ, NEW = 4, 512, 64


def interleaved(
    alternatives: Mapping[str, Callable[[], object]], rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each alternative, run in turn after one round of warming up."""
    times = {name: [] for name in alternatives}
    for i in range(rounds + 1):
        for name, run in alternatives.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def random_model(config: l4.TextConfig) -> l4.Llama4:
    return l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))


def random_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab_size)


def matmuls_per_token(config: l4.TextConfig, context: float) -> float:
    """Multiplications and additions of the forward pass; `context` is the mean of visible keys."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * head_dim * (heads + kv_heads) + 2 * heads * head_dim * context
    experts = 1 + config.num_experts_per_tok
    feed_forward = 3 * hidden * config.intermediate_size * experts
    router = hidden * config.num_local_experts
    layers = config.num_hidden_layers * (attention + feed_forward + router)
    return 2 * (layers + hidden * config.vocab_size)


def plain_product() -> tuple[Callable[[], object], float]:
    """Matrix products as large as the model's own, and their operations: several, since the first
    one after other work finds neither its operands nor its code in a cache."""
    x, w, times = jnp.ones((BATCH * SEQ, 512)), jnp.ones((512, 2048)), 20
    product = jax.jit(lambda x, w: x @ w)

    def run():
        return [jax.block_until_ready(product(x, w)) for _ in range(times)]

    return run, times * 2 * BATCH * SEQ * 512 * 2048


def streaming_product() -> tuple[Callable[[], object], float]:
    """A matrix-vector product of the width that XLA streams fastest, again and again, as decoding
    reads its weights, and the bytes of them."""
    x, w, times = jnp.ones((1, 2048)), jnp.ones((32768, 2048)), 8
    product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))

    def run():
        return [jax.block_until_ready(product(x, w)) for _ in range(times)]

    return run, times * w.nbytes


def reference_model(model: l4.Llama4) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        l4.save_checkpoint(model, f"{folder}/model")
        reference = transformers.Llama4ForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32
        )
    # The faster of its two ways to attend on a CPU.
    reference.set_attn_implementation("sdpa")
    return reference.eval()


def forward() -> None:
    model, tokens = random_model(CONFIG), random_tokens(BATCH, SEQ)
    reference, torch_tokens = reference_model(model), torch.tensor(np.asarray(tokens)).long()
    run = eqx.filter_jit(lambda model, tokens: model(tokens).logits)

    def theirs():
        with torch.no_grad():
            return reference(torch_tokens, use_cache=False).logits.numpy()

    product, operations = plain_product()
    seconds = interleaved(
        {"ours": lambda: run(model, tokens), "transformers": theirs, "product": product}
    )
    report("forward", seconds, BATCH * SEQ, operations, passes=1)


def train() -> None:
    model, tokens = random_model(CONFIG), random_tokens(BATCH, SEQ)
    reference, torch_tokens = reference_model(model), torch.tensor(np.asarray(tokens)).long()
    optimizer = optax.adamw(1e-4)

    def loss(model, tokens, key):
        logits, targets = model(tokens).logits[:, :-1], tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), jnp.asarray(losses.size), {}

    step = make_train_step(optimizer, loss)

    def steps_of(model):
        state = init_train_state(model, optimizer, key=jax.random.key(2))

        def run():
            nonlocal state
            state, metrics = step(state, tokens)
            return state, metrics

        return run

    reference.train()
    torch_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-4)
    ours = {"ours": steps_of(model), "unstacked": steps_of(random_model(CONFIG).unstacked())}

    def theirs():
        logits = reference(torch_tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, torch_tokens[:, 1:].flatten()).backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()

    product, operations = plain_product()
    seconds = interleaved(ours | {"transformers": theirs, "product": product}, rounds=3)
    report("train", seconds, BATCH * SEQ, operations, passes=3)
    seconds["ours"] = seconds["unstacked"]
    report("unstacked", seconds, BATCH * SEQ, operations, passes=3)


def decode() -> None:
    model, prompt = random_model(CONFIG), random_tokens(1, SEQ)
    reference, torch_prompt = reference_model(model), torch.tensor(np.asarray(prompt)).long()
    unstacked = model.unstacked(experts=True)

    def theirs(new):
        return reference.generate(
            torch_prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        ).numpy()

    stream, stream_bytes = streaming_product()
    seconds = interleaved(
        {
            "ours": lambda: l4.generate(unstacked, prompt, max_new_tokens=1 + NEW),
            "ours prompt": lambda: l4.generate(unstacked, prompt, max_new_tokens=1),
            "transformers": lambda: theirs(1 + NEW),
            "transformers prompt": lambda: theirs(1),
            "stream": stream,
        },
        rounds=7,
    )
    ours = NEW / (seconds["ours"] - seconds["ours prompt"])
    theirs_rate = NEW / (seconds["transformers"] - seconds["transformers prompt"])
    floor = stream_bytes / seconds["stream"] / (2 * matmuls_per_token(CONFIG, SEQ))
    print(
        f"decode   ours {ours:7.1f} tokens/s   transformers {theirs_rate:6.1f}   "
        f"ratio {ours / theirs_rate:5.2f}   of the streaming floor {ours / floor:.0%}"
    )


def dtypes() -> None:
    """Weights in bfloat16 and int8 against float32, at the size above and at hidden size 2,048."""
    wide = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 32}
    larger = dataclasses.replace(CONFIG, num_hidden_layers=4, num_key_value_heads=8, **wide)
    for config in (CONFIG, larger):
        model, prompt = random_model(config), random_tokens(1, SEQ)
        forms = {
            name: form.unstacked(experts=True)
            for name, form in (
                ("float32", model),
                ("bfloat16", jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)),
                ("int8", l4.quantize(model)),
            )
        }
        runs = {
            f"{name} {new}": partial(l4.generate, form, prompt, max_new_tokens=new)
            for name, form in forms.items()
            for new in (1, 1 + NEW)
        }
        seconds = interleaved(runs)
        rates, sizes = {}, {}
        for name, form in forms.items():
            rates[name] = NEW / (seconds[f"{name} {1 + NEW}"] - seconds[f"{name} 1"])
            sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(form))
            print(
                f"dtypes   hidden {config.hidden_size} {name:8} decode {rates[name]:.1f} tokens/s, "
                f"{rates[name] / rates['float32']:.2f} of float32; "
                f"prompt {seconds['float32 1'] / seconds[f'{name} 1']:.2f}; "
                f"bytes {sizes[name] / sizes['float32']:.2f}"
            )


def vision() -> None:
    """The vision encoder, pixels to features: the releases' tiles and patches, narrower layers."""
    config = l4.VisionConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=2048,
        vision_output_dim=1024,
        projector_input_dim=1024,
        projector_output_dim=1024,
    )
    model = l4.VisionModel(config, key=jax.random.key(0))
    reference = transformers.Llama4VisionModel(transformers.Llama4VisionConfig(**config.to_hf()))
    reference.set_attn_implementation("sdpa")
    reference.eval()
    pixels = jax.random.normal(jax.random.key(1), (BATCH, 3, config.image_size, config.image_size))
    torch_pixels = torch.tensor(np.asarray(pixels))
    run = eqx.filter_jit(lambda model, pixels: model(pixels))

    def theirs():
        with torch.no_grad():
            return reference(torch_pixels).last_hidden_state.numpy()

    product, operations = plain_product()
    seconds = interleaved(
        {"ours": lambda: run(model, pixels), "transformers": theirs, "product": product}
    )
    hidden, patches = config.hidden_size, 1 + (config.image_size // config.patch_size) ** 2
    attention = 4 * hidden**2 + 2 * patches * hidden
    layer = patches * (attention + 2 * hidden * config.intermediate_size)
    floor = operations / seconds["product"] / (2 * config.num_hidden_layers * layer)
    ours, their_rate = BATCH / seconds["ours"], BATCH / seconds["transformers"]
    print(
        f"vision   ours {ours:7.2f} tiles/s    transformers {their_rate:6.2f}   "
        f"ratio {ours / their_rate:5.2f}   of the matmul floor {ours / floor:.0%} "
        f"(transformers {their_rate / floor:.0%})"
    )


def report(
    name: str, seconds: dict[str, float], tokens: int, operations: float, *, passes: int
) -> None:
    """One line; a training step's floor is three forward passes."""
    ours, theirs = tokens / seconds["ours"], tokens / seconds["transformers"]
    floor = operations / seconds["product"] / (passes * matmuls_per_token(CONFIG, SEQ / 4))
    print(
        f"{name:9} ours {ours:7.1f} tokens/s   transformers {theirs:6.1f}   "
        f"ratio {ours / theirs:5.2f}   of the matmul floor {ours / floor:.0%}"
    )


def experts() -> None:
    """Cost of eight times the experts at the same tokens."""
    tokens = random_tokens(BATCH, SEQ)
    run = eqx.filter_jit(lambda model, tokens: model(tokens).logits)
    few = random_model(CONFIG)
    many = random_model(dataclasses.replace(CONFIG, num_local_experts=128, num_hidden_layers=4))
    few = random_model(dataclasses.replace(CONFIG, num_hidden_layers=4))
    seconds = interleaved({"16": lambda: run(few, tokens), "128": lambda: run(many, tokens)})
    print(f"experts  128 cost {seconds['128'] / seconds['16']:.2f} times 16 (forward, 4 layers)")


def length() -> None:
    """Cost of four times the tokens, three layers of four being local with chunks of 256."""
    run = eqx.filter_jit(lambda model, tokens: model(tokens).hidden)
    model = random_model(CONFIG)
    short, long = random_tokens(1, 2048), random_tokens(1, 8192)
    seconds = interleaved(
        {"2048": lambda: run(model, short), "8192": lambda: run(model, long)}, rounds=3
    )
    print(f"length   8192 tokens cost {seconds['8192'] / seconds['2048']:.2f} times 2048 (forward)")


def depth() -> None:
    """Compile time of 48 layers against 8."""
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "head_dim": 16}
    seconds = {}
    for layers in (8, 48):
        config = dataclasses.replace(CONFIG, num_hidden_layers=layers, **small)
        model, tokens = random_model(config), jnp.zeros((1, 512), jnp.int32)
        times = []
        for _ in range(3):
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(lambda model, tokens: model(tokens).logits).lower(model, tokens).compile()
            times.append(time.perf_counter() - start)
        seconds[layers] = median(times)
    print(
        f"depth    48 layers compile in {seconds[48]:.1f} s, "
        f"{seconds[48] / seconds[8]:.2f} times 8 layers"
    )


def llamacpp() -> None:
    """Decoding against llama.cpp."""
    import benchmark_llamacpp

    benchmark_llamacpp.main()


if __name__ == "__main__":
    parts = {
        f.__name__: f for f in (forward, train, decode, dtypes, vision, experts, length, depth)
    }
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name in sys.argv[1:] or parts:
        (llamacpp if name == "llamacpp" else parts[name])()
