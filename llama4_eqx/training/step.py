"""One training step as a pure function; the loop around it is yours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.argument_checks import (
    check_key,
    check_type,
    float_dtype,
    real_number,
    whole_number,
)
from llama4_eqx.axes import leaf_name
from llama4_eqx.lowering import lower

LossFunction = Callable[[Any, Any, PRNGKeyArray], tuple[Array, Array, PyTree]]
"""From model, batch and (dropout) key to the mean loss, the number of targets that it is a mean
over, and anything else to report, which is averaged like the loss."""


# For one CPU. XLA's own schedule lets operations overlap and takes up to twice the memory, all of
# it fresh in each step: to map it takes a fifth of the processors' time. With this one, several
# devices don't come to their collectives in one order, which then hang or mix up their numbers.
_LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_ARRAY_OR_SHAPE = jax.Array | jax.ShapeDtypeStruct
_NOT_TRACING = get_opaque_trace_state()


class TrainState(eqx.Module):
    """Everything that a run carries from step to step, and that its checkpoints hold.

    `ema` is the exponential moving average of the trained leaves, if one is kept.
    """

    model: PyTree
    opt_state: PyTree
    ema: PyTree | None
    step: Int[Array, ""]
    key: PRNGKeyArray

    def ema_model(self) -> Any:
        """The model with the moving averages of its trained leaves."""
        if self.ema is None:
            raise ValueError("No average is kept: pass ema=True to init_train_state.")
        return eqx.combine(self.ema, self.model)


class StepMetrics(eqx.Module):
    """What a step reports: the loss before its update, the number of targets that it is a mean
    over, the gradients' global norm before clipping, and the loss function's own `aux`."""

    loss: Float[Array, ""]
    num_targets: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    aux: PyTree


def init_train_state(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    trainable: PyTree = eqx.is_inexact_array,
    ema: bool = False,
) -> TrainState:
    """The state before the first step. `trainable` must be that of `make_train_step`.

    The model is part of the state, so the first step donates its arrays.
    """
    _check_optimizer(optimizer)
    check_key(key)
    trained = eqx.filter(model, trainable)
    return TrainState(
        model=model,
        opt_state=optimizer.init(trained),
        # Copies, since a step donates its arguments.
        ema=jax.tree.map(jnp.copy, trained) if ema else None,
        step=jnp.zeros((), jnp.int32),
        key=key.copy(),
    )


@dataclass(frozen=True)
class TrainStep:
    """`state, metrics = step(state, batch)`, compiled; donates the old state."""

    _jitted: Any  # what `eqx.filter_jit` returns
    _jitted_for_one_cpu: Any
    donates: bool = True

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, StepMetrics]:
        check_type("state", state, TrainState, "init_train_state makes one; the batch comes second")
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
                raise ValueError(
                    f"{leaf_name(path)} of this state was donated to an earlier step: go on from "
                    "the state that the step returned, or pass donate=False to make_train_step."
                )
        jitted = self._jitted_for_one_cpu if _on_one_cpu((state, batch)) else self._jitted
        return jitted(batch, state)

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """Lowers the step, from arrays or shapes: see `llama4_eqx.lowering.lower`."""
        options = _LEAST_MEMORY if _on_one_cpu((state, batch)) else None
        return lower(self, state, batch, donate=0 if self.donates else None, options=options)


def make_train_step(
    optimizer: optax.GradientTransformation,
    loss_function: LossFunction,
    *,
    trainable: PyTree = eqx.is_inexact_array,
    micro_batches: int | None = None,
    clip_norm: float | None = None,
    compute_dtype: DTypeLike | None = None,
    ema_decay: float = 0.999,
    after_update: Callable[[Any, StepMetrics], Any] | None = None,
    donate: bool = True,
) -> TrainStep:
    """A step of `optimizer` down the gradient of `loss_function`.

    `trainable` filters the leaves to train, as `llama4_eqx.axes.select` does. With `micro_batches`,
    each array of a batch has an extra leading axis of that size; gradients are accumulated over
    them, and the step equals that of the one large batch: losses, `aux` and gradients are averaged
    by each micro-batch's number of targets.

    Gradients are scaled down to a global norm of at most `clip_norm`. With a `compute_dtype`, such
    as `jnp.bfloat16`, the loss function gets model and batch cast to it; parameters, accumulated
    gradients and the optimiser keep their dtypes. The moving average, if the state keeps one, moves
    by `1 - ema_decay`, and faster at first: by at least 9 / (10 + step).

    `after_update(model, metrics)` may change the model last, outside of any gradient; see
    `llama4_eqx.training.expert_bias`.

    The step reuses the memory of the old state, which can't be used again. With `donate=False` it
    stays usable, as suits a notebook, and takes the memory of a second one.
    """
    _check_optimizer(optimizer)
    if not callable(loss_function):
        raise TypeError(f"loss_function must be a function, but is {loss_function!r}.")
    if isinstance(trainable, str):
        raise TypeError(f"trainable must be a filter: write select(model, {trainable!r}).")
    if compute_dtype is not None:
        compute_dtype = float_dtype(compute_dtype, "compute_dtype")
    if clip_norm is not None and not real_number("clip_norm", clip_norm) > 0:
        raise ValueError(f"clip_norm must be positive, but is {clip_norm}: pass None for none.")
    if micro_batches is not None:
        micro_batches = whole_number("micro_batches", micro_batches)
    if not 0 <= real_number("ema_decay", ema_decay) < 1:
        raise ValueError(f"ema_decay must be in [0, 1), but is {ema_decay}.")

    def weighted(trained, frozen, batch, key):
        model, batch = _cast((eqx.combine(trained, frozen), batch), compute_dtype)
        loss, num_targets, aux = _checked_loss(loss_function(model, batch, key))
        num_targets = jnp.asarray(num_targets, jnp.float32)
        loss = loss.astype(jnp.float32) * num_targets
        return loss, (loss, num_targets, jax.tree.map(lambda leaf: leaf * num_targets, aux))

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

    def step(batch: PyTree, state: TrainState) -> tuple[TrainState, StepMetrics]:
        trained, frozen = eqx.partition(state.model, trainable)
        key = jax.random.fold_in(state.key, state.step)
        total, (loss, num_targets, aux) = sums(trained, frozen, batch, key)
        scale = 1 / jnp.where(num_targets > 0, num_targets, 1)
        aux = jax.tree.map(lambda leaf: leaf * scale, aux)
        norm = scale * optax.tree.norm(optax.tree.cast(total, jnp.float32))
        metrics = StepMetrics(loss * scale, num_targets, norm, aux)
        if clip_norm is not None:
            scale *= jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30))
        gradients = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), total)
        # An optimiser's schedule may mix the step's integer with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained = eqx.apply_updates(trained, updates)
        ema = _updated_ema(state.ema, trained, ema_decay, state.step)
        model = eqx.combine(trained, frozen)
        if after_update is not None:
            model = after_update(model, metrics)
        return TrainState(model, opt_state, ema, state.step + 1, state.key), metrics

    def jit(**options: Any) -> Any:
        return eqx.filter_jit(step, donate="all-except-first" if donate else "none", **options)

    return TrainStep(jit(), jit(compiler_options=_LEAST_MEMORY), donate)


def _on_one_cpu(tree: PyTree) -> bool:
    """Whether all arrays, or shapes, are on the only CPU: if there are more, a mesh in the model or
    in the loss function may bring them in. Not inside another transformation, as only an outermost
    `jit` takes options."""
    if jax.device_count() > 1 or get_opaque_trace_state() != _NOT_TRACING:
        return False
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, _ARRAY_OR_SHAPE)]
    shardings = [leaf.sharding for leaf in leaves if leaf.sharding is not None]
    devices = {device for sharding in shardings for device in sharding.device_set}
    return [device.platform for device in devices or jax.devices()[:1]] == ["cpu"]


def _check_optimizer(optimizer: Any) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be one of optax, such as optax.adamw(1e-3), but is {optimizer!r}."
        )


def _checked_loss(found: Any) -> tuple[Array, ArrayLike, PyTree]:
    """What a loss function has returned, or an error that says what it should."""
    if not (isinstance(found, tuple) and len(found) == 3):
        raise TypeError(
            "loss_function must return three things, the mean loss, the number of targets that it "
            f"is a mean over, and what else to report, such as {{}}, but returned {found!r:.80}."
        )
    if jnp.ndim(found[0]) != 0:
        raise ValueError(f"The loss must be one number, but has the shape {jnp.shape(found[0])}.")
    return found


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


def _updated_ema(
    ema: PyTree | None, trained: PyTree, decay: float, step: Int[Array, ""]
) -> PyTree | None:
    if ema is None:
        return None
    steps = step.astype(jnp.float32)
    step_size = 1 - jnp.minimum(decay, (1 + steps) / (10 + steps))
    with jax.numpy_dtype_promotion("standard"):  # averages may be in bfloat16
        updated = optax.incremental_update(trained, ema, step_size)
    return optax.tree.cast_like(updated, ema)
