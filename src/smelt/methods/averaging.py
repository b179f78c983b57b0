"""Averages of the checkpoints of one training run, by their place in it."""

from __future__ import annotations

import numpy as np

from smelt.methods.api import Array, Method, derive, register, scalar
from smelt.methods.stages import weighted_sum

_SOURCE = "Li et al. 2025, Model merging in pre-training, arXiv:2505.12082"


@register("sma", source=_SOURCE + ", Equation 3")
class SimpleMovingAverage(Method):
    """Average the checkpoints of a training run, each as much as any other.

    Equation:
        y = Σ x_i / n

    Use it for the last checkpoints of the stable phase of a run: the average foretells what lowering the learning rate
    would give. Ten checkpoints some billions of tokens apart are common.

    Note: a base_model gives config and tokenizer only; it is averaged in if it is listed among the models.

    Example:
        merge_method: sma
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    @derive
    def coefficients(self) -> Array:
        return np.full(self.n, 1.0 / self.n)

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)


@register("wma", source=_SOURCE + ", Equation 5")
class WeightedMovingAverage(Method):
    """Average the checkpoints of a training run with weights that grow by the same step from each to the next.

    Equation:
        y = Σ i x_i / Σ i,   i = 1 … n

    Use it as sma, where later checkpoints are worth more than earlier ones.

    Note: list the checkpoints in the order in which they were saved, the oldest first. The paper's equation takes any
    weights, its experiments these; any others are those of linear.

    Example:
        merge_method: wma
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    @derive
    def coefficients(self) -> Array:
        return np.arange(1.0, self.n + 1.0) / (self.n * (self.n + 1) / 2)

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)


@register("ema", source=_SOURCE + ", Equation 4")
class ExponentialMovingAverage(Method):
    """Average the checkpoints of a training run with weights that fall off from the latest to the first.

    Equation:
        a_1 = x_1,   a_i = alpha · x_i + (1 − alpha) · a_(i−1),   y = a_n

    Use it as sma, for a long row of checkpoints of which the early ones should fade.

    Note: list the checkpoints in the order in which they were saved, the oldest first. The first has the weight
    (1 − alpha)^(n−1), which may be more than those after it have. So it is by the paper's Equation 4; the weights that
    its section 4.2 names, alpha · (1 − alpha)^(n−i) for the first too, do not sum to 1.

    Example:
        merge_method: ema
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {alpha: 0.2}
    """

    alpha: float = scalar(0.2, within="(0, 1]", doc="weight of each checkpoint against the average of those before it")

    @derive
    def coefficients(self) -> Array:
        fading = (1.0 - self.alpha) ** np.arange(self.n - 1.0, -1.0, -1.0)
        return np.where(np.arange(self.n) == 0, 1.0, self.alpha) * fading

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)
