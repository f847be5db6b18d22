"""What `save_checkpoint` leaves when it is killed, meets another one, or saves to odd folders."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pretrain_text
import pytest
import train_digits
import transformers

import llama4_eqx as l4
from llama4_eqx.checkpoints import folder_replacement, require_writable, saving
from llama4_eqx.checkpoints.folder_replacement import Staging, recover
from tests.checkpoints.killed_save import no_exchange, tiny_model

pytestmark = pytest.mark.slow


def value_of(folder: Path) -> float:
    """The value of all weights, as `transformers` reads them."""
    model, info = transformers.Llama4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    values = {value for leaf in model.parameters() for value in leaf.unique().tolist()}
    (value,) = values
    return value


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory):
    """Two folders with other files in them: the first is to become the second."""
    root = tmp_path_factory.mktemp("models")
    for name, value, size in (("old", 1.0, 10**9), ("new", 2.0, 1000)):
        l4.save_checkpoint(tiny_model(value), root / name, max_shard_bytes=size)
        (root / name / "tokenizer.json").write_text("{}")
        (root / name / "sub").mkdir()
        (root / name / "sub/notes.txt").write_text("mine")
    return root / "old", root / "new"


class Killer:
    """`killed_save.py` in a process of its own."""

    def __init__(self, folder: Path):
        script = Path(__file__).with_name("killed_save.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[2])},
        )

    def save(self, number: int, way: str) -> int:
        self.process.stdin.write(f"{number} {way}\n")
        return int(self.process.stdout.readline())


@pytest.mark.parametrize("way", ["exchange", "no-exchange", "inside"])
def test_a_kill_before_any_call_leaves_the_old_or_the_new_model(way, old_and_new, tmp_path):
    old, new = map(content, old_and_new)
    folder, seen, mended, number = tmp_path / "model", [], 0, 0
    shutil.copytree(old_and_new[0], folder)
    killer = Killer(folder)
    while killer.save(number := number + 1, way) == -signal.SIGKILL:
        if way == "exchange":
            assert content(folder) in (old, new), number  # under its name, for any reader
        mended += (folder / ".checkpoint-complete").exists()
        recover(folder)
        now = {name: text for name, text in content(folder).items() if name[0] != "."}
        assert now in (old, new), number
        seen.append(now == new)
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        shutil.copytree(old_and_new[0], folder)
    killer.process.communicate()
    print(f"{number} calls, {sum(seen)} times the new model, {mended} times by recovery")
    assert seen == sorted(seen)  # once new, new after any later call
    assert seen.count(False) > 20
    assert seen.count(True) > 5
    assert (mended > 5) == (way != "exchange")
    assert content(folder) == new
    assert names(tmp_path) == {"model"}


def test_a_kill_while_a_new_folder_is_saved(old_and_new, tmp_path):
    folder = tmp_path / "model"
    killer, number, ended = Killer(folder), 0, None
    while ended != 0:
        number += 1
        ended = killer.save(number, "exchange")
        if folder.exists():
            l4_files = {
                n: t for n, t in content(old_and_new[1]).items() if "model" in n or "config" in n
            }
            assert content(folder) == l4_files
            if ended != 0:
                shutil.rmtree(folder)
    killer.process.communicate()
    assert number > 20
    assert names(tmp_path) == {"model"}


def test_a_load_mends_what_a_kill_left(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    l4.save_checkpoint(tiny_model(1.0), folder)
    monkeypatch.setattr(folder_replacement, "_exchange", no_exchange)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        with pytest.raises(OSError, match=r"is complete in .*\.checkpoint-complete, but") as error:
            l4.save_checkpoint(tiny_model(2.0), folder, overwrite=True)
        assert error.value.errno == errno.EIO
    assert not (folder / "config.json").exists()  # nobody reads a mixture meanwhile
    assert (l4.load_checkpoint(folder).embed_tokens == 2).all()
    assert value_of(folder) == 2
    # As version 0.2.0 was killed: between two renames.
    os.rename(folder, tmp_path / ".model-old-0123abcd")
    assert (l4.load_checkpoint(folder).embed_tokens == 2).all()
    assert names(tmp_path) == {"model"}


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path):
    folder = tmp_path / "x"
    l4.save_checkpoint(tiny_model(1.0), folder)
    alive = Staging(folder)
    dead = [".x-partial-0123abcd", ".x-partial-4567cdef"]
    others = [".x-partial-notes-of-mine", ".y-partial-0123abcd", ".x-y-partial-0123abcd"]
    for name in dead + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("")
    (folder / ".checkpoint-partial-0123abcd").mkdir()
    l4.save_checkpoint(tiny_model(2.0), folder, overwrite=True)
    assert names(tmp_path) == {"x", *others, alive.path.name}
    assert names(folder) == {"config.json", "model.safetensors"}
    alive.discard()
    assert not alive.path.exists()


@pytest.mark.parametrize("there", [False, True])
def test_of_two_savers_at_once_one_wins(there, tmp_path, monkeypatch):
    """Both find no checkpoint at first, and meet again just before they commit."""
    folder, meet = tmp_path / "model", threading.Barrier(2)
    if there:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
    write, results = saving._write, []

    def write_and_wait(*arguments):
        write(*arguments)
        meet.wait()

    monkeypatch.setattr(saving, "_write", write_and_wait)

    def save(value):
        try:
            l4.save_checkpoint(tiny_model(value), folder)
            results.append(value)
        except FileExistsError as error:
            results.append(str(error))

    threads = [threading.Thread(target=save, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, loser = sorted(results, key=lambda result: isinstance(result, str))
    assert "already holds a checkpoint" in loser
    assert value_of(folder) == winner
    assert names(tmp_path) == {"model"}
    assert (folder / "tokenizer.json").exists() == there


def test_two_overwriters_at_once_leave_one_of_their_models(tmp_path):
    folder = tmp_path / "model"
    l4.save_checkpoint(tiny_model(0.0), folder)
    models = [tiny_model(value) for value in (1.0, 2.0)]

    def save(model):
        for _ in range(5):
            l4.save_checkpoint(model, folder, overwrite=True)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value_of(folder) in (1.0, 2.0)
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("way", ["exchange", "no-exchange"])
def test_a_reader_during_overwrites_gets_one_of_the_models(way, tmp_path, monkeypatch):
    if way == "no-exchange":
        monkeypatch.setattr(folder_replacement, "_exchange", no_exchange)
    folder, stop = tmp_path / "model", threading.Event()
    l4.save_checkpoint(tiny_model(1.0), folder)
    models = [tiny_model(value) for value in (1.0, 2.0)]
    start = time.perf_counter()
    l4.load_checkpoint(folder)
    pause = 2 * (time.perf_counter() - start)  # so that most reads meet one save at most

    def overwrite():
        while not stop.wait(pause):
            models.reverse()
            l4.save_checkpoint(models[0], folder, overwrite=True, max_shard_bytes=2000)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        for _ in range(10):
            model = l4.load_checkpoint(folder)
            leaves = [np.asarray(leaf) for leaf in (model.embed_tokens, model.lm_head)]
            assert {float(value) for leaf in leaves for value in leaf.ravel()} in ({1.0}, {2.0})
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link(there, tmp_path):
    (tmp_path / "big").mkdir()
    if there:
        l4.save_checkpoint(tiny_model(1.0), tmp_path / "big/real")
    (tmp_path / "link").symlink_to("big/real")
    (tmp_path / "again").symlink_to("link")
    for value, name in ((2.0, "link"), (3.0, "again")):
        l4.save_checkpoint(tiny_model(value), tmp_path / name, overwrite=True)
        assert (tmp_path / name).is_symlink()
        assert value_of(tmp_path / "big/real") == value
        assert (l4.load_checkpoint(tmp_path / name).embed_tokens == value).all()
    assert names(tmp_path) == {"big", "link", "again"}
    assert names(tmp_path / "big") == {"real"}


def test_the_current_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    l4.save_checkpoint(tiny_model(1.0), folder, max_shard_bytes=1000)
    (folder / "sub").mkdir()
    for current, name in ((folder, "."), (folder / "sub", "..")):
        monkeypatch.chdir(current)
        l4.save_checkpoint(tiny_model(2.0), name, overwrite=True)
        assert Path.cwd() == current  # it is still there
        assert value_of(folder) == 2
        assert (l4.load_checkpoint(name).embed_tokens == 2).all()
        assert names(folder) == {"config.json", "model.safetensors", "sub"}
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point(kind, tmp_path):
    """In a namespace of its own, where that is allowed; else the move out fails as it would."""
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    mount = "mount -t tmpfs tmpfs model" if kind == "tmpfs" else "mount --bind elsewhere model"
    script = (
        "import os, sys; sys.path[:0] = sys.argv[1:2]\n"
        "import llama4_eqx as l4; from tests.checkpoints.killed_save import tiny_model\n"
        "for value in (1.0, 2.0): l4.save_checkpoint(tiny_model(value), 'model', overwrite=True)\n"
        "assert (l4.load_checkpoint('model').embed_tokens == 2).all()\n"
        "print(sorted(os.listdir('model')), sorted(os.listdir('.')))"
    )
    python = [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parents[2])]
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "-", *python],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if "unshare" in run.stderr or "mount:" in run.stderr:
        pytest.skip("mounting isn't allowed here")
    assert run.stdout == "['config.json', 'model.safetensors'] ['elsewhere', 'model']\n", run.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EXDEV])
def test_a_folder_that_cannot_be_moved(number, tmp_path, monkeypatch):
    """As where its parent can't be written, or it is a mount point."""
    folder = tmp_path / "model"
    l4.save_checkpoint(tiny_model(1.0), folder)
    rename = os.rename

    def refuse_parent(source, target):
        if Path(target).parent == tmp_path:
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_parent)
    l4.save_checkpoint(tiny_model(2.0), folder, overwrite=True)
    assert value_of(folder) == 2
    with pytest.raises(OSError, match=f"{os.strerror(number)}. What was there before") as e:
        l4.save_checkpoint(tiny_model(2.0), tmp_path / "new")
    assert e.value.errno == number
    assert names(tmp_path) == {"model"}
    assert names(folder) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "name", ["a[1]*?", "back\\slash", "wîth späce\n", "n" * 250, ".hidden", "-"]
)
def test_names_of_folders(name, tmp_path):
    for value in (1.0, 2.0):
        l4.save_checkpoint(tiny_model(value), tmp_path / name, overwrite=True)
    assert (l4.load_checkpoint(tmp_path / name).embed_tokens == 2).all()
    assert names(tmp_path) == {name}


def test_what_an_overwrite_leaves_alone(tmp_path):
    """Adapters, other weights, links, empty folders, and the folder's own mode."""
    folder = tmp_path / "model"
    l4.save_checkpoint(tiny_model(1.0), folder, max_shard_bytes=1000)
    for name in ("adapter_model.safetensors", "notes.txt", "model.gguf"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to("nowhere")
    (folder / "empty").mkdir()
    (folder / "sub").mkdir(mode=0o750)
    (folder / "sub/config.json").write_text("mine")
    folder.chmod(0o2750)
    l4.save_checkpoint(tiny_model(2.0), folder, overwrite=True)
    assert os.readlink(folder / "link") == "nowhere"
    assert (folder / "sub/config.json").read_text() == "mine"
    assert [(folder / name).stat().st_mode & 0o7777 for name in (".", "sub")] == [0o2750, 0o750]
    others = {"adapter_model.safetensors", "notes.txt", "model.gguf", "link", "empty", "sub"}
    assert names(folder) == {"config.json", "model.safetensors"} | others
    assert value_of(folder) == 2


def test_errors_keep_their_number_and_cause(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: give a folder"):
        l4.save_checkpoint(tiny_model(1.0), tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="file is a file, not a folder") as error:
        l4.save_checkpoint(tiny_model(1.0), tmp_path / "file" / "model")
    assert error.value.errno == errno.ENOTDIR
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        l4.save_checkpoint(tiny_model(1.0), tmp_path / "loop")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*unchanged") as error:
            l4.save_checkpoint(tiny_model(1.0), tmp_path / "model")
        assert error.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == {"file", "loop"}
    for size in (0, -1, float("nan"), "5GB"):
        with pytest.raises(ValueError, match="max_shard_bytes must be a positive number"):
            l4.save_checkpoint(tiny_model(1.0), tmp_path / "model", max_shard_bytes=size)


def test_what_is_in_the_way_is_told_before_a_run(tmp_path):
    require_writable(tmp_path / "runs" / "model")
    assert os.listdir(tmp_path / "runs") == []
    old = tmp_path / "old"
    l4.save_checkpoint(tiny_model(1), old)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    require_writable(old)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "model", Path("/proc/nothing/model")):
        with pytest.raises(OSError, match=f"Nothing can be saved in {folder}: .* before the run"):
            require_writable(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            require_writable(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["file", "old", "runs"]


@pytest.mark.parametrize("example", [train_digits, pretrain_text])
def test_examples_ask_before_they_train(example, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Choose another folder"):
        example.main(folder=tmp_path / "file")
