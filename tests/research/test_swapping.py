"""A part of some layers replaced by another: the same in every way in which a model runs."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jaxtyping import Array, Float
from swap_attention import LinearAttention

import llama4_eqx as l4
from llama4_eqx.distributed import FSDP, TENSOR, shard
from llama4_eqx.layers import (
    MLP,
    Attention,
    Execution,
    FeedForward,
    Probe,
    RMSNorm,
    SequenceMixer,
)
from llama4_eqx.layers.context import PLAIN
from llama4_eqx.research import Ablate, Scale, in_layers, layer, replaced, separated
from llama4_eqx.training import LoRA, init_train_state, make_train_step, next_token_loss
from tests.toys import SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
CONFIG = replace(SCOUT, num_hidden_layers=12, no_rope_layer_interval=4)


@pytest.fixture(scope="module")
def model():
    model = l4.Llama4(l4.Llama4Config(CONFIG), key=jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, model)


def forward(model, tokens, **options):
    return eqx.filter_jit(model)(tokens, **options).logits


class Doubled(SequenceMixer):
    """A wrapper: twice what the attention inside gives, with the attention's own cache."""

    inner: Attention

    def __call__(self, x, context, cache=None, *, key=None):
        out, cache = self.inner(x, context, cache, key=key)
        return 2 * out, cache

    def empty_cache(self, batch_shape, capacity):
        return self.inner.empty_cache(batch_shape, capacity)


class Gelu(FeedForward):
    """A feed-forward network of another kind."""

    up: Float[Array, "ff hidden"]
    down: Float[Array, "hidden ff"]

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "*batch hidden"], None]:
        return jax.nn.gelu(x @ self.up.T) @ self.down.T, None


def linear_attention(old):
    return LinearAttention(64, 4, 16, key=jax.random.key(7))


def test_the_same_parts_give_the_same_model(model):
    again = replaced(model, "self_attn", lambda old: old)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    unstacked = model.unstacked()
    still = replaced(unstacked, "self_attn", lambda old: old, layers=3)
    assert jax.tree.structure(still) == jax.tree.structure(unstacked)


def test_the_stack_is_split_around_odd_layers(model):
    odd = replaced(model, "self_attn", Doubled, layers=4)
    assert sum(block.depth for block in odd.decoder.blocks) == 12
    doubled = [i for i in range(12) if isinstance(layer(odd, i).self_attn, Doubled)]
    assert doubled == [4]
    deep = l4.Llama4Config(replace(CONFIG, num_hidden_layers=48))
    shapes = eqx.filter_eval_shape(
        lambda key: replaced(l4.Llama4(deep, key=key), "self_attn", Doubled, layers=20),
        jax.random.key(0),
    )
    depths = [(len(block.layers), block.repeats) for block in shapes.decoder.blocks]
    assert depths == [(4, 5), (1, None), (4, 6), (1, 2), (1, None)]


@pytest.mark.parametrize("layers", [[5], [0, 11], range(12)])
def test_a_wrapper_is_what_an_edit_says(model, layers):
    tokens = random_tokens(2, 20)
    ours = forward(replaced(model, "self_attn", Doubled, layers), tokens)
    edited = forward(model, tokens, probe=Probe(edit=Scale("attn_out", 2.0, layers=list(layers))))
    assert relative_error(ours, edited) < TOLERANCE
    assert relative_error(ours, forward(model, tokens)) > 1e-3


def test_other_parts(model):
    tokens = random_tokens(2, 20)
    nothing = Gelu(jnp.zeros((8, 64)), jnp.zeros((64, 8)))
    ours = forward(replaced(model, "feed_forward", lambda old: nothing, [2, 3]), tokens)
    edited = forward(model, tokens, probe=Probe(edit=Ablate("ff_out", layers=[2, 3])))
    assert relative_error(ours, edited) < TOLERANCE
    norm = RMSNorm(64, eps=1e-5, dtype=jnp.float32)
    by_part = replaced(model, "input_layernorm", lambda old: norm, 1)
    np.testing.assert_array_equal(layer(by_part, 1).input_layernorm.weight, norm.weight)
    mlp = MLP(64, 32, init_std=0.1, dtype=jnp.float32, key=jax.random.key(0))
    by_path = replaced(model, "feed_forward.shared_expert", lambda old: mlp, 1)
    np.testing.assert_array_equal(layer(by_path, 1).feed_forward.shared_expert.up_proj, mlp.up_proj)
    whole = replaced(model, None, lambda old: layer(model, 0), layers=1)
    copied = layer(whole, 1).self_attn.q_proj
    np.testing.assert_array_equal(copied, layer(model, 0).self_attn.q_proj)
    with pytest.raises(ValueError, match="no layer 12, only 0 to 11"):
        replaced(model, "self_attn", Doubled, layers=12)
    with pytest.raises(ValueError, match="Layer 2 has no part 'attention': a DecoderLayer has"):
        replaced(model, "attention", Doubled, layers=2)
    with pytest.raises(AttributeError, match="no attribute 'mistake'"):  # of the user's own
        replaced(model, "self_attn", lambda old: old.mistake, layers=2)


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_a_mixer_with_its_own_state_decodes_as_it_prefills(model, form):
    odd = replaced(model, "self_attn", linear_attention, layers=[1, 6])
    odd = odd if form == "stacked" else odd.unstacked()
    tokens = random_tokens(2, 24)
    whole = forward(odd, tokens)
    logits, cache = l4.prefill(odd, tokens[:, :15], odd.empty_cache((2,), 30))
    parts = [logits]
    for i in range(15, 24):
        logits, cache = l4.decode_step(odd, tokens[:, i], cache)
        parts.append(logits)
    assert relative_error(jnp.stack(parts, 1), whole[:, 14:]) < TOLERANCE
    new = l4.generate(odd, tokens, max_new_tokens=5)
    streamed = jnp.stack(list(l4.stream(odd, tokens, max_new_tokens=5)), -1)
    np.testing.assert_array_equal(new, streamed)


def test_it_trains_and_takes_lora(model):
    odd = replaced(model, "self_attn", linear_attention, layers=1)
    copy = jax.tree.map(jnp.copy, odd)  # training takes its model's memory

    def loss_function(model, tokens, key):
        loss = next_token_loss(model, tokens, key=key).token
        return loss.total, loss.num_tokens, None

    optimizer = optax.adam(1e-2)
    step = make_train_step(optimizer, loss_function)
    state, losses = init_train_state(copy, optimizer, key=jax.random.key(0)), []
    for _ in range(5):
        state, metrics = step(state, random_tokens(2, 16))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    moved = layer(state.model, 1).self_attn
    assert relative_error(moved.o_proj, linear_attention(None).o_proj) > 1e-3
    number = next(i for i, block in enumerate(odd.decoder.blocks) if block.repeats is None)
    lora = LoRA(odd, f"decoder.blocks.{number}.*_proj", rank=2, key=jax.random.key(0))
    tokens = random_tokens(2, 12)
    assert relative_error(forward(lora.attached(), tokens), forward(odd, tokens)) < TOLERANCE


def test_it_is_sharded_by_its_axis_words(model):
    odd = replaced(model, "self_attn", linear_attention, layers=[1, 6])
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = shard(odd, mesh, FSDP | TENSOR)
    q_proj = layer(sharded, 1).self_attn.q_proj
    assert q_proj.sharding.shard_shape(q_proj.shape) == (2, 16, 16)
    tokens = random_tokens(4, 24)
    assert relative_error(forward(sharded, tokens), forward(odd, tokens)) < TOLERANCE
    new = l4.generate(sharded, tokens, max_new_tokens=5)
    np.testing.assert_array_equal(new, l4.generate(odd, tokens, max_new_tokens=5))


class Noted(MLP):
    """A subclass with a parameter more."""

    extra: Float[Array, "hidden"]

    def __init__(self, *, key):
        super().__init__(64, 128, init_std=0.1, dtype=jnp.float32, key=key)
        self.extra = jax.random.normal(key, (64,))

    def __call__(self, x, *, execution=PLAIN):
        out, router_logits = super().__call__(x, execution=execution)
        return out + self.extra, router_logits


def with_parts(model):
    """A mixer of another kind, a wrapper, a subclass deeper down, and a whole layer."""
    keys = iter(jax.random.split(jax.random.key(3), 100))

    def noted(old):
        return Noted(key=next(keys))

    def make_linear(old):
        return LinearAttention(64, 4, 16, key=next(keys))

    model = replaced(model, "self_attn", make_linear, layers=[4])
    model = replaced(model, "self_attn", Doubled, layers=[1, 6])
    return replaced(model, "feed_forward.shared_expert", noted, layers=range(8, 12))


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_saved_and_loaded(model, form, tmp_path):
    swapped = with_parts(model if form == "stacked" else model.unstacked())
    l4.save_checkpoint(swapped, tmp_path / "model")
    loaded = l4.load_checkpoint(tmp_path / "model", make=with_parts)
    tokens = random_tokens(2, 20)
    truth = forward(swapped, tokens)
    assert relative_error(forward(loaded, tokens), truth) < TOLERANCE
    assert relative_error(forward(model, tokens), truth) > 0.1
    l4.save_checkpoint(loaded, tmp_path / "model", overwrite=True)
    again = l4.load_checkpoint(tmp_path / "model", make=with_parts, dtype=jnp.bfloat16)
    assert again.embed_tokens.dtype == jnp.bfloat16
    with pytest.raises(l4.CheckpointError, match=r"layer 1 with self_attn = Doubled.*Pass make="):
        l4.load_checkpoint(tmp_path / "model")
    with pytest.raises(l4.CheckpointError, match="make gives other parts"):
        l4.load_checkpoint(tmp_path / "model", make=lambda model: model)
    l4.save_checkpoint(model, tmp_path / "plain")
    with pytest.raises(l4.CheckpointError, match="it holds none"):
        l4.load_checkpoint(tmp_path / "plain", make=with_parts)


def test_a_whole_layer_is_saved(model, tmp_path):
    class Thrice(l4.DecoderLayer):
        def __init__(self, old):
            for name, value in vars(old).items():
                setattr(self, name, value)

        def __call__(self, x, context, cache=None, *, key=None):
            out, cache, router_logits = super().__call__(x, context, cache, key=key)
            return x + 3 * (out - x), cache, router_logits

    def make(model):
        return replaced(model, None, Thrice, layers=[7])

    l4.save_checkpoint(make(model), tmp_path / "model")
    loaded, tokens = l4.load_checkpoint(tmp_path / "model", make=make), random_tokens(2, 20)
    assert relative_error(forward(loaded, tokens), forward(make(model), tokens)) < TOLERANCE


def test_another_part_of_our_own_is_still_refused(model, tmp_path):
    other = replaced(
        with_parts(model), "input_layernorm", lambda n: RMSNorm(64, eps=0.1, dtype=jnp.float32), [3]
    )
    with pytest.raises(ValueError, match=r"layer 3's input_layernorm\.eps is 0\.1"):
        l4.save_checkpoint(other, tmp_path / "model")


def test_layers_by_number(model):
    """The same numbers for a layer, its leaves and LoRA; the others stay scanned."""
    tokens, apart = random_tokens(2, 20), separated(model, [4, 11])
    wide = separated(model, [11])
    for form, first in ((apart, 3), (wide, 2)):  # three alike, or a cycle of four twice
        assert form.decoder.blocks[0].repeats == first
        assert sum(block.depth for block in form.decoder.blocks) == 12
    for form in (apart, wide):
        np.testing.assert_allclose(forward(form, tokens), forward(model, tokens), atol=1e-5)
    lora = LoRA(apart, *in_layers(apart, [4], "self_attn.*_proj"), rank=2, key=jax.random.key(0))
    assert len(lora.updates) == 4
    noisy = jax.tree.map(lambda leaf: leaf + 0.1, lora.updates)
    changed = lora.with_updates(noisy).merged()
    for number in range(12):
        same = eqx.tree_equal(layer(changed, number), layer(model, number))
        assert bool(same) == (number != 4)
    with pytest.raises(ValueError, match="Layer 4 is stacked with others"):
        in_layers(model, [4], "*")
    for wrong in (lambda: separated(model, [12]), lambda: in_layers(apart, [-1], "*")):
        with pytest.raises(ValueError, match="no layer"):
            wrong()
    assert in_layers(model.unstacked(), [3], "*") == ("decoder.blocks.0.layers.3.*",)


def test_another_activation_in_one_layer(model, tmp_path):
    """A setting, which isn't part of the tree, is replaced like a module; such a model isn't saved,
    as its config can't say so."""
    tokens = random_tokens(2, 20)
    swapped = replaced(model, "feed_forward.experts.activation", lambda old: jax.nn.gelu, [6])
    assert layer(swapped, 6).feed_forward.experts.activation is jax.nn.gelu
    assert layer(swapped, 5).feed_forward.experts.activation is jax.nn.silu
    assert relative_error(forward(swapped, tokens), forward(model, tokens)) > 1e-4
    back = replaced(swapped, "feed_forward.experts.activation", lambda old: jax.nn.silu, [6])
    assert jax.tree.structure(back) == jax.tree.structure(model)
    with pytest.raises(ValueError, match=r"layer 6's feed_forward\.experts\.activation is"):
        l4.save_checkpoint(swapped, tmp_path / "model")
