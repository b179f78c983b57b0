"""Recipe and opened models -> Plan. Headers and configs are all it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smelt.dtypes import OUTPUT_NAMES, DType, promote
from smelt.errors import InputError, RecipeError, SmeltError, raise_all
from smelt.methods import api
from smelt.methods.loading import answerable
from smelt.planning.align import Alignment, ExtraTensors, Slot, align
from smelt.planning.alike import AlikeProblems
from smelt.planning.anatomy import Role
from smelt.planning.entries import Action, Entry, Input, Plan
from smelt.planning.explain import number_text
from smelt.planning.lines import PARAMETER, scaled
from smelt.planning.locate import Model
from smelt.planning.low_rank import factored, is_scale
from smelt.planning.missing import Uncommon
from smelt.planning.quantised import dequantised, quantised
from smelt.planning.sections import sections
from smelt.planning.tokens import choose_tokens
from smelt.planning.whole import groups
from smelt.planning.whole import notes as notes_of_groups
from smelt.planning.whole import problems as problems_of_groups
from smelt.recipe.canonical import digest
from smelt.recipe.check import notes
from smelt.recipe.schema import Recipe
from smelt.recipe.select import Found, Level, resolve, unmatched
from smelt.recipe.settings import has_gradient
from smelt.specs import TensorSpec


def build(recipe: Recipe, opened: Mapping[str, Model], *, allow: frozenset[str] = frozenset(), seed: int = 0) -> Plan:
    """The plan of a recipe over opened models (`locate.open_models`). Raises all problems found, together."""
    return _Builder(recipe, opened, allow | frozenset(recipe.allow), seed).plan()


class _Builder:
    """What the steps of planning share."""

    def __init__(self, recipe: Recipe, opened: Mapping[str, Model], allow: frozenset[str], seed: int) -> None:
        self.recipe = recipe
        self.opened = opened
        self.allow = allow
        self.seed = seed
        self.info = api.get(recipe.merge_method)
        self.models: list[Model] = []
        self.place: dict[str, int] = {}
        for name in recipe.model_names():
            model = opened[name.text]
            index = next((i for i, known in enumerate(self.models) if known is model), None)
            if index is None:
                index = len(self.models)
                self.models.append(model)
            self.place[name.text] = index
        self.base = self.place[recipe.base_model.text] if recipe.base_model is not None else None
        self.donor = self.base or 0
        self.output = next((OUTPUT_NAMES[word] for word in (recipe.out_dtype, recipe.dtype) if word is not None), None)
        self.problems: list[SmeltError] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._checked: dict[tuple[Any, ...], str | None] = {}
        self._mixed: dict[tuple[str, ...], int] = {}
        self._alike = AlikeProblems()
        self._quantised: dict[int, InputError] = {}
        self._lengths: dict[str, int] = dict(self.models[self.donor].anatomy.stacks)
        self._uncommon = Uncommon(recipe.missing, self.models, donor=self.donor)
        self._restacked: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        found, problems = sections(self.recipe, self.info, self.models, self.place)
        raise_all(problems)
        alignment = align(self.recipe, self.models, found, donor=self.donor)
        self._lengths.update({stack: len(layers) for stack, layers in alignment.restacked.items()})
        if self.recipe.lines is not None and not self._lengths:
            what = f"`lines` scales by layer, and no layers were found in {self.models[self.donor].name}"
            self.problems.append(RecipeError(what, where=self.recipe.where("lines"), fix="set `lambda` instead"))
        self._alignment_problems(alignment)
        self._restacked = frozenset(alignment.restacked)
        self._quantised = quantised(self.models)
        tokens = choose_tokens(self.recipe, self.models, self.opened, donor=self.donor, allow=self.allow)
        self.problems.extend(tokens.problems)
        self.notes.extend(tokens.notes)
        self.warnings.extend(tokens.warnings)
        entries = [entry for slot in alignment.slots if (entry := self._entry(slot)) is not None]
        if not alignment.restacked and (wrong := self._uncommon.contradiction(entries, self.models[self.donor].config)):
            self.problems.append(wrong)
        head = self.models[self.donor].anatomy.head or any(entry.part.role is Role.HEAD for entry in entries)
        tied = self._tied(bool(head))
        whole = groups(entries, tied=tied)
        self.problems.extend(problems_of_groups(whole, self.recipe))
        self.notes.extend(notes_of_groups(whole))
        raise_all([*self._quantised.values(), *self._alike.errors(), *self.problems])
        alignment.ignored.update(self._uncommon.ignored(entries))
        self._report(alignment, entries)
        return Plan(
            method=self.info.name,
            models=tuple(model.planned for model in self.models),
            donor=self.donor,
            base=self.base,
            entries=tuple(entries),
            recipe_digest=digest(self.recipe, rename=self._published()),
            restacked=alignment.restacked,
            tokenizer=tokens.giver.name,
            chat_template=tokens.chat_template,
            tied=tied,
            ignored=alignment.ignored,
            notes=tuple(self.notes),
            warnings=tuple(self.warnings),
            seed=self.seed,
        )

    def _published(self) -> dict[str, str]:
        """What the recipe calls its models -> what papers call them; those of merges within it too."""
        inner = {text: model.name for text, model in self.opened.items()} if self.recipe.merges else {}
        return inner | {text: self.models[i].name for text, i in self.place.items()}

    # --- one output tensor --------------------------------------------------------------------------------------

    def _entry(self, slot: Slot) -> Entry | None:
        giver = self.models[self.donor]
        if slot.part.role is Role.BUFFER:
            return self._buffer(slot, giver)
        if slot.section.copied:
            return self._copy(slot, Input(self.donor, giver.source.tensors[slot.name]), "its part is in no module")
        present = [i for i, tensor in enumerate(slot.tensors) if tensor is not None]
        if len(present) < len(slot.tensors) and self._uncommon.decides:
            source = self._uncommon.settle(slot, restacked=slot.part.stack in self._restacked)
            return None if source is None else self._copy(slot, source, self._uncommon.reason)
        if len(present) < len(slot.tensors):
            lacking = [slot.section.contributors[i].text for i in range(len(slot.tensors)) if i not in present]
            if "missing_tensor" not in self.allow or not present:
                self._alike.missing(slot, lacking, [slot.section.contributors[i].text for i in present])
                return None
        contributors = [(slot.section.contributors[i], _spec(slot, i)) for i in present]
        if not self._shapes_agree(slot, contributors):
            return None
        inputs = [(one, tensor) for one, tensor in contributors if not one.is_base]
        bases = [(one, tensor) for one, tensor in contributors if one.is_base]
        if not inputs or (self.info.base == "required" and not bases) or self._too_few(inputs, slot):
            one, tensor = contributors[0]
            return self._copy(slot, Input(one.model, tensor), "the models that the method needs lack it")
        tensors = [tensor for _, tensor in contributors]
        if not all(tensor.dtype.floating for tensor in tensors):
            if slot.name.rpartition(".")[2] in _COUNTERS and not tensors[0].shape:
                one, tensor = (bases or contributors)[0]
                return self._copy(slot, Input(one.model, tensor), f"a counter, not a parameter: that of {one.text}")
            return self._carried(slot, contributors)
        if is_scale(slot.name, [self.models[one.model].source.tensors for one, _ in contributors]):
            return self._carried(slot, contributors, "the scale of a LoRA pair is not averaged")
        drawing = [one for one in slot.section.contributors if not one.is_base]
        streams = {id(one): place for place, one in enumerate(drawing)}
        values, origins = self._values(slot, [one for one, _ in inputs], [tensor for _, tensor in inputs])
        if values is None:
            return None
        dtype = self.output or promote([tensor.dtype for tensor in tensors])
        self._note_mixed(tensors)
        entry = Entry(
            name=slot.name,
            dtype=dtype,
            shape=tensors[0].shape,
            part=slot.part,
            action=Action.MERGE,
            method=self.info.name,
            inputs=tuple(Input(one.model, tensor, streams[id(one)]) for one, tensor in inputs),
            base=Input(bases[0][0].model, bases[0][1]) if bases else None,
            values=values,
            origins=origins,
        )
        return self._settle(entry, slot)

    def _settle(self, entry: Entry, slot: Slot) -> Entry | None:
        """Let the method check its settings together; turn what leaves the bytes as they are into a copy."""
        key = (len(entry.inputs), entry.base is None, *entry.values.items())
        if key not in self._checked:
            self._checked[key] = None
            try:
                self._ask(entry, lambda method: method.check())
            except ValueError as error:
                reason, *fix = error.args
                self._checked[key] = reason
                self.problems.append(
                    RecipeError(
                        f"{self.info.name}: {reason}",
                        where=[
                            *self.recipe.where("merge_method", value=True),
                            f"first at tensor '{entry.name}'",
                            *(f"{name}: {number_text(value)}" for name, value in entry.values.items()),
                        ],
                        fix=fix[0] if fix else "change these settings",
                    )
                )
        if self._checked[key] is not None:
            return None
        if self._ask(entry, lambda method: method.copies()) and self._fits_copy(entry):
            return self._copy(slot, entry.inputs[0], "taken as it is", entry.values, entry.origins)
        return entry

    def _fits_copy(self, entry: Entry) -> bool:
        return entry.inputs[0].tensor.dtype is entry.dtype and entry.dtype.bits <= self.info.type.copied_bits

    def _ask(self, entry: Entry, question: Callable[[Any], Any]) -> Any:
        """Ask the method with this entry's settings. Its ValueErrors pass, other errors are told with their line."""
        refused: ValueError | None = None
        with answerable(self.info, at=f"at tensor '{entry.name}'"):
            method = self.info.type(entry.values, models=len(entry.inputs))
            try:
                return question(method)
            except ValueError as error:
                refused = error
        raise refused or AssertionError

    def _copy(
        self,
        slot: Slot,
        source: Input,
        reason: str,
        values: Mapping[str, Any] | None = None,
        origins: Mapping[str, Any] | None = None,
    ) -> Entry:
        tensor = source.tensor
        keep = self.output is None or self.output is tensor.dtype or not tensor.dtype.floating
        if slot.part.role is Role.BUFFER or keep:
            action, dtype, method = Action.COPY, tensor.dtype, self.info.name
        else:
            assert self.output is not None
            action, dtype, method = Action.MERGE, self.output, "passthrough"
            values, origins = {"scale": (1.0,)}, {}
        return Entry(
            slot.name,
            dtype,
            tensor.shape,
            slot.part,
            action,
            method,
            (source,),
            None,
            values or {},
            origins or {},
            reason,
        )

    def _buffer(self, slot: Slot, giver: Model) -> Entry:
        for one, tensor in zip(slot.section.contributors, slot.tensors, strict=True):
            if tensor is not None and one.model == self.donor:
                return self._copy(slot, Input(one.model, tensor), "a buffer, not a parameter: the donor's")
        for one, tensor in zip(slot.section.contributors, slot.tensors, strict=True):
            if tensor is not None:
                return self._copy(slot, Input(one.model, tensor), "a buffer, not a parameter")
        tensor = giver.source.tensors[slot.name]
        return self._copy(slot, Input(self.donor, tensor), "a buffer, not a parameter: the donor's")

    def _carried(
        self, slot: Slot, contributors: Sequence[tuple[Any, TensorSpec]], why: str | None = None
    ) -> Entry | None:
        """A tensor that cannot be averaged: the same bytes in every model, checked before anything is written."""
        codes = {tensor.dtype.code for _, tensor in contributors}
        if len(codes) > 1 and any(one.model in self._quantised for one, _ in contributors):
            return None  # refused as a whole, and not once more for each tensor
        if len(codes) > 1:
            self.problems.append(
                InputError(
                    f"tensor '{slot.name}' has types that cannot be merged",
                    where=[f"{one.text}  {tensor}" for one, tensor in contributors],
                    fix="only floating types are merged: drop the model that stores other numbers"
                    if why is None
                    else f"{why}: store it with one type in all models",
                )
            )
            return None
        first = contributors[0][1]
        return Entry(
            slot.name,
            first.dtype,
            first.shape,
            slot.part,
            Action.EQUAL if len(contributors) > 1 else Action.COPY,
            self.info.name,
            tuple(Input(one.model, tensor) for one, tensor in contributors),
            reason=f"{why or f'{first.dtype} numbers are never averaged'}: copied, and the same in every model",
        )

    # --- numbers ------------------------------------------------------------------------------------------------

    def _values(
        self, slot: Slot, contributors: Sequence[Any], tensors: Sequence[TensorSpec]
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Every parameter of the method for one tensor, and where each was found."""
        shared = [Level(scope.label, scope.parameters) for scope in slot.section.scopes if scope.parameters]
        values: dict[str, Any] = {}
        origins: dict[str, Any] = {}
        for name, field in self.info.fields.items():
            if not field.per_model:
                found = resolve(name, shared, tensor=slot.name, t=slot.t)
                values[name], origins[name] = self._value(field, found, slot.name, None)
                continue
            row = []
            places = []
            for one, tensor in zip(contributors, tensors, strict=True):
                own = [Level(one.scope.label, one.scope.parameters)] if one.scope.parameters else []
                levels = [*own, *shared]
                found = resolve(name, levels, tensor=tensor.name, t=slot.t)
                value, origin = self._value(field, found, tensor.name, one.text)
                row.append(value)
                places.append(origin)
            values[name], origins[name] = tuple(row), tuple(places)
        lines = self.recipe.lines
        if lines is not None and values.get(PARAMETER) is not None:
            found = origins[PARAMETER]
            scale = scaled(values[PARAMETER], found, lines, part=slot.part, lengths=self._lengths)
            values[PARAMETER], origins[PARAMETER] = scale.value, scale
        missing = any(v is None or (isinstance(v, tuple) and None in v) for v in values.values())
        return (None if missing else values), origins

    def _value(self, field: Any, found: Found | None, tensor: str, model: str | None) -> tuple[Any, Found | None]:
        if found is not None:
            try:
                return field.check(found.value), found
            except ValueError as error:
                of = f" of {model}" if model else ""
                self.problems.append(
                    RecipeError(f"{field.name}{of} {error}", where=[f"tensor '{tensor}'", found.level])
                )
                return None, found
        if not field.is_required:
            return field.default, None
        self._alike.unset(self.info.name, field.name, model, tensor, self.recipe.where("merge_method"))
        return None, None

    # --- what does not fit --------------------------------------------------------------------------------------

    def _shapes_agree(self, slot: Slot, contributors: Sequence[tuple[Any, TensorSpec]]) -> bool:
        if len({tensor.shape for _, tensor in contributors}) == 1:
            return True
        self._alike.shapes(slot, [(one.text, one.is_base, tensor) for one, tensor in contributors])
        return False

    def _too_few(self, inputs: Sequence[Any], slot: Slot) -> bool:
        return len(inputs) < len([one for one in slot.section.contributors if not one.is_base]) and (
            len(inputs) < self.info.models[0]
        )

    def _alignment_problems(self, alignment: Alignment) -> None:
        for problem in alignment.problems:
            if isinstance(problem, ExtraTensors) and "extra_tensor" in self.allow:
                for name in problem.names:
                    alignment.ignored[f"{problem.model}: {name}"] = "extra_tensor is allowed"
                self.warnings.append(f"{problem.message}: left out, as extra_tensor is allowed")
            else:
                self.problems.append(problem)

    def _note_mixed(self, tensors: Sequence[TensorSpec]) -> None:
        names = tuple(sorted({tensor.dtype.name for tensor in tensors}))
        if len(names) > 1:
            self._mixed[names] = self._mixed.get(names, 0) + 1

    def _report(self, alignment: Alignment, entries: Sequence[Entry]) -> None:
        self.notes.extend(alignment.notes)
        self.notes.extend(notes(self.recipe))
        self.notes.extend(note for model in self.models if (note := dequantised(model)) is not None)
        for names, count in self._mixed.items():
            mix = "tensor mixes" if count == 1 else "tensors mix"
            self.notes.append(f"{count} {mix} {' and '.join(names)}; all are worked on in float32")
        known = {tensor for model in self.models for tensor in model.source.tensors}
        known.update(slot.name for slot in alignment.slots)
        self.warnings.extend(unmatched(self.recipe, sorted(known)))
        self.warnings.extend(self._uncommon.warnings())
        if (told := factored(entries)) is not None:
            self.warnings.append(told)
        self._warn_of_gradients()
        if alignment.ignored:
            reasons: dict[str, int] = {}
            for reason in alignment.ignored.values():
                reasons[reason] = reasons.get(reason, 0) + 1
            self.notes.extend(
                f"{count} input tensor{' is' if count == 1 else 's are'} not used: {reason}"
                for reason, count in reasons.items()
            )

    def _warn_of_gradients(self) -> None:
        """A gradient over names without numbered layers says one thing and does another."""
        if self.models[self.donor].anatomy.stacks:
            return
        scopes = {scope.path: scope for block in self.recipe.blocks() for scope in block.scopes}
        for block in self.recipe.blocks():
            own = [block.source_scope(index) for index in range(len(block.sources))]
            scopes.update({scope.path: scope for scope in own})
        for scope in scopes.values():
            for name, setting in scope.parameters.items():
                if has_gradient(setting):
                    self.warnings.append(
                        f"{self.recipe.position(*scope.path, name)}: the gradient of `{name}` has no effect but its "
                        f"first value: the tensors of {self.models[self.donor].name} are in no numbered layers"
                    )

    def _tied(self, head: bool) -> bool:
        """Whether the merged model's config ties its head: never where a head of its own might differ."""
        declared = [_declares_tied(model) for model in self.models]
        if not head:
            return self.models[self.donor].anatomy.tied
        return all(declared)


_COUNTERS = frozenset(("num_batches_tracked", "num_updates"))
"""What training counts (batch norm, moving averages): neither averaged, nor the same in two models."""


def _declares_tied(model: Model) -> bool:
    config = model.config or {}
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return model.anatomy.tied or config.get("tie_word_embeddings", nested) is True


def _spec(slot: Slot, index: int) -> TensorSpec:
    tensor = slot.tensors[index]
    assert tensor is not None
    return tensor


def output_dtype(plan: Plan) -> DType | None:
    """The floating type that most of the output's bytes have, which the config names; None without any."""
    sizes: dict[str, int] = {}
    types: dict[str, DType] = {}
    for entry in plan.entries:
        if entry.dtype.floating:
            sizes[entry.dtype.code] = sizes.get(entry.dtype.code, 0) + entry.nbytes
            types[entry.dtype.code] = entry.dtype
    return types[max(sizes, key=lambda code: sizes[code])] if sizes else None
