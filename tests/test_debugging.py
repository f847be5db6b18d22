"""What helps to see what is wrong: shape checks, tables, a repr, states that stay usable."""

import subprocess
import sys
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.distributed import FSDP, TENSOR, shard
from llama4_eqx.training import init_train_state, make_train_step, next_token_loss, select
from tests.toys import IMAGE_TOKEN, MULTIMODAL, SCOUT, TOKENS_PER_TILE, random_tokens

pytestmark = pytest.mark.slow


def in_a_process_of_its_own(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_shape_checks_name_the_axis():
    """The plain call says nothing, as the wrong axis broadcasts; submodules are checked, too."""
    calls = """
from llama4_eqx.layers import RMSNorm, token_positions
from llama4_eqx.layers.rope import RotaryEmbedding
norm = RMSNorm(8, eps=1e-5, dtype=jnp.float32)
def attempt(call):
    try:
        print(call().shape)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " ")[:200])
attempt(lambda: norm(jnp.zeros((3, 1))))
attempt(lambda: norm(jnp.zeros((3, 8))))
model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
mixer, rope = model.decoder.layers()[0].self_attn, model.decoder.rope
placed = token_positions((1, 5))
context = Context(placed, rope(placed.positions))
attempt(lambda: mixer(jnp.zeros((2, 5, 64)), context)[0])
attempt(lambda: model(jnp.zeros((2, 5), int)).logits)
attempt(lambda: l4.generate(model, np.ones((2, 5), int), max_new_tokens=2))
sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=128, projector_input_dim=24)
sizes |= dict(num_hidden_layers=2, vision_output_dim=24, image_size=28, patch_size=7)
vision = l4.VisionModel(l4.VisionConfig(**sizes, projector_output_dim=24), key=jax.random.key(0))
attempt(lambda: vision(jnp.zeros((1, 3, 28, 28))))
"""
    begin = "import llama4_eqx as l4\n"
    rest = (
        "import jax, jax.numpy as jnp, numpy as np\nfrom llama4_eqx.layers import Context\n" + calls
    )
    checked = in_a_process_of_its_own(begin + "l4.enable_shape_checks()\n" * 2 + rest)
    assert checked.splitlines() == [
        "ValueError RMSNorm: the axis 'hidden' is 1 in x but 8 in weight.",
        "(3, 8)",
        "ValueError Attention: the axis 'batch' is (2,) in x but (1,) in context.tokens.positions.",
        "(2, 5, 256)",
        "(2, 2)",
        "(1, 4, 24)",
    ]
    plain = in_a_process_of_its_own(begin + rest).splitlines()
    assert plain[:2] == ["(3, 8)", "(3, 8)"]


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("from llama4_eqx import Llama4", "__main__ has imported Llama4 already"),
        ("from llama4_eqx.layers import MoE", "__main__ has imported MoE already"),
        ("m = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))", "a Llama4 exists"),
    ],
)
def test_shape_checks_that_come_too_late_say_so(before, sentence):
    script = f"""
import jax, llama4_eqx as l4
{before}
try:
    l4.enable_shape_checks()
except RuntimeError as error:
    print(error)
"""
    assert sentence in in_a_process_of_its_own(script)


def test_parameter_table():
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    first, *rows, last = l4.parameter_table(model).splitlines()
    leaves = jax.tree.leaves(model)
    assert len(rows) == len(leaves)
    assert "axes" in first
    assert f"{sum(leaf.nbytes for leaf in leaves):,}" in last
    row = next(row for row in rows if "experts.gate_proj" in row)
    assert row.split()[1:5] == ["layers", "experts", "hidden", "ff"]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    table = l4.parameter_table(shard(model, mesh, FSDP | TENSOR))
    assert "P(None, None, 'fsdp', 'tensor')" in table
    shapes = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config.scout(), key=jax.random.key(0))
    assert "12 × 16 × 5120 × 8192" in l4.parameter_table(shapes)


def test_a_repr_fits_a_screen():
    config = l4.Llama4Config.scout()
    model = eqx.filter_eval_shape(l4.Llama4, config, key=jax.random.key(0))
    unstacked = eqx.filter_eval_shape(lambda model: model.unstacked(), model)
    for form in (model, unstacked):
        lines = repr(form).splitlines()
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 120
        assert "MoE(top_k=1)" in repr(form)
        assert "layers 0 to 47" in repr(form)
    sizes = [leaf.size for leaf in jax.tree.leaves(model)]
    assert f"{sum(sizes):,} parameters" in repr(model)


def test_what_is_left_of_a_model_has_a_repr():
    """Masks of its leaves, and what a filter leaves of it, as a debugger shows them."""
    model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    routers = select(model, "*.router")
    for part in (routers, *eqx.partition(model, routers)):
        assert "vocab 256, hidden 64" in repr(part)


def loss(model, tokens, key):
    total = next_token_loss(model, tokens, key=key).token
    return total.total, total.num_tokens, None


def test_states_donated_and_kept():
    config = replace(SCOUT, num_hidden_layers=2, no_rope_layers=(1, 0))
    tokens, optimizer = random_tokens(2, 12), optax.adam(1e-3)

    def fresh():
        model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
        return init_train_state(model, optimizer, key=jax.random.key(1))

    state, step = fresh(), make_train_step(optimizer, loss, donate=False)
    first, again = step(state, tokens), step(state, tokens)
    np.testing.assert_array_equal(first[1].loss, again[1].loss)
    donating = make_train_step(optimizer, loss)
    after, metrics = donating(state, tokens)
    assert metrics.loss == first[1].loss
    with pytest.raises(ValueError, match="was donated to an earlier step: go on from"):
        donating(state, tokens)
    assert np.isfinite(donating(after, tokens)[1].loss)


def test_vmap_with_pictures():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    tokens = jnp.stack([random_tokens(12).at[2 : 2 + TOKENS_PER_TILE].set(IMAGE_TOKEN)] * 3)
    size = MULTIMODAL.vision_config.image_size
    pixels = jax.random.normal(jax.random.key(1), (3, 1, 3, size, size))

    def logits(tokens, pixels):
        return model(tokens, pixel_values=pixels).logits

    together = eqx.filter_jit(jax.vmap(logits))(tokens, pixels)
    for i in range(3):
        np.testing.assert_allclose(together[i], logits(tokens[i], pixels[i]), atol=1e-5)
    wrong = tokens.at[1, 2].set(1)
    with pytest.raises(Exception, match="image tokens"):
        jax.block_until_ready(eqx.filter_jit(jax.vmap(logits))(wrong, pixels))
