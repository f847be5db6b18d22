"""The attention core: one function of positions and segments for training, prefill and decode.

Whether a query attends to a key is decided by `mask.attention_mask` alone, of which each of the
forms is a faster or smaller way to compute the same.
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.backends import AttentionBackend, check_backend
from llama4_eqx.layers.blockwise import BLOCK, LARGE_BLOCK, blockwise_attention
from llama4_eqx.layers.collectives import AxisNames, match_vma
from llama4_eqx.layers.cudnn import cudnn_attention, fits_cudnn
from llama4_eqx.layers.dense_attention import dense_attention
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.splash import fits_splash, splash_attention


def attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float = 0.0,
    axis_names: AxisNames = (),
    key: PRNGKeyArray | None = None,
    own_keys: bool = False,
    backend: AttentionBackend | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """Softmax attention of each query over the keys in its mask; zeros where that is empty.

    Equal runs of query heads share a key head (grouped-query attention). Scores and softmax are
    in float32. Dropout of attention probabilities needs a `key`. Inside `jax.shard_map` the keys
    may be sharded along mesh axes `axis_names`, which needs the dense form. `own_keys` says that
    queries and keys are those of the same tokens.

    `backend` None chooses by the shapes and by the platform that the program is lowered for: dense
    for small problems; cuDNN on GPUs, if this machine or the mesh has them, for unpadded 16-bit
    rows without dropout; splash on TPUs, likewise, for own keys without dropout; else blockwise,
    with larger blocks on such GPUs. So does "ring", which is a way to get keys.
    """
    check_backend(backend, get_args(AttentionBackend), "attention")
    backend = None if backend == "ring" else backend
    settings = {"chunk_size": chunk_size, "scale": scale}
    dropped = {"dropout_rate": dropout_rate, "key": key}
    small = q.shape[2] == 1 or q.shape[2] * k.shape[2] <= BLOCK**2
    if axis_names or backend == "dense" or (backend is None and small):
        return dense_attention(q, k, v, queries, keys, axis_names=axis_names, **settings, **dropped)
    q, k, v, queries, keys = match_vma(q, k, v, queries, keys)
    not_dropped = key is None or not dropout_rate
    unpadded = queries.contiguous and keys.contiguous and q.shape[2] == k.shape[2]
    for_cudnn = unpadded and not_dropped and fits_cudnn(q, k)
    for_splash = own_keys and not_dropped and fits_splash(q, k)

    def by_cudnn(q, k, v, queries, keys):
        return cudnn_attention(q, k, v, **settings)

    def by_splash(q, k, v, queries, keys):
        return splash_attention(q, k, v, queries, **settings)

    if backend == "cudnn":
        if not for_cudnn:
            raise ValueError(
                'backend="cudnn" takes 16-bit rows that are unpadded documents, without dropout, '
                "and a head_dim of at most 128 that is a multiple of 8: pass None."
            )
        return by_cudnn(q, k, v, queries, keys)
    if backend == "splash":
        if not for_splash:
            raise ValueError(
                'backend="splash" takes bfloat16 or float32 rows without a cache, without dropout, '
                "and a head_dim that is a multiple of 128: pass None."
            )
        return by_splash(q, k, v, queries, keys)
    blockwise = partial(blockwise_attention, **settings, **dropped)
    forms: dict[str, Callable[..., Array]] = {"default": blockwise}
    if backend is None and may_run_on("cuda"):
        large = partial(blockwise, blocks=(LARGE_BLOCK, LARGE_BLOCK))
        forms["cuda"] = by_cudnn if for_cudnn else large
    if backend is None and may_run_on("tpu") and for_splash:
        forms["tpu"] = by_splash
    # Only where there are such devices, since tracing two forms and their gradients takes its time.
    return by_platform(q, k, v, queries, keys, **forms)
