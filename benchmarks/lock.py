"""How much of the time the interpreter lock is held: the part of a merge that more threads cannot speed up.

The lock is a word in the interpreter's memory, 1 while a thread holds it. Compiled code on a core of its own looks at
it some fifty million times a second. It never takes the lock, so it delays nobody. CPython does not tell where the word
is: it is found by looking, as the one word of the interpreter's state that is always 1 while a thread holds the lock,
and always 0 while none does.

It is meant for a merge with one worker on the other core: with s its share, n workers go at most 1 / s times as fast as
one. `calibrated` measures a thread whose share is known.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

_LOOKS = 200
"""How often every word is looked at to find the lock, in each of the two states."""
_TRIES = 20
"""How often the two states are compared."""
_LARGEST_STATE = 1 << 20
"""Bytes behind the start of the interpreter's state that are searched, if so many are there."""
_MONOTONIC = 1

_libc = ctypes.CDLL(None)
_clock = _libc.clock_gettime
_clock.argtypes, _clock.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _now(pair: Any) -> int:  # pragma: no cover - compiled
    """Nanoseconds; as the call could change any memory, words are read anew after it."""
    _clock(_MONOTONIC, pair.ctypes.data)
    return pair[0] * 1_000_000_000 + pair[1]


def _look_at_all(words: Any, ones: Any, zeros: Any, looks: int, pair: Any) -> None:  # pragma: no cover - compiled
    """Count how often each word is 1, and how often it is 0."""
    for _ in range(looks):
        _now(pair)
        for k in range(len(words)):
            ones[k] += words[k] == 1
            zeros[k] += words[k] == 0


_LOOK = {True: njit(_look_at_all), False: njit(nogil=True)(_look_at_all)}
"""The same, with the lock or without it."""


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _watch(word: Any, stop: Any, pair: Any) -> tuple[int, int]:  # pragma: no cover - compiled
    """Look at a word until told to stop: (how often it was not 0, how often it was looked at)."""
    held = looks = 0
    while stop[0] == 0:
        _now(pair)
        held += word[0] != 0
        looks += 1
    return held, looks


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _wait(nanoseconds: int, pair: Any) -> None:  # pragma: no cover - compiled
    """Spin without the lock."""
    end = _now(pair) + nanoseconds
    while _now(pair) < end:
        pass


@dataclass(frozen=True, slots=True)
class Share:
    """The share of time in which the lock was held, and how often it was looked at."""

    held: float
    looks: int


class LockProbe:
    """Watches the lock from `start` to `stop`; `share` then tells. Needs a second core."""

    def __init__(self, core: int) -> None:
        self._core = core
        self._word = _lock_word()
        self._stop = np.zeros(1, dtype=np.int64)
        self._found = (0, 0)
        self._thread = threading.Thread(target=self._work, name="lock-probe", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop[0] = 1
        if self._thread.ident is not None:
            self._thread.join()

    def share(self) -> Share:
        """What was found."""
        held, looks = self._found
        return Share(held / max(looks, 1), looks)

    def _work(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread alone
        self._found = _watch(self._word, self._stop, _pair())


def _pair() -> Any:
    return np.zeros(2, dtype=np.int64)


def _lock_word() -> Any:
    """The word of the lock, as an array of one. Raises RuntimeError where it cannot be told."""
    words = _state()
    goes_with_it = np.ones(len(words), dtype=bool)
    for _ in range(_TRIES):  # other words may do so once, by chance
        always_one, _ = _counts(words, held=True)
        _, always_zero = _counts(words, held=False)
        goes_with_it &= (always_one == _LOOKS) & (always_zero == _LOOKS)
    places = np.flatnonzero(goes_with_it)
    if len(places) != 1:
        raise RuntimeError(f"{len(places)} words of the interpreter's state go with its lock: expected one")
    return words[places[0] : places[0] + 1]


def _state() -> Any:
    """The interpreter's state as words of 32 bits, as far as the writable memory that it lies in goes."""
    address = end = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            place, access, _, _, inode, *_ = line.split()
            first, last = (int(number, 16) for number in place.split("-"))
            if access.startswith("rw") and (first <= address < last or (first == end and inode == "0")):
                end = last
    size = min(end - address, _LARGEST_STATE)
    return np.ctypeslib.as_array((ctypes.c_int32 * (size // 4)).from_address(address))


def _counts(words: Any, *, held: bool) -> tuple[Any, Any]:
    """How often each word was 1, and 0, while this thread has the lock all the time, or nobody has it."""
    for looks in (0, _LOOKS):  # first it is compiled
        ones, zeros = (np.zeros(len(words), dtype=np.int64) for _ in range(2))
        _LOOK[held](words, ones, zeros, looks, _pair())
    return ones, zeros


def held_during(work: Callable[[LockProbe], object]) -> Share:
    """The share while `work` runs on the first core of this process and the probe on the last.

    `work` starts the probe where it wants the measurement to begin; it ends with `work`.
    """
    cores = sorted(os.sched_getaffinity(0))
    probe = LockProbe(cores[-1])
    os.sched_setaffinity(0, {cores[0]})  # inherited by the threads that `work` starts
    try:
        work(probe)
    finally:
        probe.stop()
        os.sched_setaffinity(0, set(cores))
    return probe.share()


def calibrated(*, seconds: float = 0.5) -> tuple[float, Share]:
    """A thread that holds the lock for 0.3 ms of each: its true share, and what the probe says."""
    held = total = 0
    pair = _pair()
    _wait(0, pair)  # compiled before the measurement

    def cycle(probe: LockProbe) -> None:
        nonlocal held, total
        probe.start()
        began = now = time.monotonic_ns()
        while now - began < 1e9 * seconds:
            start = now
            while now - start < 300_000:
                now = time.monotonic_ns()
            held += now - start
            _wait(700_000, pair)
            now = time.monotonic_ns()
        total = now - began

    share = held_during(cycle)
    return held / total, share
