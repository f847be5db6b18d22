"""Vision encoder, projector and their joining with text, against `transformers`."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama4 import modeling_llama4 as theirs

import llama4_eqx as l4
from llama4_eqx.checkpoints.tensor_names import tensors
from tests.toys import (
    IMAGE_TOKEN,
    MULTIMODAL,
    TOKENS_PER_TILE,
    VISION,
    as_torch,
    random_tokens,
    reference_model,
    relative_error,
    their_embeddings,
)

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`transformers`' multimodal model and ours with the same weights."""
    folder = tmp_path_factory.mktemp("multimodal")
    reference = reference_model(MULTIMODAL)
    reference.save_pretrained(folder)
    return reference, l4.load_checkpoint(folder)


def random_pixels(tiles: int, seed: int = 0, size: int = 28) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.uniform(-1, 1, (tiles, 3, size, size)), jnp.float32)


def random_features(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def prompts(tiles_of_rows: list[list[int]], length: int = 40):
    """Left-padded rows with text between images of so many tiles each, and their mask."""
    rows, masks = [], []
    for i, images in enumerate(tiles_of_rows):
        row = random_tokens(3, seed=i)
        for j, tiles in enumerate(images):
            image = jnp.full(tiles * TOKENS_PER_TILE, IMAGE_TOKEN)
            row = jnp.concatenate([row, image, random_tokens(2 + j, vocab=240, seed=7 * i + j)])
        rows.append(jnp.pad(row, (length - len(row), 0)))
        masks.append(jnp.arange(length) >= length - len(row))
    return jnp.stack(rows), jnp.stack(masks)


def test_unfold_convolution(pair):
    reference, model = pair
    pixels = random_pixels(3)
    truth = reference.vision_model.patch_embedding(as_torch(pixels)).detach()
    assert relative_error(model.vision_model.patch_embedding(pixels), truth) < TOLERANCE


@pytest.mark.parametrize("side", [2, 4])
def test_pixel_shuffle(side):
    patches = random_features(3, 64, 16)
    truth = theirs.pixel_shuffle(as_torch(patches), 1 / side)
    np.testing.assert_array_equal(l4.pixel_shuffle(patches, 1 / side), truth)


def test_pixel_shuffle_of_a_rectangle():
    """Each token of a wide image is one of the square images that it is made of."""
    left, right = random_features(16, 8), random_features(2, 16, 8)[1]
    wide = jnp.concatenate([left.reshape(4, 4, 8), right.reshape(4, 4, 8)], 1).reshape(32, 8)
    tokens = l4.pixel_shuffle(wide, 0.5, rows=4).reshape(2, 4, 32)
    for half, image in ((tokens[:, :2], left), (tokens[:, 2:], right)):
        np.testing.assert_array_equal(half.reshape(4, 32), l4.pixel_shuffle(image, 0.5))


@pytest.mark.parametrize(
    ("patches", "ratio", "rows", "sentence"),
    [
        (15, 0.5, None, "don't fill 3 rows of 3"),
        (16, 0.3, None, "1 over a number"),
        (25, 0.5, None, "1 over a number that divides both"),
        (12, 0.5, 3, "don't cover 3 x 4"),
    ],
)
def test_pixel_shuffle_errors(patches, ratio, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.pixel_shuffle(random_features(patches, 4), ratio, rows=rows)


def test_modules_alone(pair):
    reference, model = pair
    layer = jax.tree.map(lambda leaf: leaf[1], model.vision_model.model.blocks)
    their_layer = reference.vision_model.model.layers[1]
    x = random_features(2, 17, 32)
    assert relative_error(layer.mlp(x), their_layer.mlp(as_torch(x)).detach()) < TOLERANCE
    turns = reference.vision_model.rotary_embedding(torch.zeros(1))
    rotation = l4.vision.rotation_2d(4, 4, 16, VISION.rope_theta)
    assert relative_error(rotation.cos, turns.reshape(17, 8).real) < 1e-6
    assert relative_error(rotation.sin, turns.reshape(17, 8).imag) < 1e-6
    truth = their_layer(as_torch(x), freqs_ci=turns)[0].detach()
    assert relative_error(layer(x, rotation), truth) < TOLERANCE
    truth = reference.vision_model.model(as_torch(x), freqs_ci=turns).last_hidden_state.detach()
    assert relative_error(model.vision_model.model(x, rotation), truth) < TOLERANCE
    x = random_features(2, 16, 32)
    adapter = model.vision_model.vision_adapter
    truth = reference.vision_model.vision_adapter(as_torch(x)).detach()
    assert relative_error(adapter(x), truth) < TOLERANCE
    x = random_features(2, 4, 128)
    truth = reference.vision_model.vision_adapter.mlp(as_torch(x)).detach()
    assert relative_error(adapter.mlp(x), truth) < TOLERANCE
    x = random_features(2, 4, 24)
    truth = reference.multi_modal_projector(as_torch(x)).detach()
    assert relative_error(model.multi_modal_projector(x), truth) < TOLERANCE


@pytest.mark.parametrize("tiles", [1, 5])
def test_features_and_projected_features(pair, tiles):
    reference, model = pair
    pixels = random_pixels(tiles)
    with torch.no_grad():
        features = reference.get_image_features(as_torch(pixels)).last_hidden_state
        projected = reference.multi_modal_projector(features)
    assert relative_error(model.vision_model(pixels), features) < TOLERANCE
    assert relative_error(l4.encode_images(model, pixels), projected) < TOLERANCE


def test_any_batch_axes(pair):
    _, model = pair
    pixels = random_pixels(6)
    together = model.vision_model(pixels)
    shaped = model.vision_model(pixels.reshape(2, 3, 3, 28, 28))
    assert relative_error(shaped.reshape(together.shape), together) < 1e-6
    assert relative_error(model.vision_model(pixels[0]), together[0]) < 1e-5


@pytest.mark.parametrize("images", [[[1]], [[3]], [[1, 2]], [[2], [1]], [[1, 3], [], [2]]], ids=str)
def test_multimodal_logits(pair, images):
    reference, model = pair
    tokens, mask = prompts(images)
    tiles = sum(sum(row) for row in images)
    pixels = random_pixels(tiles)
    logits = eqx.filter_jit(model)(tokens, mask=mask, pixel_values=pixels).logits
    done = 0
    for i, row in enumerate(images):  # one by one: transformers tunes padded rows wrongly
        mine = pixels[done : done + sum(row)]
        done += sum(row)
        with torch.no_grad():
            embedded = their_embeddings(reference, tokens[i][mask[i]], mine)
            truth = reference.language_model(inputs_embeds=embedded).logits[0]
        assert relative_error(logits[i][mask[i]], truth) < TOLERANCE


def test_greedy_text_with_images(pair):
    reference, model = pair
    tokens, mask = prompts([[1, 2], [1]])
    pixels = random_pixels(4)
    new = l4.generate(model, tokens, mask=mask, pixel_values=pixels, max_new_tokens=30)
    streamed = list(l4.stream(model, tokens, mask=mask, pixel_values=pixels, max_new_tokens=30))
    np.testing.assert_array_equal(jnp.stack(streamed, -1), new)
    for i, mine in enumerate((pixels[:3], pixels[3:])):
        truth = reference.language_model.generate(
            inputs_embeds=their_embeddings(reference, tokens[i][mask[i]], mine),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
        )[0]
        assert len(set(truth.tolist())) > 5, "a constant text would show nothing"
        np.testing.assert_array_equal(new[i], truth)


def test_embeddings_equal_pixels(pair):
    _, model = pair
    tokens, mask = prompts([[1, 2], [1]])
    pixels = random_pixels(4)
    from_pixels = model(tokens, mask=mask, pixel_values=pixels).logits
    embeddings = l4.encode_images(model, pixels)
    from_embeddings = model(tokens, mask=mask, image_embeddings=embeddings).logits
    assert relative_error(from_embeddings, from_pixels) < 1e-6
    with pytest.raises(ValueError, match="not both"):
        model(tokens, mask=mask, pixel_values=pixels, image_embeddings=embeddings)


@pytest.mark.parametrize("jit", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
def test_counts_that_differ_are_named(pair, jit):
    _, model = pair
    tokens, mask = prompts([[1, 2]])
    with pytest.raises(Exception, match="have 12 image tokens, but the images give 8 features"):
        jax.block_until_ready(jit(model)(tokens, mask=mask, pixel_values=random_pixels(2)))


def test_size_errors(pair):
    _, model = pair
    with pytest.raises(ValueError, match="multiples of 7"):
        model.vision_model(random_pixels(1, size=30))
    with pytest.raises(ValueError, match=r"has 5 x 5 patches, but .* positions for 16"):
        model.vision_model(random_pixels(1, size=35))
    text_only = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="text-only"):
        l4.encode_images(text_only, random_pixels(1))


def test_gradients_reach_every_vision_and_projector_leaf(pair):
    reference, model = pair
    tokens, mask = prompts([[2]])
    pixels = random_pixels(2)
    gradient = eqx.filter_jit(
        eqx.filter_grad(
            lambda model: jnp.mean(
                jnp.where(
                    mask[..., None],
                    jax.nn.log_softmax(model(tokens, mask=mask, pixel_values=pixels).logits),
                    0,
                )
                ** 2
            )
        )
    )(model)
    reference.zero_grad()
    embedded = their_embeddings(reference, tokens[mask], pixels)
    logits = reference.language_model(inputs_embeds=embedded).logits
    (torch.log_softmax(logits, -1).square().sum() / (40 * 256)).backward()
    truth = {name: p.grad for name, p in reference.named_parameters()}
    leaves = jax.tree.leaves(gradient)
    vision = [t for t in tensors(model) if not t.name.startswith("model.")]
    vision = [t for t in vision if t.name != "lm_head.weight"]
    assert len(vision) == 10 + 16 * VISION.num_hidden_layers
    for tensor in vision:
        ours = leaves[tensor.leaf]
        ours = ours if tensor.stack_index is None else ours[tensor.stack_index]
        assert float(jnp.abs(ours).max()) > 0, tensor.name
        if "k_proj.bias" in tensor.name:
            continue  # adds the same to all of a query's scores but for RoPE: close to nothing
        assert relative_error(ours.reshape(tensor.shape), truth[tensor.name]) < 1e-4, tensor.name


def test_dropout(pair):
    _, model = pair
    config = replace(MULTIMODAL, vision_config=replace(VISION, projector_dropout=0.5))
    shapes = l4.Llama4(config, key=jax.random.key(0))
    wet = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(model))
    pixels = random_pixels(2)
    dry = model.vision_model(pixels)
    assert relative_error(wet.vision_model(pixels), dry) == 0
    assert relative_error(wet.vision_model(pixels, key=jax.random.key(0)), dry) > 1e-2
    many = jax.vmap(lambda key: wet.vision_model.vision_adapter.mlp(random_features(128), key=key))
    draws = many(jax.random.split(jax.random.key(1), 50))
    assert len(np.unique(np.asarray(draws[:, 0]))) > 10
