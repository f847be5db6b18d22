"""Grouped experts: dense against a loop in numpy, all else against dense; and their memory."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama4_eqx.layers.grouped import grouped_mlp

HIDDEN, FF = 16, 24
TOLERANCE = 1e-5
# Group sizes, and the number of rows. Few shapes, as each is compiled.
GROUPS = {
    "even": ((8, 8, 8, 8, 8, 8), 48),
    "uneven": ((0, 3, 0, 17, 28, 0), 48),
    "huge": ((0, 0, 48, 0, 0, 0), 48),
    "nobody's rows": ((5, 0, 0, 7, 1, 0), 48),
    "nobody's only": ((0, 0, 0, 0, 0, 0), 48),
    "many blocks": ((100, 1, 301, 0), 410),
    "fewer rows than experts": ((0, 1, 0, 0, 1, 0, 0, 0), 3),
    "one expert": ((13,), 13),
    "one row": ((0, 1), 1),
    "no rows": ((0, 0), 0),
}


def operands(tokens: int, experts: int, *, hidden=HIDDEN, ff=FF, dtype=jnp.float32, seed=0):
    """Random rows, the three weights, and the derivative of the output."""
    keys = jax.random.split(jax.random.key(seed), 5)
    rows = jax.random.normal(keys[0], (tokens, hidden))
    gate, up = (jax.random.normal(key, (experts, hidden, ff)) * 0.3 for key in keys[1:3])
    down = jax.random.normal(keys[3], (experts, ff, hidden)) * 0.3
    d_out = jax.random.normal(keys[4], (tokens, hidden))
    return tuple(x.astype(dtype) for x in (rows, gate, up, down, d_out))


@partial(jax.jit, static_argnames="backend")
def run(rows, gate, up, down, d_out, sizes, backend):
    """The output, and the gradients of rows and weights."""

    def forward(rows, gate, up, down):
        return grouped_mlp(rows, gate, up, down, sizes, backend=backend)

    out, vjp = jax.vjp(forward, rows, gate, up, down)
    return out, *vjp(d_out)


def assert_close(values, truths, tolerance=TOLERANCE):
    """Relative to the largest value; where all are zero, exactly."""
    for value, truth in zip(values, truths, strict=True):
        value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
        assert value.shape == truth.shape
        error = np.abs(value - truth).max(initial=0)
        assert error <= tolerance * np.abs(truth).max(initial=0)


def loop(inputs, sizes):
    rows, gates, ups, downs = inputs
    out = np.zeros_like(rows)
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        gate, up = rows[row] @ gates[expert], rows[row] @ ups[expert]
        out[row] = (gate / (1 + np.exp(-gate)) * up) @ downs[expert]
    return out


@pytest.mark.parametrize("group", GROUPS)
def test_dense_is_a_loop_over_rows(group):
    """Its gradients are the slopes of the loop's output along a few random directions."""
    sizes, tokens = GROUPS[group]
    inputs = operands(tokens, len(sizes))
    out, *grads = run(*inputs, jnp.array(sizes), "dense")
    *exact, d_out = (np.asarray(x, np.float64) for x in inputs)
    assert_close([out], [loop(exact, sizes)])

    rng = np.random.default_rng(0)
    for moved in range(4):
        way = rng.normal(size=exact[moved].shape)
        ahead, behind = (
            [x + step * way if i == moved else x for i, x in enumerate(exact)]
            for step in (1e-4, -1e-4)
        )
        slope = ((loop(ahead, sizes) - loop(behind, sizes)) / 2e-4 * d_out).sum()
        terms = np.asarray(grads[moved], np.float64) * way
        assert abs(terms.sum() - slope) <= TOLERANCE * np.abs(terms).sum()


@pytest.mark.parametrize("backend", ["ragged", "blocked"])
@pytest.mark.parametrize("group", GROUPS)
def test_backends_equal_dense(group, backend):
    sizes, tokens = GROUPS[group]
    inputs = operands(tokens, len(sizes))
    values = run(*inputs, jnp.array(sizes), backend)
    assert_close(values, run(*inputs, jnp.array(sizes), "dense"))
    # Where nobody asks for gradients, nothing is kept for them.
    undifferentiated = jax.jit(grouped_mlp, static_argnames="backend")
    assert_close([undifferentiated(*inputs[:4], jnp.array(sizes), backend=backend)], values[:1])
    for nobody in (x[sum(sizes) :] for x in values[:2]):
        assert not np.any(nobody)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 60), min_size=5, max_size=5))
def test_any_group_sizes(ends):
    sizes = jnp.diff(jnp.array(sorted(ends)), prepend=0)
    inputs = operands(60, 5)
    assert_close(run(*inputs, sizes, "blocked"), run(*inputs, sizes, "dense"))


@pytest.mark.parametrize(
    ("backend", "tolerance"), [("dense", 2e-2), ("ragged", 2e-2), ("blocked", 2**-8 + TOLERANCE)]
)
def test_bfloat16(backend, tolerance):
    """Blocked rounds once, at the end; the others also between the products."""
    sizes = jnp.array([3, 0, 410, 60])
    inputs = operands(480, 4, dtype=jnp.bfloat16)
    values = run(*inputs, sizes, backend)
    assert {value.dtype for value in values} == {jnp.dtype(jnp.bfloat16)}
    truth = run(*(x.astype(jnp.float32) for x in inputs), sizes, "dense")
    assert_close([x.astype(jnp.float32) for x in values], truth, tolerance)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("backend", ["ragged", "blocked"])
def test_stacked_layers(backend, remat):
    """Scanned, with and without rematerialisation; each layer has its own group sizes."""
    layers = [operands(20, 3, seed=seed)[1:4] for seed in range(3)]
    weights = tuple(jnp.stack(leaves) for leaves in zip(*layers, strict=True))
    sizes = jnp.array([[5, 0, 15], [0, 0, 20], [9, 8, 1]])
    rows, *_, d_out = operands(20, 3)

    @partial(jax.jit, static_argnames="backend")
    def gradients(rows, weights, backend):
        def layer(x, layer_inputs):
            return x + grouped_mlp(x, *layer_inputs, backend=backend), None

        def loss(rows, weights):
            body = jax.checkpoint(layer) if remat else layer
            return (lax.scan(body, rows, (*weights, sizes))[0] * d_out).sum()

        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(rows, weights))

    inputs = rows, weights
    assert_close(gradients(*inputs, backend=backend), gradients(*inputs, backend="dense"))


@pytest.mark.parametrize("shared", [True, False])
def test_vmap(shared):
    """Over rows and group sizes; with shared weights `ragged_dot` can't (as of JAX 0.10)."""
    sizes = jnp.array([[4, 0, 30], [0, 11, 1]])
    batch = [operands(40, 3, seed=seed) for seed in range(2)]
    rows, *weights, d_out = (jnp.stack(leaves) for leaves in zip(*batch, strict=True))
    weights = [weight[0] for weight in weights] if shared else weights
    inputs = rows, *weights, d_out
    axes = (0, None, None, None, 0, 0) if shared else 0
    values, *others, truth = (
        jax.vmap(partial(run, backend=backend), in_axes=axes)(*inputs, sizes)
        for backend in (["blocked", "dense"] if shared else ["blocked", "ragged", "dense"])
    )
    assert_close(values, truth)
    for other in others:
        assert_close(other, truth)


@pytest.mark.parametrize("backend", ["ragged", "blocked"])
def test_shard_map(backend):
    """Experts on a mesh axis, rows on all its devices: the rows' gradient gets its sum."""
    sizes = jnp.array([5, 0, 7])
    *inputs, d_out = operands(16, 3)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))

    def local(rows, *weights):
        rows = lax.pcast(rows, "expert", to="varying")
        return lax.psum(grouped_mlp(rows, *weights, sizes, backend=backend), "expert")

    specs = P(), P("expert"), P("expert"), P("expert")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    out, vjp = jax.jit(partial(jax.vjp, sharded))(*inputs)
    truth = run(*inputs, d_out, sizes, "dense")
    assert_close((out, *vjp(d_out)), truth)


def temporary_bytes(function, *inputs) -> int:
    memory = jax.jit(function).lower(*inputs).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_blocked_takes_little_memory():
    """Neither rows by experts, nor rows by the largest possible group."""
    inputs = *operands(512, 32, hidden=32, ff=64), jnp.full(32, 16)
    dense, blocked = (
        temporary_bytes(partial(run, backend=backend), *inputs) for backend in ("dense", "blocked")
    )
    assert blocked < dense / 15


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64])
def test_blocked_copies_one_expert_at_a_time(tokens, dtype):
    """Also in the loop of a decoder, out of which XLA likes to move whatever doesn't change."""
    experts, hidden, ff = 64, 64, 128
    rows, *weights, _ = operands(tokens, experts, hidden=hidden, ff=ff, dtype=dtype)

    def decode(rows, weights, sizes):
        def step(state):
            i, x, sizes = state
            return i + 1, grouped_mlp(x, *weights, sizes, backend="blocked"), sizes[::-1]

        return lax.while_loop(lambda state: state[0] < 3, step, (0, rows, sizes))

    sizes = jnp.zeros(experts, jnp.int32).at[5].set(tokens)
    expert_bytes = 3 * hidden * ff * 4
    row_bytes = 4 * (hidden * 8)
    used = temporary_bytes(decode, rows, weights, sizes)
    assert used < 2 * expert_bytes + 2 * tokens * row_bytes < experts * expert_bytes / 4


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_default_backend(platform):
    """Chosen by the platform lowered for; few rows aren't grouped on GPUs."""
    for tokens, experts in ((8, 2), (1, 8)):
        inputs = operands(tokens, experts)[:4], jnp.full(experts, tokens // experts)
        traced = jax.jit(lambda inputs, sizes: grouped_mlp(*inputs, sizes)).trace(*inputs)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        grouped = platform == "tpu" or (platform == "cuda" and tokens == 8)
        assert ("ragged_dot" in text) == grouped


@pytest.mark.parametrize("backend", ["ragged", "blocked", "rows"])
def test_under_vmap(backend):
    """Of rows, sizes and weights each, and of their gradients."""
    one, other = (operands(12, 3, seed=seed) for seed in (0, 1))
    sizes = jnp.array([[1, 4, 5], [0, 12, 0]])
    stacked = tuple(map(lambda *x: jnp.stack(x), one, other))
    together = jax.vmap(partial(run, backend=backend))(*stacked, sizes)
    shared = jax.vmap(partial(run, backend=backend), (0, None, None, None, 0, 0))(
        stacked[0], *one[1:4], stacked[4], sizes
    )
    for i, alone in enumerate((one, other)):
        assert_close([x[i] for x in together], run(*alone, sizes[i], "dense"))
        truth = run(alone[0], *one[1:4], alone[4], sizes[i], "dense")
        assert_close([x[i] for x in shared], truth)


def test_unknown_backend():
    # Without the suite's type checks, which object earlier.
    unchecked = inspect.unwrap(grouped_mlp)
    with pytest.raises(ValueError, match=r"'dense', 'ragged', 'blocked', .*got 'loop'"):
        unchecked(*operands(4, 2)[:4], jnp.array([1, 3]), backend="loop")
