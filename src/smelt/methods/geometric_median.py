"""The weighted geometric median of models: the point with the least sum of distances to them."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Grain, Gram, Method, derive, per_model, reduce, register, scalar
from smelt.methods.reducers import gram
from smelt.methods.stages import OVER, weighted_sum

_NEAR = 1e-6
"""Distances below this part of the models' spread count as so much: from inner products they have no digits left."""


@register("geometric_median", source="Pillutla et al. 2022, Robust aggregation, arXiv:1912.13445, smoothed Weiszfeld")
class GeometricMedian(Method):
    """Take the point with the least weighted sum of distances to the models: an average that no outlier carries away.

    Equation:
        y = argmin_z Σ w_i ‖z − x_i‖
        by smoothed Weiszfeld steps:  β_i = w_i / max(‖z − x_i‖, ν),   z ← Σ β_i x_i / Σ β_i
        from the weighted average on, ν = 1e-6 times the largest distance between two models

    Use it for several models of which one or the other may be off; as long as those hold less than half of the weight,
    they cannot carry the result away.

    Note: one point per tensor, per row (last dimension) with granularity: row, or as in the paper one for the whole
    model with granularity: model: the shares then follow from the distances between whole models. The paper takes a
    fixed ν (1e-6) and a few steps; here ν follows the distances, and the steps go on until the shares stand still.
    With a base, task vectors give the same point, so none is needed. Where an input holds NaN or infinity there are
    no distances, and y is the weighted average.

    Example:
        merge_method: geometric_median
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
            parameters: {weight: 0.5}
    """

    per_tensor = frozenset({"weight", "max_iter", "tol"})

    weight: Array = per_model(1.0, within="[0, inf)", doc="how much the distance to each model counts")
    max_iter: int = scalar(100, within="[0, inf)", doc="steps at most")
    tol: float = scalar(1e-9, within="[0, inf)", doc="stop when no model's share changes by more than this")
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.granularity == "row" else Grain.ELEMENT

    def check(self) -> None:
        if float(self.weight.min()) < 0.0 or float(self.weight.sum()) == 0.0:
            raise ValueError("the weights must be 0 or more, and one of them more than 0", "give other weights")

    @reduce(Gram, uses=(), when=lambda method: method.grain is not Grain.ROW)
    def products(self, x: Array) -> Array:
        return apart(x)

    @derive
    def coefficients(self, products: Array) -> Array:
        return None if products is None else self._coefficients(products)

    def _coefficients(self, products: Array) -> Array:
        """[n, n, ...] inner products of the x_i − x_1 -> shares [n, ...] that sum to 1."""
        xp = array_namespace(products)
        n = self.n
        weight = xp.reshape(self.weight, (-1,) + (1,) * (products.ndim - 2)) / float(self.weight.sum())
        weight = weight + xp.zeros_like(products[0])
        spread = xp.zeros_like(products[0, 0, ...])
        for i in range(n):
            for j in range(i):
                spread = xp.maximum(spread, products[i, i, ...] - 2.0 * products[i, j, ...] + products[j, j, ...])
        least = _NEAR * xp.sqrt(spread)
        still = (spread > 0.0) & xp.isfinite(spread)
        place = weight
        for _ in range(self.max_iter):
            distances = [xp.maximum(_distance(products, place, i), least) for i in range(n)]
            pull = [weight[i, ...] / xp.where(still, distances[i], xp.ones_like(least)) for i in range(n)]
            total = pull[0]
            for one in pull[1:]:
                total = total + one
            step = xp.stack([xp.where(still, one / total, place[i, ...]) for i, one in enumerate(pull)])
            change = xp.max(xp.abs(step - place), axis=0)
            place = step
            still = still & (change > self.tol)
            if not bool(xp.any(still)):
                break
        return place

    def tile(self, x: Array, coefficients: Array) -> Array:
        if self.grain is Grain.ROW:
            coefficients = self._coefficients(gram(list(apart(x)), axis=-1))[..., None]
        return weighted_sum(x, coefficients)


def apart(x: Array) -> Array:
    """x_i − x_1 in float64: distances between models that are close to each other keep their digits."""
    xp = array_namespace(x)
    wide = xp.astype(x, xp.float64)
    return wide - wide[:1]


def _distance(products: Array, place: Array, i: int) -> Array:
    """‖Σ_j c_j x_j − x_i‖ from the inner products of the x_j − x_1, where Σ c_j = 1: [...]."""
    xp = array_namespace(products)
    n = products.shape[0]
    offset = [place[j, ...] - (1.0 if j == i else 0.0) for j in range(n)]
    squared = xp.zeros_like(offset[0])
    for j in range(n):
        for k in range(n):
            squared = squared + offset[j] * offset[k] * products[j, k, ...]
    return xp.sqrt(xp.where(squared > 0.0, squared, xp.zeros_like(squared)))
