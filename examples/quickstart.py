"""Trains a small Llama 4 from nothing, saves it, loads it back and lets it write.

    python examples/quickstart.py

A byte-level model with Scout's pattern (three chunk-local layers, then a global one without
position embedding; mixtures of experts; QK norm) reads the text of Python's own help topics for
about two minutes on two cores. No weights, no network. The folder that it leaves, runs/quickstart,
is one that `transformers` opens too.
"""

import gzip
import math
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer, load_tokenizer

FOLDER = Path("runs/quickstart")
STEPS, BATCH, SEQ = 450, 8, 256


def main(steps: int = STEPS, folder: Path = FOLDER) -> None:
    tokenizer = byte_tokenizer()
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    split = len(text) * 9 // 10
    seen, held_out = text[:split], text[split:]
    print(f"{len(seen):,} bytes to read, {len(held_out):,} held out.")

    config = l4.TextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        attention_chunk_size=64,
        floor_scale=256,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.stop_ids,
        pad_token_id=tokenizer.pad_id,
    )
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"A model of {parameters:,} parameters.")

    model = train(model, np.array(tokenizer.encode(seen.decode())), steps)

    bits = bits_per_byte(model, np.array(tokenizer.encode(held_out.decode())))
    print(
        f"Bits per held-out byte: {bits:.3f}; a trigram model {trigram_bits(seen, held_out):.3f}, "
        f"gzip {8 * len(gzip.compress(held_out, 9)) / len(held_out):.3f}."
    )

    l4.save_checkpoint(model, folder, overwrite=True)
    tokenizer.save(folder)
    print(f"Saved to {folder}; loading it back.\n")
    write(l4.load_checkpoint(folder), load_tokenizer(folder), 'The "while" statement ')


def train(model: l4.Llama4, tokens: np.ndarray, steps: int) -> l4.Llama4:
    """The model after so many steps on random pieces of the text."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, steps // 20, steps, 1e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )

    @eqx.filter_jit(donate="all")
    def step(model, state, batch):
        loss, gradients = eqx.filter_value_and_grad(next_token_loss)(model, batch)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    state = optimizer.init(eqx.filter(model, eqx.is_array))
    random = np.random.default_rng(0)
    bar = tqdm(range(steps), desc="Training", unit="step")
    for i in bar:
        starts = random.integers(0, len(tokens) - SEQ, (BATCH, 1))
        batch = jnp.asarray(tokens[starts + np.arange(SEQ + 1)], jnp.int32)
        model, state, loss = step(model, state, batch)
        if i % 10 == 0:
            bar.set_postfix_str(f"{float(loss) / math.log(2):.2f} bits per byte")
    return model


def next_token_loss(model: l4.Llama4, batch: jax.Array) -> jax.Array:
    """Mean nats per token, each predicted from those before it."""
    logits = model(batch[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def bits_per_byte(model: l4.Llama4, tokens: np.ndarray) -> float:
    """On text cut into rows of `SEQ`, so that many bytes are read with little context."""
    rows = len(tokens) // (SEQ + 1)
    tokens = tokens[: rows * (SEQ + 1)].reshape(rows, SEQ + 1)
    loss = eqx.filter_jit(next_token_loss)
    losses = [
        float(loss(model, jnp.asarray(tokens[i : i + BATCH], jnp.int32)))
        for i in range(0, rows - BATCH + 1, BATCH)
    ]
    return float(np.mean(losses)) / math.log(2)


def trigram_bits(seen: bytes, text: bytes) -> float:
    """Bits per byte of a trigram model that falls back on pairs, single bytes and chance."""
    counts = [Counter(seen[i : i + n] for i in range(len(seen))) for n in (1, 2, 3)]
    bits = 0.0
    for i in range(2, len(text)):
        probability = 1 / 256
        for n in (1, 2, 3):
            context, longer = text[i - n + 1 : i], text[i - n + 1 : i + 1]
            total = counts[n - 2][context] if n > 1 else len(seen)
            # Add the shorter model's guess as if it had been seen four times.
            probability = (counts[n - 1][longer] + 4 * probability) / (total + 4)
        bits -= math.log2(probability)
    return bits / (len(text) - 2)


def write(model: l4.Llama4, tokenizer, prompt: str) -> None:
    """Streams a continuation of 300 bytes: more than four attention chunks."""
    print(prompt, end="", flush=True)
    stream = tokenizer.stream()
    for token in l4.stream(
        model.unstacked(),
        jnp.asarray(tokenizer.encode(prompt), jnp.int32),
        max_new_tokens=300,
        sampler=l4.Sample(temperature=0.6, top_p=0.9),
        key=jax.random.key(1),
    ):
        print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    main()
