"""Shared steps of which methods are composed: trim, band, drop, elect, rescale.

All work on tiles: `vectors` and `deltas` float32 [n, ...], `base` float32 [...]. Sums over models are taken in the
order of the models, in float64, and rounded to float32 once; so a result depends neither on the shape of the tile nor
on how a library adds.
"""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array
from smelt.methods.fields import per_model, scalar
from smelt.methods.selection import Cut, band_shares, to_grid

TINY = 1e-8
"""Divisors smaller than this count as 1."""


LAMBDA = scalar(1.0, name="lambda", doc="factor on the merged task vector before it is added to the base")
DENSITY = per_model(1.0, doc="share of entries kept; 1 or more keeps all, 0 or less none")
CUT_OVER = scalar(
    "tensor",
    words=("tensor", "model"),
    doc="over what entries are ranked and norms taken: each tensor for itself, or the whole model",
)
OVER = scalar(
    "tensor",
    words=("tensor", "row", "model"),
    doc="over what it is worked out: each tensor for itself, each row (last dimension), or the whole model",
)
ANGLE_OVER = scalar(
    "tensor",
    words=("tensor", "model"),
    doc="over what angles and norms are taken: each tensor for itself, or the whole model",
)
RESCALE_DOC = (
    "true: scale what is kept so that each task vector keeps its L1 norm; density: divide it by the density, as the "
    "DARE paper does; false: leave it"
)


def weighted_sum(vectors: Array, coefficients: Array, *, start: Array | None = None) -> Array:
    """start + Σ_i c_i v_i: vectors float32 [n, ...], coefficients float64 [n, ...] -> float32 [...]."""
    xp = array_namespace(vectors)
    total = coefficients[0] * xp.astype(vectors[0], xp.float64)
    for i in range(1, vectors.shape[0]):
        total += coefficients[i] * xp.astype(vectors[i], xp.float64)  # torch would let one coefficient yield to float32
    if start is not None:
        total += start
    return xp.astype(total, xp.float32)


def divisor(weight: Array) -> float:
    """Σ w_i as a divisor: 1 where it is nearly zero."""
    total = float(sum(float(w) for w in weight.reshape(-1)))
    return total if abs(total) >= TINY else 1.0


def counts_to_keep(density: Array, size: int) -> Array:
    """K_i = max(1, floor(density_i · N)) entries; all where density ≥ 1, none where it is ≤ 0. int64 [n]."""
    xp = array_namespace(density)
    share = xp.reshape(density, (-1,))
    count = _floor_share(share, size)
    return xp.where((share > 0.0) & (count < 1), xp.ones_like(count), count)


def band_counts(density: Array, gamma: Array, size: int) -> Array:
    """How many entries lie above each end of the band that is kept: T_i, T_i + K_i. int64 [n, 2].

    K_i = floor(density_i · N) (all where density ≥ 1, none where it is ≤ 0), T_i = min(floor(gamma_i · N), N − K_i).
    """
    xp = array_namespace(density)
    count = _floor_share(xp.reshape(density, (-1,)), size)
    top = _floor_share(xp.reshape(gamma, (-1,)), size)
    top = xp.where(top > size - count, size - count, top)
    return xp.stack([top, top + count], axis=1)


def _floor_share(share: Array, size: int) -> Array:
    """floor(share · N) as int64, between 0 and N."""
    xp = array_namespace(share)
    inside = xp.where(share >= 1.0, xp.ones_like(share), xp.where(share <= 0.0, xp.zeros_like(share), share))
    return xp.astype(xp.floor(inside * float(size)), xp.int64)


def trim(deltas: Array, cut: Cut | None, uniform: Array) -> Array:
    """Keep the entries whose magnitude is above the cut, and of those that equal it the share that fills the count.

    Where many magnitudes equal the cut, each is kept with probability `cut.share`: no region is favoured.
    """
    if cut is None:
        return deltas
    xp = array_namespace(deltas)
    return xp.where(above_cut(xp.abs(deltas), cut, uniform), deltas, xp.zeros_like(deltas))


def above_cut(numbers: Array, cut: Cut, uniform: Array) -> Array:
    """Which numbers are above the cut (NaN is), or equal it and are among the share of these that fills the count."""
    return ~(numbers <= cut.value) | ((numbers == cut.value) & (uniform < cut.share))


def cut_rows(numbers: Array, counts: Array) -> Cut:
    """In each row, the cut that keeps the count largest: numbers [n, rows, width], counts [n] -> all [n, rows, 1].

    Counts [n, k] give k cuts, [n, rows, k]. As KthLargest gives it for a whole tensor; NaN is larger than all.
    """
    xp = array_namespace(numbers)
    ordered = xp.sort(numbers, axis=-1)
    cuts = [_cut_of_rows(numbers, ordered, column) for column in _columns(counts)]
    return Cut(*(xp.concat([getattr(cut, part) for cut in cuts], axis=-1) for part in Cut.__slots__))


def _columns(counts: Array) -> list[Array]:
    """Counts [n] or [n, k] as k arrays [n]."""
    return [counts] if counts.ndim == 1 else [counts[:, k] for k in range(counts.shape[1])]


def _cut_of_rows(numbers: Array, ordered: Array, counts: Array) -> Cut:
    xp = array_namespace(numbers)
    width = numbers.shape[-1]
    count = xp.reshape(xp.clip(counts, 0, width), (-1, 1, 1)) + xp.zeros((*numbers.shape[:-1], 1), dtype=xp.int64)
    place = width - xp.where(count > 0, count, xp.ones_like(count))
    none = count <= 0
    value = xp.take_along_axis(ordered, place, axis=-1)
    value = xp.where(none, xp.full_like(value, xp.inf), value)
    above = xp.sum(~(numbers <= value), axis=-1, keepdims=True, dtype=xp.int64)
    equal = xp.sum(numbers == value, axis=-1, keepdims=True, dtype=xp.int64)
    above, equal = xp.where(none, xp.zeros_like(above), above), xp.where(none, xp.zeros_like(equal), equal)
    return Cut(value, to_grid((count - above) / xp.where(equal > 0, equal, xp.ones_like(equal))), count, above, equal)


def band(deltas: Array, cut: Cut | None, uniform: Array) -> Array:
    """Keep the entries whose rank by magnitude lies between the two cuts, [n, 2] or [n, rows, 2], of `band_counts`.

    Of E entries that equal a cut, of which O belong inside the band, each is kept with probability O/E; so too where
    both cuts fall on one magnitude.
    """
    if cut is None:
        return deltas
    xp = array_namespace(deltas)
    shares = band_shares(cut)
    high, low = cut.value[..., :1], cut.value[..., 1:]
    magnitude = xp.abs(deltas)
    between = (magnitude < high) | ((magnitude == high) & (uniform < shares[..., :1]))
    keep = xp.where(magnitude == low, uniform < shares[..., 1:], (magnitude > low) & between)
    return xp.where(keep | xp.isnan(magnitude), deltas, xp.zeros_like(deltas))  # a NaN is not cut away unseen


def drop(deltas: Array, density: Array, uniform: Array) -> Array:
    """Keep each entry with probability `density`, whatever its size."""
    xp = array_namespace(deltas)
    return xp.where(uniform < density, deltas, xp.zeros_like(deltas))


def l1_factors(whole: Array, kept: Array) -> Array:
    """‖d_i‖₁ / ‖kept_i‖₁ per model, float64 [n]; 1 where either norm is below 1e-7 or not finite."""
    xp = array_namespace(whole)
    usable = (whole >= 1e-7) & (kept >= 1e-7) & xp.isfinite(whole) & xp.isfinite(kept)
    ones = xp.ones_like(whole)
    return xp.where(usable, whole / xp.where(usable, kept, ones), ones)


def rescale_factors(rescale: bool | str, density: Array, whole: Array, kept: Array) -> Array | None:
    """What each task vector is multiplied by, [n, 1, ...]: None (false), L1 match (true), 1 / density ("density")."""
    if rescale is True:
        return array_namespace(whole).reshape(l1_factors(whole, kept), density.shape)
    if rescale == "density":
        xp = array_namespace(density)
        usable = (density > 0.0) & (density < 1.0)
        return xp.where(usable, 1.0 / xp.where(usable, density, xp.ones_like(density)), xp.ones_like(density))
    return None


def combine(vectors: Array, weight: Array, *, factors: Array | None, elected: bool, normalize: bool) -> Array:
    """Mix weighted vectors per entry: float32 [n, ...] -> float64 [...].

    W_i = w_i f_i v_i. Not elected: Σ W_i, divided (normalize) by Σ w_i. Elected: the sign is + where Σ W_i ≥ 0, else −;
    Σ of the W_i that agree with it, divided (normalize) by the Σ of their w_i. A zero agrees with neither sign.
    """
    xp = array_namespace(vectors)
    scale = weight if factors is None else weight * factors
    weighted = [scale[i] * xp.astype(vectors[i], xp.float64) for i in range(vectors.shape[0])]
    total = weighted[0]
    for value in weighted[1:]:
        total = total + value
    if not elected:
        return total / divisor(weight) if normalize else total
    positive = total >= 0
    mixed = xp.zeros_like(total)
    agreeing = xp.zeros_like(total)
    for i, value in enumerate(weighted):
        agrees = xp.where(positive, ~(value <= 0), ~(value >= 0))  # so that a NaN is not voted away
        mixed = xp.where(agrees, mixed + value, mixed)
        if normalize:
            agreeing = xp.where(agrees, agreeing + weight[i], agreeing)
    if normalize:
        mixed = mixed / xp.where(xp.abs(agreeing) < TINY, xp.ones_like(agreeing), agreeing)
    return mixed


def add_to_base(base: Array, mixed: Array, factor: float) -> Array:
    """b + λ · mixed, rounded once to float32."""
    xp = array_namespace(base)
    return xp.astype(base + factor * mixed, xp.float32)
