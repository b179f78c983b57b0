"""TSV-Merge: the leading singular directions of each task, made orthogonal to those of the others."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Cost, Grain, Method, per_model, register
from smelt.methods.decomposition import (
    DECOMPOSE,
    OVERSAMPLING,
    POWER,
    RANDOMIZED,
    RANK,
    is_matrix,
    leading,
    leading_cost,
    mean_of,
    svd_cost,
    together,
    weighted,
)
from smelt.methods.stages import LAMBDA, add_to_base


@register("tsv", source="Gargiulo et al. 2025, Task singular vectors, arXiv:2412.00081, Algorithm 1 (TSV-Merge)")
class Tsv(Method):
    """Keep the leading singular directions of each task vector, and turn those of different tasks orthogonal.

    Equation:
        w_i d_i = U_i diag(σ_i) V_iᵀ, of which the first k = max(1, floor(r / n)) count
        U* = polar([U_1 … U_n]),   V* = polar([V_1 … V_n])      (polar: P Qᵀ of the SVD P D Qᵀ)
        y = b + lambda · U* diag(σ_1 … σ_n) V*ᵀ

    Use it for several tasks whose task vectors are of low rank, as they mostly are: then little is lost of each, and
    what they would do to each other's directions is removed.

    Note: r is min(m, n), or `rank` if that is less. Directions that are rounding alone (σ ≤ σ_1 · max(m, n) · 2⁻²³) are
    left out; equal directions of two tasks get half of each. Tensors that are no matrices (norms, biases,
    convolutions) get the mean, b + lambda · Σ w_i d_i / n, as in the authors' program; so do matrices with a NaN or an
    infinity. `smelt plan` shows what each matrix costs: an SVD for each model, and two to make them orthogonal.

    Example:
        merge_method: tsv
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    weight: Array = per_model(1.0, doc="what the lengths of a model's directions are multiplied by")
    lambda_: float = LAMBDA
    decompose: bool = DECOMPOSE
    rank: int = RANK
    randomized: bool = RANDOMIZED
    oversampling: int = OVERSAMPLING
    power: int = POWER

    @property
    def grain(self) -> Grain:
        return Grain.TENSOR if self.decompose else Grain.ELEMENT

    def cost(self, shape: tuple[int, ...]) -> Cost | None:
        if len(shape) != 2 or not self.decompose:
            return None
        m, n = shape
        own = self._own(shape)
        total = self.n * own
        joined = svd_cost(m, total) + svd_cost(n, total)
        found = leading_cost(m, n, own, self).times(self.n) + joined
        return Cost(found.flops + 2.0 * m * n * total, found.bytes + 8 * (m + n) * total)

    def _own(self, shape: tuple[int, ...]) -> int:
        """How many directions each model has."""
        return max(1, min(self.rank or min(shape), *shape) // self.n)

    def tile(self, base: Array, deltas: Array, uniform: Array) -> Array:
        if not self.decompose or not is_matrix(deltas):
            return add_to_base(base, mean_of(deltas, self.weight), self.lambda_)
        xp = array_namespace(deltas)
        parts = []
        for i in range(self.n):
            vector = weighted(deltas[i : i + 1, ...], self.weight[i : i + 1, ...])
            parts.append(leading(vector, self._own(base.shape), self, uniform[i]))
        found = together(parts)
        if not found.rank:
            return add_to_base(base, xp.zeros_like(base), 1.0)
        return add_to_base(base, (found.left * found.values) @ found.right, self.lambda_)
