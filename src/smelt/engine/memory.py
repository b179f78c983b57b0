"""What tensors keep in memory between their passes, within one limit for all of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Budget:
    """Memory that tensors may keep between their passes, `limit` bytes in all.

    What is given back is kept for the next tensor of that size: layers repeat, and fresh memory costs a page fault for
    every 4 KiB.
    """

    def __init__(self, limit: int, empty: Callable[..., Any] = np.empty) -> None:
        self._limit = self._left = limit
        self._given = 0
        self._empty = empty
        self._spare: dict[int, list[Any]] = {}
        self._lock = threading.Lock()

    def take(self, size: int, *, share: float = 1.0) -> Any:
        """An uninitialised array of `size` bytes, or None where the limit, or this share of it, does not allow it."""
        with self._lock:
            if self._given + size > share * self._limit:
                return None
            self._given += size
            if self._spare.get(size):
                return self._spare[size].pop()
            while size > self._left and self._drop_largest():
                pass
            self._left -= size
        return self._empty(size, dtype=np.uint8)

    def give(self, array: Any) -> None:
        """Take an array back: that which came last is taken first, since it may still be in a cache."""
        with self._lock:
            self._given -= array.size
            self._spare.setdefault(array.size, []).append(array)

    def _drop_largest(self) -> bool:
        sizes = [size for size, arrays in self._spare.items() if arrays]
        if not sizes:
            return False
        self._spare[max(sizes)].pop()
        self._left += max(sizes)
        return True


class TensorMemory:
    """What one tensor keeps: its inputs, and what kernels ask to keep; all given back at its end."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._taken: dict[int, Any] = {}
        self._once: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()

    def take(self, size: int, *, share: float = 1.0) -> Any:
        """An uninitialised array of `size` bytes until the tensor's end, or None where memory is short."""
        array = self._budget.take(size, share=share)
        if array is not None:
            self._taken[id(array)] = array
        return array

    def give(self, array: Any) -> None:
        """Give one of them back before."""
        self._budget.give(self._taken.pop(id(array)))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all tiles of the tensor (or by two threads at once: it is the same)."""
        try:
            return self._once[name]
        except KeyError:
            return self._once.setdefault(name, make())

    def keep(self, name: str, shape: tuple[int, ...]) -> Any:
        """An uint8 array that lasts to the tensor's end, the same for all its tiles; None where memory is short."""
        with self._lock:
            if name not in self._kept:
                array = self.take(math.prod(shape))
                self._kept[name] = None if array is None else array.reshape(shape)
            return self._kept[name]

    def kept(self, name: str) -> Any:
        """What `keep` has given for this name; None if it was never asked for."""
        return self._kept.get(name)

    def release(self) -> None:
        """Give everything back."""
        self._once.clear()
        self._kept.clear()
        while self._taken:
            self._budget.give(self._taken.popitem()[1])
