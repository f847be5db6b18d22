"""Checkpoints of runs: exact, sharded, damaged, interrupted, and killed at any moment."""

import gc
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import llama4_eqx as l4
from llama4_eqx.checkpoints import TrainCheckpointer

pytestmark = pytest.mark.slow

SUMS = "sha256sums.txt"


def bits(leaf) -> tuple:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def same(a, b) -> bool:
    """Equal to the last bit, NaNs and negative zeros too."""
    a, b = eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(lambda x, y: bits(x) == bits(y), jax.tree.leaves(a), jax.tree.leaves(b))
    )


def toy_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "w": jax.random.normal(keys[0], (64, 32)),
        "half": jax.random.normal(keys[1], (33,), jnp.bfloat16),
        "step": jnp.int32(seed),
        "key": keys[2],
    }


def mesh(*sizes: int):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], devices=jax.devices()[: np.prod(sizes)])


def zeros_like(state):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def test_training_state_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    shapes = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config.tiny(), key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape, leaf.dtype)), shapes)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    optimizer = optax.inject_hyperparams(optax.adamw)(1e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
    state = (model, half, opt_state, jax.random.key(5), None, jnp.tanh, 0.5, "static")
    with TrainCheckpointer(tmp_path / "run") as checkpoints:
        checkpoints.save(7, state)
        like = (*zeros_like(state[:4]), None, jnp.tanh, 0.25, "static")
        step, restored = checkpoints.restore(like) or pytest.fail("nothing there")
    assert step == 7
    assert same(restored, state)
    assert restored[4:] == (None, jnp.tanh, 0.25, "static")  # what isn't stored is that of `like`
    assert restored[0].config == model.config


def test_any_array_bit_for_bit(tmp_path):
    state = {
        "zeros": jnp.array([0.0, -0.0, -0.0]),
        "negative zero": jnp.array(-0.0),
        "nans": jax.lax.bitcast_convert_type(jnp.uint32([0x7FC00001, 0xFFC00000, 1]), jnp.float32),
        "a/b": [jnp.array(True), jnp.int8([-1, 2]), jnp.complex64(1 + 2j)],
        "a": {"b.c": jnp.float16(3), "b": {"c": jnp.float16(4)}},
        3: jnp.uint32(5),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 6).reshape(2, 3),
        "no keys": jax.random.split(jax.random.key(1), 6)[:0],
    }
    state = {str(name): leaf for name, leaf in state.items()}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    with TrainCheckpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    with TrainCheckpointer(tmp_path) as checkpoints:
        assert same((checkpoints.restore(like) or pytest.fail("nothing there"))[1], state)


def test_arrays_stay_as_free_and_as_weak_as_they_were(tmp_path):
    """A free array meets sharded ones in a compiled program; a weak one takes the others' dtype."""
    sharding = NamedSharding(mesh(8), P("x"))
    state = {
        "sharded": jax.device_put(jnp.arange(16.0), sharding),
        "free": jnp.float32(2),
        "weak": jnp.asarray(3.0),
    }
    with TrainCheckpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _, restored = checkpoints.restore(state) or pytest.fail("nothing there")
    for name, leaf in state.items():
        assert restored[name].committed == leaf.committed
        assert restored[name].weak_type == leaf.weak_type
    halves = jnp.ones(16, jnp.bfloat16)
    out = jax.jit(lambda s: (s["sharded"] * s["free"], halves * s["weak"]))(restored)
    assert np.array_equal(out[0], 2 * np.arange(16.0))
    assert out[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", [(8,), (2,), (4, 2), (1,)])
def test_resuming_on_other_devices(sizes, tmp_path):
    state = toy_state() | {"keys": jax.random.split(jax.random.key(3), 8)}
    specs = {"w": P("x"), "half": P(), "step": P(), "key": P(), "keys": P("x")}
    before = mesh(2, 4)
    placed = {n: jax.device_put(x, NamedSharding(before, specs[n])) for n, x in state.items()}
    placed["w"] = jax.device_put(state["w"], NamedSharding(before, P("y", "x")))
    with TrainCheckpointer(tmp_path) as checkpoints:
        checkpoints.save(1, placed)
    after = {name: NamedSharding(mesh(*sizes), spec) for name, spec in specs.items()}
    shapes = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=after[n]) for n, x in state.items()
    }
    arrays = {n: jax.device_put(x, after[n]) for n, x in zeros_like(state).items()}
    for like in (shapes, arrays):
        with TrainCheckpointer(tmp_path) as checkpoints:
            _, restored = checkpoints.restore(like) or pytest.fail("nothing there")
        assert same(restored, state)
        for name, leaf in restored.items():
            assert leaf.sharding.is_equivalent_to(after[name], leaf.ndim), name


def pipeline():
    source = grain.MapDataset.source(np.arange(101)).shuffle(seed=3).repeat().batch(4)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


class Counter:
    """A position in bytes, as of grain's DataLoader."""

    def __init__(self, state=b"\xff\x00"):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_data_goes_on_exactly(tmp_path):
    data, state = pipeline(), toy_state()
    for _ in range(40):
        next(data)
    with TrainCheckpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, data)
        truth = [next(data) for _ in range(40)]
        resumed = pipeline()
        next(resumed)
        assert checkpoints.restore(state, resumed)
        assert np.array_equal(truth, [next(resumed) for _ in range(40)])

        checkpoints.save(2, state, Counter())
        counter = Counter(b"")
        assert checkpoints.restore(state, counter)
        assert counter.state == b"\xff\x00"

        for unfit in ({1: 2}, (1, 2), {"a": np.int64(3)}):
            with pytest.raises(TypeError, match="bytes, or what comes back from JSON"):
                checkpoints.save(3, state, Counter(unfit))

        checkpoints.save(3, state)
        with pytest.raises(l4.CheckpointError, match="saved without data"):
            checkpoints.restore(state, counter)
        assert checkpoints.restore(state)


@pytest.mark.parametrize("alike", [True, False])
def test_data_of_other_processes(alike, tmp_path, monkeypatch):
    """One process takes the place of two that were at the same place, and of no others."""

    def of_two(value):
        both = isinstance(value, dict)
        return [value, value if alike else {"json": "elsewhere"}] if both else [value]

    state, counter = {"x": jnp.ones(3)}, Counter()
    with monkeypatch.context() as patched, TrainCheckpointer(tmp_path) as checkpoints:
        patched.setattr("llama4_eqx.checkpoints.training_run.allgather_json", of_two)
        checkpoints.save(1, state, Counter(b"here"))
    if alike:
        assert TrainCheckpointer(tmp_path).restore(state, counter)
        assert counter.state == b"here"
    else:
        with pytest.raises(l4.CheckpointError, match="saved by 2 processes, each with its own"):
            TrainCheckpointer(tmp_path).restore(state, counter)


def test_the_newest_are_kept(tmp_path):
    with TrainCheckpointer(tmp_path / "new" / "run", max_to_keep=2) as checkpoints:
        assert checkpoints.restore(toy_state()) is None
        assert not (tmp_path / "new").exists()
        for step in (1, 5, 9, 30):
            checkpoints.save(step, toy_state(step))
        for step in (30, 9):
            with pytest.raises(ValueError, match="already holds step 30"):
                checkpoints.save(step, toy_state())
    assert {path.name for path in (tmp_path / "new/run").iterdir()} == {"9", "30"}
    with TrainCheckpointer(tmp_path / "new/run", max_to_keep=2) as checkpoints:
        assert same(checkpoints.restore(toy_state()), (30, toy_state(30)))
    listed = subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=tmp_path / "new/run/30")
    assert listed.returncode == 0


def test_a_step_may_donate_what_is_being_saved(tmp_path):
    """Each save is still being written while the next steps reuse the state's memory."""
    step_function = jax.jit(
        lambda x: jax.tree.map(lambda leaf: leaf * 1.5 + 1, x), donate_argnums=0
    )
    state = {
        "one": jax.random.normal(jax.random.key(0), (3_000_000,)),
        "sharded": jax.device_put(jnp.ones((8, 100_000)), NamedSharding(mesh(8), P("x"))),
        "replicated": jax.device_put(jnp.ones((8, 100_000)), NamedSharding(mesh(8), P())),
    }
    truths = {}
    with TrainCheckpointer(tmp_path) as checkpoints:
        for step in range(3):
            truths[step] = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
            checkpoints.save(step, state)
            for _ in range(5):
                state = step_function(state)
            jax.block_until_ready(state)
    for step in reversed(range(3)):
        with TrainCheckpointer(tmp_path) as checkpoints:
            assert same(checkpoints.restore(state), (step, jax.tree.map(jnp.asarray, truths[step])))
        shutil.rmtree(tmp_path / str(step))


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """Three steps, with data."""
    folder = tmp_path_factory.mktemp("good")
    data = pipeline()
    with TrainCheckpointer(folder) as checkpoints:
        for step in (2, 4, 6):
            next(data)
            checkpoints.save(step, toy_state(step), data)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, rng: random.Random):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, rng: random.Random):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_of_each_file_in_turn(damage, good_folder, tmp_path):
    rng = random.Random(damage.__name__)
    harmless = 0
    for path in files_of(good_folder / "6"):
        folder = tmp_path / "run"
        shutil.copytree(good_folder, folder)
        name = path.relative_to(good_folder / "6").as_posix()
        damage(folder / "6" / name, rng)
        with TrainCheckpointer(folder) as checkpoints, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step, state = checkpoints.restore(toy_state()) or pytest.fail("nothing there")
            assert same(state, toy_state(step))
            # Two of orbax's files are written after the sums. They tell nothing that is used.
            if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                harmless += 1
                assert (step, told) == (6, [])
            else:
                assert step == 4, name
                (warning,) = told
                about = name if name != SUMS or damage is delete else ""
                assert re.search(
                    rf"step 6 in .* is damaged: .*{re.escape(about)}.* Step 4 is used instead",
                    str(warning.message),
                ), warning.message
            # The run goes on, past the damaged step.
            data = pipeline()
            checkpoints.restore(toy_state(), data)
            checkpoints.save(6 if step == 4 else 7, toy_state(70), data)
            assert same(checkpoints.restore(toy_state()), (6 if step == 4 else 7, toy_state(70)))
        shutil.rmtree(folder)
    assert harmless == 2
    assert len(files_of(good_folder / "6")) > 10


def test_many_damaged(good_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(good_folder, folder)
    rng = random.Random(0)
    flip(folder / "6/run/metadata", rng)
    sums = folder / "4" / SUMS
    sums.write_text("\n".join(sums.read_text().splitlines()[:-1]))
    (folder / "6/.nfs000").write_text("not ours")
    with TrainCheckpointer(folder) as checkpoints:
        with pytest.warns(match="damaged") as told:
            assert same(checkpoints.restore(toy_state()), (2, toy_state(2)))
        assert "step 6" in str(told[0].message)
        assert re.search(f"step 4 .* isn't listed in {SUMS}", str(told[1].message))
        assert (folder / "4").exists()  # restoring changes nothing
        checkpoints.save(3, toy_state(3))
    assert {path.name for path in folder.iterdir()} == {"2", "3"}
    for step in "23":
        (folder / step / "state/_METADATA").write_text("{}")
    with TrainCheckpointer(folder) as checkpoints:
        with pytest.raises(l4.CheckpointError, match=r"All .* damaged:\n- step 3: .*\n- step 2: "):
            checkpoints.restore(toy_state())
        with pytest.raises(ValueError, match="already holds step 3"):
            checkpoints.save(1, toy_state())


def test_what_a_killed_save_leaves_is_ignored_and_cleared(good_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(good_folder, folder)
    (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")
    shutil.copytree(folder / "4", folder / "8.orbax-checkpoint-tmp")
    with TrainCheckpointer(folder) as checkpoints:
        assert same(checkpoints.restore(toy_state()), (4, toy_state(4)))
        assert len(list(folder.iterdir())) == 4
        checkpoints.save(6, toy_state(6))
    assert {path.name for path in folder.iterdir()} == {"2", "4", "6"}


def test_a_state_that_does_not_fit(good_folder):
    state = toy_state()
    other = {
        "w": jnp.zeros((32, 64)),
        "half": state["half"].astype(jnp.float32),
        "key": jax.random.key(0, impl="rbg"),
        "new": jnp.zeros(3),
    }
    with TrainCheckpointer(good_folder) as checkpoints:
        with pytest.raises(l4.CheckpointError) as error:
            checkpoints.restore(other)
        told = str(error.value)
        for line in (
            "step 6",
            "['w'] is float32[64,32] there, but float32[32,64] here",
            "['half'] is bfloat16[33] there, but float32[33] here",
            "['key'] is key<fry>[] there, but key<rbg>[] here",
            "['new'] is missing there, but float32[3] here",
            "['step'] is int32[] there, but missing here",
        ):
            assert line in told
        state |= {str(i): jnp.zeros(1) for i in range(30)}
        with pytest.raises(l4.CheckpointError, match="and 10 more"):
            checkpoints.restore(state)


def test_a_full_disk_loses_nothing(tmp_path, capfd):
    big = {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    with TrainCheckpointer(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(1, big)
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            checkpoints.save(2, big)
            with pytest.raises(OSError, match=r"^Could not save step 2 .* as they were; make"):
                checkpoints.save(3, big)
            checkpoints.save(3, big)
            with pytest.raises(OSError, match="Could not save step 3"):
                checkpoints.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert same(checkpoints.restore(big), (1, big))
        checkpoints.save(3, big)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert capfd.readouterr() == ("", "")  # it is told once, as an exception


@pytest.mark.parametrize(
    "name", ["lr[1]", "a*b?", "back\\slash", "gs:", "wîth späce\n", "~", "%s#"]
)
def test_names_of_folders(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "links"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "links").mkdir()
    for step in (1, 2):
        with TrainCheckpointer(tmp_path / name, max_to_keep=1) as checkpoints:
            checkpoints.save(step, toy_state(step))
        assert same(
            TrainCheckpointer(tmp_path / name).restore(toy_state()), (step, toy_state(step))
        )
        assert {path.name for path in (tmp_path / name).iterdir()} == {str(step)}
    del checkpoints
    gc.collect()
    assert {path.name for path in tmp_path.iterdir()} == {name, "links"}
    assert not list((tmp_path / "links").iterdir())


def test_steps(tmp_path):
    state = {"x": jnp.ones(3)}
    with TrainCheckpointer(tmp_path, max_to_keep=9) as checkpoints:
        for step in (True, np.True_, 1.0, np.float32(2), -1, np.int64(-3), "1", None, jnp.ones(2)):
            with pytest.raises(ValueError, match="step must be a whole number from 0, not"):
                checkpoints.save(step, state)
        for step in (0, np.int64(1), np.uint8(2), jnp.int32(3), 2**40):
            checkpoints.save(step, state)
            checkpoints.wait()
        assert (checkpoints.restore(state) or pytest.fail("nothing there"))[0] == 2**40
    assert {int(path.name) for path in tmp_path.iterdir()} == {0, 1, 2, 3, 2**40}


FAILED_SAVE = """
import os, sys, time
import jax.numpy as jnp
from llama4_eqx.checkpoints import TrainCheckpointer
kind, folder = sys.argv[1:]
state = {"w": jnp.arange(1000.)}
mkdir, opened = os.mkdir, open
def fail(path, *arguments, **options):
    if "2.orbax-checkpoint-tmp" in str(path) and str(path).endswith(kind):
        raise OSError(30, "Read-only file system", str(path))
    return mkdir(path, *arguments, **options)
try:
    with TrainCheckpointer(folder) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        os.mkdir = fail
        started = time.monotonic()
        checkpoints.save(2, state)
except OSError as error:
    assert error.errno == 30
    assert time.monotonic() - started < 10
    print(error)
"""


@pytest.mark.parametrize("kind", ["2.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp"])
def test_a_folder_that_cannot_be_made_is_an_error_at_once(kind, tmp_path):
    """And the process ends, which would wait 300 seconds for threads of orbax."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILED_SAVE, kind, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert re.match(
        rf"\[Errno 30\] Could not save step 2 in {tmp_path}/run: Read-only file system\. Older",
        run.stdout,
    ), (run.stdout, run.stderr)
    assert run.returncode == 0
    assert steps_in(tmp_path / "run") == {"1"}


def steps_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.isdecimal()}


def test_poor_arguments(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        TrainCheckpointer(tmp_path / "file")
    with pytest.raises(ValueError, match="max_to_keep must be a whole number from 1, not 0"):
        TrainCheckpointer(tmp_path, max_to_keep=0)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'llama4_eqx\[train\]'"):
        TrainCheckpointer(tmp_path)


TWO_PROCESSES = """
import os, sys
import jax
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec as P
from llama4_eqx.checkpoints import TrainCheckpointer

class Data:
    def __init__(self, state): self.state = state
    def get_state(self): return self.state
    def set_state(self, state): self.state = state

def state(step):
    mesh = jax.make_mesh((4,), ("x",))
    value = np.arange(8.0, dtype=np.float32) + step
    put = lambda spec: jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, spec), lambda place: value[place]
    )
    return {"sharded": put(P("x")), "whole": put(P())}

with TrainCheckpointer(folder, max_to_keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), Data([index] * (5 * index + step)))
    checkpoints.wait()
    if index == 0:
        os.truncate(folder + "/3/run/metadata", 9)
    sync_global_devices("damage")
    data = Data(None)
    step, restored = checkpoints.restore(state(0), data)
    assert (step, data.state) == (2, [index] * (5 * index + 2)), (step, data.state)
    for name, leaf in state(2).items():
        for ours, theirs in zip(restored[name].addressable_shards, leaf.addressable_shards):
            assert np.array_equal(ours.data, theirs.data)
    checkpoints.save(3, state(3), data)
"""


def test_two_processes(tmp_path):
    """Each writes its shards and keeps its own place in the data; both resume from one step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # Orbax gets a link to a folder of such a name, another one in each process.
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "run[1]"), port]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    runs = [subprocess.Popen([*command, index], env=environment) for index in "01"]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert {path.name for path in (tmp_path / "run[1]").iterdir()} == {"2", "3"}


class Trainer:
    """`killed_run.py` in a process of its own, and what it logs."""

    def __init__(self, folder: Path, cache: Path):
        folder.mkdir()
        self.folder, self.log = folder / "run", folder / "log"
        self.log.touch()
        script = Path(__file__).with_name("killed_run.py")
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "EQX_ON_ERROR": "nan",  # programs with calls back to Python aren't cached
            "PYTHONPATH": str(script.parents[1]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, self.folder, self.log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | settings,
        )

    def start(self, steps: int) -> int:
        self.process.stdin.write(f"{steps}\n")
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def losses(self) -> list[tuple[int, str]]:
        return [(int(step), loss) for step, loss in self.lines() if step != "from"]


def test_a_run_killed_twenty_times_is_the_run_never_killed(tmp_path):
    rng = random.Random(0)
    killed = Trainer(tmp_path / "killed", tmp_path / "cache")
    in_saves = 0
    for number in range(20):
        pid, before = killed.start(10_000), len(killed.lines())
        # Two in three while it trains and saves; the others perhaps earlier.
        if number % 3:
            deadline = time.monotonic() + 120
            while len(killed.lines()) < before + 2:
                assert time.monotonic() < deadline, "it doesn't train"
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.7))
        else:
            time.sleep(rng.uniform(0.2, 2.5))
        os.kill(pid, signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL
        in_saves += any(killed.folder.glob("*.orbax-checkpoint-tmp*"))
    steps = max(step for step, _ in killed.losses()) + 6
    killed.start(steps)
    assert killed.end() == 0
    whole = Trainer(tmp_path / "whole", tmp_path / "cache")
    whole.start(steps)
    assert whole.end() == 0
    for trainer in (killed, whole):
        trainer.process.communicate()
        assert trainer.process.returncode == 0

    truth = dict(whole.losses())
    assert list(truth) == list(range(1, steps + 1))
    assert {step for step, _ in killed.losses()} == set(truth)
    for step, loss in killed.losses():
        assert truth[step] == loss, step
    resumed = [int(step) for word, step in killed.lines() if word == "from"]
    print(f"{steps} steps, {len(killed.losses())} run; {in_saves} kills in saves; from {resumed}")
    assert resumed == sorted(resumed)
    assert resumed[-1] > 0
    assert in_saves > 3
