"""DELLA: drop entries of the task vectors at random, small ones sooner than large ones."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import Array, Grain, Method, Sum, derive, per_model, reduce, register, required, scalar
from smelt.methods.stages import DENSITY, LAMBDA, RESCALE_DOC, add_to_base, combine, rescale_factors

_SOURCE = "Deep et al. 2024, arXiv:2406.11617"
_EPSILON = per_model(0.15, doc="how far the keep probability reaches below and above the density, over a row's ranks")


def prune_by_rank(deltas: Array, density: Array, epsilon: Array, uniform: Array) -> Array:
    """Keep each entry with a probability that rises with the rank of its magnitude in its row.

    Rows of deltas and uniform [n, rows, width]; density and epsilon [n, 1, 1]. From density − epsilon for the smallest
    to density + epsilon for the largest; a row of one entry uses the density.
    """
    xp = array_namespace(deltas)
    width = deltas.shape[-1]
    kept = []
    for delta, u, share, spread in zip(deltas, uniform, density.reshape(-1), epsilon.reshape(-1), strict=True):
        if share >= 1.0:
            kept.append(delta)
        elif share <= 0.0:
            kept.append(xp.zeros_like(delta))
        elif width == 1:
            kept.append(xp.where(xp.astype(u, xp.float64) < share, delta, xp.zeros_like(delta)))
        else:
            magnitude = xp.abs(delta)
            # Equal magnitudes share a rank, so the sort need not be stable.
            order = xp.argsort(magnitude, axis=-1, stable=False)
            ranks = mean_ranks(xp.take_along_axis(magnitude, order, axis=-1))
            probability = share - spread + 2.0 * spread * ranks / (width - 1)
            decided = xp.take_along_axis(u, order, axis=-1) < probability
            keep = xp.zeros(math.prod(delta.shape), dtype=xp.bool)
            keep[xp.reshape(order + _row_starts(delta), (-1,))] = xp.reshape(decided, (-1,))
            kept.append(xp.where(xp.reshape(keep, delta.shape), delta, xp.zeros_like(delta)))
    return xp.stack(kept)


def mean_ranks(ordered: Array) -> Array:
    """Ranks from 0 in rows [rows, width] of rising numbers, float64; equal ones (or NaN) share the mean of theirs."""
    xp = array_namespace(ordered)
    rows, width = ordered.shape
    begins = xp.ones((rows, width), dtype=xp.bool)
    begins[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) & ~xp.isnan(ordered[:, :-1])
    if bool(xp.all(begins)):
        return xp.broadcast_to(xp.arange(width, dtype=xp.float64), (rows, width))
    begins = xp.reshape(begins, (-1,))
    first = xp.nonzero(begins)[0]
    last = xp.concat([first[1:], xp.asarray([rows * width])]) - 1
    run = xp.cumulative_sum(xp.astype(begins, xp.int64)) - 1
    mean = xp.astype(first + last, xp.float64) / 2.0
    return xp.reshape(xp.take(mean, run), (rows, width)) - _row_starts(ordered)


def _row_starts(matrix: Array) -> Array:
    """The place of each row's first entry in the flat matrix, int64 [rows, 1]."""
    xp = array_namespace(matrix)
    rows, width = matrix.shape
    return xp.arange(rows, dtype=xp.int64)[:, None] * width


def _check(density: Array, epsilon: Array) -> None:
    for share, spread in zip(density.reshape(-1).tolist(), epsilon.reshape(-1).tolist(), strict=True):
        if 0.0 < share < 1.0 and (share - abs(spread) <= 0.0 or share + abs(spread) >= 1.0):
            what = f"density − epsilon and density + epsilon must lie in (0, 1), not {share:g} ∓ {spread:g}"
            raise ValueError(what, "lower epsilon, or move density away from 0 and 1")


@register("della", source=_SOURCE)
class Della(Method):
    """Keep each entry with a probability that rises with its rank by size, rescale, elect a sign, average what agrees.

    Equation:
        p_i = density_i − epsilon_i + 2 epsilon_i · rank(abs(d_i)) / (L − 1),   ranks 0 … L − 1 in each row of L
        W_i = w_i r_i (m_i ⊙ d_i),   m_i ~ Bernoulli(p_i),   sign = + where Σ W_i ≥ 0, else −
        y = b + lambda · (Σ of the agreeing W_i) / (Σ of their w_i)      (normalize: false leaves out the division)
        r_i = ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁                                      (rescale: density: 1 / density_i)

    Use it as dare_ties, where the larger entries of a task vector matter more.

    Note: a row runs along the last dimension; equal magnitudes share the mean of their ranks, and a row of one entry is
    kept with the probability density. MergeKit ranks along dimension 1, and gives
    equal magnitudes ranks by their place in its sort.

    Example:
        merge_method: della
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.6, epsilon: 0.1}
          - model: models/llama-ft2
            parameters: {weight: 0.4, density: 0.5, epsilon: 0.2}
    """

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    epsilon: Array = _EPSILON
    normalize: bool = scalar(True, doc="divide each entry by the weights of the models that agree")
    rescale: bool | str = scalar(True, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA

    @property
    def grain(self) -> Grain:
        return Grain.ROW

    def check(self) -> None:
        _check(self.density, self.epsilon)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("density", "epsilon"), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, uniform: Array) -> Array:
        return abs(prune_by_rank(deltas, self.density, self.epsilon, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, uniform: Array, factors: Array) -> Array:
        kept = prune_by_rank(deltas, self.density, self.epsilon, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=True, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)


@register("della_linear", source=_SOURCE)
class DellaLinear(Method):
    """Keep each entry with a probability that rises with its rank by size, rescale, add the weighted sum to the base.

    Equation:
        p_i = density_i − epsilon_i + 2 epsilon_i · rank(abs(d_i)) / (L − 1),   ranks 0 … L − 1 in each row of L
        y = b + lambda · Σ w_i r_i (m_i ⊙ d_i),   m_i ~ Bernoulli(p_i)   (normalize: divided by Σ w_i)
        r_i = ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁                                      (rescale: density: 1 / density_i)

    Use it as dare_linear, where the larger entries of a task vector matter more.

    Note: a row runs along the last dimension; equal magnitudes share the mean of their ranks, and a row of one entry is
    kept with the probability density. MergeKit ranks along dimension 1, and gives
    equal magnitudes ranks by their place in its sort.

    Example:
        merge_method: della_linear
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.6, epsilon: 0.1}
          - model: models/llama-ft2
            parameters: {weight: 0.4, density: 0.5, epsilon: 0.2}
    """

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    epsilon: Array = _EPSILON
    normalize: bool = scalar(False, doc="divide by the sum of the weights")
    rescale: bool | str = scalar(True, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA

    @property
    def grain(self) -> Grain:
        return Grain.ROW

    def check(self) -> None:
        _check(self.density, self.epsilon)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("density", "epsilon"), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, uniform: Array) -> Array:
        return abs(prune_by_rank(deltas, self.density, self.epsilon, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, uniform: Array, factors: Array) -> Array:
        kept = prune_by_rank(deltas, self.density, self.epsilon, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=False, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)
