"""What isn't used of a forward call's output isn't computed."""

from dataclasses import replace

import equinox as eqx
import jax
import pytest

import llama4_eqx as l4
from llama4_eqx.training import next_token_loss
from tests.toys import SCOUT, random_tokens, relative_error

VOCAB = 9973  # a size that nothing else has


@pytest.fixture(scope="module")
def model():
    config = replace(SCOUT, vocab_size=VOCAB, num_hidden_layers=2)
    return l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_hidden_alone_costs_no_logits(model):
    tokens = random_tokens(2, 12)
    product = f"[24,{VOCAB}]"
    assert product in text_of(lambda m, t: m(t).logits, model, tokens).replace("f32", "")
    assert product not in text_of(lambda m, t: m(t).hidden, model, tokens).replace("f32", "")


def test_prefill_computes_the_last_logits_alone(model):
    tokens, cache = random_tokens(2, 12), model.empty_cache((2,), 20)
    text = text_of(lambda m, t, c: l4.prefill(m, t, c), model, tokens, cache).replace("f32", "")
    assert f"[24,{VOCAB}]" not in text
    assert f"[2,{VOCAB}]" in text


def test_the_loss_has_no_logits_of_all_tokens(model):
    tokens = random_tokens(2, 12)

    def loss(model, tokens):
        return next_token_loss(model, tokens, token_block=4).token.total

    text = text_of(jax.grad(loss), model, tokens).replace("f32", "")
    assert f"[24,{VOCAB}]" not in text
    assert f"[4,{VOCAB}]" in text


def test_logits_are_of_the_hidden_states(model):
    output = eqx.filter_jit(model)(random_tokens(2, 12))
    assert relative_error(output.logits, output.hidden @ model.head.T) < 1e-5
