"""Text to token ids and back, for any byte-level BPE.

A token is a string of bytes, not of characters, so one character may span several tokens.
"""

import abc
import codecs
import functools
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex, final

from llama4_eqx.processing.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT, EOM, EOT, PAD
from llama4_eqx.processing.special_tokens import IMAGE_END as IMAGE_END
from llama4_eqx.processing.special_tokens import IMAGE_START as IMAGE_START
from llama4_eqx.processing.special_tokens import PATCH as PATCH

# One row of integers, or a single one: Python's, NumPy's, JAX's or torch's.
TokenIds = Iterable[Any] | SupportsIndex


class Tokenizer(abc.ABC):
    """A byte-level vocabulary with special tokens."""

    def __init__(self, vocabulary: Mapping[int, bytes], specials: Mapping[str, int]):
        """`vocabulary` maps every id to its bytes, special tokens included; ids may have gaps."""
        self._vocabulary = dict(vocabulary)
        self._specials = dict(specials)
        self._special_ids = frozenset(specials.values())

    @abc.abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are ordinary characters."""

    def _encode_with_specials(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are those tokens."""
        ids = []
        # re.split with one group: text at even indices, separators at odd ones.
        for index, part in enumerate(self._special_names.split(text)):
            ids += [self._specials[part]] if index % 2 else self._encode_ordinary(part)
        return ids

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        # The longest first, should one name begin another.
        names = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. A model may have more embeddings than that, never fewer."""
        return max(self._vocabulary, default=-1) + 1

    @property
    def bos_id(self) -> int:
        """`<|begin_of_text|>`, which begins every document and every conversation."""
        return self.token_id(BEGIN_OF_TEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation: end of document, of a message to a tool, of a turn."""
        return tuple(self.token_id(name) for name in (END_OF_TEXT, EOM, EOT))

    @property
    def pad_id(self) -> int:
        """The token that pads short rows of a batch."""
        return self.token_id(PAD)

    def token_id(self, special_name: str) -> int:
        """The id of a special token, such as `"<|eot|>"`."""
        if special_name not in self._specials:
            raise ValueError(
                f"{special_name!r} is none of the {len(self._specials)} special tokens of this "
                f"tokenizer ({', '.join(list(self._specials)[:8])}, …): check the spelling, and "
                "that the tokenizer belongs to the model"
            )
        return self._specials[special_name]

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """The ids of `text`; `bos` prepends `<|begin_of_text|>`, `eos` appends `<|end_of_text|>`.

        `<|eot|>` and the like in `text` are ordinary characters unless `special` is set: otherwise
        whoever wrote the text could end their turn and continue as the system. Set it only for
        text that you wrote yourself.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"encode takes one text, a str; got {type(text).__name__}: encode several texts "
                "one by one"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half a surrogate pair at position {error.start}, which is not a "
                "character: decode its source with errors='replace'"
            ) from error
        ids = [self.bos_id] if bos else []
        ids += self._encode_with_specials(text) if special else self._encode_ordinary(text)
        return [*ids, self.token_id(END_OF_TEXT)] if eos else ids

    def decode(self, ids: TokenIds, *, skip_special: bool = True) -> str:
        """The text of one row of ids, or of one id; invalid UTF-8 becomes U+FFFD.

        Ids outside the vocabulary, negative ones among them, decode to nothing: a model may have
        more embeddings than its tokenizer has tokens, and padded labels are often -100.
        """
        return self._bytes(ids, skip_special).decode(errors="replace")

    def stream(self, *, skip_special: bool = True) -> "TokenStream":
        """A decoder for ids that arrive one at a time."""
        return TokenStream(self, skip_special=skip_special)

    def _bytes(self, ids: TokenIds, skip_special: bool) -> bytes:
        tokens = integers(ids)
        if skip_special:
            tokens = [token for token in tokens if token not in self._special_ids]
        return b"".join(self._vocabulary.get(token, b"") for token in tokens)


def integers(ids: TokenIds) -> list[int]:
    """Token ids of any library as Python integers."""
    # Device arrays are copied once, not element by element; their scalars are not hashable.
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return list(map(operator.index, ids if isinstance(ids, Iterable) else [ids]))
    except TypeError as error:
        raise ValueError(
            f"token ids must be one row of integers ({error}): decode the rows of a batch one by "
            "one, and cast floating-point ids to an integer type"
        ) from error


@final
class TokenStream:
    """Decodes ids one at a time, in constant time each, and never emits half a character.

    The results of all `push` calls and of the final `flush()` add up to `Tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: SupportsIndex) -> str:
        """The characters that `token` completes: none while a character is incomplete."""
        return self._utf8.decode(self._tokenizer._bytes(token, self._skip_special))

    def flush(self) -> str:
        """U+FFFD if a character is incomplete, else nothing; the stream can be used again."""
        return self._utf8.decode(b"", final=True)
