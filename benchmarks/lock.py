"""How much of the time the interpreter lock is held: the part of a merge that more threads cannot speed up.

A thread on a core of its own asks for the lock at random instants (a Poisson process on a fixed schedule, so that they
do not depend on what the merge does), and notes for each whether it had to wait. The share of instants at which it had
to is the share of time in which the lock was held. The wait is seen exactly: compiled code spins until the instant
without the lock and notes the time; taking the lock again is the last thing that it does.

It is meant for a merge with one worker on the other core: with s its share, n workers go at most 1 / s times as fast as
one. Instants at which the probe itself was taken off its core are left out, and what an unlocked interpreter shows is
subtracted. `calibrated` measures a thread whose share is known; where the two disagree the machine was not quiet.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

MEAN_NS = 1_000_000
"""Mean nanoseconds between two instants: at a few microseconds each the probe takes the lock for less than 1 %."""
WAITED_NS = 3_000
"""A longer time between the instant and having the lock was a wait; without contention it takes 1 to 2 µs."""
_MONOTONIC = 1

_libc = ctypes.CDLL(None)
_clock = _libc.clock_gettime
_clock.argtypes, _clock.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _spin_until(target: int, pair: Any) -> int:  # pragma: no cover - compiled
    """Without the lock: spin until the monotonic clock shows `target`; gives what it shows then."""
    now = 0
    while now < target:
        _clock(_MONOTONIC, pair.ctypes.data)
        now = pair[0] * 1_000_000_000 + pair[1]
    return now


@dataclass(frozen=True, slots=True)
class Share:
    """The share of time in which the lock was held, its standard error, and the number of instants."""

    held: float
    error: float
    instants: int


class LockProbe:
    """Measures the lock from `start` to `stop`; `share` then tells. Needs a second core."""

    def __init__(self, core: int, *, seed: int = 0) -> None:
        self._core = core
        self._random = random.Random(seed)
        self._pair = np.zeros(2, dtype=np.int64)
        self._waited = self._asked = 0
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="lock-probe", daemon=True)
        _spin_until(1, self._pair)  # compiled before the measurement

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stop = True
        if self._thread.is_alive():
            self._thread.join()

    def share(self, *, idle: float = 0.0) -> Share:
        """What was found; `idle` is the share that an interpreter without other threads shows."""
        asked = max(self._asked, 1)
        waited = self._waited / asked
        held = max(0.0, (waited - idle) / (1 - idle))
        return Share(held, math.sqrt(waited * (1 - waited) / asked) / (1 - idle), self._asked)

    def _work(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread alone
        target = time.monotonic_ns()
        switches = _preemptions()
        while not self._stop:
            target += int(self._random.expovariate(1 / MEAN_NS))
            at = _spin_until(target, self._pair)
            got = time.monotonic_ns()
            before, switches = switches, _preemptions()
            if before != switches:
                target = time.monotonic_ns()
                continue
            waited = got - at > WAITED_NS
            self._asked += 1
            self._waited += waited
            while waited and (following := target + int(self._random.expovariate(1 / MEAN_NS))) < got:
                target = following  # this instant came while the probe was waiting: the lock was held then too
                self._asked += 1
                self._waited += 1
            target = max(target, time.monotonic_ns())


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def held_during(work: Callable[[LockProbe], object], *, idle: float = 0.0, seed: int = 0) -> Share:
    """The share while `work` runs on the first core of this process and the probe on the last.

    `work` starts the probe where it wants the measurement to begin; it ends with `work`.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})  # inherited by the threads that `work` starts
    probe = LockProbe(cores[-1], seed=seed)
    try:
        work(probe)
    finally:
        probe.stop()
        os.sched_setaffinity(0, set(cores))
    return probe.share(idle=idle)


def idle_share(seconds: float = 0.5) -> float:
    """The share that the probe shows where nobody holds the lock."""

    def nothing(probe: LockProbe) -> None:
        probe.start()
        time.sleep(seconds)

    return held_during(nothing).held


def calibrated(*, idle: float, seconds: float = 0.5) -> tuple[float, Share]:
    """A thread that holds the lock for 0.3 ms of each: its true share, and what the probe says."""
    held = total = 0
    pair = np.zeros(2, dtype=np.int64)
    _spin_until(1, pair)

    def cycle(probe: LockProbe) -> None:
        nonlocal held, total
        probe.start()
        began = now = time.monotonic_ns()
        while now - began < 1e9 * seconds:
            start = now
            while now - start < 300_000:
                now = time.monotonic_ns()
            held += now - start
            _spin_until(now + 700_000, pair)
            now = time.monotonic_ns()
        total = now - began

    share = held_during(cycle, idle=idle, seed=1)
    return held / total, share
