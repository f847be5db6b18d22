"""For `plan.py --topology`: what a program compiled for TPUs or GPUs needs and does."""

import math
from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import jax
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import PyTree

import llama4_eqx as l4
from llama4_eqx.distributed import Collective, collectives
from llama4_eqx.distributed.hlo import read_hlo
from llama4_eqx.distributed.program_costs import ProgramCosts, program_costs
from llama4_eqx.distributed.topologies import GPUS, compile_for_topology, memory_needed
from llama4_eqx.layers.quantized import weight_shapes

GB = 1e9
# Of one device: GB/s of HBM, and 10¹² bfloat16 operations a second, from the makers' data sheets.
CHIPS = {
    "v5e": (819, 197),
    "v5p": (2765, 459),
    "v6e": (1640, 918),
    "tpu7x": (3690, 1154),  # a chip has two devices
    "h100": (3350, 989),
    "h200": (4800, 989),
}


@dataclass(frozen=True)
class TopologyPlan:
    """Of one device: bytes that it holds, by what they are for, its `arguments` and temporaries,
    and together at most the `peak`; the `costs`; and the bytes and operations that no program can
    do without: weights, caches and layers' inputs, and the model's own products."""

    held: dict[str, int]
    arguments: int
    temporary: int
    peak: int
    costs: ProgramCosts
    ideal_bytes: float
    ideal_flops: float
    sent: list[Collective]


def plan_topology(
    lowered: Lowered,
    model: l4.Llama4,
    held: dict[str, int],
    mesh: Mesh,
    tokens: int,
    job: Literal["train", "serve"],
) -> TopologyPlan:
    """Compiles a step that takes in so many tokens. Errors: see `compile_for_topology`."""
    program = compile_for_topology(lowered, mesh)
    text = read_hlo(program)
    flops = 2 * active_parameters(model) * tokens / mesh.size
    if job == "serve":
        unread = 0 if model.lm_head is None else used_bytes(model.embed_tokens, mesh)
        ideal_bytes = held["parameters"] - unread + held["cache"]
    else:
        flops *= 3
        # AdamW reads and writes its state. Weights are gathered, and read, for the forward pass and
        # the backward one, where the layer runs again and inputs and weights get their gradients.
        ideal_bytes = 2 * (held["parameters"] + held["optimiser"]) + 7 * used_bytes(model, mesh)
        ideal_bytes += 3 * held["activations: each layer's input"]
    return TopologyPlan(
        held,
        *memory_needed(program),
        program_costs(text),
        ideal_bytes,
        flops,
        collectives(text, mesh),
    )


def used_bytes(tree: PyTree, mesh: Mesh) -> float:
    """Bytes that a device computes with, in bfloat16: what FSDP shards in storage is gathered."""
    gathered = mesh.shape.get("fsdp", 1)
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        stored = any("fsdp" in (names or ()) for names in leaf.sharding.spec)
        total += 2 * here * (gathered if stored else 1)
    return total


def active_parameters(model: l4.Llama4) -> int:
    """The parameters that a token is multiplied with."""
    text = model.config.text_config
    idle = text.num_local_experts - text.num_experts_per_tok
    of_expert = 3 * text.hidden_size * text.intermediate_size
    layers = sum(text.layer_is_moe(i) for i in range(text.num_hidden_layers))
    table = 0 if model.lm_head is None else model.embed_tokens.size
    everything = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weight_shapes(model)))
    return everything - table - layers * idle * of_expert


def tell_topology(plan: TopologyPlan, topology: str) -> None:
    """Prints the plan."""
    print("\nEach device holds, in GB")
    for what, size in plan.held.items():
        if what != "gradients" and not what.startswith("activations"):
            print(f"  {what:24} {size / GB:10.3f}")
    print(f"  {'temporaries':24} {plan.temporary / GB:10.3f}")
    print(f"  {'together, at most':24} {plan.peak / GB:10.3f}")

    costs = plan.costs
    ratio = costs.hbm_bytes / plan.ideal_bytes
    print("\nEach device does in a step")
    print(f"  HBM, read and written    {costs.hbm_bytes / GB:10.1f} GB, {ratio:.2f} × the least")
    flops, least = costs.flops / 1e12, plan.ideal_flops / 1e12
    kind = topology.partition(":")[0]
    if kind in GPUS:  # whose kernels don't say what they compute
        print(f"  products outside kernels {flops:10.2f} T, of the model's {least:.2f}")
        flops = max(flops, least)
    else:
        print(f"  products                 {flops:10.2f} T, {flops / least:.2f} × the model's own")
    if kind in CHIPS:
        bandwidth, rate = CHIPS[kind]
        memory, compute = costs.hbm_bytes / bandwidth / GB, flops / rate
        print(f"  at the chip's rates      {1e3 * memory:10.1f} ms, and {1e3 * compute:.1f} ms")
    if costs.cycles:
        print(
            f"  the compiler estimates   {costs.cycles / 1e6:10.1f} million cycles but for kernels"
        )

    print("\nEach device sends in a step, in MB, if all goes around in rings")
    sent: dict[tuple[str, ...], float] = defaultdict(float)
    times: dict[tuple[str, ...], int] = defaultdict(int)
    for one in plan.sent:
        kind = one.kind, " ".join(one.axes), one.dtype
        sent[kind] += one.sent * (one.times or 0)
        times[kind] += one.times or 0
    for kind, size in sorted(sent.items(), key=itemgetter(1), reverse=True):
        if size > 1e4:
            name, axes, dtype = kind
            along = f"along {axes}"
            print(f"  {name:14} {dtype:8} {along:18} {times[kind]:6} times {size / 1e6:12,.2f}")
