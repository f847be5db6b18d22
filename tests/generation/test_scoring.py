"""Scores of text against logits of the whole, and `transformers`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.distributed import DATA, TENSOR, shard
from llama4_eqx.generation import loglikelihood, token_logprobs, token_scores
from tests.toys import SCOUT, as_torch, random_tokens, reference_model, relative_error


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    reference = reference_model(SCOUT)
    reference.save_pretrained(folder)
    return reference, l4.load_checkpoint(folder)


@pytest.mark.parametrize("token_block", [1, 7, 1024])
@pytest.mark.parametrize("shape", [(21,), (3, 21), (2, 1, 21)])
def test_scores_are_those_of_the_logits(pair, shape, token_block):
    reference, model = pair
    tokens = random_tokens(*shape)
    scores = eqx.filter_jit(token_scores)(model, tokens, token_block=token_block)
    rows = tokens.reshape(-1, 21)
    with torch.no_grad():
        theirs = torch.log_softmax(reference(as_torch(rows, torch.long)).logits, -1).numpy()
    truth = np.take_along_axis(theirs[:, :-1], np.asarray(rows)[:, 1:, None], -1)[..., 0]
    ours = scores.logprobs.reshape(-1, 21)
    assert not ours[:, 0].any()
    assert relative_error(ours[:, 1:], truth) < 1e-5
    greedy = theirs[:, :-1].argmax(-1) == np.asarray(rows)[:, 1:]
    np.testing.assert_array_equal(scores.is_greedy.reshape(-1, 21)[:, 1:], greedy)


def test_packed_and_padded_are_apart(pair):
    model, (a, b) = pair[1], random_tokens(2, 12)
    alone = [eqx.filter_jit(token_logprobs)(model, row) for row in (a, b)]
    packed = jnp.concatenate([a, b])
    segment_ids = jnp.repeat(jnp.arange(2), 12)
    together = eqx.filter_jit(token_logprobs)(model, packed, segment_ids=segment_ids)
    assert relative_error(together, jnp.concatenate(alone)) < 1e-5
    mask = jnp.arange(20) >= 8
    padded = eqx.filter_jit(token_logprobs)(model, jnp.pad(a, (8, 0)), mask=mask)
    assert relative_error(padded[8:], alone[0]) < 1e-5
    assert not padded[:9].any()


def test_a_gradient_is_that_of_the_logits(pair):
    model, tokens = pair[1], random_tokens(2, 15)

    def ours(head):
        changed = eqx.tree_at(lambda m: m.lm_head, model, head)
        return token_logprobs(changed, tokens, token_block=4).sum()

    def plain(head):
        changed = eqx.tree_at(lambda m: m.lm_head, model, head)
        logprobs = jax.nn.log_softmax(changed(tokens).logits[:, :-1])
        return jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1).sum()

    assert relative_error(jax.jit(jax.grad(ours))(model.head), jax.grad(plain)(model.head)) < 1e-5


def test_no_logits_of_all_tokens(pair):
    tokens = random_tokens(2, 300)
    text = jax.jit(lambda m, t: token_logprobs(m, t, token_block=64)).lower(pair[1], tokens)
    assert "600x256" not in text.as_text()
    assert "64x256" in text.as_text()


def test_ragged_continuations(pair):
    """Of any lengths, in their own order; a greedy one is known as such."""
    reference, model = pair
    random = np.random.default_rng(0)
    contexts = [random.integers(1, 256, n).tolist() for n in (3, 40, 1, 70, 9)]
    continuations = [random.integers(1, 256, n).tolist() for n in (5, 1, 12, 3, 0)]
    greedy = l4.generate(model, jnp.array(contexts[1]), max_new_tokens=4)
    contexts.append(contexts[1])
    continuations.append(np.asarray(greedy).tolist())
    found = loglikelihood(model, contexts, continuations, batch_size=4)
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        text = torch.tensor([context + continuation])
        with torch.no_grad():
            logprobs = torch.log_softmax(reference(text).logits[0], -1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        truth = sum(logprobs[p, text[0, p + 1]].item() for p in places)
        assert abs(found.total[i] - truth) < 1e-4 * max(1, abs(truth))
    assert found.is_greedy.tolist() == [False, False, False, False, True, True]
    with pytest.raises(ValueError, match="Context 1 is empty: begin with"):
        loglikelihood(model, [[1], []], [[2], [3]])
    with pytest.raises(ValueError, match="1 contexts for 2 continuations"):
        loglikelihood(model, [[1]], [[2], [3]])


@pytest.mark.slow
def test_scores_on_a_mesh(pair):
    model, tokens = pair[1], random_tokens(4, 20)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = shard(model, mesh, DATA | TENSOR)
    ours = eqx.filter_jit(token_logprobs)(sharded, tokens, token_block=32)
    assert relative_error(ours, eqx.filter_jit(token_logprobs)(model, tokens)) < 1e-5
