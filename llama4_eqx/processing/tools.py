"""Tools: the schema of a Python function for the prompt, and the calls in a model's answer."""

import ast
import enum
import inspect
import json
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llama4_eqx.processing.messages import Message, ToolCall
from llama4_eqx.processing.special_tokens import END_OF_TEXT, EOM, EOT, PYTHON_END, PYTHON_START

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_TYPES = _SCALARS | {list: "array", tuple: "array", dict: "object"}
_SECTIONS = ("Args:", "Returns:", "Raises:")
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()]*\))?:(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(
    tools: Iterable[Mapping[str, Any] | Callable[..., Any]],
) -> list[Mapping[str, Any]]:
    """The JSON schema of each tool, which may be that schema or a Python function."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(
            f"tools must be a list of JSON schemas or Python functions; got {type(tools).__name__}"
        )
    return [tool if isinstance(tool, Mapping) else tool_schema(tool) for tool in tools]


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema that describes a Python function to a model.

    The function needs type annotations, and a docstring in Google's style that describes each
    argument. `(choices: ["a", "b"])` at the end of a description lists the values of an argument.
    The result is that of `get_json_schema` in `transformers`.
    """
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        raise ValueError(
            "a tool must be a JSON schema (a dict) or a Python function; got "
            f"{type(function).__name__}"
        )
    name, docstring = function.__name__, inspect.getdoc(function)
    if not docstring:
        raise ValueError(f"the tool {name} must have a docstring that says what it does")
    description, described, returned = _parse_docstring(docstring.strip())
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # annotations as text may hold anything
        raise ValueError(f"the annotations of the tool {name} can't be read ({error})") from error

    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and first not in hints:
        del parameters[first]
    properties, required = {}, []
    for argument, parameter in parameters.items():
        if argument not in hints or argument not in described:
            lacking = "a type annotation" if argument not in hints else "an entry under Args:"
            raise ValueError(f"the argument {argument} of the tool {name} must have {lacking}")
        try:
            schema = _type_schema(hints[argument])
        except ValueError as error:
            raise ValueError(f"the argument {argument} of the tool {name}: {error}") from error
        text = described[argument]
        if choices := _CHOICES.search(text):
            schema["enum"] = _choices(choices.group(1), argument, name)
            text = text[: choices.start()].strip()
        properties[argument] = schema | {"description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)

    inputs: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        inputs["required"] = required
    schema = {"name": name, "description": description, "parameters": inputs}
    if "return" in hints:
        try:
            output = _type_schema(hints["return"])
        except ValueError:
            output = None  # the model never writes it, so it may be of any type
        if output is not None:
            schema["return"] = output | ({} if returned is None else {"description": returned})
    return {"type": "function", "function": schema}


def _choices(text: str, argument: str, tool: str) -> list[Any]:
    try:
        choices = json.loads(text)
    except json.JSONDecodeError:
        choices = None
    if not isinstance(choices, list):
        raise ValueError(
            f"the choices of the argument {argument} of the tool {tool} must be a JSON list, such "
            f'as ["a", "b"]; got {text[:80]}'
        )
    return [choice.strip() if isinstance(choice, str) else choice for choice in choices]


def _parse_docstring(docstring: str) -> tuple[str, dict[str, str], str | None]:
    """The description, that of each argument, and that of the result."""
    sections: dict[str, list[str]] = {"": []}
    section = ""
    for line in docstring.splitlines():
        start = next((name for name in _SECTIONS if line.strip().startswith(name)), None)
        if start is not None:
            # Text right after the colon of a section is no part of it.
            section = start if line.strip() == start else f"{start} inline"
            sections[section] = []
        else:
            sections[section].append(line)
    arguments: dict[str, list[str]] = {}
    name, indent = None, ""
    for line in sections.get("Args:", ()):
        entry = _ARGUMENT.match(line)
        if entry and not (name and line.startswith((indent + " ", indent + "\t"))):
            indent, name, text = entry.groups()
            arguments[name] = [text.strip()]
        elif name:
            arguments[name].append(line.strip())
    described = {name: " ".join(filter(None, lines)) for name, lines in arguments.items()}
    returned = sections.get("Returns:")
    return (
        "\n".join(sections[""]).strip(),
        described,
        None if returned is None else "\n".join(returned).strip(),
    )


def _type_schema(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _values_schema([member.value for member in hint])
    if isinstance(hint, type) and origin is None and hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is typing.Literal:
        return _values_schema(list(args))
    if origin in (typing.Union, types.UnionType):
        return _union_schema(args)
    if origin is list:
        return {"type": "array"} | ({"items": _type_schema(args[0])} if args else {})
    if origin is dict:
        values = {"additionalProperties": _type_schema(args[1])} if len(args) == 2 else {}
        return {"type": "object"} | values
    if origin is tuple and not args:
        return {"type": "array"}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_type_schema(arg) for arg in args]}
    if origin is tuple:
        raise ValueError(f"{hint} has no fixed length above 1: annotate it as a list")
    raise ValueError(
        f"the annotation must be int, float, str, bool, list, tuple, dict, Any, an Enum, a Literal "
        f"or a union of those; got {hint}: write the JSON schema by hand, or change the type"
    )


def _values_schema(values: list[Any]) -> dict[str, Any]:
    strangers = [value for value in values if type(value) not in _SCALARS]
    if strangers or not values:
        raise ValueError(
            "the values of an Enum or a Literal must be int, float, str, bool or None; got "
            f"{strangers[0]!r}"
            if strangers
            else "an Enum must have a member"
        )
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union_schema(args: Sequence[Any]) -> dict[str, Any]:
    options = [_type_schema(arg) for arg in args if arg is not type(None)]
    if len(options) == 1:
        schema = options[0]
    elif all(set(option) == {"type"} and isinstance(option["type"], str) for option in options):
        kinds = sorted({option["type"] for option in options})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": options}
    return schema | ({"nullable": True} if type(None) in args else {})


def parse_tool_calls(text: str) -> tuple[ToolCall, ...]:
    """The tool calls in what the model wrote: see `parse_assistant_message`."""
    return parse_assistant_message(text).tool_calls


def parse_assistant_message(text: str) -> Message:
    """What the model wrote in its turn, as a message: the content and the tool calls.

    Calls are JSON objects with a name and parameters (or arguments), at the end of the turn; or a
    list of Python calls with literal keyword arguments, `[f(x=1), g(y="a")]`, which is the whole
    turn or between `<|python_start|>` and `<|python_end|>`. Both are read with or without these
    tokens; decode with `skip_special=False` to keep them. Python is parsed, never run. What isn't
    complete and valid is no call but content. It inverts `format_chat`.
    """
    for end in (EOT, EOM, END_OF_TEXT):
        text = text.removesuffix(end)
    before, start, rest = text.partition(PYTHON_START)
    if start:
        inside, _, after = rest.partition(PYTHON_END)
        if calls := _json_calls(after):
            return Message("assistant", before + inside, calls)
        if not after.strip() and (calls := _json_calls(inside) or _python_calls(inside)):
            return Message("assistant", before, calls)
        return Message("assistant", before + inside + after)
    if calls := _python_calls(text):
        return Message("assistant", "", calls)
    for candidate in re.finditer(r'(?:\[\s*)?\{\s*"(?:type|name|function|parameters)"', text):
        if calls := _json_calls(text[candidate.start() :]):
            content = text[: candidate.start()]
            return Message("assistant", content if content.strip() else "", calls)
    return Message("assistant", text)


def _json_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls if `text` is JSON objects that are calls, or lists of them, and nothing else."""
    decoder, calls, position = json.JSONDecoder(), [], 0
    while position < len(text):
        if text[position].isspace() or text[position] in ",;":
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            return ()
        for item in value if isinstance(value, list) else [value]:
            call = item.get("function", item) if isinstance(item, dict) else None
            if not isinstance(call, dict):
                return ()
            arguments = call.get("parameters", call.get("arguments"))
            try:
                calls.append(ToolCall.from_dict({"name": call.get("name"), "arguments": arguments}))
            except ValueError:
                return ()
    return tuple(calls)


def _python_calls(text: str) -> tuple[ToolCall, ...]:
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in texts
            tree = ast.parse(text, mode="eval").body
        calls = []
        for call in tree.elts if isinstance(tree, ast.List) else [None]:
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                return ()
            arguments = {x.arg: ast.literal_eval(x.value) for x in call.keywords if x.arg}
            json.dumps(arguments)  # sets, bytes and the like are no arguments
            if len(arguments) < len(call.keywords):  # **kwargs
                return ()
            calls.append(ToolCall(call.func.id, arguments))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return ()
    return tuple(calls)
