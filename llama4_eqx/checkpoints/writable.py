"""Finding out before a long run that its result couldn't be saved."""

import os

from llama4_eqx.checkpoints.folder_replacement import Staging, target_folder


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Returns if `save_checkpoint` can write the folder, and leaves nothing there but its parents.

    To be called before a run that takes long. Raises an `OSError` that says what is in the way.
    """
    target = target_folder(folder)
    staging: Staging | None = None
    try:
        staging = Staging(target)
        (staging.path / "probe").write_bytes(bytes(4096))
    except OSError as error:
        raise type(error)(
            error.errno,
            f"Nothing can be saved in {folder}: {error.strerror or error}. Choose another folder, "
            "or make room, before the run begins.",
        ) from error
    finally:
        if staging is not None:
            staging.discard()
