"""Meta's `tokenizer.model`: one line for each token, its bytes in base64 and its rank."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from llama4_eqx.processing.json_files import read_json_object
from llama4_eqx.processing.special_tokens import NUM_SPECIAL_TOKENS, llama4_specials
from llama4_eqx.processing.tokenizer import Tokenizer

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# How Llama 4 splits text before BPE; no token crosses a split. It is OpenAI's o200k pattern.
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

# The released file, which comes with every Llama 4 model.
RELEASED_RANKS = 200_000
_RELEASED_SHA256 = "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"

# tiktoken's pattern backtracks and panics on a million consecutive spaces, in older releases on
# letters too. So a longer run than this, of white space or of anything else, is encoded in pieces
# of this length: Meta's number, so that the ids are Meta's.
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_RUN + 1},}}|(?<!\S)\S{{{_MAX_RUN + 1},}}")


@final
class TiktokenTokenizer(Tokenizer):
    """A `tokenizer.model`, with Llama 4's split pattern and special tokens, which it lacks.

    A file that was cut short between two lines would still be readable, with every special token
    at a wrong id. So its size must be known: it is the released file, by its SHA-256; or
    `vocab_size`, which counts the special tokens, is given or stands in the config.json (Meta's
    params.json) beside it. `ranks` has the file's tokens, by their bytes.
    """

    ranks: dict[bytes, int]

    def __init__(self, path: Path, *, vocab_size: int | None = None):
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                "Reading tokenizer.model needs the `tiktoken` package: "
                "pip install 'llama4_eqx[text]'"
            ) from error
        ranks = _read_ranks(path, vocab_size)
        specials = llama4_specials(len(ranks))
        vocabulary = {rank: token for token, rank in ranks.items()}
        super().__init__(vocabulary | {i: name.encode() for name, i in specials.items()}, specials)
        self.ranks = ranks
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        encode = self._encoding.encode_ordinary
        return [token for piece in _without_long_runs(text) for token in encode(piece)]


def _without_long_runs(text: str) -> Iterator[str]:
    """`text` in pieces without runs above `_MAX_RUN`, split only within such runs."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for split in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
            yield text[start:split]
            start = split
    yield text[start:]


def _read_ranks(path: Path, vocab_size: int | None) -> dict[bytes, int]:
    # tiktoken's own reader takes URLs, keeps copies in a cache folder and names no line.
    content = path.read_bytes().replace(b"\r\n", b"\n")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if rank != b"%d" % len(ranks) or token in ranks:
                raise ValueError("ranks count up from 0, and no token occurs twice")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: must be base64 bytes and the rank {len(ranks)}; is "
                f"{line[:40]!r}. The file is damaged, a Git LFS pointer or not Llama 4's: "
                "fetch it again"
            ) from error
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} has {len(ranks)} tokens, but none for the single bytes {missing[:3]}…, so "
            "some texts can't be encoded. The file is cut short or not Llama 4's: fetch it again"
        )
    _check_size(path, len(ranks), vocab_size)
    if len(ranks) == RELEASED_RANKS and hashlib.sha256(content).hexdigest() != _RELEASED_SHA256:
        raise ValueError(
            f"{path} has {RELEASED_RANKS:,} ranks like the released vocabulary, but other content "
            f"(its SHA-256 must be {_RELEASED_SHA256}). The file is damaged: fetch it again"
        )
    return ranks


def _check_size(path: Path, ranks: int, vocab_size: int | None) -> None:
    size = ranks + NUM_SPECIAL_TOKENS
    source = "vocab_size"
    if vocab_size is None and ranks != RELEASED_RANKS:
        source, vocab_size = _stated_vocab_size(path.parent)
    if vocab_size is None and ranks != RELEASED_RANKS:
        raise ValueError(
            f"{path} has {ranks:,} ranks; Llama 4's has {RELEASED_RANKS:,}. The file is cut short: "
            "fetch it again. For a vocabulary of your own, put a config.json beside it with "
            f'"vocab_size": {size} (with the {NUM_SPECIAL_TOKENS:,} special tokens), or pass '
            f"vocab_size={size}"
        )
    if vocab_size not in (None, size):
        raise ValueError(
            f"{path} has {ranks:,} ranks, which with {NUM_SPECIAL_TOKENS:,} special tokens makes a "
            f"vocabulary of {size:,}, but {source} is {vocab_size}. The file is cut short or "
            "another model's: fetch it again, or if the model's vocabulary is padded, pass "
            f"vocab_size={size}"
        )


def _stated_vocab_size(folder: Path) -> tuple[str, Any]:
    """Where the files beside the vocabulary state its size, and that size; else None."""
    for name, inner in (("config.json", "text_config"), ("params.json", "model")):
        if (folder / name).is_file():
            config = read_json_object(folder / name)
            nested = config.get(inner)
            for values in (nested if isinstance(nested, dict) else {}, config):
                if values.get("vocab_size") is not None:
                    return f"vocab_size in {folder / name}", values["vocab_size"]
    return "vocab_size", None
