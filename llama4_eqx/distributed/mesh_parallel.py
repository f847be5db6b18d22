"""The model on a mesh of devices: what runs where, and which collectives that takes.

Inside `jax.shard_map`, each device runs the model's own code on its shard of the tokens with its
shard of the parameters. Which axes are sharded is read off the rules; the collectives follow:

- parameters sharded in storage only (`hidden`) are all-gathered, layer by layer, for use (FSDP);
- of `heads`, `ff` and `vocab` each device computes its shard, and the results are all-reduced;
- tokens go to their `experts` by all-to-all if the experts' mesh axes shard the batch, too; else
  devices along them hold the same tokens, and the experts' outputs are all-reduced;
- along a sharded `seq`, global layers all-gather keys and values, and chunk-local layers need none
  if every chunk lies on one device;
- rows sharded along the `residual` stream are gathered for attention and feed-forward networks,
  whose results are reduce-scattered instead of all-reduced;
- over a cache's sharded `slots`, each device attends to its own, and the softmax is all-reduced.

Tokens that can't be sharded evenly, such as the one of a decoding step, are replicated.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.decoder import Decoder
from llama4_eqx.distributed.cache_sharding import cache_specs, common_slots
from llama4_eqx.distributed.rules import Rules
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.collectives import AxisNames, MeshAxes, psum_over, pvary
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.lowrank import has_updates, merged
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.layers.remat import RematPolicy
from llama4_eqx.layers.sites import Readings, Sites, value_axes
from llama4_eqx.parallel import Parallel, TokenSums
from llama4_eqx.projector import MultiModalProjector
from llama4_eqx.vision import VisionModel

T = TypeVar("T")
# What isn't an axis of parameters, or is never sharded while a layer runs.
_NOT_STORED = {"batch", "seq", "residual", "slots", "layers"}


class MeshParallel(Parallel):
    """Runs a model on a mesh, sharded by rules. Made by `llama4_eqx.distributed.shard`."""

    mesh: Mesh = eqx.field(static=True)
    rules: Rules = eqx.field(static=True)

    def embed(
        self, table: Float[Array, "vocab hidden"], tokens: Int[Array, "*batch seq"]
    ) -> Float[Array, "*batch seq hidden"]:
        # If the table's hidden axis is sharded along the tokens' mesh axes, devices exchange their
        # tokens' ids and embeddings by all-to-all, which is less than gathering the table.
        lead = self._token_axes(tokens.shape)
        mesh_axes, vocab_axes = self._vocab_parallel(lead, tokens.shape[-1])
        vocab, hidden = self.rules["vocab"], self.rules["hidden"]
        hidden_axes = hidden if set(hidden) <= set(mesh_axes.tokens) else ()

        def local(table, tokens):
            table = pvary(table, mesh_axes.tokens)
            table = table if hidden_axes else mesh_axes.all_gather(table, hidden, axis=1)
            table = table if vocab_axes else mesh_axes.all_gather(table, vocab, axis=0)
            ids = lax.all_gather(tokens, hidden_axes) if hidden_axes else tokens[None]
            if vocab_axes:
                ids = pvary(ids, vocab_axes) - lax.axis_index(vocab_axes) * len(table)
                here = ((ids >= 0) & (ids < len(table)))[..., None]
                found = jnp.where(here, table.at[ids].get(mode="clip"), 0)
            else:
                found = table[ids]
            if hidden_axes:
                found = lax.all_to_all(found, hidden_axes, 0, found.ndim - 1, tiled=True)
            return mesh_axes.sum_rows(found[0], vocab_axes)

        in_specs = P(vocab or None, hidden or None), P(*lead)
        return self._shard_map(local, in_specs, _stream(lead, mesh_axes))(table, tokens)

    def decode(
        self,
        decoder: Decoder,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: KVCache | None,
        *,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch seq hidden"], KVCache | None, Readings]:
        lead = self._token_axes(x.shape[:-1])
        slots = 0 if cache is None else common_slots(cache)
        mesh_axes = self._mesh_axes(lead, x.shape[-2], slots=slots)
        probe = context.execution.sites.probe
        if probe.read or probe.edit or not _take_row_shards(decoder):  # a probe sees whole rows
            mesh_axes = replace(mesh_axes, residual=())
        decoder = self._merged(decoder)
        arrays, static = eqx.partition(decoder, eqx.is_array)

        def local(arrays, x, tokens, rotation, span, cache, key):
            # Here, so that gradients are summed once for all layers, not in each.
            arrays = pvary(arrays, (*mesh_axes.tokens, *mesh_axes.residual))
            decoder = eqx.combine(arrays, static)
            execution = replace(context.execution, mesh_axes=mesh_axes)
            local_context = Context(tokens, rotation, span, execution)
            return decoder(x, local_context, cache, remat=remat, key=key)

        cached = None if cache is None else cache_specs(decoder, cache, lead, mesh_axes)
        words, read = decoder.sites(), probe.read
        reading_specs = {
            site: P(None, *(a or None for a in value_axes(words[site], len(lead) - 1, mesh_axes)))
            for site in words
            if site in read
        }
        stream, of_token, of_row = _stream(lead, mesh_axes), P(*lead), P(*lead[:-1])
        in_specs = self._specs(decoder), stream, of_token, of_token, of_row, cached, P()
        out_specs = stream, cached, {"router_logits": P(None, *stream)} | reading_specs
        run = self._shard_map(local, in_specs, out_specs)
        return run(arrays, x, context.tokens, context.rotation, context.span, cache, key)

    def unembed(
        self, hidden: Float[Array, "*batch hidden"], head: Float[Array, "vocab hidden"] | Quantized
    ) -> Float[Array, "*batch vocab"]:
        lead = self._token_axes(hidden.shape[:-1])
        mesh_axes, vocab_axes = self._vocab_parallel(lead, hidden.shape[-2])
        wide = _has_columns(head)

        def local(hidden, head):
            own = self._head(head, wide, mesh_axes, vocab_axes)
            return linear(mesh_axes.gather_rows(hidden, vocab_axes), own)

        in_specs = _stream(lead, mesh_axes), self._head_spec(wide)
        return self._shard_map(local, in_specs, P(*lead, vocab_axes or None))(hidden, head)

    def token_sums(
        self,
        sums: TokenSums[T],
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        weights: Float[Array, "*batch"],
        head: Float[Array, "vocab hidden"],
    ) -> T:
        lead = self._token_axes(labels.shape)
        mesh_axes, vocab_axes = self._vocab_parallel(lead, labels.shape[-1])
        wide = _has_columns(head)

        def local(hidden, labels, weights, head):
            head = self._head(head, wide, mesh_axes, vocab_axes)
            hidden = mesh_axes.gather_rows(hidden, vocab_axes)
            found = sums(hidden, labels, weights, head, vocab_axes)
            return jax.tree.map(lambda x: psum_over(x, mesh_axes.tokens), found)

        in_specs = _stream(lead, mesh_axes), P(*lead), P(*lead), self._head_spec(wide)
        return self._shard_map(local, in_specs, P())(hidden, labels, weights, head)

    def encode_images(
        self,
        vision_model: VisionModel,
        projector: MultiModalProjector,
        pixel_values: Float[Array, "tiles channels height width"],
        *,
        sites: Sites,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "tiles image_tokens hidden"]:
        # Data parallel: tiles are sharded like the batch, the encoder and the result replicated.
        replicated = NamedSharding(self.mesh, P())
        tiles = NamedSharding(self.mesh, P(self._fitting("batch", len(pixel_values)) or None))

        def replicate(x):
            return lax.with_sharding_constraint(x, replicated)

        vision_model, projector = jax.tree.map(replicate, (vision_model, projector))
        pixel_values = lax.with_sharding_constraint(pixel_values, tiles)
        features = projector(vision_model(pixel_values, sites=sites, remat=remat, key=key))
        return replicate(lax.with_sharding_constraint(features, tiles))

    def _shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def _fitting(self, word: str, size: int) -> AxisNames:
        """The mesh axes for a word, or the first of them that divide the size."""
        axes, experts = self.rules[word], set(self.rules["experts"])
        # The experts' mesh axes shard the tokens either all or not at all.
        while size % math.prod(self.mesh.shape[axis] for axis in axes) or (
            0 < len(experts & set(axes)) < len(experts)
        ):
            axes = axes[:-1]
        return axes

    def _token_axes(self, shape: tuple[int, ...]) -> tuple[AxisNames | None, ...]:
        """What shards each axis of `"*batch seq"`; the first one is the batch, if there are two."""
        *batch, seq = shape
        axes = [self._fitting("batch", batch[0])] if batch else []
        axes += [()] * (len(batch) - 1) + [self._fitting("seq", seq)]
        return tuple(one or None for one in axes)

    def _mesh_axes(
        self, lead: tuple[AxisNames | None, ...], row: int, *, slots: int = 0
    ) -> MeshAxes:
        """For rows of `row` tokens and caches of `slots`."""
        tokens = tuple(axis for axes in lead for axis in axes or ())
        fsdp_axes = {word: self.rules[word] for word in self.rules if word not in _NOT_STORED}

        def tensor_parallel(word: str) -> AxisNames:
            return () if set(self.rules[word]) & set(tokens) else fsdp_axes.pop(word, ())

        heads = ()
        if self.rules["heads"] == self.rules["kv_heads"]:
            heads = tensor_parallel("heads") and tensor_parallel("kv_heads")
        seq, ff, residual = lead[-1] or (), tensor_parallel("ff"), self.rules["residual"]
        even = row % math.prod(self.mesh.shape[axis] for axis in (*seq, *residual)) == 0
        return MeshAxes(
            tokens=tokens,
            seq=seq,
            heads=heads,
            ff=ff,
            experts=fsdp_axes.pop("experts", ()),
            slots=self._fitting("slots", slots) if slots else (),
            residual=residual if even and heads == ff == residual else (),
            fsdp_axes=tuple(fsdp_axes.items()),
        )

    def _specs(self, module: T) -> T:
        """The partition specs of a module's arrays."""
        words = axis_words(module)

        def spec(path: Any, leaf: Any) -> Any:
            axes = (
                None if w == "layers" else self.rules[w] or None for w in words[leaf_name(path)]
            )
            return P(*axes)

        return jax.tree_util.tree_map_with_path(spec, eqx.filter(module, eqx.is_array))

    def _merged(self, decoder: Decoder) -> Decoder:
        """The decoder with low-rank updates added to its weights, shard by shard: their factors
        aren't sharded like the weights."""
        if not has_updates(decoder):
            return decoder
        decoder = merged(decoder)
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._specs(decoder))
        return lax.with_sharding_constraint(decoder, shardings)

    def _vocab_parallel(
        self, lead: tuple[AxisNames | None, ...], row: int
    ) -> tuple[MeshAxes, AxisNames]:
        """For rows of `row` tokens; and the mesh axes along which each device computes with its
        shard of the vocabulary."""
        mesh_axes, vocab_axes = self._mesh_axes(lead, row), self.rules["vocab"]
        if set(vocab_axes) & set(mesh_axes.tokens):
            vocab_axes = ()
        if mesh_axes.residual != vocab_axes:
            mesh_axes = replace(mesh_axes, residual=())
        return mesh_axes, vocab_axes

    def _head_spec(self, wide: PyTree) -> PyTree:
        vocab, hidden = self.rules["vocab"] or None, self.rules["hidden"] or None
        return jax.tree.map(lambda has: P(vocab, hidden if has else None), wide)

    def _head(self, head: T, wide: PyTree, mesh_axes: MeshAxes, vocab_axes: AxisNames) -> T:
        def gather(x: Array, has_columns: bool) -> Array:
            x = pvary(x, mesh_axes.tokens)
            x = mesh_axes.all_gather(x, self.rules["hidden"] if has_columns else (), axis=1)
            return x if vocab_axes else mesh_axes.all_gather(x, self.rules["vocab"], axis=0)

        return jax.tree.map(gather, head, wide)


def _stream(lead: tuple[AxisNames | None, ...], mesh_axes: MeshAxes) -> P:
    """The partition spec of the residual stream."""
    return P(*lead[:-1], (*mesh_axes.seq, *mesh_axes.residual) or None)


def _take_row_shards(decoder: Decoder) -> bool:
    return all(layer.takes_row_shards for block in decoder.blocks for layer in block.layers)


def _has_columns(head: Array | Quantized) -> PyTree:
    """Whether each array of the head has columns to shard: scales of whole outputs have none."""
    return jax.tree.map(lambda x: x.shape[1] > 1, head)
