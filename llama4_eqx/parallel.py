"""The model's work on a mesh of devices: what runs where, and what they send each other.

Each device runs the model's own code on its part of the tokens, inside `jax.shard_map`, with its
part of the parameters. Which axes are cut is read off the rules; all that is sent follows:

- what is cut in storage only (`hidden`) is gathered, layer by layer, when it is used;
- of `heads`, `ff` and `vocab` each device computes its part, and the results are summed;
- `experts` get the tokens sent to them where the batch is cut along their axis, too, and else all
  devices along it have the same tokens and sum the results;
- along a cut `seq`, global layers gather the keys; chunk-local ones need none if chunks aren't cut;
- of a cache's cut `slots` each device attends to its own, and the softmax is put together.

Tokens that can't be cut evenly, such as the one of a decoding step, are the same on all devices.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.decoder import Decoder
from llama4_eqx.layers.across import Across, Axes, enter, leave
from llama4_eqx.layers.cache import Filled, KVCache
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.lowrank import has_updates, merged
from llama4_eqx.layers.mask import Places
from llama4_eqx.layers.remat import Keep

T = TypeVar("T")
# These aren't axes of parameters, or are never cut while a layer is at work.
_NOT_STORED = {"batch", "seq", "slots", "layers"}


class MeshParallel(eqx.Module):
    """How a mesh shares the work. Made by `llama4_eqx.sharding.shard`; equal to the work alone but
    for rounding."""

    mesh: Mesh = eqx.field(static=True)
    rules: tuple[tuple[str, Axes], ...] = eqx.field(static=True)

    def embed(
        self, table: Float[Array, "vocab hidden"], tokens: Int[Array, "*batch seq"]
    ) -> Float[Array, "*batch seq hidden"]:
        """The rows of the table.

        Where its columns are cut along the tokens' axes, devices send each other the columns of
        their tokens, which are less than the table.
        """
        lead = self._token_axes(tokens.shape)
        across = self._across(lead)
        vocab, hidden = self._axes("vocab"), self._axes("hidden")
        columns = hidden if set(hidden) <= set(across.tokens) else ()
        rows = self._vocab_shares(across)

        def local(table, tokens):
            table = enter(table, across.tokens)
            table = table if columns else across.gathered(table, hidden, axis=1)
            table = table if rows else across.gathered(table, vocab, axis=0)
            ids = lax.all_gather(tokens, columns) if columns else tokens[None]
            if rows:
                ids = enter(ids, rows) - lax.axis_index(rows) * len(table)
                here = ((ids >= 0) & (ids < len(table)))[..., None]
                found = jnp.where(here, table.at[ids].get(mode="clip"), 0)
            else:
                found = table[ids]
            if columns:
                found = lax.all_to_all(found, columns, 0, found.ndim - 1, tiled=True)
            return leave(found[0], rows)

        in_specs = P(vocab or None, hidden or None), P(*lead)
        return self._map(local, in_specs, P(*lead, None))(table, tokens)

    def decode(
        self,
        decoder: Decoder,
        x: Float[Array, "*batch seq hidden"],
        places: Places,
        cache: KVCache | None,
        filled: Filled | None,
        *,
        keep: Keep,
        key: PRNGKeyArray | None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        KVCache | None,
        Float[Array, "layers *batch seq experts"],
    ]:
        """All layers."""
        lead = self._token_axes(x.shape[:-1])
        rings = [] if cache is None else [*cache.blocks, *cache.tail]
        across = self._across(lead, slots=math.gcd(*(ring.slots for ring in rings)))
        decoder = self._merged(decoder)
        arrays, static = eqx.partition(decoder, eqx.is_array)

        def local(arrays, x, places, cache, filled, key):
            # Here, so that gradients are summed once for all layers, not in each.
            decoder = eqx.combine(enter(arrays, across.tokens), static)
            return decoder(x, places, cache, filled, across=across, keep=keep, key=key)

        def cache_specs(cache: KVCache) -> Any:
            ring = P(*lead[:-1], across.heads or None, across.slots or None, None)
            stack = jax.tree.map(lambda _: P(None, *ring), cache.blocks)
            tail = jax.tree.map(lambda _: ring, cache.tail)
            new = stack, tail, P(*lead[:-1]), P(*lead[:-1])
            return eqx.tree_at(lambda c: (c.blocks, c.tail, c.start, c.length), cache, new)

        cached = None if cache is None else cache_specs(cache)
        tokens = P(*lead, None)
        in_specs = self._specs(decoder), tokens, P(*lead), cached, P(*lead[:-1]), P()
        out_specs = tokens, cached, P(None, *lead, None)
        return self._map(local, in_specs, out_specs)(arrays, x, places, cache, filled, key)

    def unembed(
        self, hidden: Float[Array, "*batch hidden"], head: Float[Array, "vocab hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Logits. Each device has those of its part of the vocabulary."""
        lead = self._token_axes(hidden.shape[:-1])
        across = self._across(lead)
        rows = self._vocab_shares(across)

        def local(hidden, head):
            return linear(enter(hidden, rows), self._head(head, across, rows))

        in_specs = P(*lead, None), self._head_spec()
        return self._map(local, in_specs, P(*lead, rows or None))(hidden, head)

    def token_sums(
        self,
        sums: Callable[..., T],
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        weights: Float[Array, "*batch"],
        head: Float[Array, "vocab hidden"],
    ) -> T:
        """`sums` of all tokens: each device adds up its own. It gets the mesh axes along which the
        vocabulary is cut last."""
        lead = self._token_axes(labels.shape)
        across = self._across(lead)
        rows = self._vocab_shares(across)

        def local(hidden, labels, weights, head):
            head = self._head(head, across, rows)
            found = sums(enter(hidden, rows), labels, weights, head, rows)
            return jax.tree.map(lambda x: leave(x, across.tokens), found)

        in_specs = P(*lead, None), P(*lead), P(*lead), self._head_spec()
        return self._map(local, in_specs, P())(hidden, labels, weights, head)

    def images(
        self,
        encode: Callable[..., Float[Array, "tiles image_tokens hidden"]],
        parameters: Any,
        pixel_values: Float[Array, "tiles channels height width"],
    ) -> Float[Array, "tiles image_tokens hidden"]:
        """Each device encodes some of the tiles, with all of the encoder; all get all features."""
        whole = NamedSharding(self.mesh, P())
        tiles = NamedSharding(self.mesh, P(self._fitting("batch", len(pixel_values)) or None))
        parameters = jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), parameters)
        features = encode(parameters, lax.with_sharding_constraint(pixel_values, tiles))
        return lax.with_sharding_constraint(lax.with_sharding_constraint(features, tiles), whole)

    def _map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def _axes(self, word: str) -> Axes:
        return dict(self.rules).get(word, ())

    def _fitting(self, word: str, size: int) -> Axes:
        """The axes for a word, or those first ones of them among which the size can be shared."""
        axes, experts = self._axes(word), set(self._axes("experts"))
        # Experts get tokens either of all devices along their axes or of none.
        while size % math.prod(self.mesh.shape[axis] for axis in axes) or (
            0 < len(experts & set(axes)) < len(experts)
        ):
            axes = axes[:-1]
        return axes

    def _token_axes(self, shape: tuple[int, ...]) -> tuple[Axes | None, ...]:
        """What cuts each axis of `"*batch seq"`; the first is the batch, if there are two."""
        *batch, seq = shape
        axes = [self._fitting("batch", batch[0])] if batch else []
        axes += [()] * (len(batch) - 1) + [self._fitting("seq", seq)]
        return tuple(one or None for one in axes)

    def _across(self, lead: tuple[Axes | None, ...], *, slots: int = 0) -> Across:
        tokens = tuple(axis for axes in lead for axis in axes or ())
        stored = {word: axes for word, axes in self.rules if word not in _NOT_STORED}

        def shared_out(word: str) -> Axes:
            return () if set(self._axes(word)) & set(tokens) else stored.pop(word, ())

        heads = ()
        if self._axes("heads") == self._axes("kv_heads"):
            heads = shared_out("heads") and shared_out("kv_heads")
        return Across(
            tokens=tokens,
            seq=lead[-1] or (),
            heads=heads,
            ff=shared_out("ff"),
            experts=stored.pop("experts", ()),
            slots=self._fitting("slots", slots) if slots else (),
            stored=tuple(stored.items()),
        )

    def _specs(self, module: T) -> T:
        """Where the arrays of a module lie."""
        words = axis_words(module)

        def spec(path: Any, leaf: Any) -> Any:
            axes = (() if word == "layers" else self._axes(word) for word in words[leaf_name(path)])
            return P(*(one or None for one in axes))

        return jax.tree_util.tree_map_with_path(spec, eqx.filter(module, eqx.is_array))

    def _merged(self, decoder: Decoder) -> Decoder:
        """With low-rank updates added to the weights, each device's part to its part: factors
        aren't cut as the weights are."""
        if not has_updates(decoder):
            return decoder
        decoder = merged(decoder)
        places = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._specs(decoder))
        return lax.with_sharding_constraint(decoder, places)

    def _vocab_shares(self, across: Across) -> Axes:
        """The axes along which each device has its own part of the vocabulary to compute."""
        axes = self._axes("vocab")
        return () if set(axes) & set(across.tokens) else axes

    def _head_spec(self) -> P:
        return P(self._axes("vocab") or None, self._axes("hidden") or None)

    def _head(self, head: Array, across: Across, rows: Axes) -> Array:
        head = across.gathered(enter(head, across.tokens), self._axes("hidden"), axis=1)
        return head if rows else across.gathered(head, self._axes("vocab"), axis=0)
