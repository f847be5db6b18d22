"""What to continue, and how."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.argument_checks import check_type, whole_number
from llama4_eqx.generation.processors import LogitsProcessor
from llama4_eqx.generation.sampling import Greedy, Sampler
from llama4_eqx.input_checks import PAD_ROWS, Mask, Pixels, SupportsArray, TokenIds, as_array
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.probe import Probe
from llama4_eqx.model import Llama4

P = ParamSpec("P")
T = TypeVar("T")


def _as_tokens(tokens: Any) -> Any:
    return (
        as_array("tokens", tokens, "ids", PAD_ROWS) if isinstance(tokens, list | tuple) else tokens
    )


def _as_stop_ids(stop_ids: Any) -> tuple[int, ...]:
    if stop_ids is None:
        return ()
    ids = [stop_ids] if np.ndim(stop_ids) == 0 else stop_ids
    return tuple(whole_number("A stop id", i, least=0, is_int32=True) for i in ids)


def _as_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    if processors is None:
        return ()
    several = tuple(processors) if isinstance(processors, list | tuple) else (processors,)
    for one in several:
        check_type("A processor", one, LogitsProcessor, "subclass it for one of your own")
    return several


def _as_copies(copies: Any) -> int | None:
    return None if copies is None else whole_number("samples", copies)


def _as_array(pixels: Any) -> Any:
    """An array of another library as NumPy's, on whose numbers no program depends."""
    other = pixels is not None and not isinstance(pixels, jax.Array | np.ndarray)
    return np.asarray(pixels) if other and isinstance(pixels, SupportsArray) else pixels


class Request(eqx.Module):
    """What to continue, and how: the arguments of `generate`, `generate_output` and `stream`.

    `mask` (True at real tokens, padding on any side) lets prompts of different lengths share a
    batch; `pixel_values` or `image_embeddings` are those of the model's call. With a `cache`, the
    tokens continue what it holds. Generation ends when every row has met one of the `stop_ids`.

    The `processors` change the logits, in order, before the `sampler` chooses a token. Samplers
    that draw need a `key`. With `samples`, each prompt is read once and continued that many times:
    the result has an axis of samples after those of the batch.

    The edits of a `probe` apply to the prompt and to each step: write them as an `Edit`, since each
    new plain function is compiled anew.
    """

    tokens: TokenIds = eqx.field(converter=_as_tokens)
    _: KW_ONLY
    max_new_tokens: int = eqx.field(
        converter=lambda n: whole_number("max_new_tokens", n, is_int32=True)
    )
    mask: Mask | None = None
    pixel_values: Pixels | None = eqx.field(default=None, converter=_as_array)
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None
    cache: KVCache | None = None
    processors: tuple[LogitsProcessor, ...] = eqx.field(default=(), converter=_as_processors)
    sampler: Sampler = Greedy()
    key: PRNGKeyArray | None = None
    samples: int | None = eqx.field(default=None, static=True, converter=_as_copies)
    stop_ids: tuple[int, ...] = eqx.field(default=(), converter=_as_stop_ids)
    probe: Probe | None = None

    def __check_init__(self) -> None:
        if np.shape(self.tokens)[-1:] == (0,):
            raise ValueError("A prompt needs at least one token.")
        check_type("sampler", self.sampler, Sampler, "such as Greedy() or Sample(temperature=0.6)")
        if self.key is None and not isinstance(self.sampler, Greedy):
            raise ValueError(
                f"{type(self.sampler).__name__} draws at random: pass key=jax.random.key(seed)."
            )

    def is_stop(self, token: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Whether each token is one of the stop ids."""
        return jnp.isin(token, jnp.asarray(self.stop_ids, token.dtype))

    def bucketed(self, model: Llama4) -> tuple["Request", int]:
        """The request as few programs serve it, and the number of new tokens to have room for.

        The prompt is padded on the right to one of few lengths, unless a probe counts its
        positions, and `max_new_tokens` becomes an array, on which a program doesn't depend. What is
        traced, or shared by several processes, stays as it is.
        """
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((model, self)))
        if traced or jax.process_count() > 1:
            return self, self.max_new_tokens
        budget = np.asarray(self.max_new_tokens, np.int32)
        request = eqx.tree_at(lambda r: r.max_new_tokens, self, budget)
        room, tokens = bucket(self.max_new_tokens), np.asarray(self.tokens)
        mask = np.ones(tokens.shape, bool) if self.mask is None else np.asarray(self.mask)
        odd = tokens.dtype.kind not in "iu" or mask.dtype != bool or mask.shape != tokens.shape
        if self.probe is not None or odd:  # the model's call has sentences for what is odd
            return request, room
        end = bucket(tokens.shape[-1]) - tokens.shape[-1]
        padding = [(0, 0)] * (tokens.ndim - 1) + [(0, end)]
        padded = tuple(jax.device_put(np.pad(x, padding)) for x in (tokens, mask))
        return eqx.tree_at(
            lambda r: (r.tokens, r.mask), request, padded, is_leaf=lambda node: node is None
        ), room


def bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 128, 192, 256, 384, 512, 768 … that isn't below `length`."""
    size = 16
    while size < length:
        power_of_two = size & (size - 1) == 0
        size = size * 2 if size < 128 else size * 3 // 2 if power_of_two else size * 4 // 3
    return size


def with_request(
    run: Callable[[Llama4, Request], T], request: Callable[P, Request] = Request
) -> Callable[Concatenate[Llama4, P], T]:
    """`run(model, request)` as a function of the model and the request's arguments."""

    @wraps(run)
    def call(model: Llama4, /, *args: P.args, **kwargs: P.kwargs) -> T:
        check_type("model", model, Llama4, "a LoRA runs as lora.merged()")
        return run(model, request(*args, **kwargs))

    return call
