"""Verifying an output: everything is hashed again, and some tensors are made again from the inputs.

The second part needs the inputs. It plans the recorded recipe over them, demands that the plan is the recorded one, and
computes the chosen tensors by the array definitions: each as one tile, without kernels. The bits must be those stored.
What reductions over the whole model give is worked out anew as well, from all of the inputs: the record is not asked.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from smelt import dtypes
from smelt._version import __version__
from smelt.dtypes import DType
from smelt.engine.nesting import open_steps
from smelt.engine.run import check_equal, run, whole_results
from smelt.engine.tiles import BLOCK
from smelt.engine.whole import Parts
from smelt.errors import InputError, RecipeError, SmeltError, nearest, raise_all
from smelt.lineage.record import made_of
from smelt.lineage.verify import Verification, read_record
from smelt.lineage.verify import verify as verify_hashes
from smelt.methods import api
from smelt.planning.build import build
from smelt.planning.entries import Entry, Plan
from smelt.planning.locate import Model, open_recorded
from smelt.planning.whole import is_whole
from smelt.recipe.check import check_parameters
from smelt.recipe.nesting import mentions
from smelt.recipe.parse import from_dict
from smelt.recipe.schema import Recipe, Relaxation
from smelt.storage import digests
from smelt.storage.checkpoint import TensorSource
from smelt.storage.sources.hub import resolve
from smelt.storage.sources.local import open_folder

SAMPLE = 4
"""How many tensors are recomputed unless asked otherwise."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Recomputed:
    """What recomputing found: which tensors it made again, and what is wrong; or, in `lacking`, why it could not."""

    names: tuple[str, ...] = ()
    problems: tuple[SmeltError, ...] = ()
    lacking: str | None = None


def verify(
    folder: str | Path,
    *,
    models: Mapping[str, str | Path] | None = None,
    sample: int | str | None = None,
    seed: int | None = None,
    strict: bool = False,
    trust_pickles: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Re-hash an output, compare it with its `smelt.json`, and recompute some of its tensors from the inputs.

    `models` says where inputs lie now, by their name in the record; those of the hub are looked for in its cache.
    `sample` is how many tensors are recomputed, or "all"; by default a few, if the inputs are there. `seed` chooses
    them; by default it is drawn, and returned. `strict` makes warnings problems. `progress` is called with (bytes
    done, bytes in all) while hashing.

    Raises InputError if there is no usable record, RecipeError for arguments that make no sense.
    """
    wanted = _sample_size(sample)
    seed = secrets.randbelow(2**32) if seed is None else seed
    given = {name: Path(path) for name, path in (models or {}).items()}
    found = verify_hashes(folder, progress=progress)
    problems = list(found.problems)
    if strict:
        problems += [InputError(warning, where=[str(folder)]) for warning in found.warnings]
    made = _Recomputed()
    if wanted != 0:
        with open_folder(found.folder, name=found.folder.name or "output") as output:
            made = _recompute(output, read_record(output, found.folder), given, wanted, seed, trust_pickles)
    problems += made.problems
    notes: tuple[str, ...] = ()
    if made.lacking is not None:
        if sample is not None or given:  # it was asked for, so it is an error
            fix = "give the folder of each with --model NAME=PATH"
            problems.append(InputError("the tensors cannot be recomputed", where=[made.lacking], fix=fix))
        else:
            notes = (f"no tensor was recomputed: {made.lacking}",)
    return replace(
        found,
        problems=tuple(problems),
        recomputed=made.names,
        seed=seed if made.names else None,
        notes=notes,
    )


def _sample_size(sample: int | str | None) -> int | None:
    """How many tensors; None for all. Raises RecipeError."""
    if sample is None:
        return SAMPLE
    if sample == "all":
        return None
    try:
        number = int(sample)
    except ValueError:
        number = -1
    if number < 0:
        raise RecipeError(f"the sample must be a number of tensors or `all`, not '{sample}'")
    return number


def _recompute(
    output: TensorSource,
    record: Mapping[str, Any],
    given: Mapping[str, Path],
    wanted: int | None,
    seed: int,
    trust_pickles: bool,
) -> _Recomputed:
    try:
        recipe, recorded, merge_seed = _understood(record)
    except (SmeltError, LookupError, TypeError, ValueError) as error:
        where = [str(error).splitlines()[0] if str(error) else type(error).__name__]
        return _Recomputed(problems=(InputError("the record's recipe or inputs cannot be read", where=where),))
    if recipe.methods:
        return _Recomputed(lacking=f"the recipe has methods of its own ({', '.join(recipe.methods)})")
    if record.get("device") is not None:
        why = "the numbers were worked out on a device, and may differ from the CPU's in the last place"
        return _Recomputed(lacking=why)
    stored = mentions(recipe)
    names = [name.text for name in stored]
    if unknown := sorted(set(given) - set(names)):
        return _Recomputed(problems=(_stranger(unknown[0], names),))
    with ExitStack() as stack:
        problems: list[SmeltError] = []
        opened: dict[str, Model] = {}
        missing: list[str] = []
        for name in stored:
            commit = recorded.get(name.text, {}).get("commit")
            place = given.get(name.text) or _cached(name.text, commit)
            if place is None:
                missing.append(name.text)
                continue
            try:
                model = open_recorded(name.text, place, commit=commit, stack=stack, trust_pickles=trust_pickles)
                problems += _other_files(model, recorded.get(name.text))
                opened[name.text] = model
            except SmeltError as error:
                problems += error.problems
        if missing:
            return _Recomputed(
                problems=tuple(problems), lacking=f"it is not known where these inputs are: {', '.join(missing)}"
            )
        if problems:
            return _Recomputed(problems=tuple(problems))
        try:
            every = frozenset(get_args(Relaxation))
            opened, _ = open_steps(recipe, opened, allow=every, seed=merge_seed)
            plan = build(recipe, opened, allow=every, seed=merge_seed)
        except SmeltError as error:
            where = [problem.message for problem in error.problems[:_SHOWN]]
            what = "the recorded recipe cannot be carried out over these inputs"
            return _Recomputed(problems=(InputError(what, where=where),))
        if other := _other_plan(plan, record["tensors"]):
            return _Recomputed(problems=(other,))
        chosen = _choose(plan, wanted, seed)
        sources = [opened[text].source for text in _in_order(plan, recipe)]
        whole = whole_results(plan, sources) if any(map(is_whole, chosen)) else {}
        for entry in chosen:
            try:
                problems += _compare(entry, plan, sources, output, record, whole)
            except SmeltError as error:
                problems += error.problems
        return _Recomputed(tuple(entry.name for entry in chosen), tuple(problems))


def _understood(record: Mapping[str, Any]) -> tuple[Recipe, dict[str, Mapping[str, Any]], int]:
    """The recipe of a record, its inputs by model, and its seed. Raises whatever a record of another form leads to."""
    recipe = from_dict(record["recipe"]["text"])
    if not recipe.methods:  # those of a recipe's own are not known here
        raise_all(check_parameters(recipe))
    inputs: dict[str, Mapping[str, Any]] = {}
    for entry in record["inputs"]:
        commit = entry["commit"]
        if not isinstance(entry["model"], str) or not (commit is None or isinstance(commit, str)):
            raise ValueError("an input without a name or commit")
        if not all(isinstance(row["name"], str) for row in entry["files"]):
            raise ValueError("a file of an input without a name")
        inputs[entry["model"]] = entry
    return recipe, inputs, int(record["recipe"]["seed"])


def _stranger(name: str, names: Sequence[str]) -> RecipeError:
    close = nearest(name, names)
    known = f"its models are {', '.join(names)}"
    return RecipeError(f"the output was not made of '{name}'", fix=f"did you mean {close}?" if close else known)


def _cached(name: str, commit: str | None) -> Path | None:
    """The snapshot of a hub model in the cache, if the record says which commit it was; nothing is downloaded."""
    if commit is None:
        return None
    try:
        return resolve(name.partition("@")[0], commit, download=False).path
    except SmeltError:
        return None


def _in_order(plan: Plan, recipe: Recipe) -> list[str]:
    """The recipe's names in the order of the plan's models."""
    texts = {name.text for name in recipe.mentions()}
    return [model.published for model in plan.models if model.published in texts]


def _other_files(model: Model, recorded: Mapping[str, Any] | None) -> list[SmeltError]:
    """Weight files that are not those that were merged, as far as sizes, headers and known sha256 tell."""
    if recorded is None:  # it gave the tokenizer alone
        return []
    known = {row["name"]: row for row in recorded["files"]}
    present = {info.name: info for info in model.source.files}
    where = [f"{name} is not there" for name in known if name not in present]
    where += [f"{name} was not there" for name in present if name not in known]
    for name, info in present.items():
        row = known.get(name)
        if row is None:
            continue
        sha256 = info.blob_sha256 if row.get("sha256") else None
        if (info.size, info.header_digest) != (row.get("size"), row.get("header")):
            where.append(f"{name} has another size or header")
        elif sha256 is not None and sha256 != row["sha256"]:
            where.append(f"{name} has another sha256")
    if not where:
        return []
    return [
        InputError(
            f"the input {model.name} is not the one that was merged",
            where=[str(model.source.root), *where[:_SHOWN]],
            fix=f"give the right folder with --model {model.name}=PATH",
        )
    ]


def _other_plan(plan: Plan, recorded: Mapping[str, Any]) -> InputError | None:
    """The recipe over these inputs must give, for every tensor, what the record says that it was made of."""
    where = [f"{name} is not in the record" for name in (e.name for e in plan.entries) if name not in recorded]
    where += [f"{name} is not made by the recipe" for name in recorded.keys() - {e.name for e in plan.entries}]
    for entry in plan.entries:
        row = _with_defaults(recorded.get(entry.name, {}), entry)
        for key, value in made_of(entry, plan).items():
            if key in row and row[key] != value:
                where.append(f"{entry.name}  {key}: recorded {row[key]!r:.80}, planned {value!r:.80}")
    if not where:
        return None
    more = [f"and {len(where) - _SHOWN} more"] if len(where) > _SHOWN else []
    return InputError(
        "the record does not say what the recipe gives over these inputs",
        where=[*where[:_SHOWN], *more],
        fix="check that the inputs and smelt.json are those of this output",
    )


def _with_defaults(row: Mapping[str, Any], entry: Entry) -> Mapping[str, Any]:
    """A row of the record, with the defaults of parameters that the method has been given since it was written."""
    values = row.get("values")
    if not isinstance(values, Mapping) or row.get("method") != entry.method:
        return row
    later = {name: field.default for name, field in api.get(entry.method).fields.items() if not field.per_model}
    return {**row, "values": {name: values.get(name, later.get(name)) for name in {*entry.values, *values}}}


def _choose(plan: Plan, wanted: int | None, seed: int) -> list[Entry]:
    entries = plan.entries
    if wanted is None or wanted >= len(entries):
        return list(entries)
    return [entries[place] for place in sorted(random.Random(seed).sample(range(len(entries)), wanted))]


class _Sink:
    """One tensor in memory."""

    def __init__(self, size: int) -> None:
        self.data = np.empty(size, dtype=np.uint8)

    def write(self, name: str, start: int, data: Any) -> None:
        view = np.frombuffer(data, dtype=np.uint8)
        self.data[start : start + view.size] = view

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None:
        np.frombuffer(buffer, dtype=np.uint8)[:] = self.data[start:stop]


def _compare(
    entry: Entry,
    plan: Plan,
    sources: Sequence[TensorSource],
    output: TensorSource,
    record: Mapping[str, Any],
    whole: Parts,
) -> list[SmeltError]:
    """Make one tensor again, and hold it against what is stored."""
    spec = output.tensors.get(entry.name)
    if spec is None:  # told by the hashes
        return []
    if (spec.dtype, spec.shape) != (entry.dtype, entry.shape):
        where = [f"stored {spec}", f"recomputed {list(entry.shape)} {entry.dtype}"]
        return [InputError(f"tensor '{entry.name}' is not what its inputs give", where=where)]
    alone = replace(plan, entries=(entry,))
    check_equal(alone, sources)
    sink = _Sink(entry.nbytes)
    run(alone, sources, sink, workers=1, tile=entry.size + BLOCK, allow_nonfinite=True, kernels=False, whole=whole)
    stored: Any = np.empty(entry.nbytes, dtype=np.uint8)
    output.read_into(spec, 0, entry.nbytes, memoryview(stored))
    different = np.flatnonzero(stored != sink.data)
    if not different.size:
        return []
    as_written = digests.joined(digests.of_blocks(memoryview(stored))) == record["tensors"][entry.name]["digest"]
    where = [
        _first(int(different[0]), entry, stored, sink.data),
        f"made of {', '.join(plan.models[source.model].published for source in entry.sources)}",
        "the output is as it was written: an input has changed" if as_written else "the output has changed",
    ]
    if record.get("smelt") != __version__:
        where.append(
            f"written by smelt {record.get('smelt')}, recomputed by smelt {__version__}: they may round otherwise"
        )
    fix = "find the inputs as they were, or merge again" if as_written else "merge again, or fetch the file again"
    return [InputError(f"tensor '{entry.name}' is not what its inputs give", where=where, fix=fix)]


def _first(byte: int, entry: Entry, stored: Any, made: Any) -> str:
    """Where two tensors first differ, and in what."""
    element = byte * 8 // entry.dtype.bits
    index = [int(i) for i in np.unravel_index(element, entry.shape)] if entry.shape else []
    low, high = entry.dtype.bits * element // 8, -(-entry.dtype.bits * (element + 1) // 8)
    pair = [_shown(data[low:high], entry.dtype) for data in (stored, made)]
    return f"first at index {index}: stored {pair[0]}, recomputed {pair[1]}"


def _shown(raw: Any, dtype: DType) -> str:
    """One stored element: its number if it has one, and its bytes."""
    bits = raw[::-1].tobytes().hex()
    if not dtype.floating:
        return f"0x{bits}"
    value = np.empty(1, dtype=np.float32)
    dtypes.decode(np.ascontiguousarray(raw), dtype, value)
    return f"{value[0]:.8g} (0x{bits})"
