"""A checkpoint's own templates against `transformers`: sources, tools, prefill; the sandbox."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import transformers
from transformers.processing_utils import ProcessorMixin

from llama4_eqx.processing import Message, byte_tokenizer, load_chat_template
from tests.processing.chats import DIALOGS, RELEASED, TOKENS, write_template

# What templates lean on beyond the released one: loop controls, names of special tokens, refusal.
TEMPLATE = """{{- bos_token }}{{ pad_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|header_start|>system<|header_end|>\\n\\n' + system + '<|eot|>' }}
{%- endif %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{% for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' + message['content'] }}
    {%- for call in message.tool_calls or [] %}
        {%- if loop.index > 9 %}{% break %}{% endif %}
        {{- '{"type": "function", "name": "' + call.function.name + '", "parameters": ' }}
        {{- call.function.arguments | tojson }}{{ '}' }}
    {%- endfor %}
    {{- '<|eom|>' if message.tool_calls or role == 'ipython' else eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
TEXT_DIALOGS = {name: dialog for name, dialog in DIALOGS.items() if name not in ("tools", "images")}


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize(
    ("template", "messages"),
    [(TEMPLATE, m) for m in TEXT_DIALOGS.values()] + [(RELEASED, m) for m in DIALOGS.values()],
)
def test_template_renders_as_in_transformers(tmp_path, template, messages, in_config):
    write_template(tmp_path, template, in_config=in_config)
    render = load_chat_template(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for options in ({}, {"tools": [{"name": "f", "about": "<é>"}]}):
        for prompt in (True, False):
            text = render(messages, add_generation_prompt=prompt, **options)
            assert text == theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False, **options
            )
    assert render([Message.from_dict(m) for m in messages]) == render(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_templates_are_caged(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"can't render these messages \(.* unsafe"):
        load_chat_template(tmp_path)([{"role": "user", "content": ""}])


def test_template_may_refuse(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(ValueError, match="refuses these messages: nobody speaks"):
        load_chat_template(tmp_path)([{"role": "nobody", "content": ""}])


def test_template_knows_the_date(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert load_chat_template(tmp_path)([]).isdigit()


def test_missing_template(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja.*tokenizer_config\.json"):
        load_chat_template(tmp_path)


def test_missing_jinja(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(ImportError, match=r"`jinja2` package: pip install 'llama4_eqx\[text\]'"):
        load_chat_template(tmp_path)


# --- where a template may be

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def source(name: str) -> str:
    return name + ": {% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def write(folder, **files):
    byte_tokenizer().save(folder)
    for name, content in files.items():
        if name.endswith("_json"):
            file, content = folder / f"{name.removesuffix('_json')}.json", json.dumps(content)
        elif name == "chat_template":
            file = folder / "chat_template.jinja"
        else:
            file = folder / "additional_chat_templates" / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return folder


NAMED = [{"name": name, "template": source(name)} for name in ("default", "tool_use", "rag")]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
FOLDERS = {
    "jinja": {"chat_template": source("jinja"), "tokenizer_config_json": CONFIG},
    "config": {"tokenizer_config_json": CONFIG | {"chat_template": source("config")}},
    "named": {"tokenizer_config_json": CONFIG | {"chat_template": NAMED}},
    "dict": {
        "tokenizer_config_json": CONFIG
        | {"chat_template": {x["name"]: x["template"] for x in NAMED}}
    },
    "jinja before config": {
        "chat_template": source("jinja"),
        "tokenizer_config_json": CONFIG | {"chat_template": NAMED},
    },
    "additional": {
        "chat_template": source("jinja"),
        "tool_use": source("separate"),
        "rag": source("rag"),
        "tokenizer_config_json": CONFIG | {"chat_template": source("config")},
    },
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_templates_are_chosen_as_in_transformers(tmp_path, files):
    render = load_chat_template(write(tmp_path, **files))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in (None, [tool]):
        text = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert render(CHAT, tools=tools, add_generation_prompt=False) == text
    if isinstance(theirs.chat_template, dict):
        for name in theirs.chat_template:
            text = theirs.apply_chat_template(CHAT, chat_template=name, tokenize=False)
            assert render(CHAT, chat_template=name) == text
    with pytest.raises(
        ValueError, match=r"has no chat template 'absent': choose another.* default"
    ):
        render(CHAT, chat_template="absent")


@pytest.mark.parametrize("place", ["chat_template_json", "processor_config_json"])
def test_templates_of_processors(tmp_path, place):
    files = {place: {"chat_template": source("processor")}}
    write(tmp_path, **files)
    theirs, _ = ProcessorMixin.get_processor_dict(tmp_path)
    assert theirs["chat_template"] == source("processor")
    assert load_chat_template(tmp_path)(CHAT).startswith("processor: ")
    # the same template at several places is no conflict
    same = CONFIG | {"chat_template": source("processor")}
    write(tmp_path, tokenizer_config_json=same, chat_template=source("processor"))
    assert load_chat_template(tmp_path)(CHAT).startswith("processor: ")


@pytest.mark.parametrize("place", ["chat_template_json", "processor_config_json"])
@pytest.mark.parametrize("other", ["chat_template", "tokenizer_config_json"])
def test_templates_that_disagree(tmp_path, place, other):
    """Of such a folder the tokenizer of `transformers` takes one, its processor the other."""
    here = source("other") if other == "chat_template" else CONFIG | {"chat_template": "other"}
    write(tmp_path, **{place: {"chat_template": source("processor")}, other: here})
    name = place.replace("_json", ".json")
    with pytest.raises(ValueError, match=rf"different chat templates in {name} and in "):
        load_chat_template(tmp_path)
    assert load_chat_template(tmp_path / name)(CHAT).startswith("processor: ")


def test_a_single_file(tmp_path):
    write(tmp_path, **FOLDERS["additional"])
    assert load_chat_template(tmp_path / "chat_template.jinja")(CHAT).startswith("jinja: ")
    file = tmp_path / "additional_chat_templates" / "rag.jinja"
    assert load_chat_template(str(file))(CHAT).startswith("rag: ")


@pytest.mark.parametrize(
    "value", [5, [], {}, ["a"], [{"name": "default"}], [{"name": 1, "template": "a"}], {"a": None}]
)
def test_templates_of_another_form(tmp_path, value):
    write(tmp_path, tokenizer_config_json={"chat_template": value})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be a text"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["tokenizer_config", "chat_template", "special_tokens_map"])
def test_broken_files_are_named(tmp_path, name, content):
    write(tmp_path, chat_template=source("a"))
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\.json (is not|must hold)"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("text", ["{% if %}", "a\n{{ b", "{% nonsense %}", "{{ 1 | nofilter }}"])
def test_templates_that_are_no_jinja(tmp_path, text):
    write(tmp_path, chat_template=text)
    with pytest.raises(ValueError, match=r"'default' of .* is not valid Jinja \(line \d"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("config", "legacy"),
    [
        (
            {"bos_token": "<|eom|>", "image_token": "<|image|>"},
            {"eos_token": {"content": "<|eot|>"}},
        ),
        ({"bos_token": {"content": "<|eom|>", "__type": "AddedToken"}}, {"bos_token": "<|eot|>"}),
        ({"extra_special_tokens": {"image_token": "<|image|>"}, "add_bos_token": True}, {}),
        ({"model_specific_special_tokens": {"image_token": "<|image|>"}, "pad_token": None}, {}),
        ({"extra_special_tokens": ["<|image|>"], "eos_token": "<|eot|>"}, {"unk_token": "a"}),
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_special_tokens_are_those_of_transformers(tmp_path, config, legacy, new):
    added = (
        {"added_tokens_decoder": {"261": {"content": "<|eot|>", "special": True}}} if new else {}
    )
    names = ("bos", "eos", "pad", "unk", "image", "add_bos")
    write(
        tmp_path,
        chat_template="|".join(f"{{{{ {name}_token }}}}" for name in names),
        tokenizer_config_json=CONFIG | config | added,
        special_tokens_map_json=legacy,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(CHAT, tokenize=False)
    assert load_chat_template(tmp_path)(CHAT) == text


# --- {% generation %}

GENERATION = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}\n    {%- generation -%}  \n{% set x = 2 %}"
    "{{ x ~ m.role ~ loop.index }}\n  {%- endgeneration %}{{ x }}\n{% endfor %}",
    "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}{% generation %}"
    "{% endgeneration %}",
)


@pytest.mark.parametrize("template", GENERATION)
def test_generation_tags_leave_the_text_as_it_is(tmp_path, template):
    write(tmp_path, chat_template=template, tokenizer_config_json=CONFIG)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert load_chat_template(tmp_path)(CHAT, add_generation_prompt=False) == expected


# --- continue_final_message

STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
PREFIXES = (
    [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A fruit is"}],
    [{"role": "assistant", "content": " spaces  "}],
    [{"role": "assistant", "content": ""}],
    [{"role": "user", "content": "twice"}, {"role": "assistant", "content": "twice"}],
    [{"role": "system", "content": " system \n"}],
    [{"role": "user", "content": "<|eot|>"}, {"role": "user", "content": "a<|eot|>\n"}],
)
PARTS = (
    [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b "}]}],
    [{"role": "user", "content": [{"type": "text", "text": "b "}, {"type": "image"}]}],
)


@pytest.mark.parametrize(
    ("template", "messages"),
    [(RELEASED, x) for x in PREFIXES + PARTS]
    + [(STRIPPING, x) for x in PREFIXES]
    + [(GENERATION[0], x) for x in PREFIXES],
)
def test_continued_messages_are_those_of_transformers(tmp_path, template, messages):
    write_template(tmp_path, template, in_config=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    render = load_chat_template(tmp_path)
    assert render(messages, continue_final_message=True) == expected
    assert render(map(Message.from_dict, messages), continue_final_message=True) == expected


def test_continued_messages_need_their_text(tmp_path):
    write(tmp_path, chat_template="{% for m in messages %}{{ m.content[:3] }}{% endfor %}")
    render = load_chat_template(tmp_path)
    with pytest.raises(ValueError, match="a template that keeps the text of the final message"):
        render(CHAT, continue_final_message=True)
    with pytest.raises(ValueError, match="there are no messages"):
        render([], continue_final_message=True)
    for content in (None, [{"type": "image"}], {"a": 1}):
        with pytest.raises(ValueError, match="a final message with a text, but it has none"):
            render([{"role": "assistant", "content": content}], continue_final_message=True)
    with pytest.raises(ValueError, match="ask for one of the two"):
        render(CHAT, continue_final_message=True, add_generation_prompt=True)


# --- what templates are given


def test_values_of_all_kinds_are_plain_data(tmp_path):
    """No methods of rich objects, None left out, NumPy's scalars as numbers."""
    template = (
        "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ x | tojson }}"
    )
    write(tmp_path, chat_template=template, tokenizer_config_json=CONFIG)
    image = PIL.Image.new("RGB", (2, 2))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"n": np.float32(0.5)}]},
        {"role": "assistant", "content": None, "tool_calls": [{"ok": np.bool_(False)}]},
        {"role": "tool", "content": {"deep": [(1, 2), np.zeros(3)]}},
    ]

    def f(a: int):
        """Adds.

        Args:
            a: A number.
        """

    options = {"tools": [f, {"name": "g"}], "x": {"y": np.int64(3), "z": True}}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert load_chat_template(tmp_path)(messages, **options) == expected


def test_variables_are_free_but_options_are_not(tmp_path):
    write(tmp_path, chat_template="{{ anything }}{{ bos_token }}", tokenizer_config_json=TOKENS)
    render = load_chat_template(tmp_path)
    assert render(CHAT, anything="x", something_else=5) == "x<|begin_of_text|>"
    assert render(CHAT, bos_token="y") == "y"
    for option in ("tokenize", "return_tensors", "padding", "return_assistant_tokens_mask"):
        with pytest.raises(ValueError, match=f"{option}: no template reads this"):
            render(CHAT, **{option: False})


@pytest.mark.parametrize("messages", ["Hi", CHAT[0], 5, [5], ["Hi"], [None]])
def test_chats_of_another_form(tmp_path, messages, unchecked):
    write(tmp_path, chat_template=source("a"))
    with pytest.raises(ValueError, match=r"a (chat|message) must be a .*; got (str|dict|int|None)"):
        load_chat_template(tmp_path)(messages)


@pytest.mark.parametrize(
    "template", ["{{ messages[5].role.x }}", "{{ messages[0].content + 5 }}", "{{ 1 / 0 }}"]
)
def test_templates_that_do_not_fit(tmp_path, template):
    write(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=r"'default' of .* can't render these messages \("):
        load_chat_template(tmp_path)(CHAT)
