"""The image settings in a checkpoint's preprocessor_config.json and processor_config.json."""

import math
from pathlib import Path
from typing import Any

from llama4_eqx.processing.json_files import read_json_object

_PROCESSOR, _PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_BILINEAR = (2, "bilinear")
# The only value of these that is supported, and that `transformers` assumes.
_FIXED = {"do_resize": True, "do_rescale": True, "resize_to_max_canvas": False}


def read_image_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The arguments of `ImageProcessor` that the files state, and the file that most come from.

    As in `transformers`, an "image_processor" in processor_config.json comes before
    preprocessor_config.json. What neither states has the default value there, too.
    """
    processor, preprocessor = (
        read_json_object(folder / name) if (folder / name).is_file() else {}
        for name in (_PROCESSOR, _PREPROCESSOR)
    )
    if "image_processor" in processor:
        source, image = folder / _PROCESSOR, processor["image_processor"]
    elif preprocessor:
        source, image = folder / _PREPROCESSOR, preprocessor.get("image_processor", preprocessor)
    elif "size" in processor or "max_patches" in processor:
        source, image = folder / _PROCESSOR, processor
    else:
        raise FileNotFoundError(
            f"no image settings in {folder}: neither {_PREPROCESSOR} nor an image_processor in "
            f"{_PROCESSOR}. Copy one of the two from where the checkpoint was published; "
            "ImageProcessor() has the values of the releases"
        )
    if not isinstance(image, dict):
        raise ValueError(f"{source}: image_processor must be an object; got {image!r}")
    return _image_settings(image, source) | _token_settings(processor, folder), source


def _image_settings(image: dict[str, Any], source: Path) -> dict[str, Any]:
    image = {name: value for name, value in image.items() if value is not None}

    def refuse(name: str, must: str):
        raise ValueError(f"{source}: {name} must be {must}; got {image[name]!r}")

    if not str(image.get("image_processor_type", "Llama4")).startswith("Llama4"):
        refuse("image_processor_type", "Llama4ImageProcessor, or the file is another model's")
    for name, value in _FIXED.items():
        if image.get(name, value) is not value:
            refuse(name, str(value).lower())
    if image.get("resample", 2) not in _BILINEAR or isinstance(image.get("resample"), bool):
        refuse("resample", "2, which is bilinear")
    factor = image.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        refuse("rescale_factor", "1/255")
    normalised = image.get("do_normalize", True)
    if not isinstance(normalised, bool):
        refuse("do_normalize", "true or false")

    settings: dict[str, Any] = {}
    match image.get("size"):
        case None:
            pass
        case {"height": height, "width": width} if height == width:
            settings["tile_size"] = height
        case int(side):
            settings["tile_size"] = side
        case _:
            refuse("size", "an equal height and width")
    if "max_patches" in image:
        settings["max_tiles"] = image["max_patches"]
    if not normalised:
        return settings | {"mean": 0.0, "std": 1.0}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        if key in image:
            value = image[key]
            settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def _token_settings(processor: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`patch_size` and `pixel_shuffle_ratio`, for the number of tokens of a tile."""
    config = folder / "config.json"
    vision = read_json_object(config).get("vision_config") if config.is_file() else None
    settings = {}
    for name in ("patch_size", "pixel_shuffle_ratio"):
        values = [
            stated[name]
            for stated in (processor, vision)
            if isinstance(stated, dict) and stated.get(name) is not None
        ]
        if values[1:] and values[0] != values[1]:
            raise ValueError(
                f"{folder}: {name} must be the same in {_PROCESSOR} and in the vision_config of "
                f"config.json; got {values[0]!r} and {values[1]!r}"
            )
        if values:
            settings[name] = values[0]
    return settings
