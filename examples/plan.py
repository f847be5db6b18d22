"""What each device of a mesh will hold and send: Scout or Maverick at full size, on any machine.

    python examples/plan.py                                                 # training Scout on 256
    python examples/plan.py maverick --mesh "data=2 fsdp=64 expert=8" --seq 4096
    python examples/plan.py scout serve --mesh "tensor=8 expert=2" --rows 32 --seq 131072
    python examples/plan.py scout serve --topology v6e:4x4 --mesh "tensor=8 expert=2" --seq 8192
    python examples/plan.py scout serve --topology v5e:4x4 --seq 8192 --weights int8
    python examples/plan.py scout serve --topology h100:8 --mesh "tensor=8" --seq 8192

The step is lowered and compiled for as many fake devices, from shapes alone, and nothing of it is
run. With a `--topology` it is compiled for those TPUs or GPUs, of which none need be there: it
takes their compiler (`pip install 'llama4_eqx[tpu-plan]'`, or `[gpu-plan]`). A mesh axis is called
what the preset of its name cuts; tokens go to their experts in training, and are the same for all
experts in serving. The vision encoder, a small part, is left out. A picture of who holds what goes
into runs/plan.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered
from jax.typing import DTypeLike
from plan_picture import draw
from plan_topology import TopologyPlan, plan_topology, tell_topology

import llama4_eqx as l4
from llama4_eqx.distributed import (
    CONTEXT,
    DATA,
    EXPERT_ALL_TO_ALL,
    EXPERT_REPLICATED_TOKENS,
    FSDP,
    SEQUENCE,
    TENSOR,
    Collective,
    Rules,
    abstract_sharded,
    batch_sharding,
    collectives,
)
from llama4_eqx.distributed.topologies import HbmError, topology_mesh
from llama4_eqx.lowering import lower
from llama4_eqx.training import init_train_state, make_train_step, next_token_loss

GIB = 2**30
# Compilers for CPUs make float32 of bfloat16, but leave float16 as it is.
SIXTEEN_BITS = jnp.float16
DEFAULTS = {
    ("scout", "train"): ("fsdp=64 expert=4", 8192),
    ("scout", "serve"): ("tensor=8 expert=2", 131_072),
    ("maverick", "train"): ("fsdp=16 expert=16", 8192),
    ("maverick", "serve"): ("tensor=8 expert=8", 131_072),
}
WEIGHTS = {
    "bfloat16": None,
    "int8": l4.Quantization(),
    "float8": l4.Quantization(dtype=jnp.float8_e4m3fn),
    "int4": l4.Quantization(dtype=jnp.int4),
}
DIFFERENCES = """
How an accelerator differs. Temporaries (gradients and activations are among them): its compiler
fuses more and plans memory anew, and runs experts through ragged_dot, not a loop over blocks; what
this one needs is an upper bound at best. Collectives: it may join some and run them beside
products, which changes their number and not their bytes. float16 stands for bfloat16, of which
compilers for CPUs make float32."""


@dataclass(frozen=True)
class Plan:
    """Bytes on each device, by what they are for, and what a run of the program sends."""

    held: dict[str, int]
    temporary: int
    sent: list[Collective]
    model: l4.Llama4


@dataclass(frozen=True)
class Job:
    """A program to be compiled, its model, and the bytes that it needs on each device."""

    program: Lowered
    model: l4.Llama4
    held: dict[str, int]


def training(
    config: l4.Llama4Config,
    mesh: Mesh,
    rows: int,
    seq: int,
    *,
    dtype: DTypeLike = SIXTEEN_BITS,
    token_block: int = 1024,
) -> Job:
    """One step of AdamW over `rows` of `seq` tokens; parameters in float32, products in `dtype`.

    Of each layer only its input is kept for the backward pass.
    """
    rules = rules_of(mesh, EXPERT_ALL_TO_ALL)
    optimizer = optax.adamw(1e-4)

    def loss_function(model, tokens, key):
        loss = next_token_loss(model, tokens, remat="full", token_block=token_block, key=key).token
        return loss.total, loss.num_tokens, None

    def make():
        model = l4.Llama4(config, key=jax.random.key(0))
        return init_train_state(model, optimizer, key=jax.random.key(1))

    state = abstract_sharded(make, mesh, rules)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0, compute_dtype=dtype)
    tokens = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=batch_sharding(mesh, rules))
    parameters = bytes_here(state.model)
    stream = PartitionSpec(None, rules["batch"], rules["seq"] + rules["residual"], None)
    inputs = jax.ShapeDtypeStruct(
        (config.text_config.num_hidden_layers, rows, seq, config.text_config.hidden_size),
        dtype,
        sharding=NamedSharding(mesh, stream),
    )
    held = {
        "parameters": parameters,
        "optimiser": bytes_here(state.opt_state),
        "gradients": parameters,
        "activations: each layer's input": bytes_here(inputs),
    }
    return Job(step.lower(state, tokens), state.model, held)


def serving(
    config: l4.Llama4Config,
    mesh: Mesh,
    rows: int,
    seq: int,
    *,
    dtype: DTypeLike = SIXTEEN_BITS,
    unstacked: bool = False,
    quantization: l4.Quantization | None = None,
) -> Job:
    """Decoding one token of each row, with `seq` tokens in the cache; all in `dtype`, but for
    quantised weights."""
    rules = rules_of(mesh, EXPERT_REPLICATED_TOKENS)

    def make():
        model = l4.Llama4(config, dtype=dtype, key=jax.random.key(0))
        model = model.unstacked() if unstacked else model
        return model if quantization is None else l4.quantize(model, quantization)

    model = abstract_sharded(make, mesh, rules)
    cache = abstract_sharded(
        partial(eqx.filter_eval_shape, model.empty_cache, (rows,), seq), mesh, rules
    )
    place = NamedSharding(mesh, PartitionSpec(*batch_sharding(mesh, rules).spec[:1]))
    token = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)
    program = lower(l4.decode_step, model, token, cache, donate=2)
    return Job(program, model, {"parameters": bytes_here(model), "cache": bytes_here(cache)})


def temporaries(program: Compiled) -> int:
    """Bytes that the program needs beside its arguments and results."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def rules_of(mesh: Mesh, experts: Rules) -> Rules:
    """The presets of the mesh's axes, joined."""
    presets = {
        "data": DATA,
        "fsdp": FSDP,
        "tensor": TENSOR | SEQUENCE,
        "expert": experts,
        "context": CONTEXT,
    }
    if unknown := set(mesh.axis_names) - set(presets):
        raise SystemExit(f"No preset cuts {', '.join(unknown)}: axes are {', '.join(presets)}.")
    joined = Rules()
    for name in mesh.axis_names:
        joined |= presets[name]
    return joined


def bytes_here(tree: object) -> int:
    """Of all arrays of the tree what one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.ndim
    )


def tell(plan: Plan, tokens: int, devices: int) -> None:
    """Prints the plan of a step that takes in so many tokens, on so many devices."""
    print("\nEach device holds, in GiB")
    for what, size in plan.held.items():
        print(f"  {what:34} {size / GIB:10.3f}")
    print(f"  {'temporaries, as compiled for a CPU':34} {plan.temporary / GIB:10.3f}")

    print("\nEach device sends in a step, in MiB, if all goes around in rings")
    sent: dict[tuple[str, ...], float] = defaultdict(float)
    times, later = sent.copy(), sent.copy()
    for one in plan.sent:
        kind = one.kind, " ".join(one.axes), "16 bits" if one.dtype == "float16" else one.dtype
        sent[kind] += one.sent * (one.times or 0)
        times[kind] += one.times or 0
        later[kind] += one.sent if one.times is None else 0
    for kind, size in sorted(sent.items(), key=itemgetter(1), reverse=True):
        if size + later[kind] < 2**20 / 100:
            continue
        name, axes, dtype = kind
        print(
            f"  {name:14} {dtype:8} along {axes:12} {times[kind]:6.0f} times {size / 2**20:12,.2f}"
        )
        if later[kind]:
            print(f"    and {later[kind] / 2**20:,.2f} for each round that uneven routing adds")
    total = sum(sent.values())
    print(f"  all together: {total / 2**20:,.2f}, or {total * devices / tokens:,.0f} bytes a token")
    print(DIFFERENCES)


def main(arguments: list[str] | None = None) -> Plan | TopologyPlan:
    """Plans what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", choices=("scout", "maverick"), default="scout")
    parser.add_argument("job", nargs="?", choices=("train", "serve"), default="train")
    parser.add_argument("--mesh", help='such as "fsdp=64 expert=4"')
    parser.add_argument("--topology", help='what to compile for, such as "v5p:4x4x4" or "h100:8"')
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16", help="when serving")
    parser.add_argument("--rows", type=int, help="of a batch; by default one a device")
    parser.add_argument("--seq", type=int, help="tokens in a row, or in the cache")
    options = parser.parse_args(arguments)
    axes, seq = DEFAULTS[options.model, options.job]
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", options.mesh or axes)}
    if not sizes:
        parser.error(f'a mesh is written as "{axes}", not as "{options.mesh}"')
    shape, seq = tuple(sizes.values()), options.seq or seq
    rows = options.rows or math.prod(shape)
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has
    config = getattr(l4.Llama4Config, options.model)()
    text = l4.Llama4Config(config.text_config)
    job: Callable[..., Job] = training
    if options.job == "serve":
        job = partial(serving, quantization=WEIGHTS[options.weights])
    elif options.weights != "bfloat16":
        parser.error("--weights is for serving: a training step has float32 parameters.")
    devices = " × ".join(f"{name} {size}" for name, size in sizes.items())
    print(f"{options.model}'s decoder, {options.job}, {devices}, {rows} rows of {seq:,} tokens")
    try:  # errors: axes that can't be cut so, a slice that there isn't
        if options.topology:
            mesh = topology_mesh(options.topology, sizes)
            best = {"train": {"token_block": 4096}, "serve": {"unstacked": True}}[options.job]
            made = job(text, mesh, rows, seq, dtype=jnp.bfloat16, **best)
            tokens = rows * seq if options.job == "train" else rows
            plan = plan_topology(made.program, made.model, made.held, mesh, tokens, options.job)
            tell_topology(plan, options.topology)
            return plan
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
        mesh = jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))
        made = job(text, mesh, rows, seq)
    except (HbmError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    program = made.program.compile()
    plan = Plan(made.held, temporaries(program), collectives(program, mesh), made.model)
    tell(plan, rows * seq if options.job == "train" else rows, mesh.size)
    picture = Path("runs/plan") / f"{options.model}-{options.job}.png"
    draw(plan.model, mesh, picture)
    print(f"\nWho holds what: {picture}")
    return plan


if __name__ == "__main__":
    main()
