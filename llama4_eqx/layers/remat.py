"""What the backward pass keeps of the forward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import equinox as eqx
import jax
from jax.ad_checkpoint import checkpoint_name

# Of a layer, besides its inputs: matrix products and what devices summed or exchanged, which is
# fastest; nothing, which is smallest; or everything that its derivative reads.
Keep = Literal["products", "nothing", "everything"]

_T = TypeVar("_T")


def kept(x: _T) -> _T:
    """Marks the result of a matrix product, of a loop of them, or of a sum over devices."""
    return checkpoint_name(x, "kept")


def remat(function: Callable[..., _T], keep: Keep) -> Callable[..., _T]:
    """`function`, whose derivative keeps its inputs and what `keep` names.

    Norms, rotations, activations and copies are cheaper computed again than written and read: in a
    scan over layers, keeping only products halves memory, and on CPUs, where fresh memory is slow,
    time falls with it.
    """
    policies = jax.checkpoint_policies
    if keep == "everything":
        return function
    if keep == "products":
        # Not `dots_saveable`, which would keep low-rank updates as large as the weights, too.
        policy = policies.save_only_these_names("kept")
    elif keep == "nothing":
        policy = policies.nothing_saveable
    else:
        raise ValueError(f"keep must be one of {get_args(Keep)}, got {keep!r}")
    # Without barriers: across a scan the compiler can't merge both computations, and where layers
    # are unrolled it may if it likes.
    return eqx.filter_checkpoint(function, policy=policy, prevent_cse=False)
