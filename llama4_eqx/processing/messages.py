"""The messages of a chat: roles, contents, images and tool calls."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from llama4_eqx.processing.image_files import ImageSource

# The name that the header of a message has for each role: a tool's result is from "ipython".
HEADER_NAMES = {name: name for name in ("system", "user", "assistant", "ipython")}
HEADER_NAMES |= {"tool": "ipython"}
_TOOL_ROLES = ("tool", "ipython")


@final
@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls."""

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def from_dict(cls, call: Mapping[str, Any]) -> "ToolCall":
        """From OpenAI's `{"function": {"name": …, "arguments": …}}`, or the inner part alone."""
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            name, arguments = function.get("name"), function.get("arguments")
            if isinstance(arguments, str):  # as OpenAI sends them
                try:
                    arguments = json.loads(arguments)
                except (json.JSONDecodeError, RecursionError):
                    arguments = None
            if isinstance(name, str) and isinstance(arguments, Mapping):
                return cls(name, arguments)
        raise ValueError(
            "a tool call must have a name, and arguments as a dict or as the JSON of one; got "
            f"{_short(call)}"
        )


@final
@dataclasses.dataclass(frozen=True)
class ImagePart:
    """The place of an image within a content, with the image unless that is given elsewhere."""

    image: ImageSource | None = None


@final
@dataclasses.dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant, or tool (ipython) for the result of a tool.

    `content` is a text, or its parts in reading order: texts and images. A tool's may be a dict of
    JSON values instead.
    """

    role: str
    content: str | Sequence[str | ImagePart] | Mapping[str, Any]
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self):
        # The role is written into the prompt: the model knows no others.
        if not isinstance(self.role, str) or self.role not in HEADER_NAMES:
            raise ValueError(
                f"role must be one of {', '.join(HEADER_NAMES)}; got {_short(self.role)}"
            )
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the assistant calls tools; got tool_calls of the {self.role}")
        if isinstance(self.content, Mapping):
            if not self.is_tool_result:
                raise ValueError(f"only a tool's content may be a dict; got one of the {self.role}")
            return
        if not isinstance(self.content, str | Sequence) or isinstance(self.content, bytes):
            raise ValueError(
                f"content must be a text or a list of parts; got {type(self.content).__name__}"
            )
        for part in self.parts:
            if not isinstance(part, str | ImagePart):
                raise ValueError(
                    f"content must be a text, or texts and ImageParts; got {_short(part)} in it: "
                    "for messages made of dicts, use Message.from_dict"
                )
        if self.image_parts and self.role not in ("user", "assistant"):
            raise ValueError(f"only the user and the assistant show images; got a {self.role}'s")

    @property
    def is_tool_result(self) -> bool:
        """Whether it is what a tool returned."""
        return self.role in _TOOL_ROLES

    @property
    def parts(self) -> tuple[str | ImagePart, ...]:
        """The parts of the content: one if it is a text, none if it is a dict."""
        if isinstance(self.content, Mapping):
            return ()
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def image_parts(self) -> tuple[ImagePart, ...]:
        """The parts that are images."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> "Message":
        """From `{"role": …, "content": …}`, the common form of chats.

        The content may be a list of `{"type": "text", "text": …}` and `{"type": "image"}`, the
        latter with the image itself under "image" or "path", or without. The assistant's may have
        `tool_calls`, and then None as content; a tool's may be a dict. `name` and `tool_call_id`
        have no place in the format and are left out; any other key is an error.
        """
        if not isinstance(message, Mapping):
            raise ValueError(f"a message must be a Message or a dict; got {_short(message)}")
        unknown = set(message) - {"role", "content", "tool_calls", "name", "tool_call_id"}
        if unknown or "role" not in message:
            raise ValueError(
                "a message has a role, a content and perhaps tool_calls, name or tool_call_id; "
                f"got the keys {_short(list(message))}"
            )
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise ValueError(f"tool_calls must be a list of tool calls; got {_short(calls)}")
        calls = tuple(
            call if isinstance(call, ToolCall) else ToolCall.from_dict(call) for call in calls
        )
        content = message.get("content")
        if content is None and calls:
            content = ""
        if isinstance(content, list | tuple):
            content = tuple(map(_part_from_dict, content))
        elif not isinstance(content, str | Mapping):
            raise ValueError(
                "content must be a string or a list of parts, or a dict if it is a tool's; got "
                f"{type(content).__name__}"
            )
        return cls(message["role"], content, calls)

    def to_dict(self) -> dict[str, Any]:
        """The form that chat templates expect, without the images themselves."""
        turn: dict[str, Any] = {"role": self.role, "content": self.plain_content()}
        if self.tool_calls:  # templates ask whether there is such a key
            functions = ({"name": x.name, "arguments": x.arguments} for x in self.tool_calls)
            turn["tool_calls"] = [{"type": "function", "function": call} for call in functions]
        return turn

    def plain_content(self) -> str | list[dict[str, str]] | Mapping[str, Any]:
        """The content in JSON values, without the images themselves."""
        if isinstance(self.content, str | Mapping):
            return self.content
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in self.parts
        ]


def _part_from_dict(part: Any) -> str | ImagePart:
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return text
        case {"type": "image", **rest} if not rest or set(rest) in ({"image"}, {"path"}):
            return ImagePart(*rest.values())
    raise ValueError(
        'a part of a content is {"type": "text", "text": …} or {"type": "image"}, the latter '
        f"perhaps with the image under image or path (nothing is fetched); got {_short(part)}"
    )


def as_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
    """The messages of a chat, those made of dicts converted."""
    if isinstance(messages, str | bytes | Mapping | Message) or not isinstance(messages, Iterable):
        raise ValueError(f"a chat must be a list of messages; got {_short(messages)}")
    return [turn if isinstance(turn, Message) else Message.from_dict(turn) for turn in messages]


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as in prompts. Errors: `ValueError` for what JSON can't hold."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, default=_json_scalar, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "tools, their arguments and their results must be JSON values (dicts with text keys, "
            f"lists, texts, numbers, booleans, None): {error}"
        ) from error


def _json_scalar(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy, JAX or torch
        return value.item()
    raise TypeError(f"got {_short(value)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
