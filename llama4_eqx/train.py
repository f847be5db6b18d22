"""One step of training as a pure function; the loop around it stays the user's."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.axes import leaf_name
from llama4_eqx.programs import lower

# From a model, a batch and a key (for dropout) to the loss as a mean, what it is a mean over (how
# many tokens, say), and whatever else is to be reported.
LossFunction = Callable[[Any, Any, PRNGKeyArray], tuple[Array, Array, PyTree]]


class TrainState(eqx.Module):
    """All that a run carries from step to step, and all that its checkpoints must hold.

    `average` is an exponential moving average of what is trained, None where none is kept.
    """

    model: PyTree
    opt_state: PyTree
    average: PyTree | None
    step: Int[Array, ""]
    key: PRNGKeyArray

    def averaged_model(self) -> Any:
        """The model with the moving average of what is trained."""
        if self.average is None:
            raise ValueError("No average is kept: pass average=True to init_train_state.")
        return eqx.combine(self.average, self.model)


class Report(eqx.Module):
    """What a step tells: the loss before its update, what that is a mean over, the gradient's
    length before clipping, and the loss function's own report."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    other: PyTree


def select(model: PyTree, *patterns: str) -> PyTree:
    """True for the floating-point leaves whose path fits one of the patterns, False for all others.

    Patterns are the shell's: `*` stands for anything, dots too, so `"vision_model.*"` and
    `"*.norm.weight"` are what they look like. One that begins with `!` takes out what it fits. The
    result is a filter for `eqx.partition`, and what to pass as `trainable`. It fits the very model:
    one that is to be sharded is sharded first.

    Raises a `ValueError` for a pattern that fits no leaf.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    paths = [leaf_name(path) if eqx.is_inexact_array(leaf) else "" for path, leaf in leaves]
    chosen = [False] * len(paths)
    for pattern in patterns:
        fits = [bool(path) and fnmatchcase(path, pattern.removeprefix("!")) for path in paths]
        if not any(fits):
            raise ValueError(
                f"The pattern {pattern!r} fits no leaf. Paths look like "
                f"{next(filter(None, paths), None)!r}; "
                "jax.tree_util.tree_leaves_with_path(model) lists them."
            )
        chosen = [
            not pattern.startswith("!") if fit else old
            for fit, old in zip(fits, chosen, strict=True)
        ]
    return jax.tree.unflatten(structure, chosen)


def init_train_state(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    trainable: PyTree = eqx.is_inexact_array,
    average: bool = False,
) -> TrainState:
    """The state before the first step. `trainable` must be that of `make_train_step`.

    The model is part of the state: the first step takes its memory.
    """
    trained = eqx.filter(model, trainable)
    return TrainState(
        model=model,
        opt_state=optimizer.init(trained),
        # Copies, as a step takes the memory of its arguments.
        average=jax.tree.map(jnp.copy, trained) if average else None,
        step=jnp.zeros((), jnp.int32),
        key=key.copy(),
    )


@dataclass(frozen=True)
class TrainStep:
    """`state, report = step(state, batch)`, compiled; the old state's memory is used again."""

    _jitted: Any  # what `eqx.filter_jit` makes

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Report]:
        return self._jitted(batch, state)

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """The step as a program: see `llama4_eqx.programs.lower`."""
        return lower(self, state, batch, donate=0)


def make_train_step(
    optimizer: optax.GradientTransformation,
    loss_function: LossFunction,
    *,
    trainable: PyTree = eqx.is_inexact_array,
    micro_batches: int | None = None,
    clip_norm: float | None = None,
    compute_dtype: DTypeLike | None = None,
    average_decay: float = 0.999,
    after_update: Callable[[Any, Report], Any] | None = None,
) -> TrainStep:
    """A step of `optimizer` down the gradient of `loss_function`.

    `trainable` says which leaves are trained: a filter as `select` makes it. With `micro_batches`,
    each array of a batch has that many micro-batches along an extra leading axis; they are run one
    after the other, and the step is that of the one large batch: losses, reports and gradients
    are averaged by what each loss is a mean over.

    `clip_norm` shortens longer gradients to it. With a `compute_dtype`, such as `jnp.bfloat16`, the
    loss function gets model and batch cast to it, while parameters, their gradients' sum and the
    optimiser stay as they are. The moving average, if the state keeps one, moves by
    `1 - average_decay`, and quicker at first: by at least 9 / (10 + step).

    `after_update(model, report)` may change the model last, outside of any gradient; see
    `llama4_eqx.balance`.
    """

    def weighted(trained, frozen, batch, key):
        model, batch = _cast((eqx.combine(trained, frozen), batch), compute_dtype)
        loss, weight, other = loss_function(model, batch, key)
        weight = weight.astype(jnp.float32)
        loss = loss.astype(jnp.float32) * weight
        return loss, (loss, weight, jax.tree.map(lambda leaf: leaf * weight, other))

    gradient = eqx.filter_grad(weighted, has_aux=True)

    def sums(trained, frozen, batch, key):
        if micro_batches is None:
            return gradient(trained, frozen, batch, key)
        _check_micro_batches(batch, micro_batches)
        keys = jax.random.split(key, micro_batches)

        def add(total, micro_batch):
            one = gradient(trained, frozen, *micro_batch)
            return jax.tree.map(jnp.add, total, one), None

        first = jax.tree.map(lambda leaf: leaf[0], (batch, keys))
        shapes = eqx.filter_eval_shape(gradient, trained, frozen, *first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.scan(add, zeros, (batch, keys))[0]

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: PyTree, state: TrainState) -> tuple[TrainState, Report]:
        trained, frozen = eqx.partition(state.model, trainable)
        key = jax.random.fold_in(state.key, state.step)
        total, (loss, weight, other) = sums(trained, frozen, batch, key)
        share = 1 / jnp.where(weight > 0, weight, 1)
        gradients = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), total)
        norm = optax.tree.norm(gradients)
        report = Report(loss * share, weight, norm, jax.tree.map(lambda leaf: leaf * share, other))
        if clip_norm is not None:
            shorten = jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda leaf: leaf * shorten.astype(leaf.dtype), gradients)
        # An optimiser's schedule may mix the step's integer with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained = eqx.apply_updates(trained, updates)
        average = _moved(state.average, trained, average_decay, state.step)
        model = eqx.combine(trained, frozen)
        if after_update is not None:
            model = after_update(model, report)
        return TrainState(model, opt_state, average, state.step + 1, state.key), report

    return TrainStep(step)


def _cast(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def _check_micro_batches(batch: PyTree, micro_batches: int) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if any(shape[:1] != (micro_batches,) for shape in shapes):
        raise ValueError(
            f"Each array of a batch must have {micro_batches} micro-batches along its first axis, "
            f"but their shapes are {', '.join(map(str, shapes))}: reshape the batch."
        )


def _moved(
    average: PyTree | None, trained: PyTree, decay: float, step: Int[Array, ""]
) -> PyTree | None:
    if average is None:
        return None
    passed = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + passed) / (10 + passed))
    return jax.tree.map(
        lambda old, new: old + (1 - kept).astype(old.dtype) * (new - old), average, trained
    )
