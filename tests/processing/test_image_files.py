"""Images from every kind of source; formats, limits, broken files."""

import contextlib
import io
import subprocess
import sys
import tracemalloc
import warnings as python_warnings

import jax
import jax.numpy as jnp
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch
from transformers.image_transforms import convert_to_rgb

from llama4_eqx.processing import load_image
from tests.processing.pictures import picture


@contextlib.contextmanager
def simplefilter(action):
    with python_warnings.catch_warnings():
        python_warnings.simplefilter(action)
        yield


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
