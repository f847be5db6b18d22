"""Low-rank updates: attached = merged, and their gradients those of the whole weights."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import llama4_eqx as l4
from llama4_eqx.training import LoRA, init_train_state, make_train_step, next_token_loss, select
from tests.toys import MAVERICK, MULTIMODAL, SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# A scanned cycle of a chunk-local and a global layer: quick to compile.
SMALL = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
EVERY_MATRIX = ("decoder.*_proj", "*.router", "lm_head", "embed_tokens")


def random_lora(config, *patterns, rank=3):
    """One whose updates aren't zero."""
    model = l4.Llama4(config, key=jax.random.key(0))
    lora = LoRA(model, *patterns, rank=rank, key=jax.random.key(1))
    leaves, structure = jax.tree.flatten(lora.updates)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return eqx.tree_at(lambda lora: lora.updates, lora, jax.tree.unflatten(structure, noisy))


@eqx.filter_jit
def logits_of(model, tokens, pixels=None):
    return model(tokens, pixel_values=pixels).logits


def loss(model, tokens):
    return next_token_loss(model, tokens).token.total


@pytest.mark.parametrize("config", [SMALL, MAVERICK])
def test_attached_is_merged(config):
    lora, tokens = random_lora(l4.Llama4Config(config), *EVERY_MATRIX), random_tokens(2, 40)
    truth = logits_of(lora.merged(), tokens)
    assert relative_error(logits_of(lora.attached(), tokens), truth) < TOLERANCE
    assert relative_error(logits_of(lora.model, tokens), truth) > 0.05
    plain = jax.tree.map(jnp.shape, lora.model)
    assert jax.tree.map(jnp.shape, lora.merged()) == plain


def test_attached_is_merged_with_images():
    lora = random_lora(
        MULTIMODAL, "vision_model.*_proj", "vision_model.*fc?", "*linear*", "lm_head"
    )
    tokens = jnp.array([[1, 250, 250, 250, 250, 7, 8]])
    pixels = jax.random.normal(jax.random.key(3), (1, 3, 28, 28))
    truth = logits_of(lora.merged(), tokens, pixels)
    assert relative_error(logits_of(lora.attached(), tokens, pixels), truth) < TOLERANCE
    assert relative_error(logits_of(lora.model, tokens, pixels), truth) > 1e-3


def test_gradients_are_those_of_the_whole_weights():
    """Of W + s·L·R: dL = s·dW·Rᵀ and dR = s·Lᵀ·dW, of each matrix and of each expert's."""
    lora, tokens = random_lora(l4.Llama4Config(SMALL), *EVERY_MATRIX), random_tokens(2, 40)
    trained, frozen = eqx.partition(lora, select(lora, "updates.*"))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(trained):
        return loss(eqx.combine(trained, frozen).attached(), tokens)

    ours = gradient(trained).updates
    whole = eqx.filter_jit(eqx.filter_grad(loss))(lora.merged(), tokens)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }
    expert_updates = 0
    for name, update in lora.updates.items():
        d_weight = leaves[name].reshape(*update.left.shape[:-1], update.right.shape[-1])
        left, right = np.asarray(update.left), np.asarray(update.right)
        d_left = lora.scale * d_weight @ right.swapaxes(-1, -2)
        d_right = lora.scale * left.swapaxes(-1, -2) @ d_weight
        assert relative_error(ours[name].left, d_left) < TOLERANCE, name
        assert relative_error(ours[name].right, d_right) < TOLERANCE, name
        expert_updates += update.left.ndim == 4  # layers experts rows rank
    assert expert_updates == 2 * 3  # gates, ups and downs of the two layers that repeat


def test_training_moves_the_updates_alone(tmp_path):
    """And what is saved afterwards is what was trained, for `transformers` too."""
    config, tokens = l4.Llama4Config(SMALL), random_tokens(4, 40)
    model = l4.Llama4(config, key=jax.random.key(0))
    lora = LoRA(model, "decoder.*_proj", rank=4, key=jax.random.key(1))
    before = jax.tree.map(np.asarray, model)
    np.testing.assert_array_equal(logits_of(lora.merged(), tokens), logits_of(model, tokens))
    trainable = select(lora, "updates.*")
    optimizer = optax.adam(1e-2)
    step = make_train_step(
        optimizer,
        lambda lora, tokens, key: (loss(lora.attached(), tokens), jnp.float32(1), None),
        trainable=trainable,
    )
    state = init_train_state(lora, optimizer, key=jax.random.key(2), trainable=trainable)
    losses = []
    for _ in range(20):
        state, metrics = step(state, tokens)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert eqx.tree_equal(state.model.model, before)

    merged = state.model.merged()
    l4.save_checkpoint(merged, tmp_path / "model")
    loaded = l4.load_checkpoint(tmp_path / "model")
    assert eqx.tree_equal(loaded, merged)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = transformers.BatchEncoding({"input_ids": np.asarray(tokens)}, tensor_type="pt")
    truth = reference(**ids).logits.detach()
    assert relative_error(logits_of(state.model.attached(), tokens), truth) < 2 * TOLERANCE


def test_what_is_no_matrix_is_refused():
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"layernorm\.weight isn't a matrix: choose patterns"):
        LoRA(model, "decoder.blocks.*", rank=4, key=jax.random.key(1))
    with pytest.raises(ValueError, match="fits no leaf"):
        LoRA(model, "self_attn", rank=4, key=jax.random.key(1))


def test_memory_is_not_that_of_a_second_model():
    """Temporaries of a step stay below those of training every weight."""
    config = replace(SMALL, num_hidden_layers=24, no_rope_layers=(1, 0) * 12)
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    lora, tokens = LoRA(model, "*_proj", rank=2, key=jax.random.key(1)), random_tokens(1, 16)

    def temporaries(model, loss, trainable):
        optimizer = optax.sgd(0.1)
        state = init_train_state(model, optimizer, key=jax.random.key(0), trainable=trainable)
        step = make_train_step(optimizer, loss, trainable=trainable)
        return step.lower(state, tokens).compile().memory_analysis().temp_size_in_bytes

    def whole_loss(model, tokens, key):
        return loss(model, tokens), jnp.float32(1), None

    def lora_loss(lora, tokens, key):
        return loss(lora.attached(), tokens), jnp.float32(1), None

    whole = temporaries(model, whole_loss, select(model, "*"))
    assert temporaries(lora, lora_loss, select(lora, "updates.*")) < 0.4 * whole
