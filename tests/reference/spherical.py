"""Methods on the sphere: slerp, nuslerp, multislerp, karcher."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reference.inputs import Array, Base, Models, deltas64, models64, only, per_model, safe_divisor, tensor64
from reference.keep import Keep


def slerp(
    models: Models, base: Base = None, *, keep: Keep | None = None, t: float, granularity: str = "tensor"
) -> Array:
    """Spherical interpolation from the base (t = 0) to the model (t = 1), one angle for the flattened tensor.

    cos = (b/|b|).(x/|x|), a norm <= 1e-8 counting as 1;
    sin((1-t)theta)/sin(theta) b + sin(t theta)/sin(theta) x, linear where |cos| > 0.9995.
    ValueError unless a base and one model.
    """
    only(models, "slerp")
    b, x = tensor64(base, "slerp"), models64(models)[0]
    cos = _cosine(b.ravel(), x.ravel())
    return np.asarray(_interpolate(b.ravel(), x.ravel(), t, cos, linear=np.abs(cos) > 0.9995).reshape(b.shape))


def nuslerp(
    models: Models,
    base: Base = None,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    granularity: str = "tensor",
) -> Array:
    """Spherical interpolation of two models, or of their deltas when there is a base, at t = w_2 / (w_1 + w_2).

    t = 0.5 if |w_1 + w_2| < 1e-6. One angle for the tensor (flatten, which overrides row_wise), else one per
    vector along the last dimension, or along dimension 0 if row_wise. A 0-d tensor is one vector of one
    element. Linear where 1 - cos^2 <= 1e-12 or cos < -0.9995; a norm <= 1e-8 counts as 1. ValueError unless
    two models.
    """
    only(models, "nuslerp", count=2)
    w1, w2 = per_model(weight, 1.0, 2, "weight")
    t = 0.5 if abs(w1 + w2) < 1e-6 else w2 / (w1 + w2)
    v = models64(models) if base is None else deltas64(models, base, "nuslerp")
    shape = v.shape[1:]
    if nuslerp_flatten or not shape:
        first, second = v[0].ravel(), v[1].ravel()
    elif nuslerp_row_wise:
        first, second = np.moveaxis(v[0], 0, -1), np.moveaxis(v[1], 0, -1)
    else:
        first, second = v[0], v[1]
    cos = _cosine(first, second)
    mixed = _interpolate(first, second, t, cos, linear=(1.0 - cos**2 <= 1e-12) | (cos < -0.9995))
    if nuslerp_flatten or not shape:
        mixed = mixed.reshape(shape)
    elif nuslerp_row_wise:
        mixed = np.moveaxis(mixed, -1, 0)
    return np.asarray(mixed if base is None else tensor64(base, "nuslerp") + mixed)


def multislerp(
    models: Models,
    base: Base = None,
    *,
    keep: Keep | None = None,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
    granularity: str = "tensor",
) -> Array:
    """Weighted mean on the sphere by one step through the tangent space at the weighted arithmetic mean.

    u_i = x_i / (|x_i| + eps); m = sum w_i u_i, normalised; tau = sum w_i (u_i - (u_i.m) m); r = |tau| + eps;
    (m cos r + tau sin r / r) sum w_i |x_i|. Of the deltas, added to the base, when there is a base. Where
    |sum w_i u_i| < eps there is no direction: sum w_i x_i for one or two inputs, and for any number if every
    |x_i| <= eps (untouched or empty tensors: nothing cancels, there is just nothing there); ValueError for
    more inputs that cancel.
    """
    v = models64(models) if base is None else deltas64(models, base, "multislerp")
    shape, n = v.shape[1:], len(v)
    v = v.reshape(n, -1) if v.size else v.reshape(n, 0)
    w = np.asarray(per_model(weight, 1.0, n, "weight"))
    if normalize_weights:
        w = w / safe_divisor(w.sum())
    norm = np.sqrt(np.sum(v**2, axis=1))
    unit = v / (norm + eps)[:, None]
    mean = np.sum(w[:, None] * unit, axis=0)
    length = np.sqrt(np.sum(mean**2))
    if length < eps:
        if n > 2 and np.any(norm > eps):
            raise ValueError("multislerp: the weighted directions cancel; the mean on the sphere is undefined")
        mixed = np.sum(w[:, None] * v, axis=0)
    else:
        mean = mean / length
        tangent = np.sum(w[:, None] * (unit - np.sum(unit * mean, axis=1)[:, None] * mean), axis=0)
        r = np.sqrt(np.sum(tangent**2)) + eps
        mixed = (mean * np.cos(r) + tangent * np.sin(r) / r) * np.sum(w * norm)
    mixed = mixed.reshape(shape)
    return np.asarray(mixed if base is None else tensor64(base, "multislerp") + mixed)


def karcher(
    models: Models,
    base: Base = None,
    *,
    keep: Keep | None = None,
    max_iter: int = 10,
    tol: float = 1e-5,
    granularity: str = "tensor",
) -> Array:
    """Riemannian mean of the directions on the sphere, equal weights, times the mean norm of all inputs.

    Start at the normalised mean of the unit vectors (at the first of them if that mean is shorter than tol).
    Each step takes the mean of their logarithms, log_u(u_i) = theta/sin(theta) (u_i - (u_i.u) u), and follows
    it along the great circle; it stops when that mean is shorter than tol. Inputs with norm <= tol have no
    direction and are left out; all of them: zero. The logarithm of an exact antipode is undefined: it
    contributes nothing where sin(theta) < 1e-6. A base is no input.
    """
    x = models64(models)
    shape = x.shape[1:]
    x = x.reshape(len(x), -1) if x.size else x.reshape(len(x), 0)
    norm = np.sqrt(np.sum(x**2, axis=1))
    units = [v / length for v, length in zip(x, norm, strict=True) if length > tol]
    if not units:
        return np.zeros(shape)
    mean = np.sum(units, axis=0) / len(units)
    length = np.sqrt(np.sum(mean**2))
    u = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.sum([_logarithm(u, v) for v in units], axis=0) / len(units)
        step = np.sqrt(np.sum(tangent**2))
        if step < tol:
            break
        u = np.cos(step) * u + np.sin(step) * tangent / step
        u = u / np.sqrt(np.sum(u**2))
    return np.asarray((u * norm.mean()).reshape(shape))


def _cosine(a: Array, b: Array) -> Array:
    """Cosine along the last dimension, which is kept with length 1; a norm <= 1e-8 counts as 1."""
    norm_a = np.sqrt(np.sum(a**2, axis=-1, keepdims=True))
    norm_b = np.sqrt(np.sum(b**2, axis=-1, keepdims=True))
    unit_a = a / np.where(norm_a <= 1e-8, 1.0, norm_a)
    unit_b = b / np.where(norm_b <= 1e-8, 1.0, norm_b)
    return np.asarray(np.sum(unit_a * unit_b, axis=-1, keepdims=True))


def _interpolate(a: Array, b: Array, t: float, cos: Array, *, linear: NDArray[np.bool_]) -> Array:
    """sin((1-t)theta)/sin(theta) a + sin(t theta)/sin(theta) b; (1-t) a + t b where `linear`."""
    theta = np.arccos(np.clip(cos, -1.0, 1.0))
    sine = np.where(linear, 1.0, np.sin(theta))
    weight_a = np.where(linear, 1.0 - t, np.sin((1.0 - t) * theta) / sine)
    weight_b = np.where(linear, t, np.sin(t * theta) / sine)
    return np.asarray(weight_a * a + weight_b * b)


def _logarithm(u: Array, v: Array) -> Array:
    """The tangent at u that leads to v along the great circle; zero at the antipode."""
    cos = np.sum(u * v)
    across = v - cos * u
    sine = np.sqrt(np.sum(across**2))
    if sine < 1e-6:
        return across if cos > 0.0 else np.zeros_like(u)
    return np.asarray(np.arctan2(sine, cos) / sine * across)
