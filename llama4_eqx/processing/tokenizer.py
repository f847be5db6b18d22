"""Text to token ids and back: one `Tokenizer` over the two kinds of file that a checkpoint ships.

`tokenizer.json` is Hugging Face's; `tokenizer.model` is Meta's, a line of base64 bytes and rank for
each token. Both hold a byte-level BPE: a token is a string of bytes, not of characters, so one
character may be spread over several tokens.
"""

import abc
import base64
import codecs
import functools
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, final

if TYPE_CHECKING:
    import tokenizers

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOM = "<|eom|>"
EOT = "<|eot|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
PAD = "<|finetune_right_pad|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X_SEPARATOR = "<|tile_x_separator|>"
TILE_Y_SEPARATOR = "<|tile_y_separator|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# How Llama 4 cuts text before BPE; no token crosses a cut. It is OpenAI's o200k pattern.
SPLIT_PATTERN = "|".join(
    (
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # all but the last space, which goes with the next word
        r"\s+",
    )
)

# `tokenizer.model` doesn't list its 2048 special tokens: they follow the last rank. Offsets of the
# named ones (llama-models 0.3.0, `llama4/tokenizer.py`) …
_NAMED = (
    (0, "begin_of_text end_of_text fim_prefix fim_middle fim_suffix"),
    (5, "header_start header_end eom eot step"),
    (16, "python_start python_end finetune_right_pad"),
    (80, "image_start image_end"),
    (84, "tile_x_separator tile_y_separator"),
    (90, "image"),
    (92, "patch"),
    (1142, "reasoning_thinking_start reasoning_thinking_end"),
)
# … and of the runs of reserved ones: first offset, length, prefix, number of the first. Meta's
# numbers skip 6 and 7 in `text_post_train`; those of Hugging Face's converter don't.
_RESERVED = (
    (10, 6, "text_post_train_", 0),
    (19, 61, "text_post_train_", 8),
    (82, 2, "vision_", 0),
    (86, 4, "vision_", 2),
    (91, 1, "vision_", 6),
    (93, 1041, "vision_", 7),
    (1134, 8, "reasoning_", 0),
    (1144, 904, "", 0),
)


def llama4_specials(first: int) -> dict[str, int]:
    """The special tokens that follow `first` ranks (200 000 in the releases), with their ids."""
    names = {offset + i: name for offset, run in _NAMED for i, name in enumerate(run.split())}
    for offset, length, prefix, number in _RESERVED:
        for i in range(length):
            names[offset + i] = f"{prefix}reserved_special_token_{number + i}"
    return {f"<|{names[offset]}|>": first + offset for offset in sorted(names)}


class Tokenizer(abc.ABC):
    """A byte-level vocabulary with special tokens: text to ids, ids to text, also one at a time."""

    def __init__(self, vocabulary: Mapping[int, bytes], specials: Mapping[str, int]):
        """`vocabulary` holds the bytes of every token, special ones too; ids may have gaps."""
        self._vocabulary = dict(vocabulary)
        self._specials = dict(specials)
        self._special_ids = frozenset(specials.values())

    @abc.abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens mean nothing."""

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        # The longest first, should one name begin another.
        names = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. The model may have more rows than that, never fewer."""
        return max(self._vocabulary) + 1

    @property
    def bos_id(self) -> int:
        """`<|begin_of_text|>`, which begins every document and every conversation."""
        return self.token_id(BEGIN_OF_TEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation: the ends of a document, of a message to a tool, of a turn."""
        return tuple(self.token_id(name) for name in (END_OF_TEXT, EOM, EOT))

    @property
    def pad_id(self) -> int:
        """What fills the short rows of a batch, for masks to hide."""
        return self.token_id(PAD)

    def token_id(self, special_name: str) -> int:
        """The id of a special token, such as `"<|eot|>"`."""
        if special_name not in self._specials:
            raise ValueError(
                f"{special_name!r} is none of the {len(self._specials)} special tokens here "
                f"({', '.join(list(self._specials)[:8])}, …): check its spelling, and that the "
                "tokenizer is the model's own"
            )
        return self._specials[special_name]

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """The ids of `text`; `bos` puts `<|begin_of_text|>` before, `eos` `<|end_of_text|>` after.

        `<|eot|>` and the like in `text` are ordinary characters unless `special`: otherwise whoever
        wrote the text could end their turn and go on as the system. Ask for `special` only with
        text that you wrote yourself.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half a surrogate pair at position {error.start}, which is no "
                "character: decode its source with errors='replace'"
            ) from error
        ids = [self.bos_id] if bos else []
        # re.split with one group: the text is at the even places, what it was split at, at the odd.
        for place, part in enumerate(self._special_names.split(text) if special else [text]):
            ids += [self._specials[part]] if place % 2 else self._encode_ordinary(part)
        return [*ids, self.token_id(END_OF_TEXT)] if eos else ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """The text of `ids`; what is not UTF-8, such as half a character, becomes U+FFFD."""
        return self._bytes(ids, skip_special).decode(errors="replace")

    def stream(self, *, skip_special: bool = True) -> "TokenStream":
        """A decoder for ids that come one at a time."""
        return TokenStream(self, skip_special=skip_special)

    def _bytes(self, ids: Iterable[SupportsIndex], skip_special: bool) -> bytes:
        skipped = self._special_ids if skip_special else ()
        tokens = map(operator.index, ids)  # JAX's integers are no keys of a dict
        try:
            return b"".join(self._vocabulary[token] for token in tokens if token not in skipped)
        except KeyError as error:
            raise ValueError(
                f"token id {error} is not in the vocabulary, whose largest id is "
                f"{self.vocab_size - 1}: check that the tokenizer is the model's own"
            ) from error


@final
class TokenStream:
    """Decodes ids one at a time, at a constant cost, and never gives out half a character.

    All that `push` returned, followed by `flush()`, is what `Tokenizer.decode` makes of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: SupportsIndex) -> str:
        """The characters that `token` completes: none, while one is still unfinished."""
        return self._utf8.decode(self._tokenizer._bytes([token], self._skip_special))

    def flush(self) -> str:
        """U+FFFD for an unfinished character, else nothing; after it the stream is as new."""
        return self._utf8.decode(b"", final=True)


# tiktoken's pattern backtracks and panics on a million spaces on end, in older releases on letters
# too. So a longer run than this, of white space or of anything else, is encoded in pieces of this
# length: Meta's number, so that the ids are Meta's.
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_RUN + 1},}}|(?<!\S)\S{{{_MAX_RUN + 1},}}")


def _bounded(text: str) -> Iterator[str]:
    """`text` in pieces without longer runs, cut only within such a run."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


@final
class TiktokenTokenizer(Tokenizer):
    """Meta's `tokenizer.model`, to which Llama 4's pattern and special tokens are added."""

    def __init__(self, path: Path):
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                "Reading tokenizer.model needs the `tiktoken` package: "
                "pip install 'llama4_eqx[text]'"
            ) from error
        ranks = _read_ranks(path)
        specials = llama4_specials(len(ranks))
        vocabulary = {rank: token for token, rank in ranks.items()}
        super().__init__(vocabulary | {i: name.encode() for name, i in specials.items()}, specials)
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        encode = self._encoding.encode_ordinary
        return [token for piece in _bounded(text) for token in encode(piece)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    # tiktoken's own reader takes URLs, keeps copies in a cache folder and names no line.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if int(rank) != len(ranks) or token in ranks:
                raise ValueError("ranks count up from 0, and no token comes twice")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: must be base64 bytes and the rank {len(ranks)}, is "
                f"{line[:40]!r}. The file is damaged, a Git LFS pointer or not Llama 4's: "
                "fetch it again"
            ) from error
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} has {len(ranks)} tokens, but none for the single bytes {missing[:3]}… "
            "and so none for some texts. The file is cut short or not Llama 4's: fetch it again"
        )
    return ranks


# `tokenizer.json` spells bytes with visible characters (GPT-2's `bytes_to_unicode`): a byte with
# its Latin-1 character if that is visible, the other bytes with the characters from 256 on.
_INVISIBLE = [*range(33), *range(127, 161), 173]
_BYTE_OF = {256 + i: byte for i, byte in enumerate(_INVISIBLE)}


@final
class JsonTokenizer(Tokenizer):
    """Hugging Face's `tokenizer.json`, which holds all there is: cuts, merges, special tokens."""

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
        library, text = _tokenizers(), path.read_text(encoding="utf-8")
        try:
            backend = library.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises nothing more particular
            raise ValueError(
                f"{path} can't be read as a tokenizer.json ({error}). The file is damaged or a "
                "Git LFS pointer: fetch it again"
            ) from error
        return cls(backend)

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

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "Reading tokenizer.json needs the `tokenizers` package: pip install 'llama4_eqx[text]'"
        ) from error
    return tokenizers


def byte_tokenizer() -> JsonTokenizer:
    """For models trained from nothing: 256 bytes, whose ids they are, then the special tokens of
    documents and turns, of tool calls and of images."""
    library = _tokenizers()
    ids = {chr(byte): byte for byte in range(256) if byte not in _INVISIBLE}
    ids |= {chr(character): byte for character, byte in _BYTE_OF.items()}
    backend = library.Tokenizer(library.models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = library.decoders.ByteLevel()
    names = [BEGIN_OF_TEXT, END_OF_TEXT, HEADER_START, HEADER_END, EOM, EOT, PAD]
    names += [PYTHON_START, PYTHON_END]
    names += [IMAGE_START, IMAGE_END, TILE_X_SEPARATOR, TILE_Y_SEPARATOR, IMAGE, PATCH]
    backend.add_special_tokens(names)
    return JsonTokenizer(backend)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a checkpoint's folder (`tokenizer.json`, else `tokenizer.model`) or file.

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
    if file.suffix == ".json":
        return JsonTokenizer.read(file)
    if file.suffix == ".model":
        return TiktokenTokenizer(file)
    raise ValueError(
        f"{file} is named neither .json, as Hugging Face's tokenizers are, nor .model, as Meta's: "
        "give one of those, or the folder that it is in"
    )
