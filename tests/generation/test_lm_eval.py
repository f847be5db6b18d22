"""`lm-eval` with our model and with its own adapter for `transformers`: the same numbers."""

import json
import os

import jax
import numpy as np
import pytest

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer, load_chat_template, load_tokenizer

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
from facts import WORLD, config, prompt, sentences

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs, of many kinds
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\n\n"
    "{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = byte_tokenizer()
    model = l4.Llama4(config(tokenizer), key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, model)
    l4.save_checkpoint(model, folder)
    tokenizer.save(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapters(folder):
    import torch
    from lm_eval.models.huggingface import HFLM

    from llama4_eqx.generation.lm_eval_adapter import LmEval

    theirs = HFLM(
        pretrained=str(folder),
        add_bos_token=True,
        prefix_token_id=load_tokenizer(folder).bos_id,
        max_length=64,
        batch_size=4,
        device="cpu",
        dtype=torch.float32,
    )
    ours = LmEval(
        l4.load_checkpoint(folder),
        load_tokenizer(folder),
        max_length=64,
        batch_size=4,
        chat_template=load_chat_template(folder),
    )
    return {"ours": ours, "theirs": theirs}


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods(adapters):
    pairs = [
        (prompt("capital", country), answer) for country, (answer, *_) in list(WORLD.items())[:5]
    ]
    pairs += [("", "Oslo"), ("trailing  ", "x"), ("<|begin_of_text|>a", "b"), ("a" * 90, "b" * 9)]
    found = {
        name: adapter.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        for name, adapter in adapters.items()
    }
    totals = {name: [total for total, _ in results] for name, results in found.items()}
    np.testing.assert_allclose(totals["ours"], totals["theirs"], rtol=1e-5)
    greedy = {name: [bool(flag) for _, flag in results] for name, results in found.items()}
    assert greedy["ours"] == greedy["theirs"]


def test_rolling(adapters):
    texts = [(" ".join(sentences()[:n]),) for n in (1, 4, 9)]
    found = {
        name: adapter.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
        for name, adapter in adapters.items()
    }
    np.testing.assert_allclose(found["ours"], found["theirs"], rtol=1e-5)


def test_generation_until(adapters):
    free = instances("generate_until", [(p, {"until": [], "max_gen_toks": 24}) for p in "abcde"])
    theirs = adapters["theirs"].generate_until(free, disable_tqdm=True)
    assert adapters["ours"].generate_until(free) == theirs
    assert len(set(theirs)) > 1
    until = [text[6:8] for text in theirs if len(text) > 8][:2]
    options = {"until": until, "max_gen_toks": 24}
    cut = instances("generate_until", [(p, options) for p in ("a", "bc", "c", "a longer one")])
    theirs = adapters["theirs"].generate_until(cut, disable_tqdm=True)
    assert adapters["ours"].generate_until(cut) == theirs
    assert any(len(text) < 20 for text in theirs)
    drawn = instances("generate_until", [("a", {"temperature": 2.0, "max_gen_toks": 8})] * 3)
    assert len(set(adapters["ours"].generate_until(drawn))) > 1


def test_chats(adapters):
    history = [{"role": "user", "content": "Hi"}]
    for last, prompted in ((None, True), ({"role": "assistant", "content": "The ans"}, False)):
        chat = history if last is None else [*history, last]
        assert adapters["ours"].apply_chat_template(chat, prompted) == adapters[
            "theirs"
        ].apply_chat_template(chat, prompted)


def test_a_task_of_local_text(adapters, tmp_path):
    """Multiple choice over the facts, from a file, evaluated by the harness itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    capitals = [answers[0] for answers in WORLD.values()]
    rows = [
        {"question": prompt("capital", country), "choices": capitals, "label": i}
        for i, country in enumerate(WORLD)
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "facts.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    results = {
        name: lm_eval.simple_evaluate(
            model=adapter,
            tasks=[dict(task)],
            task_manager=TaskManager(),
            bootstrap_iters=0,
        )["results"]["facts"]
        for name, adapter in adapters.items()
    }
    assert {k: v for k, v in results["ours"].items() if "acc" in k} == {
        k: v for k, v in results["theirs"].items() if "acc" in k
    }
    assert results["ours"]["acc,none"] >= 0
