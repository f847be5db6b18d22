"""Attention of tokens to themselves by JAX's own kernel for TPUs, splash attention."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.collectives import call_kernel, match_vma
from llama4_eqx.layers.mask import TokenPositions, runs_of_chunks
from llama4_eqx.layers.remat import SAVED_RESIDUAL

LANES, LARGEST_BLOCK = 128, 512


def fits_splash(q: Array, k: Array) -> bool:
    """Whether the kernel takes these dtypes and sizes: queries and keys of the same tokens."""
    same = q.dtype == k.dtype and q.shape[-2] == k.shape[-2]
    return same and q.dtype in (jnp.bfloat16, jnp.float32) and q.shape[-1] % LANES == 0


def splash_attention(
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq head_dim"],
    tokens: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "batch heads seq head_dim"]:
    """`attention` of tokens to themselves, which `interpret` runs on any platform.

    The kernel skips the blocks of keys after a query. Documents and chunks are its segments; of
    rows known to be one document, chunks become rows of the batch, so that other chunks' blocks
    aren't computed either. Queries are scaled before the product, in their own dtype.
    """
    batch, heads, seq, head_dim = q.shape
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    if tokens.contiguous:
        ids, length = None, min(chunk_size or seq, seq)
    else:
        ids, length = runs_of_chunks(tokens, chunk_size), seq
    block = min(-(-length // LANES) * LANES, LARGEST_BLOCK)

    def by_chunk(x: Array) -> Array:
        """Chunks as rows, padded at their ends, where no real query looks."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -seq % length), (0, 0)))
        x = x.reshape(*x.shape[:2], -1, length, head_dim).swapaxes(1, 2)
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, -length % block), (0, 0)))

    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, -length % block)), constant_values=-1)
    q, k, v, ids = match_vma(by_chunk(q), by_chunk(k), by_chunk(v), ids)
    out: Array = _splash(_Settings(block, interpret), q, k, v, ids)
    out = out[:, :, :length].reshape(batch, -1, heads, length, head_dim).swapaxes(1, 2)
    out = out.reshape(batch, heads, -1, head_dim)[:, :, :seq]
    return out if ids is None else jnp.where((tokens.segments >= 0)[:, None, :, None], out, 0)


class _Settings(NamedTuple):
    block: int
    interpret: bool


# With the kernel's own derivative, run as a kernel itself.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash(
    settings: _Settings,
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq head_dim"],
    ids: Int[Array, "batch seq"] | None,
) -> Float[Array, "batch heads seq head_dim"]:
    return _forward(settings, q, k, v, ids)[0]


def _forward(settings, q, k, v, ids) -> tuple[Any, Any]:
    block, interpret = settings
    run = splash_kernel(q, k, causal=True, blocks=(block, block), interpret=interpret)
    return call_kernel(
        lambda q, k, v, ids: jax.vjp(lambda *qkv: run(*qkv, ids, ids), q, k, v), q, k, v, ids
    )


def _backward(settings, vjp, d_out):
    return *call_kernel(lambda vjp, d_out: vjp(d_out), vjp, d_out), None


_splash.defvjp(_forward, _backward)


def splash_kernel(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    *,
    causal: bool,
    blocks: tuple[int, int],
    interpret: bool,
    with_logsumexp: bool = False,
) -> Callable[..., Any]:
    """The kernel for queries and keys of such shapes, in whole blocks: `run(q, k, v, q_ids,
    kv_ids)`, where queries attend to keys of their own id, or to all if the ids are None; if
    `causal`, to none that come after them.

    `with_logsumexp` it returns `(out, (logsumexp,))`, and has no derivative.
    """
    # Here, since the module is slow to import and of no use without a TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, (block, kv_block) = (q.shape[2], k.shape[2]), blocks
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=kv_block,
            block_q_dkv=block,
            block_kv_dkv=kv_block,
            block_q_dq=block,
            block_kv_dq=kv_block,
        ),
        save_residuals=with_logsumexp,
        residual_checkpoint_name=SAVED_RESIDUAL,
        interpret=interpret,
    )

    def run(q, k, v, q_ids, kv_ids):
        segments = None if q_ids is None else splash.SegmentIds(q_ids, kv_ids)
        return jax.vmap(kernel)(q, k, v, segments)

    return run
