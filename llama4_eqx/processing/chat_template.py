"""Chat templates that come with a checkpoint, rendered as `transformers` renders them."""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama4_eqx.processing.chat import Chat, Tools, generation_prompt
from llama4_eqx.processing.json_files import read_json_object, read_text
from llama4_eqx.processing.messages import Message, to_json
from llama4_eqx.processing.tools import tool_schemas

# Options of `apply_chat_template` in `transformers` that are no variables of a template: a template
# would ignore them.
_NOT_VARIABLES = frozenset(
    "conversation tokenize padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs sanitize_control_tokens processor_kwargs".split()
)
# Marks the end of a message that is continued. Its last character is a space, so that a template
# that strips contents is noticed.
_END_MARK = "<<<END_OF_CONTINUED_MESSAGE>>> "
# What the expressions of a template raise for messages of another form.
_RENDER_ERRORS = (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

Templates = dict[str, str]


def load_chat_template(path: str | os.PathLike[str]) -> Callable[..., str]:
    """The chat template of a checkpoint's folder, or the one in a single file.

    As in `transformers`, chat_template.jinja and additional_chat_templates/*.jinja come before
    chat_template in tokenizer_config.json, which may be a list of named templates. A
    chat_template.json or processor_config.json that holds another template is an error, as its
    tokenizers and its processors disagree on which is meant: then give the file.

    Called as `render(messages, *, tools=None, documents=None, add_generation_prompt=None,
    continue_final_message=False, chat_template=None, **variables)`, with `chat_template` the name
    of one of several and the first four as in `encode_chat`, it gives the text that
    `apply_chat_template` gives. `variables` are what else the template reads; it ignores others.

    The text is for `Tokenizer.encode(text, special=True)`, which also obeys control tokens that a
    user wrote: with users you don't trust, prefer `encode_chat`. Templates run in a sandbox: they
    can't reach Python's internals nor change what they are given, which is plain data.
    """
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(
            "Reading a chat template needs the `jinja2` package: pip install 'llama4_eqx[text]'"
        ) from error
    path = Path(path)
    templates = _templates_of_file(path) if path.is_file() else _templates_of_folder(path)
    environment = _environment()
    specials = _special_tokens(path.parent if path.is_file() else path)
    compiled = {}
    for name, source in templates.items():
        try:
            compiled[name] = environment.from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            raise ValueError(
                f"the chat template {name!r} of {path} is not valid Jinja (line {line}: {error})"
            ) from error

    def render(
        messages: Chat,
        *,
        tools: Tools | None = None,
        documents: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        add_generation_prompt = generation_prompt(add_generation_prompt, continue_final_message)
        if misplaced := _NOT_VARIABLES & set(variables):
            raise ValueError(
                f"{', '.join(sorted(misplaced))}: no template reads this, and the result is always "
                "one text; encode it with Tokenizer.encode(text, special=True)"
            )
        if chat_template is None:
            chat_template = (
                "tool_use" if tools is not None and "tool_use" in compiled else "default"
            )
        if chat_template not in compiled:
            raise ValueError(
                f"{path} has no chat template {chat_template!r}: choose another by chat_template=, "
                f"among {', '.join(sorted(compiled))}"
            )
        turns = _plain_messages(messages)
        text = _mark_end(turns) if continue_final_message else None
        context = {
            "messages": turns,
            "tools": None if tools is None else _plain(tool_schemas(tools)),
            "documents": None if documents is None else _plain(list(documents)),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = compiled[chat_template].render(specials | _plain(variables) | context)
        except (*_RENDER_ERRORS, jinja2.TemplateError) as error:
            raise ValueError(
                f"the chat template {chat_template!r} of {path} can't render these messages "
                f"({error}): check their roles and contents"
            ) from error
        return prompt if text is None else _until_mark(prompt, text, path)

    return render


def _templates_of_file(file: Path) -> Templates:
    if file.suffix != ".json":
        return {"default": read_text(file)}
    return _named(read_json_object(file).get("chat_template"), file)


def _templates_of_folder(folder: Path) -> Templates:
    files = {
        "default": folder / "chat_template.jinja",
        **{x.stem: x for x in sorted((folder / "additional_chat_templates").glob("*.jinja"))},
    }
    separate = {name: read_text(file) for name, file in files.items() if file.is_file()}
    in_json = {
        name: _named(value, folder / name)
        for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json")
        if (folder / name).is_file()
        and (value := read_json_object(folder / name).get("chat_template")) is not None
    }
    of_tokenizer = separate or in_json.pop("tokenizer_config.json", {})
    in_json.pop("tokenizer_config.json", None)  # `transformers` prefers separate files to it
    for name, templates in in_json.items():
        if of_tokenizer and templates != of_tokenizer:
            other = "chat_template.jinja" if separate else "tokenizer_config.json"
            raise ValueError(
                f"{folder} has different chat templates in {name} and in {other}: pass the file "
                "that is meant to load_chat_template, or remove the other one"
            )
        of_tokenizer = templates
    if not of_tokenizer:
        raise FileNotFoundError(
            f"no chat template in {folder}: there is neither a chat_template.jinja or "
            "chat_template.json nor a chat_template in tokenizer_config.json. format_chat and "
            "encode_chat need none"
        )
    return of_tokenizer


def _named(value: Any, file: Path) -> Templates:
    """One template, or several by name, of a JSON file."""
    match value:
        case str():
            return {"default": value}
        case [*entries] if entries and all(
            isinstance(x, dict) and {"name", "template"} <= set(x) for x in entries
        ):
            value = {entry["name"]: entry["template"] for entry in entries}
    if not (isinstance(value, dict) and value):
        value = {None: None}
    if not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise ValueError(
            f'{file}: chat_template must be a text, or a list of {{"name": …, "template": …}} with '
            "texts"
        )
    return value


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and the like, which templates read."""
    config, legacy = (
        read_json_object(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if "added_tokens_decoder" not in config:
        config |= legacy
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        config |= config[key] if isinstance(config.get(key), dict) else {}
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named = {k: x.get("content") if isinstance(x, dict) else x for k, x in named.items()}
    return {name: token for name, token in named.items() if isinstance(token, str)}


def _environment():
    """What `transformers` gives to templates, and so what they are written for."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant says; the text is the same without."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes <, > and & for HTML
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


def _refuse(message: str):
    raise ValueError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _plain_messages(messages: Chat) -> list[dict[str, Any]]:
    """Copies of the messages in JSON values, without the keys whose value is None."""
    if isinstance(messages, str | bytes | Mapping | Message) or not isinstance(messages, Iterable):
        raise ValueError(f"a chat must be a list of messages; got {type(messages).__name__}")
    turns = []
    for message in messages:
        turn = message.to_dict() if isinstance(message, Message) else message
        if not isinstance(turn, Mapping):
            raise ValueError(f"a message must be a Message or a dict; got {type(turn).__name__}")
        turns.append({key: value for key, value in _plain(turn).items() if value is not None})
    return turns


def _plain(value: Any) -> Any:
    """JSON values, so that templates can call no methods; an image is only named by its type."""
    match value:
        case None | bool() | int() | float() | str() if type(value).__module__ == "builtins":
            return value
        case np.generic():
            return _plain(value.item())
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _mark_end(turns: list[dict[str, Any]]) -> str:
    """Appends the mark to the last text of the final message, and returns that text."""
    content = turns[-1].get("content") if turns else None
    if isinstance(content, str):
        turns[-1]["content"] = content + _END_MARK
        return content
    for part in reversed(content) if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _END_MARK
            return text
    problem = "it has none" if turns else "there are no messages"
    raise ValueError(f"continue_final_message needs a final message with a text, but {problem}")


def _until_mark(prompt: str, text: str, path: Path) -> str:
    end = prompt.rfind(_END_MARK.strip())
    if end < 0 or text.strip() not in prompt[:end]:
        raise ValueError(
            f"continue_final_message needs a template that keeps the text of the final message, "
            f"but that of {path} changes it or leaves it out"
        )
    kept_spaces = prompt.startswith(_END_MARK, end)
    return prompt[:end] if kept_spaces else prompt[:end].rstrip()
