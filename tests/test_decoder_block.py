"""How often Python runs a layer: once for all equal layers; and an editing function: each time."""

from dataclasses import replace

import equinox as eqx
import jax
import pytest

import llama4_eqx as l4
from llama4_eqx.layers import Attention, Probe, SequenceMixer
from llama4_eqx.research import At, Scale, replaced
from tests.toys import SCOUT, random_tokens, relative_error

CYCLE, REPEATS = (1, 1, 0), 2  # two layers of one kind and one of another
CONFIG = replace(SCOUT, num_hidden_layers=len(CYCLE) * REPEATS, no_rope_layers=CYCLE * REPEATS)


class Calls(list):
    """A list that is equal to itself alone, so that it can be a static field."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Counting(SequenceMixer):
    """Attention that lists its calls."""

    inner: Attention
    calls: Calls = eqx.field(static=True)
    sites = Attention.sites

    def __call__(self, x, context, cache=None, *, key=None):
        self.calls.append(x.shape)
        return self.inner(x, context, cache, key=key)

    def empty_cache(self, batch_shape, capacity):
        return self.inner.empty_cache(batch_shape, capacity)


@pytest.fixture(params=[True, False], ids=["stacked", "unstacked"])
def model(request):
    model = l4.Llama4(l4.Llama4Config(CONFIG), key=jax.random.key(0))
    return model if request.param else model.unstacked()


def test_equal_layers_are_traced_once_for_all_calls(model):
    calls = Calls()
    model = replaced(model, "self_attn", lambda attention: Counting(attention, calls))
    tokens = random_tokens(2, 16)

    def loss(model):
        return model(tokens).logits.sum()

    alone = model(tokens).logits
    model(tokens + 1)
    compiled = eqx.filter_jit(model)(tokens).logits
    eqx.filter_grad(loss)(model)
    eqx.filter_jit(eqx.filter_grad(loss))(model)
    assert len(calls) == len(set(CYCLE))
    assert relative_error(alone, compiled) < 1e-5
    model(tokens[:, :8])
    assert len(calls) == 2 * len(set(CYCLE))


def test_scanned_layers_are_traced_once_for_all_values_of_an_edit():
    calls, model = Calls(), l4.Llama4(l4.Llama4Config(CONFIG), key=jax.random.key(0))
    model = replaced(model, "self_attn", lambda attention: Counting(attention, calls))
    tokens = random_tokens(2, 16)
    plain = model(tokens).logits
    before = len(calls)
    for factor, layer in ((1.0, 0), (2.0, 3)):
        probe = Probe(edit=Scale("ff_out", factor, layers=layer))
        change = relative_error(model(tokens, probe=probe).logits, plain)
        assert change < 1e-5 if factor == 1 else change > 0.01
    assert len(calls) == before + len(CYCLE)


def test_an_editing_function_is_called_in_each_call(model):
    """It may see a variable that has changed since."""
    factor, tokens = 1.0, random_tokens(2, 16)

    def edit(site, value, layer):
        return value * factor if site == "ff_out" else value

    probes = [Probe(edit=edit), Probe(edit=At("ff_out", edit))]
    plain = [model(tokens, probe=probe).logits for probe in probes]
    factor = 2.0
    for probe, logits in zip(probes, plain, strict=True):
        assert relative_error(model(tokens, probe=probe).logits, logits) > 0.01


def test_an_edit_at_a_site_that_its_module_does_not_list(model):
    class Forgetful(Counting):
        sites = SequenceMixer.sites

    model = replaced(model, "self_attn", lambda attention: Forgetful(attention, Calls()))
    with pytest.raises(ValueError, match="shows the site 'q' without listing it"):
        model(random_tokens(2, 16), probe=Probe(edit=lambda site, value, layer: value))
