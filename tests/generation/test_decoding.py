"""Generation and samplers, against `transformers`' logits processors and plain loops."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.generation import decode_step
from tests.test_invariants import random_model
from tests.toys import SCOUT, random_tokens


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return random_model(SCOUT)


def by_whole_forward_calls(model, prompt, steps):
    """Greedy continuation of one row without any cache."""
    tokens = np.asarray(prompt)
    run = eqx.filter_jit(lambda model, tokens, mask: model(tokens, mask=mask).logits)
    size = len(tokens) + steps
    for _ in range(steps):
        mask = jnp.arange(size) < len(tokens)
        logits = run(model, jnp.asarray(np.resize(tokens, size)), mask)
        tokens = np.append(tokens, np.argmax(logits[len(tokens) - 1]))
    return tokens[len(prompt) :].astype(np.int32)


def test_ragged_greedy_batch_equals_each_row_alone(model):
    prompts = [random_tokens(length, seed=length) for length in (3, 20, 11)]
    tokens = jnp.stack([jnp.pad(p, (20 - len(p), 0)) for p in prompts])
    mask = jnp.stack([jnp.arange(20) >= 20 - len(p) for p in prompts])
    new = l4.generate(model, tokens, mask=mask, max_new_tokens=25)
    for row, prompt in zip(new, prompts, strict=True):
        np.testing.assert_array_equal(row, by_whole_forward_calls(model, prompt, 25))


@pytest.mark.parametrize("batch_shape", [(), (1,), (3,)])
@pytest.mark.parametrize("unstacked", [False, True])
def test_a_step_copies_no_ring(model, batch_shape, unstacked):
    """Of a cache that is donated; found with one row, each of whose rings was copied four times."""
    model = model.unstacked(experts=True) if unstacked else model
    cache, tokens = model.empty_cache(batch_shape, 96), jnp.zeros(batch_shape, jnp.int32)
    step = eqx.filter_jit(lambda kept, cache: decode_step(*kept, cache), donate="all-except-first")
    compiled = step.lower((model, tokens), cache).compile().compiled
    rings = {layer.k.shape[-2:] for block in cache.blocks for layer in block}
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert not {tuple(map(int, shape.split(",")[-2:])) for shape in copied} & rings


def test_stopped_rows_stay_stopped(model):
    tokens = random_tokens(3, 10)
    free = np.asarray(l4.generate(model, tokens, max_new_tokens=30))
    stop = (int(free[0, 4]), int(free[2, 7]))
    new = np.asarray(l4.generate(model, tokens, max_new_tokens=30, stop_ids=stop))
    for row, free_row in zip(new, free, strict=True):
        ends = np.flatnonzero(np.isin(free_row, stop))
        first = ends[0] if len(ends) else 29
        np.testing.assert_array_equal(row[: first + 1], free_row[: first + 1])
        assert (row[first:] == row[first]).all()


@pytest.mark.parametrize("sampler", [l4.Greedy(), l4.Sample(0.8, top_p=0.9)], ids=["greedy", "p"])
def test_stream_equals_generate(model, sampler):
    tokens, key = random_tokens(2, 10), jax.random.key(3)
    options = {"max_new_tokens": 12, "sampler": sampler, "key": key}
    new = np.asarray(l4.generate(model, tokens, **options))
    streamed = np.stack(list(l4.stream(model, tokens, **options)), axis=-1)
    np.testing.assert_array_equal(streamed, new)
    stop = int(new[0, 2])
    cut = list(l4.stream(model, tokens[:1], stop_ids=[stop], **options | {"sampler": l4.Greedy()}))
    assert len(cut) <= 12


def test_unbatched_prompt_and_single_token(model):
    prompt = random_tokens(10)
    new = l4.generate(model, prompt, max_new_tokens=5)
    assert new.shape == (5,)
    np.testing.assert_array_equal(new, by_whole_forward_calls(model, prompt, 5))
    np.testing.assert_array_equal(l4.generate(model, prompt, max_new_tokens=1), new[:1])


def test_generation_errors(model):
    prompt = random_tokens(10)
    with pytest.raises(ValueError, match="a whole number from 1"):
        l4.generate(model, prompt, max_new_tokens=0)
    with pytest.raises(ValueError, match="pass key="):
        l4.generate(model, prompt, max_new_tokens=2, sampler=l4.Sample())


WARPERS = [
    ({"temperature": 0.6}, [transformers.TemperatureLogitsWarper(0.6)]),
    ({"top_k": 7}, [transformers.TopKLogitsWarper(7)]),
    ({"top_p": 0.9}, [transformers.TopPLogitsWarper(0.9)]),
    ({"top_p": 0.01}, [transformers.TopPLogitsWarper(0.01)]),
    ({"min_p": 0.2}, [transformers.MinPLogitsWarper(0.2)]),
    (
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.3},
        [
            transformers.TemperatureLogitsWarper(2.0),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.3),
        ],
    ),
]


@pytest.mark.parametrize(("options", "warpers"), WARPERS, ids=lambda value: str(value)[:40])
def test_filters_equal_the_reference(options, warpers):
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32) * 3
    truth = torch.tensor(logits)
    for warper in warpers:
        truth = warper(None, truth)
    ours = l4.Sample(**options).filtered(jnp.asarray(logits))
    np.testing.assert_allclose(ours, truth, rtol=1e-6)


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    draws = l4.Sample(top_k=3)(jnp.broadcast_to(logits, (20_000, 4)), jax.random.key(0))
    share = np.bincount(draws, minlength=4) / 20_000
    # Four standard deviations of a share of a half among 20,000.
    np.testing.assert_allclose(share, np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.015)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, "use Greedy"),
        ({"top_k": 0}, "whole number from 1"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"min_p": -0.1}, "from 0 to 1"),
    ],
)
def test_sampler_errors(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.Sample(**options)


def test_other_temperatures_compile_nothing(compiled):
    model, prompt = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0)), random_tokens(1, 6)

    def run(temperature, top_p):
        sampler = l4.Sample(temperature, top_p=top_p)
        options = {"sampler": sampler, "key": jax.random.key(0)}
        new = l4.generate(model, prompt, max_new_tokens=4, **options)
        return np.asarray(new), list(l4.stream(model, prompt, max_new_tokens=4, **options))

    cold, _ = run(1e-4, 0.9)
    assert compiled
    np.testing.assert_array_equal(cold, l4.generate(model, prompt, max_new_tokens=4))
    compiled.clear()
    hot = [run(temperature, 0.99)[0].tolist() for temperature in (0.5, 1.0, 5.0, 50.0)]
    assert not compiled
    assert len({str(row) for row in hot}) > 1
