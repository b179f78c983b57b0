"""What is known before a byte is written: a checked recipe, its models, its plan, and the papers that follow from it.

The papers stand beside the weights: config, tokenizer, card, recipe, and the record of the merge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from smelt.engine.forecast import Forecast
from smelt.engine.nesting import Step, further_models
from smelt.engine.tensor import TensorResult
from smelt.keeping import Kept
from smelt.lineage.card import CARD, card
from smelt.lineage.record import RECORD, file_digest, record
from smelt.lineage.trusted import Claim
from smelt.planning.companions import library, small_files
from smelt.planning.entries import Plan
from smelt.planning.locate import Model
from smelt.recipe.canonical import canonical, to_yaml
from smelt.recipe.schema import Recipe
from smelt.storage.writer import Build


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked recipe with its models open and its plan: all that is known before a byte is written."""

    recipe: Recipe
    opened: Mapping[str, Model]
    models: tuple[Model, ...]
    tokenizer: Model
    """The model that gives the tokenizer; it need not be one of those that are merged."""
    plan: Plan
    forecast: Forecast
    method_files: Mapping[str, str]
    """The sha256 of each method file that the recipe names."""
    steps: tuple[Step, ...] = ()
    """The merges that the output is made of, each after those that it is made of itself."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Those of them that are kept, and where."""


def papers_of(prepared: Prepared, *, name: str) -> dict[str, bytes]:
    """Config, tokenizer, licence, card and recipe: all that stands beside the weights and does not depend on them.

    They are read before anything is written: a tokenizer that cannot be read must not end a merge at its end.
    """
    plan, models = prepared.plan, prepared.models
    papers = small_files(plan, models, prepared.tokenizer)
    public = canonical(prepared.recipe, rename=published_names(prepared))
    donor_card = models[plan.donor].source.bytes(CARD)
    papers["mergekit_config.yml"] = to_yaml(public).encode()
    name = name.encode("utf-8", "replace").decode()  # a file name need not be text
    papers[CARD] = card(
        plan,
        name=name,
        recipe=public,
        donor_card=donor_card,
        library=library(models[plan.donor].config),
        steps={step.name: step.plan for step in prepared.steps},
    )
    return papers


def write_papers(
    folder: Build,
    prepared: Prepared,
    tensors: Sequence[TensorResult],
    papers: Mapping[str, bytes],
    *,
    hashes: Mapping[tuple[int, str], str],
    claims: Mapping[str, Claim],
    device: Mapping[str, str] | None,
) -> None:
    """The papers and the record, into the build folder."""
    for file, content in papers.items():
        folder.put(file, content)
    plan = prepared.plan
    further = further_models(prepared.models, prepared.steps)
    folder.put(
        RECORD,
        record(
            replace(plan, notes=_published(plan.notes, prepared), warnings=_published(plan.warnings, prepared)),
            folder.layout,
            recipe=canonical(prepared.recipe, rename=published_names(prepared)),
            inputs=[model.source.files for model in (*prepared.models, *further)],
            merges={step.name: step.plan for step in prepared.steps},
            further=[model.planned for model in further],
            hashes=hashes,
            tensors={result.name: result.digest for result in tensors},
            nonfinite={r.name: r.inherited + r.created for r in tensors if r.inherited + r.created},
            companions={file: file_digest(content) for file, content in papers.items()},
            method_files={published_names(prepared)[file]: sha for file, sha in prepared.method_files.items()},
            trusted=claims,
            device=device,
        ),
    )


def published_names(prepared: Prepared) -> dict[str, str]:
    """The recipe's names -> those under which the output's papers speak of models and files: no local path."""
    names = {text: model.planned.published for text, model in prepared.opened.items()}
    return names | {file: re.split(r"[/\\]", file)[-1] for file in prepared.method_files}


def _published(texts: Sequence[str], prepared: Prepared) -> tuple[str, ...]:
    """Notes and warnings without local paths: that of the recipe, and those by which it names models."""
    names = {prepared.recipe.source: "recipe", **published_names(prepared)}
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w./~\\-])(?:{known})(?![\w/\\-])")
    return tuple(pattern.sub(lambda found: names[found[0]], text) for text in texts)
