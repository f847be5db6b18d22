"""Tiles and layouts against Meta's code and `transformers`; every kind of source; broken files."""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import tracemalloc
import warnings as python_warnings
import zlib
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_transforms import convert_to_rgb
from transformers.models.llama4.processing_llama4 import Llama4Processor

from llama4_eqx.processing import (
    ImagePart,
    ImageProcessor,
    Message,
    byte_tokenizer,
    draw_tiles,
    encode_chat,
    format_chat,
    load_image,
    process,
)

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


def picture(height: int, width: int) -> np.ndarray:
    """Slopes, fine texture and edges, the same everywhere."""
    y, x = np.mgrid[:height, :width]
    return np.stack([7 * x + 3 * y, x * x // 5 + 11 * y, x ^ y], axis=-1).astype(np.uint8)


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


@contextlib.contextmanager
def simplefilter(action):
    with python_warnings.catch_warnings():
        python_warnings.simplefilter(action)
        yield


def unchecked_annotations():
    return mock.patch.object(jaxtyping.config, "jaxtyping_disable", True)


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


# --- sources


def file_of(image: PIL.Image.Image, form: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def pixels_of(source) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_all_sources_of_an_image_are_the_same(tmp_path):
    pixels = picture(20, 30)
    image = PIL.Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        content = (tmp_path / "a.png").read_bytes()
        of_bytes = (content, bytearray(content))
        for source in (pixels, image, file, file_of(image, "PNG"), tmp_path / "a.png", *of_bytes):
            np.testing.assert_array_equal(pixels_of(source), pixels)
    np.testing.assert_array_equal(pixels_of(str(tmp_path / "a.png")), pixels)
    np.testing.assert_array_equal(pixels_of(pixels / np.float32(255)), pixels)
    np.testing.assert_array_equal(pixels_of(pixels / 255), pixels)
    np.testing.assert_array_equal(pixels_of(pixels.astype(np.uint16) * 257), pixels)
    np.testing.assert_array_equal(pixels_of(pixels[::-1, ::-1]), pixels[::-1, ::-1])


def test_arrays_of_all_libraries():
    pixels = picture(20, 30)
    for convert in (jnp.asarray, torch.tensor, np.asarray):
        np.testing.assert_array_equal(pixels_of(convert(pixels)), pixels)
        first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        np.testing.assert_array_equal(pixels_of(convert(first)), pixels)
        np.testing.assert_array_equal(pixels_of(convert(first[:1])), pixels[..., [0, 0, 0]])
    fractions = pixels / np.float32(255)
    np.testing.assert_array_equal(pixels_of(torch.tensor(fractions, requires_grad=True)), pixels)
    np.testing.assert_array_equal(pixels_of(jnp.asarray(fractions)), pixels)
    for half in (jnp.bfloat16, jnp.float16):
        near = pixels_of(jnp.asarray(fractions, half)).astype(int)
        assert np.abs(near - pixels).max() <= 1
    np.testing.assert_array_equal(
        pixels_of(torch.tensor(fractions).bfloat16()), pixels_of(jnp.asarray(fractions, "bfloat16"))
    )
    # Where both the first and the last axis may be channels, the last is meant.
    for shape in ((3, 50, 3), (1, 2, 3), (4, 4, 4), (1, 9, 1)):
        assert load_image(np.zeros(shape, np.uint8)).size == (shape[1], shape[0])


def test_channels_first_with_alpha():
    pixels = np.dstack([picture(16, 16), np.arange(256).reshape(16, 16)]).astype(np.uint8)
    first = torch.tensor(pixels).permute(2, 0, 1)[:, :9]
    np.testing.assert_array_equal(pixels_of(first), pixels_of(pixels[:9]))


def test_traced_arrays_are_named():
    with pytest.raises(ValueError, match=r"an array with values; got .*Tracer"):
        jax.jit(lambda image: load_image(image).size)(jnp.zeros((8, 8, 3), jnp.uint8))


@pytest.mark.parametrize("source", [None, 5, [[1, 2]], {"path": "a.png"}, object()])
def test_sources_of_another_kind(source, unchecked):
    with pytest.raises(ValueError, match=f"an image must be a path.*{type(source).__name__}"):
        load_image(source)


@pytest.mark.parametrize("source", ["https://a.org/b.png", "data:image/png;base64,iVBORw0KGgo="])
def test_nothing_is_fetched(source):
    with pytest.raises(ValueError, match=r"must be a local file.*nothing is fetched"):
        load_image(source)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opaque_modes_become_rgb(mode):
    image = PIL.Image.fromarray(picture(20, 30)).convert(mode)
    np.testing.assert_array_equal(pixels_of(image), np.asarray(image.convert("RGB")))


def test_grey_is_the_same_in_all_channels():
    grey = picture(20, 30)[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    for source in (grey, grey[..., None], PIL.Image.fromarray(grey), grey.astype(np.float16) / 255):
        np.testing.assert_allclose(pixels_of(source), expected, atol=int(source is not grey))


def test_transparent_shows_white():
    pixels = np.dstack([picture(16, 16), np.arange(256).reshape(16, 16)]).astype(np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    for source in (
        pixels,
        PIL.Image.fromarray(pixels),
        file_of(PIL.Image.fromarray(pixels), "PNG"),
    ):
        np.testing.assert_allclose(pixels_of(source), expected, atol=1)
    premultiplied = PIL.Image.fromarray(pixels).convert("RGBa")
    np.testing.assert_allclose(pixels_of(premultiplied), expected, atol=2)
    grey = PIL.Image.fromarray(pixels).convert("LA")
    np.testing.assert_allclose(pixels_of(grey.convert("La")), pixels_of(grey), atol=2)
    light = np.asarray(grey)[..., :1]
    np.testing.assert_allclose(
        pixels_of(grey), np.repeat(alpha * light + (1 - alpha) * 255, 3, -1), atol=1
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_transparent_colour_shows_white(mode):
    image = PIL.Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 9)
    image = image.convert(mode)
    key = {"L": 7, "RGB": (7, 7, 7), "P": image.getpixel((0, 0))}[mode]
    pixels = pixels_of(file_of(image, "PNG", transparency=key))
    np.testing.assert_array_equal(pixels, [[[255] * 3, [9] * 3]])


def test_16_bits_of_grey_are_scaled():
    levels = (np.arange(65536, dtype=np.uint16)[::97]).reshape(4, -1)
    expected = np.repeat(np.rint(levels / 257).astype(np.uint8)[..., None], 3, -1)
    height, width = levels.shape
    pgm = io.BytesIO(f"P5 {width} {height} 65535\n".encode() + levels.astype(">u2").tobytes())
    big_endian = PIL.Image.frombytes("I;16B", (width, height), levels.astype(">u2").tobytes())
    tiff = file_of(big_endian, "TIFF")
    assert PIL.Image.open(tiff).mode == "I;16B"
    png = file_of(PIL.Image.fromarray(levels), "PNG")
    fractions = PIL.Image.fromarray((levels / 65535).astype(np.float32))
    for source in (levels, pgm, big_endian, tiff, png, fractions, file_of(fractions, "TIFF")):
        np.testing.assert_array_equal(pixels_of(source), expected)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a.swapaxes(0, 1), 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_images_are_turned_upright(orientation, upright):
    pixels = picture(20, 30)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = file_of(PIL.Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels_of(file), upright(pixels))


def test_the_first_frame_counts():
    frames = [PIL.Image.new("L", (3, 3), level) for level in (10, 200)]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        file = file_of(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(pixels_of(file), 10)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_modes_are_those_of_transformers(mode):
    image = PIL.Image.fromarray(picture(20, 30))
    if "A" in mode:
        image.putalpha(PIL.Image.fromarray(picture(20, 30)[..., 1]))
    image = image.convert(mode)
    np.testing.assert_array_equal(pixels_of(image), convert_to_rgb(image, return_numpy=True))


# --- what is no image


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"version https://git-lfs.github.com/spec/v1",
        b"<html>404</html>",
        b"\xff\xd8\xff",
    ],
)
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"cat\.jpg can't be read as an image.*fetch or export"):
        load_image(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match=r"^the image can't be read"):
        load_image(io.BytesIO(content))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_cut_and_damaged_files(form):
    content = file_of(PIL.Image.fromarray(picture(40, 60)), form).getvalue()
    for length in (1, 10, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(ValueError, match=r"^the image can't be read .*cut short"):
            load_image(io.BytesIO(content[:length]))
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(0, len(content), 8)
        damaged[places] = random.integers(0, 256, 8)
        with contextlib.suppress(ValueError):  # and no other; damaged pixels are still pixels
            load_image(io.BytesIO(damaged.tobytes()))


def test_lazily_opened_images_are_named(tmp_path):
    content = file_of(PIL.Image.fromarray(picture(40, 60)), "PNG").getvalue()
    (tmp_path / "cut.png").write_bytes(content[:-100])
    with (
        PIL.Image.open(tmp_path / "cut.png") as image,
        pytest.raises(ValueError, match=r"cut\.png can't be read"),
    ):
        load_image(image)


@pytest.mark.parametrize("warnings", ["error", "ignore"])
@pytest.mark.parametrize("side", [4, 40])  # from the limit on it warns, from twice that it refuses
@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF"])
def test_too_large(tmp_path, monkeypatch, side, form, warnings):
    file = tmp_path / f"big.{form.lower()}"
    image = PIL.Image.new("L", (side, side))
    image.save(file)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    with (
        simplefilter(warnings),
        pytest.raises(ValueError, match=rf"big\.{form.lower()} is too large.*MAX_IMAGE_PIXELS"),
    ):
        load_image(file)
    assert load_image(image).size == (side, side)  # decoded already
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(file).size == (side, side)


def test_decompression_bomb(tmp_path):
    """200 million pixels in 200 kB: refused by the header, not decoded."""
    file = tmp_path / "bomb.png"
    with simplefilter("ignore"):
        PIL.Image.new("1", (20_000, 10_000)).save(file)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.png is too large"):
        load_image(file)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "content",
    [
        EPS,
        b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + EPS,
        b"\xd7\xcd\xc6\x9a\0\0" + bytes(16) + b"\x01\0\t\0" + bytes(40),  # WMF
        b"GRIB" + bytes(3) + b"\1" + bytes(40),
        b"%PDF-1.4\n%%EOF",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_no_picture_starts_a_program(tmp_path, monkeypatch, content):
    """Pillow's decoder of EPS starts Ghostscript, whatever the name of the file."""

    def refuse(*args, **kwargs):
        raise AssertionError("started a program")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", refuse)
    (tmp_path / "cat.jpg").write_bytes(content)
    for source in (tmp_path / "cat.jpg", content, io.BytesIO(content)):
        with pytest.raises(ValueError, match=r"can't be read as an image.*none of the formats"):
            load_image(source)


def test_no_opened_picture_starts_a_program(monkeypatch):
    started = []

    def ghostscript(*args, **kwargs):
        started.append(args)
        return PIL.Image.new("RGB", (99, 99)).im

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", ghostscript)
    image = PIL.Image.open(io.BytesIO(EPS))
    with pytest.raises(ValueError, match="in the format EPS, but only AVIF"):
        load_image(image)
    assert not started
    image.load()  # by the user's own will
    assert started
    assert load_image(image).size == (99, 99)


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000"])
def test_newer_formats_are_read(form):
    image = PIL.Image.new("RGB", (64, 32), (10, 200, 30))
    assert np.abs(pixels_of(file_of(image, form)).astype(int) - (10, 200, 30)).max() <= 4


def test_pictures_of_phones(tmp_path):
    """Two JPEGs in one file, of which Pillow makes its own format."""
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    file = file_of(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert PIL.Image.open(io.BytesIO(file.getvalue())).format == "MPO"
    np.testing.assert_array_equal(pixels_of(file), 0)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cat\.png"):
        load_image(tmp_path / "cat.png")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((2, 8, 9), np.uint8), r"\(2, 8, 9\): pass the images"),
        (np.zeros((8, 9, 2), np.uint8), r"\(8, 9, 2\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
        (np.zeros((8, 9), complex), "got complex128"),
        (np.zeros((8, 9), np.int8), "got int8"),
        (np.array([["a"]]), "got <U1"),
        (torch.zeros(3, 8, 9, dtype=torch.int64), "got int64"),
        (torch.full((3, 8, 9), 255.0), "from 0 to 1; got 255"),
        (torch.zeros(2, 3, 8, 9), r"shape \(2, 3, 8, 9\)"),
        (jnp.zeros((8, 9, 3), jnp.int32), "got int32"),
        (np.zeros((3, 0, 9), np.uint8), "must have pixels"),
        (torch.zeros(3, 8, 0), "must have pixels"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"axes height, width.*\(1, 8, 9, 3\)"),
        (np.zeros(8, np.uint8), "axes height, width"),
        (np.zeros((8, 9, 3), np.int64), "got int64.*cast it to uint8"),
        (np.zeros((8, 9), bool), "got bool"),
        (np.full((8, 9), 255.0), "from 0 to 1; got 255.0 to 255.0: divide"),
        (np.full((8, 9), -0.1), "from 0 to 1; got -0.1"),
        (np.full((8, 9), np.nan), "from 0 to 1; got nan"),
        (np.zeros((0, 9, 3), np.uint8), "must have pixels"),
        (np.zeros((8, 0)), "must have pixels"),
    ],
)
def test_arrays_of_another_kind(array, error):
    with pytest.raises(ValueError, match=error):
        load_image(array)


def test_images_of_another_kind():
    with pytest.raises(ValueError, match="must have pixels; got 0 × 5"):
        load_image(PIL.Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="within 0 and 65535; got -3 to -3"):
        load_image(PIL.Image.new("I", (5, 5), -3))


def test_missing_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"`pillow` package: pip install 'llama4_eqx\[images\]'"):
        load_image(io.BytesIO())


# --- the settings of a checkpoint

# As `transformers` writes them, with one value of each changed from the default.
IMAGE_SETTINGS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_processor_type": "Llama4ImageProcessorFast",
    "image_std": [0.4, 0.5, 0.6],
    "max_patches": 4,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "size": {"height": 112, "width": 112},
    "processor_class": "Llama4Processor",
    "crop_size": None,
    "unknown": "field",
}
EXPECTED = ImageProcessor(112, 14, 0.5, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
OLD = {"size": {"height": 28, "width": 28}, "image_processor_type": "Llama4ImageProcessor"}
PROCESSOR = {"processor_class": "Llama4Processor", "patch_size": 14}


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": IMAGE_SETTINGS},
        {"preprocessor_config": IMAGE_SETTINGS, "processor_config": PROCESSOR},
        {"processor_config": PROCESSOR | {"image_processor": IMAGE_SETTINGS}},
        {
            "processor_config": {"image_processor": IMAGE_SETTINGS},
            "preprocessor_config": OLD,
        },
    ],
)
def test_settings_are_found_as_in_transformers(tmp_path, files):
    write(tmp_path, **files)
    theirs, _ = ImageProcessingMixin.get_image_processor_dict(tmp_path)
    assert theirs == IMAGE_SETTINGS
    assert ImageProcessor.from_folder(tmp_path) == EXPECTED


def test_other_nestings_of_settings(tmp_path):
    assert ImageProcessor.from_folder(write(tmp_path, processor_config=IMAGE_SETTINGS)) == EXPECTED
    (tmp_path / "processor_config.json").unlink()
    write(tmp_path, preprocessor_config={"image_processor": IMAGE_SETTINGS})
    assert ImageProcessor.from_folder(str(tmp_path)) == EXPECTED


def test_released_settings_are_the_defaults(tmp_path):
    released = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_patches": 16, "resample": 2}
    released |= {"size": {"height": 336, "width": 336}}
    write(tmp_path, preprocessor_config=released, processor_config=PROCESSOR)
    image = picture(500, 700)
    np.testing.assert_array_equal(
        ImageProcessor.from_folder(tmp_path)(image).pixel_values,
        ImageProcessor()(image).pixel_values,
    )
    assert ImageProcessor.from_folder(write(tmp_path, preprocessor_config=OLD)).tile_size == 28
    nulls = dict.fromkeys(IMAGE_SETTINGS)
    assert ImageProcessor.from_folder(write(tmp_path, preprocessor_config=nulls)).max_tiles == 16
    one_number = {"image_mean": 0.3, "size": 56, "do_normalize": True, "resample": "bilinear"}
    read = ImageProcessor.from_folder(write(tmp_path, preprocessor_config=one_number))
    assert (read.mean, read.tile_size) == (0.3, 56)
    read = ImageProcessor.from_folder(write(tmp_path, preprocessor_config={"do_normalize": False}))
    assert (read.mean, read.std) == (0, 1)


def test_sizes_of_tokens_are_those_of_the_model(tmp_path):
    vision = {"vision_config": {"patch_size": 7, "pixel_shuffle_ratio": 0.25}}
    write(tmp_path, preprocessor_config=OLD, config=vision)
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor(28, 7, 0.25)
    write(tmp_path, config={"vision_config": None}, processor_config={"pixel_shuffle_ratio": 1.0})
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor(28, 14, 1.0)
    write(tmp_path, config=vision)
    with pytest.raises(
        ValueError, match=r"pixel_shuffle_ratio must be the same.* got 1\.0 and 0\."
    ):
        ImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"size": {"height": 336, "width": 112}}, "size must be an equal height and width"),
        ({"size": {"shortest_edge": 336}}, "size must be an equal"),
        ({"size": "336"}, "size must be an equal"),
        ({"size": {"height": "336", "width": "336"}}, "tile_size must be a whole number.*'336'"),
        ({"size": {"height": 100, "width": 100}}, "a whole number of patches"),
        ({"size": -336}, "tile_size must be"),
        ({"max_patches": 0}, "max_tiles must be.*max_patches"),
        ({"max_patches": 2.5}, "max_tiles must be"),
        ({"max_patches": "16"}, "max_tiles must be"),
        ({"max_patches": True}, "max_tiles must be"),
        ({"image_mean": [0.5, 0.5]}, "mean must be"),
        ({"image_mean": ["0.5"] * 3}, "mean must be"),
        ({"image_mean": float("nan")}, "mean must be"),
        ({"image_std": [0.5, 0.5, 0]}, "std must be above 0"),
        ({"image_std": {}}, "std must be"),
        ({"do_resize": False}, "do_resize must be true; got False"),
        ({"do_rescale": "true"}, "do_rescale must be true; got 'true'"),
        ({"resize_to_max_canvas": True}, "resize_to_max_canvas must be false"),
        ({"do_normalize": "false"}, "do_normalize must be true or false"),
        ({"resample": 3}, "resample must be 2"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be 1/255"),
        ({"image_processor_type": "CLIPImageProcessor"}, "another model's.*CLIP"),
    ],
)
def test_senseless_settings(tmp_path, change, error, unchecked):
    write(tmp_path, preprocessor_config=IMAGE_SETTINGS | change)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{error}"):
        ImageProcessor.from_folder(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(name=st.sampled_from(sorted(IMAGE_SETTINGS)), value=json_values)
def test_any_value_is_read_or_refused(name, value):
    with tempfile.TemporaryDirectory() as folder, unchecked_annotations():
        write(Path(folder), preprocessor_config=IMAGE_SETTINGS | {name: value})
        with contextlib.suppress(ValueError):
            assert isinstance(ImageProcessor.from_folder(folder), ImageProcessor)


@pytest.mark.parametrize("content", ["", "[]", "{", "version https://git-lfs"])
def test_broken_settings(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json (is not|must hold)"):
        ImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize("files", [{}, {"processor_config": PROCESSOR}])
def test_missing_settings(tmp_path, files):
    write(tmp_path, **files)
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json nor an image_proc"):
        ImageProcessor.from_folder(tmp_path)
    with pytest.raises(OSError, match="Can't load image processor"):  # theirs
        ImageProcessingMixin.get_image_processor_dict(tmp_path)


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
