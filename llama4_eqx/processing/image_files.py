"""Images from files, bytes, arrays and Pillow, as 8-bit RGB.

`transformers` 5.24 and Meta's code differ from this in one respect: Pillow's `convert`, and with it
both of them, clips 16-bit grey, which is scaled here.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Union, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

# Pillow tries no other decoder. Some of those start programs: that of EPS starts Ghostscript,
# whatever the name of the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_CHANNELS = (1, 3, 4)


@runtime_checkable
class SupportsArray(Protocol):
    """What `np.asarray` understands, such as arrays of JAX and tensors of torch."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


# A path, the bytes of a file, a file opened in binary mode, a Pillow image, or an array of NumPy,
# JAX or torch. An array has the axes "height width" if grey, else "height width channels", or
# "channels height width" where the last axis can't be channels; with 1, 3 or 4 channels. It holds
# uint8, uint16, or floats from 0 to 1.
ImageSource = Union[
    str, os.PathLike[str], bytes, bytearray, BinaryIO, np.ndarray, SupportsArray, "PIL.Image.Image"
]


def load_image(source: ImageSource) -> "PIL.Image.Image":
    """The image in 8-bit RGB, upright according to its EXIF data.

    Transparent pixels become white, as in `transformers`. 16-bit grey is scaled to 8 bits; of
    16-bit colours Pillow reads the high bytes. Of an animation the first frame is taken.

    Errors: `ValueError` for a source of another kind, for a file that can't be read or isn't in one
    of `FORMATS`, and for one that decodes to more than `PIL.Image.MAX_IMAGE_PIXELS`; `OSError`,
    such as `FileNotFoundError`, as from `open`.
    """
    pil = pillow()
    if isinstance(source, str | os.PathLike):
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            raise ValueError(
                f"an image must be a local file; got {source[:60]!r}: nothing is fetched here, so "
                "download or decode it first"
            )
        with open(source, "rb") as file:
            return _to_rgb(_read(file, os.fspath(source)))
    if isinstance(source, bytes | bytearray):
        source = io.BytesIO(source)
    if isinstance(source, pil.Image.Image) or hasattr(source, "read"):
        name = getattr(source, "filename", "") or getattr(source, "name", "") or "the image"
        return _to_rgb(_read(source, name))
    if isinstance(source, SupportsArray):
        return _to_rgb(_from_array(_numpy(source)))
    raise ValueError(
        "an image must be a path, the bytes of a file, a file opened in binary mode, a Pillow "
        f"image or an array; got {type(source).__name__}"
    )


def _read(source: Any, name: Any) -> "PIL.Image.Image":
    """The decoded image of a file, or of a Pillow image that may not be decoded yet."""
    pil = pillow()
    if isinstance(source, pil.Image.Image):
        image = source
        decoded = not getattr(image, "tile", None)
    else:
        pil.Image.init()
        with _errors_explained(name):
            image = pil.Image.open(source, formats=[x for x in FORMATS if x in pil.Image.OPEN])
        decoded = False
    if not decoded and image.format not in FORMATS:
        raise ValueError(
            f"{name} is an image in the format {image.format}, but only {', '.join(FORMATS)} are "
            "read here: convert it first"
        )
    limit, pixels = pil.Image.MAX_IMAGE_PIXELS, image.width * image.height
    with _errors_explained(name):
        if not decoded and limit is not None and pixels > limit:
            raise pil.Image.DecompressionBombError(f"{pixels:,} pixels, at most {limit:,}")
        return pil.ImageOps.exif_transpose(image)  # which decodes, too


@contextlib.contextmanager
def _errors_explained(name: Any) -> Iterator[None]:
    pil = pillow()
    advice = "See whether other programs open it, and fetch or export it again"
    try:
        yield
    except (pil.Image.DecompressionBombError, pil.Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is too large to be decoded safely ({error}): shrink it or, if you trust its "
            "origin, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except pil.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} can't be read as an image: it is empty, cut short, damaged or in none of the "
            f"formats {', '.join(FORMATS)}. {advice}"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise ValueError(
            f"{name} can't be read as an image ({error}): it is cut short or damaged. {advice}"
        ) from error


def _to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    if not (image.width and image.height):
        raise ValueError(f"an image must have pixels; got {image.width} × {image.height}")
    if image.mode == "F":
        return _from_array(np.asarray(image)).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits; or 32, in which Pillow's decoders put 16
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"grey must be within 0 and 65535; got {levels.min()} to {levels.max()}: "
                "scale the image first"
            )
        return _from_array(levels.astype(np.uint16)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # with premultiplied alpha: no direct conversion
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = pillow().Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _numpy(source: Any) -> np.ndarray:
    if hasattr(source, "detach"):  # torch's, perhaps on a device or with a gradient
        source = source.detach().cpu()
        source = source.float() if source.dtype.is_floating_point else source
    try:
        array = np.asarray(source)
    except Exception as error:  # whatever the library raises, in a traced function for example
        raise ValueError(
            f"an image must be an array with values; got {type(source).__name__}, which NumPy "
            f"can't read ({str(error).splitlines()[0]})"
        ) from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _from_array(array: np.ndarray) -> "PIL.Image.Image":
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in _CHANNELS and shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in _CHANNELS):
        raise ValueError(
            "an array must have the axes height, width and, unless grey, 1, 3 or 4 channels, first "
            f"or last; got the shape {shape}: pass the images of a batch one by one"
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint16 or np.issubdtype(array.dtype, np.floating):
        whole = 65535 if array.dtype == np.uint16 else 1
        if not np.all((array >= 0) & (array <= whole)):  # NaN isn't, either
            raise ValueError(
                f"floats must be from 0 to 1; got {array.min()} to {array.max()}: divide by the "
                "largest value, 255 as a rule, and don't normalise, which happens here"
            )
        array = np.rint(array.astype(np.float64) * (255 / whole)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array must hold uint8, uint16 or floats from 0 to 1; got {array.dtype}: for "
            "values from 0 to 255, cast it to uint8"
        )
    return pillow().Image.fromarray(np.ascontiguousarray(array))


def pillow() -> Any:
    """The package `PIL`, with what is used of it."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(
            "Reading images needs the `pillow` package: pip install 'llama4_eqx[images]'"
        ) from error
    return PIL
