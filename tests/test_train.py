"""The training step, against torch's optimiser, and as equalities."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jaxtyping import TypeCheckError

import llama4_eqx as l4
from llama4_eqx.balance import (
    rebalanced,
    selection_bias,
    with_selection_bias,
    without_selection_bias,
)
from llama4_eqx.losses import next_token_loss, router_report
from llama4_eqx.train import init_train_state, make_train_step, select
from tests.toys import (
    MAVERICK,
    MULTIMODAL,
    SCOUT,
    TOYS,
    random_tokens,
    reference_model,
    relative_error,
)

TOLERANCE = 1e-5
# A scanned cycle of a chunk-local and a global layer: quick to compile.
SMALL = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))


def loss_function(model, batch, key, **options):
    loss = next_token_loss(model, batch["tokens"], target_mask=batch.get("counted"), **options)
    top_k = model.config.text_config.num_experts_per_tok
    report = router_report(
        loss.router_logits, top_k=top_k, mask=loss.real, selection_bias=selection_bias(model)
    )
    return loss.token.total, loss.token.tokens, report


def toy(config=SMALL, seed=0):
    return l4.Llama4(l4.Llama4Config(config), key=jax.random.key(seed))


def counted_batch(*shape, seed=0):
    random = np.random.default_rng(seed)
    return {
        "tokens": random_tokens(*shape, seed=seed),
        "counted": jnp.asarray(random.random(shape) < random.random((*shape[:-1], 1))),
    }


# One step for the tests that compare with it, so that it is compiled once.
SGD = optax.sgd(0.1)
PLAIN = make_train_step(SGD, loss_function)


@eqx.filter_jit
def output_of(model, tokens):
    return model(tokens)


def largest_difference(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def test_steps_are_torchs(tmp_path):
    """Three steps of SGD with momentum and clipping, on `transformers`' own model and loss."""
    reference = reference_model(SMALL)
    reference.save_pretrained(tmp_path / "before")
    model = l4.load_checkpoint(tmp_path / "before")
    optimizer = optax.sgd(0.05, momentum=0.9)
    step = make_train_step(optimizer, loss_function, clip_norm=0.5)
    state = init_train_state(model, optimizer, key=jax.random.key(0))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for i in range(3):
        tokens = random_tokens(2, 40, seed=i)
        state, report = step(state, {"tokens": tokens})
        ids = torch.tensor(np.asarray(tokens)).long()
        theirs.zero_grad()
        loss = reference(ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        theirs.step()
        assert relative_error(report.loss, loss.detach()) < TOLERANCE
        assert relative_error(report.gradient_norm, norm) < TOLERANCE
        assert report.weight == 2 * 39
    reference.save_pretrained(tmp_path / "after")
    truth = l4.load_checkpoint(tmp_path / "after")
    assert largest_difference(state.model, truth) < TOLERANCE
    assert state.step == 3


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_micro_batches_are_one_batch(micro_batches):
    """Although they count different numbers of tokens."""
    batch = counted_batch(4, 40)
    parts = make_train_step(SGD, loss_function, micro_batches=micro_batches)
    split = jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), batch)
    start = partial(init_train_state, optimizer=SGD, key=jax.random.key(0))
    one, report_of_one = PLAIN(start(toy()), batch)
    many, report_of_many = parts(start(toy()), split)
    assert largest_difference(one.model, many.model) < TOLERANCE
    assert relative_error(report_of_many.loss, report_of_one.loss) < TOLERANCE
    assert relative_error(report_of_many.gradient_norm, report_of_one.gradient_norm) < TOLERANCE
    assert report_of_many.weight == report_of_one.weight == int(batch["counted"][:, 1:].sum())


def test_a_batch_without_micro_batches_is_refused():
    optimizer = optax.sgd(0.1)
    step = make_train_step(optimizer, loss_function, micro_batches=3)
    state = init_train_state(toy(), optimizer, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"3 micro-batches along its first axis.*\(4, 40\)"):
        step(state, {"tokens": random_tokens(4, 40)})


def test_nothing_counted_changes_nothing():
    tokens = random_tokens(4, 40)
    state = init_train_state(toy(), SGD, key=jax.random.key(0))
    state, report = PLAIN(state, {"tokens": tokens, "counted": jnp.zeros(tokens.shape, bool)})
    assert report.loss == report.weight == report.gradient_norm == 0
    assert eqx.tree_equal(state.model, toy())


@pytest.mark.parametrize("keep", ["nothing", "everything"])
def test_what_is_kept_changes_no_gradient(keep):
    tokens, model = random_tokens(2, 40), toy()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, keep):
        return next_token_loss(model, tokens, keep=keep).token.total

    assert largest_difference(gradient(model, keep), gradient(model, "products")) < TOLERANCE


def test_what_is_kept_changes_no_vision_gradient():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    pixels = jax.random.normal(jax.random.key(1), (3, 3, 28, 28))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(vision, keep):
        return jnp.sum(vision(pixels, keep=keep) ** 2)

    truth = gradient(model.vision_model, "products")
    for keep in ("nothing", "everything"):
        assert largest_difference(gradient(model.vision_model, keep), truth) < TOLERANCE


def test_keeping_less_takes_less_memory():
    config = replace(SMALL, num_hidden_layers=16, no_rope_layers=(1, 0) * 8)
    optimizer = optax.sgd(0.1)
    state = init_train_state(toy(config), optimizer, key=jax.random.key(0))
    batch = {"tokens": random_tokens(4, 256)}

    def temporaries(keep):
        step = make_train_step(optimizer, partial(loss_function, keep=keep))
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    nothing, products, everything = map(temporaries, ("nothing", "products", "everything"))
    assert nothing < 0.6 * products < 0.6 * everything


def test_an_unknown_name_of_what_to_keep():
    # The first comes from the shape checks, which tests turn on.
    with pytest.raises((TypeCheckError, ValueError), match="'products', 'nothing', 'everything'"):
        toy()(random_tokens(1, 8), keep="all")


def test_bfloat16_computes_with_float32_masters():
    batch = counted_batch(4, 40)
    start = partial(init_train_state, optimizer=SGD, key=jax.random.key(0))
    step = make_train_step(SGD, loss_function, compute_dtype=jnp.bfloat16)
    small, report = step(start(toy()), batch)
    truth, true_report = PLAIN(start(toy()), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.model)} == {jnp.dtype(jnp.float32)}
    assert relative_error(report.loss, true_report.loss) < 2**-8  # bfloat16 rounds by up to 2**-9
    assert 0 < relative_error(report.gradient_norm, true_report.gradient_norm) < 0.02
    # The update is too small for bfloat16 parameters, and is there.
    change = jax.tree.map(jnp.subtract, small.model, toy())
    true_change = jax.tree.map(jnp.subtract, truth.model, toy())
    assert 0.9 < optax.tree.norm(change) / optax.tree.norm(true_change) < 1.1


def test_frozen_parts_stay_and_cost_no_optimiser_state():
    optimizer, model = optax.adamw(0.01), toy()
    trainable = select(model, "decoder.*", "!*.router", "!*layernorm*")
    step = make_train_step(optimizer, loss_function, trainable=trainable)
    state = init_train_state(model, optimizer, key=jax.random.key(0), trainable=trainable)
    trained = eqx.filter(model, trainable)
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if eqx.is_array(leaf))
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained)) + 1
    old = jax.tree.map(np.asarray, model)
    state, _ = step(state, {"tokens": random_tokens(2, 40)})
    new_trained, new_frozen = eqx.partition(state.model, trainable)
    assert eqx.tree_equal(new_frozen, eqx.partition(old, trainable)[1])
    pairs = zip(
        jax.tree.leaves(new_trained), jax.tree.leaves(eqx.filter(old, trainable)), strict=True
    )
    assert all(not np.array_equal(new, before) for new, before in pairs)
    assert state.model.lm_head is not None
    np.testing.assert_array_equal(state.model.lm_head, old.lm_head)


def test_select_names_paths():
    model = toy(MAVERICK)
    chosen = select(model, "*.self_attn.?_proj", "embed_tokens", "!*.k_proj")
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, chosen))
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}
    assert "embed_tokens" in names
    assert {name.rpartition(".")[2] for name in names} == {
        "embed_tokens", "q_proj", "v_proj", "o_proj"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'decoder\.attention\.\*' fits no leaf. Paths look"):
        select(model, "decoder.attention.*")


def test_the_average_follows():
    def mix(moved, old, new):
        return (1 - moved) * old + moved * np.asarray(new)

    optimizer, batch = optax.sgd(0.5), {"tokens": random_tokens(2, 20)}
    step = make_train_step(optimizer, loss_function, average_decay=0.5)
    state = init_train_state(toy(), optimizer, key=jax.random.key(0), average=True)
    truth = jax.tree.map(np.asarray, state.model)
    for i in range(8):
        state, _ = step(state, batch)
        moved = max(0.5, 9 / (10 + i))
        truth = jax.tree.map(partial(mix, moved), truth, state.model)
    assert largest_difference(state.averaged_model(), truth) < TOLERANCE
    assert largest_difference(state.averaged_model(), state.model) > 1e-3
    without = init_train_state(toy(), optimizer, key=jax.random.key(0))
    with pytest.raises(ValueError, match="average=True"):
        without.averaged_model()


def test_each_step_has_a_key_of_its_own():
    """Dropout differs from step to step and from one micro-batch to the next."""
    seen = make_train_step(
        optax.sgd(0.0),
        lambda model, batch, key: (
            jnp.sum(model) * 0,
            jnp.float32(1),
            jax.random.uniform(key, (3,)),
        ),
        micro_batches=2,
    )
    state = init_train_state(jnp.ones(2), optax.sgd(0.0), key=jax.random.key(0))
    state, first = seen(state, jnp.zeros((2, 1)))
    state, second = seen(state, jnp.zeros((2, 1)))
    assert not np.allclose(first.other, second.other)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    mean = np.mean([jax.random.uniform(key, (3,)) for key in keys], axis=0)
    np.testing.assert_allclose(first.other, mean, rtol=1e-6)


@pytest.mark.parametrize("config", [SMALL, MAVERICK, TOYS["tail"], TOYS["top-2"]])
def test_selection_bias_decides_who_is_chosen_and_nothing_else(config):
    model, tokens = toy(config), random_tokens(2, 30)
    truth = output_of(model, tokens)
    biased = with_selection_bias(model)
    zero = selection_bias(biased)
    assert zero.shape == (len(truth.router_logits), config.num_local_experts)
    # The scores' choice equals the logits', with nothing added.
    assert relative_error(output_of(biased, tokens).logits, truth.logits) < TOLERANCE
    # Only expert 1 is pushed, in the last MoE layer only: every token goes there.
    load = jnp.ones_like(zero).at[-1, 1].set(0)
    pushed = rebalanced(biased, load, rate=1.0)
    expected = jnp.zeros_like(zero).at[-1].set(jnp.where(jnp.arange(zero.shape[1]) == 1, 1, -1))
    np.testing.assert_array_equal(selection_bias(pushed), expected)
    output, top_k = output_of(pushed, tokens), config.num_experts_per_tok
    report = router_report(output.router_logits, top_k=top_k, selection_bias=expected)
    assert relative_error(report.load[-1, 1], 1 / top_k) < TOLERANCE
    plain = router_report(output.router_logits, top_k=top_k)
    np.testing.assert_array_equal(plain.load[:-1], report.load[:-1])
    assert eqx.tree_equal(without_selection_bias(pushed), model)


def test_a_selection_bias_balances_and_cannot_be_saved(tmp_path):
    """Routers that send nearly all to one expert are evened out without any gradient."""
    config = SMALL
    uneven = jnp.zeros((4, config.num_local_experts)).at[:, 2].set(-1)
    model = rebalanced(with_selection_bias(toy(config)), uneven, rate=0.1)
    trainable = select(model, "*", "!*.selection_bias")
    optimizer = optax.sgd(0.0)
    step = make_train_step(
        optimizer,
        loss_function,
        trainable=trainable,
        after_update=lambda model, report: rebalanced(model, report.other.load, rate=0.003),
    )
    state = init_train_state(model, optimizer, key=jax.random.key(0), trainable=trainable)
    entropies, tokens = [], random_tokens(4, 64)
    for _ in range(60):
        state, report = step(state, {"tokens": tokens})
        entropies.append(float(report.other.entropy.min()))
    assert entropies[0] < 0.3 * np.log(config.num_local_experts) < 0.9 * entropies[-1]
    assert entropies[-1] > 0.95 * np.log(config.num_local_experts)
    with pytest.raises(ValueError, match=r"without_selection_bias\(model\) before saving"):
        l4.save_checkpoint(state.model, tmp_path / "model")
    with pytest.raises(ValueError, match="make one with with_selection_bias"):
        rebalanced(toy(config), report.other.load)
