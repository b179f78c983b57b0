"""Which id each token has in a model, and how two models differ in that.

Embedding rows are averaged by their place. If a token has another place in another model, the average of the two rows
is the average of two different tokens: a wrong model that looks right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smelt.errors import InputError
from smelt.storage.checkpoint import TensorSource

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens, text -> id, and the file that said so."""

    ids: Mapping[str, int]
    file: str

    @property
    def rows(self) -> int:
        """The least number of embedding rows that hold every token."""
        return max(self.ids.values(), default=-1) + 1


@dataclass(frozen=True, slots=True)
class Difference:
    """How a vocabulary differs from another: tokens at another id, tokens that one of the two lacks."""

    moved: tuple[tuple[str, int, int], ...]
    """(token, id here, id there)"""
    lacking: tuple[str, ...]
    extra: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.moved or self.lacking or self.extra)


def read(source: TensorSource) -> Vocabulary | None:
    """The vocabulary of a model, or None where no file tells it in a form that is read here.

    `tokenizer.json`, else `vocab.json` with `added_tokens.json`. Raises InputError for a file that contradicts itself.
    """
    tree = source.json(TOKENIZER)
    if tree is not None:
        return Vocabulary(_of_tokenizer(tree, source.name), TOKENIZER)
    plain = source.json("vocab.json")
    if plain is None:
        return None
    added = source.json("added_tokens.json") or {}
    return Vocabulary(_checked({**plain, **added}, source.name, "vocab.json"), "vocab.json")


def compare(here: Vocabulary, there: Vocabulary) -> Difference:
    """How `there` differs from `here`."""
    moved = tuple(
        (token, place, there.ids[token])
        for token, place in here.ids.items()
        if token in there.ids and there.ids[token] != place
    )
    lacking = tuple(token for token in here.ids if token not in there.ids)
    extra = tuple(token for token in there.ids if token not in here.ids)
    return Difference(moved, lacking, extra)


def _of_tokenizer(tree: Mapping[str, Any], name: str) -> dict[str, int]:
    model = tree.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, Any] = {}
    if isinstance(vocab, dict):
        ids.update(vocab)
    elif isinstance(vocab, list):  # unigram: pairs of token and score, the id is the place
        for place, pair in enumerate(vocab):
            if not isinstance(pair, list) or not pair or not isinstance(pair[0], str):
                raise _damaged(name, TOKENIZER)
            ids.setdefault(pair[0], place)
    else:
        raise _damaged(name, TOKENIZER)
    added = tree.get("added_tokens") or []
    if not isinstance(added, list):
        raise _damaged(name, TOKENIZER)
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise _damaged(name, TOKENIZER)
        ids[token["content"]] = token.get("id")
    return _checked(ids, name, TOKENIZER)


def _checked(ids: Mapping[str, Any], name: str, file: str) -> dict[str, int]:
    for token, place in ids.items():
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < 1 << 31:
            raise InputError(f"model {name}: token {token!r} has no usable id in {file}", where=[f"id {place!r}"])
    return dict(ids)


def _damaged(name: str, file: str) -> InputError:
    return InputError(f"model {name}: {file} holds no vocabulary", fix="fetch the tokenizer's files again")
