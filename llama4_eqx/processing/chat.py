"""Llama 4's chat format: messages to the text, or the token ids, of a prompt.

A conversation is `<|begin_of_text|>`, then for each message `<|header_start|>role<|header_end|>`,
two newlines, the content and `<|eot|>`. This is the chat template that the releases ship, of which
`transformers` 5.24 holds a copy. `ChatFormat` in llama-models 0.3.0 differs from it in that
- a call of a tool is `{"type": "function", "name": …, "parameters": …}` after the bare content, and
  ends, as a tool's answer does, with `<|eom|>`; the answer is no JSON string;
- each part of a content is encoded by itself;
- a leading system message is not stripped.
"""

import dataclasses
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from llama4_eqx.processing.images import ImageSource
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

# The name in the header of each role's messages. What a tool returned is signed "ipython".
_HEADERS = {name: name for name in ("system", "user", "assistant", "ipython")} | {"tool": "ipython"}


@final
@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the assistant wants called."""

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def from_dict(cls, call: Mapping[str, Any]) -> "ToolCall":
        """From OpenAI's `{"function": {"name": …, "arguments": …}}`, or the inner part alone."""
        function = call.get("function", call)
        try:
            arguments = function["arguments"]
            if isinstance(arguments, str):  # as OpenAI sends them
                arguments = json.loads(arguments)
            return cls(function["name"], arguments)
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"a tool call has a name, and arguments as a dict or as JSON; got {call!r}"
            ) from error


@final
@dataclasses.dataclass(frozen=True)
class ImagePart:
    """The place of an image within a content, with the image unless that is given elsewhere."""

    image: ImageSource | None = None


@final
@dataclasses.dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant, or tool (ipython) for what a tool returned.

    `content` is a text, or its parts in reading order: texts, and images where they stand.
    """

    role: str
    content: str | Sequence[str | ImagePart]
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self):
        # The role is written into the prompt: any other would be a speaker the model never met.
        if self.role not in _HEADERS:
            raise ValueError(f"role must be one of {', '.join(_HEADERS)}; got {self.role!r}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the assistant calls tools; got tool_calls of the {self.role}")
        strangers = [part for part in self.parts if not isinstance(part, str | ImagePart)]
        if strangers:
            raise ValueError(
                f"content must be a text, or texts and ImageParts; got {strangers[0]!r} in it: "
                "for messages made of dicts, there is Message.from_dict"
            )
        if self.image_parts and self.role not in ("user", "assistant"):
            raise ValueError(f"only the user and the assistant show images; got a {self.role}'s")

    @property
    def parts(self) -> tuple[str | ImagePart, ...]:
        """The parts of the content, of which a text is the only one."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def image_parts(self) -> tuple[ImagePart, ...]:
        """The parts that are images."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> "Message":
        """From `{"role": …, "content": …}`, as chats are commonly kept.

        The content may be a list of `{"type": "text", "text": …}` and of `{"type": "image"}`, the
        latter with the image itself under "image" or "path", or without. The assistant's may have
        `tool_calls`, and then None for content. `name` and `tool_call_id` have no place in the
        format and are left out; any other key is an error.
        """
        unknown = set(message) - {"role", "content", "tool_calls", "name", "tool_call_id"}
        if unknown or "role" not in message:
            raise ValueError(
                "a message has a role, a content and perhaps tool_calls, name or tool_call_id; "
                f"got the keys {sorted(message)}"
            )
        calls = tuple(ToolCall.from_dict(call) for call in message.get("tool_calls") or ())
        content = message.get("content")
        if content is None and calls:
            content = ""
        if isinstance(content, list | tuple):
            content = tuple(map(_part_from_dict, content))
        elif not isinstance(content, str):
            raise ValueError(
                f"content must be a string or a list of parts; got {type(content).__name__}"
            )
        return cls(message["role"], content, calls)


def _part_from_dict(part: Any) -> str | ImagePart:
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return text
        case {"type": "image", **rest} if not rest or set(rest) in ({"image"}, {"path"}):
            return ImagePart(*rest.values())
    raise ValueError(
        'a part of a content is {"type": "text", "text": …} or {"type": "image"}, the latter '
        f"perhaps with the image under image or path (nothing is fetched); got {part!r}"
    )


@final
class _Control(str):
    """The name of a special token, where it is meant as one."""


def _pieces(
    messages: Iterable[Message | Mapping[str, Any]], add_generation_prompt: bool
) -> Iterator[str]:
    """The prompt from left to right: control tokens, and the texts between them."""
    yield _Control(BEGIN_OF_TEXT)
    for place, message in enumerate(messages):
        if not isinstance(message, Message):
            message = Message.from_dict(message)
        yield from _header(message.role)
        content = [part if isinstance(part, str) else _Control(IMAGE) for part in message.parts]
        if message.role in ("tool", "ipython"):
            yield _to_json(_content_for_templates(message))
        elif message.tool_calls:
            yield from (_Control(PYTHON_START), *content, _Control(PYTHON_END))
            for call in message.tool_calls:
                yield _to_json({"name": call.name, "parameters": call.arguments})
        elif place == 0 and message.role == "system":
            yield "".join(content).strip()
        else:
            yield from content
        yield _Control(EOT)
    if add_generation_prompt:
        yield from _header("assistant")


def _header(role: str) -> Iterator[str]:
    yield _Control(HEADER_START)
    yield _HEADERS[role]
    yield _Control(HEADER_END)
    yield "\n\n"


def format_chat(
    messages: Iterable[Message | Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """The prompt as text, to be read; each image is `<|image|>`.

    For running, use `encode_chat`: in a text, control tokens that a user wrote look like real ones.
    """
    return "".join(_pieces(messages, add_generation_prompt))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt as token ids; with `add_generation_prompt` the assistant is next to speak.

    Control tokens are placed by id and contents are ordinary text, so nothing in a content can end
    its turn or pass for an image. Otherwise the ids are those of the text: what stands between two
    control tokens is encoded as one. Each image is one `<|image|>`, for `process` to expand.
    """
    ids = []
    runs = itertools.groupby(
        _pieces(messages, add_generation_prompt), lambda piece: isinstance(piece, _Control)
    )
    for control, run in runs:
        ids += map(tokenizer.token_id, run) if control else tokenizer.encode("".join(run))
    return ids


def load_chat_template(folder: str | os.PathLike[str]) -> Callable[..., str]:
    """A checkpoint's chat template: `chat_template.jinja`, else that of `tokenizer_config.json`.

    Called as `render(messages, *, add_generation_prompt=True, **variables)`, where `variables` are
    what the template asks for, such as `tools`, it gives the text that `apply_chat_template` of
    `transformers` gives. That is for `Tokenizer.encode(text, special=True)`, which obeys control
    tokens that a user wrote, too: with users you don't trust, prefer `encode_chat`. Templates run
    in a sandbox: they neither reach Python's insides nor change what they are given.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "Reading a chat template needs the `jinja2` package: pip install 'llama4_eqx[text]'"
        ) from error
    template_file, config_file = (
        Path(folder) / name for name in ("chat_template.jinja", "tokenizer_config.json")
    )
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    source = config.get("chat_template")
    if template_file.is_file():
        source = template_file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise FileNotFoundError(
            f"no chat template in {folder}: neither {template_file.name} nor a text under "
            f"chat_template in {config_file.name}. format_chat and encode_chat need none"
        )

    # What `transformers` gives to templates, and so what they are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    specials = {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in config.items()
        if key.endswith("_token") and isinstance(token, str | dict)
    }
    absent = {"tools": None, "documents": None}
    template = environment.from_string(source, globals=specials | absent)

    def render(
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        return template.render(
            messages=[_as_dict(turn) if isinstance(turn, Message) else turn for turn in messages],
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    return render


def _as_dict(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": _content_for_templates(message)}
    if message.tool_calls:  # templates ask whether there is such a key
        functions = map(dataclasses.asdict, message.tool_calls)
        turn["tool_calls"] = [{"type": "function", "function": call} for call in functions]
    return turn


def _content_for_templates(message: Message) -> str | list[dict[str, str]]:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in message.parts
    ]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str):
    raise ValueError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
