"""SCE: select what varies most between the models, calculate their weights, erase what disagrees in sign."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from smelt.methods.api import Array, Method, Sum, derive, reduce, register, scalar
from smelt.methods.selection import Cut, KthLargest64
from smelt.methods.stages import CUT_OVER, TINY, above_cut, add_to_base


def variance(deltas: Array) -> Array:
    """The population variance over the models, float64: [n, t] -> [1, t]."""
    xp = array_namespace(deltas)
    n = deltas.shape[0]
    total = xp.astype(deltas[0], xp.float64)
    for i in range(1, n):
        total = total + deltas[i]
    mean = total / n
    squares = (deltas[0] - mean) ** 2
    for i in range(1, n):
        squares = squares + (deltas[i] - mean) ** 2
    return (squares / n)[None, ...]


@register("sce", source="Wan et al. 2024, FuseChat, arXiv:2408.07990")
class Sce(Method):
    """Keep the positions where the task vectors vary most, weigh the models by what is left of each, erase minorities.

    Equation:
        keep the floor(select_topk · positions with Var_i(d_i) ≠ 0) positions with the largest variance over the models
        c_i = mean(d_i²) / Σ_j mean(d_j²) over what is kept             (equal if that sum is 0)
        y = b + (Σ of the c_i d_i that have the sign of Σ d_i) / (Σ of their c_i)

    Use it to fuse models of one architecture and one base without choosing weights; a select_topk of 0.1 to 0.5 is
    common.

    Note: entries that equal the cut are kept with the probability that fills the count, one decision per position for
    all models. With one model, or equal ones, nothing varies, and a select_topk below 1 keeps nothing.
    The paper works on each parameter matrix; with granularity: model positions are chosen, and models weighed, over the
    whole model.

    Example:
        merge_method: sce
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {select_topk: 0.3}
    """

    select_topk: float = scalar(1.0, doc="share of the varying positions kept; 1 or more keeps all, 0 or less none")
    granularity: str = CUT_OVER

    @reduce(Sum, uses=(), when=lambda method: method.select_topk < 1.0)
    def varying(self, deltas: Array) -> Array:
        xp = array_namespace(deltas)
        return xp.astype(variance(deltas) != 0.0, xp.float32)

    @reduce(KthLargest64, uses=("select_topk",), when=lambda method: method.select_topk < 1.0)
    def cut(self, deltas: Array, varying: Array) -> tuple[Array, Array]:
        return variance(deltas), array_namespace(deltas).asarray([self.count_to_keep(varying)])

    def count_to_keep(self, varying: Array) -> int:
        """How many positions are kept, of so many that vary, [1]."""
        return math.floor(max(self.select_topk, 0.0) * float(varying[0]))

    @reduce(Sum, uses=())
    def energy(self, deltas: Array, cut: Cut | None, uniform: Array) -> Array:
        xp = array_namespace(deltas)
        return xp.astype(_select(deltas, cut, uniform), xp.float64) ** 2

    @derive
    def shares(self, energy: Array) -> Array:
        """c_i, [n]."""
        xp = array_namespace(energy)
        total = xp.sum(energy)
        return energy / total if float(total) > 0.0 else xp.full_like(energy, 1.0 / self.n)

    def tile(self, base: Array, deltas: Array, cut: Cut | None, uniform: Array, shares: Array) -> Array:
        xp = array_namespace(deltas)
        kept = xp.astype(_select(deltas, cut, uniform), xp.float64)
        total = kept[0]
        for i in range(1, self.n):
            total = total + kept[i]
        positive = total >= 0.0
        mixed, agreeing = xp.zeros_like(total), xp.zeros_like(total)
        for i in range(self.n):
            agrees = xp.where(positive, ~(kept[i] <= 0.0), ~(kept[i] >= 0.0))
            mixed = xp.where(agrees, mixed + shares[i] * kept[i], mixed)
            agreeing = xp.where(agrees, agreeing + shares[i], agreeing)
        mixed = mixed / xp.where(agreeing < TINY, xp.ones_like(agreeing), agreeing)
        return add_to_base(base, mixed, 1.0)


def _select(deltas: Array, cut: Cut | None, uniform: Array) -> Array:
    """The deltas at the positions that are kept, 0 elsewhere."""
    if cut is None:
        return deltas
    xp = array_namespace(deltas)
    return xp.where(above_cut(variance(deltas), cut, uniform[:1]), deltas, xp.zeros_like(deltas))
