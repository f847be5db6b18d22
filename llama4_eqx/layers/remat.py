"""Rematerialisation: what the backward pass saves of a layer's forward pass, and what it
recomputes."""

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import equinox as eqx
import jax
from jax.ad_checkpoint import checkpoint_name

RematPolicy = Literal["dots", "full", "none"]
"""What of a layer is recomputed: `"dots"` all but matrix products and collectives, which is the
fastest; `"full"` everything, which takes the least memory; `"none"` nothing."""

_T = TypeVar("_T")
SAVED_RESIDUAL = "saved_residual"


def save_residual(x: _T) -> _T:
    """Names a value that `remat="dots"` saves for the backward pass."""
    return checkpoint_name(x, SAVED_RESIDUAL)


def rematerialise(function: Callable[..., _T], policy: RematPolicy) -> Callable[..., _T]:
    """`function` with its residuals chosen by the policy.

    Norms, rotations, activations and copies are cheaper to recompute than to write and read: in a
    scan over layers, saving only products halves memory, and on CPUs, where fresh memory is slow,
    it takes less time as well.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return function
    if policy == "dots":
        # Not `dots_saveable`, which would save low-rank updates, too, each as large as a weight.
        saveable = policies.save_only_these_names(SAVED_RESIDUAL)
    elif policy == "full":
        saveable = policies.nothing_saveable
    else:
        raise ValueError(f"remat must be one of {get_args(RematPolicy)}, got {policy!r}")
    # No barriers against common subexpressions: a scan keeps forward and backward apart anyway, and
    # in unrolled layers the compiler may merge what it likes.
    return eqx.filter_checkpoint(function, policy=saveable, prevent_cse=False)
