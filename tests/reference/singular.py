"""iso_c, iso_cts, tsv, wudi: methods that work on the singular directions of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reference.inputs import Array, Base, Models, column, deltas64, per_model, tensor64
from reference.keep import Keep, uniform

Triplets = tuple[Array, Array, Array]


def iso_c(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    decompose: bool = True,
    rank: int = 0,
    randomized: bool = False,
    oversampling: int = 10,
    power: int = 2,
) -> Array:
    """b + lambda mean(s) U V^T, U diag(s) V^T being sum_i w_i d_i (its first `rank` directions)."""
    b, d = tensor64(base, "iso_c"), _scaled(models, base, weight, "iso_c")
    if b.ndim != 2 or not decompose:
        return np.asarray(b + lambda_ * np.mean(d, axis=0))
    how = _How(keep, randomized, oversampling, power)
    u, s, vt = how.leading(np.sum(d, axis=0), _whole(b, rank), 0)
    return np.asarray(b + (lambda_ * np.mean(s) * (u @ vt) if s.size else 0.0))


def iso_cts(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float] | None = None,
    common: float = 0.8,
    lambda_: float = 1.0,
    decompose: bool = True,
    rank: int = 0,
    randomized: bool = False,
    oversampling: int = 10,
    power: int = 2,
) -> Array:
    """iso_c with r - n s directions of the sum and s = round((r - floor(common r)) / n) of each task, orthogonal."""
    b, d = tensor64(base, "iso_cts"), _scaled(models, base, weight, "iso_cts")
    if b.ndim != 2 or not decompose:
        return np.asarray(b + lambda_ * np.mean(d, axis=0))
    how = _How(keep, randomized, oversampling, power)
    r, n = _whole(b, rank), len(d)
    own = min(round((r - int(common * r)) / n), r // n)
    shared = how.leading(np.sum(d, axis=0), r - n * own, 0)
    parts = [shared]
    for i in range(n if own else 0):
        rest = d[i] - shared[0] @ (shared[0].T @ d[i])
        u, s, vt = how.leading(rest, own, i)
        real = s > np.linalg.norm(d[i]) * max(b.shape) * 2.0**-23  # not what the projection left by rounding
        parts.append((u[:, real], s[real], vt[real]))
    s = np.concatenate([part[1] for part in parts])
    return np.asarray(b + (lambda_ * np.mean(s) * _orthogonal(parts, np.ones_like(s)) if s.size else 0.0))


def tsv(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    decompose: bool = True,
    rank: int = 0,
    randomized: bool = False,
    oversampling: int = 10,
    power: int = 2,
) -> Array:
    """b + lambda U* diag(s) V*^T from the first max(1, floor(r / n)) directions of each w_i d_i, orthogonalised."""
    b, d = tensor64(base, "tsv"), _scaled(models, base, weight, "tsv")
    if b.ndim != 2 or not decompose:
        return np.asarray(b + lambda_ * np.mean(d, axis=0))
    how = _How(keep, randomized, oversampling, power)
    own = max(1, _whole(b, rank) // len(d))
    parts = [how.leading(d[i], own, i) for i in range(len(d))]
    s = np.concatenate([part[1] for part in parts])
    return np.asarray(b + (lambda_ * _orthogonal(parts, s) if s.size else 0.0))


def wudi(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    lambda_: float = 1.0,
    ridge: float = 0.1,
    decompose: bool = True,
) -> Array:
    """b + lambda argmin_t sum_i |(t - d_i) d_i^T|^2 / |d_i|^2 + rho |t - sum_i d_i|^2, the shortest such t.

    A least-squares problem for each row of t: t S^T = (d_i S_i^T), S_i = d_i / |d_i| and S all S_i below each other,
    and below them sqrt(rho) t = sqrt(rho) sum_i d_i. rho = ridge n / columns.
    """
    b, d = tensor64(base, "wudi"), deltas64(models, base, "wudi")
    if b.ndim != 2 or not decompose:
        return np.asarray(b + lambda_ * np.mean(d, axis=0))
    if not b.size:
        return b
    lengths = [float(np.linalg.norm(v)) for v in d]
    root = math.sqrt(ridge * len(d) / b.shape[1])
    parts = [v / (length or 1.0) for v, length in zip(d, lengths, strict=True)]
    s = np.concatenate([*parts, root * np.eye(b.shape[1])])
    wanted = np.concatenate([*(v @ part.T for v, part in zip(d, parts, strict=True)), root * np.sum(d, axis=0)], axis=1)
    inverse = np.linalg.pinv(s, rcond=len(d) * max(b.shape) * 2.0**-23)
    return np.asarray(b + lambda_ * wanted @ inverse.T)


class _How:
    """How leading singular triplets are found."""

    def __init__(self, keep: Keep | None, randomized: bool, oversampling: int, power: int) -> None:
        self.keep, self.randomized, self.oversampling, self.power = keep, randomized, oversampling, power

    def leading(self, a: Array, count: int, model_index: int) -> Triplets:
        """The first `count`, without those that are rounding alone."""
        width = count + self.oversampling
        if self.randomized and 2 * width < min(a.shape):
            u, s, vt = self._sketched(a, width, uniform(self.keep, model_index, a.shape))
        else:
            u, s, vt = np.linalg.svd(a, full_matrices=False)
        kept = min(count, _rank(s, max(a.shape)))
        return u[:, :kept], s[:kept], vt[:kept]

    def _sketched(self, a: Array, width: int, numbers: Array) -> Triplets:
        """Halko, Martinsson & Tropp 2011: the SVD of a within the range of (a a^T)^power a times Gaussian numbers."""
        one, two = numbers[:width], numbers[width : 2 * width]
        omega = (np.sqrt(-2.0 * np.log1p(-one)) * np.cos(2.0 * np.pi * two)).T
        q = np.linalg.qr(a @ omega)[0]
        for _ in range(self.power):
            q = np.linalg.qr(a @ np.linalg.qr(a.T @ q)[0])[0]
        u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
        return q @ u, s, vt


def _scaled(models: Models, base: Base, weight: Sequence[float] | None, method: str) -> Array:
    """w_i d_i, [n, *shape]."""
    d = deltas64(models, base, method)
    return np.asarray(column(per_model(weight, 1.0, len(d), "weight"), d.ndim - 1) * d)


def _whole(b: Array, rank: int) -> int:
    return min(rank or min(b.shape), *b.shape)


def _rank(s: Array, side: int) -> int:
    """How many singular values of float32 differences are more than rounding."""
    return int(np.sum(s > s[0] * side * 2.0**-23)) if s.size and s[0] > 0 else 0


def _orthogonal(parts: Sequence[Triplets], s: Array) -> Array:
    """U* diag(s) V*^T, U* and V* the polar factors of all U and all V side by side."""
    return np.asarray(
        (_polar(np.concatenate([part[0] for part in parts], axis=1)) * s)
        @ _polar(np.concatenate([part[2] for part in parts], axis=0))
    )


def _polar(a: Array) -> Array:
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    kept = _rank(s, max(a.shape))
    return u[:, :kept] @ vt[:kept]
