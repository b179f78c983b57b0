"""model_stock: the average pulled towards the base by the angle between the deltas."""

from __future__ import annotations

import itertools

import numpy as np

from reference.inputs import Array, Base, Models, deltas64, models64, rows, tensor64
from reference.keep import Keep


def model_stock(
    models: Models, base: Base, *, keep: Keep | None = None, filter_wise: bool = False, granularity: str = "tensor"
) -> Array:
    """t mean_i(x_i) + (1 - t) b; t = n cos / (1 + (n - 1) cos), cos = mean over all pairs of cos(d_i, d_j).

    One cos per tensor, or per row along the last dimension if `filter_wise` (a 1-d tensor is one row). The
    product of two norms is at least 1e-6, so a zero delta has cos 0. t is not clamped, and 0 where |1 + (n -
    1) cos| < 1e-6. ValueError unless two models or more.
    """
    filter_wise = filter_wise or granularity == "row"
    d = deltas64(models, base, "model_stock")
    n = len(d)
    if n < 2:
        raise ValueError("model_stock takes two models or more")
    vectors = np.stack([rows(v) if filter_wise else v.reshape(1, v.size) for v in d])  # [n, rows, row length]
    norm = np.sqrt(np.sum(vectors**2, axis=-1))
    pairs = list(itertools.combinations(range(n), 2))
    cosines = [np.sum(vectors[i] * vectors[j], axis=-1) / np.maximum(norm[i] * norm[j], 1e-6) for i, j in pairs]
    cos = np.sum(cosines, axis=0) / len(pairs)  # [rows]
    denominator = 1.0 + (n - 1) * cos
    singular = np.abs(denominator) < 1e-6
    t = np.where(singular, 0.0, n * cos / np.where(singular, 1.0, denominator))[:, None]
    b = tensor64(base, "model_stock")
    average = np.sum(models64(models), axis=0) / n
    shape = vectors.shape[1:]
    return np.asarray((t * np.reshape(average, shape) + (1.0 - t) * b.reshape(shape)).reshape(b.shape))
