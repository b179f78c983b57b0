"""Localize-and-Stitch without data: the largest entries of each task vector, averaged where they overlap."""

from __future__ import annotations

from smelt.methods.api import Array, Grain, KthLargest, Method, per_model, reduce, register
from smelt.methods.ram import average_active
from smelt.methods.selection import Cut
from smelt.methods.stages import LAMBDA, OVER, add_to_base, counts_to_keep, cut_rows, trim


@register("localize", source="He et al. 2024, Localize-and-Stitch, arXiv:2408.13656, without data")
class Localize(Method):
    """Keep a small region of each task vector, its largest entries, and stitch the regions into the base.

    Equation:
        M_i = the max(1, floor(density_i · N)) largest of abs(d_i), without those that are 0
        y = b + lambda · Σ M_i ⊙ d_i / Σ M_i        (b where no region is)

    Use it for fine-tunes on different tasks: a few percent of a task vector hold most of a skill, regions that small
    hardly meet, and all other entries stay those of the base. A density of 0.01 to 0.1 is common.

    Note: one region per tensor, per row (last dimension) with granularity: row, or as in the paper one for the whole
    model with granularity: model. With data the paper learns the regions, which is not done here. It has no lambda: 1
    is the paper's. Entries that equal the cut are kept with the probability that fills the count.

    Example:
        merge_method: localize
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
            parameters: {density: 0.05}
          - model: models/llama-ft2
            parameters: {density: 0.1}
    """

    per_tensor = frozenset({"lambda"})

    density: Array = per_model(0.05, doc="share of entries in a model's region; 1 or more is all, 0 or less none")
    lambda_: float = LAMBDA
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.granularity == "row" else Grain.ELEMENT

    @reduce(
        KthLargest,
        uses=("density",),
        when=lambda method: method.grain is not Grain.ROW and bool((method.density < 1.0).any()),
    )
    def cut(self, deltas: Array, size: int) -> tuple[Array, Array]:
        return abs(deltas), counts_to_keep(self.density, size)

    def tile(self, base: Array, deltas: Array, cut: Cut | None, uniform: Array) -> Array:
        if self.grain is Grain.ROW:
            cut = cut_rows(abs(deltas), counts_to_keep(self.density, deltas.shape[-1]))
        return add_to_base(base, average_active(trim(deltas, cut, uniform), 0.0, None), self.lambda_)
