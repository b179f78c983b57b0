"""Which entries are kept: ranks by magnitude, and the random numbers that decide among equals."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reference.inputs import Array


class Keep(Protocol):
    """The source of every random decision of a method."""

    def uniform(self, model_index: int, shape: tuple[int, ...], /) -> Array:
        """Numbers in [0, 1), one per entry of the tensor; the same ones each time they are asked for."""
        ...


def uniform(keep: Keep | None, model_index: int, shape: tuple[int, ...]) -> Array:
    """The model's uniform numbers; ValueError if a decision is needed and there is nothing to decide it."""
    if keep is None:
        raise ValueError("a random decision is needed, but no `keep` was given")
    return np.asarray(keep.uniform(model_index, shape), dtype=np.float64)


def keep_ranks(magnitude: Array, *, first: int, count: int, keep: Keep | None, model_index: int) -> NDArray[np.bool_]:
    """Mark the entries whose rank lies in [first, first + count); rank 0 is the largest magnitude.

    Equal magnitudes share a run of ranks [G, G + E): G entries are strictly larger, E are equal. Of that run
    the part inside [first, first + count) is to be kept, O of the E, and no entry has a better claim than its
    equals. So each of them is kept when uniform < O / E. Away from the two cuts O / E is 1 or 0 and nothing
    is decided by chance:

    - a run that straddles the lower cut only: O = first + count - G (with first = 0 this is (K - G) / E);
    - a run that straddles the upper cut only: O = G + E - first, what is left after dropping first - G of them;
    - a run that straddles both: O = count, and each of the E is kept when uniform < count / E (one decision, not two).

    Magnitude 0 at a cut is never decided: a zero entry adds nothing whether it is kept or not, and is left
    out here.
    """
    _, which, equal = np.unique(magnitude.ravel(), return_inverse=True, return_counts=True)
    above = magnitude.size - np.cumsum(equal)
    inside = np.minimum(above + equal, first + count) - np.maximum(above, first)
    share = np.asarray((np.maximum(inside, 0) / equal)[which]).reshape(magnitude.shape)
    kept = np.asarray(share == 1.0)
    undecided = (share > 0.0) & (share < 1.0) & (magnitude != 0.0)
    if undecided.any():
        kept = kept | (undecided & (uniform(keep, model_index, magnitude.shape) < share))
    return kept
