"""Training losses: of next tokens, without ever holding all logits, and of the experts' balance."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.layers.across import Axes, alike, leave
from llama4_eqx.layers.mask import places
from llama4_eqx.layers.moe import choose_experts
from llama4_eqx.layers.remat import Keep
from llama4_eqx.model import Llama4, Parallel


class TokenLoss(eqx.Module):
    """`total = cross_entropy + z_loss · mean(logsumexp²)`, in nats per counted token. Only `total`
    has a gradient."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    tokens: Int[Array, ""]


def token_loss(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "vocab hidden"],
    labels: Int[Array, "*batch"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    z_loss: float = 0.0,
    piece: int = 1024,
    parallel: Parallel | None = None,
) -> TokenLoss:
    """Mean cross-entropy of `softmax(head · hidden)`, over the labels where `mask` is True.

    Logits exist for `piece` tokens at a time, in float32. Where a gradient is wanted, it is made
    along with the loss while the logits are at hand, so that backward computes none again: it costs
    the memory of the gradients of `hidden` and, in float32, of `head`. `z_loss` keeps logits from
    drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5). `parallel` is that of a model on
    many devices, each of which adds up its own tokens. Has no forward-mode derivative.
    """
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    weights = _shares(counted)
    sums = partial(_sums, z_loss, piece)
    if parallel is None:
        total, cross_entropy = sums(hidden, labels, weights, head, ())
    else:
        total, cross_entropy = parallel.token_sums(sums, hidden, labels, weights, head)
    tokens = jnp.sum(counted, dtype=jnp.int32)
    return TokenLoss(total, lax.stop_gradient(cross_entropy), tokens)


def _shares(counted: Bool[Array, "*batch"]) -> Float[Array, "*batch"]:
    """What each token contributes to a mean over the counted ones."""
    shares = counted.astype(jnp.float32)
    return shares / jnp.maximum(jnp.sum(shares), 1)


def _sums(
    z_loss: float,
    piece: int,
    hidden: Float[Array, "*batch hidden"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    head: Float[Array, "vocab hidden"],
    split: Axes,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the loss and of the cross-entropy, piece by piece. Along the mesh axes
    `split` each device has a part of the vocabulary."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    piece = max(1, min(piece, len(rows)))
    spare = -len(rows) % piece
    pieces = (
        jnp.pad(rows, ((0, spare), (0, 0))).reshape(-1, piece, rows.shape[-1]),
        jnp.pad(labels.reshape(-1), (0, spare)).reshape(-1, piece),
        jnp.pad(weights.reshape(-1), (0, spare)).reshape(-1, piece),
    )
    return _summed(split, *pieces, head, jnp.float32(z_loss))


def _piece_loss(split, rows, labels, weights, head, z_loss):
    logits = lax.dot_general(
        rows, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    top = logits.max(-1)
    top = lax.pmax(top, split) if split else top
    logsumexp = top + jnp.log(leave(jnp.exp(logits - top[:, None]).sum(-1), split))
    first = lax.axis_index(split) * len(head) if split else 0
    is_label = jnp.arange(len(head)) == (labels - first)[:, None]
    chosen = leave(jnp.where(is_label, logits, 0).sum(-1), split)
    cross_entropy = jnp.sum(weights * (logsumexp - chosen))
    total = cross_entropy + z_loss * jnp.sum(weights * logsumexp**2)
    return total, cross_entropy, logits, logsumexp, is_label


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(split, rows, labels, weights, head, z_loss):
    def step(sums, piece):
        x, label, weight = piece
        total, cross_entropy, *_ = _piece_loss(split, x, label, weight, head, z_loss)
        return (sums[0] + total, sums[1] + cross_entropy), None

    zero = jnp.zeros_like(weights, shape=())
    return lax.scan(step, (zero, zero), (rows, labels, weights))[0]


def _summed_forward(split, rows, labels, weights, head, z_loss):
    def step(state, piece):
        sums, d_head = state
        x, label, weight = piece
        total, cross_entropy, logits, logsumexp, is_label = _piece_loss(
            split, x, label, weight, head, z_loss
        )
        # d total / d logits, of which softmax is the derivative of logsumexp.
        slope = weight * (1 + 2 * z_loss * logsumexp)
        d_logits = jnp.exp(logits - logsumexp[:, None]) * slope[:, None]
        d_logits = (d_logits - jnp.where(is_label, weight[:, None], 0)).astype(x.dtype)
        d_head += lax.dot_general(
            d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return ((sums[0] + total, sums[1] + cross_entropy), d_head), d_logits @ head

    zero, (head, rows) = jnp.zeros_like(weights, shape=()), alike(head, rows)
    start = (zero, zero), jnp.zeros_like(head, jnp.float32)
    (sums, d_head), d_rows = lax.scan(step, start, (rows, labels, weights))
    return sums, (d_rows, d_head.astype(head.dtype))


def _summed_backward(split, gradients, d_sums):
    d_rows, d_head = gradients
    d_total, _ = d_sums
    return (
        d_total.astype(d_rows.dtype) * d_rows,
        None,
        None,
        d_total.astype(d_head.dtype) * d_head,
        None,
    )


_summed.defvjp(_summed_forward, _summed_backward)


class NextTokenLoss(eqx.Module):
    """The loss of a batch, and the router's logits with the tokens that they count for."""

    token: TokenLoss
    router_logits: Float[Array, "layers *batch seq experts"]
    real: Bool[Array, "*batch seq"]


def next_token_loss(
    model: Llama4,
    tokens: Int[Array, "*batch seq"],
    *,
    mask: Bool[Array, "*batch seq"] | None = None,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    target_mask: Bool[Array, "*batch seq"] | None = None,
    pixel_values: Float[Array, "tiles channels height width"] | None = None,
    z_loss: float = 0.0,
    piece: int = 1024,
    keep: Keep = "products",
    key: PRNGKeyArray | None = None,
) -> NextTokenLoss:
    """Each token predicted from those before it in its own document.

    `mask`, `segment_ids`, `pixel_values`, `keep` and `key` are those of the model's call. Of the
    tokens to be predicted, `target_mask` picks those that count: the assistant's, say. See
    `token_loss` for the rest.
    """
    hidden, _, router_logits = model.hidden_states(
        tokens,
        mask=mask,
        segment_ids=segment_ids,
        pixel_values=pixel_values,
        keep=keep,
        key=key,
    )
    segments = places(tokens.shape, mask=mask, segment_ids=segment_ids).segments
    # The last token of a row has no successor: what comes round doesn't count.
    successors, their_segments = (jnp.roll(x, -1, axis=-1) for x in (tokens, segments))
    follows = (their_segments == segments) & (their_segments >= 0)
    follows &= jnp.arange(tokens.shape[-1]) < tokens.shape[-1] - 1
    if target_mask is not None:
        follows &= jnp.roll(target_mask, -1, axis=-1)
    loss = token_loss(
        hidden,
        model.embed_tokens if model.lm_head is None else model.lm_head,
        successors,
        mask=follows,
        z_loss=z_loss,
        piece=piece,
        parallel=model.parallel,
    )
    return NextTokenLoss(loss, router_logits, segments >= 0)


class RouterReport(eqx.Module):
    """How the router of each MoE layer shares out the tokens.

    `load` is the fraction of choices that fall on each expert; `entropy` is that of the load in
    nats, `log(experts)` when all are equal; `dropped` is 0, for no token is ever dropped.
    `balance_loss` is Switch's (https://arxiv.org/abs/2101.03961, equation 4): `experts · Σ load ·
    mean softmax(logits)`, 1 when all are equal for `top_k` = 1, and `top_k` in general; `z_loss` is
    ST-MoE's, `mean(logsumexp(logits)²)` (https://arxiv.org/abs/2202.08906, equation 5). Both are
    to be added to the training loss, times a small number, by whoever wants them.
    """

    load: Float[Array, "layers experts"]
    entropy: Float[Array, "layers"]
    dropped: Float[Array, "layers"]
    balance_loss: Float[Array, "layers"]
    z_loss: Float[Array, "layers"]


def router_report(
    router_logits: Float[Array, "layers *batch seq experts"],
    *,
    top_k: int,
    mask: Bool[Array, "*batch seq"] | None = None,
    selection_bias: Float[Array, "layers experts"] | None = None,
) -> RouterReport:
    """Reads an `Output.router_logits`; padding, where `mask` is False, isn't counted. A
    `selection_bias` is that of a model that has one; see `llama4_eqx.balance`."""
    layers, *batch, experts = router_logits.shape
    logits = router_logits.astype(jnp.float32)
    weights = _shares(jnp.ones(batch, bool) if mask is None else mask)
    bias = selection_bias
    if bias is not None:
        bias = bias.reshape(layers, *[1] * len(batch), experts)
    _, chosen = choose_experts(logits, top_k, bias)
    hits = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum(-2)
    per_token = jnp.einsum("l...e,...->le", hits, weights)
    probability = jnp.einsum("l...e,...->le", jax.nn.softmax(logits, axis=-1), weights)
    load = per_token / top_k
    return RouterReport(
        load=load,
        entropy=-jnp.sum(load * jnp.log(jnp.maximum(load, 1e-30)), axis=-1),
        dropped=jnp.zeros(layers),
        balance_loss=experts * jnp.sum(per_token * probability, axis=-1),
        z_loss=jnp.einsum("l...,...->l", jax.nn.logsumexp(logits, axis=-1) ** 2, weights),
    )
