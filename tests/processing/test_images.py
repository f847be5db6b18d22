"""Tiles and layouts against Meta's code and `transformers`; chats with images."""

import re
import zlib
from pathlib import Path

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama4.processing_llama4 import Llama4Processor

from llama4_eqx.processing import (
    ImagePart,
    ImageProcessor,
    Message,
    byte_tokenizer,
    draw_tiles,
    encode_chat,
    format_chat,
    process,
)
from tests.processing.pictures import picture

GOLDEN = Path(__file__).parent / "golden" / "images.npz"
# height, width: a pixel, less than a tile, a tile and its neighbours, whole tiles, photographs,
# strips, more than all tiles hold.
SHAPES = (
    *((1, 1), (1, 2), (10, 20), (200, 300), (335, 336), (336, 336), (337, 336), (336, 337)),
    *((336, 672), (672, 672), (1008, 672), (1344, 1344), (336, 5376), (5376, 336), (1345, 1344)),
    *((480, 640), (640, 480), (768, 1024), (1080, 1920), (500, 500), (300, 800), (1000, 333)),
    *((2000, 3000), (4000, 1000), (100, 1500), (3, 5000), (1, 10_000), (10_000, 1)),
)
# `transformers` computes sizes in float32, and so resizes this one to 384 columns, Meta's to 383.
ONE_COLUMN_OFF = (4249, 607)
# One level of 255 for its resize, half a level for bfloat16; values are 2/255 a level.
DISTANCE_TO_TRANSFORMERS = 1.5 * 2 / 255
SAMPLE = (..., slice(5, None, 47), slice(5, None, 47))


def checksum(values: np.ndarray) -> int:
    return zlib.crc32(values.astype("<f4").tobytes())


def record() -> None:
    """Writes `golden/images.npz`: what Meta's code and `transformers` make of the pictures.

    To be run by hand, `python -c "from tests.processing.test_images import record as r; r()"`, with
    torchvision. Should its compiled half not fit the torch at hand, put an empty module into
    `sys.modules` as `torchvision._meta_registrations` first: resizing needs none of it.
    """
    from llama_models.llama4.preprocess import (
        ResizeNormalizeImageTransform,
        VariableSizeImageTransform,
    )
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    grids, checksums, samples = [], [], []
    for shape in (*SHAPES, ONE_COLUMN_OFF):
        image = PIL.Image.fromarray(picture(*shape))
        tiles, grid = VariableSizeImageTransform(336)(image, max_num_chunks=16)
        if len(tiles) > 1:
            tiles = torch.cat([tiles, ResizeNormalizeImageTransform(336, 336)(image)[None]])
        theirs = Llama4ImageProcessor()(image, return_tensors="pt")
        assert tuple(theirs["aspect_ratios"][0].tolist()) == grid
        assert theirs["pixel_values"].shape == tiles.shape
        distance = (theirs["pixel_values"].float() - tiles).abs()
        print(shape, grid, *(127.5 * x.item() for x in (distance.max(), distance.mean())))
        grids.append(grid)
        checksums.append(checksum(tiles.numpy()))
        # bfloat16 values between -1 and 1, so that float16 holds them
        samples.append(theirs["pixel_values"].float().numpy()[SAMPLE].astype(np.float16))
    np.savez_compressed(
        GOLDEN,
        grids=np.array(grids),
        checksums=np.array(checksums),
        transformers=np.concatenate(samples),
    )


@pytest.fixture(scope="module")
def golden():
    """By shape: the grid, the checksum of Meta's tiles, a sample of those of `transformers`."""
    stored, shapes = np.load(GOLDEN), (*SHAPES, ONE_COLUMN_OFF)
    grids = [tuple(map(int, grid)) for grid in stored["grids"]]
    ends = np.cumsum([rows * columns + (rows * columns > 1) for rows, columns in grids])
    samples = np.split(stored["transformers"].astype(np.float32), ends[:-1])
    return {
        shape: (grid, int(check), sample)
        for shape, grid, check, sample in zip(
            shapes, grids, stored["checksums"], samples, strict=True
        )
    }


@pytest.fixture(scope="module")
def processor():
    return ImageProcessor()


# --- tiles


@pytest.mark.parametrize("shape", [*SHAPES, ONE_COLUMN_OFF])
def test_tiles_are_metas_and_near_those_of_transformers(golden, processor, shape):
    grid, expected, sample = golden[shape]
    values, rows, columns = processor(picture(*shape))
    assert (rows, columns) == grid
    assert values.dtype == np.float32
    assert checksum(values) == expected
    distance = np.abs(values[SAMPLE] - sample).max()
    if shape != ONE_COLUMN_OFF:
        assert distance <= DISTANCE_TO_TRANSFORMERS + 1e-6
    else:
        assert processor.fit(*shape)[2:] == (2688, 383)
        assert distance > 10 * DISTANCE_TO_TRANSFORMERS


sides = st.integers(1, 700) | st.integers(1, 20_000)


@settings(deadline=None, max_examples=300)
@given(sides, sides, st.sampled_from([(336, 16), (336, 1), (336, 5), (28, 4), (448, 25)]))
def test_fit_is_metas(meta, height, width, limits):
    tile, most = limits
    theirs = meta.preprocess.VariableSizeImageTransform(tile)
    canvases = torch.tensor(theirs.find_supported_resolutions(most, tile))
    canvas_width, canvas_height = theirs.get_best_fit((width, height), canvases)
    # as `resize_without_distortion` does, which goes on to resize with torchvision
    room = (min(max(width, tile), canvas_width), min(max(height, tile), canvas_height))
    new_width, new_height = theirs.get_max_res_without_distortion((width, height), room)
    ours = ImageProcessor(tile_size=tile, max_tiles=most).fit(height, width)
    assert (ours.rows * tile, ours.columns * tile) == (canvas_height, canvas_width)
    assert (ours.height, ours.width) == (max(new_height, 1), max(new_width, 1))


def test_tiles_lie_row_by_row_with_the_whole_last():
    processor = ImageProcessor(tile_size=28)
    image = np.repeat(np.repeat([[0, 50, 100], [150, 200, 250]], 28, 0), 28, 1).astype(np.uint8)
    values, rows, columns = processor(image)
    assert (rows, columns, values.shape) == (2, 3, (7, 3, 28, 28))
    levels = (values * 0.5 + 0.5) * 255
    np.testing.assert_allclose(levels[:6].mean((1, 2, 3)), [0, 50, 100, 150, 200, 250], atol=1e-3)
    np.testing.assert_allclose(levels[:6].std((1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(levels[6, :, ::27, ::27], [[[0, 100], [150, 250]]] * 3, atol=1e-3)


def test_rest_of_the_grid_is_black():
    values, rows, columns = ImageProcessor()(np.full((100, 200), 255, np.uint8))
    assert (rows, columns) == (1, 1)
    assert np.all(values[..., :168, :] == 1)
    assert np.all(values[..., 168:, :] == -1)


def test_mean_and_std_normalise():
    values = ImageProcessor(tile_size=28, mean=0.2, std=0.4)(np.full((28, 28), 51, np.uint8))
    np.testing.assert_allclose(values.pixel_values, 0, atol=1e-6)
    mean, std = (0.2, 0.3, 0.4), (0.5, 1.0, 2.0)
    pixels = picture(28, 28)
    values = ImageProcessor(tile_size=28, mean=mean, std=std)(pixels).pixel_values
    assert values.dtype == np.float32
    by_torch = torch.tensor(pixels).permute(2, 0, 1).float() / 255
    by_torch = (by_torch - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(values[0], by_torch, atol=1e-6)
    numpy_scalar = ImageProcessor(tile_size=28, mean=np.float64(0.5), std=np.float64(0.5))
    assert numpy_scalar(pixels).pixel_values.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tile_size": 330}, "a whole number of patches.*330"),
        ({"tile_size": 42}, "a whole number of patches.*42"),
        ({"pixel_shuffle_ratio": 0.01}, "a whole number of patches"),
        ({"max_tiles": 0}, "max_tiles must be a whole number of at least 1; got 0"),
        ({"max_tiles": 10**9}, "max_tiles must be at most 10,000"),
        ({"max_tiles": True}, "max_tiles must be a whole number"),
        ({"max_tiles": "16"}, "max_tiles must be a whole number.*'16'"),
        ({"tile_size": 336.0}, "tile_size must be a whole number"),
        ({"patch_size": 0}, "patch_size must be a whole number"),
        ({"patch_size": -14}, "patch_size must be a whole number"),
        ({"pixel_shuffle_ratio": float("nan")}, "pixel_shuffle_ratio must be a number"),
        ({"pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio must be a number"),
        ({"pixel_shuffle_ratio": 2.0}, "pixel_shuffle_ratio must be.* at most 1"),
        ({"mean": float("nan")}, "mean must be a finite number"),
        ({"mean": (0.5, 0.5)}, "mean must be a finite number, or one for each of 3 channels"),
        ({"mean": "0.5"}, "mean must be a finite number"),
        ({"std": 0}, "std must be above 0; got 0"),
        ({"std": (0.5, 0.5, -1)}, "std must be above 0"),
        ({"std": True}, "std must be a finite number"),
    ],
)
def test_bad_sizes(options, error, unchecked):
    with pytest.raises(ValueError, match=error):
        ImageProcessor(**options)


# --- layouts


def test_layouts_are_those_of_both_references(golden, meta, processor):
    vision = meta.args.VisionArgs(
        image_size={"height": 336, "width": 336},
        patch_size={"height": 14, "width": 14},
        pixel_shuffle_ratio=0.5,
        dim=0,
        n_layers=0,
        n_heads=0,
        mlp_ratio=0,
        output_dim=0,
    )
    chat = meta.chat_format.ChatFormat(meta.reader, vision)
    assert processor.tokens_per_tile == 144
    for rows, columns in {grid for grid, *_ in golden.values()}:
        layout = processor.layout(rows, columns)
        assert "".join(layout) == Llama4Processor._prompt_split_image(None, (rows, columns), 144)
        tiles = torch.zeros(rows * columns + (rows * columns > 1), 3, 336, 336)
        image = meta.chat_format.TransformedImage(tiles, (rows, columns))
        assert list(map(meta.tokenizer.token_id, layout)) == chat._encode_image(image)
        assert layout.count("<|patch|>") == 144 * len(tiles)


# --- chats with images


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


QUESTION = [
    {"role": "system", "content": "Look."},
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "Which of "},
            {"type": "image"},
            {"type": "image"},
        ],
    },
    {"role": "assistant", "content": "The last."},
    {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image"}]},
]
SIZES = ((10, 20), (480, 640), (336, 336), (100, 700))
GRIDS = ((1, 1), (2, 2), (1, 1), (1, 3))


@pytest.mark.parametrize("prompt", [True, False])
def test_prompt_is_that_of_transformers(meta, tokenizer, processor, prompt):
    images = [picture(*size) for size in SIZES]
    tokens, values = process(tokenizer, iter(QUESTION), images, add_generation_prompt=prompt)
    np.testing.assert_array_equal(
        values, np.concatenate([processor(image).pixel_values for image in images])
    )
    assert tokens.dtype == np.int32
    assert np.sum(tokens == tokenizer.token_id("<|patch|>")) == 144 * len(values)
    # It puts layouts into the text, and then encodes that.
    layouts = iter([Llama4Processor._prompt_split_image(None, grid, 144) for grid in GRIDS])
    text = format_chat(QUESTION, add_generation_prompt=prompt)
    text = re.sub(r"<\|image\|>", lambda _: next(layouts), text)
    np.testing.assert_array_equal(tokens, tokenizer.encode(text, special=True))
    tokens, _ = process(meta.tokenizer, QUESTION, images, add_generation_prompt=prompt)
    np.testing.assert_array_equal(tokens, meta.tokenizer.encode(text, special=True))


def test_placeholders_in_a_text_are_text(tokenizer):
    typed = "<|image_start|><|image|><|patch|><|image_end|>"
    content = [typed, ImagePart(picture(9, 9)), typed]
    tokens, _ = process(tokenizer, [Message("user", content)])
    start, image = map(tokenizer.token_id, ("<|image_start|>", "<|image|>"))
    assert (np.sum(tokens == start), np.sum(tokens == image)) == (1, 1)
    assert tokenizer.decode(tokens).count(typed) == 2


def test_images_may_come_with_their_parts(tokenizer, tmp_path):
    red, green, blue = (PIL.Image.new("RGB", (9, 9), name) for name in ("red", "lime", "blue"))
    red.save(tmp_path / "red.png")
    content = [
        {"type": "image", "path": tmp_path / "red.png"},
        {"type": "text", "text": "or"},
        {"type": "image"},
        {"type": "image", "image": blue},
    ]
    inputs = process(tokenizer, [{"role": "user", "content": content}], [green])
    assert inputs.pixel_values is not None
    np.testing.assert_array_equal(inputs.pixel_values[:, :, 0, 0], 2 * np.eye(3) - 1)
    places = [ImagePart(), "or", ImagePart(), ImagePart()]
    all_given = process(tokenizer, [Message("user", places)], [red, green, blue])
    np.testing.assert_array_equal(inputs.tokens, all_given.tokens)
    np.testing.assert_array_equal(inputs.pixel_values, all_given.pixel_values)


def test_text_chats_have_no_pixels(tokenizer):
    messages = [Message("user", "What is <|image|>?")]
    tokens, values = process(tokenizer, messages)
    assert values is None
    assert tokens.dtype == np.int32
    assert tokens.tolist() == encode_chat(tokenizer, messages)


def test_sizes_are_those_of_the_processor(tokenizer):
    small = ImageProcessor(tile_size=28, patch_size=7, max_tiles=4)
    messages = [Message("user", [ImagePart(picture(56, 56))])]
    tokens, values = process(tokenizer, messages, image_processor=small)
    assert values is not None
    assert values.shape == (5, 3, 28, 28)
    assert np.sum(tokens == tokenizer.token_id("<|patch|>")) == 5 * 4


@pytest.mark.parametrize("count", [0, 2, 3, 5])
def test_as_many_images_as_places(tokenizer, count):
    with pytest.raises(ValueError, match=f"got {count} images for 4 such parts"):
        process(tokenizer, QUESTION, [picture(9, 9)] * count)


def test_images_are_a_list(tokenizer, tmp_path, unchecked):
    image = PIL.Image.fromarray(picture(9, 9))
    image.save(tmp_path / "a.png")
    messages = [Message("user", [ImagePart()])]
    with open(tmp_path / "a.png", "rb") as file:
        for one in (str(tmp_path / "a.png"), tmp_path / "a.png", file, image, picture(9, 9), b""):
            with pytest.raises(ValueError, match=f"a list of images; got one {type(one).__name__}"):
                process(tokenizer, messages, one)
    alone = process(tokenizer, messages, [picture(9, 9)])
    batch = process(tokenizer, messages, picture(9, 9)[None])
    np.testing.assert_array_equal(batch.pixel_values, alone.pixel_values)


def test_a_bad_image_is_named_by_its_place(tokenizer):
    bad = np.zeros((2, 9, 9), np.uint8)
    content = [ImagePart(), "and", ImagePart()]
    with pytest.raises(ValueError, match="image 2 of the conversation: an array must"):
        process(tokenizer, [Message("user", content)], [picture(9, 9), bad])


def test_an_image_needs_a_place(tokenizer):
    with pytest.raises(ValueError, match="got 1 images for 0 such parts"):
        process(tokenizer, [Message("user", "<|image|>")], [picture(9, 9)])


# --- pictures of tiles


def test_drawing_shows_tiles_and_patches():
    processor = ImageProcessor(tile_size=28)
    sheet = draw_tiles(np.full((28, 56, 3), 200, np.uint8), processor)
    assert sheet.size == (3 * (28 + 14) + 14, 28 + 2 * 14)
    shown = np.asarray(sheet)[..., 0]
    assert shown[0, 0] == 255
    for left in (14, 56, 98):  # two tiles and the whole, which is as grey
        tile = shown[14:42, left : left + 28]
        assert tile[5, 5] == tile[20, 20] == 200
        assert tile[0, 5] == tile[5, 14] == 100
    alone = draw_tiles(np.full((28, 28), 200, np.uint8), processor)
    assert alone.size == (28 + 2 * 14, 28 + 2 * 14)
    assert draw_tiles(picture(9, 9)).size == (336 + 28, 336 + 28)
