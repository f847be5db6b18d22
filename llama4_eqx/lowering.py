"""Compiling a function of modules ahead of time, from shapes alone."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.stages import Lowered


def lower(
    function: Callable[..., Any],
    *arguments: Any,
    donate: int | None = None,
    options: dict[str, Any] | None = None,
) -> Lowered:
    """`jax.jit(function).lower(*arguments)` for arguments that are modules, of arrays or of shapes.

    Shapes may carry shardings, as those of `llama4_eqx.distributed.abstract_sharded` do. The
    argument number `donate` is donated; `options` are the compiler's.
    """
    arrays, rest = eqx.partition(arguments, _is_array_or_shape)

    def of_arrays(*arrays: Any) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, rest)), eqx.is_array)

    return jax.jit(of_arrays, donate_argnums=donate, compiler_options=options).lower(*arrays)


def _is_array_or_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
