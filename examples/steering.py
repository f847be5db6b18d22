"""Steering: a vector added to the residual stream changes what a small model answers.

    python examples/steering.py

How the model of `facts.py` reads a question about a country's language, less how it reads one about
its capital, on average over all countries: this vector, added while it reads the last byte of
questions about capitals, makes it begin to answer with languages. Which layer and which strength
work best is found by one compiled sweep, since both are traced.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from facts import RELATIONS, WORLD, answer, encode, load, prompt

import llama4_eqx as l4
from llama4_eqx.research import Add, Probe

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)


def main() -> None:
    model, tokenizer = load()
    vectors = mean_states(model, "language") - mean_states(model, "capital")
    questions, _ = encode([prompt("capital", country) for country in WORLD])
    languages = [answers[RELATIONS.index("language")] for answers in WORLD.values()]
    first_bytes = jnp.array([tokenizer.encode(language)[0] for language in languages])

    def turned(layer: jax.Array, strength: jax.Array) -> jax.Array:
        """How many answers begin as the language does."""
        steer = Add("resid_post", strength * vectors[layer], layers=layer, positions=-1)
        logits = model(questions, probe=Probe(edit=steer)).logits[:, -1]
        return jnp.sum(logits.argmax(-1) == first_bytes)

    sweep = jax.vmap(jax.vmap(turned, (None, 0)), (0, None))
    counts = np.asarray(jax.jit(sweep)(jnp.arange(len(vectors)), jnp.array(STRENGTHS)))
    print(
        f"Answers of {len(WORLD)} that begin with the language's letter, by strength {STRENGTHS}:"
    )
    for layer, row in enumerate(counts):
        print(f"    layer {layer}: {row.tolist()}")
    layer, strength = np.unravel_index(counts.argmax(), counts.shape)
    steer = Add(
        "resid_post",
        STRENGTHS[strength] * vectors[layer],
        layers=int(layer),
        positions=-1,
    )
    for country in ("France", "Brazil"):
        question = prompt("capital", country)
        print(f"{question}{answer(model, tokenizer, question)}", end="; steered: ")
        print(answer(model, tokenizer, question, probe=Probe(edit=steer)))


def mean_states(model: l4.Llama4, relation: str) -> jax.Array:
    """Each layer's residual stream at the last byte of the questions, averaged."""
    tokens, _ = encode([prompt(relation, country) for country in WORLD])
    output = eqx.filter_jit(model)(tokens, probe=Probe(read="resid_post"))
    return output.readings["resid_post"][:, :, -1].mean(1)


if __name__ == "__main__":
    main()
