"""The files beside converted weights: the tokenizer in both forms, and the settings for images."""

import json
import shutil
from pathlib import Path

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.config import Llama4Config
from llama4_eqx.processing.images import ImageProcessor
from llama4_eqx.processing.special_tokens import BEGIN_OF_TEXT, EOT, NUM_SPECIAL_TOKENS, PAD
from llama4_eqx.processing.tokenizer_conversion import as_json
from llama4_eqx.processing.tokenizer_model import TiktokenTokenizer


def number_of_ranks(path: Path) -> int | None:
    """The tokens of a tiktoken file, a line each; None for another kind of file."""
    if not path.is_file():
        return None
    lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
    ranked = all(len(line) == 2 and line[1].isdigit() for line in lines)
    return len(lines) if ranked else None


def write_companions(source: Path, target: Path, config: Llama4Config) -> None:
    """Copies `tokenizer.model` and writes it as `tokenizer.json`, and for a multimodal model writes
    `preprocessor_config.json` and `processor_config.json`, as `transformers` names them.

    Raises `CheckpointError` for a damaged vocabulary.
    """
    vocabulary = source / "tokenizer.model"
    if vocabulary.is_file():
        shutil.copy2(vocabulary, target)
    ranks = number_of_ranks(vocabulary)
    if ranks is not None:
        try:
            tokenizer = TiktokenTokenizer(vocabulary, vocab_size=ranks + NUM_SPECIAL_TOKENS)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        as_json(tokenizer).save(target)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = {"bos_token": BEGIN_OF_TEXT, "eos_token": EOT, "pad_token": PAD}
        _write_json(target / "tokenizer_config.json", kind | tokens)
    vision = config.vision_config
    if vision is None:
        return
    defaults, side = ImageProcessor(), vision.image_size
    image = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "size": {"height": side, "width": side},
        "max_patches": defaults.max_tiles,
        "resize_to_max_canvas": False,
        "image_mean": [defaults.mean] * 3,
        "image_std": [defaults.std] * 3,
    }
    _write_json(target / "preprocessor_config.json", image)
    patches = {"patch_size": vision.patch_size, "pixel_shuffle_ratio": vision.pixel_shuffle_ratio}
    _write_json(target / "processor_config.json", {"processor_class": "Llama4Processor"} | patches)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
