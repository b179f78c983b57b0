"""Where tiles live while a method works on them: in NumPy arrays on the CPU, or in torch tensors on a device.

A method is written once, over the array API standard; a backend gives its functions their arguments and takes their
results. torch is imported only where a device is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol

import numpy as np

from smelt.engine.given import Given, Memory
from smelt.engine.inputs import Stored
from smelt.engine.kernels import Kernels
from smelt.engine.tiles import DEFAULT_TILE, Geometry, Scratch
from smelt.errors import RecipeError, SmeltError
from smelt.storage.signals import deferred

CPU = "cpu"
"""The device of NumPy arrays and compiled kernels; the default."""
DEVICE_TILE = 1 << 22
"""Elements of a tile on a device, unless asked otherwise: enough work for each call and each transfer."""
DEVICE_WORKERS = 4
"""Most workers of a device, unless asked otherwise: while one waits for the device the others read, hash and write."""

_NAMES = re.compile(r"cpu|cuda(?::\d+)?|torch:cpu")


class Backend(Protocol):
    """What the engine asks of the place where tiles live."""

    @property
    def name(self) -> str:
        """As the user calls it: `cpu`, `cuda`, `cuda:1`."""

    @property
    def kernels(self) -> Kernels | None:
        """How results are stored and reduced there; None: as on the CPU, compiled or not."""

    def empty(self, count: int, *, dtype: Any) -> Any:
        """As `numpy.empty`: memory of the host from which transfers are quick."""

    def working(self) -> AbstractContextManager[None]:
        """Around all that a worker thread does."""

    def method(self, method: Any) -> Any:
        """The method with its per-model numbers where tiles live."""

    def given(
        self,
        stored: Stored,
        *,
        has_base: bool,
        start: int,
        count: int,
        geometry: Geometry,
        streams: Sequence[tuple[int, int]],
        results: Mapping[str, Any],
        scratch: Scratch,
        kernels: Kernels,
        memory: Memory,
    ) -> Any:
        """The arguments of one tile, as `Given`."""

    def flat(self, values: Any, shape: tuple[int, ...]) -> Any:
        """A tile's result as one row; None where it is no float32 array of this shape that lives here."""

    def to_host(self, values: Any) -> Any:
        """Numbers as a NumPy array."""

    def described(self) -> dict[str, str] | None:
        """What the record of a merge says of the device; None for the CPU."""

    def explained(self, error: BaseException) -> SmeltError | None:
        """What an error of the device means; None for others."""


class Host:
    """NumPy arrays on the CPU."""

    name: ClassVar[str] = CPU
    kernels: ClassVar[Kernels | None] = None

    def empty(self, count: int, *, dtype: Any) -> Any:
        return np.empty(count, dtype=dtype)

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def method(self, method: Any) -> Any:
        return method

    def given(self, stored: Stored, **settings: Any) -> Any:
        return Given(stored, **settings)

    def flat(self, values: Any, shape: tuple[int, ...]) -> Any:
        if isinstance(values, np.generic):  # what NumPy makes of 0-d arrays
            values = np.asarray(values)
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.shape != shape:
            return None
        return np.ascontiguousarray(values).reshape(-1)

    def to_host(self, values: Any) -> Any:
        return values

    def described(self) -> dict[str, str] | None:
        return None

    def explained(self, error: BaseException) -> SmeltError | None:
        return None


HOST: Backend = Host()


def check_name(device: str) -> str:
    """The device's name, if it is one: `cpu`, `cuda`, `cuda:1`, `torch:cpu`. Raises RecipeError; asks no library."""
    if not (isinstance(device, str) and _NAMES.fullmatch(device)):
        fix = "known are cpu (the default), cuda, and cuda:1 and the like where there are several"
        raise RecipeError(f"there is no device called '{device}'", fix=fix)
    return device


def choose(device: str) -> Backend:
    """The backend of a device. Raises RecipeError: no such name, no torch, or no such device on this machine."""
    if check_name(device) == CPU:
        return HOST
    if importlib.util.find_spec("torch") is None:
        raise RecipeError(
            f"the device {device} needs torch, which is not installed",
            fix="pip install torch (one that is built for your GPU), or leave the device out to merge on the CPU",
        )
    with deferred():
        from smelt.engine.backends import torch_tiles

    return torch_tiles.open_device(device)


def default_workers(device: str = CPU) -> int:
    """As many as the cores this process may use; on a device 2 to 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device == CPU else max(2, min(cores, DEVICE_WORKERS))


def default_tile(device: str = CPU) -> int:
    """Elements of a tile, unless asked otherwise."""
    return DEFAULT_TILE if device == CPU else DEVICE_TILE
