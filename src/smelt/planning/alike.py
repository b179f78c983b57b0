"""Problems that many tensors share, told once: one wrong model must not fill the screen with a line per tensor."""

from __future__ import annotations

from collections.abc import Sequence

from smelt.errors import InputError, RecipeError, SmeltError
from smelt.planning.align import Slot
from smelt.planning.anatomy import Role
from smelt.specs import TensorSpec

SHOWN = 4
"""Tensors that an error names before it only counts."""

Stored = tuple[str, bool, TensorSpec]
"""A model's name, whether it is the base, its tensor."""


class AlikeProblems:
    """Collects problems by their kind and the models they concern."""

    def __init__(self) -> None:
        self._missing: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        self._rows: list[tuple[str, Sequence[Stored]]] = []
        self._shapes: list[tuple[str, Sequence[Stored]]] = []
        self._unset: dict[tuple[str, str, str | None, tuple[str, ...]], list[str]] = {}

    def missing(self, slot: Slot, lacking: Sequence[str], having: Sequence[str]) -> None:
        """A tensor that some models lack."""
        self._missing.setdefault((tuple(lacking), tuple(having)), []).append(slot.name)

    def shapes(self, slot: Slot, stored: Sequence[Stored]) -> None:
        """A tensor whose shape differs between the models."""
        widths = {tensor.shape[1:] for _, _, tensor in stored}
        rows = slot.part.role in (Role.EMBEDDING, Role.HEAD) and len(widths) == 1
        (self._rows if rows else self._shapes).append((slot.name, stored))

    def unset(self, method: str, name: str, model: str | None, tensor: str, where: Sequence[str]) -> None:
        """A required parameter for which no level of the recipe has a value."""
        self._unset.setdefault((method, name, model, tuple(where)), []).append(tensor)

    def errors(self) -> list[SmeltError]:
        """One error for each kind of problem and each group of models."""
        return [
            *(_missing_error(names, lacking, having) for (lacking, having), names in self._missing.items()),
            *_shape_errors(self._rows, "the vocabularies differ: merge models with the same tokenizer, or drop one"),
            *_shape_errors(self._shapes, "models must have the same sizes: drop the one that differs"),
            *(_unset_error(key, names) for key, names in self._unset.items()),
        ]


def _tensors(names: Sequence[str]) -> str:
    return f"tensor '{names[0]}'" if len(names) == 1 else f"{len(names)} tensors"


def _listed(names: Sequence[str]) -> list[str]:
    """The first names, and how many more."""
    if len(names) == 1:
        return []
    more = [f"… and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [*names[:SHOWN], *more]


def _missing_error(names: Sequence[str], lacking: Sequence[str], having: Sequence[str]) -> InputError:
    verb = "is" if len(names) == 1 else "are"
    return InputError(
        f"{_tensors(names)} {verb} missing in {', '.join(lacking)}",
        where=[f"present in {', '.join(having) or 'none of the models'}", *_listed(names)],
        fix="drop the model that lacks them, or merge them from those that have them with `allow: [missing_tensor]` "
        "(--allow missing_tensor), or say `missing: skip` or `missing: copy`",
    )


def _shape_errors(found: Sequence[tuple[str, Sequence[Stored]]], fix: str) -> list[InputError]:
    if not found:
        return []
    where = []
    for _, stored in found[:SHOWN]:
        where += [f"{'base ' if is_base else 'model'} {name}  {tensor}" for name, is_base, tensor in stored]
    if len(found) > SHOWN:
        where.append(f"… and {len(found) - SHOWN} more tensors")
    names = [name for name, _ in found]
    verb = "has" if len(found) == 1 else "have"
    return [InputError(f"{_tensors(names)} {verb} different shapes", where=where, fix=fix)]


def _unset_error(key: tuple[str, str, str | None, tuple[str, ...]], names: Sequence[str]) -> RecipeError:
    method, name, model, where = key
    of = f" for {model}" if model else ""
    return RecipeError(
        f"{method} needs `{name}`, and none is set{of} at {_tensors(names)}",
        where=[*where, *_listed(names)],
        fix=f"add `{name}: …` under parameters, or an entry without filter at the end of its list",
    )
