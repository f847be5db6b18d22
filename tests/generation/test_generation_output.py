"""What a generation tells beside its tokens; samples; caches taken apart; few programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama4_eqx as l4
from llama4_eqx.generation import Request, generate_output, prefill, token_logprobs
from llama4_eqx.generation.request import bucket
from llama4_eqx.layers import Probe
from tests.test_invariants import random_model
from tests.toys import MAVERICK, SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return random_model(SCOUT)


def test_logprobs_lengths_and_cache(model):
    prompt = random_tokens(3, 9)
    free = np.asarray(l4.generate(model, prompt, max_new_tokens=20))
    stop = int(free[1, 6])
    found = generate_output(model, prompt, max_new_tokens=20, stop_ids=stop)
    whole = jnp.concatenate([prompt, found.tokens], -1)
    truth = np.array(eqx.filter_jit(token_logprobs)(model, whole)[:, 9:])
    for row in range(3):
        ends = np.flatnonzero(free[row] == stop)
        assert found.lengths[row] == (ends[0] + 1 if len(ends) else 20)
        truth[row, found.lengths[row] :] = 0
    assert int(found.lengths.min()) < 20
    assert relative_error(found.logprobs, truth) < 1e-5
    # The cache goes on where the text ends: but for the last token, which the model hasn't read.
    again = l4.generate(model, found.tokens[:, -1:], cache=found.cache, max_new_tokens=5)
    np.testing.assert_array_equal(again, l4.generate(model, whole, max_new_tokens=5))


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_readings_are_those_of_a_forward_call(form):
    model = random_model(MAVERICK)
    model = model if form == "scanned" else model.unstacked()
    sites = ("resid_post", "router_logits", "expert_ids", "final_norm")
    prompt, probe = random_tokens(2, 7), Probe(read=sites)
    found = generate_output(model, prompt, max_new_tokens=11, probe=probe)
    whole = jnp.concatenate([prompt, found.tokens], -1)[:, :-1]
    truth = eqx.filter_jit(model)(whole, probe=probe).readings
    assert set(found.readings) == set(sites)
    for site in sites:
        assert found.readings[site].shape == truth[site].shape
        assert relative_error(found.readings[site], truth[site]) < 1e-5
    with pytest.raises(ValueError, match="can't be joined over the steps"):
        generate_output(model, prompt, max_new_tokens=3, probe=Probe(read="pattern"))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 8)])
def test_samples_share_a_prefill(model, shape):
    prompt = random_tokens(*shape)
    key, probe = jax.random.key(1), Probe(read="resid_mid")
    options = {"sampler": l4.Sample(), "key": key, "max_new_tokens": 6, "probe": probe}
    found = generate_output(model, prompt, samples=4, **options)
    copies = jnp.repeat(prompt[..., None, :], 4, -2)
    alone = generate_output(model, copies, **options)
    np.testing.assert_array_equal(found.tokens, alone.tokens)
    assert found.tokens.shape == (*shape[:-1], 4, 6)
    assert len(np.unique(np.asarray(found.tokens).reshape(-1, 6), axis=0)) > 1
    assert relative_error(found.readings["resid_mid"], alone.readings["resid_mid"]) < 1e-5


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_rows_of_a_cache(model, form):
    model = model if form == "scanned" else model.unstacked()
    prefix, ends = random_tokens(2, 10), random_tokens(2, 3, 6, seed=4)
    _, cache = prefill(model, prefix, model.empty_cache((2,), 32))
    kept = cache.repeat(3)  # three prompts for each of two prefixes
    new = l4.generate(model, ends, cache=kept, max_new_tokens=8)
    whole = jnp.concatenate([jnp.broadcast_to(prefix[:, None], (2, 3, 10)), ends], -1)
    np.testing.assert_array_equal(new, l4.generate(model, whole, max_new_tokens=8))
    some = l4.generate(
        model, ends[jnp.array([1, 0, 1]), 0], cache=cache.take([1, 0, 1]), max_new_tokens=8
    )
    np.testing.assert_array_equal(some, new[jnp.array([1, 0, 1]), 0])
    of_each = kept.take(jnp.array([[2, 0], [1, 1]]))
    chosen = ends[jnp.arange(2)[:, None], jnp.array([[2, 0], [1, 1]])]
    np.testing.assert_array_equal(
        l4.generate(model, chosen, cache=of_each, max_new_tokens=8),
        new[jnp.arange(2)[:, None], jnp.array([[2, 0], [1, 1]])],
    )
    with pytest.raises(ValueError, match="don't choose along the last axis"):
        kept.take(np.array([0, 1]))


def test_rewinding(model):
    """Chunks have 8 tokens here: what a ring has lost isn't guessed."""
    assert SCOUT.attention_chunk_size == 8
    text, other = random_tokens(1, 40), random_tokens(1, 5, seed=8)
    _, cache = prefill(model, text, model.empty_cache((1,), 64))
    for length in (40, 38, 33, 32):
        logits, _ = prefill(model, other, cache.rewind(length))
        whole = jnp.concatenate([text[:, :length], other], -1)
        assert relative_error(logits, model(whole).logits[:, -1]) < 1e-5
    for length, sentence in ((31, "no longer holds"), (41, "from 0 to"), (-1, "from 0 to")):
        with pytest.raises(ValueError, match=sentence):
            cache.rewind(length)
    with pytest.raises(Exception, match="no longer holds"):
        jax.jit(lambda cache, n: cache.rewind(n))(cache, 20).length.block_until_ready()
    begun = model.empty_cache((1,), 64, start=3)
    _, short = prefill(model, text[:, :12], begun)
    _, fresh = prefill(model, text[:, :6], begun)
    logits, _ = prefill(model, other, short.rewind(6))
    assert relative_error(logits, prefill(model, other, fresh)[0]) < 1e-5


def test_sixty_lengths_compile_a_handful_of_programs(model, compiled):
    prompts = [random_tokens(1, length) for length in range(1, 61)]
    wanted = [l4.generate(model, prompts[30], max_new_tokens=4)]
    jax.clear_caches()
    compiled.clear()
    new = [l4.generate(model, p, max_new_tokens=np.int64(3 + i % 3)) for i, p in enumerate(prompts)]
    assert len(compiled) <= 6, len(compiled)
    assert [len(row[0]) for row in new] == [3 + i % 3 for i in range(60)]
    np.testing.assert_array_equal(new[30][:, :3], wanted[0][:, :3])


def test_buckets():
    sizes = sorted({bucket(length) for length in range(1, 5000)})
    assert sizes == [16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(length <= bucket(length) <= max(16, 2 * length) for length in range(1, 5000))


def test_inside_a_users_jit_and_vmap(model):
    prompt = random_tokens(2, 9)
    plain = l4.generate(model, prompt, max_new_tokens=7)
    under = eqx.filter_jit(lambda model, prompt: l4.generate(model, prompt, max_new_tokens=7))
    np.testing.assert_array_equal(under(model, prompt), plain)
    fixed = eqx.filter_jit(lambda model: l4.generate(model, prompt, max_new_tokens=7))
    np.testing.assert_array_equal(fixed(model), plain)
    keys = jax.random.split(jax.random.key(0), 3)

    def draw(key):
        return l4.generate(model, prompt, max_new_tokens=7, sampler=l4.Sample(), key=key)

    np.testing.assert_array_equal(jax.vmap(draw)(keys)[1], draw(keys[1]))


@pytest.mark.parametrize(("options", "sentence"), [({"samples": 0}, "samples"), ({}, "missing")])
def test_request_errors(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        Request([1, 2], **({"max_new_tokens": 3} | options if options else {}))
