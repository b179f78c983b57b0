"""passthrough: one tensor, perhaps scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference.inputs import Array, Base, Models, models64, only
from reference.keep import Keep


def passthrough(
    models: Models, base: Base = None, *, keep: Keep | None = None, scale: Sequence[float | None] | None = None
) -> Array:
    """The one model's tensor, times its `scale` if there is one. A base is no input. ValueError unless one model."""
    only(models, "passthrough")
    x = models64(models)[0]
    factor = None if scale is None else scale[0]
    return np.asarray(x if factor is None else factor * x)
