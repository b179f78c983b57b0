"""A device that is none: torch tensors that behave as those of a GPU do, on a machine without one.

Their values lie in memory, but they say that they are elsewhere. NumPy cannot read them, and an operation that mixes
them with tensors of the CPU fails, as it does on a GPU; so what works here touches the device through torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

from smelt.engine.backends.torch_tiles import TorchBackend

DEVICE = torch.device("lazy")
"""A type of device that every torch knows and none has memory of."""

_ACROSS = {torch.ops.aten.copy_.default}
"""Operations that may see tensors of two devices."""


class Foreign(torch.Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Foreign:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Foreign({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})

        def unwrapped(value: Any) -> Any:
            if isinstance(value, Foreign):
                return value.inner
            if isinstance(value, torch.Tensor) and value.ndim and function not in _ACROSS:
                raise RuntimeError(f"{function}: a tensor of the CPU meets one of the device")
            return value

        leaves = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        if function._schema.is_mutable and "out" not in kwargs:
            return args[0]
        return found if leaves else tree_map(lambda v: Foreign(v) if isinstance(v, torch.Tensor) else v, found)


class Making(TorchFunctionMode):
    """Within it, torch's functions make tensors of the device, as within `torch.device("cuda")`."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist:
            return args[0].inner.tolist()  # which torch does for no subclass
        asked = torch.device(kwargs.get("device") or DEVICE)
        if function not in _device_constructors() or asked.type != DEVICE.type:
            return function(*args, **kwargs)
        return Foreign(function(*args, **{**kwargs, "device": "cpu"}))


class ForeignBackend(TorchBackend):
    """Tiles on the device."""

    def __init__(self) -> None:
        super().__init__(DEVICE, name="foreign")

    def to_device(self, array: Any, *, wait: bool = False) -> Any:
        return Foreign(torch.from_numpy(np.array(array)))

    def making(self) -> AbstractContextManager[Any]:
        return Making()
