"""The research tools against hand-made runs and `transformers`."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llama4_eqx as l4
from llama4_eqx.research import (
    Ablate,
    Add,
    At,
    Patch,
    Probe,
    Scale,
    TunedLens,
    attribution_patching,
    ban_experts,
    direct_logit_attribution,
    force_experts,
    logit_lens,
    patch_sweep,
    routing_counts,
    tuned_lens_loss,
)
from tests.toys import MAVERICK, SCOUT, as_torch, random_tokens, reference_model, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
SMALL = replace(MAVERICK, num_hidden_layers=4)


@pytest.fixture(scope="module")
def model():
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, model)


def run(model, tokens, edit=None, read=()):
    return eqx.filter_jit(model)(tokens, probe=Probe(read=read, edit=edit))


def test_the_lens_of_the_last_layer_is_the_model(tmp_path):
    reference = reference_model(SCOUT)
    reference.save_pretrained(tmp_path)
    model, tokens = l4.load_checkpoint(tmp_path), random_tokens(2, 12)
    output = run(model, tokens, read="resid_post")
    lens = logit_lens(model, output.readings["resid_post"])
    assert relative_error(lens[-1], output.logits) < TOLERANCE
    with torch.no_grad():
        states = reference(as_torch(tokens, torch.long), output_hidden_states=True).hidden_states
        theirs = torch.stack([reference.lm_head(reference.model.norm(x)) for x in states[1:-1]])
    assert relative_error(lens[:-1], theirs) < TOLERANCE


def test_a_tuned_lens_begins_as_the_plain_one_and_learns(model):
    tokens = random_tokens(4, 12)
    output = run(model, tokens, read="resid_post")
    residuals = output.readings["resid_post"]
    lens = TunedLens(4, 64)
    np.testing.assert_array_equal(lens(model, residuals), logit_lens(model, residuals))
    loss = eqx.filter_jit(lambda lens: tuned_lens_loss(lens, model, residuals, output.logits))
    before = loss(lens)
    assert abs(before[-1]) < 1e-5 < before[0]
    for _ in range(5):
        gradients = jax.grad(lambda lens: loss(lens).sum())(lens)
        lens = jax.tree.map(lambda w, g: w - 0.1 * g, lens, gradients)
    assert (loss(lens)[:-1] < before[:-1]).all()


def test_a_sweep_is_one_patch_after_another(model):
    clean, corrupt = random_tokens(2, 10)
    source = run(model, clean, read=("resid_post", "router_logits")).readings

    def metric(logits):
        return logits[-1, 3] - logits[-1, 5]

    sweep = eqx.filter_jit(
        lambda m: patch_sweep(m, corrupt, source["resid_post"], metric, batch_size=7)
    )(model)
    assert sweep.shape == (4, 10)
    assert relative_error(sweep[-1, -1], metric(run(model, clean).logits)) < TOLERANCE
    for layer, position in ((0, 0), (2, 7), (3, 9)):
        edit = Patch(
            "resid_post", source["resid_post"][layer, position], layers=layer, positions=position
        )
        assert abs(sweep[layer, position] - metric(run(model, corrupt, edit).logits)) < 1e-4
    # Of layers that not all have: a dense one and a mixture take turns.
    sites = {"site": "router_logits", "positions": [4]}
    routed = patch_sweep(model, corrupt, source["router_logits"], metric, **sites)
    edit = Patch("router_logits", source["router_logits"][1, 4], layers=3, positions=4)
    assert abs(routed[1, 0] - metric(run(model, corrupt, edit).logits)) < 1e-4
    with pytest.raises(ValueError, match="Layer 2 has no site 'router_logits'"):
        patch_sweep(model, corrupt, source["router_logits"], metric, layers=[2], **sites)


def test_attribution_is_the_slope_of_patching(model):
    clean, corrupt = random_tokens(2, 6)
    source = run(model, clean, read="resid_mid").readings["resid_mid"]
    values = run(model, corrupt, read="resid_mid").readings["resid_mid"]
    step = 1e-2

    def metric(logits):
        return logits[-1, 3]

    near = values + step * (source - values)
    slopes = attribution_patching(model, corrupt, near, metric, site="resid_mid") / step
    plain = metric(run(model, corrupt).logits)
    patched = patch_sweep(model, corrupt, near, metric, site="resid_mid")
    # A quotient of float32 numbers over a finite step, without the curvature.
    np.testing.assert_allclose((patched - plain) / step, slopes, atol=0.05 * abs(slopes).max())


def test_parts_of_a_logit_sum_to_it(model):
    tokens, targets = random_tokens(2, 2, 11)
    parts = eqx.filter_jit(direct_logit_attribution)(model, tokens, targets)
    logits = jnp.take_along_axis(run(model, tokens).logits, targets[..., None], -1)[..., 0]
    assert relative_error(parts.total(), logits) < TOLERANCE
    assert parts.ff_out.shape == (4, 2, 11)


def test_edits_compose_in_order(model):
    tokens, ones = random_tokens(9), jnp.ones(64)
    at = {"layers": 1, "positions": 2}
    both = run(
        model, tokens, [Add("resid_mid", ones, **at), Scale("resid_mid", 2.0, **at)], "resid_mid"
    )
    plain = run(model, tokens, read="resid_mid").readings["resid_mid"][1, 2]
    assert relative_error(both.readings["resid_mid"][1, 2], 2 * (plain + 1)) < TOLERANCE
    ablated = run(model, tokens, Ablate("attn_out", layers=[0, 2]), "attn_out").readings["attn_out"]
    assert not ablated[jnp.array([0, 2])].any()
    assert ablated[1].any()
    mean = run(model, tokens, Ablate("ff_out", ones, layers=3), "ff_out").readings["ff_out"]
    np.testing.assert_array_equal(mean[3], jnp.ones((9, 64)))


def test_experts_are_banned_and_forced(model):
    """Each against the routing by hand."""
    tokens = random_tokens(30)
    sites = ("expert_ids", "router_weights", "router_logits")
    plain = run(model, tokens, read=sites).readings
    most = int(jnp.bincount(plain["expert_ids"][0, :, 0], length=8).argmax())
    banned = run(model, tokens, ban_experts(jnp.arange(8) == most, layers=1), sites).readings
    assert (plain["expert_ids"][0] == most).any()
    assert not (banned["expert_ids"][0] == most).any()
    forced = run(model, tokens, force_experts(5, layers=3, positions=[1, 2]), sites).readings
    assert (forced["expert_ids"][1, 1:3] == 5).all()
    np.testing.assert_array_equal(forced["expert_ids"][1, 3:], plain["expert_ids"][1, 3:])
    by_hand = jax.nn.sigmoid(plain["router_logits"][1, 1:3, 5:6])
    assert relative_error(forced["router_weights"][1, 1:3], by_hand) < TOLERANCE


def test_routing_counts_every_token_once(model):
    batches = [random_tokens(2, 16, seed=seed) for seed in (0, 1)]
    kinds = jnp.arange(256) % 3 - 1  # a third isn't counted
    counts = routing_counts(model, batches, kinds)
    assert counts.shape == (2, 2, 8)
    ids = [
        run(model, tokens, read="expert_ids").readings["expert_ids"][..., 0] for tokens in batches
    ]
    for kind in (0, 1):
        by_hand = np.zeros((2, 8))
        for tokens, chosen in zip(batches, ids, strict=True):
            for layer in range(2):
                of_kind = np.asarray(kinds[tokens] == kind)
                by_hand[layer] += np.bincount(np.asarray(chosen[layer])[of_kind], minlength=8)
        np.testing.assert_array_equal(counts[kind], by_hand)
    with pytest.raises(ValueError, match="no batches"):
        routing_counts(model, [])


def test_steering_reaches_generation(model):
    """A constant pull to one token at the last layer makes it the only one; stream, too."""
    prompt, token = random_tokens(1, 5), 77
    pull = 100 * model.head[token] / jnp.linalg.norm(model.head[token])
    probe = Probe(edit=Add("resid_post", pull, layers=3))
    new = l4.generate(model, prompt, max_new_tokens=6, probe=probe)
    assert (np.asarray(new) == token).all()
    streamed = [int(t[0]) for t in l4.stream(model, prompt, max_new_tokens=6, probe=probe)]
    assert streamed == np.asarray(new)[0].tolist()
    plain = l4.generate(model, prompt, max_new_tokens=6)
    assert not (np.asarray(plain) == token).all()


def test_a_function_can_edit_during_generation(model):
    calls = []

    def edit(site, value, layer):
        calls.append(site)
        return value

    prompt = random_tokens(1, 5)
    new = l4.generate(model, prompt, max_new_tokens=3, probe=Probe(edit=edit))
    np.testing.assert_array_equal(new, l4.generate(model, prompt, max_new_tokens=3))
    assert set(calls) == set(model.sites()) - {"pattern"}
    calls.clear()
    model(prompt[0], probe=Probe(edit=At("ff_out", edit)))
    assert set(calls) == {"ff_out"}
