"""Checks of single arguments: what kind of object each is, and numbers that aren't arrays."""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np


def check_type(name: str, given: Any, kind: type, mend: str = "") -> None:
    """Raises a `TypeError` that names the argument unless it is of the kind; `mend` says what to do
    about others."""
    if not isinstance(given, kind):
        end = f": {mend}." if mend else "."
        raise TypeError(f"{name} must be a {kind.__name__}, but is a {type(given).__name__}{end}")


def check_key(key: Any) -> None:
    """Raises a `TypeError` for what can't be a key, such as a seed."""
    if not hasattr(key, "shape"):
        raise TypeError(
            f"key must be a JAX PRNG key, but is a {type(key).__name__}: pass jax.random.key(seed)."
        )


def whole_number(name: str, given: Any, *, least: int | None = 1, is_int32: bool = False) -> int:
    """A count as Python's `int`, whatever library's integer it was. Raises a `ValueError` for
    anything else, below `least`, if there is one, and with `is_int32` from 2³¹ on."""
    try:
        number = None if isinstance(given, bool | np.bool_) else operator.index(given)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" from {least}"
        raise ValueError(f"{name} must be a whole number{bound}, not {given!r}.")
    if is_int32 and number >= 2**31:
        raise ValueError(f"{name} must be below 2³¹, but is {str(number)[:20]}.")
    return number


def real_number(name: str, given: Any) -> float:
    """A number as Python's `float`. Raises a `ValueError` for anything else, such as a string."""
    array = np.asarray(given)
    if array.ndim != 0 or not jnp.issubdtype(array.dtype, jnp.number):
        raise ValueError(f"{name} must be a number, not {given!r}.")
    return float(array)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, for an error's sentence also of what is none."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def float_dtype(dtype: Any, name: str = "dtype") -> Any:
    """JAX's dtype of that name. Raises a `ValueError` for others than of floating-point numbers."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point dtype of JAX, such as jnp.bfloat16 or 'float32', "
            f"but is {dtype!r}."
        )
    return found
