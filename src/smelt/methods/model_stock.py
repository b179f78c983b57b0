"""Model Stock: how far to go from the base towards the average, from the angles between the task vectors."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Grain, Gram, Method, derive, reduce, register, scalar
from smelt.methods.reducers import gram
from smelt.methods.stages import OVER, weighted_sum


@register("model_stock", source="Jang et al. 2024, arXiv:2403.19522")
class ModelStock(Method):
    """Go from the base towards the models' average as far as the angles between their task vectors allow.

    Equation:
        y = t · mean(x_i) + (1 − t) · b,   t = n cos θ / (1 + (n − 1) cos θ)
        cos θ = the mean of cos(d_i, d_j) over all pairs; t = 0 where abs(1 + (n − 1) cos θ) < 1e-6

    Use it for several fine-tunes on the same task (other seeds or settings): it needs no weights.

    Note: t is not clamped; with task vectors that point apart it is negative. One t per tensor, as in
    the paper, per row (last dimension) with granularity: row, or one for the whole model with granularity: model. Where
    an input holds NaN or infinity there are no angles, and t = 1.

    Example:
        merge_method: model_stock
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    models = (2, None)

    filter_wise: bool = scalar(False, doc="one angle per row (last dimension), not per tensor")
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.rows else Grain.ELEMENT

    @property
    def rows(self) -> bool:
        return self.filter_wise or self.granularity == "row"

    def check(self) -> None:
        if self.filter_wise and self.granularity == "model":
            what = "filter_wise asks for each row by itself, granularity for the whole model"
            raise ValueError(what, "keep one of the two: `filter_wise: true` is `granularity: row`")

    @reduce(Gram, uses=(), when=lambda method: not method.rows)
    def products(self, deltas: Array) -> Array:
        return deltas

    @derive
    def coefficients(self, products: Array) -> Array:
        return None if products is None else self._coefficients(products)

    def _coefficients(self, products: Array) -> Array:
        """What each task vector is multiplied by: t / n, [n, ...]."""
        xp = array_namespace(products)
        return xp.stack([self._ratio(products) / self.n] * self.n)

    def _ratio(self, products: Array) -> Array:
        """[n, n, ...] inner products of the task vectors -> t [...]."""
        xp = array_namespace(products)
        n = products.shape[0]
        lengths = [xp.sqrt(products[i, i, ...]) for i in range(n)]
        total = xp.zeros_like(lengths[0])
        for i in range(n):
            for j in range(i + 1, n):
                scale = lengths[i] * lengths[j]
                total = total + products[i, j, ...] / xp.where(scale < 1e-6, xp.full_like(scale, 1e-6), scale)
        cosine = total / (n * (n - 1) / 2)
        below = 1.0 + (n - 1) * cosine
        near = xp.abs(below) < 1e-6
        ratio = xp.where(near, xp.zeros_like(below), n * cosine / xp.where(near, xp.ones_like(below), below))
        return xp.where(xp.isfinite(cosine), ratio, xp.ones_like(ratio))

    def tile(self, base: Array, deltas: Array, coefficients: Array) -> Array:
        if self.grain is Grain.ROW:
            coefficients = self._coefficients(gram(list(deltas), axis=-1))[..., None]
        return weighted_sum(deltas, coefficients, start=base)
