"""Numbers, lists and arrays as users have them, and what is said about those that don't fit."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama4_eqx as l4
from llama4_eqx.distributed import TENSOR, shard
from llama4_eqx.generation import token_logprobs
from llama4_eqx.layers import FeedForward
from llama4_eqx.layers.context import PLAIN
from llama4_eqx.research import (
    Add,
    Patch,
    Probe,
    attribution_patching,
    ban_experts,
    direct_logit_attribution,
    force_experts,
    patch_sweep,
    replaced,
)
from tests.toys import MAVERICK, random_tokens, relative_error

pytestmark = pytest.mark.slow

SMALL = replace(MAVERICK, num_hidden_layers=4)


class Noted(FeedForward):
    """Something beside a network, of any type."""

    old: FeedForward
    note: object

    def __call__(self, x, *, execution=PLAIN):
        return self.old(x, execution=execution)


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))


def test_lists_and_arrays_of_numpy_are_as_good(model):
    tokens = random_tokens(10)
    source = model(tokens, probe=Probe(read="resid_post")).readings["resid_post"]

    def metric(logits):
        return logits[-1, 3]

    for given, values in ((np.asarray(tokens), np.asarray(source)), (tokens.tolist(), source)):
        for ours, truth in (
            (patch_sweep(model, given, values, metric), patch_sweep(model, tokens, source, metric)),
            (
                attribution_patching(model, given, values, metric),
                attribution_patching(model, tokens, source, metric),
            ),
            (
                direct_logit_attribution(model, given, given).total(),
                direct_logit_attribution(model, tokens, tokens).total(),
            ),
            (token_logprobs(model, given), token_logprobs(model, tokens)),
        ):
            np.testing.assert_array_equal(ours, truth)
    with pytest.raises(ValueError, match=r"one row of tokens, not an array of shape \(2, 10\)"):
        patch_sweep(model, jnp.stack([tokens, tokens]), source, metric)


def test_numbers_of_numpy_are_as_good(model):
    changed = [
        replaced(model, "feed_forward", lambda old: Noted(old, jnp.ones(())), layers=layers)
        for layers in (2, np.int64(2), [2], np.array([2]), range(2, 3))
    ]
    assert all(eqx.tree_equal(one, changed[0]) for one in changed)
    caches = [model.empty_cache(batch, n) for batch, n in (((3,), 8), (3, 8), (np.int64(3), 8))]
    assert all(eqx.tree_equal(one, caches[0]) for one in caches)
    assert model.empty_cache((np.int64(3),), np.int64(8)).capacity == 8


def test_values_of_edits(model):
    tokens, ones = random_tokens(10), np.ones(64, np.float32)

    def logits(edit):
        return model(tokens, probe=Probe(edit=edit)).logits

    truth = logits(Add("resid_post", jnp.asarray(ones)))
    for value in (ones, ones.tolist()):
        np.testing.assert_array_equal(logits(Add("resid_post", value)), truth)
    banned = [True] + [False] * 7
    np.testing.assert_array_equal(
        logits(ban_experts(banned)), logits(ban_experts(jnp.asarray(banned)))
    )
    with pytest.raises(ValueError, match=r"Patch has a value of shape \(63,\) for resid_post"):
        logits(Patch("resid_post", ones[:63]))
    with pytest.raises(ValueError, match=r"Patch has a value of shape \(2, 10, 64\)"):
        logits(Patch("resid_post", np.ones((2, 10, 64), np.float32)))


def test_an_expert_that_is_not_there(model):
    run = eqx.filter_jit(lambda m, t, edit: m(t, probe=Probe(edit=edit)).logits)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = random_tokens(10)
    truth = run(model, tokens, force_experts(7))
    assert relative_error(run(shard(model, mesh, TENSOR), tokens, force_experts(7)), truth) < 1e-5
    for one in (model, shard(model, mesh, TENSOR)):
        with pytest.raises(Exception, match=r"An edit chose an expert that isn't there.* 0 to 7"):
            run(one, tokens, force_experts(8)).block_until_ready()


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        (0.5, "a float"),
        (jnp.array(3), "int32"),
        (np.ones(2, bool), "bool"),
        (True, "a bool"),
    ],
)
def test_what_a_checkpoint_does_not_hold(model, note, kind, tmp_path):
    """What would be missing, or couldn't be read, is refused before anything is written."""
    own = replaced(model, "feed_forward", lambda old: Noted(old, note), layers=2)
    with pytest.raises(ValueError, match=rf"layers\.2\.feed_forward\.note is .*{kind}, which"):
        l4.save_checkpoint(own, tmp_path / "model")
    assert not (tmp_path / "model").exists()
