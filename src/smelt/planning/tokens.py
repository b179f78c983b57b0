"""Which model gives the tokenizer, which chat template goes with it, and whether the vocabularies agree at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smelt.errors import InputError, RecipeError, SmeltError, nearest
from smelt.planning.locate import Model
from smelt.recipe.references import ModelName
from smelt.recipe.schema import Recipe, Tokenizer
from smelt.tokens.chat import BUILTIN, most_common
from smelt.tokens.vocabulary import Difference, Vocabulary, compare, read

_NOT_YET = "building a vocabulary for the merged model is not supported yet"


@dataclass(slots=True)
class Tokens:
    """The choice: `donor` gives the tokenizer's files, `chat_template` replaces theirs unless it is None."""

    donor: int
    chat_template: str | None = None
    problems: list[SmeltError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose_tokens(
    recipe: Recipe, models: Sequence[Model], place: Mapping[str, int], *, donor: int, allow: frozenset[str]
) -> Tokens:
    """Decide, and compare every model's vocabulary with the one that the output gets."""
    chosen = Tokens(donor)
    asked = recipe.vocabulary
    if asked is not None:
        _asked(recipe, asked, models, place, chosen)
    _compare(recipe, asked, models, chosen, allow)
    _chat_template(recipe, models, chosen)
    return chosen


def _asked(recipe: Recipe, asked: Tokenizer, models: Sequence[Model], place: Mapping[str, int], chosen: Tokens) -> None:
    key = "tokenizer_source" if recipe.tokenizer_source is not None else "tokenizer"
    if asked.source == "base":
        if recipe.base_model is None:
            fix = "set base_model, or name a model"
            chosen.problems.append(
                RecipeError(f"`{key}` asks for the base, and there is none", where=recipe.where(key), fix=fix)
            )
        else:
            chosen.donor = place[recipe.base_model.text]
    elif isinstance(asked.source, ModelName):
        if asked.source.text in place:
            chosen.donor = place[asked.source.text]
        else:
            close = nearest(asked.source.text, place)
            fix = f"did you mean `{close}`?" if close else f"name one of {', '.join(place)}"
            chosen.problems.append(
                RecipeError(
                    f"`{key}` names a model that is not merged: {asked.source}", where=recipe.where(key), fix=fix
                )
            )
    if asked.tokens:
        fix = "leave `tokens` out: without it each token's row is merged as the method says"
        chosen.problems.append(
            RecipeError(f"`tokenizer.tokens`: {_NOT_YET}", where=recipe.where("tokenizer", "tokens"), fix=fix)
        )
    multiple = asked.pad_to_multiple_of
    name = models[chosen.donor].anatomy.embedding
    rows = models[chosen.donor].source.tensors[name].shape[0] if name is not None else 0
    if multiple is not None and rows % multiple:
        chosen.problems.append(
            RecipeError(
                f"`pad_to_multiple_of: {multiple}` would add rows to the embedding: {_NOT_YET}",
                where=[*recipe.where("tokenizer", "pad_to_multiple_of"), f"the embedding has {rows} rows"],
                fix="leave it out",
            )
        )


def _compare(
    recipe: Recipe, asked: Tokenizer | None, models: Sequence[Model], chosen: Tokens, allow: frozenset[str]
) -> None:
    keeper = models[chosen.donor]
    mine = read(keeper.source)
    if mine is None:
        if asked is not None:
            chosen.problems.append(
                InputError(f"model {keeper.name} has no tokenizer to take", fix="name a model that has one")
            )
        return
    for model in models:
        theirs = read(model.source) if model is not keeper else None
        if theirs is None:
            continue
        difference = compare(mine, theirs)
        if asked is not None and difference:
            chosen.problems.append(_other_vocabulary(recipe, keeper, model, difference))
        elif difference.moved and "vocabulary" not in allow:
            chosen.problems.append(_moved(keeper, model, mine, difference))
        elif difference:
            chosen.notes.append(
                f"the vocabulary of {model.name} differs from that of {keeper.name}, which the output gets: "
                f"{len(difference.moved)} tokens moved, {len(difference.lacking)} lacking, {len(difference.extra)} more"
            )


def _moved(keeper: Model, model: Model, mine: Vocabulary, difference: Difference) -> InputError:
    count = len(difference.moved)
    return InputError(
        f"{count} of {len(mine.ids)} tokens have other ids in {model.name} than in {keeper.name}",
        where=[
            *(f"{token!r}: {keeper.name} {here}, {model.name} {there}" for token, here, there in difference.moved[:4]),
            *(["…"] if count > 4 else []),
        ],
        fix="their embedding rows do not belong together: drop the model, or accept it with --allow vocabulary",
    )


def _other_vocabulary(recipe: Recipe, keeper: Model, model: Model, difference: Difference) -> InputError:
    key = "tokenizer_source" if recipe.tokenizer_source is not None else "tokenizer"
    examples = [*(token for token, _, _ in difference.moved), *difference.lacking, *difference.extra]
    return InputError(
        f"the vocabularies of {keeper.name} and {model.name} differ, and {_NOT_YET}",
        where=[
            *recipe.where(key),
            f"{len(difference.moved)} tokens moved, {len(difference.lacking)} only in {keeper.name}, "
            f"{len(difference.extra)} only in {model.name}: {', '.join(map(repr, examples[:4]))}",
        ],
        fix="merge models with the same tokenizer",
    )


def _chat_template(recipe: Recipe, models: Sequence[Model], chosen: Tokens) -> None:
    asked = recipe.chat_template
    if asked is None:
        return
    if asked == "auto":
        chosen.chat_template = most_common([model.source for model in models])
        if chosen.chat_template is None:
            chosen.warnings.append(f"{recipe.position('chat_template')}: chat_template is auto, and no model has one")
    elif asked in BUILTIN:
        chosen.chat_template = BUILTIN[asked]
    elif "{" in asked:
        chosen.chat_template = asked
    else:
        close = nearest(asked, ["auto", *BUILTIN])
        chosen.problems.append(
            RecipeError(
                f"there is no chat template '{asked}'",
                where=recipe.where("chat_template", value=True),
                fix=f"did you mean `{close}`?" if close else f"write auto, {', '.join(BUILTIN)}, or a Jinja template",
            )
        )
