"""Sharding rules: which mesh axes shard an axis of a parameter or of the batch, and the presets.

How a preset scales is documented by the bytes that each of the `n` devices along its mesh axis
sends in a training step, and by its operations for each byte. A device has `T` tokens; numbers have
`b` bytes; there are `P` parameters, of which a token uses `A`; `o = (n - 1) / n` is the share of
the other devices. For a forward call alone see `examples/plan.py`, which counts for any model and
mesh.

There is no preset for pipeline parallelism. FSDP, TENSOR and EXPERT_ALL_TO_ALL shard parameters
further and send little already, without devices that idle while a pipeline fills: by
`examples/plan.py maverick`, parameters and optimiser take 27 GiB a device on 256. A pipeline would
send less where links between pods are slow; DATA sends `2 · o · P · b` a step over those.
"""

from collections.abc import Iterator, Mapping
from typing import final

MeshAxisNames = str | tuple[str, ...] | None


@final
class Rules:
    """Immutable rules from axis words to the mesh axes that shard them: `Rules(hidden="fsdp")`.

    `a | b` shards by both: an axis that both shard is sharded along the mesh axes of a, then of b.
    `rules.replace(hidden=None)` changes single rules. `rules["hidden"]` is the mesh axes of a word,
    `()` for a word without a rule. Where rules are an argument, a dict will do.
    """

    def __init__(self, rules: "RulesLike | None" = None, /, **more: MeshAxisNames) -> None:
        if not isinstance(rules, Rules | Mapping | None):
            raise TypeError(f"Rules are a preset or a dict, such as FSDP, but got {rules!r}.")
        given = {} if rules is None else {word: rules[word] for word in rules}
        axes = {word: _as_tuple(names) for word, names in (given | more).items()}
        self._axes = {word: names for word, names in axes.items() if names}

    def replace(self, **rules: MeshAxisNames) -> "Rules":
        """The rules with some replaced, or removed where None."""
        return Rules(self._axes | rules)

    def __or__(self, other: "RulesLike") -> "Rules":
        other = Rules(other)
        words = dict.fromkeys((*self, *other))
        return Rules({word: tuple(dict.fromkeys(self[word] + other[word])) for word in words})

    def __ror__(self, other: "RulesLike") -> "Rules":
        return Rules(other) | self

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return self._axes.get(word, ())

    def __contains__(self, word: object) -> bool:
        return word in self._axes

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._axes == other._axes

    def __hash__(self) -> int:
        return hash(frozenset(self._axes.items()))

    def __repr__(self) -> str:
        short = {word: names[0] if len(names) == 1 else names for word, names in self._axes.items()}
        rules = (f"{word}={names!r}" for word, names in short.items())
        return f"Rules({', '.join(rules)})"


def _as_tuple(axes: MeshAxisNames) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


RulesLike = Rules | Mapping[str, MeshAxisNames]


DATA = Rules(batch="data")
"""Data parallelism: every device has all parameters and a shard of the batch.

All-reduces the gradients: `2 · o · P · b`. Operations per byte: `3 · A · T / (o · P · b)`, on any
number of devices.
"""

FSDP = Rules(batch="fsdp", hidden="fsdp", vision_hidden="fsdp")
"""Fully sharded data parallelism: every device has a shard of the batch and of every matrix, which
is all-gathered for use.

Gathers the parameters twice and reduce-scatters the gradients: `3 · o · P · b`, where the head
counts for two thirds and the embedding not at all: `2 · o · T · hidden · b` of its rows are sent.
Operations per byte: `2 · A · T / (o · P · b)`, on any number of devices.
"""

TENSOR = Rules(heads="tensor", kv_heads="tensor", ff="tensor", vision_ff="tensor", vocab="tensor")
"""Tensor parallelism: every device has a shard of the heads, of the inner features of feed-forward
networks and of the vocabulary. Tokens are replicated along its axis.

All-reduces twice in each layer, and twice for their gradients, and once for the embedding and the
head: `(4 · layers + 2) · 2 · o · T · hidden · b`. Operations per byte:
`3 · A / ((4 · layers + 2) · (n - 1) · hidden · b)`, which falls with each device and doesn't depend
on the tokens.
"""

SEQUENCE = Rules(residual="tensor")
"""Sequence parallelism, for `TENSOR | SEQUENCE`: between attention and feed-forward networks each
device along TENSOR's axis has a shard of every sequence, so that norms and residuals aren't
repeated, and what a layer leaves for the backward pass is divided among them.

Reduce-scatters and all-gathers where TENSOR all-reduces, and gathers each layer's inputs once more
for the backward pass: `(10 · layers + 4) · o · T · hidden · b`; and all-reduces the gradients of
norms and routers: `2 · o · (layers · (2 + experts) + 1) · hidden · b`.

Does nothing where a row can't be divided evenly, such as at a decoding step; under a probe, which
sees whole rows; and if a layer has a part that doesn't say `takes_row_shards`.
"""

EXPERT_REPLICATED_TOKENS = Rules(experts="expert")
"""Expert parallelism with replicated tokens: every device has a shard of the experts. Its axis
doesn't shard the batch: devices along it have the same tokens and all-reduce their experts'
outputs. Combine it with DATA or FSDP to shard the batch along other axes.

All-reduces once in each MoE layer and once for its gradient, `4 · o · T · hidden · b`, and gathers
the router twice, `2 · o · experts · hidden · b`. The experts' operations per byte:
`4.5 · top_k · ff / ((n - 1) · b)`, which falls with each device and doesn't depend on the tokens.
"""

EXPERT_ALL_TO_ALL = Rules(experts="expert", batch="expert")
"""Expert parallelism with all-to-all: every device has a shard of the experts and, along the same
axis, of the batch; tokens are sent to their experts.

Sends tokens there and back in each MoE layer, and their gradients, with half as much room again as
balanced routing needs: `4 · 1.5 · o · top_k · T · hidden · b`; gathers and reduce-scatters the
router: `3 · o · experts · hidden · b`; and all-reduces the gradients of all `P` parameters that
aren't experts': `2 · o · P · b`. The experts' operations per byte of tokens: `3 · ff / (o · b)`, on
any number of devices.
"""

CONTEXT = Rules(seq="context", slots="context")
"""Context parallelism: every device has a shard of every sequence, and of a cache's slots.

Gathers the keys and values of each global layer twice, and reduce-scatters their gradients once
(those of very long rows are sent round instead: see `Backends`):
`3 · 2 · (n - 1) · T · kv_heads · head_dim · b`; nothing for a chunk-local layer if every chunk lies
on one device; and all-reduces the gradients as DATA does. Attention's operations per byte:
`n · T · heads / ((n - 1) · kv_heads · b)`, on any number of devices.
"""
