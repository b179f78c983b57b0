"""Numbers that compiled loops and those who call them agree on."""

from __future__ import annotations

from typing import Any

RUN = 1024
"""Elements worked on at a time: what is made of them stays in the first cache."""
COLUMNS = RUN // 8
"""Bytes that hold one bit for each element of a run."""
GRID = 1 << 24
"""Random numbers are whole multiples of 1 / GRID."""
LANES = 16
"""Elements of a vector."""
WORD = 64
"""Bits are kept in whole words of so many."""
ROW_PARTS = 9
"""Arrays that the loops on ranks need for a piece."""
SPILL = LANES
"""Elements behind the last one that is kept to which a vector may write."""
PLACES = RUN + SPILL
"""Room that looking for places in a run needs."""
MOST_MODELS = 12
"""Above this many models a method's own function is called."""
TRIM, DROP, DROP_AGAIN, BAND = range(4)
"""What is kept of task vectors: what is above a cut, what is drawn, what was drawn before, what is between two cuts."""
ELECT_MEAN: Any = (0,)
ELECT_SUM: Any = (0, 0)
ADD: Any = (0, 0, 0)
AVERAGE: Any = (0, 0, 0, 0)
"""How kept deltas are combined. Told by a tuple's length, which is part of its type: only what is used is compiled."""
