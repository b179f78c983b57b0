"""What becomes of tensors that not all models have, where a recipe says `missing: skip` or `missing: copy`.

`skip` leaves them out of the output. `copy` takes them as they are from the base, or else from the first model of the
recipe that has them. Either way they are named in a warning, and what is left out in `Plan.ignored`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smelt.errors import InputError
from smelt.planning.align import Slot
from smelt.planning.anatomy import anatomy, check
from smelt.planning.entries import Entry, Input
from smelt.planning.locate import Model
from smelt.recipe.schema import Missing
from smelt.specs import TensorSpec

SHOWN = 6
"""Tensors that a warning names before it only counts."""


class Uncommon:
    """Collects the tensors that not all models have, and says where a copy of one comes from."""

    def __init__(self, policy: Missing, models: Sequence[Model], *, donor: int) -> None:
        self.policy = policy
        self._models = models
        self._donor = donor
        self._left_out: list[tuple[Slot, bool]] = []
        self._found: dict[tuple[tuple[str, ...], str | None], list[str]] = {}

    @property
    def decides(self) -> bool:
        """Whether the recipe says what becomes of them; else they are problems, or relaxed by `allow`."""
        return self.policy != "error"

    @property
    def reason(self) -> str:
        """Why a tensor is copied or left out."""
        return f"not every model has it (missing: {self.policy})"

    def settle(self, slot: Slot, *, restacked: bool) -> Input | None:
        """The tensor to copy, or None where the slot is left out. `restacked`: slices made its stack anew."""
        lacking = [
            one.text for one, tensor in zip(slot.section.contributors, slot.tensors, strict=True) if tensor is None
        ]
        if self.policy == "skip":
            self._left_out.append((slot, restacked))
            self._found.setdefault((tuple(lacking), None), []).append(slot.name)
            return None
        source = self._source(slot, restacked=restacked)
        giver = self._models[source.model].name
        self._found.setdefault((tuple(lacking), giver), []).append(slot.name)
        return source

    def _source(self, slot: Slot, *, restacked: bool) -> Input:
        """The tensor of the donor, merged or not, or else of the first model that has it."""
        donor = self._models[self._donor].source.tensors.get(slot.name)
        if donor is not None and not restacked:  # in slices a name says nothing of the layer that is meant
            return Input(self._donor, donor)
        stored = [
            Input(one.model, tensor)
            for one, tensor in zip(slot.section.contributors, slot.tensors, strict=True)
            if tensor is not None
        ]
        if not stored:  # a head, say, that only a model of another module has
            having = ((i, model) for i, model in enumerate(self._models) if slot.name in model.source.tensors)
            stored = [Input(index, model.source.tensors[slot.name]) for index, model in having]
        return min(stored, key=lambda source: (source.model != self._donor, source.model))

    def ignored(self, entries: Sequence[Entry]) -> dict[str, str]:
        """The stored tensors that go nowhere because their slots are left out, with the reason."""
        used = {(source.model, source.tensor.name) for entry in entries for source in entry.sources}
        found: dict[str, str] = {}
        for slot, restacked in self._left_out:
            names = {
                (one.model, tensor.name)
                for one, tensor in zip(slot.section.contributors, slot.tensors, strict=True)
                if tensor is not None
            }
            if not restacked:
                having = (i for i, model in enumerate(self._models) if slot.name in model.source.tensors)
                names.update((index, slot.name) for index in having)
            for index, name in sorted(names - used):
                found[f"{self._models[index].name}: {name}"] = self.reason
        return found

    def warnings(self) -> list[str]:
        """One line for each group of models that lack the same tensors."""
        lines = []
        for (lacking, giver), names in self._found.items():
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            done = "leaves out" if giver is None else "copies"
            source = "" if giver is None else f" from {giver}"
            listed = ", ".join(names[:SHOWN]) + more
            whose = f"{', '.join(lacking)} {'lacks' if len(lacking) == 1 else 'lack'}"
            lines.append(f"`missing: {self.policy}` {done} {count} that {whose}{source}: {listed}")
        return lines

    def contradiction(self, entries: Sequence[Entry], config: Mapping[str, object] | None) -> InputError | None:
        """The error for an output whose layers are no longer those that the donor's config counts."""
        if not self._found or config is None:
            return None
        made = anatomy({entry.name: TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries}, config)
        problems = check(made, config, "merged")
        if not problems:
            return None
        return InputError(
            f"with `missing: {self.policy}` the merged model has other layers than its config.json counts",
            where=problems[0].where,
            fix="say which layers the output has with `slices:`, or merge models with the same number of layers",
        )
