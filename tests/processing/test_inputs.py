"""Which tokens of a chat are to be learnt."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from llama4_eqx.processing import assistant_mask, byte_tokenizer, encode_chat, load_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief. <|eot|>"},
    {"role": "user", "content": "Who are you, assistant?\n\n"},
    {"role": "assistant", "content": "A model. <|header_start|>assistant<|header_end|>\n\nNo."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "\n\nTwelve."},
]


@pytest.fixture(scope="module", params=["bytes", "released"])
def tokenizer(request):
    """Of the released one, a blank line and a content's own are a single token."""
    if request.param == "bytes":
        return byte_tokenizer()
    package = importlib.util.find_spec("llama_models")
    return load_tokenizer(Path(package.submodule_search_locations[0]) / "llama4/tokenizer.model")


@pytest.mark.parametrize("turns", range(1, len(CONVERSATION) + 1))
def test_what_counts_in_a_chat_is_what_the_assistant_adds(tokenizer, turns):
    """To the prompt before each of its turns."""
    whole = encode_chat(tokenizer, CONVERSATION[:turns], add_generation_prompt=False)
    truth = np.zeros(len(whole), bool)
    for place in range(turns):
        if CONVERSATION[place]["role"] == "assistant":
            start = len(encode_chat(tokenizer, CONVERSATION[:place]))
            end = len(
                encode_chat(tokenizer, CONVERSATION[: place + 1], add_generation_prompt=False)
            )
            truth[start:end] = True
    np.testing.assert_array_equal(assistant_mask(tokenizer, whole), truth)
    prompt = encode_chat(tokenizer, CONVERSATION[:turns])
    np.testing.assert_array_equal(assistant_mask(tokenizer, prompt)[: len(whole)], truth)
    assert not assistant_mask(tokenizer, prompt)[len(whole) :].any()


# --- truncated chats

WITH_GENERATION = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header_start|>' ~ m.role ~ '<|header_end|>\\n\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m.content ~ '<|eot|>' }}{% endif %}"
    "{% endfor %}"
)
CHATS = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A long answer"}],
    [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "a\n\n"},
        {"role": "assistant", "content": "é 中"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "assistant"},
    ],
    [{"role": "user", "content": "only"}],
)


@pytest.fixture(scope="module", params=["bytes", "merges"])
def pair(request, tmp_path_factory):
    """Ours and that of `transformers`; the second makes one token of a blank line."""
    folder = tmp_path_factory.mktemp(request.param)
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._backend.to_str())
    if request.param == "merges":
        specials = [x.content for x in backend.get_added_tokens_decoder().values()]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, show_progress=False
        )
        trainer.initial_alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(["assistant\n\n", "A long answer\n\n", "only"] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(folder)
    assert len(ours.encode("\n\n")) == (1 if request.param == "merges" else 2)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", CHATS)
def test_cut_chats_count_as_in_transformers(pair, chat):
    """At every length: a last turn that is cut off counts as far as it goes."""
    ours, theirs = pair
    tokens = encode_chat(ours, chat, add_generation_prompt=False)
    for length in range(1, len(tokens) + 1):
        expected = theirs.apply_chat_template(
            chat,
            chat_template=WITH_GENERATION,
            return_assistant_tokens_mask=True,
            return_dict=True,
            truncation=True,
            max_length=length,
        )
        assert expected["input_ids"] == tokens[:length]
        mask = assistant_mask(ours, tokens[:length])
        assert mask.tolist() == [bool(x) for x in expected["assistant_masks"]]
    assert assistant_mask(ours, tokens).any() == (len(chat) > 1)


def test_open_turns_end_where_padding_or_another_document_begins():
    tokenizer = byte_tokenizer()
    chat = CHATS[0]
    tokens = encode_chat(tokenizer, chat, add_generation_prompt=False)
    mask = assistant_mask(tokenizer, tokens[:-4])
    assert mask.sum() == 10
    for ending in (
        [tokenizer.pad_id] * 3,
        tokens[:9],
        [tokenizer.token_id("<|header_start|>"), 97],
    ):
        np.testing.assert_array_equal(
            assistant_mask(tokenizer, [*tokens[:-4], *ending]), [*mask, *[False] * len(ending)]
        )
    left = [tokenizer.pad_id] * 3
    np.testing.assert_array_equal(
        assistant_mask(tokenizer, [*left, *tokens[:-4]]), [*[False] * 3, *mask]
    )
    # other ends of a turn, with which documents end and calls of tools
    for end in ("<|end_of_text|>", "<|eom|>"):
        ended = [*tokens[:-1], tokenizer.token_id(end), 97, 98]
        assert assistant_mask(tokenizer, ended).sum() == len("A long answer") + 1


def test_continued_messages_count():
    tokenizer = byte_tokenizer()
    tokens = encode_chat(tokenizer, CHATS[0], continue_final_message=True)
    assert assistant_mask(tokenizer, tokens).sum() == len("A long answer")


@pytest.mark.parametrize("array", [np.asarray, np.int64, jnp.asarray, torch.tensor, tuple])
def test_tokens_of_all_libraries(array):
    tokenizer = byte_tokenizer()
    tokens = encode_chat(tokenizer, CHATS[1])
    np.testing.assert_array_equal(
        assistant_mask(tokenizer, array(tokens)), assistant_mask(tokenizer, tokens)
    )


def test_tokens_of_another_form(unchecked):
    tokenizer = byte_tokenizer()
    assert assistant_mask(tokenizer, []).shape == (0,)
    for tokens in ([[1, 2]], [1.5], np.zeros((2, 3), int), "abc"):
        with pytest.raises(ValueError, match="token ids must be one row of integers"):
            assistant_mask(tokenizer, tokens)
