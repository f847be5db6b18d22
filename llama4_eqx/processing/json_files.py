"""Reading the JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A UTF-8 file. Errors: `ValueError` for other encodings; `OSError` as from `open`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): the file is damaged or of another "
            "kind; fetch it again"
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: `ValueError` that names the file; `OSError`."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): the file is damaged, cut short or a Git LFS "
            "pointer; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return value
