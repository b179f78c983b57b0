"""The candidates of a sweep: one recipe with several settings, over models that are opened once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelt import keeping
from smelt.engine.backends import CPU
from smelt.engine.nesting import Step, open_steps
from smelt.errors import SmeltError, raise_all
from smelt.keeping import Kept
from smelt.planning.locate import Model
from smelt.prepared import Prepared
from smelt.preparing import allowances, planned, prepare
from smelt.recipe.canonical import canonical
from smelt.recipe.check import check_parameters
from smelt.recipe.schema import Recipe
from smelt.recipe.sweeps import Over, Variant, variants


@dataclass(frozen=True, slots=True)
class Planning:
    """What planning each candidate is told, as `prepare` takes it."""

    allow: frozenset[str]
    keep_folder: Path
    strict: bool = False
    seed: int = 0
    workers: int | None = None
    tile: int | None = None
    device: str = CPU
    memory: int | None = None


@dataclass(slots=True)
class Candidates:
    """Candidates in their order, over `stored` models by name."""

    variants: tuple[Variant, ...]
    stored: Mapping[str, Model]
    method_files: Mapping[str, str]
    planning: Planning
    _steps: tuple[str, Mapping[str, Model], tuple[Step, ...], Mapping[str, Kept]] | None = field(default=None)

    def families(self) -> list[list[int]]:
        """The numbers of the candidates, those together that have the same merges within their recipes."""
        found: dict[str, list[int]] = {}
        for number, variant in enumerate(self.variants):
            found.setdefault(_family(variant.recipe), []).append(number)
        return list(found.values())

    def prepared(self, number: int) -> Prepared:
        """The plan of a candidate; one of the same family as the last one's shares its merges. Raises as `prepare`."""
        variant, planning = self.variants[number], self.planning
        family = _family(variant.recipe)
        try:
            if self._steps is None or self._steps[0] != family:
                opened: Mapping[str, Model]
                opened, steps = open_steps(variant.recipe, self.stored, allow=planning.allow, seed=planning.seed)
                kept: Mapping[str, Kept] = keeping.look(
                    steps,
                    opened,
                    planning.keep_folder,
                    allow=planning.allow,
                    device=planning.device,
                    method_files=self.method_files,
                )
                self._steps = (family, opened, steps, kept)
            _, opened, steps, kept = self._steps
            return planned(
                variant.recipe,
                opened,
                steps,
                kept=kept,
                method_files=self.method_files,
                allow=planning.allow,
                strict=planning.strict,
                seed=planning.seed,
                workers=planning.workers,
                tile=planning.tile,
                device=planning.device,
                memory=planning.memory,
            )
        except SmeltError as error:
            raise_all(of_candidate(problem, variant.name) for problem in error.problems)
            raise

    def renew(self) -> None:
        """Look anew what is kept, and compute what was not: after a batch, its merges are another's no more."""
        self._steps = None


@contextmanager
def open_candidates(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overs: Sequence[Over],
    *,
    planning: Planning,
    trust_methods: bool = False,
    trust_pickles: bool = False,
    weights: bool = True,
) -> Iterator[Candidates]:
    """Read a recipe, make its candidates, check each, and open the models. Raises as `prepare` does."""
    made: list[Variant] = []

    def first(read: Recipe) -> Recipe:
        made.extend(variants(read, overs))
        check_variants(made)
        return made[0].recipe

    with prepare(
        recipe,
        allow=planning.allow,
        seed=planning.seed,
        workers=planning.workers,
        tile=planning.tile,
        device=planning.device,
        trust_methods=trust_methods,
        trust_pickles=trust_pickles,
        weights=weights,
        keep_folder=planning.keep_folder,
        change=first,
    ) as prepared:
        stored = {name: model for name, model in prepared.opened.items() if not model.planned.merged}
        yield Candidates(tuple(made), stored, prepared.method_files, planning)


def check_variants(made: Sequence[Variant]) -> None:
    """Raise what the methods' declarations find wrong with candidates; where it is several, the first is named."""
    found: dict[str, tuple[SmeltError, str, int]] = {}
    for variant in made:
        for problem in check_parameters(variant.recipe):
            text = problem.render()
            _, name, count = found.get(text, (problem, variant.name, 0))
            found[text] = (problem, name, count + 1)
    raise_all(problem if count == len(made) else of_candidate(problem, name) for problem, name, count in found.values())


def of_candidate(problem: SmeltError, name: str) -> SmeltError:
    """The problem, with the candidate that has it."""
    return type(problem)(problem.message, where=[*problem.where, f"in the candidate {name}"], fix=problem.fix)


def planning_of(allow: Iterable[str], *, keep_folder: Path, **settings: Any) -> Planning:
    """What planning is told, its words to allow checked. Raises RecipeError."""
    return Planning(allow=allowances(allow), keep_folder=keep_folder, **settings)


def _family(recipe: Recipe) -> str:
    return json.dumps(canonical(recipe).get("merges"))
