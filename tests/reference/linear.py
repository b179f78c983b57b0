"""linear: the weighted sum or average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference.inputs import Array, Base, Models, column, models64, per_model
from reference.keep import Keep


def linear(
    models: Models,
    base: Base = None,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    normalize: bool = True,
) -> Array:
    """sum_i w_i x_i, divided by sum_i w_i if `normalize`. A base is no input. ValueError if that divisor is < 1e-8."""
    x = models64(models)
    w = per_model(weight, 1.0, len(x), "weight")
    total = np.sum(column(w, x.ndim - 1) * x, axis=0)
    if normalize:
        if abs(sum(w)) < 1e-8:
            raise ValueError("the weights sum to zero and cannot be normalized")
        total = total / sum(w)
    return np.asarray(total)
