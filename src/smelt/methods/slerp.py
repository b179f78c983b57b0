"""Interpolation along the arc between two tensors, instead of the chord."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import (
    Array,
    Grain,
    Gram,
    Method,
    derive,
    per_model,
    reduce,
    register,
    required,
    scalar,
)
from smelt.methods.reducers import gram
from smelt.methods.stages import ANGLE_OVER, TINY, weighted_sum

NEARLY_PARALLEL = 0.9995


@register("slerp", source="Shoemake 1985, Animating rotation with quaternion curves")
class Slerp(Method):
    """Spherical interpolation between the base and one model: t = 0 is the base, t = 1 the model.

    Equation:
        y = sin((1 − t)θ)/sin θ · b + sin(tθ)/sin θ · x,   θ = the angle between the flattened b and x
        abs(cos θ) > 0.9995:  y = (1 − t) b + t x          (a norm ≤ 1e-8 counts as 1 in cos θ)

    Use it to blend two models of the same size and family; a gradient of t per layer gives attention to one model and
    the MLPs to the other.

    Note: one angle per tensor by default, as in MergeKit; with granularity: model one for the whole model, while t may
    still differ between tensors.

    Example:
        merge_method: slerp
        base_model: models/llama-ft1
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 1]}
            - {filter: mlp, value: [1, 0.5, 0]}
            - value: 0.5
    """

    models = (1, 1)
    ignored = {"embed_slerp": "the embedding is merged as every other tensor is"}  # noqa: RUF012

    per_tensor = frozenset({"t"})

    t: float = scalar(required, doc="place between the base (0) and the model (1)")
    granularity: str = ANGLE_OVER

    @reduce(Gram, uses=())
    def products(self, base: Array, x: Array) -> Array:
        return (base, x[0])

    @derive
    def coefficients(self, products: Array) -> tuple[float, float]:
        lengths = [math.sqrt(float(products[i, i])) for i in range(2)]
        cosine = float(products[0, 1])
        for length in lengths:
            cosine /= length if length > TINY else 1.0
        if abs(cosine) > NEARLY_PARALLEL or not math.isfinite(cosine):
            return 1.0 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1.0 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    def tile(self, x: Array, base: Array, coefficients: tuple[float, float]) -> Array:
        xp = array_namespace(base)
        near, far = coefficients
        total = near * xp.astype(base, xp.float64) + far * xp.astype(x[0], xp.float64)
        return xp.astype(total, xp.float32)


@register("nuslerp", source="MergeKit")
class NuSlerp(Method):
    """Spherical interpolation between two models, of the models themselves or, with a base, of their task vectors.

    Equation:
        y = b + slerp(d_1, d_2; t),   t = w_2 / (w_1 + w_2)     (0.5 if abs(w_1 + w_2) < 1e-6; without a base d_i = x_i)
        linear where 1 − cos² θ ≤ 1e-12 or cos θ < −0.9995

    Use it as slerp for two fine-tunes of one base: angles between task vectors say more than angles between models.

    Note: one angle per tensor by default. nuslerp_flatten: false takes one per vector along the last dimension, with
    nuslerp_row_wise: true one per vector along the first (MergeKit's names), and granularity: model one for the whole
    model. Near antiparallel vectors, where MergeKit
    gives results up to 1e5 times too large, the interpolation is linear; so too where an input holds NaN or infinity.

    Example:
        merge_method: nuslerp
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.7}
          - model: models/llama-ft2
            parameters: {weight: 0.3}
    """

    models = (2, 2)
    per_tensor = frozenset({"weight"})

    weight: Array = per_model(required, doc="how much of each model goes in")
    nuslerp_flatten: bool = scalar(True, doc="one angle per tensor; false: one per row (or column)")
    nuslerp_row_wise: bool = scalar(
        False, doc="with nuslerp_flatten: false, one angle per vector along the first dimension, not the last"
    )
    granularity: str = ANGLE_OVER

    def check(self) -> None:
        if self.granularity == "model" and not self.nuslerp_flatten:
            what = "nuslerp_flatten: false asks for an angle per vector, granularity for one of the whole model"
            raise ValueError(what, "leave one of the two out")

    @property
    def grain(self) -> Grain:
        if self.nuslerp_flatten:
            return Grain.ELEMENT
        return Grain.SLAB if self.nuslerp_row_wise else Grain.ROW

    @reduce(Gram, uses=(), when=lambda method: method.grain is Grain.ELEMENT)
    def products(self, vectors: Array) -> Array:
        return vectors

    @reduce(Gram, scope="column", uses=(), when=lambda method: method.grain is Grain.SLAB)
    def column_products(self, vectors: Array) -> Array:
        return vectors

    @derive
    def coefficients(self, products: Array, column_products: Array) -> Array:
        if products is not None:
            return self._coefficients(products)
        return None if column_products is None else self._coefficients(column_products)

    def _coefficients(self, products: Array) -> Array:
        """[2, 2, ...] inner products -> [2, ...] coefficients."""
        xp = array_namespace(products)
        first, second = (float(w) for w in self.weight.reshape(-1))
        t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
        lengths = [xp.sqrt(products[i, i, ...]) for i in range(2)]
        ones = xp.ones_like(lengths[0])
        cosine = products[0, 1, ...]
        for length in lengths:
            cosine = cosine / xp.where(length > TINY, length, ones)
        linear = (1.0 - cosine * cosine <= 1e-12) | (cosine < -NEARLY_PARALLEL) | ~xp.isfinite(cosine)
        cosine = xp.where(linear, xp.zeros_like(cosine), cosine)
        angle = xp.acos(cosine)
        near = xp.where(linear, (1.0 - t) * ones, xp.sin((1.0 - t) * angle) / xp.sin(angle))
        far = xp.where(linear, t * ones, xp.sin(t * angle) / xp.sin(angle))
        return xp.stack([near, far])

    def tile(self, vectors: Array, base: Array | None, coefficients: Array) -> Array:
        if self.grain is Grain.ROW:
            coefficients = self._coefficients(gram(list(vectors), axis=-1))[..., None]
        elif self.grain is Grain.SLAB:
            coefficients = coefficients[:, None, :]
        return weighted_sum(vectors, coefficients, start=base)
