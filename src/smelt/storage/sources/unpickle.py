"""The child process that reads pickles: `python -I unpickle.py`. It knows nothing of smelt, and smelt never calls it.

On standard input come lines of JSON, [SOURCE, TARGET, LIMIT]. torch reads SOURCE with `weights_only=True`, which builds
tensors and plain containers and refuses every other name; the tensors are written to TARGET as safetensors, at most
LIMIT bytes. Each line is answered by one on standard output: {"tensors": N} or {"refused": WHAT, "detail": TEXT}. The
parent believes none of it, and reads TARGET as strictly as any file.
"""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from typing import Any

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_WRAPPED = "state_dict"
_CHUNK = 64 << 20


class Refused(Exception):
    """The file cannot be read: a word for the parent, and a detail for people."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(what, detail)
        self.what = what
        self.detail = detail


def convert(source: str, target: str, limit: int) -> dict[str, Any]:
    """Read `source`, write `target`; gives what the parent is told."""
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything
        return {"refused": "torch", "detail": str(error)}
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        return {"refused": "old torch", "detail": torch.__version__}
    try:
        tensors = _tensors(torch, _load(torch, source))
        _write(torch, tensors, target, limit)
    except Refused as error:
        return {"refused": error.what, "detail": error.detail}
    return {"tensors": len(tensors)}


def confine(limit: int) -> None:
    """No file larger than any that is expected, no core dump; where the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _load(torch: Any, source: str) -> Any:
    with open(source, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # the older form cannot be mapped
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever a broken file leads it to
        raise Refused("load", str(error)) from error


def _tensors(torch: Any, loaded: Any) -> dict[str, Any]:
    """The state dict: what was loaded, or its `state_dict` where it is a training checkpoint."""
    if isinstance(loaded, dict) and isinstance(loaded.get(_WRAPPED), dict):
        loaded = loaded[_WRAPPED]
    if not isinstance(loaded, dict) or not loaded:
        raise Refused("form", f"it holds {type(loaded).__name__}, not a dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Refused("form", f"{str(name)[:100]!r} is {type(value).__name__}, not a tensor")
        kind = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu" or kind not in _CODES:
            raise Refused("form", f"tensor {name[:100]!r} is stored as {kind} ({value.layout}), which cannot be merged")
    return loaded


def _write(torch: Any, tensors: dict[str, Any], target: str, limit: int) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name, value in tensors.items():
        end = position + value.numel() * value.element_size()
        kind = _CODES[str(value.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    if 8 + len(text) + position > limit:
        raise Refused("size", f"its tensors have {position} bytes, more than the file can hold")
    with open(target, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            if not value.numel():
                continue
            data = memoryview(
                value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK])


if __name__ == "__main__":
    asked = [json.loads(line) for line in sys.stdin]
    confine(max(limit for _, _, limit in asked))
    for source, target, limit in asked:
        sys.stdout.write(json.dumps(convert(source, target, limit)) + "\n")
        sys.stdout.flush()
