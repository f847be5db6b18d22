"""Reading a `config.json`, and how its content is shown in errors."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Source = Mapping[str, Any] | str | os.PathLike[str]

_MAX_BYTES = 16 * 2**20
_MAX_DIGITS = 400


def read_config(source: Source) -> Mapping[str, Any]:
    """The content of a `config.json`: a dict, the file, or the folder that holds it."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"A config comes as a dict, a file or a folder, not as {shown(source)}.")
    path = _file(source)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, but must be a file: fetch it again.")
    if not os.path.isfile(path):
        name = str(path)[:300]
        raise FileNotFoundError(f"There is no {name}: give a config.json or the folder with it.")
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, but a config.json has at most {_MAX_BYTES}: "
            "fetch the file again."
        )
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte-order mark; save it without one")
        if not text.strip():
            raise ValueError("it is empty")
        raw = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: fetch the file again.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: fetch the file again.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, but holds {shown(raw)}.")
    return raw


@contextmanager
def reading(source: Source) -> Iterator[Mapping[str, Any]]:
    """The content of `source`, inside a context in which a `ValueError` gets the file's name."""
    raw = read_config(source)
    try:
        yield raw
    except ValueError as error:
        if isinstance(source, Mapping):
            raise
        raise ValueError(f"{_file(source)} can't be read: {error}") from None


def shown(value: Any) -> str:
    """A value for an error message: as JSON where it can be, and short."""
    text = ""
    try:
        for chunk in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
            text += chunk
            if len(text) > 80:
                return f"{text[:80]}…"
    except (TypeError, ValueError, RecursionError):
        return f"{text[:80]}… (a {type(value).__name__})"
    return text


def listed(items: Sequence[str], separator: str = ", ", *, limit: int = 10) -> str:
    """Items for an error message, of which at most `limit` are named."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def field_names(fields: Iterable[Any]) -> str:
    """The names of fields for an error message, sorted; odd ones in quotes."""
    plain = [
        name if isinstance(name, str) and name.isidentifier() else shown(name) for name in fields
    ]
    return listed(sorted(name[:60] for name in plain)) or "none"


def _file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    return path / "config.json" if os.path.isdir(path) else path


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)
