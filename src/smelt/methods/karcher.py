"""The Riemannian (Karcher) mean of the models' directions."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import Array, Gram, Method, derive, reduce, register, scalar
from smelt.methods.stages import ANGLE_OVER, weighted_sum

_NEARLY_STRAIGHT = 1e-6


@register("karcher", source="Karcher 1977, Riemannian center of mass; MergeKit")
class Karcher(Method):
    """Take the point on the sphere with the least squared angles to the models, times the models' mean length.

    Equation:
        u ← the normalised mean of u_i = x_i / ‖x_i‖
        repeat: v = mean(log_u(u_i)),   u ← cos(‖v‖) u + sin(‖v‖) v / ‖v‖
        log_u(u_i) = θ_i / sin θ_i · (u_i − cos θ_i u),   θ_i = the angle between u_i and u
        y = u · mean(‖x_i‖)

    Use it for several models with equal say, where a plain average would come out too short.

    Note: a base_model gives config and tokenizer only; it takes part if it is listed among the models (MergeKit always
    makes it one more). Where an input holds NaN or infinity there are no angles, and y is the plain average. Angles and
    lengths are those of each tensor, as in MergeKit, or with granularity: model those of the whole model.

    Example:
        merge_method: karcher
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {max_iter: 10, tol: 1e-5}
    """

    per_tensor = frozenset({"max_iter", "tol"})

    max_iter: int = scalar(10, within="[0, inf)", doc="steps at most")
    tol: float = scalar(
        1e-5, within="[0, inf)", doc="stop when a step is shorter than this; models with a norm up to it are left out"
    )
    granularity: str = ANGLE_OVER

    @reduce(Gram, uses=())
    def products(self, x: Array) -> Array:
        return x

    @derive
    def coefficients(self, products: Array) -> Array:
        """[n, n] inner products -> [n] coefficients."""
        xp = array_namespace(products)
        norms = xp.sqrt(xp.linalg.diagonal(products))
        if not bool(xp.all(xp.isfinite(products))):
            return xp.full_like(norms, 1.0 / self.n)
        present = norms > self.tol
        inverse = xp.where(present, 1.0 / xp.where(present, norms, xp.ones_like(norms)), xp.zeros_like(norms))
        if not bool(xp.any(present)):
            return inverse
        cosines = products * inverse[:, None] * inverse[None, :]
        mean = mean_direction(cosines, present, max_iter=self.max_iter, tol=self.tol)
        return mean * inverse * (float(xp.sum(norms)) / self.n)

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)


def mean_direction(cosines: Array, present: Array, *, max_iter: int, tol: float) -> Array:
    """The Riemannian mean of unit vectors as coordinates over them [n]; 0 for those not present.

    Of the vectors only their inner products [n, n] are needed: any vector in their span is Σ_j c_j u_j, and its inner
    product with u_i is Σ_j cosines_ij c_j.
    """
    xp = array_namespace(cosines)
    among = xp.astype(present, xp.float64)
    count = float(xp.sum(among))
    place = among / count
    length = _norm(cosines, place)
    if length < tol or length == 0.0:
        place = xp.astype(xp.arange(among.shape[0]) == int(xp.argmax(among)), xp.float64)
    else:
        place = place / length
    for _ in range(max_iter):
        cosine = xp.sum(cosines * place[None, :], axis=1)
        outside = 1.0 - cosine * cosine
        sine = xp.sqrt(xp.where(outside > 0.0, outside, xp.zeros_like(outside)))
        # θ / sin θ tends to 1 as θ does to 0; at the antipode there is no direction, and it counts as 0.
        near = sine < _NEARLY_STRAIGHT
        stretch = xp.atan2(sine, cosine) / xp.where(near, xp.ones_like(sine), sine)
        stretch = xp.where(near, xp.astype(cosine > 0.0, xp.float64), stretch) * among
        tangent = (stretch - float(xp.sum(stretch * cosine)) * place) / count
        step = _norm(cosines, tangent)
        if step < tol or step == 0.0:
            break
        place = math.cos(step) * place + (math.sin(step) / step) * tangent
        place = place / _norm(cosines, place)
    return place


def _norm(cosines: Array, coordinates: Array) -> float:
    """‖Σ c_i u_i‖. No matrix product: BLAS may add in another order on another machine."""
    xp = array_namespace(cosines)
    squared = float(xp.sum(coordinates[:, None] * cosines * coordinates[None, :]))
    return math.sqrt(max(squared, 0.0))
