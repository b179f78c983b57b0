"""RAM: average what several models have changed, keep whole what only one has."""

from __future__ import annotations

from array_api_compat import array_namespace

from smelt.methods.api import Array, Method, Sum, derive, reduce, register, scalar
from smelt.methods.stages import add_to_base

_SOURCE = "Yuan et al. 2026, Behavior Knowledge Merge in Reinforced Agentic Models, arXiv:2601.13572"
_EPSILON_DOC = "a model is active at an entry where its task vector is larger than this"


def activity(deltas: Array, epsilon: float) -> tuple[list[Array], Array]:
    """Where each model is active, abs(d_i) > epsilon in float64 or NaN, and how many are: n times bool, float64 [t]."""
    xp = array_namespace(deltas)
    active = [~(xp.astype(xp.abs(deltas[i]), xp.float64) <= epsilon) for i in range(deltas.shape[0])]
    count = xp.astype(active[0], xp.float64)
    for one in active[1:]:
        count = count + xp.astype(one, xp.float64)
    return active, count


def average_active(deltas: Array, epsilon: float, boost: Array | None) -> Array:
    """The mean of the active entries, 0 where none is, float64 [t]; those of model i alone are times boost[i]."""
    xp = array_namespace(deltas)
    active, count = activity(deltas, epsilon)
    total = xp.zeros_like(count)
    for i, one in enumerate(active):
        value = xp.astype(deltas[i], xp.float64)
        if boost is not None:
            value = xp.where(count == 1.0, boost[i] * value, value)
        total = xp.where(one, total + value, total)
    return total / xp.where(count < 1.0, xp.ones_like(count), count)


@register("ram", source=_SOURCE)
class Ram(Method):
    """Add to the base, per entry, the mean over those models that have changed it.

    Equation:
        A = the models with abs(d_i) > epsilon, per entry
        y = b + Σ_A d_i / |A|        (b where A is empty)

    Use it for models whose changes are sparse and hardly overlap, as after reinforcement learning, where an average
    over all models would dilute what only one has learned.

    Example:
        merge_method: ram
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {epsilon: 1e-5}
    """

    epsilon: float = scalar(1e-5, within="[0, inf)", doc=_EPSILON_DOC)

    def tile(self, base: Array, deltas: Array) -> Array:
        return add_to_base(base, average_active(deltas, self.epsilon, None), 1.0)


@register("ramplus_tl", source=_SOURCE)
class RamPlus(Method):
    """Add to the base the mean over the models that have changed an entry, and more of it where only one has.

    Equation:
        A = the models with abs(d_i) > epsilon, per entry
        y = b + Σ_A d_i / |A|,   times s_i where A is model i alone        (b where A is empty)
        s_i = 1 + r · clamp(shared_i / max(unique_i, epsilon), 0, alpha)
        shared_i, unique_i = how many entries model i has changed with others, and alone

    Use it as ram; what is averaged loses strength, which the entries of one model alone make up for.

    Note: the ratio is that of each tensor, or as in the paper that of the whole model with granularity: model.

    Example:
        merge_method: ramplus_tl
        base_model: models/llama-base
        models:
          - model: models/llama-ft1
          - model: models/llama-ft2
          - model: models/llama-ft3
        parameters: {r: 0.1, alpha: 0.2, epsilon: 1e-5}
    """

    per_tensor = frozenset({"r", "alpha"})

    r: float = scalar(0.1, doc="how much of the ratio of shared to unique entries is added to unique entries")
    alpha: float = scalar(0.2, doc="that ratio at most")
    epsilon: float = scalar(1e-5, within="[0, inf)", doc=_EPSILON_DOC)
    granularity: str = scalar(
        "tensor",
        words=("tensor", "model"),
        doc="over what entries are counted: each tensor for itself, or the whole model",
    )

    @reduce(Sum, uses=("epsilon",))
    def unique(self, deltas: Array) -> Array:
        xp = array_namespace(deltas)
        active, count = activity(deltas, self.epsilon)
        return xp.stack([xp.astype(one & (count == 1.0), xp.float32) for one in active])

    @reduce(Sum, uses=("epsilon",))
    def shared(self, deltas: Array) -> Array:
        xp = array_namespace(deltas)
        active, count = activity(deltas, self.epsilon)
        return xp.stack([xp.astype(one & (count > 1.0), xp.float32) for one in active])

    @derive
    def boost(self, unique: Array, shared: Array) -> Array:
        """s_i, [n]; a model without unique entries has nothing to boost."""
        xp = array_namespace(unique)
        divisor = xp.where(unique > 0.0, unique, xp.ones_like(unique))
        ratio = shared / xp.where(divisor < self.epsilon, xp.full_like(divisor, self.epsilon), divisor)
        ratio = xp.where(ratio > self.alpha, xp.full_like(ratio, self.alpha), ratio)
        return 1.0 + self.r * ratio

    def tile(self, base: Array, deltas: Array, boost: Array) -> Array:
        return add_to_base(base, average_active(deltas, self.epsilon, boost), 1.0)
