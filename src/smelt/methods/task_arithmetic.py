"""Adding task vectors to a base."""

from __future__ import annotations

from smelt.methods.api import Array, Method, derive, per_model, register, required, scalar
from smelt.methods.stages import LAMBDA, divisor, weighted_sum


@register("task_arithmetic", source="Ilharco et al. 2022, Editing models with task arithmetic, arXiv:2212.04089")
class TaskArithmetic(Method):
    """Add the weighted sum of what each model learned (its difference from the base) to the base.

    Equation:
        y = b + lambda · Σ w_i d_i,   d_i = x_i − b        (normalize: divided by Σ w_i)

    Use it to add skills (positive weights) or remove them (negative ones) when averaging would dilute them.

    Example:
        merge_method: task_arithmetic
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.8}
          - model: models/llama-ft2
            parameters: {weight: 0.5}
    """

    ignored = {  # noqa: RUF012
        "density": "task_arithmetic keeps every entry",
        "rescale": "task_arithmetic keeps every entry, so there is nothing to rescale",
    }

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    normalize: bool = scalar(False, doc="divide by the sum of the weights")
    lambda_: float = LAMBDA

    @derive
    def coefficients(self) -> Array:
        factor = self.lambda_ / divisor(self.weight) if self.normalize else self.lambda_
        return self.weight.reshape(-1) * factor

    def tile(self, base: Array, deltas: Array, coefficients: Array) -> Array:
        return weighted_sum(deltas, coefficients, start=base)
