"""Programs compiled for GPUs that aren't here: the kernels that they run, and what they need.

JAX's plugin for CUDA and NVIDIA's libraries are 5 GB, so that it isn't among what tests install:
`pip install -e '.[gpu-plan]'`.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import llama4_eqx as l4
from llama4_eqx.distributed import (
    EXPERT_ALL_TO_ALL,
    EXPERT_REPLICATED_TOKENS,
    FSDP,
    TENSOR,
    abstract_sharded,
)
from llama4_eqx.distributed.program_costs import program_costs
from llama4_eqx.distributed.topologies import HbmError, compile_for_topology, topology_mesh
from llama4_eqx.lowering import lower
from tests.distributed.compiled import size, training_step

SCOUT = replace(l4.Llama4Config.scout().text_config, num_hidden_layers=4)
compiles = pytest.mark.skipif(
    find_spec("jax_cuda12_plugin") is None, reason="the compiler for GPUs isn't installed"
)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, l4.Quantization()], ids=["bfloat16", "int8"])
def test_decoding_reads_each_weight_and_cache_once(quantization):
    """Four of Scout's layers, 8 rows with 8,192 tokens each, on eight H100."""
    mesh = topology_mesh("h100:8", {"tensor": 4, "expert": 2})
    rules = TENSOR | EXPERT_REPLICATED_TOKENS

    def make():
        config = l4.Llama4Config(SCOUT)
        model = l4.Llama4(config, dtype=jnp.bfloat16, key=jax.random.key(0)).unstacked()
        return model if quantization is None else l4.quantize(model, quantization)

    model = abstract_sharded(make, mesh, rules)
    empty = partial(eqx.filter_eval_shape, model.empty_cache, (8,), 8192)
    cache = abstract_sharded(empty, mesh, rules)
    token = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, P()))
    program = compile_for_topology(lower(l4.decode_step, model, token, cache, donate=2), mesh)
    read_once = size(model) - size(model.embed_tokens) + size(cache)
    assert program_costs(program).hbm_bytes <= 1.1 * read_once
    assert program.memory_analysis().temp_size_in_bytes < 0.01 * read_once


@compiles
@pytest.mark.slow
def test_training_runs_the_kernels_of_hopper():
    """Its temporaries are the gradients, the head's logits, and little else: no scores of all pairs
    of tokens, and no product of all rows with all experts."""
    mesh = topology_mesh("h100:8", {"fsdp": 2, "expert": 4})
    config = replace(SCOUT, num_hidden_layers=1, no_rope_layers=None)
    program, model = training_step(config, mesh, FSDP | EXPERT_ALL_TO_ALL, 8, 8192)
    text = program.as_text()
    for kernel in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "mosaic_gpu"):
        assert f'custom_call_target="{kernel}' in text
    vocab, hidden, block = SCOUT.vocab_size, SCOUT.hidden_size, 1024
    head = (4 + 2) * vocab * hidden + (4 + 4 + 2) * block * vocab  # its gradient and weights too
    gradients = size(model)
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * (gradients + head)


@compiles
def test_a_program_that_does_not_fit():
    mesh = topology_mesh("h200:2x4", {"x": 8})
    x = jax.ShapeDtypeStruct((8, 40 * 2**30), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    with pytest.raises(HbmError, match=r"needs 160\.00G of HBM a device, which has 139\.80G"):
        compile_for_topology(jax.jit(lambda x: x + 1).lower(x), mesh)


@compiles
def test_another_number_of_devices():
    with pytest.raises(ValueError, match="h100:4x8 has 32 devices, and x 8 are another number"):
        topology_mesh("h100:4x8", {"x": 8})


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h200:8x", "h100:2x2x2"])
def test_gpus_are_written_so(topology):
    with pytest.raises(ValueError, match=f'GPUs are written as ".*:4x8", not as "{topology}"'):
        topology_mesh(topology, {"x": 8})
