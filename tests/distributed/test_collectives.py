"""What is read off compiled programs, against small ones whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama4_eqx.distributed import collectives
from llama4_eqx.lowering import lower


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_every_kind(mesh):
    """Bytes that a device sends in a ring of four, or of two, or of all eight."""

    def local(x):  # [8, 16] float32 on each device: 512 bytes
        whole = lax.all_gather(x, "y", tiled=True)
        scattered = lax.psum_scatter(whole, "y", tiled=True)
        swapped = lax.all_to_all(scattered, "x", 0, 1, tiled=True)
        passed = lax.ppermute(swapped, "y", [(i, (i + 1) % 4) for i in range(4)])
        return lax.psum(passed, ("x", "y"))

    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    split = jax.shard_map(local, mesh=mesh, in_specs=P(("x", "y")), out_specs=P())
    found = {one.kind: one for one in collectives(lower(split, x).compile(), mesh)}
    sent = {kind: (one.axes, one.devices, one.sent, one.times) for kind, one in found.items()}
    assert sent == {
        "all-gather": (("y",), 4, 3 * 512, 1),
        "reduce-scatter": (("y",), 4, 3 * 512, 1),
        "all-to-all": (("x",), 2, 512 / 2, 1),
        "collective-permute": (("y",), 2, 512, 1),
        "all-reduce": (("x", "y"), 8, 2 * 512 * 7 / 8, 1),
    }
    assert found["all-gather"].dtype == "float32"
    assert found["all-gather"].shape == (32, 16)


def test_loops(mesh):
    """A loop's collectives are counted as often as it runs, if that is known."""

    def local(x, n):
        def visit(_, x):
            return lax.psum(x, "x") * 0.5

        x = lax.fori_loop(0, 3, lambda i, x: lax.fori_loop(0, 5, visit, x), x)
        return lax.fori_loop(0, n, lambda i, x: lax.psum(x, "y") * 0.5, x)

    x, n = jax.ShapeDtypeStruct((8,), jnp.float16), jax.ShapeDtypeStruct((), jnp.int32)
    split = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives(lower(split, x, n).compile(), mesh)
    times = {one.axes: one.times for one in found}
    assert times == {("x",): 15, ("y",): None}
    assert {one.size for one in found} == {16}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("x",)),
        ("[2,4]<=[8]", ("y",)),
        ("[4,2]<=[2,4]T(1,0)", ("x",)),
        ("mesh['a'=8,'b'=1] {'a'}", ("x", "y")),
        ("mesh['a'=2,'b'=4] {'b'}", ("y",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("x",)),
    ],
)
def test_every_way_to_write_groups(mesh, groups, axes):
    text = f"""ENTRY %main (p: f32[4]) -> f32[4] {{
  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, dims={{0}}
}}"""
    (one,) = collectives(text, mesh)
    assert (one.axes, one.size) == (axes, 16)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("all-reduce(%p), replica_groups=somehow", "groups of devices in .*somehow"),
        ("all-gather-start(%p), channel_id=1", "groups of devices in .*channel_id"),
    ],
)
def test_what_is_not_understood(mesh, line, sentence):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4]{{0}} {line}\n}}"
    with pytest.raises(ValueError, match=sentence):
        collectives(text, mesh)
    with pytest.raises(ValueError, match="isn't compiled HLO"):
        collectives("module {}", mesh)


@pytest.mark.parametrize(
    ("computation", "fusion"), [("fused", "all-reduce-scatter.1"), ("all-reduce-scatter", "fusion")]
)
def test_asynchronous_and_fused_ones(mesh, computation, fusion):
    """As TPUs write them: two begun early, one with semaphores, and a reduce-scatter as a fusion,
    which either name tells."""
    sends = "(f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d)"
    text = f"""
%{computation} (q: f32[16]) -> f32[4] {{
  %q = f32[16]{{0}} parameter(0)
  %ar = f32[16]{{0}} all-reduce(%q), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%sum
  ROOT %slice = f32[4]{{0}} dynamic-slice(%ar, %i), dynamic_slice_sizes={{4}}
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %s = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%p), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}
  %d = f32[16]{{0}} all-gather-done(%s)
  %t = {sends}, source_target_pairs={{{{0,4}},{{4,0}}}}
  %e = f32[16]{{0}} collective-permute-done(%t)
  ROOT %{fusion} = f32[4]{{0}} fusion(%e), kind=kCustom, calls=%{computation}
}}"""
    found = [(one.kind, one.axes, one.shape, one.sent) for one in collectives(text, mesh)]
    assert found == [
        ("all-gather", ("y",), (16,), 48),
        ("collective-permute", ("x",), (16,), 64),
        ("reduce-scatter", ("y",), (4,), 48),
    ]
