"""The whole model against `transformers`, weights carried over by checkpoint folders."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llama4_eqx as l4
from llama4_eqx.checkpoints.tensor_names import tensors
from tests.toys import MAVERICK, SCOUT, TOYS, random_tokens, reference_model, relative_error

FORMS = {"scanned": lambda model: model, "unrolled": lambda model: model.unstacked()}


def pair(config, folder, **options):
    """`transformers`' model and ours with the same weights."""
    reference = reference_model(config, **options)
    reference.save_pretrained(folder)
    return reference, l4.load_checkpoint(folder)


def as_torch(tokens):
    return torch.tensor(np.asarray(tokens), dtype=torch.long)


@pytest.mark.parametrize("name", TOYS)
def test_logits_and_router_logits(name, tmp_path):
    reference, model = pair(TOYS[name], tmp_path)
    tokens = random_tokens(2, 61)
    with torch.no_grad():
        truth = reference(as_torch(tokens), output_router_logits=True)
    output = eqx.filter_jit(model)(tokens)
    assert relative_error(output.logits, truth.logits) < 2e-5
    moe_layers = sum(TOYS[name].layer_is_moe(i) for i in range(TOYS[name].num_hidden_layers))
    assert len(output.router_logits) == len(truth.router_logits or ()) == moe_layers
    for ours, theirs in zip(output.router_logits, truth.router_logits or (), strict=True):
        assert relative_error(ours.reshape(theirs.shape), theirs) < 2e-5


def test_rows_longer_than_a_block_of_attention(tmp_path):
    """Of 300 tokens, so that attention goes block by block; with padding, so that blocks differ."""
    reference, model = pair(SCOUT, tmp_path)
    tokens = random_tokens(2, 300)
    mask = jnp.arange(300) >= jnp.array([0, 170])[:, None]
    logits = eqx.filter_jit(model)(tokens, mask=mask).logits
    for row in range(2):
        with torch.no_grad():
            truth = reference(as_torch(tokens[row][mask[row]])[None]).logits[0]
        assert relative_error(logits[row][mask[row]], truth) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_greedy_generation_over_chunk_edges(config, form, tmp_path):
    reference, model = pair(config, tmp_path)
    prompt = random_tokens(1, 13)
    truth = reference.generate(
        as_torch(prompt), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0
    )[:, 13:]
    new = l4.generate(FORMS[form](model), prompt, max_new_tokens=40)
    assert len(set(np.asarray(new)[0].tolist())) > 5, "a constant text would show nothing"
    np.testing.assert_array_equal(new, truth)


def test_long_positions(tmp_path):
    """RoPE's angles and temperature's steps at positions near the end of Maverick's context."""
    config = replace(MAVERICK, attention_chunk_size=8192, max_position_embeddings=1048576)
    reference, model = pair(replace(config, attn_temperature_tuning=False), tmp_path)
    tokens = random_tokens(1, 32)
    positions = 1_000_000 + jnp.arange(32)[None]
    with torch.no_grad():
        truth = reference(as_torch(tokens), position_ids=as_torch(positions)).logits
    # A float32 angle of 10⁶ radians is known to 0.03, and both round it alike; what is left is
    # the cosines' own rounding of such an angle.
    assert relative_error(model(tokens, positions=positions).logits, truth) < 1e-4


def test_gradients(tmp_path):
    reference, model = pair(SCOUT, tmp_path)
    tokens = random_tokens(2, 40)
    labels = as_torch(tokens)
    logits = reference(as_torch(tokens)).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    truth = {name: parameter.grad for name, parameter in reference.named_parameters()}

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        log_probabilities = jax.nn.log_softmax(model(tokens).logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1))

    leaves = jax.tree.leaves(gradient(model))
    named = tensors(model)
    assert {tensor.name for tensor in named} == set(truth)
    for tensor in named:
        ours = leaves[tensor.leaf]
        ours = ours if tensor.stack_index is None else ours[tensor.stack_index]
        # Relative to each tensor's own largest gradient: sums over 80 tokens of either sign.
        theirs = truth[tensor.name]
        theirs = theirs if tensor.half is None else theirs.chunk(2, -1)[tensor.half]
        assert relative_error(ours.reshape(theirs.shape), theirs) < 1e-4, tensor.name


def test_bfloat16_is_as_exact_as_the_reference(tmp_path):
    truth_model, _ = pair(SCOUT, tmp_path / "32")
    rounded, model = pair(SCOUT, tmp_path / "16", dtype=torch.bfloat16)
    assert model.embed_tokens.dtype == jnp.bfloat16
    # The truth: the rounded weights, computed with in float32.
    truth_model.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    tokens = random_tokens(4, 61)
    with torch.no_grad():
        truth = truth_model(as_torch(tokens)).logits.numpy()
        theirs = rounded(as_torch(tokens)).logits.float().numpy()
    ours = np.asarray(eqx.filter_jit(model)(tokens).logits, np.float32)
    error_of = lambda value: np.sqrt(np.mean((value - truth) ** 2))  # noqa: E731
    print(error_of(ours), error_of(theirs))
    assert error_of(ours) < 1.2 * error_of(theirs)
