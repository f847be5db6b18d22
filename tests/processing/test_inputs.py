"""Which tokens of a chat are to be learnt."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

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
