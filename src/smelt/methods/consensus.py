"""Consensus merging: leave out what only one model needs, by TALL masks."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Method, per_model, register, scalar
from smelt.methods.stages import LAMBDA, add_to_base


@register("consensus", source="Wang et al. 2024, Localizing task information, arXiv:2405.07813, TALL masks")
class Consensus(Method):
    """Add the task vectors up, and keep only the entries of the sum that several models ask for.

    Equation:
        τ = Σ w_i d_i
        m_i = 1 where abs(w_i d_i) ≥ threshold_i · abs(τ − w_i d_i)        (model i's TALL mask)
        y = b + lambda · [Σ m_i ≥ agreement] ⊙ τ

    Use it as task_arithmetic for many models: entries that matter to one model alone (selfish weights) and to none
    (catastrophic weights) do more harm to the others than good.

    Note: thresholds of 0.2 to 0.6 are common; a higher one makes a mask smaller. The authors choose each model's on
    validation data, and all their weights are 1. An agreement of 0 is task arithmetic.
    The masks look at each entry by itself, so it is the same for tensors, rows and whole models. An entry that is
    NaN or infinite in a model is kept.

    Example:
        merge_method: consensus
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {threshold: 0.4, agreement: 2, lambda: 0.5}
    """

    models = (2, None)

    weight: Array = per_model(1.0, doc="how much of each task vector goes in")
    threshold: Array = per_model(0.4, within="[0, inf)", doc="how large an entry must be, as a part of the others' sum")
    agreement: int = scalar(2, within="[0, inf)", doc="how many models must ask for an entry (k of the paper)")
    lambda_: float = LAMBDA

    def check(self) -> None:
        if self.agreement > self.n:
            what = f"agreement asks for {self.agreement} of {self.n} models, so nothing would be kept"
            raise ValueError(what, f"set `agreement` to at most {self.n}")

    def tile(self, base: Array, deltas: Array) -> Array:
        xp = array_namespace(deltas)
        own = [self.weight[i] * xp.astype(deltas[i], xp.float64) for i in range(self.n)]
        asking = xp.zeros_like(own[0])
        for i in range(self.n):
            others = xp.zeros_like(asking)
            for j in range(self.n):
                others = others if j == i else others + own[j]
            asks = ~(xp.abs(own[i]) < self.threshold[i] * xp.abs(others))  # so that a NaN is not voted away
            asking = asking + xp.astype(asks, xp.float64)
        total = own[0]
        for one in own[1:]:
            total = total + one
        kept = (asking >= self.agreement) | ~xp.isfinite(total)
        return add_to_base(base, xp.where(kept, total, xp.zeros_like(total)), self.lambda_)
