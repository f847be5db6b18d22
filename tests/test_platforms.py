"""Programs for other platforms, lowered from a CPU, and exported ones."""

import inspect
import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import llama4_eqx as l4
from llama4_eqx.distributed import CONTEXT, DATA, TENSOR, init_sharded, shard
from llama4_eqx.layers import Backends, attention_core, token_positions
from llama4_eqx.layers.backends import check_backend
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.rope import RotaryEmbedding
from llama4_eqx.lowering import lower
from tests.toys import MULTIMODAL, SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

PLATFORMS = ("cpu", "tpu", "cuda")


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(MULTIMODAL, key=jax.random.key(0))


def programs(model):
    """Functions of arrays alone, and their arguments."""
    arrays, static = eqx.partition(model, eqx.is_array)
    tokens = random_tokens(2, 300, vocab=249)
    pictures = jnp.zeros((2, 3, 28, 28))
    with_images = tokens.at[:, :4].set(250)
    cache = model.empty_cache((2,), 310)

    def with_model(function):
        return lambda arrays, *rest: function(eqx.combine(arrays, static), *rest)

    def loss(model, tokens, pictures):
        return model(tokens, pixel_values=pictures).logits.sum()

    def gradient(model, tokens, pictures):
        return eqx.filter(eqx.filter_grad(loss)(model, tokens, pictures), eqx.is_array)

    return {
        "forward": (with_model(lambda m, t: m(t).logits), (arrays, tokens)),
        "gradient": (with_model(gradient), (arrays, with_images, pictures)),
        "prefill": (with_model(l4.prefill), (arrays, tokens, cache)),
        "step": (with_model(l4.decode_step), (arrays, tokens[:, 0], cache)),
        "generate": (
            with_model(lambda m, t: l4.generate(m, t, max_new_tokens=3)),
            (arrays, tokens[:, :9]),
        ),
    }


NAMES = ("forward", "gradient", "prefill", "step", "generate")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_lowers_for_other_platforms(model, name, platform):
    function, arguments = programs(model)[name]
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "callback" not in text
    assert "ragged_dot" in text  # the experts, which a CPU computes in a loop


@pytest.mark.parametrize("name", NAMES)
def test_on_its_own_platform_it_checks(model, name):
    function, arguments = programs(model)[name]
    text = jax.jit(function).lower(*arguments).as_text()
    assert "callback" in text
    assert "ragged_dot" not in text


@pytest.mark.parametrize("name", ["forward", "step", "generate"])
def test_an_exported_program_is_the_plain_one(model, name):
    """One program for three platforms, written to bytes and read again."""
    function, arguments = programs(model)[name]
    # Caches are modules of ours, which an exported program doesn't know: it gets their arrays.
    leaves, structure = jax.tree.flatten(arguments)

    def flat(*leaves):
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    exported = export.export(jax.jit(flat), platforms=PLATFORMS)(*leaves)
    loaded = export.deserialize(exported.serialize())
    assert loaded.platforms == PLATFORMS
    for ours, plain in zip(loaded.call(*leaves), jax.jit(flat)(*leaves), strict=True):
        if jnp.issubdtype(plain.dtype, jnp.floating):
            assert relative_error(ours, plain) < 1e-5
        else:
            np.testing.assert_array_equal(ours, plain)


def test_an_eager_error_is_the_sentence_alone(model):
    tokens = random_tokens(1, 9, vocab=249)
    with pytest.raises(ValueError, match=r"^A position is negative or above 2147483646\.$"):
        model(tokens, positions=jnp.arange(9)[None] - 5)
    sentence = (
        "^The tokens have 1 image tokens, but the images give 0 features: .*process\\(\\)\\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        model(tokens.at[0, 3].set(250))


def test_backends_are_chosen_from_the_call(model):
    """Each is another program with the same values."""
    tokens = random_tokens(2, 300, vocab=249)
    plain = eqx.filter_jit(model)(tokens).logits
    for attention, experts in (("dense", "dense"), ("blockwise", "ragged"), (None, "rows")):
        backends = Backends(attention, experts)
        other = eqx.filter_jit(lambda m, t, b=backends: m(t, backends=b).logits)(model, tokens)
        assert relative_error(other, plain) < 1e-5
    # Without the suite's type checks, which object earlier.
    unchecked = inspect.unwrap(check_backend)
    with pytest.raises(
        ValueError, match=r"experts must be None or one of \('dense',\), got 'loop'"
    ):
        unchecked("loop", ("dense",), "experts")
    with pytest.raises(ValueError, match='backend="hopper" takes 16-bit numbers'):
        model(tokens, backends=Backends(experts="hopper"))
    with pytest.raises(ValueError, match='backend="cudnn" takes 16-bit rows'):
        model(tokens, backends=Backends(attention="cudnn"))


def test_dense_backends_have_forward_mode_derivatives(model):
    tokens = random_tokens(2, 300, vocab=249)
    embedding = model.embed_tokens
    tangent = jax.random.normal(jax.random.key(1), embedding.shape)

    def loss(embedding):
        changed = eqx.tree_at(lambda m: m.embed_tokens, model, embedding)
        return jnp.mean(changed(tokens, backends=Backends("dense", "dense")).logits ** 2)

    _, forward = jax.jit(lambda: jax.jvp(loss, (embedding,), (tangent,)))()
    backward = jnp.vdot(jax.jit(jax.grad(loss))(embedding), tangent)
    assert abs(forward / backward - 1) < 1e-4  # sums of 16,000 products of either sign


@pytest.mark.parametrize("padding", ["right", "left", "between", "empty"])
def test_padded_rows_that_a_gpu_may_take_as_plain(padding, monkeypatch):
    """With a GPU in the machine, a run-time test sends rows that are padded at most at their end to
    attention that knows nothing of padding: real tokens' logits stay what they are."""
    model = l4.Llama4(l4.Llama4Config(SCOUT), dtype=jnp.bfloat16, key=jax.random.key(0))
    tokens, index = random_tokens(2, 24), jnp.arange(24)
    mask = {
        "right": index < jnp.array([[24], [17]]),
        "left": index >= jnp.array([[0], [7]]),
        "between": (index < 5) | (index > jnp.array([[4], [9]])),
        "empty": index < jnp.array([[24], [0]]),
    }[padding]

    def outputs():
        cache = model.empty_cache((2,), 24)
        first = eqx.filter_jit(lambda m, t, c, mask: m(t, cache=c, mask=mask))
        one = first(model, tokens[:, :16], cache, mask[:, :16])
        two = first(model, tokens[:, 16:], one.cache, mask[:, 16:])
        without = eqx.filter_jit(lambda m, t, mask: m(t, mask=mask).logits)(model, tokens, mask)
        together = jnp.concatenate([one.logits, two.logits], 1)
        return np.asarray(without)[mask], np.asarray(together)[mask]

    truth = outputs()
    for module in ("attend", "attention_core"):
        monkeypatch.setattr(f"llama4_eqx.layers.{module}.may_run_on", lambda name: name == "cuda")
    text = lower(lambda m, t, mask: m(t, mask=mask).logits, model, tokens, mask).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text
    for ours, plain in zip(outputs(), truth, strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("axes", [("data", "context"), ("context", "tensor"), ("data", "tensor")])
def test_the_same_test_on_a_mesh_of_tpus(axes, monkeypatch):
    """There, too, rows are prefilled as plain ones only where a device has them whole."""
    config = l4.Llama4Config(replace(SCOUT, head_dim=128))
    model = l4.Llama4(config, key=jax.random.key(0))
    tokens, mask = random_tokens(4, 24), jnp.arange(24) < jnp.array([[24], [17], [24], [9]])
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    presets = {"data": DATA, "context": CONTEXT, "tensor": TENSOR}
    rules = presets[axes[0]] | presets[axes[1]]

    def outputs(model, cache):
        run = eqx.filter_jit(lambda m, t, c, mask: m(t, cache=c, mask=mask).logits)
        return np.asarray(run(model, tokens, cache, mask))[np.asarray(mask)]

    truth = outputs(model, model.empty_cache((4,), 24))
    for module in ("attend", "attention_core"):
        monkeypatch.setattr(f"llama4_eqx.layers.{module}.may_run_on", lambda name: name == "tpu")
    placed = shard(model, mesh, rules)
    cache = init_sharded(lambda: model.empty_cache((4,), 24), mesh, rules)
    assert relative_error(outputs(placed, cache), truth) < 1e-5


def test_a_mesh_of_hopper_gpus_gets_their_kernels(monkeypatch):
    """Experts by grouped kernels, forward and backward, and attention by cuDNN, which JAX refuses
    to trace where it isn't installed, though there is no such GPU here."""
    by_cudnn = []
    monkeypatch.setattr(
        attention_core, "cudnn_attention", lambda q, k, v, **_: by_cudnn.append(q.shape) or q
    )
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    config = replace(
        SCOUT, hidden_size=128, intermediate_size=128, head_dim=64, attention_chunk_size=512
    )
    layer = l4.DecoderLayer(config, 0, dtype=jnp.bfloat16, key=jax.random.key(0))
    rope = RotaryEmbedding(64, 10000.0)

    def loss(layer, x):
        tokens = token_positions(x.shape[:-1])
        out, _, _ = layer(x, Context(tokens, rope(tokens.positions)), None)
        return out.astype(jnp.float32).sum()

    gradients = jax.shard_map(
        eqx.filter_grad(loss), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    traced = jax.jit(gradients).trace(layer, jax.ShapeDtypeStruct((2, 1024, 128), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert by_cudnn == [(1, config.num_attention_heads, 1024, 64)]
    # Three kernels, each made once. They run for gate and up (nobody needs what the layer gives),
    # and for the gradients of each product's rows and weights.
    assert text.count("custom_call @mosaic_gpu") == 3
    assert len(re.findall(r"call @_(?:grouped|outer)_product", text)) == 2 + 3 * 2
    assert "chlo.ragged_dot" not in text
