"""Images to the tiles that the vision model sees, and to the tokens that stand for them.

An image is resized, in its own proportions, into the top left corner of a grid of square tiles, and
the rest is black. If there are several tiles, the whole image follows, squeezed into one more.

This is Meta's reference (llama-models 0.3.0, `llama4/preprocess.py`) value for value: Pillow's
antialiased bilinear resize of 8-bit pixels, normalised in float32. `transformers` 5.24 resizes with
torchvision and normalises in bfloat16, so that its values are up to 1.5 of 255 levels away (far
more where an image is a single pixel wide); and as it computes sizes in float32, a few shapes (one
of 6,000 at random) come out a row or column off.
"""

import dataclasses
import math
import os
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Union, final

import numpy as np
from jaxtyping import Float

from llama4_eqx.processing.special_tokens import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PATCH,
    TILE_X_SEPARATOR,
    TILE_Y_SEPARATOR,
)

if TYPE_CHECKING:
    import PIL.Image

# A file (its path, or opened in binary mode), a Pillow image, or an array: "height width" for grey,
# else "height width channels"; 8- or 16-bit unsigned integers, or fractions from 0 to 1.
ImageSource = Union[str, os.PathLike[str], BinaryIO, np.ndarray, "PIL.Image.Image"]


class Fit(NamedTuple):
    """The grid of tiles chosen for an image, and the size in pixels that the image has in it."""

    rows: int
    columns: int
    height: int
    width: int


class TiledImage(NamedTuple):
    """The tiles of a grid, row by row; if there are several, then the whole image as one more."""

    pixel_values: Float[np.ndarray, "tiles channels height width"]
    rows: int
    columns: int


@final
@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How images become tiles and tokens; the defaults are those of the releases."""

    tile_size: int = 336
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    max_tiles: int = 16
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self):
        side = self.tile_size / self.patch_size * self.pixel_shuffle_ratio
        if side < 1 or side % 1 or self.tile_size % self.patch_size:
            raise ValueError(
                "a tile must have a whole number of patches a side, and of tokens: got tile_size "
                f"{self.tile_size}, patch_size {self.patch_size}, pixel_shuffle_ratio "
                f"{self.pixel_shuffle_ratio}"
            )
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1; got {self.max_tiles}")

    @property
    def tokens_per_tile(self) -> int:
        """The number of `<|patch|>` tokens that stand for one tile."""
        return int(self.tile_size // self.patch_size * self.pixel_shuffle_ratio) ** 2

    def fit(self, height: int, width: int) -> Fit:
        """The grid for an image of this size: the one that enlarges it least; if it is too large
        for all, the one that shrinks it least; of several that do, the smallest."""
        tile = self.tile_size
        grids = [
            (rows, columns)
            for rows in range(1, self.max_tiles + 1)
            for columns in range(1, self.max_tiles // rows + 1)
        ]

        def cost(grid: tuple[int, int]) -> tuple[bool, float, int]:
            rows, columns = grid
            scale = min(rows * tile / height, columns * tile / width)
            return scale < 1, abs(scale - 1), rows * columns

        rows, columns = min(grids, key=cost)
        # An image is enlarged until one side fills a tile, never to fill a larger grid.
        most_height = min(max(height, tile), rows * tile)
        most_width = min(max(width, tile), columns * tile)
        by_height, by_width = most_height / height, most_width / width
        if by_width < by_height:
            return Fit(rows, columns, max(math.floor(height * by_width), 1), most_width)
        return Fit(rows, columns, most_height, max(math.floor(width * by_height), 1))

    def __call__(self, source: ImageSource) -> TiledImage:
        """The normalised tiles of an image. Errors: as `load_image`."""
        image = load_image(source)
        pil, tile = _pillow(), self.tile_size
        bilinear = pil.Image.Resampling.BILINEAR
        rows, columns, height, width = self.fit(image.height, image.width)
        grid = pil.Image.new("RGB", (columns * tile, rows * tile))
        grid.paste(image.resize((width, height), bilinear))
        pixels = np.asarray(grid).reshape(rows, tile, columns, tile, 3)
        pixels = pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
        if len(pixels) > 1:
            whole = np.asarray(image.resize((tile, tile), bilinear)).transpose(2, 0, 1)
            pixels = np.concatenate([pixels, whole[None]])
        return TiledImage((pixels.astype(np.float32) / 255 - self.mean) / self.std, rows, columns)

    def layout(self, rows: int, columns: int) -> list[str]:
        """The special tokens that stand for an image of so many tiles in a prompt, by name."""
        tile = [PATCH] * self.tokens_per_tile
        row = [*[*tile, TILE_X_SEPARATOR] * (columns - 1), *tile, TILE_Y_SEPARATOR]
        grid = row * rows if rows * columns > 1 else []
        return [IMAGE_START, *grid, IMAGE, *tile, IMAGE_END]


def load_image(source: ImageSource) -> "PIL.Image.Image":
    """The image in 8-bit RGB, turned upright where its EXIF data say so.

    What is transparent shows white, as in `transformers`, and for RGBA in Meta's code. 16-bit grey
    is scaled: Pillow's `convert`, and with it both, would clip it. The first of frames is taken.

    Errors: `ValueError` for a file that can't be read, one so large that Pillow takes it for an
    attack, and an array of another kind; `OSError`, such as `FileNotFoundError`, as from `open`.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return load_image(file)
    pil = _pillow()
    name = getattr(source, "filename", "") or getattr(source, "name", "") or "the image"
    try:
        image = source if isinstance(source, pil.Image.Image) else pil.Image.open(source)
        image = pil.ImageOps.exif_transpose(image)  # which reads the pixels, too
    except (pil.Image.DecompressionBombError, pil.Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is too large to be opened safely ({error}): shrink it or, if you know where "
            "it is from, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise ValueError(
            f"{name} can't be read as an image ({error}): it is empty, cut short, damaged or of "
            "another kind. See whether other programs open it, and fetch or export it again"
        ) from error
    return _to_rgb(image)


def _to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    if not (image.width and image.height):
        raise ValueError(f"an image must have pixels; got {image.width} × {image.height}")
    if image.mode == "F":
        return _from_array(np.asarray(image)).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits; or 32, in which Pillow's readers put 16
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"grey must be within 0 and 65535; got {levels.min()} to {levels.max()}: "
                "scale the image first"
            )
        return _from_array(levels.astype(np.uint16)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = _pillow().Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_array(array: np.ndarray) -> "PIL.Image.Image":
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(
            "an array must have the axes height, width and, unless grey, 1, 3 or 4 channels; got "
            f"the shape {array.shape}: move channels last with np.moveaxis(image, 0, -1)"
        )
    if array.dtype == np.uint16 or np.issubdtype(array.dtype, np.floating):
        whole = 65535 if array.dtype == np.uint16 else 1
        if not np.all((array >= 0) & (array <= whole)):  # NaN isn't, either
            raise ValueError(
                f"fractions must be from 0 to 1; got {array.min()} to {array.max()}: "
                "divide by the largest value, 255 as a rule"
            )
        array = np.rint(array.astype(np.float64) * (255 / whole)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array must hold uint8, uint16 or fractions in a float type; got {array.dtype}: "
            "for values from 0 to 255, image.astype(np.uint8)"
        )
    return _pillow().Image.fromarray(array)


def draw_tiles(source: ImageSource, processor: ImageProcessor | None = None) -> "PIL.Image.Image":
    """A picture of what the model sees: the grid of tiles, the whole image to its right, and in
    each tile the patches. `processor` is the releases' unless given."""
    processor = processor or ImageProcessor()
    values, rows, columns = processor(source)
    pixels = np.rint((values * processor.std + processor.mean) * 255).astype(np.uint8)
    pixels = pixels.transpose(0, 2, 3, 1)
    pixels[:, :: processor.patch_size] //= 2
    pixels[:, :, :: processor.patch_size] //= 2
    pil, gap = _pillow(), processor.patch_size
    step = processor.tile_size + gap
    shown_columns = columns + (len(pixels) > 1)
    sheet = pil.Image.new("RGB", (shown_columns * step + gap, rows * step + gap), "white")
    for place, tile in enumerate(pixels):
        row, column = divmod(place, columns) if place < rows * columns else (0, columns)
        sheet.paste(pil.Image.fromarray(tile), (column * step + gap, row * step + gap))
    return sheet


def _pillow():
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(
            "Reading images needs the `pillow` package: pip install 'llama4_eqx[images]'"
        ) from error
    return PIL
