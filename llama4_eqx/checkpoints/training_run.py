"""Checkpoints of a training run: written in the background, and verified before a run resumes.

Needs the extra `train` (orbax, grain). Each step is a folder, `<step>/`, that appears when it is
complete: `state/` holds the arrays, `run/metadata` their shapes and the position in the data, and
`sha256sums.txt` every file's checksum (`sha256sum -c` reads it). Nothing is ever unpickled.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import numpy as np

from llama4_eqx.argument_checks import whole_number
from llama4_eqx.checkpoints.checksums import damage, write_checksums
from llama4_eqx.checkpoints.errors import CheckpointError, listed
from llama4_eqx.checkpoints.folder_replacement import target_folder
from llama4_eqx.checkpoints.run_state import (
    decoded_position,
    dtype_and_shape,
    encoded_position,
    is_array,
    named_leaves,
    restored,
    stored_form,
)
from llama4_eqx.distributed.processes import allgather_json

T = TypeVar("T")
_PLAIN = re.compile(r"[\w\-./ ]+")


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

    def __init__(self, folder: str | os.PathLike[str], *, max_to_keep: int | Any = 3):
        self._folder = target_folder(folder)
        self._max_to_keep = whole_number("max_to_keep", max_to_keep, least=1)
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{self._folder} is a file: give a folder.")
        self._orbax = _orbax()
        self._orbax_folder = self._folder
        if not _PLAIN.fullmatch(str(self._folder)):
            # Orbax takes brackets for a pattern and backslashes for slashes: it gets a link.
            links = tempfile.mkdtemp(prefix="llama4_eqx-")
            self._orbax_folder = Path(links, "run")
            self._orbax_folder.symlink_to(self._folder, target_is_directory=True)
            weakref.finalize(self, shutil.rmtree, links, ignore_errors=True)
        # Made by the first save, as it removes what a killed save left: restoring changes nothing.
        self._manager: Any = None
        self._saving: int | None = None
        self._damaged: list[int] = []

    def __enter__(self) -> "TrainCheckpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int | Any, state: Any, data: Checkpointable | None = None) -> None:
        """Copies the arrays of `state` and writes them in the background.

        When it returns, the state may be donated and `data` may advance. It waits for the previous
        save. Only JAX arrays are stored, not functions, Python numbers or NumPy arrays. A step is a
        whole number from 0, later than all saved ones.

        Raises an `OSError` at once if the folder can't be written, and if the previous save failed,
        such as for a full disk: older checkpoints are unchanged, and the next save starts afresh.
        """
        step = whole_number("step", step, least=0)
        self.wait()
        arrays = {name: leaf for name, leaf in named_leaves(state) if eqx.is_array(leaf)}
        leaves = {name: dtype_and_shape(leaf) for name, leaf in arrays.items()}
        position = None if data is None else encoded_position(data.get_state())
        run = {"leaves": leaves, "data": allgather_json(position)}
        # Orbax takes no empty arrays.
        stored = {name: stored_form(leaf) for name, leaf in arrays.items() if leaf.size}
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
            self._abandon_manager()
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
            lines = [f"step {number}: {why}" for number, why in damaged]
            raise CheckpointError(
                f"All checkpoints in {self._folder} are damaged:\n{listed(lines)}"
            )
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
        self._check(step, run, dict(named_leaves(like)), data)
        state = self._read(step, like)
        if data is not None:
            data.set_state(decoded_position(self._own_data(run)))
        return step, state

    def wait(self) -> None:
        """Waits until the save in progress is on disk. Raises an `OSError` if it failed."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax raises whatever failed in the background
            self._abandon_manager()
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
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_checksums,
                    # Else threads wait for minutes for a folder that couldn't be created.
                    create_directories_asynchronously=False,
                ),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                lightweight_initialize=True,  # reads no step's metadata, which may be damaged
            )
            self._manager = ocp.CheckpointManager(self._orbax_folder, options=options)
        return self._manager

    def _abandon_manager(self) -> None:
        """After a failure: closing the manager may fail of the same cause."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()

    def _failed(self, step: int | None, error: Exception) -> OSError:
        reason = getattr(error, "strerror", None) or error
        told = (
            f"Could not save step {step} in {self._folder}: {reason}. Older checkpoints are as "
            "they were; make room or choose another folder, and save again."
        )
        number = getattr(error, "errno", None)
        return OSError(told) if number is None else OSError(number, told)

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
        here = {name: dtype_and_shape(leaf) for name, leaf in like.items() if is_array(leaf)}
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
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._folder} doesn't fit this run:\n"
                + listed(problems)
            )

    def _own_data(self, run: Any) -> Any:
        """This process's position in the data; None if other processes each had their own."""
        positions = run["data"]
        if len(positions) == jax.process_count():
            return positions[jax.process_index()]
        return positions[0] if all(one == positions[0] for one in positions) else None

    def _read(self, step: int, like: T) -> T:
        ocp = self._orbax
        how = {}
        for name, leaf in named_leaves(like):
            if is_array(leaf) and leaf.size:
                # Uncommitted arrays must stay so, to be combined with sharded ones.
                free = leaf.sharding is None or not getattr(leaf, "committed", True)
                array, numpy = ocp.ArrayRestoreArgs, ocp.RestoreArgs
                how[name] = numpy(np.ndarray) if free else array(sharding=leaf.sharding)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(dict.fromkeys(how, 0), restore_args=how)
            values = reader.restore(self._orbax_folder / str(step) / "state", args=args)
        leaves = [
            restored(values.pop(name, None), leaf) if is_array(leaf) else leaf
            for name, leaf in named_leaves(like)
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
