"""Arguments of another kind, such as a LoRA for a model or a dtype of torch: one sentence each."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch

import llama4_eqx as l4
from llama4_eqx import generation, research, training
from llama4_eqx.checkpoints import TrainCheckpointer, load_adapter, save_adapter
from llama4_eqx.distributed import shard
from llama4_eqx.generation import Sample
from llama4_eqx.layers import Probe
from llama4_eqx.quantization import Quantization, quantize
from llama4_eqx.training import (
    LoRA,
    init_train_state,
    make_train_step,
    next_token_loss,
    router_report,
    select,
)
from tests.toys import SCOUT

CONFIG = l4.Llama4Config(replace(SCOUT, num_hidden_layers=1, no_rope_layers=(1,)))
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def unchecked_types(monkeypatch):
    """Users have no shape checks unless they ask for them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(CONFIG, key=KEY)


@pytest.fixture(scope="module")
def lora(model):
    return LoRA(model, "*q_proj", rank=2, key=KEY)


TOKENS = [[1, 2, 3]]
NEW = {"max_new_tokens": 2}
KINDS = {
    "text config": (lambda m, _: l4.Llama4(CONFIG.text_config, key=KEY), "Llama4Config.text_confi"),
    "dict for a config": (lambda m, _: l4.with_config(m, {"vocab_size": 8}), "but is a dict"),
    "seed for a key": (lambda m, _: l4.Llama4(CONFIG, key=0), r"pass jax.random.key\(seed\)"),
    "seed of a LoRA": (lambda m, _: LoRA(m, "*", rank=1, key=3), r"pass jax.random.key\(seed\)"),
    "dict for a cache": (lambda m, _: m(TOKENS, cache={}), "cache must be a KVCache, but is a dic"),
    "site for a probe": (lambda m, _: m(TOKENS, probe="resid_post"), r"write Probe\(read="),
    "name for backends": (lambda m, _: m(TOKENS, backends="dense"), "must be a Backends, but is"),
    "LoRA for a model": (lambda _, lora: l4.generate(lora, TOKENS, **NEW), r"lora.merged\(\)"),
    "saved LoRA": (lambda _, lora: l4.save_checkpoint(lora, "x"), "save_adapter"),
    "saved part": (lambda m, _: l4.save_checkpoint(m.decoder, "x"), "must be a Llama4, but is a D"),
    "model as adapter": (lambda m, _: save_adapter(m, "x"), "save_checkpoint"),
    "adapter on a LoRA": (lambda _, lora: load_adapter(lora, "x"), "onto a model without one"),
    "name for a sampler": (lambda m, _: l4.generate(m, TOKENS, sampler="greedy", **NEW), "Greedy"),
    "bits": (lambda m, _: quantize(m, "int8"), r"such as Quantization\(dtype=jnp.int4\)"),
    "quantised LoRA": (lambda _, lora: quantize(lora), "quantise the base of a LoRA"),
    "no mesh": (lambda m, _: shard(m, None, {}), "must be a Mesh, but is a NoneType: make one"),
    "value for an edit": (lambda m, _: Probe(edit=3), "a function edit.site, value, layer."),
    "class for an edit": (lambda m, _: Probe(edit=research.Add), "must be an Edit, a function"),
    "plain processor": (
        lambda m, _: l4.generate(m, TOKENS, processors=[print], **NEW),
        "A processor must be a LogitsProcessor, but is a builtin",
    ),
    "processor's class": (
        lambda m, _: l4.generate(m, TOKENS, processors=generation.NoRepeatNgram, **NEW),
        "LogitsProcessor",
    ),
    "beams of a LoRA": (
        lambda _, lora: generation.beam_search(lora, TOKENS, beams=2, **NEW),
        r"lora.merged\(\)",
    ),
    "likelihood by a LoRA": (
        lambda _, lora: generation.loglikelihood(lora, TOKENS, TOKENS),
        r"lora.merged\(\)",
    ),
    "config for a model": (
        lambda m, _: research.replaced(m.config, "self_attn", lambda old: old),
        "model must be a Llama4",
    ),
    "no part": (
        lambda m, _: research.replaced(m, "self_attn", lambda old: None),
        "in place of self_attn of layer 0, but returned a NoneType",
    ),
    "nothing to make": (
        lambda m, _: research.replaced(m, "self_attn", None),
        "must be a function of the old part, but is a NoneType",
    ),
    "number for a part": (
        lambda m, _: research.replaced(m, 3, lambda old: old),
        "part must be a str, but is a int: None stands for the whole layer",
    ),
    "config for parameters": (
        lambda m, _: training.decay_mask(m.config),
        "parameters must be a model's arrays, as .* but hold a Llama4Config",
    ),
    "config for Muon": (lambda m, _: training.muon_dimensions(m.config), "hold a Llama4Config"),
    "output for logits": (
        lambda m, _: training.router_report(m(TOKENS), top_k=1),
        "router_logits must be those of an Output, .* but is a Output",
    ),
    "no logits": (lambda m, _: training.router_report(None, top_k=1), "but is a NoneType"),
    "biases of a LoRA": (lambda _, lora: training.with_expert_bias(lora), "must be a Llama4, but"),
    "no biases": (lambda m, _: training.get_expert_bias(None), "must be a Llama4, but is a NoneT"),
    "name for rules": (lambda m, _: shard(m, jax.make_mesh((1,), ("x",)), "x"), "or a dict, such"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_objects(model, lora, kind):
    call, sentence = KINDS[kind]
    with pytest.raises(TypeError, match=sentence) as raised:
        call(model, lora)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "number", [0, -1, 2.0, True, "3", None, np.float32(1), jnp.ones(2)], ids=str
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, n: l4.generate(m, TOKENS, max_new_tokens=n), "max_new_tokens"),
        (lambda m, n: m.empty_cache((1,), n), "capacity"),
        (lambda m, n: LoRA(m, "*q_proj", rank=n, key=KEY), "rank"),
        (lambda m, n: TrainCheckpointer("x", max_to_keep=n), "max_to_keep"),
        (lambda m, n: generation.NoRepeatNgram(n), "size"),
        (lambda m, n: generation.beam_search(m, TOKENS, beams=n, **NEW), "beams"),
        (lambda m, n: generation.loglikelihood(m, TOKENS, TOKENS, batch_size=n), "batch_size"),
        (lambda m, n: generation.token_logprobs(m, TOKENS, token_block=n), "token_block"),
    ],
    ids=["new", "capacity", "rank", "max_to_keep", "size", "beams", "batch_size", "token_block"],
)
def test_counts(model, call, name, number):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1, not "):
        call(model, number)


@pytest.mark.parametrize("number", [2**31, 10**400], ids=["2**31", "10**400"])
def test_counts_and_ids_beyond_32_bits(model, number):
    with pytest.raises(ValueError, match="max_new_tokens must be below 2³¹, but is "):
        l4.generate(model, TOKENS, max_new_tokens=number)
    with pytest.raises(ValueError, match="A stop id must be below 2³¹, but is "):
        l4.generate(model, TOKENS, stop_ids=[1, number], **NEW)
    with pytest.raises(ValueError, match="A token id must be below 2³¹, but is "):
        generation.BannedTokens([number])


@pytest.mark.parametrize("stop_ids", ["</s>", [2.5], -1, [None]], ids=str)
def test_stop_ids(model, stop_ids):
    with pytest.raises(ValueError, match="A stop id must be a whole number from 0, not "):
        l4.generate(model, TOKENS, stop_ids=stop_ids, **NEW)


def uniform_loss(model, batch, key):
    return model(batch).logits.mean(), 1, {}


ADAM = optax.adam(1e-3)
STEPS = {
    "optimiser's function": (lambda: make_train_step(optax.adam, uniform_loss), "one of optax"),
    "optimiser's name": (lambda: make_train_step("adam", uniform_loss), "but is 'adam'"),
    "no loss": (lambda: make_train_step(ADAM, None), "loss_function must be a function"),
    "pattern": (lambda: make_train_step(ADAM, uniform_loss, trainable="*"), "select.model, '*'"),
    "integers": (
        lambda: make_train_step(ADAM, uniform_loss, compute_dtype="int8"),
        "compute_dtype must be a floating-point dtype",
    ),
    "word for a norm": (
        lambda: make_train_step(ADAM, uniform_loss, clip_norm="1"),
        "clip_norm must be a number, not '1'",
    ),
    "no norm": (lambda: make_train_step(ADAM, uniform_loss, clip_norm=np.nan), "be positive"),
    "word for a decay": (
        lambda: make_train_step(ADAM, uniform_loss, ema_decay="0.9"),
        "ema_decay must be a number, not '0.9'",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_arguments_of_a_step(name):
    make, sentence = STEPS[name]
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()


@pytest.mark.parametrize("patterns", [(), (3,), (None, "*")], ids=str)
def test_patterns(model, patterns):
    """None at all would train nothing, in silence."""
    with pytest.raises(ValueError, match="select takes one pattern of names or several"):
        select(model, *patterns)


def test_numbers_of_losses_and_of_a_lora(model):
    with pytest.raises(ValueError, match="token_block must be a whole number from 1, not 0"):
        next_token_loss(model, TOKENS, token_block=0)
    with pytest.raises(ValueError, match="top_k is 99, but there are 4 experts"):
        router_report(jnp.zeros((1, 3, 4)), top_k=99)
    with pytest.raises(ValueError, match="alpha must be a number, not '2'"):
        LoRA(model, "*q_proj", rank=2, alpha="2", key=KEY)
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        LoRA(model, "*q_proj", rank=2, dtype="int8", key=KEY)


def test_a_steps_state_and_loss(model):
    with pytest.raises(TypeError, match=r"one of optax, such as optax\.adamw"):
        init_train_state(model, optax.adam, key=KEY)
    with pytest.raises(TypeError, match=r"pass jax.random.key\(seed\)"):
        init_train_state(model, ADAM, key=0)
    state, tokens = init_train_state(model, ADAM, key=KEY), jnp.asarray(TOKENS)
    step = make_train_step(ADAM, uniform_loss, donate=False)
    with pytest.raises(TypeError, match=r"state must be a TrainState.*batch comes second"):
        step(tokens, state)
    alone = make_train_step(ADAM, lambda *args: uniform_loss(*args)[0], donate=False)
    with pytest.raises(TypeError, match="loss_function must return three things"):
        alone(state, tokens)
    several = make_train_step(ADAM, lambda m, batch, key: (m(batch).logits, 1, {}), donate=False)
    with pytest.raises(ValueError, match=r"must be one number, but has the shape \(1, 3, 256\)"):
        several(state, tokens)


TABLE = np.zeros((2, 256), np.int32)
VALUES = {
    "top_k": (lambda: Sample(top_k=1.5), "top_k must be a whole number from 1, not 1.5"),
    "word for a temperature": (
        lambda: Sample(temperature="hot"),
        "temperature must be a number, not 'hot'",
    ),
    "several temperatures": (lambda: Sample(temperature=[1, 2]), "temperature must be a number, n"),
    "word for top_p": (lambda: Sample(top_p="most"), "top_p must be a number, not 'most'"),
    "no temperature": (lambda: Sample(temperature=0), "use Greedy"),
    "repetition penalty": (lambda: generation.RepetitionPenalty(0.0), "be a positive number, not"),
    "penalty": (lambda: generation.PresencePenalty(np.nan), "must be a number, not nan"),
    "word for a penalty": (lambda: generation.FrequencyPenalty("1"), "must be a number, not '1'"),
    "banned": (lambda: generation.BannedTokens([1.5]), "whole number from 0, not 1.5"),
    "forced": (lambda: generation.ForcedTokens([3, -2]), "whole number from -1, not -2"),
    "real states": (lambda: generation.Automaton(TABLE * 1.0), "must be integers, states × vocab"),
    "one state's row": (lambda: generation.Automaton(TABLE[0]), "must be integers, states × voc"),
    "no such state": (lambda: generation.Automaton(TABLE + 2), "leads to state 2"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_samplers_and_processors(name):
    make, sentence = VALUES[name]
    with pytest.raises(ValueError, match=sentence):
        make()


TEXTS = {
    "text": (["ab"], "Context 0 must be a list of token ids, such as a tokenizer's, not 'ab'"),
    "real numbers": ([[1.5]], "Context 0 must be a list of token ids"),
    "one list": ([1], "Context 0 must be a list of token ids"),
    "beyond": ([[256]], "Context 0 has token 256, but ids go from 0 to 255"),
    "negative": ([[-1]], "Context 0 has token -1, but"),
    "nothing": ([[]], "Context 0 is empty"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_to_score(model, name):
    contexts, sentence = TEXTS[name]
    with pytest.raises(ValueError, match=sentence):
        generation.loglikelihood(model, contexts, [[3]])


@pytest.mark.parametrize("number", ["0", 1.0, -1, 1, True, None])
def test_numbers_of_layers(model, number):
    with pytest.raises(ValueError, match=r"no layer|must be a whole number"):
        research.layer(model, number)


def test_rows_without_a_token(model):
    """Of one row all is padding: nothing has a probability there."""
    mask = [[True] * 3, [False] * 3]
    for run in (l4.generate, lambda *a, **k: list(l4.stream(*a, **k))):
        with pytest.raises(ValueError, match="A row of the prompt has no real token"):
            run(model, TOKENS * 2, mask=mask, **NEW)
    with pytest.raises(ValueError, match="A row of the prompt has no real token"):
        generation.beam_search(model, TOKENS * 2, mask=mask, beams=2, **NEW)


def test_beams_of_nothing(model):
    """NaN logits and forbidden vocabularies are errors here, too, not token 0."""
    broken = eqx.tree_at(lambda m: m.lm_head, model, model.lm_head * jnp.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        generation.beam_search(broken, TOKENS, beams=2, **NEW)
    nothing = generation.Automaton(np.full((1, 256), -1))
    with pytest.raises(ValueError, match="forbid every token"):
        generation.beam_search(model, TOKENS, beams=2, processors=nothing, **NEW)
    # One token and its end: the beams that find no other are no failure.
    one = np.full((2, 256), -1)
    one[0, 5], one[1, 7] = 1, 1
    found = generation.beam_search(
        model, TOKENS, beams=2, processors=generation.Automaton(one), stop_ids=7, **NEW
    )
    assert found.tokens[0, 0].tolist() == [5, 7]


def test_an_edit_that_forgets_its_value(model):
    with pytest.raises(ValueError, match="An edit at 'embedding' returned None: return the value"):
        model(TOKENS, probe=Probe(edit=lambda site, value, layer: None))


@pytest.mark.parametrize("dtype", ["bf16", "int8", jnp.int32, torch.bfloat16, 16], ids=str)
def test_dtypes(model, dtype, tmp_path):
    sentence = "dtype must be a floating-point dtype of JAX.* but is "
    with pytest.raises(ValueError, match=sentence):
        l4.Llama4(CONFIG, dtype=dtype, key=KEY)
    with pytest.raises(ValueError, match=sentence):
        l4.load_checkpoint(tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int3", torch.int8, jnp.int32], ids=str)
def test_dtypes_of_few_bits(model, dtype):
    with pytest.raises(ValueError, match=r"A cache can be int8 or float8_e4m3fn, not .*int"):
        model.empty_cache((1,), 8, dtype=dtype)
    with pytest.raises(ValueError, match=r"Weights can be quantised to .*, not to .*int"):
        Quantization(dtype=dtype)


def test_an_empty_name_is_no_folder(model, lora, tmp_path, monkeypatch):
    """It would be the working directory, where an unset variable shouldn't lead."""
    monkeypatch.chdir(tmp_path)
    for save in (
        lambda: l4.save_checkpoint(model, ""),
        lambda: save_adapter(lora, ""),
        lambda: TrainCheckpointer(""),
    ):
        with pytest.raises(ValueError, match="folder's name is empty"):
            save()
    assert not list(tmp_path.iterdir())


def test_a_name_on_the_hub_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="fetch it: hf download meta-llama/Scout"):
        l4.load_checkpoint("meta-llama/Scout")
    with pytest.raises(FileNotFoundError, match=r"There is no folder ~/scout\. .*expanduser"):
        l4.load_checkpoint("~/scout")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*runs/model\.$"):
        l4.load_checkpoint(tmp_path / "runs/model")


@pytest.mark.parametrize("options", [{"rank": 2, "alpha": float("nan")}, {"rank": 2}])
def test_a_lora_without_effect(model, options):
    with pytest.raises(ValueError, match=r"alpha must be a finite number|needs patterns"):
        LoRA(model, *["*q_proj"][: len(options) - 1], key=KEY, **options)


def test_the_first_wrong_id_is_named(model):
    with pytest.raises(ValueError, match=r"ids go from 0 to 255. The first such id is 300\.$"):
        model([[1, 300, -2]])


def test_rows_of_different_lengths(model):
    for call in (model, lambda rows: l4.generate(model, rows, **NEW)):
        with pytest.raises(ValueError, match="pad rows of different lengths and pass a mask"):
            call([[1, 2, 3], [4]])


def test_numbers_and_keys_of_other_libraries(model):
    """What is as good is taken."""
    other = {"max_new_tokens": torch.tensor(2), "stop_ids": np.uint8(7), "samples": np.int64(1)}
    sampler = Sample(temperature=np.float64(0.5))
    key = jax.random.PRNGKey(0)
    assert l4.generate(model, TOKENS, sampler=sampler, key=key, **other).shape == (1, 1, 2)
