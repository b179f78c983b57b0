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
    """The choice: `giver` gives the tokenizer's files, `chat_template` replaces theirs unless it is None."""

    giver: Model
    chat_template: str | None = None
    problems: list[SmeltError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose_tokens(
    recipe: Recipe, models: Sequence[Model], opened: Mapping[str, Model], *, donor: int, allow: frozenset[str]
) -> Tokens:
    """Decide, and compare the vocabulary of every one of `models` with the one that the output gets.

    `opened` has every model by its name in the recipe, one that only gives the tokenizer too.
    """
    chosen = Tokens(models[donor])
    asked = recipe.vocabulary
    if asked is not None:
        _asked(recipe, asked, opened, chosen)
    _compare(recipe, asked, models, chosen, allow)
    _chat_template(recipe, models, chosen)
    return chosen


def _asked(recipe: Recipe, asked: Tokenizer, opened: Mapping[str, Model], chosen: Tokens) -> None:
    key = "tokenizer_source" if recipe.tokenizer_source is not None else "tokenizer"
    if isinstance(asked.source, ModelName):
        chosen.giver = opened[asked.source.text]
    elif asked.source == "base" and recipe.base_model is not None:
        chosen.giver = opened[recipe.base_model.text]
    elif asked.source == "base":
        chosen.problems.append(
            RecipeError(
                f"`{key}` asks for the base, and there is none",
                where=recipe.where(key),
                fix="set base_model, or name a model",
            )
        )
    if asked.tokens:
        fix = "leave `tokens` out: without it each token's row is merged as the method says"
        chosen.problems.append(
            RecipeError(f"`tokenizer.tokens`: {_NOT_YET}", where=recipe.where("tokenizer", "tokens"), fix=fix)
        )
    multiple = asked.pad_to_multiple_of
    name = chosen.giver.anatomy.embedding
    rows = chosen.giver.source.tensors[name].shape[0] if name is not None else 0
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
    keeper = chosen.giver
    mine = read(keeper.source)
    if mine is None:
        if asked is not None:
            chosen.problems.append(
                InputError(f"model {keeper.name} has no tokenizer to take", fix="name a model that has one")
            )
        return
    for model in models:
        if model is keeper:
            continue
        theirs = read(model.source)
        if theirs is None:
            if model.source.root is not None:
                chosen.notes.append(f"the vocabulary of {model.name} is not compared: it has no tokenizer.json")
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
