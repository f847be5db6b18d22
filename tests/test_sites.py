"""What a probe reads and changes, against `transformers`' hooks, however the model runs."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from transformers.models.llama4 import modeling_llama4

import llama4_eqx as l4
from llama4_eqx.distributed import DATA, EXPERT_ALL_TO_ALL, FSDP, TENSOR, shard
from llama4_eqx.layers import Probe
from llama4_eqx.layers.sites import Sites
from llama4_eqx.research import Add, At, Patch
from llama4_eqx.research.edits import token_axis
from tests.toys import (
    MAVERICK,
    MULTIMODAL,
    SCOUT,
    TOYS,
    as_torch,
    random_tokens,
    reference_model,
    relative_error,
)

TOLERANCE = 1e-5
# Two cycles, the second in part for Maverick: scanned layers and a tail.
CONFIGS = {
    "scout": replace(SCOUT, num_hidden_layers=8),
    "maverick": replace(MAVERICK, num_hidden_layers=9),
}
SEQ = 24


def first(output):
    """A module's output, without what some modules return beside it."""
    return output[0] if isinstance(output, tuple) else output


def hooked(reference, tokens, monkeypatch) -> dict[str, list[np.ndarray]]:
    """The reference's value at each text site, for each layer that has it."""
    found: dict[str, list] = {}

    def keep(site, value):
        found.setdefault(site, []).append(value.detach().float().numpy())

    def by_token(value):
        return value.reshape(*tokens.shape, -1)

    core = modeling_llama4.eager_attention_forward

    def attention(module, query, key, value, *args, **options):
        out, weights = core(module, query, key, value, *args, **options)
        for site, x in (("q", query), ("k", key), ("v", value)):
            keep(site, x.transpose(1, 2))
        keep("pattern", weights)
        keep("head_out", out)
        return out, weights

    monkeypatch.setattr(modeling_llama4, "eager_attention_forward", attention)
    handles = []

    def before(module, function):
        handles.append(module.register_forward_pre_hook(lambda m, args: function(args[0])))

    def after(module, function):
        handles.append(module.register_forward_hook(lambda m, args, output: function(output)))

    model = reference.model
    after(model.embed_tokens, lambda out: keep("embedding", out))
    after(model.norm, lambda out: keep("final_norm", out))
    for layer in model.layers:
        before(layer.input_layernorm, lambda x: keep("resid_pre", x))
        before(layer.post_attention_layernorm, lambda x: keep("resid_mid", x))
        after(layer, lambda out: keep("resid_post", first(out)))
        after(layer.self_attn, lambda out: keep("attn_out", first(out)))
        feed_forward = layer.feed_forward
        after(feed_forward, lambda out: keep("ff_out", by_token(first(out))))
        if hasattr(feed_forward, "router"):
            number, top_k = feed_forward.num_experts, feed_forward.top_k

            def router(out, top_k=top_k):
                scores, logits = out
                keep("router_logits", by_token(logits))
                weights, ids = scores.topk(top_k, dim=-1)
                keep("router_weights", by_token(weights))
                keep("expert_ids", by_token(ids))

            def experts(out, number=number):
                keep("expert_out", by_token(out.reshape(number, -1, out.shape[-1]).sum(0)))

            after(feed_forward.router, router)
            after(feed_forward.experts, experts)
    with torch.no_grad():
        reference(as_torch(tokens, torch.long))
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = reference_model(CONFIGS[request.param])
    reference.save_pretrained(folder)
    return reference, l4.load_checkpoint(folder)


@pytest.fixture(scope="module")
def truth(pair):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return hooked(pair[0], random_tokens(2, SEQ), monkeypatch)


def read_all(model, tokens, **options):
    text = model.sites(images=False)
    return eqx.filter_jit(model)(tokens, probe=Probe(read=text), **options)


def assert_equal_to_reference(readings, truth, sites):
    assert set(truth) == set(sites)
    for site, theirs in truth.items():
        theirs = theirs[0] if site in ("embedding", "final_norm") else np.stack(theirs)
        assert relative_error(readings[site], theirs) < TOLERANCE, site


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_every_site_is_the_references(form, pair, truth):
    model = pair[1] if form == "scanned" else pair[1].unstacked()
    readings = read_all(model, random_tokens(2, SEQ)).readings
    assert_equal_to_reference(readings, truth, model.sites())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ({"fsdp": 2, "tensor": 2, "seq": 2}, (FSDP | TENSOR).replace(seq="seq")),
        ({"data": 2, "expert": 2}, DATA | EXPERT_ALL_TO_ALL.replace(batch=None)),
        ({"expert": 2}, EXPERT_ALL_TO_ALL),
    ],
)
def test_every_site_is_the_references_on_a_mesh(sizes, rules, pair, truth):
    names = tuple(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names))
    model = shard(pair[1], mesh, rules)
    readings = read_all(model, random_tokens(2, SEQ)).readings
    assert_equal_to_reference(readings, truth, model.sites())


def test_every_site_is_the_references_in_prefill_and_decode(pair, truth):
    """A prefill of 17 tokens, the rest one by one: values concatenate to those of the whole."""
    model, tokens, capacity = pair[1], random_tokens(2, SEQ), 30
    cache, parts = model.empty_cache((2,), capacity), []
    for start, end in [(0, 17), *((i, i + 1) for i in range(17, SEQ))]:
        output = read_all(model, tokens[:, start:end], cache=cache)
        cache = output.cache
        parts.append(output.readings)
    whole = {
        site: jnp.concatenate([part[site] for part in parts], token_axis(site))
        for site in model.sites()
    }
    assert not np.asarray(whole["pattern"][..., SEQ:]).any()
    whole["pattern"] = whole["pattern"][..., :SEQ]
    assert_equal_to_reference(whole, truth, model.sites())


def test_vision_sites_are_the_references(tmp_path):
    reference = reference_model(MULTIMODAL)
    reference.save_pretrained(tmp_path)
    model = l4.load_checkpoint(tmp_path)
    pixels = jax.random.normal(jax.random.key(0), (2, 3, 28, 28))
    tokens = jnp.full(8, 250)[None]
    output = model(tokens, pixel_values=pixels, probe=Probe(read=model.vision_model.sites))
    found: dict[str, list] = {}
    vision = reference.model.vision_model if hasattr(reference, "model") else reference.vision_model

    def keep(site, value):
        found.setdefault(site, []).append(value)

    for layer in vision.model.layers:
        layer.register_forward_hook(lambda m, a, out: keep("vision_resid_post", first(out)))
        layer.self_attn.register_forward_hook(lambda m, a, out: keep("vision_pattern", out[1]))
    vision.vision_adapter.register_forward_hook(
        lambda m, a, out: found.update(vision_features=a[0], adapter_out=out)
    )
    with torch.no_grad():
        vision(as_torch(pixels))
    assert set(found) == set(output.readings)
    for site, theirs in found.items():
        theirs = torch.stack(theirs) if isinstance(theirs, list) else theirs
        ours = output.readings[site]
        assert relative_error(ours.reshape(theirs.shape), theirs.numpy()) < TOLERANCE, site


def test_an_edit_does_what_a_hook_of_the_reference_does(pair):
    reference, model = pair
    tokens, vector = random_tokens(2, SEQ), jax.random.normal(jax.random.key(0), (64,))

    def hook(module, args, output):
        first(output)[:, 5] += as_torch(vector)
        return output

    handle = reference.model.layers[6].register_forward_hook(hook)
    with torch.no_grad():
        theirs = reference(as_torch(tokens, torch.long)).logits
    handle.remove()
    for positions in (5, 5 - SEQ):
        add = Add("resid_post", vector, layers=6, positions=positions)
        for form in (model, model.unstacked()):
            ours = eqx.filter_jit(form)(tokens, probe=Probe(edit=add)).logits
            assert relative_error(ours, theirs) < 2 * TOLERANCE
    plain = eqx.filter_jit(model)(tokens).logits
    assert relative_error(plain, theirs) > 1e-3


def test_writing_back_what_was_read_changes_no_bit(pair):
    model, tokens = pair[1], random_tokens(2, SEQ)
    clean = read_all(model, tokens)
    back = [Patch(site, clean.readings[site]) for site in ("embedding", "final_norm")]
    everywhere = At(model.sites(), lambda site, value, layer: jnp.where(layer < 99, value, 0))
    probe = Probe(read=model.sites(), edit=(*back, everywhere))
    edited = eqx.filter_jit(model)(tokens, probe=probe)
    np.testing.assert_array_equal(edited.logits, clean.logits)


def test_without_a_probe_the_program_is_the_same(monkeypatch):
    """As if no layer had a site."""
    model = l4.Llama4(l4.Llama4Config(CONFIGS["maverick"]), key=jax.random.key(0))
    tokens, cache = random_tokens(2, SEQ), model.empty_cache((2,), 30)

    def text():
        jax.clear_caches()
        forward = jax.jit(lambda m, t, c: m(t, cache=c).logits).lower(model, tokens, cache)
        gradient = jax.jit(jax.grad(lambda m, t: m(t).logits.sum())).lower(model, tokens)
        return forward.as_text(), gradient.as_text()

    with_sites = text()
    monkeypatch.setattr(Sites, "__call__", lambda self, site, value: value)
    assert text() == with_sites


def test_a_site_that_the_model_lacks_is_named():
    dense = l4.Llama4(l4.Llama4Config(TOYS["dense"]), key=jax.random.key(0))
    tokens = random_tokens(8)
    with pytest.raises(ValueError, match=r"no site 'router_logits'.*resid_post"):
        dense(tokens, probe=Probe(read="router_logits"))
    with pytest.raises(ValueError, match=r"no site 'expert_out'"):
        dense(tokens, probe=Probe(edit=Add("expert_out", jnp.ones(64))))
    with pytest.raises(ValueError, match=r"no site 'vision_pattern'"):
        dense(tokens, probe=Probe(read=("resid_post", "vision_pattern")))
    with pytest.raises(ValueError, match=r"must return what it got, float32 of shape \(8, 64\)"):
        dense(tokens, probe=Probe(edit=At("resid_post", lambda site, value, layer: value[..., :3])))


def test_edits_under_grad_vmap_and_remat():
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    tokens, vector = random_tokens(12), jax.random.normal(jax.random.key(1), (64,))

    def loss(vector, layer, remat="dots"):
        probe = Probe(edit=Add("resid_post", vector, layers=layer))
        return jnp.mean(model(tokens, probe=probe, remat=remat).logits ** 2)

    layers = jnp.array([0, 3, 7])
    each = jnp.stack([jax.jit(loss)(vector, layer) for layer in layers])
    together = jax.jit(jax.vmap(loss, (None, 0)))(vector, layers)
    assert relative_error(together, each) < TOLERANCE
    # Against a difference quotient along a direction, in float32: good to a thousandth.
    gradient, step = jax.jit(jax.grad(loss))(vector, 3), 1e-2
    direction = jax.random.normal(jax.random.key(2), (64,))
    quotient = (loss(vector + step * direction, 3) - loss(vector - step * direction, 3)) / (
        2 * step
    )
    assert abs(float(gradient @ direction) / float(quotient) - 1) < 1e-2
    for remat in ("full", "none"):
        other = jax.jit(jax.grad(partial(loss, layer=3, remat=remat)))(vector)
        assert relative_error(other, gradient) < TOLERANCE


@pytest.mark.slow
def test_edits_are_the_same_on_a_mesh():
    """Of whole values, although each device holds a shard of tokens, heads and experts."""
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    tokens = random_tokens(4, SEQ)
    ones = jnp.linspace(-1, 1, 16)
    edits = (
        Add("resid_mid", jnp.linspace(-1, 1, 64), layers=[1, 4], positions=[3, -2]),
        Add("q", jnp.linspace(-2, 2, 4)[:, None] * ones, positions=7),
        At("pattern", lambda site, value, layer: value.at[..., 1, 9, :].set(0.01)),
        Patch("expert_ids", jnp.int32(1), layers=2, positions=11),
    )
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 3)
    sharded = shard(model, mesh, (FSDP | TENSOR).replace(seq="seq"))

    def loss(model, probe):
        return jnp.mean(model(tokens, probe=probe).logits ** 2)

    for edit in (*edits, edits):
        probe = Probe(edit=edit)
        whole = eqx.filter_jit(model)(tokens, probe=probe).logits
        ours = eqx.filter_jit(sharded)(tokens, probe=probe).logits
        assert relative_error(ours, whole) < TOLERANCE
    gradient = eqx.filter_jit(eqx.filter_grad(lambda edit, m: loss(m, Probe(edit=edit))))
    on_one, on_mesh = (gradient(edits[:2], m) for m in (model, sharded))
    for whole, ours in zip(jax.tree.leaves(on_one), jax.tree.leaves(on_mesh), strict=True):
        assert relative_error(ours, whole) < 2 * TOLERANCE
