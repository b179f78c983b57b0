"""PCB: weigh every entry of every model by how much it matters there and how well it agrees with the others."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Grain, Method, Sum, derive, per_model, reduce, register
from smelt.methods.reducers import Extremes
from smelt.methods.selection import Cut, KthLargest64
from smelt.methods.stages import LAMBDA, OVER, above_cut, add_to_base, counts_to_keep, cut_rows


@register("pcb", source="Du et al. 2024, Parameter competition balancing, arXiv:2410.02396, section 3")
class Pcb(Method):
    """Average the task vectors with a weight for each entry: its size in the model times its agreement with the others.

    Equation:
        norm(v) = (v − min v) / (max v − min v)        (0 where all are equal),   over the tensor
        intra_i = softmax(n · norm(d_i ⊙ d_i)),   inter_i = Σ_j softmax(norm(d_i ⊙ d_j))
        β_i = intra_i ⊙ inter_i, kept for the max(1, floor(density_i · N)) largest, 0 elsewhere
        y = b + lambda · Σ β_i ⊙ d_i / Σ β_i            (b where no β is left)

    Use it for fine-tunes that compete for the same entries, where one weight per model is too coarse; a density near
    0.1 and a lambda near 1 are common.

    Note: one scale per tensor, per row (last dimension) with granularity: row, or as in the paper one for the whole
    model with granularity: model. The authors' program differs from the paper's equations (tanh for one softmax,
    clamped tails); here are the equations. Entries that equal a cut are kept with the probability that fills the count;
    an entry that is NaN or infinite is kept, and gives all products with it the same share.

    Example:
        merge_method: pcb
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {density: 0.2, lambda: 0.9}
    """

    per_tensor = frozenset({"lambda"})

    density: Array = per_model(0.1, doc="share of entries kept, by their β; 1 or more keeps all, 0 or less none")
    lambda_: float = LAMBDA
    granularity: str = OVER

    @property
    def grain(self) -> Grain:
        return Grain.ROW if self.granularity == "row" else Grain.ELEMENT

    @reduce(Extremes, uses=(), when=lambda method: method.grain is not Grain.ROW)
    def ranges(self, deltas: Array) -> Array:
        return products(deltas)

    @reduce(Sum, uses=(), when=lambda method: method.grain is not Grain.ROW)
    def sums(self, deltas: Array, ranges: Array) -> Array:
        return powers(deltas, *_columns(ranges))

    @reduce(
        KthLargest64,
        uses=("density",),
        when=lambda method: method.grain is not Grain.ROW and bool((method.density < 1.0).any()),
    )
    def cut(self, deltas: Array, ranges: Array, sums: Array, size: int) -> tuple[Array, Array]:
        return scores(powers(deltas, *_columns(ranges)), sums[:, None]), counts_to_keep(self.density, size)

    @derive
    def scales(self, ranges: Array, sums: Array) -> tuple[Array, Array, Array] | None:
        return None if ranges is None else (*_columns(ranges), sums[:, None])

    def tile(
        self, base: Array, deltas: Array, scales: tuple[Array, Array, Array] | None, cut: Cut | None, uniform: Array
    ) -> Array:
        xp = array_namespace(deltas)
        if scales is None:
            pairs = products(deltas)
            low, high = xp.min(pairs, axis=-1, keepdims=True), xp.max(pairs, axis=-1, keepdims=True)
            parts = powers(deltas, low, high)
            weights = scores(parts, xp.sum(parts, axis=-1, keepdims=True))
            cut = cut_rows(weights, counts_to_keep(self.density, deltas.shape[-1]))
        else:
            low, high, sums = scales
            weights = scores(powers(deltas, low, high), sums)
        if cut is not None:
            kept = above_cut(weights, cut, uniform) | ~xp.isfinite(deltas)
            weights = xp.where(kept, weights, xp.zeros_like(weights))
        total, divisor = xp.zeros_like(weights[0]), xp.zeros_like(weights[0])
        for i in range(self.n):
            total = xp.where(weights[i] > 0.0, total + weights[i] * deltas[i], total)
            divisor = divisor + weights[i]
        return add_to_base(base, total / xp.where(divisor > 0.0, divisor, xp.ones_like(divisor)), self.lambda_)


def _columns(ranges: Array) -> tuple[Array, Array]:
    """Least and largest products of the tensor, each [pairs, 1]."""
    return ranges[0][:, None], ranges[1][:, None]


def products(deltas: Array) -> Array:
    """d_i ⊙ d_j for i ≤ j, in float64: [n, ...] -> [n (n + 1) / 2, ...]."""
    xp = array_namespace(deltas)
    wide = xp.astype(deltas, xp.float64)
    n = wide.shape[0]
    return xp.stack([wide[i] * wide[j] for i in range(n) for j in range(i, n)])


def powers(deltas: Array, low: Array, high: Array) -> Array:
    """What softmax divides by its sum: exp(n norm(d_i ⊙ d_i)) for each i, then exp(norm(d_i ⊙ d_j)) for i ≤ j.

    Each is divided by e to its largest exponent, which changes no share. low and high [pairs, 1] or [pairs, rows, 1].
    """
    xp = array_namespace(deltas)
    n = deltas.shape[0]
    pairs = products(deltas)
    usable = xp.isfinite(high - low) & (high > low)
    width = xp.where(usable, high - low, xp.ones_like(low))
    norm = xp.where(usable, (pairs - low) / width, xp.zeros_like(pairs))
    inter = xp.exp(norm - 1.0)
    intra = [xp.exp(n * (norm[_pair(i, i, n)] - 1.0)) for i in range(n)]
    return xp.concat([xp.stack(intra), inter])


def scores(parts: Array, sums: Array) -> Array:
    """β_i, [n, ...]: the softmax of the model's own squares times the sum of those of its products with all models."""
    xp = array_namespace(parts)
    n = int(((9 + 8 * parts.shape[0]) ** 0.5 - 3) / 2)  # n + n (n + 1) / 2 parts
    shares = parts / sums
    found = []
    for i in range(n):
        agreement = xp.zeros_like(shares[0])
        for j in range(n):
            agreement = agreement + shares[n + _pair(min(i, j), max(i, j), n)]
        found.append(shares[i] * agreement)
    return xp.stack(found)


def _pair(i: int, j: int, n: int) -> int:
    """The place of (i, j), i ≤ j, among the pairs in order."""
    return i * n - i * (i - 1) // 2 + j - i
