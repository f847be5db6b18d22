"""Training losses: next-token cross-entropy without all logits at once, and router statistics."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama4_eqx.argument_checks import whole_number
from llama4_eqx.input_checks import Mask, TokenIds, mask_of, token_ids
from llama4_eqx.layers.collectives import AxisNames, match_vma, psum_over
from llama4_eqx.layers.moe import top_k_experts
from llama4_eqx.model import Llama4
from llama4_eqx.parallel import Parallel, SingleDevice


class TokenLoss(eqx.Module):
    """`total = cross_entropy + z_loss · mean(logsumexp²)`, in nats per counted token, and the
    number of these. Only `total` has a gradient."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    num_tokens: Int[Array, ""]


def token_loss(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "vocab hidden"],
    labels: Int[Array, "*batch"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    z_loss: float = 0.0,
    token_block: int = 1024,
    parallel: Parallel = SingleDevice(),
) -> TokenLoss:
    """Mean cross-entropy of `softmax(head · hidden)`, over the labels where `mask` is True.

    Logits exist for `token_block` tokens at a time, in float32. If a gradient is wanted, it is
    computed along with the loss while the logits exist, so that the backward pass computes none
    again: it costs the memory of the gradients of `hidden` and, in float32, of `head`. `z_loss`
    keeps logits from drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5). `parallel` is
    that of the model. Has no forward-mode derivative.
    """
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    sums = partial(_sums, z_loss, token_block)
    total, cross_entropy = parallel.token_sums(sums, hidden, labels, _mean_weights(counted), head)
    num_tokens = jnp.sum(counted, dtype=jnp.int32)
    return TokenLoss(total, lax.stop_gradient(cross_entropy), num_tokens)


def _mean_weights(counted: Bool[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The weight of each token in a mean over the counted ones."""
    weights = counted.astype(jnp.float32)
    return weights / jnp.maximum(jnp.sum(weights), 1)


def _sums(
    z_loss: float,
    token_block: int,
    hidden: Float[Array, "*batch hidden"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    head: Float[Array, "vocab hidden"],
    vocab_axes: AxisNames,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the loss and of the cross-entropy, block by block of tokens."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    block = max(1, min(token_block, len(rows)))
    spare = -len(rows) % block
    blocks = (
        jnp.pad(rows, ((0, spare), (0, 0))).reshape(-1, block, rows.shape[-1]),
        jnp.pad(labels.reshape(-1), (0, spare)).reshape(-1, block),
        jnp.pad(weights.reshape(-1), (0, spare)).reshape(-1, block),
    )
    return _chunked_cross_entropy(vocab_axes, *blocks, head, jnp.float32(z_loss))


def _block_loss(vocab_axes, rows, labels, weights, head, z_loss):
    logits = lax.dot_general(
        rows, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    top = logits.max(-1)
    top = lax.pmax(top, vocab_axes) if vocab_axes else top
    logsumexp = top + jnp.log(psum_over(jnp.exp(logits - top[:, None]).sum(-1), vocab_axes))
    first = lax.axis_index(vocab_axes) * len(head) if vocab_axes else 0
    is_label = jnp.arange(len(head)) == (labels - first)[:, None]
    label_logit = psum_over(jnp.where(is_label, logits, 0).sum(-1), vocab_axes)
    cross_entropy = jnp.sum(weights * (logsumexp - label_logit))
    total = cross_entropy + z_loss * jnp.sum(weights * logsumexp**2)
    return total, cross_entropy, logits, logsumexp, is_label


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_cross_entropy(vocab_axes, rows, labels, weights, head, z_loss):
    def step(sums, block):
        x, label, weight = block
        total, cross_entropy, *_ = _block_loss(vocab_axes, x, label, weight, head, z_loss)
        return (sums[0] + total, sums[1] + cross_entropy), None

    zero = jnp.zeros_like(weights, shape=())
    return lax.scan(step, (zero, zero), (rows, labels, weights))[0]


def _chunked_cross_entropy_forward(vocab_axes, rows, labels, weights, head, z_loss):
    def step(state, block):
        sums, d_head = state
        x, label, weight = block
        total, cross_entropy, logits, logsumexp, is_label = _block_loss(
            vocab_axes, x, label, weight, head, z_loss
        )
        # d total / d logits, of which softmax is the derivative of logsumexp.
        slope = weight * (1 + 2 * z_loss * logsumexp)
        d_logits = jnp.exp(logits - logsumexp[:, None]) * slope[:, None]
        d_logits = (d_logits - jnp.where(is_label, weight[:, None], 0)).astype(x.dtype)
        d_head += lax.dot_general(
            d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return ((sums[0] + total, sums[1] + cross_entropy), d_head), d_logits @ head

    zero, (head, rows) = jnp.zeros_like(weights, shape=()), match_vma(head, rows)
    start = (zero, zero), jnp.zeros_like(head, jnp.float32)
    (sums, d_head), d_rows = lax.scan(step, start, (rows, labels, weights))
    return sums, (d_rows, d_head.astype(head.dtype))


def _chunked_cross_entropy_backward(vocab_axes, gradients, d_sums):
    d_rows, d_head = gradients
    d_total, _ = d_sums
    return (
        d_total.astype(d_rows.dtype) * d_rows,
        None,
        None,
        d_total.astype(d_head.dtype) * d_head,
        None,
    )


_chunked_cross_entropy.defvjp(_chunked_cross_entropy_forward, _chunked_cross_entropy_backward)


class NextTokenLoss(eqx.Module):
    """The loss of a batch, its router logits, and the mask of the real tokens that these are of."""

    token: TokenLoss
    router_logits: Float[Array, "layers *batch seq experts"]
    mask: Bool[Array, "*batch seq"]


def next_token_loss(
    model: Llama4,
    tokens: TokenIds,
    *,
    target_mask: Mask | None = None,
    z_loss: float = 0.0,
    token_block: int = 1024,
    **forward: Any,
) -> NextTokenLoss:
    """The loss of predicting each token from those before it in its own document.

    `target_mask` is True at the tokens whose prediction counts, such as the assistant's. `forward`
    are keywords of the model's call: `mask`, `segment_ids`, `pixel_values`, `remat`, `key` ….
    `z_loss` and `token_block` are those of `token_loss`.
    """
    if not isinstance(tokens, jax.Array):  # the model's call checks the ids of those
        tokens = token_ids(tokens, model.embed_tokens.shape[0])
    target_mask = mask_of("target_mask", target_mask, tokens.shape)
    token_block = whole_number("token_block", token_block)
    output = model(tokens, **forward)
    segments = output.token_positions.segments
    # The last token of a row has no successor; what rolls around doesn't count.
    successors, their_segments = (jnp.roll(x, -1, axis=-1) for x in (tokens, segments))
    counted = (their_segments == segments) & (their_segments >= 0)
    counted &= jnp.arange(tokens.shape[-1]) < tokens.shape[-1] - 1
    if target_mask is not None:
        counted &= jnp.roll(target_mask, -1, axis=-1)
    loss = token_loss(
        output.hidden,
        model.head,
        successors,
        mask=counted,
        z_loss=z_loss,
        token_block=token_block,
        parallel=model.parallel,
    )
    return NextTokenLoss(loss, output.router_logits, segments >= 0)


class RouterReport(eqx.Module):
    """How the router of each MoE layer distributes the tokens.

    `load` is each expert's share of the choices; `entropy` is that of the load in nats,
    `log(experts)` when all are equal. `balance_loss` is Switch's (https://arxiv.org/abs/2101.03961,
    equation 4): `experts · Σ load · mean softmax(logits)`, 1 when all are equal for `top_k` = 1,
    and `top_k` in general; `z_loss` is ST-MoE's, `mean(logsumexp(logits)²)`
    (https://arxiv.org/abs/2202.08906, equation 5). Add them to the training loss, times a small
    number, if you want them.
    """

    load: Float[Array, "layers experts"]
    entropy: Float[Array, "layers"]
    balance_loss: Float[Array, "layers"]
    z_loss: Float[Array, "layers"]


def router_report(
    router_logits: Float[Array, "layers *batch seq experts"],
    *,
    top_k: int,
    mask: Bool[Array, "*batch seq"] | None = None,
    expert_bias: Float[Array, "layers experts"] | None = None,
) -> RouterReport:
    """Statistics of `Output.router_logits`; padding, where `mask` is False, isn't counted.
    `expert_bias` is that of a model that has one; see `llama4_eqx.training.expert_bias`."""
    if not isinstance(router_logits, jax.Array) or router_logits.ndim < 2:
        raise TypeError(
            "router_logits must be those of an Output, with axes of layers, tokens and experts, "
            f"but is a {type(router_logits).__name__}."
        )
    layers, *batch, experts = router_logits.shape
    if whole_number("top_k", top_k) > experts:
        raise ValueError(f"top_k is {top_k}, but there are {experts} experts.")
    logits = router_logits.astype(jnp.float32)
    weights = _mean_weights(jnp.ones(batch, bool) if mask is None else mask)
    bias = expert_bias
    if bias is not None:
        bias = bias.reshape(layers, *[1] * len(batch), experts)
    expert_ids = top_k_experts(logits, top_k, bias)
    hits = jax.nn.one_hot(expert_ids, experts, dtype=jnp.float32).sum(-2)
    per_token = jnp.einsum("l...e,...->le", hits, weights)
    probability = jnp.einsum("l...e,...->le", jax.nn.softmax(logits, axis=-1), weights)
    load = per_token / top_k
    return RouterReport(
        load=load,
        entropy=-jnp.sum(load * jnp.log(jnp.maximum(load, 1e-30)), axis=-1),
        balance_loss=experts * jnp.sum(per_token * probability, axis=-1),
        z_loss=jnp.einsum("l...,...->l", jax.nn.logsumexp(logits, axis=-1) ** 2, weights),
    )
