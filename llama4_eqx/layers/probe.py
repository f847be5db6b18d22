"""What a researcher reads and changes inside a forward call, at named sites."""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

LayerNumber = Int[Array, ""] | int
EditFunction = Callable[[str, Array, LayerNumber], Array]

# Never computed unless they are read, or an `Edit` names them.
_ON_REQUEST = ("pattern", "vision_pattern")


class Edit(eqx.Module):
    """A change of the values at some sites. `llama4_eqx.research` has the common ones; subclass it
    for your own, whose arrays can then be traced, or pass a plain function to `Probe`."""

    sites: eqx.AbstractVar[tuple[str, ...]]

    @abstractmethod
    def __call__(self, site: str, value: Array, layer: LayerNumber) -> Array:
        """The value to use instead, of the same shape and dtype.

        `layer` is the layer's number, or -1 outside of the layers. Where layers are scanned it is
        traced: compare it with `jnp.where`, not with `if`. There this code runs once for all
        calls with equal shapes: write it as for `jax.jit`.
        """


def _as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _as_edits(
    edit: EditFunction | Iterable[EditFunction] | None,
) -> tuple[EditFunction, ...]:
    if edit is None:
        return ()
    return tuple(edit) if isinstance(edit, Iterable) else (edit,)


class Probe(eqx.Module):
    """What to read and what to change inside a forward call: `Probe(read="resid_post")`,
    `Probe(edit=lambda site, value, layer: …)`.

    `read` names sites; `Llama4.sites()` lists those of a model. `edit` is one edit or several,
    applied in order: an `Edit` is called at the sites that it names; a plain function
    `edit(site, value, layer)` at every site, except that attention patterns are left out unless
    they are read. Values are whole, even where each device holds a shard of them. What is read has
    been edited.
    """

    read: tuple[str, ...] = eqx.field(static=True, default=(), converter=_as_names)
    edit: tuple[EditFunction, ...] = eqx.field(default=(), converter=_as_edits)

    def __check_init__(self) -> None:
        for edit in self.edit:
            if not callable(edit) or isinstance(edit, type):
                raise TypeError(
                    "edit must be an Edit, a function edit(site, value, layer), or several of "
                    f"them, not {edit!r}."
                )

    @property
    def has_functions(self) -> bool:
        """Whether an edit is or has a plain function, which may see what changes between calls."""
        return any(callable(leaf) for leaf in jax.tree.leaves(self.edit))

    def visits(self, site: str) -> bool:
        """Whether the site is read or edited."""
        return site in self.read or self.edits(site)

    def edits(self, site: str) -> bool:
        """Whether an edit is called at the site."""
        return any(self._is_called(edit, site) for edit in self.edit)

    def apply(self, site: str, value: Array, layer: LayerNumber) -> Array:
        """The value after all edits."""
        for edit in self.edit:
            if self._is_called(edit, site):
                new = edit(site, value, layer)
                if new is None:
                    raise ValueError(f"An edit at {site!r} returned None: return the value.")
                new = jnp.asarray(new)
                if (new.shape, new.dtype) != (value.shape, value.dtype):
                    raise ValueError(
                        f"An edit at {site!r} must return what it got, {value.dtype} of shape "
                        f"{value.shape}, but returned {new.dtype} of shape {new.shape}."
                    )
                value = new
        return value

    def check_sites(self, available: Iterable[str]) -> None:
        """Raises a `ValueError` for a site that isn't among the available ones."""
        named = [site for edit in self.edit if isinstance(edit, Edit) for site in edit.sites]
        unknown = [site for site in (*self.read, *named) if site not in available]
        if unknown:
            raise ValueError(
                f"There is no site {unknown[0]!r} in this call, only "
                f"{', '.join(sorted(available))}."
            )

    def _is_called(self, edit: EditFunction, site: str) -> bool:
        if isinstance(edit, Edit):
            return site in edit.sites
        return site in self.read or site not in _ON_REQUEST
