"""Every annotation of shapes and types checked while a program runs, for debugging."""

import dataclasses
import gc
import importlib
import inspect
import sys
from functools import wraps
from types import ModuleType
from typing import Any

import equinox as eqx
from jaxtyping import install_import_hook

from llama4_eqx.axes import field_hints

_PACKAGE = __name__.partition(".")[0]


def enable_shape_checks() -> None:
    """From now on each function of the package checks its arguments and what it returns: an axis
    that has one size in one argument and another in the next is an error that names it.

        import llama4_eqx as l4
        l4.enable_shape_checks()

    Call it before anything else is taken from the package. It costs time when programs are traced,
    and none when they run. Calling it again does nothing.

    Raises a `RuntimeError` where it comes too late: if a model already exists, or if names have
    been imported from the package, which would stay unchecked.
    """
    modules = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] == _PACKAGE
    }
    if getattr(modules[_PACKAGE], "_shapes_are_checked", False):
        return
    _refuse_too_late(modules)
    for name in modules:
        del sys.modules[name]
    with install_import_hook(_PACKAGE, "beartype.beartype"):
        for name in modules:
            importlib.import_module(name)
    for module in sys.modules.copy().values():
        if module.__name__.split(".")[0] == _PACKAGE:
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == module.__name__:
                    _check_axes_at_calls(value)
    # Whoever holds one of the old modules finds the new names in it.
    for name, module in modules.items():
        vars(module).update(vars(sys.modules[name]))
    for package in (modules[_PACKAGE], sys.modules[_PACKAGE]):
        vars(package)["_shapes_are_checked"] = True


def _refuse_too_late(modules: dict[str, ModuleType]) -> None:
    own = {id(vars(module)) for module in modules.values()}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or id(vars(module)) in own:
            continue
        for key, value in list(vars(module).items()):
            home = getattr(value, "__module__", None)
            if not isinstance(home, str) or not hasattr(value, "__name__") or value is _SELF:
                continue
            if home.split(".")[0] == _PACKAGE:
                raise RuntimeError(
                    f"enable_shape_checks() comes too late: {name} has imported {key} already. "
                    f"Call it right after `import {_PACKAGE}`, before importing names from it."
                )
    model = sys.modules[f"{_PACKAGE}.model"].Llama4
    if any(type(thing) is model for thing in gc.get_objects()):
        raise RuntimeError(
            "enable_shape_checks() comes too late: a Llama4 exists already, whose methods stay "
            "unchecked. Call it before making a model."
        )


_SELF = enable_shape_checks


def _check_axes_at_calls(cls: type) -> None:
    """Makes calls of a module check that its own fields and all arguments agree on every axis."""
    call = vars(cls).get("__call__")
    if not issubclass(cls, eqx.Module) or call is None:
        return
    signature = inspect.signature(call)

    @wraps(call)
    def checked(self: eqx.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        sizes: dict[str, tuple[Any, str]] = {}
        for name, value in list(bound.items())[1:]:
            hint = signature.parameters[name].annotation
            _bind_axes(value, hint, name, cls.__name__, sizes)
        _bind_axes(self, None, "", cls.__name__, sizes)
        return call(self, *args, **kwargs)

    type.__setattr__(cls, "__call__", checked)


def _bind_axes(
    value: Any, hint: Any, name: str, where: str, sizes: dict[str, tuple[Any, str]]
) -> None:
    if isinstance(value, eqx.Module):
        hints = field_hints(type(value))
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name, None)
            # The modules of `self` check their own fields when they are called.
            if name or not isinstance(inner, eqx.Module):
                path = f"{name}.{field.name}".removeprefix(".")
                _bind_axes(inner, hints.get(field.name), path, where, sizes)
    shape = getattr(value, "shape", None)
    if shape is None:
        return
    options = [h for h in (hint, *getattr(hint, "__args__", ())) if hasattr(h, "dim_str")]
    if options:
        for word, size in _named_axes(shape, options[0].dim_str.split()):
            if size == () and word in sizes:  # all rows of what came before share it
                continue
            known, before = sizes.setdefault(word, (size, name))
            if known != size:
                raise ValueError(
                    f"{where}: the axis {word!r} is {known} in {before} but {size} in {name}."
                )


def _named_axes(shape: tuple[Any, ...], words: list[str]) -> list[tuple[str, Any]]:
    """Each plain word and its size; `*batch` has a tuple of them."""
    starred = [i for i, word in enumerate(words) if word.startswith("*")]
    if len(starred) > 1 or len(shape) < len(words) - len(starred) or "..." in words:
        return []
    if starred:
        end = len(shape) - (len(words) - starred[0] - 1)
        batch = shape[starred[0] : end]
        shape = (*shape[: starred[0]], batch, *shape[end:])
    elif len(shape) != len(words):
        return []
    pairs = zip(words, shape, strict=True)
    return [(w.lstrip("*"), s) for w, s in pairs if w.lstrip("*").isidentifier()]
