"""Checks of values that are known only at run time, which stop no program from being compiled for
another platform or exported."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Int


def refuse_if(
    wrong: Bool[Array, ""], sentence: str, detail: Int[Array, ""] | int = 0
) -> Int[Array, ""]:
    """0, or an error with the sentence, in which `{detail}` stands for that number.

    The 0 is to be added to a value used later, so that the check isn't dead code; it is scalar,
    because the host callback would gather a sharded array onto one device.

    The check runs where the program runs on this machine's own platform. A program that is lowered
    for another one, or exported, has no host to call, and goes unchecked.
    """
    return _refuse_p.bind(wrong, jnp.asarray(detail, jnp.int32), refusal=_Refusal(sentence))


@dataclass(frozen=True)
class _Refusal:
    """Raises an error at run time. Equal for equal sentences, so that nothing is compiled twice."""

    sentence: str

    def __call__(self, wrong: Bool[Array, ""], detail: Int[Array, ""]) -> Int[Array, ""]:
        if "{detail}" not in self.sentence:
            return eqx.error_if(jnp.zeros((), jnp.int32), wrong, self.sentence)
        return lax.cond(
            wrong, lambda x: jax.pure_callback(self._raise, x, x), jnp.zeros_like, detail
        )

    def _raise(self, detail: Array) -> None:
        raise ValueError(self.sentence.format(detail=int(detail)))


_refuse_p = Primitive("refuse_if")
_Array = Array | np.ndarray


def _eager(wrong: _Array, detail: _Array, *, refusal: _Refusal) -> Array:
    """Outside of `jit` the error is raised here, so that the user sees it alone. JAX passes
    constants as NumPy arrays."""
    if isinstance(wrong, jax.Array) and not wrong.is_fully_addressable:
        return jax.jit(refusal)(wrong, detail)
    if bool(wrong):
        raise ValueError(refusal.sentence.format(detail=int(detail)))
    return jnp.zeros((), jnp.int32)


def _on_this_platform(wrong: Array, detail: Array, *, refusal: _Refusal) -> Array:
    return refusal(wrong, detail)


def _nowhere(wrong: Array, detail: Array, *, refusal: _Refusal) -> Array:
    return jnp.zeros((), jnp.int32)


def _lower(ctx, wrong, detail, *, refusal):
    module = ctx.module_context
    own = {"gpu": ("cuda", "rocm")}.get(jax.default_backend(), (jax.default_backend(),))
    at_home = set(ctx.platforms or module.platforms) <= set(own)
    checked = at_home and not module.lowering_parameters.for_export
    check = _on_this_platform if checked else _nowhere
    return mlir.lower_fun(check, multiple_results=False)(ctx, wrong, detail, refusal=refusal)


def _batch(operands, axes, *, refusal):
    """One check for the whole batch: under `vmap` a batched condition would run both branches."""
    wrong, detail = operands
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    wrong, detail = jnp.broadcast_to(wrong, (size,)), jnp.broadcast_to(detail, (size,))
    first = jnp.argmax(wrong)
    return _refuse_p.bind(jnp.any(wrong), detail[first], refusal=refusal), None


def _jvp(operands, tangents, *, refusal):
    out = _refuse_p.bind(*operands, refusal=refusal)
    return out, ad.Zero(ShapedArray((), jax.dtypes.float0))


_refuse_p.def_impl(_eager)
_refuse_p.def_abstract_eval(lambda wrong, detail, *, refusal: ShapedArray((), jnp.int32))
mlir.register_lowering(_refuse_p, _lower)
batching.primitive_batchers[_refuse_p] = _batch
ad.primitive_jvps[_refuse_p] = _jvp
