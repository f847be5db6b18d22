"""Damaged safetensors files: an error that names the file, never another exception."""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama4_eqx as l4
from llama4_eqx.checkpoints.safetensors_reading import SINGLE, read_headers
from tests.checkpoints.killed_save import tiny_model
from tests.checkpoints.test_folders import json_values


def file_with(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "X", "", 3]) | json_values,
        "shape": st.lists(st.integers(-1, 2**64) | st.integers(0, 8), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(0, 2**64) | st.integers(0, 99), max_size=3),
    },
)
headers = st.one_of(
    st.binary(max_size=64),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(["a", "lm_head.weight", "__metadata__"]), entry | json_values
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(headers, st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=40))
def test_a_damaged_header_is_an_error_and_takes_no_memory(tmp_path, header, size, data):
    (tmp_path / SINGLE).write_bytes(file_with(header, size) + data)
    found, told = {}, SINGLE
    try:
        found = read_headers(tmp_path)
    except (l4.CheckpointError, OSError) as error:
        told = str(error)
    assert SINGLE in told
    for stored in found.values():
        assert np.prod(stored.shape, dtype=object) <= 8 * len(data)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    l4.save_checkpoint(tiny_model(1.0), folder / "model")
    return folder / "model"


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_flipped_or_cut_file_is_an_error_or_loads(good, tmp_path, data):
    """Of a whole checkpoint: flips in the header or before it, and cuts anywhere."""
    content = bytearray((good / SINGLE).read_bytes())
    header = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, header + 7))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    (tmp_path / SINGLE).write_bytes(content)
    lines, shapes = [], []
    try:
        shapes = [leaf.shape for leaf in jax.tree.leaves(l4.load_checkpoint(tmp_path))]
    except (l4.CheckpointError, OSError) as error:
        lines = str(error).splitlines()
    assert len(lines) <= 22
    assert lines or shapes == [leaf.shape for leaf in jax.tree.leaves(tiny_model(1.0))]
