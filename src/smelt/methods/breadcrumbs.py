"""Model Breadcrumbs: leave out the largest and the smallest entries of the task vectors."""

from __future__ import annotations

from smelt.methods.api import (
    Array,
    Grain,
    KthLargest,
    Method,
    Sum,
    derive,
    per_model,
    reduce,
    register,
    required,
    scalar,
)
from smelt.methods.selection import Cut
from smelt.methods.stages import (
    DENSITY,
    LAMBDA,
    OVER,
    RESCALE_DOC,
    add_to_base,
    band,
    band_counts,
    combine,
    cut_rows,
    rescale_factors,
)

_SOURCE = "Davari & Belilovsky 2023, arXiv:2312.06795"
_GAMMA = per_model(0.01, within="[0, 1]", doc="share of the largest entries dropped; no effect where density is 1")


def _kept(deltas: Array, method: Breadcrumbs | BreadcrumbsTies, cut: Cut | None, uniform: Array) -> Array:
    """The band of each task vector, between the two cuts of all of it or of each of its rows."""
    if method.grain is Grain.ROW:
        cut = cut_rows(abs(deltas), band_counts(method.density, method.gamma, deltas.shape[-1]))
    return band(deltas, cut, uniform)


@register("breadcrumbs", source=_SOURCE)
class Breadcrumbs(Method):
    """Keep a band of each task vector, without its largest and smallest entries, and add the weighted sum to the base.

    Equation:
        m_i = 1 for the ranks floor(gamma_i · N) to floor(gamma_i · N) + floor(density_i · N) of abs(d_i), largest first
        y = b + lambda · Σ w_i r_i (m_i ⊙ d_i)              (normalize: divided by Σ w_i)
        r_i = 1                                             (rescale: ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁, or 1 / density_i)

    Use it when outliers of a task vector do harm beside the small noise; a density near 0.9 and a gamma near 0.01 are
    common.

    Note: where density and gamma overlap, gamma yields; a density of 1 keeps all and ignores gamma. Entries that equal
    a cut are kept with the probability that fills the count, where MergeKit's unstable sort picks any of them. The
    paper masks each layer for itself, its authors' program each row (last dimension): granularity: row. With
    granularity: model ranks are those of the whole model.

    Example:
        merge_method: breadcrumbs
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
          - model: models/llama-ft2
            parameters: {weight: 0.5, density: 0.8, gamma: 0.02}
    """

    per_tensor = frozenset({"weight", "normalize", "lambda"})

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    gamma: Array = _GAMMA
    normalize: bool = scalar(False, doc="divide by the sum of the weights")
    rescale: bool | str = scalar(False, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.granularity == "row" else Grain.ELEMENT

    @reduce(
        KthLargest,
        uses=("density", "gamma"),
        when=lambda method: method.grain is not Grain.ROW and bool((method.density < 1.0).any()),
    )
    def cut(self, deltas: Array, size: int) -> tuple[Array, Array]:
        return abs(deltas), band_counts(self.density, self.gamma, size)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("granularity", "density", "gamma"), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, cut: Cut | None, uniform: Array) -> Array:
        return abs(_kept(deltas, self, cut, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, cut: Cut | None, uniform: Array, factors: Array) -> Array:
        kept = _kept(deltas, self, cut, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=False, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)


@register("breadcrumbs_ties", source=_SOURCE + " with the election of arXiv:2306.01708")
class BreadcrumbsTies(Method):
    """Keep a band of each task vector, without its largest and smallest entries, elect a sign, add what agrees with it.

    Equation:
        m_i = 1 for the ranks floor(gamma_i · N) to floor(gamma_i · N) + floor(density_i · N) of abs(d_i), largest first
        W_i = w_i r_i (m_i ⊙ d_i),   sign = + where Σ W_i ≥ 0, else −
        y = b + lambda · Σ of the agreeing W_i              (normalize: divided by the Σ of their w_i)
        r_i = 1                                             (rescale: ‖d_i‖₁ / ‖m_i ⊙ d_i‖₁, or 1 / density_i)

    Use it as breadcrumbs, for fine-tunes that pull in different directions.

    Note: where density and gamma overlap, gamma yields; a density of 1 keeps all and ignores gamma. Entries that equal
    a cut are kept with the probability that fills the count, where MergeKit's unstable sort picks any of them. The
    paper masks each layer for itself, its authors' program each row (last dimension): granularity: row. With
    granularity: model ranks are those of the whole model.

    Example:
        merge_method: breadcrumbs_ties
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
          - model: models/llama-ft2
            parameters: {weight: 0.4, density: 0.9, gamma: 0.01}
    """

    per_tensor = frozenset({"weight", "normalize", "lambda"})

    weight: Array = per_model(required, doc="how much of each task vector goes in")
    density: Array = DENSITY
    gamma: Array = _GAMMA
    normalize: bool = scalar(False, doc="divide each entry by the weights of the models that agree")
    rescale: bool | str = scalar(False, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.granularity == "row" else Grain.ELEMENT

    @reduce(
        KthLargest,
        uses=("density", "gamma"),
        when=lambda method: method.grain is not Grain.ROW and bool((method.density < 1.0).any()),
    )
    def cut(self, deltas: Array, size: int) -> tuple[Array, Array]:
        return abs(deltas), band_counts(self.density, self.gamma, size)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=("granularity", "density", "gamma"), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, cut: Cut | None, uniform: Array) -> Array:
        return abs(_kept(deltas, self, cut, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, cut: Cut | None, uniform: Array, factors: Array) -> Array:
        kept = _kept(deltas, self, cut, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=True, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)
