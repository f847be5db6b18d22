"""Logits processors and beam search against `transformers`, and against plain loops."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx import generation as gen
from tests.toys import SCOUT, as_torch, random_tokens, reference_model

pytestmark = pytest.mark.slow

VOCAB = SCOUT.vocab_size
FREE = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processors")
    reference = reference_model(SCOUT)
    reference.save_pretrained(folder)
    return reference, l4.load_checkpoint(folder)


def theirs(reference, prompt, new, **options):
    options = FREE | {"max_new_tokens": new, "min_new_tokens": new} | options
    return reference.generate(as_torch(prompt, torch.long), **options)[:, prompt.shape[1] :].numpy()


CASES = {
    "repetition": ([gen.RepetitionPenalty(1.7)], {"repetition_penalty": 1.7}),
    "bigrams": ([gen.NoRepeatNgram(2)], {"no_repeat_ngram_size": 2}),
    "no token twice": ([gen.NoRepeatNgram(1)], {"no_repeat_ngram_size": 1}),
    "banned": ([gen.BannedTokens(range(60))], {"suppress_tokens": list(range(60))}),
    "both": (
        [gen.RepetitionPenalty(1.3), gen.NoRepeatNgram(3)],
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_processors_are_those_of_transformers(pair, name):
    reference, model = pair
    processors, options = CASES[name]
    # A few tokens only, so that they repeat.
    prompt = random_tokens(2, 20, vocab=12)
    few = (gen.BannedTokens(range(60, VOCAB)),) if name != "banned" else ()
    if few:
        options = options | {"suppress_tokens": list(range(60, VOCAB))}
    truth = theirs(reference, prompt, 30, **options)
    new = l4.generate(model, prompt, max_new_tokens=30, processors=[*few, *processors])
    np.testing.assert_array_equal(new, truth)
    without = l4.generate(model, prompt, max_new_tokens=30, processors=few)
    assert (np.asarray(new) != np.asarray(without)).any(), "the processor changed nothing"
    streamed = list(l4.stream(model, prompt, max_new_tokens=30, processors=[*few, *processors]))
    np.testing.assert_array_equal(np.stack(streamed, -1), truth)


@pytest.mark.parametrize(
    ("processor", "cost"),
    [
        (gen.PresencePenalty(2.5), lambda count: 2.5 * (count > 0)),
        (gen.FrequencyPenalty(0.8), lambda count: 0.8 * count),
    ],
)
def test_penalties_count_the_continuation(pair, processor, cost):
    _, model = pair
    prompt, few = random_tokens(1, 9), gen.BannedTokens(range(8, VOCAB))
    new = np.asarray(l4.generate(model, prompt, max_new_tokens=25, processors=[few, processor]))[0]
    run = eqx.filter_jit(lambda tokens: model(tokens).logits[0])
    logits = np.asarray(run(jnp.concatenate([prompt, new[None]], -1)))[8:-1, :8]
    for i, row in enumerate(logits):
        count = np.bincount(new[:i], minlength=8)
        assert new[i] == np.argmax(row - cost(count))
    assert len(set(new.tolist())) > 2


def test_ragged_rows_remember_their_own_text(pair):
    _, model = pair
    processors = [gen.BannedTokens(range(40, VOCAB)), gen.NoRepeatNgram(2)]
    processors.append(gen.RepetitionPenalty(1.2))
    rows = [random_tokens(size, vocab=12, seed=size) for size in (5, 14)]
    tokens = jnp.stack([jnp.pad(row, (14 - len(row), 0)) for row in rows])
    mask = jnp.stack([jnp.arange(14) >= 14 - len(row) for row in rows])
    both = l4.generate(model, tokens, mask=mask, max_new_tokens=20, processors=processors)
    for row, prompt in zip(both, rows, strict=True):
        alone = l4.generate(model, prompt, max_new_tokens=20, processors=processors)
        np.testing.assert_array_equal(row, alone)


def test_forced_tokens_and_an_automaton(pair):
    _, model = pair
    prompt = random_tokens(2, 6)
    new = l4.generate(model, prompt, max_new_tokens=6, processors=[gen.ForcedTokens([7, -1, 9])])
    assert (np.asarray(new)[:, [0, 2]] == [7, 9]).all()
    rest = jnp.concatenate([prompt, new[:, :3]], -1)
    np.testing.assert_array_equal(new[:, 3:], l4.generate(model, rest, max_new_tokens=3))
    # a b a b …: in state 0 tokens from 10 to 19, in state 1 those from 20 to 29, then the end.
    transitions = np.full((2, VOCAB), -1)
    transitions[0, 10:20], transitions[1, 20:30] = 1, 0
    written = np.asarray(
        l4.generate(model, prompt, max_new_tokens=8, processors=[gen.Automaton(transitions)])
    )
    assert (written // 10 == np.tile([1, 2], 4)).all()
    transitions[1] = -1
    with pytest.raises(ValueError, match="forbid every token"):
        l4.generate(model, prompt, max_new_tokens=8, processors=[gen.Automaton(transitions)])


def test_a_processor_of_ones_own(pair):
    _, model = pair

    class Rising(gen.LogitsProcessor):
        """Each token is above the last, by 40 at most."""

        def init(self, tokens, mask, *, vocab, max_new_tokens):
            return jnp.zeros(tokens.shape[:-1], jnp.int32)

        def __call__(self, logits, state):
            above = jnp.arange(logits.shape[-1]) - state[..., None]
            return jnp.where((above > 0) & (above <= 40), logits, -jnp.inf)

        def update(self, state, token):
            return token

    sampler, key = l4.Sample(0.01), jax.random.key(0)
    for options in ({}, {"sampler": sampler, "key": key}, {"samples": 2}):
        new = l4.generate(
            model, random_tokens(3, 5), max_new_tokens=4, processors=[Rising()], **options
        )
        assert (np.diff(np.asarray(new), axis=-1) > 0).all()


@pytest.mark.parametrize("processor", [gen.BannedTokens([VOCAB]), gen.ForcedTokens([1, VOCAB])])
def test_ids_beyond_the_vocabulary_are_named(pair, processor):
    with pytest.raises(ValueError, match="isn't in the vocabulary"):
        l4.generate(pair[1], random_tokens(4), max_new_tokens=2, processors=[processor])


BEAMS: dict[str, Any] = {
    "two": {"num_beams": 2},
    "four": {"num_beams": 4},
    "long texts": {"num_beams": 3, "length_penalty": 3.0},
    "short texts": {"num_beams": 3, "length_penalty": -1.0},
    "bigrams": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("name", BEAMS)
def test_beam_search_is_that_of_transformers(pair, name):
    reference, model = pair
    stops = () if name == "two" else (3, 5, 9, 40, 77, 120, 121, 122, 123)
    options = BEAMS[name]
    prompt, beams = random_tokens(2, 11, vocab=30), options["num_beams"]
    found = reference.generate(
        as_torch(prompt, torch.long),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=14,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=list(stops) or None,
            **FREE,
            **options,
        ),
    )
    processors = []
    if name == "bigrams":  # in transformers' order
        processors = [gen.RepetitionPenalty(1.5), gen.NoRepeatNgram(2)]
    ours = gen.beam_search(
        model,
        prompt,
        beams=beams,
        length_penalty=options.get("length_penalty", 1.0),
        max_new_tokens=14,
        stop_ids=stops,
        processors=processors,
    )
    np.testing.assert_allclose(
        ours.scores.reshape(-1), found.sequences_scores, rtol=1e-5, atol=1e-5
    )
    texts = found.sequences[:, 11:].numpy()
    for ours_, text in zip(ours.tokens.reshape(2 * beams, 14), texts, strict=True):
        end = next((i + 1 for i, token in enumerate(text) if token in stops), len(text))
        np.testing.assert_array_equal(ours_[:end], text[:end])
        assert (ours_[end:] == ours_[end - 1]).all()
