"""Hugging Face's `tokenizer.json`, and the byte-level tokenizer for models trained from scratch."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llama4_eqx.processing import special_tokens as names
from llama4_eqx.processing.json_files import read_text
from llama4_eqx.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# `tokenizer.json` spells bytes as visible characters (GPT-2's `bytes_to_unicode`): a byte as its
# Latin-1 character if that is visible, the other bytes as the characters from 256 on.
_INVISIBLE = [*range(33), *range(127, 161), 173]
_BYTE_OF = {256 + i: byte for i, byte in enumerate(_INVISIBLE)}
CHARACTER_OF = {byte: chr(character) for character, byte in _BYTE_OF.items()}


@final
class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, which holds everything: split pattern, merges, special tokens."""

    def __init__(self, backend: "tokenizers.Tokenizer"):
        backend.encode_special_tokens = True  # that is, as ordinary text
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        vocabulary = {token: entry.content.encode() for token, entry in added.items()}
        for spelling, token in backend.get_vocab(with_added_tokens=False).items():
            try:
                vocabulary.setdefault(token, spelling.translate(_BYTE_OF).encode("latin-1"))
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the vocabulary is not byte-level, as Llama 4's is: token {token} is "
                    f"{spelling!r}. Use the tokenizer.json that came with the model"
                ) from error
        super().__init__(vocabulary, {x.content: token for token, x in added.items() if x.special})
        self._backend = backend

    @classmethod
    def read(cls, path: Path) -> "JsonTokenizer":
        """From a file of this kind."""
        library, text = tokenizers_library(), read_text(path)
        try:
            backend = library.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise ValueError(
                f"{path} can't be read as a tokenizer.json ({error}). The file is damaged or a "
                "Git LFS pointer: fetch it again"
            ) from error
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` to `folder`, whole or not at all; `transformers` reads it too."""
        target = Path(folder) / "tokenizer.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            partial.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @functools.cached_property
    def _backend_with_specials(self) -> "tokenizers.Tokenizer":
        # A second one, as a flag that is switched for each call is not safe among threads.
        return tokenizers_library().Tokenizer.from_str(self._backend.to_str())

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_with_specials(self, text: str) -> list[int]:
        # By the library, as special tokens may be declared to absorb the white space around them,
        # or to count only as whole words.
        return self._backend_with_specials.encode(text, add_special_tokens=False).ids


def tokenizers_library() -> Any:
    """The package `tokenizers`."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "Reading tokenizer.json needs the `tokenizers` package: pip install 'llama4_eqx[text]'"
        ) from error
    return tokenizers


def byte_tokenizer() -> JsonTokenizer:
    """For models trained from scratch: the 256 bytes as ids 0 to 255, then the special tokens of
    documents and turns, of tool calls and of images."""
    library = tokenizers_library()
    ids = {chr(byte): byte for byte in range(256) if byte not in _INVISIBLE}
    ids |= {character: byte for byte, character in CHARACTER_OF.items()}
    backend = library.Tokenizer(library.models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens(
        [
            *(names.BEGIN_OF_TEXT, names.END_OF_TEXT, names.HEADER_START, names.HEADER_END),
            *(names.EOM, names.EOT, names.PAD, names.PYTHON_START, names.PYTHON_END),
            *(names.IMAGE_START, names.IMAGE_END),
            *(names.TILE_X_SEPARATOR, names.TILE_Y_SEPARATOR, names.IMAGE, names.PATCH),
        ]
    )
    return JsonTokenizer(backend)
