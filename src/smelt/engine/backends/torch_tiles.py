"""Tiles as torch tensors on a device. This module and its neighbours are the only ones that import torch for a merge.

Stored bytes go to the device undecoded, from pinned memory; they are decoded, worked on and encoded there, and stored
bytes come back. Each worker thread has a stream and pinned buffers of its own, so that while one waits for its tile the
transfers and the arithmetic of the others, and reading, hashing and writing, go on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from smelt import dtypes
from smelt.dtypes import DType
from smelt.engine.backends.torch_numbers import DECODERS, ENCODERS, uniform
from smelt.engine.backends.torch_reducers import Partials
from smelt.engine.given import Arguments, Memory
from smelt.engine.inputs import Stored
from smelt.engine.kernels import Kernels
from smelt.engine.tiles import Geometry, Scratch
from smelt.errors import RecipeError, SmeltError

Tensor = Any


def open_device(name: str) -> TorchBackend:
    """The backend of `cuda`, `cuda:1` or `torch:cpu`. Raises RecipeError where torch finds no such device."""
    device = torch.device(name.removeprefix("torch:"))
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            found = [f"cuda:{i}  {torch.cuda.get_device_name(i)}" for i in range(count)]
            fix = "choose one of these" if found else "install a torch that is built for your GPU, or merge on the CPU"
            raise RecipeError(
                f"there is no device {name}",
                where=found or [f"torch {torch.__version__} finds no CUDA device"],
                fix=f"{fix} (leave the device out)" if not found else fix,
            )
        device = torch.device("cuda", index)
    return TorchBackend(device, name=name)


class TorchBackend:
    """Tiles on a torch device; see `Backend` for what each function is asked for."""

    def __init__(self, device: Any, *, name: str) -> None:
        self.name = name
        self._device = device
        self._pinned = device.type == "cuda"
        self.kernels: Kernels | None = Kernels(encode=self._encode, partials=Partials(self.to_host))

    def empty(self, count: int, *, dtype: Any) -> Any:
        """Memory of the host that the device reads and writes by itself, where there is such."""
        if not self._pinned:
            return np.empty(count, dtype=dtype)
        size = count * np.dtype(dtype).itemsize
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy().view(dtype)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, arrays that a method makes are made on the device, and all goes to the thread's own stream."""
        with self.making():
            if self._device.type != "cuda":
                yield
                return
            stream: Any = torch.cuda.Stream
            with torch.cuda.stream(stream(device=self._device)):
                yield

    def making(self) -> AbstractContextManager[Any]:
        """Within it, torch's functions make arrays on the device."""
        made: AbstractContextManager[Any] = self._device
        return made

    def to_device(self, array: Any, *, wait: bool = False) -> Tensor:
        """A NumPy array as a tensor on the device; without `wait` the transfer goes on in the thread's stream."""
        return torch.from_numpy(array).to(self._device, non_blocking=not wait)

    def to_host(self, values: Any) -> Any:
        """A tensor as a NumPy array, once it is there; what is no tensor as an array."""
        return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)

    def placed(self, value: Any, *, wait: bool = False) -> Any:
        """What a reduction or derived value gave, with its arrays on the device."""
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return self.to_device(np.array(value), wait=wait)
        if isinstance(value, tuple):
            return tuple(self.placed(part, wait=wait) for part in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{name: self.placed(part, wait=wait) for name, part in parts.items()})
        return value

    def method(self, method: Any) -> Any:
        on_device = copy.copy(method)
        for field in method.info.fields.values():
            if field.per_model:  # other threads, with other streams, will use them: wait until they are there
                numbers = self.placed(getattr(method, field.attribute), wait=True)
                setattr(on_device, field.attribute, numbers)
        return on_device

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
        return TorchGiven(
            stored,
            has_base=has_base,
            start=start,
            count=count,
            geometry=geometry,
            streams=streams,
            results=results,
            backend=self,
        )

    def flat(self, values: Any, shape: tuple[int, ...]) -> Any:
        if not isinstance(values, torch.Tensor) or values.dtype != torch.float32 or tuple(values.shape) != shape:
            return None
        return values.reshape(-1)

    def decoded(self, raw: Any, dtype: DType) -> Tensor:
        """Stored bytes of the host as float32 on the device."""
        if dtype.code in DECODERS:
            return DECODERS[dtype.code](self.to_device(raw))
        values = np.empty(raw.size * 8 // dtype.bits, dtype=np.float32)
        dtypes.decode(raw, dtype, values)
        return self.to_device(values)

    def _encode(self, values: Tensor, dtype: DType, raw: Any) -> None:
        """As `dtypes.encode`: float32 on the device to stored bytes of the host, which are there when it returns."""
        if dtype.code in ENCODERS:
            torch.from_numpy(raw).copy_(ENCODERS[dtype.code](values.contiguous()), non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        else:
            dtypes.encode(self.to_host(values), dtype, raw)

    def described(self) -> dict[str, str]:
        hardware = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"
        return {"name": self.name, "hardware": hardware, "torch": str(torch.__version__)}

    def explained(self, error: BaseException) -> SmeltError | None:
        for cause in (error, error.__cause__):
            if isinstance(cause, torch.OutOfMemoryError):
                fix = "use fewer threads (--threads 1), or leave the device out to merge on the CPU"
                return SmeltError(f"the memory of {self.name} is not enough for the tiles", fix=fix)
            if type(cause).__name__ == "AcceleratorError":  # torch has it from 2.8 on
                first = str(cause).strip().split("\n")[0]
                fix = "leave the device out to merge on the CPU"
                return SmeltError(f"the device {self.name} failed: {first}", fix=fix)
        return None


class TorchGiven(Arguments):
    """The arguments of one tile as tensors on a device."""

    def __init__(self, stored: Stored, *, backend: TorchBackend, **place: Any) -> None:
        super().__init__(stored, **place)
        self._backend = backend

    def _make(self, name: str) -> Any:
        if name in self._results:
            return self._backend.placed(self._results[name])
        if name == "size":
            return self._geometry.size
        if name == "base":
            return self._geometry.view(self._flat(-1).clone()) if self.has_base else None
        if name == "vectors":
            return self["deltas" if self.has_base else "x"]
        if name == "uniform":
            make = [partial(uniform, key, self.start, self.start + self.count, torch.arange) for key in self.streams]
        elif name == "x":
            make = [partial(self._flat, i) for i in range(self.models)]
        elif name == "deltas":
            make = [partial(self._delta, i) for i in range(self.models)]
        else:
            raise KeyError(name)
        values = torch.empty((self.models, self.count), dtype=torch.float32)
        for i, one in enumerate(make):
            values[i] = one()
        return self._geometry.view(values)

    def _delta(self, source: int) -> Tensor:
        return self._flat(source) - self._flat(-1)

    def _flat(self, source: int) -> Tensor:
        """The values of one source, float32 [t]; the base's are kept for the other arguments."""
        if source >= 0:
            return self._backend.decoded(*self.stored.buffers[source])
        if "flat base" not in self._made:
            self._made["flat base"] = self._backend.decoded(*self.stored.buffers[-1])
        return self._made["flat base"]
