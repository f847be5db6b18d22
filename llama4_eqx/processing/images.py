"""Images to the tiles that the vision model sees, and to the tokens that represent them.

An image is resized, keeping its aspect ratio, into the top left corner of a grid of square tiles;
the rest is black. If there are several tiles, the whole image follows, squeezed into one more.

This is Meta's reference (llama-models 0.3.0, `llama4/preprocess.py`) value for value: Pillow's
antialiased bilinear resize of 8-bit pixels, normalised in float32. `transformers` 5.24 resizes with
torchvision and normalises in bfloat16, so its values differ by up to 1.5 of 255 levels (by far more
if an image is one pixel wide); and as it computes sizes in float32, a few shapes (one of 6,000 at
random) differ by a row or column.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
from jaxtyping import Float

from llama4_eqx.processing.image_config import read_image_settings
from llama4_eqx.processing.image_files import ImageSource, load_image, pillow
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


_MOST_TILES = 10_000
_LARGEST = float(np.finfo(np.float32).max)


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
    mean: float | tuple[float, float, float] = 0.5
    std: float | tuple[float, float, float] = 0.5

    def __post_init__(self):
        for name in ("tile_size", "patch_size", "max_tiles"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.max_tiles > _MOST_TILES:  # all grids of so many are compared
            raise ValueError(f"max_tiles must be at most {_MOST_TILES:,}; got {self.max_tiles}")
        if not _is_number(self.pixel_shuffle_ratio) or not 0 < self.pixel_shuffle_ratio <= 1:
            raise ValueError(
                "pixel_shuffle_ratio must be a number above 0 and at most 1; got "
                f"{self.pixel_shuffle_ratio!r}"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            channels = value if isinstance(value, tuple) else (value,)
            if len(channels) not in (1, 3) or not all(map(_is_number, channels)):
                raise ValueError(
                    f"{name} must be a finite number, or one for each of 3 channels; got {value!r}"
                )
            if name == "std" and min(channels) <= 0:
                raise ValueError(f"std must be above 0; got {value!r}")
        side = self.tile_size / self.patch_size * self.pixel_shuffle_ratio
        if side < 1 or side % 1 or self.tile_size % self.patch_size:
            raise ValueError(
                "a tile's side must be a whole number of patches, and of tokens: got tile_size "
                f"{self.tile_size}, patch_size {self.patch_size}, pixel_shuffle_ratio "
                f"{self.pixel_shuffle_ratio}"
            )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "ImageProcessor":
        """From the preprocessor_config.json or processor_config.json of a checkpoint.

        Errors: `FileNotFoundError` if there is neither; `ValueError` for values that make no sense
        or that ask for what Llama 4's images don't have, such as another interpolation.
        """
        settings, source = read_image_settings(Path(folder))
        try:
            return cls(**settings)
        except ValueError as error:
            raise ValueError(
                f"{source}: {error} (there named size, max_patches, image_mean and image_std)"
            ) from error

    @property
    def tokens_per_tile(self) -> int:
        """The number of `<|patch|>` tokens that stand for one tile."""
        return int(self.tile_size // self.patch_size * self.pixel_shuffle_ratio) ** 2

    def fit(self, height: int, width: int) -> Fit:
        """The grid for an image of this size: the one that enlarges it least; if none is large
        enough, the one that shrinks it least; of several, the one with the fewest tiles."""
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
        pil, tile = pillow(), self.tile_size
        bilinear = pil.Image.Resampling.BILINEAR
        rows, columns, height, width = self.fit(image.height, image.width)
        grid = pil.Image.new("RGB", (columns * tile, rows * tile))
        grid.paste(image.resize((width, height), bilinear))
        pixels = np.asarray(grid).reshape(rows, tile, columns, tile, 3)
        pixels = pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
        if len(pixels) > 1:
            whole = np.asarray(image.resize((tile, tile), bilinear)).transpose(2, 0, 1)
            pixels = np.concatenate([pixels, whole[None]])
        values = (pixels.astype(np.float32) / 255 - _channels(self.mean)) / _channels(self.std)
        return TiledImage(values, rows, columns)

    def layout(self, rows: int, columns: int) -> list[str]:
        """The names of the special tokens that represent an image of that grid in a prompt."""
        tile = [PATCH] * self.tokens_per_tile
        row = [*[*tile, TILE_X_SEPARATOR] * (columns - 1), *tile, TILE_Y_SEPARATOR]
        grid = row * rows if rows * columns > 1 else []
        return [IMAGE_START, *grid, IMAGE, *tile, IMAGE_END]


def _is_number(value: object) -> bool:
    """Whether float32 can hold it."""
    value = value.item() if isinstance(value, np.number) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST


def _channels(
    value: float | tuple[float, float, float],
) -> Float[np.ndarray, "channels height width"]:
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


def draw_tiles(source: ImageSource, processor: ImageProcessor | None = None) -> "PIL.Image.Image":
    """A picture of what the model sees: the grid of tiles with the patches drawn in, and the whole
    image to its right. `processor` defaults to that of the releases."""
    processor = processor or ImageProcessor()
    values, rows, columns = processor(source)
    pixels = np.rint((values * _channels(processor.std) + _channels(processor.mean)) * 255).astype(
        np.uint8
    )
    pixels = pixels.transpose(0, 2, 3, 1)
    pixels[:, :: processor.patch_size] //= 2
    pixels[:, :, :: processor.patch_size] //= 2
    pil, gap = pillow(), processor.patch_size
    step = processor.tile_size + gap
    shown_columns = columns + (len(pixels) > 1)
    sheet = pil.Image.new("RGB", (shown_columns * step + gap, rows * step + gap), "white")
    for place, tile in enumerate(pixels):
        row, column = divmod(place, columns) if place < rows * columns else (0, columns)
        sheet.paste(pil.Image.fromarray(tile), (column * step + gap, row * step + gap))
    return sheet
