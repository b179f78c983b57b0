"""WUDI: the task vector that disturbs no task's inputs more than it must, in closed form."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Cost, Grain, Method, register, scalar
from smelt.methods.decomposition import DECOMPOSE, is_matrix, mean_of, svd, svd_cost
from smelt.methods.stages import LAMBDA, add_to_base


@register(
    "wudi", source="Cheng et al. 2025, Whoever started the interference, arXiv:2503.08099, Algorithm 1, in closed form"
)
class Wudi(Method):
    """Take the task vector that differs least from each task's on the inputs that task was trained on.

    Equation:
        τ = argmin Σ ‖(τ − d_i) d_iᵀ‖² / ‖d_i‖² + ρ ‖τ − Σ d_i‖²      (the rows of d_i stand for its inputs)
          = (Σ d_i d_iᵀ d_i / ‖d_i‖² + ρ Σ d_i) (Σ d_iᵀ d_i / ‖d_i‖² + ρ I)⁻¹
        ρ = ridge · mean eigenvalue of Σ d_iᵀ d_i / ‖d_i‖², which is ridge · n / columns
        y = b + lambda · τ

    Use it for several fine-tunes whose layers see different inputs: each keeps its own answers on its own inputs, and
    no weight has to be chosen.

    Note: Algorithm 1 descends the first term alone from Σ d_i with Adam, for 300 steps, which stops far from its
    minimum; the second term holds on to Σ d_i instead. The closed form of the paper's appendix holds on to each d_i,
    with ω Σ ‖τ − d_i‖² / ‖d_i‖² in its place. With ridge: 0 it is the plain minimum (⁺ for ⁻¹: directions with
    σ ≤ σ_1 · 2⁻²³ times the longer side are left out), which stretches directions in which the tasks differ by little:
    small models that were tried came out ruined. Matrices are taken as [outputs, inputs], which they are nearly
    everywhere (not in GPT-2). Tensors that are no matrices (norms, biases, convolutions) get the mean,
    b + lambda · Σ d_i / n; so do matrices with a NaN or an infinity. `smelt plan` shows what each matrix costs.

    Example:
        merge_method: wudi
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
    """

    lambda_: float = LAMBDA
    ridge: float = scalar(0.1, within="[0, inf)", doc="how strongly the result is held to the sum of the task vectors")
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
        # With S = P D Qᵀ and its block P_i: d_i = ‖d_i‖ P_i D Qᵀ, so
        # τ = Σ ‖d_i‖ (P_i D (D P_iᵀ P_i) + ρ P_i) D / (D² + ρ) Qᵀ.
        # Without ρ that is D⁻¹: no Gram matrix is inverted, which would lose half of the digits.
        m = base.shape[0]
        pull = self.ridge * self.n / base.shape[1]
        squares = inputs.values * inputs.values
        total = xp.zeros((m, inputs.rank), dtype=xp.float64)
        for i, length in enumerate(lengths):
            rows = inputs.left[i * m : (i + 1) * m, :]
            block = rows * inputs.values
            total = total + length * (block @ (xp.matrix_transpose(block) @ rows) + pull * rows)
        return add_to_base(base, (total * (inputs.values / (squares + pull))) @ inputs.right, self.lambda_)
