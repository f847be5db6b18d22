"""Attention by cuDNN's kernel on NVIDIA GPUs, for rows without padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fits_cudnn(q: Array, k: Array) -> bool:
    """Whether the kernel takes these dtypes and sizes."""
    sixteen_bits = q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
    return sixteen_bits and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def cudnn_attention(
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq head_dim"],
    *,
    chunk_size: int | None,
    scale: float,
) -> Float[Array, "batch heads seq head_dim"]:
    """Causal attention of rows that are one unpadded document from position 0 on.

    Chunks become rows of the batch; the last one is padded at its end, where no query looks.
    """
    *_, seq, _ = q.shape
    chunk = seq if chunk_size is None else min(chunk_size, seq)

    def by_chunk(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -seq % chunk), (0, 0))).swapaxes(1, 2)
        return x.reshape(-1, chunk, *x.shape[2:])

    out = jax.nn.dot_product_attention(
        by_chunk(q), by_chunk(k), by_chunk(v), scale=scale, is_causal=True, implementation="cudnn"
    )
    out = out.reshape(q.shape[0], -1, *out.shape[2:]).swapaxes(1, 2)
    return out[:, :, :seq]
