"""One candidate of the study: skills merged in memory as a setting says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scoring import Weights
from sweeps import Setting, Sweep

import smelt
from smelt.dtypes import BY_NAME, decode, encode


def merged_skills(
    weights: Mapping[str, Weights], skills: Sequence[str], sweep: Sweep, setting: Setting, *, seed: int = 0
) -> tuple[Weights, float]:
    """The merged model, rounded to bfloat16 as a checkpoint is, and the CPU seconds that one worker took for it."""
    ordered = [weights[name] for name in (*skills[setting.first :], *skills[: setting.first])]
    others = ordered[1:] if len(ordered) == 2 else [_average(ordered[1:])] if len(ordered) > 2 else []
    base: Weights | None = weights["base"]
    match sweep.how:
        case "skills":
            models = ordered
        case "averaged":
            models, base = ordered, None
        case "pair":
            models, base = others, ordered[0]
        case "versus":
            models = [ordered[0], *others]
        case "one":
            models = [_average(ordered)]
        case "alone":
            models = ordered[:1]
    started = time.process_time()
    merged = smelt.merge_state_dicts(models, method=sweep.method, base=base, seed=seed, workers=1, **setting.parameters)
    seconds = time.process_time() - started
    return {name: _rounded(tensor) for name, tensor in merged.items()}, seconds


def _average(models: Sequence[Weights]) -> Weights:
    return smelt.merge_state_dicts(models, method="linear", weight=1.0, workers=1)


def _rounded(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values of the nearest bfloat16."""
    kind = BY_NAME["bfloat16"]
    values = np.ascontiguousarray(tensor).reshape(-1)
    stored = np.empty(2 * values.size, dtype=np.uint8)
    encode(values, kind, stored)
    found = np.empty_like(values)
    decode(stored, kind, found)
    return found.reshape(tensor.shape)
