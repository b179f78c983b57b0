"""ExPO: go on in the direction in which alignment has moved a model."""

from __future__ import annotations

import numpy as np

from smelt.methods.api import Array, Method, derive, register, required, scalar
from smelt.methods.stages import weighted_sum


@register("expo", source="Zheng et al. 2024, Model extrapolation expedites alignment, arXiv:2404.16792, Equation 6")
class Expo(Method):
    """Go beyond a model by a part of the way that training has taken it from the base.

    Equation:
        y = x + alpha · (x − b) = b + (1 + alpha) · d

    Use it after preference training (DPO, RLHF): the base is the model before it, usually the one from supervised
    fine-tuning, the model the one after it. An alpha of 0.1 to 0.5 is common; what is best depends on the training.

    Note: the equation works on each entry by itself, so it is the same for tensors, rows and whole models.

    Example:
        merge_method: expo
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
        parameters: {alpha: 0.3}
    """

    models = (1, 1)

    alpha: float = scalar(required, doc="how far beyond the model, as a part of its way from the base")

    @derive
    def coefficients(self) -> Array:
        return np.asarray([1.0 + self.alpha])

    def tile(self, base: Array, deltas: Array, coefficients: Array) -> Array:
        return weighted_sum(deltas, coefficients, start=base)
