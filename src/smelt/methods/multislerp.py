"""The weighted mean of several tensors' directions on the sphere."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import Array, Gram, Method, Undefined, derive, per_model, reduce, register, required, scalar
from smelt.methods.stages import ANGLE_OVER, divisor, weighted_sum


@register("multislerp", source="MergeKit")
class MultiSlerp(Method):
    """Average the directions of two or more models, or with a base of their task vectors, and keep their mean length.

    Equation:
        u_i = x_i / (‖x_i‖ + eps),   m = Σ w_i u_i / ‖Σ w_i u_i‖        (with a base d_i for x_i, and b is added)
        y = (m cos r + τ sin r / r) · Σ w_i ‖x_i‖,   τ = Σ w_i (u_i − (u_i · m) m),   r = ‖τ‖ + eps
        w_i are divided by Σ w_i                                         (normalize_weights: false leaves it out)

    Use it as slerp for more than two models, where a plain average would come out too short.

    Note: m is the mean of the same u_i with the same weights, so τ = 0 but for rounding, and what is computed is
    y = m cos(eps) · Σ w_i ‖x_i‖. Where ‖Σ w_i u_i‖ < eps there is no direction: with one or two models, or if all are
    zero, y = Σ w_i x_i (so too where an input holds NaN or infinity); with more it is an error. Norms and
    directions are those of each tensor, as in MergeKit, or with granularity: model those of the whole model.

    Example:
        merge_method: multislerp
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5}
          - model: models/llama-ft2
            parameters: {weight: 0.3}
          - model: models/llama-ft3
            parameters: {weight: 0.2}
    """

    per_tensor = frozenset({"weight", "normalize_weights", "eps"})

    weight: Array = per_model(required, doc="how much of each direction goes in")
    normalize_weights: bool = scalar(True, doc="divide the weights by their sum")
    eps: float = scalar(1e-8, within="(0, inf)", doc="added to norms; a mean direction shorter than this is none")
    granularity: str = ANGLE_OVER

    @reduce(Gram, uses=())
    def products(self, vectors: Array) -> Array:
        return vectors

    @derive
    def coefficients(self, products: Array) -> Array:
        """[n, n] inner products -> [n] coefficients."""
        xp = array_namespace(products)
        weight = xp.reshape(self.weight, (-1,))
        if self.normalize_weights:
            weight = weight / divisor(weight)
        norms = xp.sqrt(xp.linalg.diagonal(products))
        direction = weight / (norms + self.eps)
        # Not a matrix product: BLAS may add in another order on another machine.
        squared = float(xp.sum(direction[:, None] * products * direction[None, :]))
        length = math.sqrt(max(squared, 0.0))
        if not math.isfinite(squared):
            return weight
        if length < self.eps:
            if self.n > 2 and bool(xp.any(norms > self.eps)):
                raise Undefined("the weighted directions of the models cancel: their mean on the sphere is undefined")
            return weight
        return direction * (math.cos(self.eps) / length * float(xp.sum(weight * norms)))

    def tile(self, vectors: Array, base: Array | None, coefficients: Array) -> Array:
        return weighted_sum(vectors, coefficients, start=base)
