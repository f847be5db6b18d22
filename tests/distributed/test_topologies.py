"""Programs compiled for slices of TPUs that aren't here: what they read, compute and send.

They say what the compiler makes of the model, which no other test sees.
"""

import json
import re
from dataclasses import replace
from functools import partial

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
    SEQUENCE,
    TENSOR,
    abstract_sharded,
    collectives,
)
from llama4_eqx.distributed.program_costs import program_costs
from llama4_eqx.distributed.topologies import HbmError, compile_for_topology, topology_mesh
from llama4_eqx.lowering import lower
from tests.distributed.compiled import size, training_step
from tests.examples.running import python, refusal

pytest.importorskip("libtpu", reason="libtpu is made for Linux on x86 alone")
pytestmark = pytest.mark.slow

SCOUT = l4.Llama4Config.scout().text_config
SMALL = replace(
    SCOUT,
    num_hidden_layers=1,
    hidden_size=512,
    intermediate_size=1024,
    intermediate_size_mlp=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=2048,
    attention_chunk_size=512,
)


# More of few bits, since the compiler prefetches values into VMEM, and writes them back as a whole.
@pytest.mark.parametrize(
    ("quantization", "cache_dtype", "limit"),
    [
        (None, None, 1.05),
        (l4.Quantization(), None, 1.2),
        (None, "int8", 1.05),
        (l4.Quantization(dtype=jnp.int4), None, 1.3),
    ],
    ids=["bfloat16", "int8", "cache int8", "int4"],
)
def test_decoding_reads_each_weight_and_cache_once(quantization, cache_dtype, limit):
    """A layer of Scout's with RoPE and one without, 16 rows with 8,192 tokens each, on sixteen
    chips."""
    mesh = topology_mesh("v6e:4x4", {"tensor": 8, "expert": 2})
    rules = TENSOR | EXPERT_REPLICATED_TOKENS
    config = l4.Llama4Config(replace(SCOUT, num_hidden_layers=2, no_rope_layers=(1, 0)))

    def make():
        model = l4.Llama4(config, dtype=jnp.bfloat16, key=jax.random.key(0)).unstacked()
        return model if quantization is None else l4.quantize(model, quantization)

    model = abstract_sharded(make, mesh, rules)
    empty = partial(eqx.filter_eval_shape, model.empty_cache, (16,), 8192, dtype=cache_dtype)
    cache = abstract_sharded(empty, mesh, rules)
    token = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=NamedSharding(mesh, P()))
    program = compile_for_topology(lower(l4.decode_step, model, token, cache, donate=2), mesh)
    read_once = size(model) - size(model.embed_tokens) + size(cache)
    assert program_costs(program).hbm_bytes <= limit * read_once
    assert program.memory_analysis().temp_size_in_bytes < max(0.1, (limit - 1) / 5) * read_once


def test_a_training_step_computes_what_the_model_does():
    """No expert's weight gradient is made from all tokens, attention is splash attention, and what
    uneven routing may need costs nothing where it doesn't."""
    rows, seq = 4, 1024
    mesh = topology_mesh("v5p:2x2x1", {"fsdp": 2, "expert": 2})
    program, _ = training_step(SMALL, mesh, FSDP | EXPERT_ALL_TO_ALL, rows, seq)
    of_token = 20 * 128 * 512 + 3 * 512 * 1024 + 16 * 512  # attention, shared expert, router
    # A round has room for half as many tokens again; attention kernels don't say what they compute.
    # Of a single layer, the compiler keeps what a scan would have recomputed.
    expected = 6 * rows * seq / 4 * (of_token + 1.5 * 3 * 512 * 1024 + 2048 * 512)
    assert program_costs(program).flops == pytest.approx(expected, rel=0.02)
    text = program.as_text()
    assert "tgmm" in text
    assert "splash_mha_dkv" in text


def test_rows_between_layers_are_scattered():
    """With sequence parallelism nothing of the tokens' features is all-reduced."""
    mesh = topology_mesh("v5p:2x2x1", {"fsdp": 2, "tensor": 2})
    program, _ = training_step(SMALL, mesh, FSDP | TENSOR | SEQUENCE, 4, 1024)
    kinds = [
        one.kind
        for one in collectives(program, mesh)
        if one.axes == ("tensor",) and one.shape[-1:] == (512,) and len(one.shape) == 3
    ]
    assert "all-reduce" not in kinds
    assert {"reduce-scatter", "all-gather"} <= {*kinds}


def test_tokens_after_a_cache_are_read_by_the_kernel():
    """Its results for the cache and for the new tokens, with the logsumexp that merges them."""
    mesh, rules = (
        topology_mesh("v6e:2x2", {"tensor": 2, "expert": 2}),
        TENSOR | EXPERT_REPLICATED_TOKENS,
    )

    def make():
        return l4.Llama4(l4.Llama4Config(SMALL), dtype=jnp.bfloat16, key=jax.random.key(0))

    model = abstract_sharded(make, mesh, rules)
    cache = abstract_sharded(
        partial(eqx.filter_eval_shape, model.empty_cache, (2,), 4096), mesh, rules
    )
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=NamedSharding(mesh, P()))

    def read(model, tokens, cache):
        output = model(tokens, cache=cache)
        return output.hidden, output.cache

    text = compile_for_topology(lower(read, model, tokens, cache, donate=2), mesh).as_text()
    kernels = re.findall(r"%(splash_mha_fwd_segmented_residuals[.\d]*) = ", text)
    assert len(kernels) == 2


def test_a_program_that_does_not_fit():
    mesh = topology_mesh("v6e:4x4", {"x": 16})
    x = jax.ShapeDtypeStruct((16, 20 * 2**30), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    with pytest.raises(HbmError, match=r"needs \d+\.\d+G of HBM a device, which has 31\.\d+G"):
        compile_for_topology(jax.jit(lambda x: x + 1).lower(x), mesh)


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        ("v9:4x4", "neither a slice of TPUs"),
        ("v6e", "neither a slice of TPUs"),
        ("v6e:8x8", "v6e:8x8 has 64 devices, and x 4 × y 4 are another number"),
    ],
)
def test_a_slice_that_there_is_not(topology, sentence):
    with pytest.raises(ValueError, match=sentence):
        topology_mesh(topology, {"x": 4, "y": 4})


def test_the_example(tmp_path):
    """It says what a device holds, reads and sends, of eight layers; and a slice's size if the mesh
    has another."""
    code = (
        "import json, sys, plan, llama4_eqx as l4\n"
        "from dataclasses import replace\n"
        "scout = l4.Llama4Config.scout()\n"
        "text = replace(scout.text_config, num_hidden_layers=8)\n"
        "l4.Llama4Config.scout = lambda: replace(scout, text_config=text)\n"
        "p = plan.main(sys.argv[1:])\n"
        "print(json.dumps([p.costs.hbm_bytes / p.ideal_bytes, p.peak, sum(p.held.values())]))"
    )
    serve = ["scout", "serve", "--seq", "1024", "--mesh", "tensor=8 expert=2", "--topology"]
    *said, told = python("-c", code, *serve, "v6e:4x4", cwd=tmp_path).splitlines()
    ratio, peak, held = json.loads(told)
    assert 0.9 < ratio < 1.1
    assert 2.9e9 < peak < 3.12e9
    assert held < peak < 1.05 * held
    assert any("all-reduce" in line and "along tensor" in line for line in said)
    refused = refusal("plan.py", *serve, "v6e:8x8", cwd=tmp_path)
    assert "v6e:8x8 has 64 devices" in refused
    assert "Traceback" not in refused
