"""WUDI: the task vector that disturbs no task's inputs more than it must, in closed form."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Cost, Grain, Method, register
from smelt.methods.decomposition import DECOMPOSE, is_matrix, mean_of, svd, svd_cost
from smelt.methods.stages import LAMBDA, add_to_base


@register(
    "wudi", source="Cheng et al. 2025, Whoever started the interference, arXiv:2503.08099, closed form of its loss"
)
class Wudi(Method):
    """Take the task vector that differs least from each task's on the inputs that task was trained on.

    Equation:
        τ = argmin Σ ‖(τ − d_i) d_iᵀ‖² / ‖d_i‖²            (the rows of d_i stand for the inputs of task i)
          = (Σ d_i d_iᵀ d_i / ‖d_i‖²) (Σ d_iᵀ d_i / ‖d_i‖²)⁺
        y = b + lambda · τ

    Use it for several fine-tunes whose layers see different inputs: each keeps its own answers on its own inputs, and
    no weight has to be chosen.

    Note: the paper descends this loss from Σ d_i with Adam, 300 steps; here is its minimum, by the SVD of the stacked
    d_i / ‖d_i‖ (⁺ leaves out directions with σ ≤ σ_1 · 2⁻²³ times its longer side, where no task has anything).
    Matrices are taken as [outputs, inputs], which they are nearly everywhere (not in GPT-2). Tensors that are no
    matrices (norms, biases, convolutions) get the mean, b + lambda · Σ d_i / n; so do matrices with a NaN or an
    infinity. `smelt plan` shows what each matrix costs.

    Example:
        merge_method: wudi
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    lambda_: float = LAMBDA
    decompose: bool = DECOMPOSE

    @property
    def grain(self) -> Grain:
        return Grain.TENSOR if self.decompose else Grain.ELEMENT

    def cost(self, shape: tuple[int, ...]) -> Cost | None:
        if len(shape) != 2 or not self.decompose:
            return None
        m, n = shape
        rank = min(self.n * m, n)
        found = svd_cost(self.n * m, n)
        products = self.n * (2.0 * m * n * rank + 4.0 * m * rank * rank) + 2.0 * m * n * rank
        return Cost(found.flops + products, found.bytes + 8 * (m * n + 3 * m * rank))

    def tile(self, base: Array, deltas: Array) -> Array:
        xp = array_namespace(deltas)
        if not self.decompose or not is_matrix(deltas):
            return add_to_base(base, mean_of(deltas, xp.ones(self.n, dtype=xp.float64)), self.lambda_)
        vectors = xp.astype(deltas, xp.float64)
        lengths = [float(xp.sqrt(xp.sum(vector * vector))) for vector in vectors]
        stack = xp.concat([vector / (length or 1.0) for vector, length in zip(vectors, lengths, strict=True)], axis=0)
        inputs = svd(stack)
        if not inputs.rank:
            return add_to_base(base, xp.zeros_like(base), 1.0)
        # With S = P D Qᵀ and its block P_i: d_i = ‖d_i‖ P_i D Qᵀ, so τ = Σ ‖d_i‖ P_i D (D P_iᵀ P_i) D⁻¹ Qᵀ. The squares
        # of the singular values, which lose half of the digits, are never formed.
        m = base.shape[0]
        total = xp.zeros((m, inputs.rank), dtype=xp.float64)
        for i, length in enumerate(lengths):
            block = inputs.left[i * m : (i + 1) * m, :] * inputs.values
            total = total + length * (block @ (xp.matrix_transpose(block) @ inputs.left[i * m : (i + 1) * m, :]))
        return add_to_base(base, (total / inputs.values) @ inputs.right, self.lambda_)
