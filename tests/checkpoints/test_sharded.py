"""Checkpoints of sharded models: equal to whole ones, read and written part by part."""

import io
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import llama4_eqx as l4
from llama4_eqx.checkpoints.safetensors_reading import reader
from llama4_eqx.checkpoints.safetensors_writing import write_part
from llama4_eqx.config import Llama4Config
from llama4_eqx.distributed import EXPERT_REPLICATED_TOKENS, FSDP, TENSOR, shardings
from tests.toys import MULTIMODAL, SCOUT, TOYS

pytestmark = pytest.mark.slow

# Two cycles of two layers, stacked, and one layer more.
TEXT = Llama4Config(replace(SCOUT, num_hidden_layers=5, no_rope_layers=(1, 0, 1, 0, 1)))
CASES = {
    "fsdp-expert": (TEXT, jnp.float32, {"fsdp": 2, "expert": 4}, FSDP | EXPERT_REPLICATED_TOKENS),
    "tensor": (TEXT, jnp.bfloat16, {"fsdp": 4, "tensor": 2}, FSDP | TENSOR),
    "vocab": (TEXT, jnp.bfloat16, {"x": 8}, {"vocab": "x"}),
    "scattered": (TEXT, jnp.float32, {"x": 2, "y": 4}, {"layers": "x", "head_dim": "y"}),
    "multimodal": (
        MULTIMODAL,
        jnp.bfloat16,
        {"fsdp": 4, "tensor": 2},
        FSDP | TENSOR | {"experts": None},
    ),
    "bias": (
        Llama4Config(TOYS["bias"]),
        jnp.float32,
        {"tensor": 2, "expert": 4},
        TENSOR | EXPERT_REPLICATED_TOKENS,
    ),
}


def make_mesh(sizes) -> Mesh:
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names))


def toy_model(config, dtype=jnp.float32) -> l4.Llama4:
    """Every number random, so that none is where another should be."""
    model = eqx.filter_eval_shape(l4.Llama4, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), model)


def same_files(a, b) -> bool:
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (a, b)]
    return contents[0] == contents[1]


@pytest.mark.parametrize(("config", "dtype", "sizes", "rules"), CASES.values(), ids=list(CASES))
def test_sharded_is_whole(config, dtype, sizes, rules, tmp_path):
    model, mesh = toy_model(config, dtype), make_mesh(sizes)
    l4.save_checkpoint(model, tmp_path / "whole", max_shard_bytes=500_000)
    sharded = l4.load_checkpoint(tmp_path / "whole", mesh=mesh, rules=rules)
    places = jax.tree.leaves(shardings(model, mesh, rules))
    pairs = zip(jax.tree.leaves(sharded), jax.tree.leaves(model), places, strict=True)
    for leaf, truth, place in pairs:
        assert leaf.sharding == place
        assert leaf.dtype == truth.dtype
        assert np.array_equal(leaf, truth)
    l4.save_checkpoint(sharded, tmp_path / "sharded", max_shard_bytes=500_000)
    assert same_files(tmp_path / "whole", tmp_path / "sharded")


def test_another_dtype_part_and_numpy(tmp_path):
    model, mesh = toy_model(MULTIMODAL, jnp.bfloat16), make_mesh({"fsdp": 2, "expert": 4})
    l4.save_checkpoint(jax.tree.map(np.asarray, model), tmp_path / "model")
    text = l4.load_checkpoint(
        tmp_path / "model",
        part="text",
        dtype=jnp.float32,
        mesh=mesh,
        rules=FSDP | EXPERT_REPLICATED_TOKENS,
    )
    assert text.embed_tokens.dtype == text.decoder.norm.weight.dtype == jnp.float32
    places = jax.tree.leaves(shardings(text, mesh, FSDP | EXPERT_REPLICATED_TOKENS))
    assert [leaf.sharding for leaf in jax.tree.leaves(text)] == places
    assert np.array_equal(text.embed_tokens, model.embed_tokens.astype(jnp.float32))


def test_rules_that_do_not_fit(tmp_path):
    model, mesh = toy_model(TEXT), make_mesh({"fsdp": 8})
    l4.save_checkpoint(model, tmp_path / "model")
    with pytest.raises(ValueError, match="A mesh and rules go together"):
        l4.load_checkpoint(tmp_path / "model", mesh=mesh)
    with pytest.raises(ValueError, match="A mesh and rules go together"):
        l4.load_checkpoint(tmp_path / "model", rules=FSDP)
    with pytest.raises(ValueError, match="hidden is sharded along nowhere"):
        l4.load_checkpoint(tmp_path / "model", mesh=mesh, rules={"hidden": "nowhere"})
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    with pytest.raises(ValueError, match="is float64, but must be one of float32, bfloat16, float"):
        l4.save_checkpoint(wide, tmp_path / "wide")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Counted:
    """A tensor that counts what is read of it."""

    def __init__(self, content):
        self.content, self.read = content, 0

    def __getitem__(self, index):
        part = self.content[index]
        self.read += part.size
        return part


def test_any_part_is_read_once_and_written_in_its_place():
    rng = random.Random(0)
    for _ in range(300):
        axes = [tuple(rng.choices((1, 2, 3, 6), k=rng.randint(1, 3))) for _ in range(3)]
        shape = tuple(size for joined in axes for size in joined)
        tensor = Counted(np.arange(np.prod(shape)).reshape([np.prod(joined) for joined in axes]))
        starts = [rng.randrange(size) for size in shape]
        index = tuple(
            slice(start, rng.randint(start + 1, size))
            for start, size in zip(starts, shape, strict=True)
        )
        read = reader(tensor, axes)
        part = read(index)
        assert np.array_equal(part, tensor.content.reshape(shape)[index])
        assert read(index) is part
        assert tensor.read == part.size

        file, truth = io.BytesIO(bytes(5 + tensor.content.nbytes)), np.zeros(shape, int)
        write_part(file, 5, shape, index, part)
        truth[index] = part
        assert file.getvalue()[5:] == truth.tobytes()


TWO_PROCESSES = """
import json, resource, sys
import jax
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
import llama4_eqx as l4
from llama4_eqx.checkpoints import safetensors_reading
from llama4_eqx.distributed import EXPERT_REPLICATED_TOKENS, FSDP

read = 0
class Slice:
    def __init__(self, view): self.view = view
    def __getattr__(self, name): return getattr(self.view, name)
    def __getitem__(self, index):
        global read
        part = self.view[index]
        read += part.nbytes
        return part

class Opened:
    def __init__(self, *args, **options): self.source = checkpoint_open(*args, **options)
    def __enter__(self): self.source.__enter__(); return self
    def __exit__(self, *error): self.source.__exit__(*error)
    def __getattr__(self, name): return getattr(self.source, name)
    def get_slice(self, name): return Slice(self.source.get_slice(name))

checkpoint_open, safetensors_reading.safe_open = safetensors_reading.safe_open, Opened
def load(devices):
    devices = np.array(jax.devices())[np.array(devices).reshape(2, 4)]
    mesh = jax.sharding.Mesh(devices, ("fsdp", "expert"))
    return l4.load_checkpoint(folder + "/whole", mesh=mesh, rules=FSDP | EXPERT_REPLICATED_TOKENS)

model = load(range(8))
share = read
assert not model.embed_tokens.is_fully_addressable
l4.save_checkpoint(model, folder + "/saved", max_shard_bytes=500_000)
# Here a process's parts of the experts lie across from each other.
l4.save_checkpoint(load([0, 1, 4, 5, 6, 7, 2, 3]), folder + "/across", max_shard_bytes=500_000)
if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    l4.save_checkpoint(model, folder + "/saved", overwrite=True)
except OSError as error:
    print(json.dumps([share, str(error)]))
"""


def test_two_processes(tmp_path):
    """Each reads its half and writes its half; and what only one of them can't write, both tell."""
    model = toy_model(TEXT, jnp.bfloat16)
    l4.save_checkpoint(model, tmp_path / "whole", max_shard_bytes=500_000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), port]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen([*command, index], env=environment, stdout=subprocess.PIPE, text=True)
        for index in "01"
    ]
    told = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert [read for read, _ in told] == [size // 2, size // 2]
    assert same_files(tmp_path / "whole", tmp_path / "saved")
    assert same_files(tmp_path / "whole", tmp_path / "across")
    for _, error in told:
        assert "File too large" in error
        assert "What was there before is unchanged" in error
    assert "on process 1" in told[0][1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "saved", "across"}
