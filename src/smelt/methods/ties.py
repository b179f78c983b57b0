"""TIES: trim, elect sign, merge."""

from __future__ import annotations

from smelt.methods.api import (
    Array,
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
    CUT_OVER,
    DENSITY,
    LAMBDA,
    RESCALE_DOC,
    add_to_base,
    combine,
    counts_to_keep,
    rescale_factors,
    trim,
)


@register("ties", source="Yadav et al. 2023, arXiv:2306.01708, Algorithm 1")
class Ties(Method):
    """Trim each task vector to its largest entries, elect a sign per entry, average the entries that agree with it.

    Equation:
        trim: the max(1, floor(density · N)) largest of abs(d_i), over the tensor or the whole model
        W_i = w_i · trim(d_i);   sign = + where Σ W_i ≥ 0, else −
        y = b + lambda · (Σ of the agreeing W_i) / (Σ of their w_i)        (normalize: false leaves out the division)

    Use it for several fine-tunes that pull in different directions; a density of 0.2 to 0.6 is common.

    Note: entries that equal the cut are common in bf16 fine-tunes; each is kept with the probability that fills the
    count. The paper trims the task vector of the whole model, which is granularity: model. By default, as in MergeKit,
    each tensor has its own cut.

    Example:
        merge_method: ties
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {weight: 0.5, density: 0.5}
          - model: models/llama-ft2
            parameters: {weight: 0.3, density: 0.6}
    """

    per_tensor = frozenset({"weight", "normalize", "lambda"})

    weight: Array = per_model(required, doc="how much of each trimmed task vector goes in")
    density: Array = DENSITY
    normalize: bool = scalar(True, doc="divide each entry by the weights of the models that agree")
    rescale: bool | str = scalar(False, words=("density",), doc=RESCALE_DOC)
    lambda_: float = LAMBDA
    granularity: str = CUT_OVER

    @reduce(KthLargest, uses=("density",), when=lambda method: bool((method.density < 1.0).any()))
    def cut(self, deltas: Array, size: int) -> tuple[Array, Array]:
        return abs(deltas), counts_to_keep(self.density, size)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def whole(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(Sum, uses=(), when=lambda method: method.rescale is True)
    def kept(self, deltas: Array, cut: Cut | None, uniform: Array) -> Array:
        return abs(trim(deltas, cut, uniform))

    @derive
    def factors(self, whole: Array, kept: Array) -> Array:
        """What each trimmed task vector is multiplied by, [n, 1]."""
        return rescale_factors(self.rescale, self.density, whole, kept)

    def tile(self, base: Array, deltas: Array, cut: Cut | None, uniform: Array, factors: Array) -> Array:
        kept = trim(deltas, cut, uniform)
        mixed = combine(kept, self.weight, factors=factors, elected=True, normalize=self.normalize)
        return add_to_base(base, mixed, self.lambda_)
