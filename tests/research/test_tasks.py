"""Twenty-four things that a researcher does, as they'd write them: in seven lines at most.

To change what happens in a layer took eight to eighteen where one had to copy the forward loop.
"""

import ast
import inspect
import sys
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama4_eqx as l4
from llama4_eqx.generation import Automaton, beam_search, generate_output, loglikelihood
from llama4_eqx.layers import FeedForward
from llama4_eqx.layers.context import PLAIN
from llama4_eqx.research import (
    Ablate,
    Add,
    Patch,
    Probe,
    Scale,
    attribution_patching,
    ban_experts,
    direct_logit_attribution,
    force_experts,
    in_layers,
    layer,
    logit_lens,
    patch_sweep,
    replaced,
    routing_counts,
    separated,
)
from llama4_eqx.training import (
    LoRA,
    init_train_state,
    make_train_step,
    next_token_loss,
    select,
)
from tests.toys import MAVERICK, random_tokens

pytestmark = pytest.mark.slow

SMALL = replace(MAVERICK, num_hidden_layers=4)
TOKENS, OTHER = random_tokens(2, 10)
MOST_LINES = 7


class Gated(FeedForward):
    """What was there, times a gate of its own."""

    old: FeedForward
    gate: jax.Array

    def __call__(self, x, *, execution=PLAIN):
        out, router_logits = self.old(x, execution=execution)
        return out * self.gate, router_logits


def gated(old):
    return Gated(old, jnp.array(0.5))


def train(model, trainable, loss=lambda model, *_: next_token_loss(model, TOKENS).token.total):
    """One step; what a user has anyway."""
    step = make_train_step(
        optax.sgd(0.1), lambda *args: (loss(*args), 1.0, None), trainable=trainable, donate=False
    )
    key = jax.random.key(1)
    state = init_train_state(model, optax.sgd(0.1), key=key, trainable=trainable)
    return step(state, TOKENS)[0].model


def changed(new, old):
    """The names of leaves that differ."""
    pairs = jax.tree.map(lambda a, b: not bool(jnp.array_equal(a, b)), new, old)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, differs in jax.tree_util.tree_leaves_with_path(pairs)
        if differs
    }


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))


@pytest.fixture(scope="module")
def forward():
    return eqx.filter_jit(lambda model, tokens, probe: model(tokens, probe=probe))


def test_read_the_residual_stream_of_every_layer(model, forward):
    readings = forward(model, TOKENS, Probe(read=("resid_pre", "resid_post"))).readings
    np.testing.assert_array_equal(readings["resid_pre"][1:], readings["resid_post"][:-1])


def test_what_would_each_layer_say(model, forward):
    output = forward(model, TOKENS, Probe(read="resid_post"))
    said = logit_lens(model, output.readings["resid_post"]).argmax(-1)
    np.testing.assert_array_equal(said[-1], output.logits.argmax(-1))


def test_where_does_a_head_look(model, forward):
    pattern = forward(model, TOKENS, Probe(read="pattern")).readings["pattern"]
    np.testing.assert_allclose(pattern[2, 1].sum(-1), 1, rtol=1e-5)


def test_which_experts_read_the_prompt(model, forward):
    expert_ids = forward(model, TOKENS, Probe(read="expert_ids")).readings["expert_ids"]
    assert expert_ids.shape == (2, 10, 1)


def test_which_experts_read_a_corpus(model):
    counts = routing_counts(model, [random_tokens(2, 10), random_tokens(2, 10, seed=1)])
    assert (counts.sum(-1) == 40).all()


def test_remove_a_head(model, forward):
    edit = Scale("head_out", jnp.array([1, 1, 1, 0])[:, None], layers=1)
    heads = forward(model, TOKENS, Probe(read="head_out", edit=edit)).readings["head_out"]
    assert not heads[1, :, 3].any()


def test_remove_an_expert(model, forward):
    edit = ban_experts(jnp.arange(8) == 2, layers=[1, 3])
    ids = forward(model, TOKENS, Probe(read="expert_ids", edit=edit)).readings["expert_ids"]
    assert not (ids == 2).any()


def test_send_a_token_to_an_expert(model, forward):
    edit = force_experts(5, layers=3, positions=4)
    ids = forward(model, TOKENS, Probe(read="expert_ids", edit=edit)).readings["expert_ids"]
    assert ids[1, 4] == 5


def test_remove_a_layer_for_one_call(model, forward):
    edit = Ablate(("attn_out", "ff_out"), layers=2)
    readings = forward(model, TOKENS, Probe(read="resid_post", edit=edit)).readings["resid_post"]
    np.testing.assert_array_equal(readings[2], readings[1])


def test_patch_one_prompt_into_another(model, forward):
    source = forward(model, OTHER, Probe(read="resid_post")).readings["resid_post"]
    patched = forward(model, TOKENS, Probe(edit=Patch("resid_post", source[-1], layers=3)))
    np.testing.assert_allclose(patched.logits, model(OTHER).logits, atol=1e-5)


def test_patch_every_layer_and_position(model, forward):
    source = forward(model, OTHER, Probe(read="resid_post")).readings["resid_post"]
    effect = patch_sweep(model, TOKENS, source, lambda logits: logits[-1, 3])
    assert effect.shape == (4, 10)


def test_the_same_by_one_gradient(model, forward):
    source = forward(model, OTHER, Probe(read="resid_post")).readings["resid_post"]
    effect = attribution_patching(model, TOKENS, source, lambda logits: logits[-1, 3])
    assert effect.shape == (4, 10)


def test_which_layer_wrote_a_logit(model):
    parts = direct_logit_attribution(model, TOKENS, OTHER)
    logits = jnp.take_along_axis(model(TOKENS).logits, OTHER[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(parts.total(), logits, atol=1e-5)


def test_steer_a_generation(model):
    pull = 100 * model.head[7] / jnp.linalg.norm(model.head[7])
    probe = Probe(edit=Add("resid_post", pull, layers=3))
    assert (l4.generate(model, TOKENS, max_new_tokens=3, probe=probe) == 7).all()


def test_generate_with_a_part_of_ones_own(model):
    own = replaced(model, "feed_forward", gated, layers=2)
    assert l4.generate(own, TOKENS, max_new_tokens=3).shape == (3,)


def test_save_a_model_with_a_part_of_ones_own(model, tmp_path):
    own = replaced(model, "feed_forward", gated, layers=2)
    l4.save_checkpoint(own, tmp_path / "own")
    again = l4.load_checkpoint(
        tmp_path / "own", make=lambda model: replaced(model, "feed_forward", gated, layers=2)
    )
    assert eqx.tree_equal(again, own)


def test_train_that_part_alone(model):
    own = replaced(model, "feed_forward", gated, layers=2)
    new = train(own, select(own, "*.gate"))
    assert {name.split(".")[-1] for name in changed(new, own)} == {"gate"}


def test_train_one_layer(model):
    apart = separated(model, [1])
    new = train(apart, select(apart, *in_layers(apart, [1], "*")))
    same = changed(layer(new, 0), layer(apart, 0)) | changed(layer(new, 2), layer(apart, 2))
    assert not same
    assert changed(layer(new, 1), layer(apart, 1))


def test_train_the_routers_alone(model):
    new = train(model, select(model, "*.router"))
    assert {name.split(".")[-1] for name in changed(new, model)} == {"router"}


def test_adapters_of_attention(model):
    lora = LoRA(model, "*.q_proj", "*.v_proj", rank=2, key=jax.random.key(0))
    new = train(
        lora,
        select(lora, "updates.*"),
        lambda lora, *_: next_token_loss(lora.attached(), TOKENS).token.total,
    )
    assert changed(new, lora)


def test_which_answer_is_likelier(model):
    found = loglikelihood(model, [[1, 2, 3]] * 2, [[4, 5], [6]])
    assert found.total.shape == (2,)


def test_how_sure_was_it_and_what_else(model):
    found = generate_output(model, TOKENS, max_new_tokens=3)
    beams = beam_search(model, TOKENS, beams=3, max_new_tokens=3)
    assert beams.scores.max() >= found.logprobs.sum() - 1e-4


def test_keep_to_a_language(model):
    """Odd and even tokens in turn."""
    even = jnp.arange(256) % 2 == 0
    odd_then_even = Automaton(jnp.stack([jnp.where(even, -1, 1), jnp.where(even, 0, -1)]))
    new = l4.generate(model, TOKENS, max_new_tokens=4, processors=odd_then_even)
    assert (new % 2).tolist() == [1, 0, 1, 0]


def test_fewer_layers_and_more_words(model, tmp_path):
    config = replace(model.config.text_config, num_hidden_layers=2, vocab_size=300)
    pruned = l4.with_config(model, l4.Llama4Config(config), layers=[0, 3], key=jax.random.key(1))
    l4.save_checkpoint(pruned, tmp_path / "pruned")
    assert eqx.tree_equal(l4.load_checkpoint(tmp_path / "pruned"), pruned)


def test_each_is_short():
    tasks = ast.parse(inspect.getsource(sys.modules[__name__])).body
    tasks = [one for one in tasks if getattr(one, "name", "").startswith("test_")][:-1]
    lines = {one.name: one.end_lineno - one.body[0].lineno + 1 for one in tasks}
    assert len(lines) == 24
    assert max(lines.values()) <= MOST_LINES, lines
