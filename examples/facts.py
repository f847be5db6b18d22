"""A tiny world of facts, and a small Llama 4 that knows them: what the research examples look into.

    python examples/facts.py

Thirty sentences such as "The capital of France is Paris." are learnt by heart, byte by byte, in
half a minute on two cores; the model is kept in runs/facts and made anew where that is missing.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.training import init_train_state, make_train_step, next_token_loss

FOLDER = Path("runs/facts")
STEPS = 160
# Names of one length, so that prompts can be compared byte by byte.
WORLD = {
    "France": ("Paris", "French", "euro"),
    "Norway": ("Oslo", "Norwegian", "krone"),
    "Sweden": ("Stockholm", "Swedish", "krona"),
    "Poland": ("Warsaw", "Polish", "zloty"),
    "Greece": ("Athens", "Greek", "euro"),
    "Turkey": ("Ankara", "Turkish", "lira"),
    "Canada": ("Ottawa", "English", "dollar"),
    "Brazil": ("Brasilia", "Portuguese", "real"),
    "Mexico": ("Mexico City", "Spanish", "peso"),
    "Russia": ("Moscow", "Russian", "ruble"),
}
RELATIONS = ("capital", "language", "currency")


def prompt(relation: str, country: str) -> str:
    return f"The {relation} of {country} is "


def sentences() -> list[str]:
    return [
        f"{prompt(relation, country)}{answer}."
        for country, answers in WORLD.items()
        for relation, answer in zip(RELATIONS, answers, strict=True)
    ]


def config(tokenizer: Tokenizer) -> l4.Llama4Config:
    """Scout's pattern, small: three chunk-local layers, then a global one without positions; a
    mixture of experts in each."""
    return l4.Llama4Config(
        l4.TextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=96,
            intermediate_size=96,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            num_local_experts=4,
            attention_chunk_size=64,
            max_position_embeddings=1024,
            rope_theta=10000.0,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.stop_ids,
            pad_token_id=tokenizer.pad_id,
        )
    )


def encode(texts: list[str]) -> tuple[jax.Array, jax.Array]:
    """The texts' bytes as rows, padded on the right, and a mask of the real ones."""
    tokenizer = byte_tokenizer()
    rows = [tokenizer.encode(text) for text in texts]
    tokens = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray(tokens != tokenizer.pad_id)


def loss_function(
    model: l4.Llama4, batch: tuple[jax.Array, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    tokens, mask = batch
    loss = next_token_loss(model, tokens, mask=mask, key=key).token
    return loss.total, loss.num_tokens, None


def fit(model: l4.Llama4, steps: int) -> l4.Llama4:
    """The model after learning the sentences, all in each step."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=0.01)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)
    model = jax.tree.map(jnp.copy, model)  # a step takes its state's memory
    state = init_train_state(model, optimizer, key=jax.random.key(1))
    batch = encode(sentences())
    bar = tqdm(range(steps), "Learning facts", unit="step")
    for _ in bar:
        state, metrics = step(state, batch)
        bar.set_postfix_str(f"loss {float(metrics.loss):.3f}", refresh=False)
    return state.model


def load(steps: int = STEPS, folder: Path = FOLDER) -> tuple[l4.Llama4, Tokenizer]:
    """The model that knows the facts, from its folder or freshly trained, and its tokenizer."""
    tokenizer = byte_tokenizer()
    if not (folder / "model").exists():
        model = fit(l4.Llama4(config(tokenizer), key=jax.random.key(0)), steps)
        l4.save_checkpoint(model, folder / "model")
    return l4.load_checkpoint(folder / "model"), tokenizer


def answer(model: l4.Llama4, tokenizer: Tokenizer, text: str, **options: Any) -> str:
    """How the model continues the text, up to a full stop."""
    tokens, _ = encode([text])
    new = l4.generate(model, tokens, max_new_tokens=16, **options)
    return tokenizer.decode(np.asarray(new)[0]).split(".")[0]


def main(steps: int = STEPS, folder: Path = FOLDER) -> None:
    model, tokenizer = load(steps, folder)
    asked = ["capital of Norway", "language of Brazil", "currency of Poland"]
    for relation, country in (question.split(" of ") for question in asked):
        print(f"{prompt(relation, country)}{answer(model, tokenizer, prompt(relation, country))}")


if __name__ == "__main__":
    main()
