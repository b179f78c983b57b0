"""Arcee Fusion: take over from a model only what stands out."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import Array, Grain, Method, derive, reduce, register
from smelt.methods.selection import Cut, KthLargest64
from smelt.methods.stages import add_to_base

_SMOOTHING = 1e-8
_QUANTILES = (0.25, 0.5, 0.75)


def softmax(rows: Array) -> Array:
    """Softmax along the last dimension, in float64."""
    xp = array_namespace(rows)
    powers = xp.exp(rows - xp.max(rows, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def divergence(x: Array, base: Array) -> Array:
    """KL(softmax(x) ‖ softmax(b)) of each row, float64 [rows, 1]."""
    xp = array_namespace(base)
    p = softmax(xp.astype(x, xp.float64)) + _SMOOTHING
    q = softmax(xp.astype(base, xp.float64)) + _SMOOTHING
    return xp.sum(p * xp.log(p / q), axis=-1, keepdims=True)


def importance(x: Array, base: Array, deltas: Array) -> Array:
    """abs(d) · KL(softmax(x) ‖ softmax(b)), float64 [rows, width]."""
    xp = array_namespace(base)
    return xp.astype(xp.abs(deltas), xp.float64) * divergence(x, base)


def quartile_counts(size: int) -> list[int]:
    """How many of so many numbers are at or above each quartile."""
    return [size - math.floor(q * (size - 1)) for q in _QUANTILES]


@register("arcee_fusion", source="MergeKit; Arcee Fusion")
class ArceeFusion(Method):
    """Take over the entries of a model's task vector whose importance stands out from the rest of their tensor.

    Equation:
        I = abs(x − b) · KL(softmax(x) ‖ softmax(b)), the divergence per row (last dimension, 1e-8 added to each share)
        y = b + (x − b) [I ≥ median + 1.5 (q75 − q25)]

    Use it to bring the distinct changes of one fine-tune into a base and leave the rest of it untouched.

    Note: quantile q is element floor(q (N − 1)) of all sorted importances, in float64; MergeKit works in float32, where
    the importance is off by up to 1 %, and samples large tensors. A tensor whose importances are all 0 is taken whole.

    Example:
        merge_method: arcee_fusion
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
    """

    models = (1, 1)

    @property
    def grain(self) -> Grain:
        return Grain.ROW

    @reduce(KthLargest64, uses=())
    def quartiles(self, x: Array, base: Array, deltas: Array, size: int) -> tuple[Array, Array]:
        xp = array_namespace(base)
        return importance(x[0], base, deltas[0])[None, ...], xp.asarray([quartile_counts(size)])

    @derive
    def threshold(self, quartiles: Cut) -> float:
        low, median, high = (float(value) for value in quartiles.value[0, ...])
        return median + 1.5 * (high - low)

    def tile(self, x: Array, base: Array, deltas: Array, threshold: float) -> Array:
        xp = array_namespace(base)
        stands_out = ~(importance(x[0], base, deltas[0]) < threshold)
        return add_to_base(base, xp.where(stands_out, deltas[0], xp.zeros_like(base)), 1.0)
