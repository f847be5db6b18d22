"""Batches of chats against padding by `transformers`, row by row, and in the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import (
    ImagePart,
    ImageProcessor,
    Inputs,
    Message,
    assistant_mask,
    byte_tokenizer,
    collate,
    process,
)

TILES = ImageProcessor(tile_size=56, max_tiles=4)
WHITE, GREY = np.full((56, 112, 3), 255, np.uint8), np.full((40, 40), 128, np.uint8)
CHATS = [
    [Message("user", ["a", ImagePart(WHITE), ImagePart(GREY)]), Message("assistant", "Two.")],
    [Message("user", "Hi"), Message("assistant", "Hello, and more than that")],
    [Message("user", [ImagePart(GREY)]), Message("assistant", "")],
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [
        process(tokenizer, chat, image_processor=TILES, add_generation_prompt=False)
        for chat in CHATS
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [None, 200])
def test_padding_is_that_of_transformers(tokenizer, rows, tmp_path, side, length):
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        pad_token="<|finetune_right_pad|>",
        padding_side=side,
    )
    expected = theirs.pad(
        {"input_ids": [row.tokens.tolist() for row in rows]},
        padding="longest" if length is None else "max_length",
        max_length=length,
        return_tensors="np",
    )
    batch = collate(tokenizer, iter(rows), padding_side=side, length=length)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.mask, expected["attention_mask"].astype(bool))
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, bool)
    for index, row in enumerate(rows):
        kept = batch.mask[index]
        target = assistant_mask(tokenizer, row.tokens)
        np.testing.assert_array_equal(batch.target_mask[index][kept], target)
        assert not batch.target_mask[index][~kept].any()
        assert target.sum() == len(CHATS[index][1].content) + 1
    np.testing.assert_array_equal(
        batch.pixel_values, np.concatenate([rows[0].pixel_values, rows[2].pixel_values])
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_in_the_model_is_its_rows(tokenizer, rows, side):
    vision = l4.VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=56,
        vision_output_dim=56,
        projector_input_dim=56,
        projector_output_dim=56,
    )
    tiny = l4.Llama4Config.tiny().text_config
    text = dataclasses.replace(tiny, vocab_size=tokenizer.vocab_size)
    patch = tokenizer.token_id("<|patch|>")
    config = l4.Llama4Config(text, vision, image_token_index=patch)
    model = l4.Llama4(config, key=jax.random.key(0))
    batch = collate(tokenizer, rows, padding_side=side)
    logits = model(
        jnp.asarray(batch.tokens),
        mask=jnp.asarray(batch.mask),
        pixel_values=jnp.asarray(batch.pixel_values),
    ).logits
    for index, row in enumerate(rows):
        pixels = None if row.pixel_values is None else jnp.asarray(row.pixel_values)
        alone = model(jnp.asarray(row.tokens), pixel_values=pixels).logits
        np.testing.assert_allclose(logits[index][batch.mask[index]], alone, atol=1e-5)


def test_texts_have_no_pixels(tokenizer, rows):
    batch = collate(tokenizer, [rows[1]])
    assert batch.pixel_values is None
    assert batch.mask.all()


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        ([], {}, "at least one prompt.*got none"),
        ([[1, 2]], {}, r"each a result of process\(\); got list"),
        ([CHATS[0]], {}, r"each a result of process\(\); got list"),
        (None, {"length": 3}, "tokens, more than length=3"),
        (None, {"length": 0}, "tokens, more than length=0"),
        (None, {"padding_side": "both"}, "padding_side must be 'left' or 'right'; got 'both'"),
    ],
)
def test_what_is_no_batch(tokenizer, rows, inputs, options, error, unchecked):
    with pytest.raises(ValueError, match=error):
        collate(tokenizer, rows if inputs is None else inputs, **options)


def test_tiles_of_two_sizes(tokenizer, rows):
    chat = [Message("user", [ImagePart(GREY)])]
    other = process(tokenizer, chat, image_processor=ImageProcessor(tile_size=28))
    with pytest.raises(ValueError, match="3 × 28 × 28 and 3 × 56 × 56: use the same"):
        collate(tokenizer, [*rows, other])


def test_integer_pixels_are_refused(tokenizer, rows, unchecked):
    """Those of an image are normalised; whole numbers from 0 to 255 would be silently wrong."""
    pixels = (rows[2].pixel_values * 127 + 127).astype(np.uint8)
    with pytest.raises(ValueError, match=r"normalised floats, as process\(\) gives; got uint8"):
        collate(tokenizer, [Inputs(rows[2].tokens, pixels)])
