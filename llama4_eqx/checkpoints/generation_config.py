"""Reading `generation_config.json`: stop tokens and sampling settings of a checkpoint."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.generation import Greedy, Sample, Sampler
from llama4_eqx.text_config import TextConfig

FILE = "generation_config.json"
_MAX_BYTES = 2**20
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class GenerationConfig:
    """The fields of `generation_config.json` that generation here can use; None if not stated.

    Generation stops after any of `stop_ids`, the file's `eos_token_id`. `do_sample=False` means
    greedy decoding, whatever the other settings are.
    """

    stop_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def sampler(self) -> Sampler:
        """The sampler that the file asks for: `transformers`' default is greedy decoding."""
        if not self.do_sample or self.temperature == 0:
            return Greedy()
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sample(temperature, top_k=self.top_k or None, top_p=self.top_p)


def load_generation_config(folder: str | os.PathLike[str]) -> GenerationConfig | None:
    """Reads a folder's `generation_config.json`; None if there is none.

    Raises `CheckpointError` for a file that isn't JSON or holds a value of a wrong type.
    """
    raw = _read(Path(folder))
    if raw is None:
        return None
    path = Path(folder) / FILE

    def number(name: str, high: float, meaning: str) -> float | None:
        value = raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(path, name, meaning, value)
        if not 0 <= value <= high:
            raise _wrong(path, name, meaning, value)
        return float(value)

    def token(name: str, value: Any) -> int | None:
        if value is None or value == -1:  # -1 is an older spelling of "there is none"
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise _wrong(path, name, "a token id", value)
        return value

    eos = raw.get("eos_token_id")
    stops = [token("eos_token_id", value) for value in (eos if isinstance(eos, list) else [eos])]
    top_k = raw.get("top_k")
    if isinstance(top_k, bool) or not isinstance(top_k, int | None) or (top_k or 0) < 0:
        raise _wrong(path, "top_k", "a whole number from 0", top_k)
    do_sample = raw.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise _wrong(path, "do_sample", "true or false", do_sample)
    return GenerationConfig(
        stop_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        bos_token_id=token("bos_token_id", raw.get("bos_token_id")),
        pad_token_id=token("pad_token_id", raw.get("pad_token_id")),
        do_sample=do_sample,
        temperature=number("temperature", _LARGEST, "a finite number from 0"),
        top_p=number("top_p", 1.0, "a number from 0 to 1"),
        top_k=top_k,
    )


def with_generation_ids(folder: Path, config: TextConfig) -> TextConfig:
    """The config with the token ids of `generation_config.json`, if the folder has one.

    `transformers` takes the stop tokens from that file alone, so a file without them means that
    generation doesn't stop. Its other ids go before those of the config.
    """
    generation = load_generation_config(folder)
    if generation is None:
        return config
    changes: dict[str, Any] = {}
    if generation.stop_ids != config.stop_ids:
        changes["eos_token_id"] = generation.stop_ids or None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(generation, name) is not None:
            changes[name] = getattr(generation, name)
    return dataclasses.replace(config, **changes)


def updated(folder: Path, config: TextConfig) -> dict[str, Any] | None:
    """The folder's `generation_config.json` with the token ids of `config`; None without a file.

    Where there is no file, `transformers` takes the ids from `config.json`.
    """
    raw = _read(folder)
    if raw is None:
        return None
    stops = list(config.stop_ids)
    ids = {
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    others = {name: value for name, value in raw.items() if name not in ids}
    return others | {name: value for name, value in ids.items() if value is not None}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes: fetch it again.")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} is not valid JSON ({reason}): fetch it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold an object, but holds {_shown(raw)}.")
    return raw


def _wrong(path: Path, name: str, meaning: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{path}: {name} must be {meaning}, but is {_shown(value)}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + " …"
