"""Merging state dicts in memory: NumPy arrays or torch tensors in, the same kind out, by plan and engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from smelt.dtypes import BY_NAME, Bytes, DType
from smelt.engine.backends import CPU, choose
from smelt.engine.run import check_equal, run
from smelt.errors import InputError, RecipeError, raise_all
from smelt.methods import api
from smelt.planning.anatomy import anatomy
from smelt.planning.build import build
from smelt.planning.entries import Plan, PlannedModel
from smelt.planning.locate import Model
from smelt.recipe.check import check_parameters
from smelt.recipe.parse import from_dict
from smelt.specs import ModelRef, TensorSpec
from smelt.storage.sources.memory import MemoryCheckpoint


def merge_state_dicts(
    models: Sequence[Mapping[str, Any]],
    *,
    method: str,
    base: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    lines: Mapping[str, float] | None = None,
    allow: Iterable[str] = (),
    missing: str = "error",
    seed: int = 0,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    **parameters: Any,
) -> dict[str, Any]:
    """Merge state dicts (name -> NumPy array or torch tensor) and return one of the same kind.

    `base` may be one of `models`. `parameters` are the method's settings; a per-model one takes a number, or a sequence
    of one number per model. `lambda` is written `lambda_`. `lines` is {"alpha": ..., "beta": ...}, as in a recipe.
    Random methods draw the same numbers as a merge of files with the same seed does. `missing` (`error`, `skip`,
    `copy`) says, as in a recipe, what becomes of tensors that not all models have. `device` is where the method works,
    as in `smelt.merge`; the result is on the CPU.

    Raises RecipeError, InputError or NumericError.

    >>> import numpy as np
    >>> merge_state_dicts([{"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}], method="linear", weight=0.5)
    {'w': array([2., 4.], dtype=float32)}
    """
    for name, number in (("workers", workers), ("tile", tile)):
        if number is not None and number < 1:
            raise RecipeError(f"{name} must be at least 1, not {number}", fix="leave it out for the default")
    backend = choose(device)
    if not models:
        raise RecipeError("there is no model to merge", fix="give at least one state dict")
    if isinstance(models, Mapping) or not all(isinstance(model, Mapping) for model in models):
        raise RecipeError("`models` is not a list of state dicts", fix="give [{name: array, ...}, ...]")
    names = [f"#{i + 1}" for i in range(len(models))]
    given = dict(zip(names, models, strict=True))
    base_name = next((name for name, model in given.items() if model is base), "base") if base is not None else None
    if base_name == "base" and base is not None:
        given["base"] = base
    beside = {"allow": list(allow), "missing": missing} | ({} if lines is None else {"lines": dict(lines)})
    recipe = from_dict(_recipe(names, method, base_name, dtype, parameters) | beside)
    raise_all(check_parameters(recipe))
    opened = {name: opened_state(name, state) for name, state in given.items()}
    plan = build(recipe, opened, seed=seed)
    sources = [opened[model.published].source for model in plan.models]
    check_equal(plan, sources)
    kind = "torch" if is_torch(next(iter(models[0].values()), None)) else "numpy"
    check_types(plan, kind)
    sink = MemorySink(plan)
    nonfinite = "nonfinite" in recipe.allow
    run(plan, sources, sink, workers=workers, tile=tile, allow_nonfinite=nonfinite, backend=backend)
    return {
        entry.name: from_bytes(sink.data[entry.name], entry.dtype, entry.shape, kind=kind) for entry in plan.entries
    }


def _recipe(
    names: Sequence[str], method: str, base: str | None, dtype: str | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments as a recipe's tree."""
    fields = api.get(method).fields if method in api.names() else {}
    each: list[dict[str, Any]] = [{} for _ in names]
    shared: dict[str, Any] = {}
    for key, value in parameters.items():
        name = "lambda" if key == "lambda_" else key
        per_model = name in fields and fields[name].per_model
        if per_model and isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
            if len(value) != len(names):
                raise RecipeError(f"{name} has {len(value)} numbers for {len(names)} models", fix="give one per model")
            for settings, number in zip(each, value, strict=True):
                settings[name] = _number(number, name)
        else:
            shared[name] = value.item() if isinstance(value, np.generic) else value
    tree: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": name, **({"parameters": settings} if settings else {})}
            for name, settings in zip(names, each, strict=True)
        ],
    }
    if shared:
        tree["parameters"] = shared
    if base is not None:
        tree["base_model"] = base
    if dtype is not None:
        tree["out_dtype"] = dtype
    return tree


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{name} must be numbers, not {value!r}", fix="give one number per model") from None


def check_types(plan: Plan, kind: str) -> None:
    """NumPy has neither bfloat16 nor float8. Raises InputError where the result needs the package that has them."""
    foreign = next((entry.dtype for entry in plan.entries if _is_foreign(entry.dtype)), None)
    if kind == "numpy" and foreign is not None and importlib.util.find_spec("ml_dtypes") is None:
        fix = "pip install ml_dtypes, give torch tensors, or ask for dtype='float32'"
        raise InputError(f"NumPy arrays of {foreign} need the package ml_dtypes", fix=fix)


def _is_foreign(dtype: DType) -> bool:
    """Whether NumPy has the type from another package."""
    return dtype.name == "bfloat16" or dtype.name.startswith("float8")


def opened_state(name: str, state: Mapping[str, Any]) -> Model:
    """A state dict as a model that is open for planning; its arrays are not copied. Raises InputError."""
    tensors: dict[str, tuple[TensorSpec, Bytes]] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise InputError(f"a tensor's name is text, not {key!r}", where=[name], fix="give a dict of name: tensor")
        dtype, data = _to_bytes(value, f"{name}: {key}")
        tensors[key] = (TensorSpec(key, dtype, tuple(int(n) for n in value.shape)), data)
    source = MemoryCheckpoint(name, tensors)
    return Model(PlannedModel(ModelRef(name, name), name, "memory"), source, None, anatomy(source.tensors, None))


def is_torch(value: object) -> bool:
    """Whether a value is of torch, which is not imported for that."""
    return type(value).__module__.split(".")[0] == "torch"


def _to_bytes(value: Any, where: str) -> tuple[DType, Bytes]:
    if is_torch(value):
        import torch

        name = str(value.dtype).removeprefix("torch.")
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if name in BY_NAME else None
    elif isinstance(value, np.ndarray | np.generic):
        name = value.dtype.name
        little = value.astype(value.dtype.newbyteorder("<"), copy=False) if name in BY_NAME else value
        data = np.ascontiguousarray(little).reshape(-1).view(np.uint8) if name in BY_NAME else None
    else:
        raise InputError(f"not an array but {type(value).__name__}", where=[where], fix="give arrays or torch tensors")
    if data is None:
        raise InputError(f"numbers of type {name} cannot be merged", where=[where], fix="convert the tensor first")
    return BY_NAME[name], data


def from_bytes(data: Bytes, dtype: DType, shape: tuple[int, ...], *, kind: str) -> Any:
    """Stored bytes as a tensor of torch or an array of NumPy (`kind`), not copied."""
    if kind == "torch":
        import torch

        target = getattr(torch, dtype.name)
        return torch.from_numpy(data).view(target).reshape(shape) if data.size else torch.empty(shape, dtype=target)
    if _is_foreign(dtype):
        import ml_dtypes

        return data.view(np.dtype(getattr(ml_dtypes, dtype.name))).reshape(shape)
    return data.view(np.dtype(dtype.name)).reshape(shape)


class MemorySink:
    """A sink of arrays."""

    def __init__(self, plan: Plan) -> None:
        self.data = {entry.name: np.empty(entry.nbytes, dtype=np.uint8) for entry in plan.entries}

    def write(self, name: str, start: int, data: Any) -> None:
        view = np.frombuffer(data, dtype=np.uint8)
        self.data[name][start : start + view.size] = view

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None:
        np.frombuffer(buffer, dtype=np.uint8)[:] = self.data[name][start:stop]
