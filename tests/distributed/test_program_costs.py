"""Costs of small programs compiled for a TPU, against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_eqx.distributed.program_costs import ProgramCosts, program_costs
from llama4_eqx.distributed.topologies import compile_for_topology, topology_mesh

pytest.importorskip("libtpu", reason="libtpu is made for Linux on x86 alone")
M, K, N = 4096, 2048, 8192


def costs(function, *shapes, donate=()) -> ProgramCosts:
    mesh = topology_mesh("v5p:2x2x1", {"x": 4})
    place = NamedSharding(mesh, P())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    program = jax.jit(function, donate_argnums=donate, out_shardings=place).lower(*arrays)
    return program_costs(compile_for_topology(program, mesh))


def test_a_product():
    found = costs(jnp.matmul, (M, K), (K, N))
    assert found.flops == 2 * M * K * N
    assert found.hbm_bytes == pytest.approx(2 * (M * K + K * N + M * N), rel=0.01)


def test_a_product_in_a_loop():
    """Of a stack, each step reads one matrix; what is carried may stay on the chip."""
    found = costs(lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w)[0], (8, K), (6, K, K))
    assert found.flops == 6 * 2 * 8 * K * K
    weights = 6 * 2 * K * K
    assert weights <= found.hbm_bytes <= 3.1 * weights  # a scan may copy each matrix


def test_an_update_in_place():
    """Neither reads nor writes what it leaves."""
    found = costs(
        lambda ring, row: lax.dynamic_update_slice(ring, row, (5, 0)), (M, N), (1, N), donate=0
    )
    assert found.hbm_bytes < 0.01 * 2 * M * N
    assert costs(lambda x: x[7] + 1, (M, N)).hbm_bytes < 0.01 * 2 * M * N


def test_batches_are_no_sums():
    """TPUs write a product of batches as a convolution whose window goes over these."""
    found = costs(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (5, 256, 512), (5, 512, 128))
    assert found.flops == 2 * 5 * 256 * 512 * 128
