"""Isotropic merging: one length for all singular directions of the merged task vector."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Cost, Grain, Method, per_model, register, scalar
from smelt.methods.decomposition import (
    DECOMPOSE,
    OVERSAMPLING,
    POWER,
    RANDOMIZED,
    RANK,
    Svd,
    first,
    is_matrix,
    leading,
    leading_cost,
    mean_of,
    svd_cost,
    together,
    weighted,
)
from smelt.methods.stages import LAMBDA, add_to_base

_WEIGHT = per_model(1.0, doc="how much of each task vector goes into the sum")


@register("iso_c", source="Marczak et al. 2025, No task left behind, arXiv:2502.04959, Algorithm 1 (Iso-C)")
class IsoC(Method):
    """Add the task vectors up, and give all singular directions of the sum the same length, their mean.

    Equation:
        Σ w_i d_i = U diag(σ) Vᵀ,   σ̄ = mean of σ_1 … σ_r
        y = b + lambda · σ̄ U Vᵀ

    Use it where a few strong directions of the sum, which several tasks share, drown the others. The sum is long: a
    lambda of 1 suits the paper's vision models, language models may need less.

    Note: directions that are rounding alone (σ ≤ σ_1 · max(m, n) · 2⁻²³) are left out, and r counts the others. With a
    `rank` only so many of the leading ones are kept. Tensors that are no matrices (norms, biases, convolutions) get the
    mean, b + lambda · Σ w_i d_i / n, as in the authors' program; so do matrices with a NaN or an infinity. `smelt plan`
    shows what each matrix costs.

    Example:
        merge_method: iso_c
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {lambda: 0.5}
    """

    weight: Array = _WEIGHT
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
        return leading_cost(m, n, self._rank(shape), self) + Cost(2.0 * m * n * self._rank(shape), 0)

    def _rank(self, shape: tuple[int, ...]) -> int:
        return min(self.rank or min(shape), *shape)

    def tile(self, base: Array, deltas: Array, uniform: Array) -> Array:
        if not self.decompose or not is_matrix(deltas):
            return add_to_base(base, mean_of(deltas, self.weight), self.lambda_)
        xp = array_namespace(deltas)
        found = leading(weighted(deltas, self.weight), self._rank(base.shape), self, uniform[0])
        if not found.rank:
            return add_to_base(base, xp.zeros_like(base), 1.0)
        return add_to_base(base, float(xp.mean(found.values)) * (found.left @ found.right), self.lambda_)


@register("iso_cts", source="Marczak et al. 2025, No task left behind, arXiv:2502.04959, Algorithm 2 (Iso-CTS)")
class IsoCts(Method):
    """As iso_c, but the weakest shared directions make room for each task's own, and all are made orthogonal.

    Equation:
        Σ w_i d_i = U diag(σ) Vᵀ,   of r directions the first k are shared, s = round((r − floor(common · r)) / n) each
        model's own, k = r − n s
        (I − U_k U_kᵀ) w_i d_i = U_i diag(σ_i) V_iᵀ, of which the first s count
        U* = polar([U_1 … U_n, U_k]),   V* = polar([V_1 … V_n, V_k]),   σ̄ = mean of all r lengths
        y = b + lambda · σ̄ U* V*ᵀ                           (polar: P Qᵀ of the SVD P D Qᵀ)

    Use it as iso_c for many tasks, whose own directions the sum would hide.

    Note: directions that are rounding alone (σ ≤ σ_1 · max(m, n) · 2⁻²³) are left out. `rank` sets r; the default is
    min(m, n). With common: 1 it is iso_c. Tensors that are no matrices (norms, biases, convolutions) get the mean,
    b + lambda · Σ w_i d_i / n, as in the authors' program; so do matrices with a NaN or an infinity. `smelt plan` shows
    what each matrix costs: an SVD for the sum, one for each model, two to make the directions orthogonal.

    Example:
        merge_method: iso_cts
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {common: 0.8, lambda: 0.5}
    """

    weight: Array = _WEIGHT
    common: float = scalar(0.8, within="[0, 1]", doc="share of the directions that are those of the sum")
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
        shared, own = self._split(shape)
        total = shared + self.n * own
        found = leading_cost(m, n, shared, self) + leading_cost(m, n, own, self).times(self.n)
        joined = svd_cost(m, total) + svd_cost(n, total) + Cost(2.0 * m * n * total, 8 * (m + n) * total)
        return found + Cost(joined.flops, joined.bytes + 8 * (m + n) * total)

    def _split(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many directions are shared, and how many each model has for itself."""
        total = min(self.rank or min(shape), *shape)
        own = min(round((total - int(self.common * total)) / self.n), total // self.n)
        return total - self.n * own, own

    def tile(self, base: Array, deltas: Array, uniform: Array) -> Array:
        if not self.decompose or not is_matrix(deltas):
            return add_to_base(base, mean_of(deltas, self.weight), self.lambda_)
        xp = array_namespace(deltas)
        shared, own = self._split(base.shape)
        # With none shared there is no subspace to leave out, and the sum need not be decomposed.
        sum_ = leading(weighted(deltas, self.weight), shared, self, uniform[0]) if shared else _nothing(base)
        parts = []
        for i in range(self.n if own else 0):
            vector = weighted(deltas[i : i + 1, ...], self.weight[i : i + 1, ...])
            rest = vector - sum_.left @ (xp.matrix_transpose(sum_.left) @ vector)
            parts.append(_beyond(leading(rest, own, self, uniform[i]), vector))
        found = together([*parts, sum_])
        if not found.rank:
            return add_to_base(base, xp.zeros_like(base), 1.0)
        return add_to_base(base, float(xp.mean(found.values)) * (found.left @ found.right), self.lambda_)


def _nothing(base: Array) -> Svd:
    """No directions at all."""
    xp = array_namespace(base)
    m, n = base.shape
    kind = xp.float64
    return Svd(xp.zeros((m, 0), dtype=kind), xp.zeros((0,), dtype=kind), xp.zeros((0, n), dtype=kind))


def _beyond(found: Svd, vector: Array) -> Svd:
    """What is left of a task vector after a projection, without what is rounding of the task vector itself."""
    xp = array_namespace(vector)
    length = float(xp.sqrt(xp.sum(vector * vector)))
    return first(found, int(xp.sum(xp.astype(found.values > length * max(vector.shape) * 2.0**-23, xp.int64))))
