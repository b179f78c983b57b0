"""Merge language-model weights: streamed, reproducible, safe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smelt._version import __version__ as __version__

if TYPE_CHECKING:
    from smelt.errors import InputError as InputError
    from smelt.errors import NumericError as NumericError
    from smelt.errors import RecipeError as RecipeError
    from smelt.errors import SmeltError as SmeltError
    from smelt.errors import StorageError as StorageError
    from smelt.in_memory import merge_state_dicts as merge_state_dicts
    from smelt.merging import MergeReport as MergeReport
    from smelt.merging import merge as merge
    from smelt.merging import plan as plan
    from smelt.sweeping import SweepReport as SweepReport
    from smelt.sweeping import sweep_to as sweep_to
    from smelt.trying import Candidate as Candidate
    from smelt.trying import sweep as sweep
    from smelt.verifying import verify as verify

_HOME = {
    "Candidate": "smelt.trying",
    "InputError": "smelt.errors",
    "MergeReport": "smelt.merging",
    "NumericError": "smelt.errors",
    "RecipeError": "smelt.errors",
    "SmeltError": "smelt.errors",
    "StorageError": "smelt.errors",
    "SweepReport": "smelt.sweeping",
    "merge": "smelt.merging",
    "merge_state_dicts": "smelt.in_memory",
    "plan": "smelt.merging",
    "sweep": "smelt.trying",
    "sweep_to": "smelt.sweeping",
    "verify": "smelt.verifying",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are first used, so that `import smelt` costs nothing."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'smelt' has no attribute '{name}'")
