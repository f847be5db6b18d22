"""What a user passes to the model: right, or one sentence, never a wrong answer in silence."""

import warnings
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama4_eqx as l4
from llama4_eqx.training import make_train_step, next_token_loss
from llama4_eqx.training.data import Document, packed_batches
from tests.toys import MULTIMODAL, SCOUT, random_tokens, relative_error

SMALL = replace(SCOUT, num_hidden_layers=2, no_rope_layers=(1, 0))


@pytest.fixture(autouse=True)
def unchecked_types(monkeypatch):
    """Users have no shape checks unless they ask for them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))


@pytest.fixture(scope="module")
def seeing():
    return l4.Llama4(replace(MULTIMODAL, text_config=SMALL), key=jax.random.key(0))


@eqx.filter_jit
def logits(model, tokens, **given):
    return model(tokens, **given).logits


IDS = [1, 2, 3]


@pytest.mark.parametrize(
    "tokens",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        torch.tensor(IDS),
        jnp.array(IDS, jnp.uint8),
        np.array(IDS, np.int8),
        np.array(IDS, np.uint64),
    ],
    ids=lambda tokens: f"{type(tokens).__name__} {getattr(tokens, 'dtype', '')}",
)
def test_every_kind_of_token_ids(model, tokens):
    truth = model(jnp.array(IDS)).logits
    assert relative_error(model(tokens).logits, truth) < 1e-5
    new = l4.generate(model, tokens, max_new_tokens=np.int64(2), stop_ids=np.int32(7))
    np.testing.assert_array_equal(new, l4.generate(model, jnp.array(IDS), max_new_tokens=2))


def test_small_dtypes_do_not_wrap_their_bounds(model):
    """A vocabulary of 256 is more than a uint8 or an int8 can say."""
    for dtype in (jnp.uint8, jnp.int8, jnp.uint16):
        tokens = jnp.arange(12, dtype=dtype)
        assert jnp.array_equal(logits(model, tokens), logits(model, jnp.arange(12)))


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([1.5, 2.0], "must be integers, but are float64"),
        (jnp.ones(3), "must be integers, but are float32"),
        (np.ones(3, bool), "must be integers, but are bool"),
        (["a", "b"], "must be integers"),
        ([[1, 2], [3]], "lists of equal lengths"),
        (7, "must have an axis"),
        (jnp.array(7), "must have an axis"),
        ([1, 256], "ids go from 0 to 255"),
        (np.array([2**40]), "ids go from 0 to 255"),
        (jnp.array([-1]), "ids go from 0 to 255"),
    ],
)
def test_what_are_no_token_ids(model, tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(tokens)


def test_an_id_outside_the_vocabulary_under_jit(model):
    with pytest.raises(RuntimeError, match="ids go from 0 to 255"):
        jax.block_until_ready(logits(model, jnp.array([1, 300])))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.uint32, np.float32, np.bool_]),
    st.lists(st.integers(0, 127), min_size=4, max_size=4),
)
def test_any_dtype_gives_the_same_or_a_sentence(dtype, ids):
    model = _hypothesis_model()
    truth = logits(model, jnp.array(ids))
    tokens = np.array(ids).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        assert relative_error(model(tokens).logits, truth) < 1e-5
    else:
        with pytest.raises(ValueError, match=r"^tokens must be integers, but are \S+: pass ids.*$"):
            model(tokens)


def _hypothesis_model(_made=[]):  # noqa: B006 (made once)
    if not _made:
        _made.append(l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0)))
    return _made[0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"mask": jnp.ones((2, 9), bool)}, r"mask must have the tokens' shape \(2, 10\)"),
        ({"mask": jnp.ones(10, bool)}, r"mask must have the tokens' shape \(2, 10\)"),
        ({"mask": jnp.zeros((2, 10))}, "mask must be boolean.*float32"),
        ({"mask": jnp.ones((2, 10), jnp.int32)}, "mask must be boolean.*int32"),
        ({"positions": jnp.arange(10)}, "positions must have the tokens' shape"),
        ({"positions": jnp.zeros((2, 1), jnp.int32)}, "positions must have the tokens' shape"),
        ({"segment_ids": jnp.zeros((1, 10), jnp.int32)}, "segment_ids must have the tokens'"),
    ],
)
def test_shapes_and_dtypes_that_would_broadcast(model, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(random_tokens(2, 10), **given)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: np.asarray(x).tolist()])
def test_every_kind_of_what_goes_with_the_tokens(model, kind, checked, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", not checked)
    tokens = random_tokens(2, 10)
    positions, documents = np.arange(10) + np.array([[0], [4]]), np.arange(10) // [[4], [6]]
    mask = np.arange(10) < [[7], [10]]
    for forward in (
        {"mask": mask},
        {"positions": positions},
        {"segment_ids": documents},
        {"mask": mask, "segment_ids": documents},
    ):
        truth = model(tokens, **{name: jnp.asarray(value) for name, value in forward.items()})
        ours = model(tokens, **{name: kind(value) for name, value in forward.items()})
        assert relative_error(ours.logits, truth.logits) < 1e-5
    new = l4.generate(model, kind(np.asarray(tokens)), mask=kind(mask), max_new_tokens=3)
    truth = l4.generate(model, tokens, mask=jnp.asarray(mask), max_new_tokens=3)
    np.testing.assert_array_equal(new, truth)
    forms = {"tokens": np.asarray(tokens), "mask": mask, "target_mask": mask}
    loss = next_token_loss(model, **{name: kind(value) for name, value in forms.items()})
    truth = next_token_loss(model, **{name: jnp.asarray(value) for name, value in forms.items()})
    assert relative_error(loss.token.total, truth.token.total) < 1e-5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"mask": [[True] * 10, [True] * 9]},
            "mask must be an array of the tokens' shape, or list",
        ),
        ({"mask": "yes"}, r"mask must have the tokens' shape \(2, 10\)"),
        ({"mask": torch.ones(2, 10)}, "mask must be boolean.*float32"),
        (
            {"positions": np.arange(20.0).reshape(2, 10)},
            "positions must be integers, but are float",
        ),
        ({"positions": np.arange(20).reshape(2, 10) + 2**40}, "of 32 bits, but go up to 1099511"),
        ({"segment_ids": [["a"] * 10] * 2}, "segment_ids must be integers"),
        ({"segment_ids": [[0] * 10]}, "segment_ids must have the tokens' shape"),
    ],
)
def test_what_does_not_go_with_the_tokens(model, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(random_tokens(2, 10), **given)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_pixels_of_other_libraries(seeing, kind):
    tokens, pixels = jnp.full((1, 4), 250), np.ones((1, 3, 28, 28), np.float32)
    truth = seeing(tokens, pixel_values=jnp.asarray(pixels)).logits
    assert relative_error(seeing(tokens, pixel_values=kind(pixels)).logits, truth) < 1e-5
    new = l4.generate(seeing, tokens, pixel_values=kind(pixels), max_new_tokens=2)
    assert new.shape == (1, 2)


@pytest.mark.parametrize("positions", [jnp.arange(12) - 5, jnp.arange(12) + jnp.int32(2**31 - 12)])
def test_positions_out_of_range(model, positions):
    with pytest.raises(RuntimeError, match="A position is negative or above"):
        jax.block_until_ready(logits(model, random_tokens(12), positions=positions))


def test_the_last_position_is_a_number(model):
    positions = jnp.arange(12) + jnp.int32(2**31 - 13)
    assert jnp.all(jnp.isfinite(logits(model, random_tokens(12), positions=positions)))


@pytest.mark.parametrize(("capacity", "start"), [(20, -3), (20, 2**31 - 5)])
def test_caches_out_of_range(model, capacity, start):
    with pytest.raises(ValueError, match="positions from 0 to"):
        model.empty_cache((), capacity, start=start)


def test_caches_of_other_models(model):
    tokens = random_tokens(1, 4)
    deeper = replace(SMALL, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
    other = l4.Llama4(l4.Llama4Config(deeper), key=jax.random.key(0))
    wider = l4.Llama4(l4.Llama4Config(replace(SMALL, head_dim=8)), key=jax.random.key(0))
    for foreign in (other, wider):
        with pytest.raises(ValueError, match="made for another model"):
            model(tokens, cache=foreign.empty_cache((1,), 8))


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9],  # a document that begins later
        [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10],
    ],
)
def test_restarting_positions_begin_a_document(model, positions):
    """As the segment ids that they imply; and no token sees one that comes later in the row."""
    tokens, positions = random_tokens(1, 12), jnp.array([positions])
    segment_ids = jnp.array([[0] * 5 + [1] * 7])
    truth = logits(model, tokens, positions=positions, segment_ids=segment_ids)
    ours = logits(model, tokens, positions=positions)
    assert relative_error(ours, truth) < 1e-5
    changed = logits(model, tokens.at[0, 5].add(1), positions=positions)
    assert jnp.array_equal(changed[0, :5], ours[0, :5])


def test_positions_of_padding_are_no_restarts(model):
    tokens, mask = random_tokens(1, 9), jnp.array([[False] * 3 + [True] * 3 + [False] + [True] * 2])
    positions = jnp.array([[7, 7, 7, 0, 1, 2, 0, 3, 4]])
    truth = logits(model, tokens[mask])
    assert relative_error(logits(model, tokens, mask=mask, positions=positions)[mask], truth) < 1e-5


def test_image_tokens_need_images(seeing):
    tokens = jnp.array([[5, 250, 250, 250, 250, 6]])
    with pytest.raises(RuntimeError, match="4 image tokens, but the images give 0 features"):
        jax.block_until_ready(logits(seeing, tokens))
    # A text-only model has no such token; a single one may be drawn in generation.
    assert seeing(tokens[:, 1], cache=seeing.empty_cache((), 3)).logits.shape == (1, 256)


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (jnp.zeros((1, 3, 28, 28), jnp.uint8), "normalised floats, but are uint8"),
        (jnp.zeros((3, 28, 28)), "tiles, channels, height, width"),
        (jnp.zeros((1, 1, 3, 28, 28)), "tiles, channels, height, width"),
    ],
)
def test_pixels_that_are_none(seeing, pixels, sentence):
    tokens = jnp.array([[5, 250, 250, 250, 250, 6]])
    with pytest.raises(ValueError, match=sentence):
        seeing(tokens, pixel_values=pixels)


def test_images_under_vmap(seeing):
    """Each row alone is the batch in one call; and a wrong count still names both numbers."""
    tokens = jnp.array([[5, 250, 250, 250, 250, 6], [7, 250, 250, 250, 250, 8]])
    tiles = jax.random.normal(jax.random.key(1), (2, 1, 3, 28, 28))
    truth = logits(seeing, tokens, pixel_values=tiles[:, 0])
    each = jax.jit(jax.vmap(lambda t, x: seeing(t, pixel_values=x).logits))
    assert relative_error(each(tokens, tiles), truth) < 1e-5
    sentence = "3 image tokens, but the images give 4 features"
    with pytest.raises((RuntimeError, ValueError), match=sentence):
        jax.block_until_ready(each(tokens.at[1, 1].set(9), tiles))


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 5)])
def test_no_tokens_and_no_rows(model, shape):
    tokens = jnp.zeros(shape, jnp.int32)
    assert model(tokens).logits.shape == (*shape, 256)
    if shape[-1] == 0:
        with pytest.raises(ValueError, match="A prompt needs at least one token"):
            l4.generate(model, tokens, max_new_tokens=2)
    else:
        assert l4.generate(model, tokens, max_new_tokens=2).shape == (0, 2)


def test_stop_ids_of_every_kind(model):
    prompt = jnp.array(IDS)
    free = l4.generate(model, prompt, max_new_tokens=6)
    stop = int(free[1])
    truth = l4.generate(model, prompt, max_new_tokens=6, stop_ids=(stop,))
    for stop_ids in (stop, [stop], np.array([stop]), np.int64(stop), jnp.array(stop)):
        ours = l4.generate(model, prompt, max_new_tokens=6, stop_ids=stop_ids)
        np.testing.assert_array_equal(ours, truth)
    none = l4.generate(model, prompt, max_new_tokens=6, stop_ids=None)
    np.testing.assert_array_equal(none, free)


@pytest.mark.parametrize("sampler", [l4.Greedy(), l4.Sample(0.7)], ids=["greedy", "drawn"])
def test_logits_that_are_not_numbers(model, sampler):
    broken = eqx.tree_at(lambda m: m.lm_head, model, model.lm_head * jnp.nan)
    request = partial(l4.generate, broken, jnp.array(IDS), max_new_tokens=3)
    with pytest.raises(ValueError, match="logits are NaN"):
        request(sampler=sampler, key=jax.random.key(0))
    with pytest.raises(ValueError, match="logits are NaN"):
        next(l4.stream(broken, jnp.array(IDS), max_new_tokens=3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-30, float("inf"), float("nan"), 1e9])
def test_extreme_temperatures(temperature):
    with pytest.raises(ValueError, match="use Greedy"):
        l4.Sample(temperature)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be positive"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"micro_batches": 0}, "micro_batches must be a whole number from 1"),
        ({"ema_decay": 1.5}, "ema_decay must be in"),
    ],
)
def test_settings_of_a_step(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_train_step(optax.sgd(0.1), next_token_loss, **options)


def document(tokens, mask):
    return Document(tokens=np.ones(tokens, np.int32), target_mask=np.ones(mask, bool))


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [((6, 3), "6 tokens, but a target_mask of 3"), ((0, 0), "no tokens"), ((2, 5), "of 5")],
)
def test_documents_that_do_not_fit_their_mask(lengths, sentence):
    documents = [document(6, 6)] * 3 + [document(*lengths)] * 8
    with warnings.catch_warnings(), pytest.raises(ValueError, match=sentence):
        list(packed_batches(documents, rows=1, seq=16, seed=0, epochs=1))


def test_no_documents():
    with pytest.raises(ValueError, match="0 documents can't be split among 1 processes"):
        packed_batches([], rows=1, seq=16, seed=0)
    for seq in (0, 2.5):
        with pytest.raises(ValueError, match="seq must be a whole number from 1, not "):
            packed_batches([document(6, 6)], rows=1, seq=seq, seed=0)
    with pytest.raises(ValueError, match="seed must be a whole number from 0, not None"):
        packed_batches([document(6, 6)], rows=1, seq=4, seed=None)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([1, 2, 3], "must be a dict of its tokens and its target_mask"),
        ("text", "but one is 'text'"),
        ({"tokens": np.arange(3)}, "and its target_mask"),
        ({"tokens": np.ones(3), "target_mask": np.ones(3, bool)}, "integers, but are float64"),
        ({"tokens": np.ones((3, 2), int), "target_mask": np.ones(3, bool)}, r"of shape \(3, 2\)"),
    ],
    ids=["list", "text", "no mask", "real numbers", "a matrix"],
)
def test_documents_of_another_form(wrong, sentence):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=sentence):
        list(packed_batches([wrong] * 4, rows=1, seq=16, seed=0, epochs=1))


def test_documents_as_lists():
    lists = [{"tokens": [1, 2, 3], "target_mask": [True, False, True]}] * 4
    arrays = [{name: np.asarray(x) for name, x in one.items()} for one in lists]
    found, same = (
        list(packed_batches(one, rows=1, seq=6, seed=0, epochs=1)) for one in (lists, arrays)
    )
    assert len(found) == 2
    assert all(map(eqx.tree_equal, found, same))
