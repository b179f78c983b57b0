"""sce: select the entries that vary most, calculate the models' weights, erase what disagrees in sign."""

from __future__ import annotations

import math

import numpy as np

from reference.inputs import Array, Base, Models, column, deltas64, safe_divisor, tensor64
from reference.keep import Keep, keep_ranks


def sce(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    select_topk: float = 1.0,
    int8_mask: bool = False,
    granularity: str = "tensor",
) -> Array:
    """b + sum c_i d_i [agree] / sum c_i [agree], over the kept d; 0 added where nothing agrees.

    Select: v = population variance of the d_i across models, per entry: sum_i (d_i - mean)^2 / n in float64.
    Keep the floor(select_topk * number of entries with v != 0) entries of largest v (select_topk >= 1: every
    entry, <= 0: none). Entries equal to the cut are decided by `keep_ranks` with the uniform numbers of model
    0: one decision per position, for all models. Calculate: c_i = mean(d_i^2) / sum_j mean(d_j^2), equal if
    that sum is 0. Erase: the elected sign is that of sum d_i (plus where it is >= 0). A divisor below 1e-8
    counts as 1.
    """
    d = deltas64(models, base, "sce")
    n, size = len(d), d[0].size
    b = tensor64(base, "sce")
    if select_topk < 1.0:
        mean = np.sum(d, axis=0) / n
        variance = np.asarray(np.sum((d - mean) ** 2, axis=0) / n)
        count = math.floor(select_topk * np.count_nonzero(variance)) if select_topk > 0.0 else 0
        d = np.where(keep_ranks(variance, first=0, count=count, keep=keep, model_index=0), d, 0.0)
    energy = np.sum(d.reshape(n, size) ** 2, axis=1) / max(size, 1)
    c = energy / energy.sum() if energy.sum() > 0.0 else np.full(n, 1.0 / n)
    weight = column(list(c), d.ndim - 1)
    elected = np.where(np.sum(d, axis=0) >= 0.0, 1.0, -1.0)
    agrees = np.sign(d) == elected
    total = np.sum(np.where(agrees, weight * d, 0.0), axis=0)
    divisor = np.sum(np.where(agrees, weight, 0.0), axis=0)
    return np.asarray(b + total / safe_divisor(divisor))
