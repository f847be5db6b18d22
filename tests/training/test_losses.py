"""Losses and their gradients, against torch and `transformers`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import llama4_eqx as l4
from llama4_eqx.training import next_token_loss, router_report, token_loss
from tests.toys import MULTIMODAL, SCOUT, random_tokens, reference_model, relative_error

TOLERANCE = 1e-5


def problem(*shape, vocab=50, size=16, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(*shape, size)).astype(np.float32)
    head = random.normal(size=(vocab, size)).astype(np.float32)
    labels = random.integers(0, vocab, shape, dtype=np.int32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(labels), random.random(shape) < 0.7


@pytest.mark.parametrize("token_block", [1, 7, 16, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_token_loss_and_gradients_are_torchs(token_block, z_loss):
    hidden, head, labels, mask = problem(3, 11)

    def ours(hidden, head):
        loss = token_loss(
            hidden, head, labels, mask=jnp.asarray(mask), z_loss=z_loss, token_block=token_block
        )
        return 3 * loss.total, loss

    (value, loss), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    x, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (hidden, head))
    logits = (x @ w.T)[torch.tensor(mask)]
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(labels)[mask]).long())
    total = 3 * (truth + z_loss * (logits.logsumexp(-1) ** 2).mean())
    total.backward()
    assert relative_error(value, total.detach()) < TOLERANCE
    assert relative_error(loss.cross_entropy, truth.detach()) < TOLERANCE
    assert loss.num_tokens == mask.sum()
    for ours_, theirs in zip(gradients, (x.grad, w.grad), strict=True):
        assert relative_error(ours_, theirs) < TOLERANCE
    without = token_loss(
        hidden, head, labels, mask=jnp.asarray(mask), z_loss=z_loss, token_block=token_block
    )
    assert relative_error(3 * without.total, value) < TOLERANCE


def test_nothing_counted():
    hidden, head, labels, _ = problem(5)
    gradient = jax.grad(lambda h: token_loss(h, head, labels, mask=jnp.zeros(5, bool)).total)(
        hidden
    )
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_is_near_float32():
    hidden, head, labels, _ = problem(64)
    small = [x.astype(jnp.bfloat16) for x in (hidden, head)]
    loss = jax.value_and_grad(lambda h, w: token_loss(h, w, labels).total, argnums=(0, 1))
    value, gradients = loss(*small)
    truth, true_gradients = loss(*(x.astype(jnp.float32) for x in small))
    assert relative_error(value, truth) < 1e-5  # logits are in float32 in both
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert relative_error(gradient.astype(jnp.float32), true) < 2**-7  # two roundings


def test_memory_is_that_of_a_piece():
    """At the released vocabulary: at most 1/8 of the naive form's temporaries, with gradients."""
    batch, seq, size, vocab = 8, 1024, 64, 202048
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, seq, size), (vocab, size))
    ]
    labels = jnp.zeros((batch, seq), jnp.int32)

    def naive(hidden, head):
        logits = hidden @ head.T
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def ours(hidden, head):
        return token_loss(hidden, head, labels, token_block=256).total

    peaks = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
        for f in (ours, naive)
    ]
    assert peaks[0].temp_size_in_bytes < peaks[1].temp_size_in_bytes / 8


def test_next_token_loss_and_gradients_are_those_of_transformers(tmp_path):
    reference = reference_model(SCOUT)
    reference.save_pretrained(tmp_path)
    model = l4.load_checkpoint(tmp_path)
    tokens = random_tokens(2, 24)
    value, gradients = eqx.filter_value_and_grad(
        lambda model: next_token_loss(model, tokens, token_block=16).token.total
    )(model)
    torch_tokens = torch.tensor(np.asarray(tokens)).long()
    truth = reference(torch_tokens, labels=torch_tokens).loss
    truth.backward()
    assert relative_error(value, truth.detach()) < TOLERANCE
    assert relative_error(gradients.lm_head, reference.lm_head.weight.grad) < TOLERANCE
    embedding = reference.get_input_embeddings().weight.grad
    assert relative_error(gradients.embed_tokens, embedding) < 1e-4  # through all layers


def test_packed_documents_are_apart():
    """The mean over a row of two documents is that of both alone: nothing crosses the edge."""
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    tokens = random_tokens(30)
    ids = jnp.asarray([0] * 11 + [1] * 15 + [-1] * 4)
    packed = next_token_loss(model, tokens, segment_ids=ids).token
    parts = [next_token_loss(model, tokens[part]).token for part in (slice(11), slice(11, 26))]
    assert packed.num_tokens == 10 + 14
    mean = sum(part.total * part.num_tokens.astype(float) for part in parts) / 24
    assert relative_error(packed.total, mean) < TOLERANCE


def test_target_mask_picks_what_is_predicted():
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    tokens = random_tokens(12)
    targets = jnp.arange(12) >= 8
    loss = next_token_loss(model, tokens, target_mask=targets).token
    logits = jax.nn.log_softmax(model(tokens).logits[7:-1])
    truth = -jnp.take_along_axis(logits, tokens[8:, None], axis=-1).mean()
    assert loss.num_tokens == 4
    assert relative_error(loss.total, truth) < TOLERANCE


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_that_of_transformers(top_k):
    logits = np.random.default_rng(0).normal(size=(3, 2, 9, 8)).astype(np.float32)
    mask = np.random.default_rng(1).random((2, 9)) < 0.7
    report = router_report(jnp.asarray(logits), top_k=top_k, mask=jnp.asarray(mask))
    for layer in range(3):
        flat = torch.tensor(logits[layer].reshape(-1, 8))
        truth = load_balancing_loss_func((flat,), 8, top_k, torch.tensor(mask).long())
        assert relative_error(report.balance_loss[layer], truth) < TOLERANCE
        real = logits[layer].reshape(-1, 8)[mask.reshape(-1)]
        z = (torch.tensor(real).logsumexp(-1) ** 2).mean()
        assert relative_error(report.z_loss[layer], z) < TOLERANCE
        chosen = np.argsort(-real, axis=-1)[:, :top_k]
        load = np.bincount(chosen.reshape(-1), minlength=8) / chosen.size
        assert relative_error(report.load[layer], load) < TOLERANCE


def test_report_of_even_and_of_lopsided_routers():
    even = jnp.eye(4)[None] * 9
    lopsided = jnp.zeros((1, 4, 4)).at[..., 2].set(9.0)
    report = router_report(jnp.concatenate([even, lopsided]), top_k=1)
    np.testing.assert_allclose(report.entropy, [np.log(4), 0], atol=1e-6)
    assert report.balance_loss[0] == pytest.approx(1)
    assert report.balance_loss[1] > 3.9


def test_balance_loss_evens_out_the_load():
    """Steps down its gradient, on routers that send most tokens to one expert."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 8)), jnp.float32)
    logits = logits.at[..., 0].add(2.0)

    def balance(logits):
        return router_report(logits, top_k=1).balance_loss.sum()

    before = router_report(logits, top_k=1)
    for _ in range(50):
        logits -= 5 * jax.grad(balance)(logits)
    after = router_report(logits, top_k=1)
    assert after.balance_loss[0] < before.balance_loss[0]
    assert after.entropy[0] > before.entropy[0]


def test_balance_loss_reaches_every_router():
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    tokens = random_tokens(2, 16)
    gradients = eqx.filter_grad(
        lambda model: router_report(model(tokens).router_logits, top_k=1).balance_loss.sum()
    )(model)
    for layer in gradients.decoder.layers():
        assert jnp.abs(layer.feed_forward.router).max() > 0


def test_images_are_read():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    tokens = jnp.asarray([1, 2, *[250] * 4, 3, 4])
    pixels = jax.random.normal(jax.random.key(1), (1, 3, 28, 28))
    losses = [next_token_loss(model, tokens, pixel_values=p).token.total for p in (pixels, -pixels)]
    assert losses[0] != losses[1]
