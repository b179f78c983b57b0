"""Taking over from another model what lies close to the base."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Method, register, required, scalar

LEAST = 1e-6
"""Smaller distances count as this."""


@register("nearswap", source="MergeKit; alchemonaut, QuartetAnemoi-70B")
class NearSwap(Method):
    """Go from the base towards the model, all the way where the two are close, less the further apart they are.

    Equation:
        y = g x + (1 − g) b,   g = clamp(t / max(abs(x − b), 1e-6), 0, 1)

    Use it to give a strong model a hint of another one; a t of the size of a common difference between them, such as
    1e-3, or smaller.

    Example:
        merge_method: nearswap
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
        parameters: {t: 0.001}
    """

    models = (1, 1)

    t: float = scalar(required, doc="how far each entry may move from the base")

    def tile(self, x: Array, base: Array, deltas: Array) -> Array:
        xp = array_namespace(base)
        distance = xp.astype(xp.abs(deltas[0]), xp.float64)
        share = self.t / xp.where(distance < LEAST, xp.full_like(distance, LEAST), distance)
        share = xp.clip(share, 0.0, 1.0)
        return xp.astype(share * x[0] + (1.0 - share) * base, xp.float32)
