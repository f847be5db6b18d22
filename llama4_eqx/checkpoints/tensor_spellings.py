"""Finding the tensors of `tensor_names.py` in files that spell them differently.

Read are: names with another prefix (a text-only model saved out of a multimodal one, or the other
way round), or with what torch's wrappers for training put into them (`module.`, `_orig_mod.`),
experts saved as one `Linear` each (`experts.3.gate_proj.weight`), tables that old versions of
`transformers` stored and that are computed here, and quantised weights.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama4_eqx.checkpoints.bitsandbytes import EightBit, FourBit
from llama4_eqx.checkpoints.compressed import Compressed
from llama4_eqx.checkpoints.safetensors_reading import Header

TEXT_PREFIX = "language_model."
_THEIR_PREFIXES = ("", TEXT_PREFIX, "model.", "model.language_model.")
_OUR_PREFIXES = ("", TEXT_PREFIX, "model.", "language_model.model.")
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(original_)?inv_freq|freqs_ci)$")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(gate|up|down)_proj\.weight")
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_VISION = re.compile(r"(model\.)?(vision_model|multi_modal_projector)\.")


# One in a file, or one made of quantised parts.
Single = Header | Compressed | FourBit | EightBit


@dataclass(frozen=True)
class UnfusedExperts:
    """A tensor of all experts, stored as a transposed matrix for each.

    `parts` are joined along the last axis: gate and up projections, or down projections alone.
    """

    parts: tuple[tuple[Single, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor: experts, inputs, outputs of all parts."""
        outputs, inputs = self.parts[0][0].shape
        return len(self.parts[0]), inputs, outputs * len(self.parts)

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.parts[0][0].dtype

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of it."""
        return tuple(sorted({file for one in singles(self) for file in one.files}))


Stored = Single | UnfusedExperts


class _JoinedExperts:
    """Reads slices of `UnfusedExperts` as if they were one tensor."""

    def __init__(self, parts: list[list[Any]], outputs: int):
        self._parts, self._outputs = parts, outputs

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, inputs, outputs = index
        number = outputs.start // self._outputs  # a leaf is never split between parts
        start = number * self._outputs
        outputs = slice(outputs.start - start, outputs.stop - start)
        return np.stack([view[outputs, inputs].T for view in self._parts[number][experts]])


def singles(stored: Stored) -> list[Single]:
    """What a tensor is stored as."""
    if isinstance(stored, UnfusedExperts):
        return [one for part in stored.parts for one in part]
    return [stored]


def view(stored: Stored, get_slice: Callable[[Single], Any]) -> Any:
    """What reads slices of the tensor, if `get_slice` gives what reads slices of its parts."""
    if not isinstance(stored, UnfusedExperts):
        return get_slice(stored)
    parts = [[get_slice(one) for one in part] for part in stored.parts]
    return _JoinedExperts(parts, stored.parts[0][0].shape[0])


def unwrapped(name: str) -> str:
    """The name without what torch's wrappers for training put into it."""
    return _WRAPPERS.sub("", name)


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to the vision encoder or the projector."""
    return _VISION.match(unwrapped(name)) is not None


def find_tensors(
    headers: Mapping[str, Single], known: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors in the files under the names of `known`, and what is wrong with the others.

    `known` gives the shape of each tensor. Tables that the model computes are left out.
    """
    found: dict[str, Stored] = {}
    spelled: dict[str, str] = {}
    experts: dict[str, dict[tuple[str, int], Single]] = defaultdict(dict)
    problems = []
    for name, header in headers.items():
        bare = unwrapped(name)
        match = _EXPERT.fullmatch(bare)
        if match is not None:
            fused = "down_proj" if match[3] == "down" else "gate_up_proj"
            whole = known_name(match[1] + fused, known)
            if whole is not None:
                experts[whole][match[3], int(match[2])] = header
                continue
        whole = known_name(bare, known)
        if whole is None:
            if not _COMPUTED.search(name):
                problems.append(f"{name} is surplus: the config has no place for it")
        elif whole in found:
            problems.append(f"{name} and {spelled[whole]} are the same tensor: remove one of them")
        else:
            found[whole], spelled[whole] = header, name
    for whole, matrices in experts.items():
        wrong = _check_experts(whole, matrices, known[whole])
        if whole in found:
            wrong.append(f"{spelled[whole]} is there as a whole and for each expert: remove one")
        problems += wrong
        if not wrong:
            kinds = ("gate", "up") if ("gate", 0) in matrices else ("down",)
            numbers = range(known[whole][0])
            parts = tuple(tuple(matrices[kind, n] for n in numbers) for kind in kinds)
            found[whole] = UnfusedExperts(parts)
    return found, problems


def known_name(name: str, known: Mapping[str, Any]) -> str | None:
    """The name under which a tensor is known here, which may have another prefix."""
    for old in _THEIR_PREFIXES:
        for new in _OUR_PREFIXES:
            if name.startswith(old) and new + name[len(old) :] in known:
                return new + name[len(old) :]
    return None


def _check_experts(
    whole: str, matrices: dict[tuple[str, int], Single], shape: tuple[int, ...]
) -> list[str]:
    count, inputs, outputs = shape
    kinds = ("down",) if whole.endswith("down_proj") else ("gate", "up")
    outputs //= len(kinds)
    prefix = whole.rpartition(".")[0]
    expected = {
        (kind, n): f"{prefix}.{n}.{kind}_proj.weight" for n in range(count) for kind in kinds
    }
    problems = [f"{name} is missing" for key, name in expected.items() if key not in matrices]
    dtypes = {header.dtype for header in matrices.values()}
    if len(dtypes) > 1:
        problems.append(f"the experts of {prefix} differ in dtype: {', '.join(sorted(dtypes))}")
    for key, header in matrices.items():
        if key not in expected:
            problems.append(f"{header.name} is surplus: the config has {count} experts")
        elif header.shape != (outputs, inputs):
            problems.append(
                f"{header.name} has shape {header.shape}, but must have {(outputs, inputs)}"
            )
    return problems
