"""One model's tensors as they are."""

from __future__ import annotations

from smelt.methods.api import Array, Method, derive, per_model, register
from smelt.methods.stages import weighted_sum


@register("passthrough", source="MergeKit")
class Passthrough(Method):
    """Take each tensor from one model as it is, or times a factor.

    Equation:
        y = scale · x

    Use it to stack layers of models (slices); a scale of 0 on `o_proj` and `down_proj` makes a layer the identity.

    Note: without a scale, and if the type stays, the bytes are copied.

    Example:
        merge_method: passthrough
        slices:
          - sources: [{model: models/llama-ft1, layer_range: [0, 3]}]
          - sources: [{model: models/llama-ft2, layer_range: [1, 4]}]
    """

    models = (1, 1)

    scale: Array = per_model(1.0, doc="factor on the tensor")

    def copies(self) -> bool:
        return bool((self.scale == 1.0).all())

    @derive
    def coefficients(self) -> Array:
        return self.scale.reshape(-1)

    def tile(self, x: Array, coefficients: Array) -> Array:
        return weighted_sum(x, coefficients)
