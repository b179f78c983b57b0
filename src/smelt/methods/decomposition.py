"""Singular vectors as shared steps: exact and randomised, polar factors, what counts as rank, and what it all costs.

Matrices are float64 [m, n]; r is min(m, n). The engine runs these on one thread for each tensor, so that the bits do
not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from array_api_compat import array_namespace

from smelt.methods.api import Array, Cost
from smelt.methods.fields import scalar

DECOMPOSE = scalar(True, doc="false: a matrix gets the mean as other tensors do; for embeddings and heads, say")
RANK = scalar(0, within="[0, inf)", doc="how many singular directions the merged task vector may have; 0 for all")
RANDOMIZED = scalar(False, doc="find leading directions by the randomised SVD, where it costs less than the exact one")
OVERSAMPLING = scalar(10, within="[2, inf)", doc="directions that the randomised SVD looks for beyond those it gives")
POWER = scalar(
    2, within="[0, inf)", doc="power iterations of the randomised SVD: each brings it nearer to the exact one"
)

_FLOAT32 = 2.0**-23


@dataclass(frozen=True, slots=True)
class Svd:
    """A = left · diag(values) · right: [m, k], [k] falling, [k, n], without directions that are rounding alone."""

    left: Array
    values: Array
    right: Array

    @property
    def rank(self) -> int:
        return int(self.values.shape[0])


class Settings(Protocol):
    """The fields of a method that say how leading directions are found."""

    randomized: bool
    oversampling: int
    power: int


def leading(matrix: Array, count: int, method: Settings, uniform: Array) -> Svd:
    """The `count` leading singular triplets (all that there are, if fewer), the way the method's settings say.

    `uniform` float32 [m, n]: random numbers for the randomised SVD.
    """
    width = count + method.oversampling
    if method.randomized and is_cheaper(matrix.shape, width):
        return first(randomised_svd(matrix, normal(uniform, width), power=method.power), count)
    return first(svd(matrix), count)


def is_cheaper(shape: tuple[int, ...], width: int) -> bool:
    """Whether the randomised SVD with so many columns is worth it: for less than half of the directions."""
    return 2 * width < min(shape)


def svd(matrix: Array) -> Svd:
    """The exact thin SVD, without directions below the precision of float32 task vectors: σ ≤ σ_1 max(m, n) 2⁻²³."""
    xp = array_namespace(matrix)
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    return first(Svd(left, values, right), rank_of(values, max(matrix.shape)))


def rank_of(values: Array, side: int) -> int:
    """How many of falling singular values of a matrix with this longer side are more than rounding."""
    xp = array_namespace(values)
    if not values.shape[0] or not float(values[0]) > 0.0:
        return 0
    return int(xp.sum(xp.astype(values > float(values[0]) * side * _FLOAT32, xp.int64)))


def first(found: Svd, count: int) -> Svd:
    """The first `count` triplets."""
    return Svd(found.left[:, :count], found.values[:count], found.right[:count, :])


def randomised_svd(matrix: Array, test: Array, *, power: int) -> Svd:
    """Halko, Martinsson & Tropp 2011, Algorithms 4.4 and 5.1: the SVD of A within the range of (A Aᵀ)^power A Ω.

    `test` Ω is Gaussian [n, k + p], p ≥ 2. With s = 2 power + 1, in the mean over Ω (Theorem 10.6, Corollary 10.10),
        E ‖A − Q Qᵀ A‖ ≤ ((1 + √(k / (p − 1))) σ_{k+1}^s + e √(k + p) / p · (Σ_{j>k} σ_j^{2s})^{1/2})^{1/s}
    in the spectral norm; `halko_bound` is its right side.
    """
    xp = array_namespace(matrix)
    basis, _ = xp.linalg.qr(matrix @ test, mode="reduced")
    for _ in range(power):
        across, _ = xp.linalg.qr(xp.matrix_transpose(matrix) @ basis, mode="reduced")
        basis, _ = xp.linalg.qr(matrix @ across, mode="reduced")
    inner = xp.matrix_transpose(basis) @ matrix
    left, values, right = xp.linalg.svd(inner, full_matrices=False)
    return first(Svd(basis @ left, values, right), rank_of(values, max(matrix.shape)))


def halko_bound(values: Array, count: int, *, oversampling: int, power: int) -> float:
    """The bound of `randomised_svd` on E ‖A − Q Qᵀ A‖ (spectral norm) from A's singular values, falling [r]."""
    xp = array_namespace(values)
    if count >= values.shape[0]:
        return 0.0
    exponent = 2 * power + 1
    scale = float(values[count])
    if scale == 0.0:
        return 0.0
    rest = float(xp.sum((values[count:] / scale) ** (2 * exponent)))  # the largest is 1: no power overflows
    nearest = 1.0 + math.sqrt(count / (oversampling - 1))
    tail = math.e * math.sqrt(count + oversampling) / oversampling * math.sqrt(rest)
    return float(scale * (nearest + tail) ** (1.0 / exponent))


def normal(uniform: Array, width: int) -> Array:
    """Gaussian numbers [n, width] from uniform ones [m, n], m ≥ 2 width (Box & Muller)."""
    xp = array_namespace(uniform)
    wide = xp.astype(uniform[: 2 * width, :], xp.float64)
    radius = xp.sqrt(-2.0 * xp.log(1.0 - wide[:width, :]))
    return xp.matrix_transpose(radius * xp.cos(2.0 * math.pi * wide[width:, :]))


def polar(matrix: Array) -> Array:
    """P Qᵀ of the SVD A = P D Qᵀ: the nearest matrix with orthonormal columns (or rows); rounding alone counts as 0."""
    found = svd(matrix)
    return found.left @ found.right


def together(parts: Sequence[Svd]) -> Svd:
    """All triplets of the parts, their directions made orthogonal to each other (`polar`)."""
    xp = array_namespace(parts[0].values)
    left = xp.concat([part.left for part in parts], axis=1)
    values = xp.concat([part.values for part in parts])
    right = xp.concat([part.right for part in parts], axis=0)
    return Svd(polar(left), values, polar(right)) if values.shape[0] else Svd(left, values, right)


def mean_of(vectors: Array, weight: Array) -> Array:
    """Σ w_i d_i / n in float64: what the papers do with tensors that are no matrices."""
    total = weighted(vectors, weight)
    return total / vectors.shape[0]


def weighted(vectors: Array, weight: Array) -> Array:
    """Σ w_i d_i in float64, added in the order of the models."""
    xp = array_namespace(vectors)
    factors = xp.reshape(weight, (-1,))
    total = factors[0] * xp.astype(vectors[0], xp.float64)
    for i in range(1, vectors.shape[0]):
        total = total + factors[i] * xp.astype(vectors[i], xp.float64)
    return total


def is_matrix(vectors: Any) -> bool:
    """Whether these [n, *shape] are matrices of numbers: 2-D tensors without NaN or infinity."""
    xp = array_namespace(vectors)
    return vectors.ndim == 3 and bool(xp.all(xp.isfinite(vectors)))


def svd_cost(m: int, n: int) -> Cost:
    """Of a thin SVD with its factors: 6 M r² + 20 r³ operations (Golub & Van Loan), LAPACK's copies and work space."""
    short, long = min(m, n), max(m, n)
    return Cost(6.0 * long * short**2 + 20.0 * short**3, 8 * (3 * m * n + 5 * short * short))


def leading_cost(m: int, n: int, count: int, method: Settings) -> Cost:
    """Of `leading`."""
    width = count + method.oversampling
    if not (method.randomized and is_cheaper((m, n), width)):
        return svd_cost(m, n)
    products = 2.0 * m * n * width * (2 * method.power + 2)
    factors = 4.0 * (m + n) * width**2 * (method.power + 1)
    small = svd_cost(width, n)
    return Cost(products + factors + small.flops, 8 * (2 * m * n + 4 * (m + n) * width) + small.bytes)
