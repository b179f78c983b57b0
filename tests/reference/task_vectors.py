"""Task arithmetic and its kin: sparsify each delta, weigh, elect a sign or not, add to the base.

Every method here is one of four ways to sparsify a delta, followed by one of two ways to combine them:

    task_arithmetic                 nothing                              weighted sum
    ties                            largest magnitudes (`trim`)          election
    dare_linear, dare_ties          chance (`drop`)                      weighted sum, election
    breadcrumbs, breadcrumbs_ties   a band of magnitudes (`band`)        weighted sum, election
    della_linear, della             chance by rank (`prune_by_rank`)     weighted sum, election

density >= 1 keeps all of a delta and <= 0 nothing, whatever the other settings are. Counts are floor(density
* N), the product taken in float64. `int8_mask` is accepted everywhere and does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from reference.inputs import Array, Base, Models, column, deltas64, per_model, rows, safe_divisor, tensor64
from reference.keep import Keep, keep_ranks, uniform

Rescale = bool | Literal["density"]


# The four ways to sparsify one delta.


def trim(delta: Array, density: float, *, keep: Keep | None, model_index: int) -> Array:
    """Keep the max(1, floor(density N)) entries of largest magnitude; equals at the cut as in `keep_ranks`."""
    if density >= 1.0:
        return delta
    count = max(1, math.floor(density * delta.size)) if density > 0.0 else 0
    kept = keep_ranks(np.abs(delta), first=0, count=count, keep=keep, model_index=model_index)
    return np.where(kept, delta, 0.0)


def band(delta: Array, density: float, gamma: float, *, keep: Keep | None, model_index: int) -> Array:
    """Drop the floor(gamma N) largest, then the smallest until floor(density N) remain.

    In ranks, largest first: top = floor(gamma N) and count = floor(density N); if top + count > N the top
    shrinks to N - count. What is kept are the ranks [top, top + count). Entries equal to a cut are decided by
    `keep_ranks`: at the upper cut (the magnitude of rank top - 1 and of rank top are equal) each of the E
    equals is kept when uniform < (G + E - top) / E, at the lower cut when uniform < (top + count - G) / E,
    and when both cuts fall on the same magnitude when uniform < count / E; G counts the entries strictly
    larger. All three use the same uniform number of the entry. Unlike ties, count may be 0.
    """
    if density >= 1.0:
        return delta
    count = math.floor(density * delta.size) if density > 0.0 else 0
    top = min(max(math.floor(gamma * delta.size), 0), delta.size - count)
    kept = keep_ranks(np.abs(delta), first=top, count=count, keep=keep, model_index=model_index)
    return np.where(kept, delta, 0.0)


class _OfRow:
    """The random decisions of one row of a tensor."""

    def __init__(self, keep: Keep | None, shape: tuple[int, ...], row: int) -> None:
        self._keep, self._shape, self._row = keep, shape, row

    def uniform(self, model_index: int, shape: tuple[int, ...], /) -> Array:
        return rows(uniform(self._keep, model_index, self._shape))[self._row].reshape(shape)


def _band_of_rows(delta: Array, density: float, gamma: float, *, keep: Keep | None, model_index: int) -> Array:
    """`band` of each row along the last dimension."""
    kept = [
        band(row, density, gamma, keep=_OfRow(keep, delta.shape, number), model_index=model_index)
        for number, row in enumerate(rows(delta))
    ]
    return np.asarray(kept).reshape(delta.shape)


def drop(delta: Array, density: float, *, keep: Keep | None, model_index: int) -> Array:
    """Keep each entry where uniform < density."""
    if density >= 1.0:
        return delta
    if density <= 0.0 or not delta.size:
        return np.zeros_like(delta)
    return np.where(uniform(keep, model_index, delta.shape) < density, delta, 0.0)


def prune_by_rank(delta: Array, density: float, epsilon: float, *, keep: Keep | None, model_index: int) -> Array:
    """Keep each entry where uniform < p, p rising with the rank of its magnitude in its row.

    Ranks run from 0 (smallest) to L - 1 (largest) along the last dimension, and equal magnitudes share the
    mean of their ranks, so that neither order nor position matters; p = density - epsilon + 2 epsilon rank /
    (L - 1), and p = density in a row of one. The mean of p over a row is the density. ValueError unless 0 <
    density - epsilon and density + epsilon < 1.
    """
    if density >= 1.0:
        return delta
    if density <= 0.0:
        return np.zeros_like(delta)
    if density - epsilon <= 0.0 or density + epsilon >= 1.0:
        raise ValueError(f"della: density {density} -/+ epsilon {epsilon} must lie between 0 and 1")
    if not delta.size:
        return delta
    probability = np.stack([_rank_probability(row, density, epsilon) for row in rows(np.abs(delta))])
    return np.where(uniform(keep, model_index, delta.shape) < probability.reshape(delta.shape), delta, 0.0)


def _rank_probability(row: Array, density: float, epsilon: float) -> Array:
    """The keep probability of each magnitude of one row."""
    if row.size == 1:
        return np.full(1, density)
    ordered = np.sort(row)
    smaller = np.searchsorted(ordered, row, side="left")
    not_larger = np.searchsorted(ordered, row, side="right")
    rank = (smaller + not_larger - 1) / 2
    return np.asarray(density - epsilon + 2.0 * epsilon * rank / (row.size - 1))


def rescaled(kept: Array, delta: Array, density: float, rescale: Rescale) -> Array:
    """What was kept, made as strong as the whole.

    True: times sum |delta| / sum |kept|, unless either sum is below 1e-7. "density": divided by the density,
    unless all or nothing was kept (density >= 1 or <= 0).
    """
    if rescale == "density":
        return kept / density if 0.0 < density < 1.0 else kept
    if not rescale:
        return kept
    before, after = float(np.sum(np.abs(delta))), float(np.sum(np.abs(kept)))
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


# The two ways to combine them.


def weighted_sum(kept: Array, weight: Sequence[float], *, normalize: bool) -> Array:
    """sum_i w_i kept_i, divided by sum_i w_i if `normalize` (a divisor below 1e-8 counts as 1)."""
    total = np.sum(column(weight, kept.ndim - 1) * kept, axis=0)
    return np.asarray(total / safe_divisor(np.asarray(sum(weight))) if normalize else total)


def election(kept: Array, weight: Sequence[float], *, normalize: bool) -> Array:
    """Per entry, the sum of those W_i = w_i kept_i that have the sign of sum_i W_i (plus where that is >= 0).

    If `normalize`, divided by the sum of their w_i (1 where below 1e-8). A zero entry agrees with neither
    sign.
    """
    w = column(weight, kept.ndim - 1)
    weighted = w * kept
    elected = np.where(np.sum(weighted, axis=0) >= 0.0, 1.0, -1.0)
    agrees = np.sign(weighted) == elected
    total = np.sum(np.where(agrees, weighted, 0.0), axis=0)
    return np.asarray(total / safe_divisor(np.sum(np.where(agrees, w, 0.0), axis=0)) if normalize else total)


# The methods.


def task_arithmetic(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    density: Sequence[float] | None = None,
    rescale: Rescale = False,
    int8_mask: bool = False,
) -> Array:
    """b + lambda sum_i w_i d_i (divided by sum_i w_i if normalize); density and rescale have no effect."""
    d = deltas64(models, base, "task_arithmetic")
    w = per_model(weight, 1.0, len(d), "weight")
    return np.asarray(tensor64(base, "task_arithmetic") + lambda_ * weighted_sum(d, w, normalize=normalize))


def ties(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    granularity: str = "tensor",
) -> Array:
    """b + lambda election(trimmed deltas)."""
    d = deltas64(models, base, "ties")
    w, rho = per_model(weight, 1.0, len(d), "weight"), per_model(density, 1.0, len(d), "density")
    kept = [trim(d[i], rho[i], keep=keep, model_index=i) for i in range(len(d))]
    kept = [rescaled(kept[i], d[i], rho[i], rescale) for i in range(len(d))]
    return np.asarray(tensor64(base, "ties") + lambda_ * election(np.stack(kept), w, normalize=normalize))


def dare_linear(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Array:
    """b + lambda weighted_sum(deltas dropped by chance)."""
    kept, w = _dropped(models, base, keep, weight, density, rescale)
    return np.asarray(tensor64(base, "dare_linear") + lambda_ * weighted_sum(kept, w, normalize=normalize))


def dare_ties(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Array:
    """b + lambda election(deltas dropped by chance)."""
    kept, w = _dropped(models, base, keep, weight, density, rescale)
    return np.asarray(tensor64(base, "dare_ties") + lambda_ * election(kept, w, normalize=normalize))


def breadcrumbs(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    gamma: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    granularity: str = "tensor",
) -> Array:
    """b + lambda weighted_sum(deltas without their largest and smallest entries)."""
    kept, w = _banded(models, base, keep, weight, density, gamma, rescale, granularity)
    return np.asarray(tensor64(base, "breadcrumbs") + lambda_ * weighted_sum(kept, w, normalize=normalize))


def breadcrumbs_ties(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    gamma: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    granularity: str = "tensor",
) -> Array:
    """b + lambda election(deltas without their largest and smallest entries)."""
    kept, w = _banded(models, base, keep, weight, density, gamma, rescale, granularity)
    return np.asarray(tensor64(base, "breadcrumbs_ties") + lambda_ * election(kept, w, normalize=normalize))


def della(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    epsilon: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Array:
    """b + lambda election(deltas dropped by chance, small ones sooner)."""
    kept, w = _pruned(models, base, keep, weight, density, epsilon, rescale)
    return np.asarray(tensor64(base, "della") + lambda_ * election(kept, w, normalize=normalize))


def della_linear(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    epsilon: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Array:
    """b + lambda weighted_sum(deltas dropped by chance, small ones sooner)."""
    kept, w = _pruned(models, base, keep, weight, density, epsilon, rescale)
    return np.asarray(tensor64(base, "della_linear") + lambda_ * weighted_sum(kept, w, normalize=normalize))


def _dropped(
    models: Models,
    base: Base,
    keep: Keep | None,
    weight: Sequence[float],
    density: Sequence[float] | None,
    rescale: Rescale,
) -> tuple[Array, list[float]]:
    """DARE's kept deltas [n, *shape] and the weights."""
    d = deltas64(models, base, "dare")
    rho = per_model(density, 1.0, len(d), "density")
    kept = [drop(d[i], rho[i], keep=keep, model_index=i) for i in range(len(d))]
    kept = [rescaled(kept[i], d[i], rho[i], rescale) for i in range(len(d))]
    return np.stack(kept), per_model(weight, 1.0, len(d), "weight")


def _banded(
    models: Models,
    base: Base,
    keep: Keep | None,
    weight: Sequence[float],
    density: Sequence[float] | None,
    gamma: Sequence[float] | None,
    rescale: Rescale,
    granularity: str,
) -> tuple[Array, list[float]]:
    """Breadcrumbs' kept deltas [n, *shape] and the weights; a band of each row with granularity "row"."""
    d = deltas64(models, base, "breadcrumbs")
    rho, top = per_model(density, 1.0, len(d), "density"), per_model(gamma, 0.01, len(d), "gamma")
    cut = _band_of_rows if granularity == "row" else band
    kept = [cut(d[i], rho[i], top[i], keep=keep, model_index=i) for i in range(len(d))]
    kept = [rescaled(kept[i], d[i], rho[i], rescale) for i in range(len(d))]
    return np.stack(kept), per_model(weight, 1.0, len(d), "weight")


def _pruned(
    models: Models,
    base: Base,
    keep: Keep | None,
    weight: Sequence[float],
    density: Sequence[float] | None,
    epsilon: Sequence[float] | None,
    rescale: Rescale,
) -> tuple[Array, list[float]]:
    """DELLA's kept deltas [n, *shape] and the weights."""
    d = deltas64(models, base, "della")
    rho, spread = per_model(density, 1.0, len(d), "density"), per_model(epsilon, 0.15, len(d), "epsilon")
    kept = [prune_by_rank(d[i], rho[i], spread[i], keep=keep, model_index=i) for i in range(len(d))]
    kept = [rescaled(kept[i], d[i], rho[i], rescale) for i in range(len(d))]
    return np.stack(kept), per_model(weight, 1.0, len(d), "weight")
