"""Weights of few bits: what they stand for, in every way in which a model runs."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.axes import select
from llama4_eqx.checkpoints import load_adapter, save_adapter
from llama4_eqx.distributed import (
    EXPERT_ALL_TO_ALL,
    EXPERT_REPLICATED_TOKENS,
    FSDP,
    TENSOR,
    shard,
    unshard,
)
from llama4_eqx.layers import Backends, Quantized, dequantized, grouped_mlp
from llama4_eqx.layers.grouped import _row_by_row
from llama4_eqx.layers.grouped_quantized import quantized_dense_mlp, quantized_ragged_mlp
from llama4_eqx.layers.quantized import quantized
from llama4_eqx.layers.quantized_products import _products_in_blocks, quantized_product
from llama4_eqx.quantization import Quantization, quantize
from llama4_eqx.training import LoRA, init_train_state, make_train_step, next_token_loss
from tests.toys import MAVERICK, SCOUT, random_tokens, reference_model, relative_error

pytestmark = pytest.mark.slow

# A CPU rounds activations to int8, too: half of 1/127 of the largest, at every product.
ROUNDED = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    reference_model(MAVERICK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return l4.load_checkpoint(folder)


@pytest.fixture(scope="module")
def in_groups(model, request):
    """A model with weights in groups, and the logits of what they stand for."""
    small = quantize(model, request.param)
    return small, logits(dequantized(small), random_tokens(2, 21))


def logits(model, tokens, **options):
    return eqx.filter_jit(lambda model, tokens: model(tokens, **options).logits)(model, tokens)


def quantised_weights(model):
    is_quantised = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(model, is_leaf=is_quantised) if is_quantised(leaf)]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("shape", "inputs"), [((24, 32), (1,)), ((3, 24, 2, 16), (2, 3))])
def test_rounding(dtype, shape, inputs):
    weight = jax.random.normal(jax.random.key(0), shape)
    small = quantized(weight.at[0, 0].set(0), inputs, dtype)
    assert small.numbers.dtype == dtype
    assert small.scale.size == weight.size // np.prod([shape[axis] for axis in inputs])
    error = np.abs(small.dequantized() - weight.at[0, 0].set(0))
    step = small.scale / 2 if dtype == jnp.int8 else np.abs(weight) / 16 + small.scale / 512
    assert (error <= step * 1.001).all()


@pytest.mark.parametrize("group_size", [4, 8, 32])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.int4])
@pytest.mark.parametrize(
    ("shape", "inputs"), [((24, 32), (1,)), ((3, 24, 2, 32), (2, 3)), ((5, 32, 6), (1,))]
)
def test_groups(dtype, group_size, shape, inputs):
    """Each group of inputs by itself, as if it were a weight; two int4 in a byte."""
    weight, last = jax.random.normal(jax.random.key(0), shape), inputs[-1]
    small = quantized(weight, inputs, dtype, group_size)
    assert small.shape == shape
    assert small.scale.size * group_size == weight.size
    assert small.numbers.nbytes == weight.size // (2 if dtype == jnp.int4 else 1)
    for start in range(0, shape[last], group_size):
        group = jax.lax.slice_in_dim(weight, start, start + group_size, axis=last)
        one = quantized(group, (last,), dtype)
        ours = jax.lax.slice_in_dim(small.dequantized(), start, start + group_size, axis=last)
        np.testing.assert_allclose(ours, one.dequantized(), rtol=1e-6)
    if dtype == jnp.int4:
        steps = jnp.repeat(small.scale, group_size, axis=last) / 2
        assert (np.abs(small.dequantized() - weight) <= steps * 1.001).all()
    if len(shape) == 3:
        matrix = small[1].transposed()
        np.testing.assert_array_equal(matrix.dequantized(), small.dequantized()[1].T)


@pytest.mark.parametrize(
    ("dtype", "group_size"), [(jnp.int4, 6), (jnp.int8, 5), (jnp.int4, 64)], ids=str
)
def test_groups_that_do_not_fit(dtype, group_size):
    with pytest.raises(ValueError, match=r"has 32 inputs, which .* doesn't divide"):
        quantized(jnp.ones((4, 32)), (1,), dtype, group_size)


@pytest.mark.parametrize("form", ["scanned", "unrolled", "experts apart"])
@pytest.mark.parametrize(
    "in_groups",
    [
        Quantization(dtype=jnp.int4, group_size=16),
        Quantization(dtype=jnp.int8, group_size=8),
        Quantization(("*experts*_proj",), jnp.int4),
    ],
    ids=str,
    indirect=True,
)
def test_a_model_in_groups_is_the_dequantised_one(in_groups, form):
    """Exactly the same products: no activation is rounded."""
    (small, truth), tokens = in_groups, random_tokens(2, 21)
    if form != "scanned":
        small = small.unstacked(experts=form == "experts apart")
    assert relative_error(logits(small, tokens), truth) < 1e-5
    assert relative_error(logits(small, tokens[:1, :1]), truth[:1, :1]) < 1e-5
    new = l4.generate(small, tokens[:, :9], max_new_tokens=4)
    np.testing.assert_array_equal(new[:, 0], jnp.argmax(truth[:, 8], -1))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_products_and_their_gradients(dtype):
    """The form for accelerators is exact; that for CPUs rounds each row of activations."""
    weight = jax.random.normal(jax.random.key(0), (40, 64))
    rows = jax.random.normal(jax.random.key(1), (7, 64))
    small = quantized(weight, (1,), dtype)
    truth, vjp = jax.vjp(lambda rows: rows @ small.dequantized().T, rows)
    ours, our_vjp = jax.vjp(lambda rows: quantized_product(rows, small), rows)
    assert relative_error(ours, truth) < (1e-2 if dtype == jnp.int8 else 1e-5)
    assert relative_error(our_vjp(truth)[0], vjp(truth)[0]) < 1e-5


@pytest.mark.parametrize(("dtype", "group_size"), [(jnp.int4, 16), (jnp.int4, 1), (jnp.int8, 32)])
@pytest.mark.parametrize("outputs", [100, 128, 300, 512, 1160])
@pytest.mark.parametrize("inputs", [1, 2])
def test_products_in_blocks(dtype, group_size, outputs, inputs):
    """As TPUs compute those of a large weight: the last block may overlap the one before."""
    shape = (2, 64, outputs) if inputs == 1 else (2, outputs, 64)
    weight = quantized(jax.random.normal(jax.random.key(0), shape), (inputs,), dtype, group_size)
    rows = jax.random.normal(jax.random.key(1), (2, 3, 64))
    equation = "erd,edf->erf" if inputs == 1 else "erd,efd->erf"
    truth = jnp.einsum(equation, rows, weight.dequantized())
    ours = jax.jit(_products_in_blocks, static_argnums=(2, 3))(rows, weight, inputs, 160 * 64)
    assert relative_error(ours, truth) < 1e-6


def expert_weights(dtype, group_size=None):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (5, 32, 48), (5, 32, 48), (5, 48, 32)
    return tuple(
        quantized(jax.random.normal(key, shape) / 6, (1,), dtype, group_size)
        for key, shape in zip(keys, shapes, strict=True)
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("sizes", [(9, 0, 1, 17, 3), (0, 0, 1, 0, 0), (0, 0, 0, 0, 0)])
def test_experts(dtype, sizes):
    weights, sizes = expert_weights(dtype), jnp.array(sizes)
    rows = jax.random.normal(jax.random.key(4), (33, 32))
    truth, vjp = jax.vjp(
        lambda rows: grouped_mlp(rows, *dequantized(weights), sizes, backend="dense"), rows
    )
    ours, our_vjp = jax.vjp(lambda rows: grouped_mlp(rows, *weights, sizes), rows)
    error = np.abs(ours - truth).max() / max(np.abs(truth).max(), 1e-9)
    assert error < (3e-2 if dtype == jnp.int8 else 1e-5)
    # For TPUs, and for few and more rows on GPUs.
    for form in (quantized_ragged_mlp, _row_by_row, quantized_dense_mlp):
        np.testing.assert_allclose(form(jax.nn.silu, rows, weights, sizes), truth, atol=1e-5)
    np.testing.assert_allclose(our_vjp(rows)[0], vjp(rows)[0], atol=1e-5)
    np.testing.assert_allclose(
        grouped_mlp(rows, *weights, sizes, backend="ragged"), truth, atol=1e-5
    )


@pytest.mark.parametrize("form", [_row_by_row, quantized_dense_mlp])
@pytest.mark.parametrize(
    ("dtype", "group_size"), [(jnp.int4, None), (jnp.int4, 8), (jnp.int4, 1), (jnp.int8, 16)]
)
def test_experts_in_groups(dtype, group_size, form):
    """Of one number, too, where the two that share a byte have different scales."""
    weights, sizes = expert_weights(dtype, group_size), jnp.array([9, 0, 1, 17, 3])
    rows = jax.random.normal(jax.random.key(4), (33, 32))
    truth = grouped_mlp(rows, *dequantized(weights), sizes, backend="dense")
    np.testing.assert_allclose(form(jax.nn.silu, rows, weights, sizes), truth, atol=1e-5)


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_quantised_model(model, form, dtype):
    tokens = random_tokens(2, 21)
    small = quantize(model, Quantization(dtype=dtype))
    truth = logits(dequantized(small), tokens)
    small = small if form == "scanned" else small.unstacked()
    ours = logits(small, tokens)
    if dtype == jnp.int8:
        # Of a few tokens the rounding changes the experts, and with them everything.
        error = np.abs(ours - truth).max(-1) / np.abs(truth).max(-1)
        assert np.median(error) < ROUNDED
    else:
        assert relative_error(ours, truth) < 2e-5
    assert relative_error(truth, logits(model, tokens)) > 1e-3
    prompt = tokens[:, :9]
    new = l4.generate(small, prompt, max_new_tokens=6)
    whole = logits(small, jnp.concatenate([prompt, new], -1))
    np.testing.assert_array_equal(new, jnp.argmax(whole[:, 8:-1], -1))
    assert quantised_weights(model) == []
    weights = quantised_weights(small)
    assert all(w.numbers.dtype == dtype for w in weights)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(m.decoder)) for m in (small, model)]
    assert sizes[0] < 0.35 * sizes[1]  # scales weigh more in a toy


@pytest.mark.parametrize("scheme", [Quantization(), Quantization(dtype=jnp.int4, group_size=8)])
def test_quantised_while_loading_on_a_mesh(folder, scheme):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    sharded = l4.load_checkpoint(folder, mesh=mesh, rules=TENSOR, quantize=scheme)
    whole = l4.load_checkpoint(folder, quantize=scheme)
    assert eqx.tree_equal(unshard(sharded), whole)
    down = sharded.decoder.blocks[0].layers[1].feed_forward.experts.down_proj
    assert down.numbers.sharding.shard_shape(down.numbers.shape) != down.numbers.shape


@pytest.mark.parametrize("scheme", [Quantization(), Quantization(dtype=jnp.int4, group_size=8)])
def test_weights_of_equal_shapes_are_rounded_by_one_program(folder, model, scheme, compiled):
    """However many they are, of a model or a folder."""
    apart = model.unstacked(experts=True)
    jax.clear_caches()
    compiled.clear()
    weights = quantised_weights(quantize(apart, scheme))
    assert 0 < len(compiled) == len({weight.shape for weight in weights}) < len(weights)
    jax.clear_caches()
    compiled.clear()
    weights = quantised_weights(l4.load_checkpoint(folder, quantize=scheme))
    assert 0 < compiled.count("jit(quantized)") <= len({weight.shape for weight in weights})


def test_quantised_while_loading(folder, model):
    loaded = l4.load_checkpoint(folder, quantize=Quantization())
    truth = quantize(model)
    assert jax.tree.structure(loaded) == jax.tree.structure(truth)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(truth), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    in_groups = Quantization(dtype=jnp.int4, group_size=16)
    loaded = l4.load_checkpoint(folder, quantize=in_groups)
    assert eqx.tree_equal(loaded, quantize(model, in_groups))
    some = l4.load_checkpoint(
        folder, quantize=Quantization(("*.experts.*", "!*.down_proj"), jnp.float8_e4m3fn)
    )
    moe = some.decoder.blocks[0].layers[1].feed_forward
    assert isinstance(moe.experts.up_proj, Quantized)
    assert not isinstance(moe.experts.down_proj, Quantized)
    assert not isinstance(moe.shared_expert.up_proj, Quantized)
    assert logits(some, random_tokens(1, 9)).shape == (1, 9, 256)


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ({"fsdp": 4, "tensor": 2}, FSDP | TENSOR),
        ({"fsdp": 2, "expert": 4}, FSDP | EXPERT_REPLICATED_TOKENS),
    ],
    ids=["tensor", "expert"],
)
@pytest.mark.parametrize(
    "quantization",  # exact on CPUs, too
    [
        Quantization(("decoder.*_proj",), jnp.float8_e4m3fn),
        Quantization(("decoder.*_proj",), jnp.int4, 4),
    ],
    ids=["float8", "int4"],
)
def test_sharded_like_the_weights(model, sizes, rules, quantization):
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    small, tokens = quantize(model, quantization), random_tokens(8, 16)
    placed = shard(small, mesh, rules)
    assert relative_error(logits(placed, tokens), logits(small, tokens)) < 2e-5
    weight = placed.decoder.blocks[0].layers[1].feed_forward.experts.gate_proj
    assert (
        weight.numbers.sharding.spec
        == shard(model, mesh, rules)
        .decoder.blocks[0]
        .layers[1]
        .feed_forward.experts.gate_proj.sharding.spec
    )


@pytest.mark.parametrize("rules", [EXPERT_ALL_TO_ALL, EXPERT_REPLICATED_TOKENS], ids=str)
def test_gradients_pass_through_on_a_mesh(model, rules):
    """To what isn't quantised, as on one device; uneven routing takes several rounds."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    quantization = Quantization(("decoder.*experts.*_proj",), jnp.float8_e4m3fn)
    small, tokens = quantize(model, quantization), random_tokens(8, 16)

    def gradient(model):
        def loss(table, model):
            model = eqx.tree_at(lambda m: m.embed_tokens, model, table)
            return next_token_loss(model, tokens).token.total

        return eqx.filter_jit(jax.grad(loss))(model.embed_tokens, model)

    placed = shard(small, mesh, FSDP | rules)
    assert relative_error(gradient(placed), gradient(small)) < 2e-5


def test_an_accelerator_converts_inside_the_product(model):
    """Lowered for a TPU, the numbers are converted to the activations' dtype and multiplied: no
    float weight is made by multiplying with scales."""
    rows, weight = jnp.zeros((8, 64), jnp.bfloat16), quantized(jnp.ones((40, 64)), (1,))
    arrays, static = eqx.partition(weight, eqx.is_array)
    run = jax.jit(lambda rows, arrays: quantized_product(rows, eqx.combine(arrays, static)))
    text = run.trace(rows, arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<40x64xi8>) -> tensor<40x64xbf16>" in text
    assert "multiply" in text
    assert not [line for line in text.splitlines() if "multiply" in line and "40x64" in line]


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int4])
def test_lora_on_a_quantised_base(dtype, tmp_path):
    """QLoRA: only the factors learn, and the adapter is that of the plain model."""
    config = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
    plain = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    base = quantize(plain, Quantization(dtype=dtype, group_size=16 if dtype == jnp.int4 else None))
    lora = LoRA(base, "decoder.*_proj", rank=2, key=jax.random.key(1))
    tokens, optimizer = random_tokens(2, 20), optax.adam(1e-2)
    assert relative_error(logits(lora.attached(), tokens), logits(base, tokens)) < 1e-5

    def loss(lora, tokens, key):
        found = next_token_loss(lora.attached(), tokens, key=key).token
        return found.total, found.num_tokens, None

    trainable = select(lora, "updates.*")
    step = make_train_step(optimizer, loss, trainable=trainable, donate=False)
    state = init_train_state(lora, optimizer, key=jax.random.key(2), trainable=trainable)
    losses = []
    for _ in range(6):
        state, metrics = step(state, tokens)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.1
    assert eqx.tree_equal(state.model.model, base)
    save_adapter(state.model, tmp_path / "adapter")
    again = load_adapter(base, tmp_path / "adapter")
    ours, theirs = (logits(each.attached(), tokens) for each in (again, state.model))
    assert relative_error(ours, theirs) < 2e-5


def test_errors(model, folder, tmp_path):
    with pytest.raises(ValueError, match="int8, float8_e4m3fn, int4, not to int2"):
        Quantization(dtype=jnp.int2)
    with pytest.raises(ValueError, match="at least 2, but is 0"):
        Quantization(group_size=0)
    with pytest.raises(ValueError, match=r"has 16 inputs, which 32 doesn't divide"):
        quantize(model, Quantization(dtype=jnp.int4))
    with pytest.raises(ValueError, match="fits no leaf"):
        quantize(model, Quantization(("nothing",)))
    with pytest.raises(ValueError, match="isn't a matrix"):
        quantize(model, Quantization(("*.norm.weight",)))
    with pytest.raises(ValueError, match="doesn't go with another config"):
        l4.load_checkpoint(folder, config=model.config, quantize=Quantization())
    assert logits(quantize(model), random_tokens(1, 8), backends=Backends("dense", "dense")).size
