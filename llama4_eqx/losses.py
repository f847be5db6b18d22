"""Training losses: of next tokens, without ever holding all logits, and of the experts' balance."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.layers.mask import places
from llama4_eqx.layers.moe import choose_experts
from llama4_eqx.layers.remat import Keep
from llama4_eqx.model import Llama4


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
) -> TokenLoss:
    """Mean cross-entropy of `softmax(head · hidden)`, over the labels where `mask` is True.

    Logits exist for `piece` tokens at a time, in float32. Where a gradient is wanted, it is made
    along with the loss while the logits are at hand, so that backward computes none again: it costs
    the memory of the gradients of `hidden` and, in float32, of `head`. `z_loss` keeps logits from
    drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5). Has no forward-mode derivative.
    """
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    tokens = jnp.sum(counted, dtype=jnp.int32)
    weights = _shares(counted)
    rows, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    piece = max(1, min(piece, len(rows)))
    spare = -len(rows) % piece
    pieces = (
        jnp.pad(rows, ((0, spare), (0, 0))).reshape(-1, piece, rows.shape[-1]),
        jnp.pad(flat_labels, (0, spare)).reshape(-1, piece),
        jnp.pad(weights, (0, spare)).reshape(-1, piece),
    )
    total, cross_entropy = _summed(*pieces, head, jnp.float32(z_loss))
    return TokenLoss(total, lax.stop_gradient(cross_entropy), tokens)


def _shares(counted: Bool[Array, "*batch"]) -> Float[Array, "tokens"]:
    """What each token contributes to a mean over the counted ones."""
    shares = counted.astype(jnp.float32).reshape(-1)
    return shares / jnp.maximum(jnp.sum(shares), 1)


def _piece_loss(rows, labels, weights, head, z_loss):
    logits = lax.dot_general(
        rows, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    cross_entropy = jnp.sum(weights * (logsumexp - chosen))
    total = cross_entropy + z_loss * jnp.sum(weights * logsumexp**2)
    return total, cross_entropy, logits, logsumexp


@jax.custom_vjp
def _summed(rows, labels, weights, head, z_loss):
    def step(sums, piece):
        x, label, weight = piece
        total, cross_entropy, *_ = _piece_loss(x, label, weight, head, z_loss)
        return (sums[0] + total, sums[1] + cross_entropy), None

    return lax.scan(step, (jnp.float32(0), jnp.float32(0)), (rows, labels, weights))[0]


def _summed_forward(rows, labels, weights, head, z_loss):
    def step(state, piece):
        sums, d_head = state
        x, label, weight = piece
        total, cross_entropy, logits, logsumexp = _piece_loss(x, label, weight, head, z_loss)
        # d total / d logits, of which softmax is the derivative of logsumexp.
        slope = weight * (1 + 2 * z_loss * logsumexp)
        d_logits = jnp.exp(logits - logsumexp[:, None]) * slope[:, None]
        d_logits = d_logits.at[jnp.arange(len(label)), label].add(-weight).astype(x.dtype)
        d_head += lax.dot_general(
            d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return ((sums[0] + total, sums[1] + cross_entropy), d_head), d_logits @ head

    start = (jnp.float32(0), jnp.float32(0)), jnp.zeros(head.shape, jnp.float32)
    (sums, d_head), d_rows = lax.scan(step, start, (rows, labels, weights))
    return sums, (d_rows, d_head.astype(head.dtype))


def _summed_backward(gradients, d_sums):
    d_rows, d_head = gradients
    d_total, _ = d_sums
    scaled = (d_total.astype(d_rows.dtype) * d_rows, d_total.astype(d_head.dtype) * d_head)
    return scaled[0], None, None, scaled[1], None


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
    follows = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] >= 0)
    if target_mask is not None:
        follows &= target_mask[..., 1:]
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    loss = token_loss(
        hidden[..., :-1, :], head, tokens[..., 1:], mask=follows, z_loss=z_loss, piece=piece
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
    layers, experts = router_logits.shape[0], router_logits.shape[-1]
    logits = router_logits.reshape(layers, -1, experts).astype(jnp.float32)
    weights = _shares(jnp.ones(logits.shape[1], bool) if mask is None else mask)
    bias = None if selection_bias is None else selection_bias[:, None]
    _, chosen = choose_experts(logits, top_k, bias)
    hits = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum(-2)
    per_token = jnp.einsum("lte,t->le", hits, weights)
    probability = jnp.einsum("lte,t->le", jax.nn.softmax(logits, axis=-1), weights)
    load = per_token / top_k
    return RouterReport(
        load=load,
        entropy=-jnp.sum(load * jnp.log(jnp.maximum(load, 1e-30)), axis=-1),
        dropped=jnp.zeros(layers),
        balance_loss=experts * jnp.sum(per_token * probability, axis=-1),
        z_loss=jnp.einsum("lt,t->l", jax.nn.logsumexp(logits, axis=-1) ** 2, weights),
    )
