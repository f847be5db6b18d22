"""Trains a small Llama 4 from nothing on text, saves it, loads it back and lets it write.

    python examples/pretrain_text.py
    python examples/launch.py --processes 2 --devices 4 examples/pretrain_text.py

A byte-level model with Scout's pattern (three chunk-local layers, then a global one without
position embedding; mixtures of experts; QK norm) reads Python's own help topics, packed into rows,
for about two minutes on two cores. No weights, no network. The parameters are cut among all devices
of all processes. Stopped at any moment, either command goes on where the last one was. The folder
that it leaves, runs/pretrain_text/model, is one that `transformers` opens too.
"""

import gzip
import math
import shutil
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from tqdm import tqdm

import llama4_eqx as l4
from llama4_eqx.checkpoints import TrainCheckpointer, require_writable
from llama4_eqx.distributed import (
    FSDP,
    batch_sharding,
    connect,
    device_put_global,
    init_sharded,
    unshard,
)
from llama4_eqx.processing import byte_tokenizer, load_tokenizer
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.training import TrainState, init_train_state, make_train_step, next_token_loss
from llama4_eqx.training.data import Document, packed_batches

FOLDER = Path("runs/pretrain_text")
STEPS, ROWS, SEQ = 450, 8, 256
SAVE_EVERY = 50


def main(steps: int = STEPS, folder: Path = FOLDER) -> None:
    connect()
    require_writable(folder / "model")
    tokenizer = byte_tokenizer()
    texts, tests = split_topics()
    seen, held_out = ("\n\n".join(part).encode() for part in (texts, tests))
    print(f"{len(seen):,} bytes to read, {len(held_out):,} held out.")
    documents = [document(tokenizer, text) for text in texts]

    model = train(tokenizer, documents, steps, folder / "checkpoints")
    l4.save_checkpoint(model, folder / "model", overwrite=True)
    model = unshard(model)
    if jax.process_index() > 0:
        return  # the rest is for one

    bits = bits_per_byte(model, np.array(tokenizer.encode(held_out.decode())))
    print(
        f"Bits per held-out byte: {bits:.3f}; a trigram model {trigram_bits(seen, held_out):.3f}, "
        f"gzip {8 * len(gzip.compress(held_out, 9)) / len(held_out):.3f}."
    )
    tokenizer.save(folder / "model")
    shutil.rmtree(folder / "checkpoints")  # the run is over
    print(f"Saved to {folder / 'model'}; loading it back.\n")
    model, tokenizer = l4.load_checkpoint(folder / "model"), load_tokenizer(folder / "model")
    write(model, tokenizer, 'The "while" statement ')


def split_topics() -> tuple[list[str], list[str]]:
    """Python's help topics to learn from, and those held out."""
    texts = [topics[name] for name in sorted(topics)]
    split = len(texts) * 9 // 10
    return texts[:split], texts[split:]


def document(tokenizer: Tokenizer, text: str) -> Document:
    """A text of which every token counts."""
    tokens = np.array(tokenizer.encode(text), np.int32)
    return Document(tokens=tokens, target_mask=np.ones(len(tokens), bool))


def config(tokenizer: Tokenizer) -> l4.TextConfig:
    """Scout's pattern, small."""
    return l4.TextConfig(
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


def loss_function(
    model: l4.Llama4, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """The mean loss of a batch, the number of tokens that it is a mean over, nothing to report."""
    loss = next_token_loss(
        model,
        batch["tokens"],
        target_mask=batch["target_mask"],
        segment_ids=batch["segment_ids"],
        key=key,
    ).token
    return loss.total, loss.num_tokens, None


def train(tokenizer: Tokenizer, documents: list[Document], steps: int, folder: Path) -> l4.Llama4:
    """The model after so many steps; the folder holds what is needed to go on after a stop."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, steps // 20, steps, 1e-4)
    optimizer = optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)

    def start() -> TrainState:
        model = l4.Llama4(l4.Llama4Config(config(tokenizer)), key=jax.random.key(0))
        return init_train_state(model, optimizer, key=jax.random.key(1))

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    state = init_sharded(start, mesh, FSDP)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    print(f"A model of {parameters:,} parameters on {mesh.size} devices.")
    # Each process packs all documents, and its devices get their rows: any number of processes can
    # go on from a checkpoint.
    batches = iter(packed_batches(documents, rows=ROWS, seq=SEQ, seed=0, process=0, processes=1))
    place = batch_sharding(mesh, FSDP)
    with TrainCheckpointer(folder) as checkpoints:
        done, state = checkpoints.restore(state, batches) or (0, state)
        bar = tqdm(range(done, steps), "Training", initial=done, total=steps, unit="step")
        bar.disable = jax.process_index() > 0
        for i in bar:
            state, metrics = step(state, device_put_global(next(batches), place))
            if i % 10 == 0:
                bar.set_postfix_str(f"{float(metrics.loss) / math.log(2):.2f} bits per byte")
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == steps:
                checkpoints.save(i + 1, state, batches)
    return state.model


def bits_per_byte(model: l4.Llama4, tokens: np.ndarray) -> float:
    """On text cut into rows of `SEQ`, so that many bytes are read with little context."""
    rows = len(tokens) // (SEQ + 1)
    tokens = tokens[: rows * (SEQ + 1)].reshape(rows, SEQ + 1)
    loss = eqx.filter_jit(lambda model, tokens: next_token_loss(model, tokens).token.total)
    losses = [
        float(loss(model, jnp.asarray(tokens[i : i + ROWS], jnp.int32)))
        for i in range(0, rows - ROWS + 1, ROWS)
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


def write(model: l4.Llama4, tokenizer: Tokenizer, prompt: str) -> None:
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
