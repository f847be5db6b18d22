"""The image settings of a checkpoint, found as in `transformers`, or refused."""

import contextlib
import json
import tempfile
from pathlib import Path
from unittest import mock

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_base import ImageProcessingMixin

from llama4_eqx.processing import ImageProcessor
from tests.processing.pictures import picture


def unchecked_annotations():
    return mock.patch.object(jaxtyping.config, "jaxtyping_disable", True)


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
        ({"image_mean": 10**400}, "mean must be"),
        ({"image_std": 10**39}, "std must be"),
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
