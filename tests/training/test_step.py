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
from llama4_eqx.lowering import lower
from llama4_eqx.training import (
    get_expert_bias,
    init_train_state,
    make_train_step,
    next_token_loss,
    router_report,
    select,
    update_expert_bias,
    with_expert_bias,
    without_expert_bias,
)
from tests.toys import (
    MAVERICK,
    MULTIMODAL,
    SCOUT,
    TOYS,
    random_tokens,
    reference_model,
    relative_error,
)

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# A scanned cycle of a chunk-local and a global layer: quick to compile.
SMALL = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))


def loss_function(model, batch, key, **options):
    loss = next_token_loss(model, batch["tokens"], target_mask=batch.get("counted"), **options)
    top_k = model.config.text_config.num_experts_per_tok
    report = router_report(
        loss.router_logits, top_k=top_k, mask=loss.mask, expert_bias=get_expert_bias(model)
    )
    return loss.token.total, loss.token.num_tokens, report


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


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_steps_are_torchs(tmp_path, form):
    """Three steps of SGD with momentum and clipping, on `transformers`' own model and loss."""
    reference = reference_model(SMALL)
    reference.save_pretrained(tmp_path / "before")
    model = l4.load_checkpoint(tmp_path / "before")
    model = model if form == "stacked" else model.unstacked()
    optimizer = optax.sgd(0.05, momentum=0.9)
    step = make_train_step(optimizer, loss_function, clip_norm=0.5)
    state = init_train_state(model, optimizer, key=jax.random.key(0))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for i in range(3):
        tokens = random_tokens(2, 40, seed=i)
        state, metrics = step(state, {"tokens": tokens})
        ids = torch.tensor(np.asarray(tokens)).long()
        theirs.zero_grad()
        loss = reference(ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        theirs.step()
        assert relative_error(metrics.loss, loss.detach()) < TOLERANCE
        assert relative_error(metrics.gradient_norm, norm) < TOLERANCE
        assert metrics.num_targets == 2 * 39
    reference.save_pretrained(tmp_path / "after")
    truth = l4.load_checkpoint(tmp_path / "after")
    truth = truth if form == "stacked" else truth.unstacked()
    assert largest_difference(state.model, truth) < TOLERANCE
    assert state.step == 3


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_micro_batches_are_one_batch(micro_batches):
    """Although they count different numbers of tokens."""
    batch = counted_batch(4, 40)
    parts = make_train_step(SGD, loss_function, micro_batches=micro_batches)
    split = jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), batch)
    start = partial(init_train_state, optimizer=SGD, key=jax.random.key(0))
    one, metrics_of_one = PLAIN(start(toy()), batch)
    many, metrics_of_many = parts(start(toy()), split)
    assert largest_difference(one.model, many.model) < TOLERANCE
    assert relative_error(metrics_of_many.loss, metrics_of_one.loss) < TOLERANCE
    assert relative_error(metrics_of_many.gradient_norm, metrics_of_one.gradient_norm) < TOLERANCE
    assert (
        metrics_of_many.num_targets
        == metrics_of_one.num_targets
        == int(batch["counted"][:, 1:].sum())
    )


def test_a_batch_without_micro_batches_is_refused():
    optimizer = optax.sgd(0.1)
    step = make_train_step(optimizer, loss_function, micro_batches=3)
    state = init_train_state(toy(), optimizer, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"3 micro-batches along its first axis.*\(4, 40\)"):
        step(state, {"tokens": random_tokens(4, 40)})


def test_a_number_of_targets_is_any_number():
    """Of a loss that is a mean already, say."""

    def mean(model, batch, key):
        loss, number, _ = loss_function(model, batch, key)
        return loss / number.astype(float), 1, None

    batch = {"tokens": random_tokens(2, 8)}
    state = init_train_state(toy(), SGD, key=jax.random.key(0))
    _, metrics = make_train_step(SGD, mean)(state, batch)
    assert metrics.num_targets == 1


def test_nothing_counted_changes_nothing():
    tokens = random_tokens(4, 40)
    state = init_train_state(toy(), SGD, key=jax.random.key(0))
    state, metrics = PLAIN(state, {"tokens": tokens, "counted": jnp.zeros(tokens.shape, bool)})
    assert metrics.loss == metrics.num_targets == metrics.gradient_norm == 0
    assert eqx.tree_equal(state.model, toy())


@pytest.mark.parametrize("remat", ["full", "none"])
def test_remat_changes_no_gradient(remat):
    tokens, model = random_tokens(2, 40), toy()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, remat):
        return next_token_loss(model, tokens, remat=remat).token.total

    assert largest_difference(gradient(model, remat), gradient(model, "dots")) < TOLERANCE


def test_remat_changes_no_vision_gradient():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    pixels = jax.random.normal(jax.random.key(1), (3, 3, 28, 28))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(vision, remat):
        return jnp.sum(vision(pixels, remat=remat) ** 2)

    truth = gradient(model.vision_model, "dots")
    for remat in ("full", "none"):
        assert largest_difference(gradient(model.vision_model, remat), truth) < TOLERANCE


def test_remat_takes_less_memory():
    config = replace(SMALL, num_hidden_layers=16, no_rope_layers=(1, 0) * 8)
    optimizer = optax.sgd(0.1)
    state = init_train_state(toy(config), optimizer, key=jax.random.key(0))
    batch = {"tokens": random_tokens(4, 256)}

    def temporaries(remat):
        step = make_train_step(optimizer, partial(loss_function, remat=remat))
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    full, dots, none = map(temporaries, ("full", "dots", "none"))
    assert full < 0.6 * dots < 0.6 * none


def test_a_step_inside_a_program_is_the_same_step():
    def batch(seed):
        return {"tokens": random_tokens(2, 32, seed=seed)}

    step = make_train_step(SGD, loss_function, donate=False)
    state = init_train_state(toy(), SGD, key=jax.random.key(0))
    inside, _ = eqx.filter_jit(lambda state: step(step(state, batch(0))[0], batch(1)))(state)
    alone, _ = step(step(state, batch(0))[0], batch(1))
    assert largest_difference(inside.model, alone.model) < TOLERANCE


def test_a_learning_rate_may_be_traced():
    """A sweep, in which nothing that the step is given is traced."""
    state = init_train_state(jnp.ones(2), optax.sgd(0.0), key=jax.random.key(0))

    def trained(rate):
        step = make_train_step(
            optax.sgd(rate),
            lambda model, batch, key: (jnp.sum(model * batch), jnp.float32(1), {}),
            donate=False,
        )
        return step(state, jnp.arange(2.0))[0].model

    rates = jnp.array([0.1, 0.2])
    wanted = jnp.stack([trained(0.1), trained(0.2)])
    np.testing.assert_allclose(jax.vmap(trained)(rates), wanted)
    np.testing.assert_allclose(jax.jit(trained)(rates[0]), wanted[0])
    np.testing.assert_allclose(jax.jacfwd(trained)(rates[0]), -jnp.arange(2.0))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_on_the_only_cpu_takes_less_memory_than_inside_a_program(devices, monkeypatch):
    """Where XLA may schedule it for speed alone: alone, it has an option against that. If there are
    several devices it has none, as with it their collectives would hang."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = replace(SCOUT, num_hidden_layers=8, no_rope_layers=(1, 1, 1, 0) * 2, hidden_size=128)
    state = init_train_state(toy(config), SGD, key=jax.random.key(0))
    batch = {"tokens": random_tokens(1, 16)}
    alone = PLAIN.lower(state, batch).compile()
    inside = lower(PLAIN, state, batch, donate=0).compile()
    sizes = [each.memory_analysis().temp_size_in_bytes for each in (alone, inside)]
    assert sizes[0] < 0.85 * sizes[1] if devices == 1 else sizes[0] == sizes[1]


def test_an_unknown_remat_policy():
    # The first comes from the shape checks, which tests turn on.
    with pytest.raises((TypeCheckError, ValueError), match="'dots', 'full', 'none'"):
        toy()(random_tokens(1, 8), remat="all")


def test_bfloat16_computes_with_float32_masters():
    batch = counted_batch(4, 40)
    start = partial(init_train_state, optimizer=SGD, key=jax.random.key(0))
    step = make_train_step(SGD, loss_function, compute_dtype=jnp.bfloat16)
    small, metrics = step(start(toy()), batch)
    truth, true_metrics = PLAIN(start(toy()), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.model)} == {jnp.dtype(jnp.float32)}
    assert relative_error(metrics.loss, true_metrics.loss) < 2**-8  # bfloat16 rounds by up to 2**-9
    assert 0 < relative_error(metrics.gradient_norm, true_metrics.gradient_norm) < 0.02
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


def test_ema_follows():
    def mix(moved, old, new):
        return (1 - moved) * old + moved * np.asarray(new)

    optimizer, batch = optax.sgd(0.5), {"tokens": random_tokens(2, 20)}
    step = make_train_step(optimizer, loss_function, ema_decay=0.5)
    state = init_train_state(toy(), optimizer, key=jax.random.key(0), ema=True)
    truth = jax.tree.map(np.asarray, state.model)
    for i in range(8):
        state, _ = step(state, batch)
        moved = max(0.5, 9 / (10 + i))
        truth = jax.tree.map(partial(mix, moved), truth, state.model)
    assert largest_difference(state.ema_model(), truth) < TOLERANCE
    assert largest_difference(state.ema_model(), state.model) > 1e-3
    without = init_train_state(toy(), optimizer, key=jax.random.key(0))
    with pytest.raises(ValueError, match="ema=True"):
        without.ema_model()


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
    assert not np.allclose(first.aux, second.aux)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    mean = np.mean([jax.random.uniform(key, (3,)) for key in keys], axis=0)
    np.testing.assert_allclose(first.aux, mean, rtol=1e-6)


@pytest.mark.parametrize("config", [SMALL, MAVERICK, TOYS["tail"], TOYS["top-2"]])
def test_expert_bias_decides_who_is_chosen_and_nothing_else(config):
    model, tokens = toy(config), random_tokens(2, 30)
    truth = output_of(model, tokens)
    biased = with_expert_bias(model)
    zero = get_expert_bias(biased)
    assert zero.shape == (len(truth.router_logits), config.num_local_experts)
    # The scores' choice equals the logits', with nothing added.
    assert relative_error(output_of(biased, tokens).logits, truth.logits) < TOLERANCE
    # Only expert 1 is pushed, in the last MoE layer only: every token goes there.
    load = jnp.ones_like(zero).at[-1, 1].set(0)
    pushed = update_expert_bias(biased, load, rate=1.0)
    expected = jnp.zeros_like(zero).at[-1].set(jnp.where(jnp.arange(zero.shape[1]) == 1, 1, -1))
    np.testing.assert_array_equal(get_expert_bias(pushed), expected)
    with pytest.raises(ValueError, match=r"load must have the shape \(\d+, \d+\), layers and exp"):
        update_expert_bias(biased, load[:, :1])
    output, top_k = output_of(pushed, tokens), config.num_experts_per_tok
    report = router_report(output.router_logits, top_k=top_k, expert_bias=expected)
    assert relative_error(report.load[-1, 1], 1 / top_k) < TOLERANCE
    plain = router_report(output.router_logits, top_k=top_k)
    np.testing.assert_array_equal(plain.load[:-1], report.load[:-1])
    assert eqx.tree_equal(without_expert_bias(pushed), model)


def test_a_selection_bias_balances_and_cannot_be_saved(tmp_path):
    """Routers that send nearly all to one expert are evened out without any gradient."""
    config = SMALL
    uneven = jnp.zeros((4, config.num_local_experts)).at[:, 2].set(-1)
    model = update_expert_bias(with_expert_bias(toy(config)), uneven, rate=0.1)
    trainable = select(model, "*", "!*.expert_bias")
    optimizer = optax.sgd(0.0)
    step = make_train_step(
        optimizer,
        loss_function,
        trainable=trainable,
        after_update=lambda model, metrics: update_expert_bias(model, metrics.aux.load, rate=0.003),
    )
    state = init_train_state(model, optimizer, key=jax.random.key(0), trainable=trainable)
    entropies, tokens = [], random_tokens(4, 64)
    for _ in range(60):
        state, metrics = step(state, {"tokens": tokens})
        entropies.append(float(metrics.aux.entropy.min()))
    assert entropies[0] < 0.3 * np.log(config.num_local_experts) < 0.9 * entropies[-1]
    assert entropies[-1] > 0.95 * np.log(config.num_local_experts)
    with pytest.raises(ValueError, match=r"without_expert_bias\(model\) before saving"):
        l4.save_checkpoint(state.model, tmp_path / "model")
    with pytest.raises(ValueError, match="make one with with_expert_bias"):
        update_expert_bias(toy(config), metrics.aux.load)
