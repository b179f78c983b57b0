"""LiNeS: a merged task vector scaled by the depth of the layer, less near the input and more near the output.

Wang et al. 2024, LiNeS, arXiv:2410.17146, section 4: λ(ℓ) = α + β (ℓ − 1) / (L − 1) for layer ℓ = 1 … L. It is a
factor on the `lambda` that a method multiplies its merged task vector by, so every method that has one can be switched
to it. The paper finds β by validation, and α for merges from the norms, ‖Σ d_i‖ / (n ‖τ‖), τ the merged task vector
(Equation 2); here both are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smelt.planning.anatomy import Part, Role
from smelt.recipe.schema import Lines

PARAMETER = "lambda"
"""The parameter that LiNeS scales; a method without it works on no task vector, or adds it as it is."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A value of `lambda` after LiNeS; as text, where both factors come from."""

    value: float
    origin: str

    def __str__(self) -> str:
        return self.origin


def depth(part: Part, lengths: Mapping[str, int]) -> float:
    """A tensor's place from input (0) to output (1): (ℓ − 1) / (L − 1) in a stack of L layers, `lengths` by stack.

    0 before the stacks (embeddings, positions), 1 after them (final norm, head), and in a stack of one layer.
    """
    if part.layer is None or part.stack is None:
        return 1.0 if part.role in (Role.AFTER, Role.HEAD) else 0.0
    length = lengths[part.stack]
    return part.layer / (length - 1) if length > 1 else 1.0


def scaled(value: float, found: object, lines: Lines, *, part: Part, lengths: Mapping[str, int]) -> Scaled:
    """`lambda` for one tensor, times λ(ℓ); `found` says where the plain value came from (None: the default)."""
    at = depth(part, lengths)
    factor = lines.alpha + lines.beta * at
    origin = "the default" if found is None else str(found)
    return Scaled(
        value * factor,
        f"{origin}: {value:.6g}, times lines {lines.alpha:.6g} + {lines.beta:.6g} · {at:.4g} -> {factor:.6g}",
    )
