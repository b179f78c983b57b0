"""Granularity `model`: a reference on whole models, each as one vector, and the result cut into tensors again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.inputs import Array
from reference.keep import Keep
from reference.registry import REFERENCE

Tensors = Mapping[str, NDArray[np.float32]]


class Joined:
    """The random decisions of a whole model: those of its tensors, one after the other."""

    def __init__(self, keeps: Sequence[Keep], sizes: Sequence[int]) -> None:
        self._keeps = keeps
        self._sizes = sizes

    def uniform(self, model_index: int, shape: tuple[int, ...], /) -> Array:
        pairs = zip(self._keeps, self._sizes, strict=True)
        numbers = np.concatenate([keep.uniform(model_index, (size,)) for keep, size in pairs])
        return np.asarray(numbers, dtype=np.float64).reshape(shape)


def over_model(
    method: str,
    models: Sequence[Tensors],
    base: Tensors | None,
    *,
    keep: Callable[[str], Keep],
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, Array]:
    """Every tensor of the result. `keep` gives the decisions of a tensor by its name, `values` its settings.

    Tensors may have settings of their own: each is cut out of the result for the whole model with its settings.
    """
    names = list(models[0])
    shapes = [models[0][name].shape for name in names]
    ends = np.cumsum([0, *(models[0][name].size for name in names)])
    joined = Joined([keep(name) for name in names], list(np.diff(ends)))
    vectors = [_vector(model, names) for model in models]
    origin = None if base is None else _vector(base, names)
    found: dict[str, Array] = {}
    made: list[tuple[Mapping[str, Any], Array]] = []
    for place, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        whole = next((result for settings, result in made if settings == values[name]), None)
        if whole is None:
            whole = REFERENCE[method](vectors, origin, keep=joined, **values[name])
            made.append((values[name], whole))
        found[name] = whole[ends[place] : ends[place + 1]].reshape(shape)
    return found


def _vector(tensors: Tensors, names: Sequence[str]) -> NDArray[np.float32]:
    return np.concatenate([np.asarray(tensors[name], dtype=np.float32).ravel() for name in names])
