"""DARE: drop entries of the task vectors at random and rescale the rest."""

from __future__ import annotations

from smelt.methods.api import Array, Method, Sum, derive, per_model, reduce, register, required, scalar
from smelt.methods.stages import (
    DENSITY,
    LAMBDA,
    RESCALE_DOC,
    add_to_base,
    combine,
    drop,
    rescale_factors,
)

_SOURCE = "Yu et al. 2023, arXiv:2311.03099"


@register("dare_linear", source=_SOURCE)
class DareLinear(Method):
    """Keep each entry of the task vectors with probability `density`, rescale, and add the weighted sum to the base.

    Equation:
        y = b + lambda · Σ w_i r_i (m_i ⊙ d_i),   m_i ~ Bernoulli(density_i)        (normalize: divided by Σ w_i)
        r_i = ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁                                                 (rescale: density: 1 / density_i)

    Use it when task vectors are redundant and interfere: dropping most of each leaves room for the others.

    Note: the random numbers are a function of the seed, the tensor, the model and the entry: the same on every run.

    Example:
        merge_method: dare_linear
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.5}
          - model: models/llama-ft2
            parameters: {weight: 0.5, density: 0.5}
    """

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    normalize: bool = scalar(False, doc="divide by the sum of the weights")
    rescale: bool | str = scalar(True, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("density",), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, uniform: Array) -> Array:
        return abs(drop(deltas, self.density, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, uniform: Array, factors: Array) -> Array:
        kept = drop(deltas, self.density, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=False, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)


@register("dare_ties", source=_SOURCE + " with the election of arXiv:2306.01708")
class DareTies(Method):
    """Keep each entry of the task vectors with probability `density`, rescale, elect a sign, add what agrees with it.

    Equation:
        W_i = w_i r_i (m_i ⊙ d_i),   m_i ~ Bernoulli(density_i),   sign = + where Σ W_i ≥ 0, else −
        y = b + lambda · Σ of the agreeing W_i                    (normalize: divided by the Σ of their w_i)
        r_i = ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁                               (rescale: density: 1 / density_i)

    Use it for several fine-tunes of one base; weights that sum to about 1 and densities near 0.5 are common.

    Example:
        merge_method: dare_ties
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.53}
          - model: models/llama-ft2
            parameters: {weight: 0.4, density: 0.53}
    """

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    normalize: bool = scalar(False, doc="divide each entry by the weights of the models that agree")
    rescale: bool | str = scalar(True, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("density",), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, uniform: Array) -> Array:
        return abs(drop(deltas, self.density, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, uniform: Array, factors: Array) -> Array:
        kept = drop(deltas, self.density, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=True, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)
