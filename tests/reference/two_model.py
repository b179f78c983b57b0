"""Methods for a base and one model: nearswap, arcee_fusion."""

from __future__ import annotations

import math

import numpy as np

from reference.inputs import Array, Base, Models, deltas64, models64, only, rows, tensor64
from reference.keep import Keep


def nearswap(models: Models, base: Base, *, keep: Keep | None = None, t: float) -> Array:
    """g x + (1 - g) b with g = clamp(t / max(|b - x|, 1e-6), 0, 1). ValueError unless a base and one model."""
    only(models, "nearswap")
    distance = np.abs(deltas64(models, base, "nearswap")[0])
    g = np.clip(t / np.maximum(distance, 1e-6), 0.0, 1.0)
    return np.asarray(g * models64(models)[0] + (1.0 - g) * tensor64(base, "nearswap"))


def arcee_fusion(models: Models, base: Base, *, keep: Keep | None = None) -> Array:
    """b + d where `importance` >= `threshold`, b elsewhere. ValueError unless a base and one model.

    Entries equal to the threshold are all kept, so nothing is left to chance. In particular a tensor whose
    importances are all 0 (rows of one element: softmax is 1 there) is taken whole from the model.
    """
    only(models, "arcee_fusion")
    d = deltas64(models, base, "arcee_fusion")[0]
    b = tensor64(base, "arcee_fusion")
    if not b.size:
        return b
    score = importance(models64(models)[0], b, d)
    return np.asarray(b + np.where(score >= threshold(score), d, 0.0))


def importance(x: Array, b: Array, d: Array) -> Array:
    """|d| KL(softmax(x) || softmax(b)), one divergence per last-dimension row; 1e-8 added to each probability."""
    p, q = _softmax(rows(x)) + 1e-8, _softmax(rows(b)) + 1e-8
    divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    return np.asarray((rows(np.abs(d)) * divergence).reshape(d.shape))


def threshold(score: Array) -> float:
    """median + 1.5 (q75 - q25), the quantile q being element floor(q (N - 1)) of the sorted scores."""
    ordered = np.sort(score.ravel())
    q25, median, q75 = (float(ordered[math.floor(q * (ordered.size - 1))]) for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (q75 - q25)


def _softmax(matrix: Array) -> Array:
    """Softmax of each row."""
    e = np.exp(matrix - np.max(matrix, axis=-1, keepdims=True))
    return np.asarray(e / np.sum(e, axis=-1, keepdims=True))
