"""Packed rows: nothing lost, nothing mixed, and the same again after a stop."""

import itertools
from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest

import llama4_eqx as l4
from llama4_eqx.training import next_token_loss
from llama4_eqx.training.data import Document, packed_batches
from tests.toys import SCOUT, relative_error

SEQ = 24
ROW = {"tokens": np.int32, "mask": bool, "target_mask": bool}


def documents(count=40, longest=60, seed=0):
    """Of tokens that are all different, so that each is known again."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, count)
    ends = np.cumsum(lengths)
    return [
        Document(
            tokens=np.arange(end - length, end, dtype=np.int32),
            target_mask=random.random(length) < 0.5,
        )
        for length, end in zip(lengths, ends, strict=True)
    ]


def pieces(batches):
    """Each document or piece of one, as tokens and target mask, out of the rows."""
    for batch in batches:
        features = (batch[name] for name in ("tokens", "target_mask", "segment_ids"))
        for tokens, mask, ids in zip(*features, strict=True):
            real = ids >= 0
            assert not mask[~real].any()
            assert (np.diff(ids[real]) >= 0).all()
            assert real[: real.sum()].all()  # padding is on the right
            for segment in range(ids.max() + 1):
                yield tokens[ids == segment], mask[ids == segment]


def test_an_epoch_holds_every_token_once_and_its_mask():
    source = documents()
    wanted = {
        int(token): bool(counts)
        for document in source
        for token, counts in zip(document["tokens"], document["target_mask"], strict=True)
    }
    seen, longest = {}, 0
    for tokens, mask in pieces(packed_batches(source, rows=1, seq=SEQ, seed=0, epochs=1)):
        assert (np.diff(tokens) == 1).all()
        document = next(d for d in source if tokens[0] in d["tokens"])
        assert tokens[-1] in document["tokens"]
        assert (tokens[0] - document["tokens"][0]) % SEQ == 0  # cut only where it must be
        longest = max(longest, len(tokens))
        for token, counts in zip(tokens, mask, strict=True):
            assert int(token) not in seen
            seen[int(token)] = bool(counts)
    assert seen == wanted
    assert longest == SEQ


def test_epochs_and_seeds_differ():
    def order(seed, epochs):
        batches = packed_batches(documents(), rows=1, seq=SEQ, seed=seed, epochs=epochs)
        return [int(tokens[0]) for tokens, _ in pieces(batches)]

    once, twice = order(0, 1), order(0, 2)
    assert once != order(1, 1)
    assert sorted(twice) == sorted(2 * once)
    assert twice[: len(once)] != twice[len(once) :]
    assert once == order(0, 1)


def test_a_long_document_does_not_fill_a_batch():
    """Of ten documents of 40 pieces each, the eight rows of any batch hold several."""
    source = [
        Document(tokens=np.full(40 * SEQ, value, np.int32), target_mask=np.ones(40 * SEQ, bool))
        for value in range(10)
    ]
    batches = list(packed_batches(source, rows=8, seq=SEQ, seed=0, epochs=1))
    assert len(batches) == 50
    assert min(len(np.unique(batch["tokens"])) for batch in batches) > 2


def test_processes_share_the_documents():
    source, shares = documents(), []
    for process in range(3):
        batches = packed_batches(
            source, rows=1, seq=SEQ, seed=0, epochs=1, process=process, processes=3
        )
        shares.append({int(token) for tokens, _ in pieces(batches) for token in tokens})
    assert sum(map(len, shares)) == len(set.union(*shares)) == sum(len(d["tokens"]) for d in source)
    assert min(map(len, shares)) > 200
    with pytest.raises(ValueError, match="40 documents can't be split among 41 processes"):
        packed_batches(source, rows=1, seq=SEQ, seed=0, process=0, processes=41)


def test_it_goes_on_where_it_was():
    batches = packed_batches(documents(), rows=2, seq=SEQ, seed=0)
    straight = list(itertools.islice(batches, 30))
    for stop in (0, 1, 7, 19):
        reading = iter(batches)
        for _ in range(stop):
            next(reading)
        state = reading.get_state()
        again = iter(packed_batches(documents(), rows=2, seq=SEQ, seed=0))
        again.set_state(state)
        for truth in straight[stop:]:
            jax.tree.map(np.testing.assert_array_equal, next(again), truth)


def test_little_is_padding():
    batch = next(iter(packed_batches(documents(400, 20), rows=16, seq=64, seed=0)))
    assert (batch["segment_ids"] < 0).mean() < 0.06


def test_packed_loss_is_that_of_the_documents_apart():
    source = [
        Document(tokens=d["tokens"] % 250, target_mask=d["target_mask"]) for d in documents(12, 20)
    ]
    model = l4.Llama4(l4.Llama4Config(replace(SCOUT, num_hidden_layers=2)), key=jax.random.key(0))
    loss_of = eqx.filter_jit(lambda model, batch: next_token_loss(model, **batch).token)
    batches = packed_batches(source, rows=2, seq=SEQ, seed=0, epochs=1)
    losses = [loss_of(model, batch) for batch in batches]
    packed = sum(float(loss.total) * int(loss.num_tokens) for loss in losses)

    # Each in a row of its own, padded, so that all have one shape.
    alone = list(pieces(batches))
    rows = {name: np.zeros((len(alone), SEQ), kind) for name, kind in ROW.items()}
    for i, (tokens, mask) in enumerate(alone):
        rows["tokens"][i, : len(tokens)] = tokens
        rows["mask"][i, : len(tokens)] = True
        rows["target_mask"][i, : len(tokens)] = mask
    truth = loss_of(model, rows)
    assert relative_error(packed, float(truth.total) * int(truth.num_tokens)) < 1e-5
    assert sum(int(loss.num_tokens) for loss in losses) == int(truth.num_tokens) > 20
