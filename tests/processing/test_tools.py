"""Schemas of functions against `transformers`; tool calls back from what a model writes."""

import enum
import json
import typing
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from llama4_eqx.processing import (
    Message,
    ToolCall,
    byte_tokenizer,
    encode_chat,
    format_chat,
    parse_assistant_message,
    parse_tool_calls,
    tool_schema,
)

# --- schemas


def plain(city: str, days: int, warm: bool = True, level: float = 0.5) -> str:
    """
    The weather of a city.

    In two paragraphs.

    Args:
        city: The name of the city,
            over two lines
        days (int): How many days ahead.
        warm: Whether
        it is warm: or cold.

        level (float, optional): A "level".

    Returns:
        A text.
        Of two lines.

    Raises:
        ValueError: Never.
    """
    return ""


def nested(
    a: list[str],
    b: dict[str, list[int]],
    c: tuple[int, str],
    d: int | None,
    e: Optional[list[int]],  # noqa: UP045
    f: int | str,
    g: Union[str, int, float, None],  # noqa: UP007
    h: list | dict,
    i: list[int] | str,
    j: Any,
    k: typing.List,  # noqa: UP006
    m: typing.Dict,  # noqa: UP006
    n: tuple,
    o: list | tuple,
    p: None = None,
):
    """Takes everything.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
        m: M
        n: N
        o: O
        p: P
    """


class Unit(enum.Enum):
    """Of temperature."""

    C = "celsius"
    F = "fahrenheit"
    K = 3


def choices(unit: Unit, size: Literal["s", "m"], number: Literal[1, None, "x"], drink: str) -> None:
    """Chooses.

    Args:
        unit: The unit
        size: The size
        number: The number
        drink: The drink (choices: ["tea", " coffee ", 3])
    """


def nothing():
    """Does nothing."""


def returns_a_class(a: int) -> Unit:
    """Returns an Enum.

    Args:
        a: The last

    Returns:
        A unit
    """
    return Unit.C


def returns_a_stranger() -> json.JSONDecoder:
    """Returns what JSON can't hold."""
    return json.JSONDecoder()


def postponed(a: "int", b: "list[str] | None" = None) -> "dict[str, int]":
    """With annotations as text.

    Args:
        a: A
        b: B
    Returns: inline
    """
    return {}


def several(*values: int, flag: bool = False, **options: str) -> tuple[int, int]:
    """Takes any number.

    Args:
        values: Numbers.
        flag: A flag.
        options: Options.
    """
    return 0, 0


class Tool:
    """Has methods."""

    def method(self, a: int) -> int:
        """A method.

        Args:
            a: An argument.
        """
        return a

    @classmethod
    def of_class(cls, a: int):
        """A class method.

        Args:
            a: An argument.
        """


FUNCTIONS = [plain, nested, choices, nothing, returns_a_class, returns_a_stranger, postponed]
FUNCTIONS += [several, Tool().method, Tool.method, Tool.of_class]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_schemas_are_those_of_transformers(function):
    # as JSON, so that the order counts, as it does in a prompt
    assert json.dumps(tool_schema(function)) == json.dumps(get_json_schema(function))


def no_docstring(a: int): ...


def no_annotation(a):
    """Lacks one.

    Args:
        a: A
    """


def no_description(a: int):
    """Lacks one."""


def stranger(a: json.JSONDecoder):
    """Has a class.

    Args:
        a: A
    """


def open_tuple(a: tuple[int, ...]):
    """Has no length.

    Args:
        a: A
    """


def bytes_literal(a: Literal[b"x"]):
    """Has no JSON.

    Args:
        a: A
    """


def bad_choices(a: str):
    """Has no list.

    Args:
        a: A (choices: tea, coffee)
    """


def bad_name(a: "Nowhere"):  # pyright: ignore
    """Has no type.

    Args:
        a: A
    """


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (no_docstring, "the tool no_docstring must have a docstring"),
        (no_annotation, "the argument a of the tool no_annotation must have a type annotation"),
        (no_description, "the argument a of the tool no_description must have an entry under Args"),
        (stranger, "the argument a of the tool stranger: the annotation must be.*JSONDecoder"),
        (open_tuple, "the argument a of the tool open_tuple: .*annotate it as a list"),
        (bytes_literal, "the values of an Enum or a Literal must be.*got b'x'"),
        (bad_choices, "the choices of the argument a of the tool bad_choices must be a JSON list"),
        (bad_name, "the annotations of the tool bad_name can't be read.*Nowhere"),
        (len, "a JSON schema .* or a Python function; got builtin_function_or_method"),
        ("f", "or a Python function; got str"),
    ],
)
def test_functions_without_a_schema(function, error, unchecked):
    with pytest.raises(ValueError, match=error):
        tool_schema(function)


# --- calls

F, G = ToolCall("f", {"x": 1, "y": ["ä", None]}), ToolCall("g", {})
WRITTEN = {
    "json": ('{"name": "f", "parameters": {"x": 1, "y": ["ä", null]}}', (F,)),
    "type": ('{"type": "function", "name": "g", "parameters": {}}', (G,)),
    "openai": ('{"function": {"name": "g", "arguments": "{}"}}', (G,)),
    "two": ('{"name": "g", "parameters": {}}; {"name": "g", "arguments": {}}\n', (G, G)),
    "list": ('[{"name": "g", "parameters": {}}, {"name": "g", "parameters": {}}]', (G, G)),
    "python": ('[f(x=1, y=["ä", None]), g()]', (F, G)),
    "python in tokens": ('<|python_start|>[f(x=1, y=["ä", None])]<|python_end|>', (F,)),
    "json in tokens": ('<|python_start|>{"name": "g", "parameters": {}}<|python_end|>', (G,)),
    "open tokens": ('<|python_start|>{"name": "g", "parameters": {}}', (G,)),
    "escapes": (r'[f(x="\d")]', (ToolCall("f", {"x": r"\d"}),)),
}


@pytest.mark.parametrize(("text", "calls"), WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("end", ["", "<|eot|>", "<|eom|>"])
def test_calls_are_read(text, calls, end):
    assert parse_tool_calls(text + end) == calls
    assert parse_assistant_message(text + end).content == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "[1, 2]",
        "[f(1)]",
        "[f(x=y)]",
        "[f(x=b'')]",
        "[f(x={1})]",
        "[f(**{})]",
        "[a.b(x=1)]",
        "[f(x=1)] or so",
        "[f(x=1",
        "[" * 5000 + "]" * 5000,
        "[f(x=__import__('os').system('true'))]",
        '{"name": "f"}',
        '{"name": "f", "parameters": {"x": 1}',
        '{"name": "f", "parameters": [1]}',
        '{"name": 5, "parameters": {}}',
        '{"name": "f", "parameters": {}} is how to call it',
        '```json\n{"name": "f", "parameters": {}}\n```',
        '{"a": ' * 5000,
        '{"name": ' * 5000,
        "{}",
        "null",
    ],
)
def test_what_is_no_call_is_content(text):
    assert parse_assistant_message(text) == Message("assistant", text)
    assert parse_tool_calls(f"<|python_start|>{text}<|python_end|>") == ()


def test_calls_are_those_of_metas_code(meta):
    chat_format = meta.chat_format.ChatFormat(meta.reader)
    for text in (
        '{"type": "function", "name": "f", "parameters": {"x": 1}}',
        '{"name": "f", "parameters": {"x": [1, "a"]}}',
        '[f(x=1, y="a")]',
        '<|python_start|>[f(x={"a": 1.5})]<|python_end|>',
        '<|python_start|>{"name": "f", "parameters": {"x": null}}<|python_end|><|eot|>',
    ):
        reason = meta.datatypes.StopReason.end_of_turn
        theirs = chat_format.decode_assistant_message_from_content(text, reason)
        (call,) = parse_tool_calls(text)
        assert (call.name, call.arguments) == (
            theirs.tool_calls[0].tool_name,
            json.loads(theirs.tool_calls[0].arguments_json),
        )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, st.text(), st.dictionaries(st.text(), values, max_size=3))


@settings(deadline=None)
@given(st.text(), st.lists(calls, min_size=1, max_size=3).map(tuple))
def test_parsing_inverts_the_format(content, calls):
    message = Message("assistant", content, calls)
    header = format_chat([])
    text = format_chat([message], add_generation_prompt=False).removeprefix(header)
    assert parse_assistant_message(text) == message
    # through the tokens that the model writes, with and without the special ones in the text
    tokenizer = byte_tokenizer()
    ids = encode_chat(tokenizer, [message], add_generation_prompt=False)
    ids = ids[len(encode_chat(tokenizer, [])) :]
    assert parse_assistant_message(tokenizer.decode(ids, skip_special=False)) == message
    empty = Message("assistant", "", calls)
    ids = encode_chat(tokenizer, [empty], add_generation_prompt=False)
    ids = ids[len(encode_chat(tokenizer, [])) :]
    assert parse_assistant_message(tokenizer.decode(ids)) == empty


def test_content_before_calls_without_tokens():
    text = 'Looking.{"name": "g", "parameters": {}}{"name": "g", "parameters": {}}'
    assert parse_assistant_message(text) == Message("assistant", "Looking.", (G, G))
    assert parse_tool_calls("\n\n" + text.removeprefix("Looking.")) == (G, G)
