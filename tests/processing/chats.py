"""Chats, the released template, and folders with templates, for several test files."""

import json

from transformers.models.llama4 import processing_llama4

from llama4_eqx.processing import byte_tokenizer

RELEASED = processing_llama4.chat_template
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Zürich <&>", "days": 2}}}
DIALOGS = {
    "one turn": [{"role": "user", "content": "Hello"}],
    "system": [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "  What's 中文?\n"},
    ],
    "turns": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "5 😀"},
    ],
    "late system": [{"role": "user", "content": "a"}, {"role": "system", "content": " b "}],
    "stripped system": [
        {"role": "system", "content": "\n Be brief. \n"},
        {"role": "user", "content": "Hi"},
    ],
    "white space": [{"role": "user", "content": "\n\na\n"}, {"role": "user", "content": " \n b"}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"sky": "blau <ü>"}'},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "ipython", "content": [{"type": "text", "text": "blue"}]},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Thanks"},
    ],
    "images": [
        {"role": "system", "content": [{"type": "text", "text": " Look. "}]},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What is th"},
                {"type": "text", "text": "is, and"},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": " those?\n"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "image"}], "tool_calls": [CALL]},
    ],
}

TOKENS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": {"content": "<|eot|>", "__type": "AddedToken", "special": True},
    "pad_token": None,
}


def write_template(folder, template, *, in_config):
    byte_tokenizer().save(folder)
    config = TOKENS | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if in_config:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
