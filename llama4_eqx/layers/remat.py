"""What the forward pass keeps for the backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
from jax.ad_checkpoint import checkpoint_name

_T = TypeVar("_T")


def keep(x: _T) -> _T:
    """Marks what costs a loop of matrix products, to be kept as single products are."""
    return checkpoint_name(x, "kept")


def keep_products(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, whose derivative keeps its inputs, its matrix products and what it marks with
    `keep`. Norms, rotations, activations and copies are cheaper computed again than written and
    read: in a scan over layers this halves memory, and on CPUs, where fresh memory is slow, time
    falls with it."""
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names("kept")
    )
    # Without barriers: across a scan the compiler can't merge both computations, and where layers
    # are unrolled it may if it likes.
    return eqx.filter_checkpoint(function, policy=policy, prevent_cse=False)
