"""Llama 4's chat format: messages to the text, or the token ids, of a prompt.

A conversation is `<|begin_of_text|>`, then for each message `<|header_start|>role<|header_end|>`,
two newlines, the content and `<|eot|>`. This is the chat template that the releases ship, of which
`transformers` 5.24 holds a copy. `ChatFormat` in llama-models 0.3.0 differs from it:
- a tool call is `{"type": "function", "name": …, "parameters": …}` after the bare content, and
  ends, as a tool's result does, with `<|eom|>`; the result is not a JSON string;
- each part of a content is encoded by itself;
- a leading system message is not stripped.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from llama4_eqx.processing.messages import HEADER_NAMES, Message, as_messages, to_json
from llama4_eqx.processing.special_tokens import (
    BEGIN_OF_TEXT,
    EOT,
    HEADER_END,
    HEADER_START,
    IMAGE,
    PYTHON_END,
    PYTHON_START,
)
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.processing.tools import tool_schemas

Chat = Iterable[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]

# How the released template introduces tools, in the first user message.
_TOOLS_PREFACE = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)
_TOOLS_SYSTEM = "Environment: ipython\n"


@final
class _Control(str):
    """The name of a special token that is meant as one."""


def format_chat(
    messages: Chat,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> str:
    """The prompt as text, to be read; each image is `<|image|>`. Arguments: as `encode_chat`.

    To run the model, use `encode_chat`: in a text, control tokens that a user wrote look real.
    """
    return "".join(_pieces(messages, tools, add_generation_prompt, continue_final_message))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Chat,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """The prompt as token ids.

    Control tokens are placed by id and contents are ordinary text, so nothing in a content can end
    its turn or pass for an image. Otherwise the ids are those of the text: what is between two
    control tokens is encoded as one. Each image is one `<|image|>`, which `process` expands.

    - `tools` are JSON schemas, or Python functions with annotations and a docstring: see
      `tool_schema`.
    - `add_generation_prompt` ends the prompt with the header of the assistant's next turn. It is
      the default unless the final message is continued.
    - `continue_final_message` leaves the final message open, for the model to complete: the start
      of an answer, say. That message must end in text.
    """
    ids = []
    pieces = _pieces(messages, tools, add_generation_prompt, continue_final_message)
    for control, group in itertools.groupby(pieces, lambda piece: isinstance(piece, _Control)):
        run = list(group)
        ids += map(tokenizer.token_id, run) if control else tokenizer.encode("".join(run))
    return ids


def generation_prompt(add_generation_prompt: bool | None, continue_final_message: bool) -> bool:
    """Whether the prompt ends with the assistant's header, which excludes an open final message."""
    if not isinstance(continue_final_message, bool):
        raise ValueError(
            f"continue_final_message must be True or False; got {continue_final_message!r}"
        )
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "add_generation_prompt starts a new turn and continue_final_message continues the last "
            "one: ask for one of the two"
        )
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt


def _pieces(
    messages: Chat,
    tools: Tools | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
) -> Iterator[str]:
    """The prompt from left to right: control tokens, and the texts between them."""
    add_generation_prompt = generation_prompt(add_generation_prompt, continue_final_message)
    turns = as_messages(messages)
    if continue_final_message:
        _check_can_continue(turns)
    schemas = None if tools is None else tool_schemas(tools)
    leading_system = bool(turns) and turns[0].role == "system"
    first_user = -1 if schemas is None else int(leading_system)
    if schemas is not None and (len(turns) <= first_user or turns[first_user].role != "user"):
        raise ValueError(
            "tools are listed in the first user message: with tools, the first message, or the one "
            "after the system's, must be the user's"
        )

    yield _Control(BEGIN_OF_TEXT)
    for index, turn in enumerate(turns):
        yield from _header(turn.role)
        if index == first_user and schemas is not None:
            yield _TOOLS_PREFACE
            yield from (to_json(schema, indent=4) + "\n\n" for schema in schemas)
            yield from _stripped(_content(turn))
        elif index == 0 and leading_system:
            yield "" if schemas is None else _TOOLS_SYSTEM
            yield from _stripped(_content(turn))
        elif turn.is_tool_result:
            yield to_json(turn.plain_content())
        elif turn.tool_calls:
            yield from (_Control(PYTHON_START), *_content(turn), _Control(PYTHON_END))
            for call in turn.tool_calls:
                yield to_json({"name": call.name, "parameters": call.arguments})
        else:
            yield from _content(turn)
        if index < len(turns) - 1 or not continue_final_message:
            yield _Control(EOT)
    if add_generation_prompt:
        yield from _header("assistant")


def _header(role: str) -> Iterator[str]:
    yield _Control(HEADER_START)
    yield HEADER_NAMES[role]
    yield _Control(HEADER_END)
    yield "\n\n"


def _content(turn: Message) -> list[str]:
    return [part if isinstance(part, str) else _Control(IMAGE) for part in turn.parts]


def _stripped(content: list[str]) -> list[str]:
    """Without white space at the ends of the whole content."""
    runs = itertools.groupby(content, lambda piece: isinstance(piece, _Control))
    merged = [piece for control, run in runs for piece in (run if control else ["".join(run)])]
    if merged and not isinstance(merged[0], _Control):
        merged[0] = merged[0].lstrip()
    if merged and not isinstance(merged[-1], _Control):
        merged[-1] = merged[-1].rstrip()
    return merged


def _check_can_continue(turns: list[Message]) -> None:
    final_turn = turns[-1] if turns else None
    if final_turn is None:
        problem = "there are no messages"
    elif final_turn.is_tool_result:
        problem = "it is a tool's result"
    elif final_turn.tool_calls:
        problem = "it calls tools"
    elif not final_turn.parts or not isinstance(final_turn.parts[-1], str):
        problem = "it ends in an image" if final_turn.parts else "it is empty"
    else:
        return
    raise ValueError(
        f"continue_final_message needs a final message that ends in text, but {problem}"
    )
