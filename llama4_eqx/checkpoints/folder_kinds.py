"""Naming what isn't a Hugging Face checkpoint, by file names and first bytes."""

import json
import os
from pathlib import Path

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.checkpoints.file_kinds import PICKLED, file_kind, is_lfs_pointer
from llama4_eqx.checkpoints.safetensors_reading import INDEX, SINGLE


def require_checkpoint(folder: Path) -> None:
    """Raises one sentence that says what `folder` is if it can't be a checkpoint.

    A `FileNotFoundError` if nothing is there or the folder is empty of weights, else a
    `CheckpointError`. Reads no weights.
    """
    if not folder.exists():
        if folder.is_symlink():
            raise FileNotFoundError(
                f"{folder} is a link to {os.readlink(folder)}, which is missing."
            )
        name, mend = str(folder), ""
        if name.startswith("~"):
            mend = " ~ isn't your home here: write Path(…).expanduser()."
        elif len(folder.parts) == 2 and not folder.is_absolute():
            mend = (
                f" If that is its name on Hugging Face, fetch it: hf download {name} --local-dir …"
            )
        raise FileNotFoundError(f"There is no folder {name}.{mend}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {_kind(folder)}.")
    names = sorted(os.listdir(folder))
    if "adapter_config.json" in names:
        base = _field(folder / "adapter_config.json", "base_model_name_or_path")
        base = f" of {base}" if isinstance(base, str) else ""
        if SINGLE in names or INDEX in names:
            raise CheckpointError(
                f"{folder} holds both a model and an adapter{base} (adapter_config.json), which "
                "transformers would add to it: move one of them to another folder."
            )
        raise CheckpointError(
            f"{folder} holds an adapter{base}, not a model: load its model, and then the adapter "
            "with llama4_eqx.checkpoints.load_adapter(model, folder)."
        )
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder} has no config.json: {_content(names)}.")
    _require_target(folder / "config.json")
    if is_lfs_pointer(folder / "config.json"):
        raise CheckpointError(
            f"{folder / 'config.json'} is a Git LFS pointer, not the file: run `git lfs pull`."
        )
    if SINGLE not in names and INDEX not in names:
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}: {_content(names)}.")
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        _require_target(folder / (SINGLE if SINGLE in names else INDEX))


def _require_target(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is a link to a file that is missing: finish the download.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, but must be a file: fetch it again.")


def _kind(path: Path) -> str:
    """What a file is that was given in place of a folder."""
    if path.name.endswith(".safetensors"):
        kind = "a single safetensors file, without the config.json that says how to read it"
        return file_kind(path) or f"{kind}: give the folder of a checkpoint"
    if path.name.endswith((".bin", ".pth", ".pt")):
        return file_kind(path) or PICKLED
    return file_kind(path) or "a file: give the folder of a checkpoint"


def _content(names: list[str]) -> str:
    """What a folder without config or weights holds."""

    def some(*endings: str) -> str | None:
        return next((name for name in names if name.endswith(endings)), None)

    if not names:
        return "it is empty"
    if file := some(".gguf"):
        return f"it holds a GGUF file ({file}), which isn't supported; use the bf16 release"
    if "params.json" in names and some(".pth"):
        return "it holds Meta's own files, which `convert_meta_checkpoint` converts"
    if file := some(".bin", ".bin.index.json", ".pth", ".pt"):
        return (
            f"it holds pickled weights ({file}), which are never loaded; save them as safetensors "
            "with transformers' `save_pretrained`"
        )
    if file := some(".safetensors.incomplete", ".incomplete", ".part", ".tmp"):
        return f"it holds an unfinished download ({file}); finish it"
    if any(name.isdecimal() for name in names):
        return "it holds numbered folders; for steps of a run use `TrainCheckpointer.restore`"
    return f"it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"


def _field(path: Path, name: str) -> object:
    """A field of a JSON object; None for anything else, which is refused where it is read."""
    try:
        if path.stat().st_size > 2**24:
            return None
        return json.loads(path.read_bytes()).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
