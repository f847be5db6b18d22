"""What presets' docstrings say about bytes, against programs compiled for 8, 64, 256 devices."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Every axis can be cut among 256 devices. Nothing of this is run.
SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "no_rope_layers": (0, 0, 0, 0),
    "num_attention_heads": 256,
    "num_key_value_heads": 256,
    "head_dim": 8,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "vocab_size": 512,
    "num_local_experts": 256,
    "num_experts_per_tok": 1,
}
# Rows and tokens of a batch, for each device along the axis if they are cut.
BATCHES = {
    "DATA": (4, 32),
    "FSDP": (4, 32),
    "TENSOR": (4, 32),
    "TENSOR | SEQUENCE": (4, 256),
    "EXPERT_REPLICATED_TOKENS": (4, 32),
    "EXPERT_ALL_TO_ALL": (32, 32),
    "CONTEXT": (4, 32),
}
PROGRAM = f"""
import json, sys
from collections import defaultdict
from dataclasses import replace
import jax, optax
devices = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
import jax.numpy as jnp
import llama4_eqx as l4
from llama4_eqx import distributed
from llama4_eqx.training import next_token_loss
from llama4_eqx.distributed import collectives
from llama4_eqx.training import init_train_state, make_train_step

config = l4.Llama4Config(replace(l4.Llama4Config.tiny().text_config, **{SIZES}))
optimizer = optax.sgd(0.1)

def loss_function(model, tokens, key):
    loss = next_token_loss(model, tokens).token
    return loss.total, loss.num_tokens, None

def make():
    key = jax.random.key(0)
    return init_train_state(l4.Llama4(config, key=key), optimizer, key=key)

found = {{}}
for name, (rows, seq) in {BATCHES}.items():
    rules = distributed.Rules()
    for preset in name.split(" | "):
        rules |= getattr(distributed, preset)
    (axis,) = {{axis for word in rules for axis in rules[word]}}
    mesh = jax.make_mesh((devices,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    state = distributed.abstract_sharded(make, mesh, rules)
    shape = rows * (devices if "batch" in rules else 1), seq * (devices if "seq" in rules else 1)
    place = distributed.batch_sharding(mesh, rules)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    sent = defaultdict(float)
    program = make_train_step(optimizer, loss_function).lower(state, tokens).compile()
    for one in collectives(program, mesh):
        sent[one.kind] += one.sent * (one.times or 0)
    found[name] = sent
print(json.dumps(found))
"""


@pytest.mark.parametrize("n", [8, 64, 256])
def test_bytes_sent_in_a_training_step(n):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(n)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sent = json.loads(result.stdout)

    b, o, layers, hidden, ff, vocab, experts = 4, (n - 1) / n, 4, 512, 512, 512, 256
    keys = 256 * 8  # kv_heads · head_dim
    rest = layers * (4 * hidden * keys + 3 * hidden * ff + 2 * hidden) + 2 * vocab * hidden + hidden
    routed = layers * (experts * (3 * hidden * ff + hidden))
    tokens = {name: rows * seq for name, (rows, seq) in BATCHES.items()}

    def check(name, **kinds):
        laws = {kind.replace("_", "-"): size for kind, size in kinds.items()}
        # What the laws leave out: scalars, the positions of tokens, and the ids of experts.
        for kind in laws | sent[name]:
            rel = 0.01 if kind in laws else 0
            assert sent[name].get(kind, 0) == pytest.approx(laws.get(kind, 0), rel=rel, abs=2**14)

    check("DATA", all_reduce=2 * o * (rest + routed) * b)
    gathered = rest + routed - vocab * hidden
    check(
        "FSDP",
        all_gather=o * (2 * gathered - vocab * hidden) * b,
        reduce_scatter=o * gathered * b,
        all_to_all=2 * o * tokens["FSDP"] * hidden * b,
    )
    check("TENSOR", all_reduce=(4 * layers + 2) * 2 * o * tokens["TENSOR"] * hidden * b)
    rows = o * tokens["TENSOR | SEQUENCE"] * hidden * b
    check(
        "TENSOR | SEQUENCE",
        all_gather=(6 * layers + 2) * rows,
        reduce_scatter=(4 * layers + 2) * rows,
        all_reduce=2 * o * (layers * (2 + experts) + 1) * hidden * b,
    )
    check(
        "EXPERT_REPLICATED_TOKENS",
        all_reduce=layers * 4 * o * tokens["EXPERT_REPLICATED_TOKENS"] * hidden * b,
        all_gather=layers * 2 * o * experts * hidden * b,
    )
    check(
        "EXPERT_ALL_TO_ALL",
        all_to_all=layers * 4 * 1.5 * o * tokens["EXPERT_ALL_TO_ALL"] * hidden * b,
        all_gather=layers * 2 * o * experts * hidden * b,
        reduce_scatter=layers * o * experts * hidden * b,
        all_reduce=2 * o * rest * b,
    )
    once = layers * 2 * (n - 1) * tokens["CONTEXT"] * keys * b
    check(
        "CONTEXT",
        all_gather=2 * once,
        reduce_scatter=once,
        all_reduce=2 * o * (rest + routed) * b,
    )
