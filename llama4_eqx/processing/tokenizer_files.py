"""Opens whichever tokenizer file a checkpoint comes with."""

import os
from pathlib import Path

from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.processing.tokenizer_json import JsonTokenizer
from llama4_eqx.processing.tokenizer_model import TiktokenTokenizer


def load_tokenizer(path: str | os.PathLike[str], *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint's folder (`tokenizer.json`, else `tokenizer.model`) or file.

    `vocab_size`, special tokens included, is checked if given. A `tokenizer.model` other than the
    released one needs it, here or in the config.json beside the file: see `TiktokenTokenizer`.

    Nothing is fetched and nothing unpickled. Errors: `FileNotFoundError`; `ValueError` for a file
    that isn't what its name says; `ImportError` where the package that reads it is missing.
    """
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: it is neither a file nor a folder with {' or '.join(names)}. "
            "Copy one of the two from where the checkpoint was published"
        )
    if file.suffix == ".model":
        return TiktokenTokenizer(file, vocab_size=vocab_size)
    if file.suffix != ".json":
        raise ValueError(
            f"{file} is named neither .json, like Hugging Face's tokenizers, nor .model, like "
            "Meta's: give one of those, or the folder that holds it"
        )
    tokenizer = JsonTokenizer.read(file)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{file} has a vocabulary of {tokenizer.vocab_size:,}, but vocab_size is "
            f"{vocab_size}: the file is another model's, or vocab_size counts padding"
        )
    return tokenizer
