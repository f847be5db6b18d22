"""Checkpoints of a training run: written in the background, and verified before a run resumes.

Needs the extra `train` (orbax, grain). Each step is a folder, `<step>/`, that appears when it is
complete: `state/` holds the arrays, `run/metadata` their shapes and the position in the data, and
`sha256sums.txt` every file's checksum (`sha256sum -c` reads it). Nothing is ever unpickled.
"""

import base64
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from llama4_eqx.checkpoints.checksums import damage, write_checksums
from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.distributed.processes import allgather_json

T = TypeVar("T")


@runtime_checkable
class Checkpointable(Protocol):
    """Anything whose position can be saved and restored, such as grain's iterators."""

    def get_state(self) -> Any:
        """The position: bytes, or what JSON can hold."""

    def set_state(self, state: Any, /) -> None:
        """Continues from that position."""


class TrainCheckpointer:
    """Saves and restores one run's newest `max_to_keep` checkpoints, in a folder of their own.

    As a context manager it waits at the end for a save in progress. One run at a time may save to a
    folder; others may restore from it meanwhile. With several processes, each must make the same
    calls with a folder that all of them share.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_to_keep: int = 3):
        self._folder, self._max_to_keep = Path(folder).absolute(), max_to_keep
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1, not {max_to_keep}.")
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{self._folder} is a file: give a folder.")
        self._orbax = _orbax()
        # Made by the first save, as it removes what a killed save left: restoring changes nothing.
        self._manager: Any = None
        self._saving: int | None = None
        self._damaged: list[int] = []

    def __enter__(self) -> "TrainCheckpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, data: Checkpointable | None = None) -> None:
        """Copies the arrays of `state` and writes them in the background.

        When it returns, the state may be donated and `data` may advance. It waits for the previous
        save. Only JAX arrays are stored, not functions, Python numbers or NumPy arrays. A step must
        be later than all saved ones.

        Raises an `OSError` if the previous save failed, such as for a full disk: older checkpoints
        are unchanged, and the next save starts afresh.
        """
        self.wait()
        arrays = {name: leaf for name, leaf in _named(state) if eqx.is_array(leaf)}
        leaves = {name: _shape(leaf) for name, leaf in arrays.items()}
        position = None if data is None else _encoded(data.get_state())
        run = {"leaves": leaves, "data": allgather_json(position)}
        # Orbax takes no empty arrays.
        stored = {name: _raw(leaf) for name, leaf in arrays.items() if leaf.size}
        try:
            manager = self._open()
            newest = manager.latest_step()
            if newest is not None and step <= newest:
                raise ValueError(
                    f"Step {step} can't be saved: {self._folder} already holds step {newest}. "
                    "Restore and go on from there, or choose another folder."
                )
            self._saving = step
            args = self._orbax.args
            items = args.Composite(state=args.PyTreeSave(stored), run=args.JsonSave(run))
            manager.save(step, args=items, force=True)  # always, not as orbax sees fit
        except OSError as error:
            raise self._failed(step, error) from error

    def restore(self, like: T, data: Checkpointable | None = None) -> tuple[int, T] | None:
        """Restores the newest intact checkpoint as `(step, state)`, and the position of `data`;
        None for an empty folder.

        `like` is a state of the same structure, of arrays or of shapes from
        `eqx.filter_eval_shape`. Each leaf gets the sharding of the one in `like`, and leaves that
        aren't stored are taken from it. So a run may resume on other devices, and with another
        number of processes if all were at the same position in the data.

        A damaged checkpoint is skipped with a warning; the next save removes it. Raises
        `CheckpointError` if none is intact, or if it doesn't fit `like` or `data`.
        """
        self.wait()
        step, damaged = allgather_json(self._newest_intact() if jax.process_index() == 0 else None)[
            0
        ]
        if step is None and damaged:
            lines = "\n".join(f"- step {number}: {why}" for number, why in damaged)
            raise CheckpointError(f"All checkpoints in {self._folder} are damaged:\n{lines}")
        for number, why in damaged:
            warnings.warn(
                f"The checkpoint of step {number} in {self._folder} is damaged: {why}. Step {step} "
                "is used instead; the next save will remove the damaged one.",
                stacklevel=2,
            )
        self._damaged = [number for number, _ in damaged]
        if step is None:
            return None
        run = json.loads((self._folder / str(step) / "run" / "metadata").read_text())
        self._check(step, run, dict(_named(like)), data)
        state = self._read(step, like)
        if data is not None:
            data.set_state(_decoded(self._own_data(run)))
        return step, state

    def wait(self) -> None:
        """Waits until the save in progress is on disk. Raises an `OSError` if it failed."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax raises whatever failed in the background
            manager, self._manager = self._manager, None
            manager.close()
            raise self._failed(self._saving, error) from error

    def close(self) -> None:
        """Waits as `wait` does, and releases the folder."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> Any:
        """Orbax's manager, after removing damaged steps and leftovers of killed saves."""
        if self._damaged:
            self.close()
        if self._manager is None:
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                for step in self._damaged:
                    shutil.rmtree(self._folder / str(step), ignore_errors=True)
            allgather_json(None)  # a barrier
            self._damaged = []
            ocp = self._orbax
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._max_to_keep),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                lightweight_initialize=True,  # reads no step's metadata, which may be damaged
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    def _failed(self, step: int | None, error: Exception) -> OSError:
        return OSError(
            f"Could not save step {step} in {self._folder}: {error}. Older checkpoints are as they "
            "were; make room or choose another folder, and save again.",
        )

    def _write_checksums(self) -> None:
        """Called by orbax, on one process, when everything else is written and before the step's
        folder is renamed: so every finished step has its checksums."""
        folder = next(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        write_checksums(folder)

    def _newest_intact(self) -> tuple[int | None, list[tuple[int, str]]]:
        """The newest intact step, and what is wrong with the newer ones."""
        folders = [path for path in self._folder.glob("*") if path.is_dir()]
        damaged = []
        for step in sorted((int(p.name) for p in folders if p.name.isdecimal()), reverse=True):
            why = damage(self._folder / str(step))
            if why is None:
                return step, damaged
            damaged.append((step, why))
        return None, damaged

    def _check(
        self, step: int, run: Any, like: dict[str, Any], data: Checkpointable | None
    ) -> None:
        there = run["leaves"]
        here = {name: _shape(leaf) for name, leaf in like.items() if _is_array(leaf)}
        problems = [
            f"{name} is {there.get(name, 'missing')} there, but {here.get(name, 'missing')} here"
            for name in here | there
            if there.get(name) != here.get(name)
        ]
        if data is not None and None in run["data"]:
            problems.append("it was saved without data, so it doesn't have the position in it")
        elif data is not None and self._own_data(run) is None:
            problems.append(f"it was saved by {len(run['data'])} processes, each with its own data")
        if problems:
            lines = [f"- {problem}" for problem in problems[:20]]
            lines += [f"- … and {len(problems) - 20} more"] * (len(problems) > 20)
            where = f"The checkpoint of step {step} in {self._folder}"
            raise CheckpointError("\n".join([f"{where} doesn't fit this run:", *lines]))

    def _own_data(self, run: Any) -> Any:
        """This process's position in the data; None if other processes each had their own."""
        positions = run["data"]
        if len(positions) == jax.process_count():
            return positions[jax.process_index()]
        return positions[0] if all(one == positions[0] for one in positions) else None

    def _read(self, step: int, like: T) -> T:
        ocp = self._orbax
        how = {}
        for name, leaf in _named(like):
            if _is_array(leaf) and leaf.size:
                # Uncommitted arrays must stay so, to be combined with sharded ones.
                free = leaf.sharding is None or not getattr(leaf, "committed", True)
                array, numpy = ocp.ArrayRestoreArgs, ocp.RestoreArgs
                how[name] = numpy(np.ndarray) if free else array(sharding=leaf.sharding)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(dict.fromkeys(how, 0), restore_args=how)
            values = reader.restore(self._folder / str(step) / "state", args=args)
        leaves = [
            _restored(values.pop(name, None), leaf) if _is_array(leaf) else leaf
            for name, leaf in _named(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Checkpoints of runs need the `orbax-checkpoint` package: "
            "pip install 'llama4_eqx[train]'"
        ) from error
    # It logs progress, and errors that are raised as well.
    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    return ocp


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _restored(value: Any, like: Any) -> jax.Array:
    if value is None:  # an empty array, which isn't stored
        return jnp.empty(like.shape, like.dtype, device=like.sharding)
    if isinstance(value, np.ndarray):
        # Weak types come from Python's numbers. They decide what a product with bfloat16 is.
        weak = getattr(like, "weak_type", False) and value.ndim == 0
        value = jnp.asarray(value.item()) if weak else jnp.array(value)
    if not _is_key(like):
        return value
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), like.dtype)))


def _encoded(state: Any) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        same = json.loads(json.dumps(state)) == state
    except TypeError:
        same = False
    if not same:
        raise TypeError(
            "The data's state must be bytes, or what comes back from JSON as it was: numbers, "
            f"strings, lists, and dicts with strings as keys. It is {state!r}."
        )
    return {"json": state}


def _decoded(state: dict[str, Any]) -> Any:
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]
