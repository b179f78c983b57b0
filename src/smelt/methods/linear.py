"""The weighted average of models."""

from __future__ import annotations

from smelt.methods.api import Array, Method, derive, per_model, register, required, scalar
from smelt.methods.stages import TINY, weighted_sum


@register("linear", source="Wortsman et al. 2022, Model soups, arXiv:2203.05482")
class Linear(Method):
    """Average the models, each with its weight.

    Equation:
        y = Σ w_i x_i / Σ w_i        (normalize: false leaves out the division)

    Use it for fine-tunes of one base: the average keeps most of what each has learned and costs least.

    Note: a base_model gives config and tokenizer only; it is averaged in if it is listed among the models. A tensor of
        one model alone is copied if its type stays (float64 is not: the arithmetic is of float32).

    Example:
        merge_method: linear
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.6}
          - model: models/llama-ft2
            parameters: {weight: 0.4}
    """

    copied_bits = 32

    weight: Array = per_model(required, doc="how much of each model goes in")
    normalize: bool = scalar(True, doc="divide the weights by their sum")

    def check(self) -> None:
        if self.normalize and abs(float(self.weight.sum())) < TINY:
            what = "the weights sum to 0, and normalize divides by their sum"
            raise ValueError(what, "set `normalize: false`, or give other weights")

    def copies(self) -> bool:
        return self.n == 1 and (self.normalize or bool((self.weight == 1.0).all()))

    @derive
    def coefficients(self) -> Array:
        weight = self.weight.reshape(-1)
        return weight / weight.sum() if self.normalize else weight

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)
