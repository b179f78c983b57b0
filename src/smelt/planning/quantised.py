"""Checkpoints whose stored numbers are not the weights: quantised ones, known by config, by tensor names and by types.

A weight that is stored with a scale beside it, or packed several to a byte, must not be averaged as if it were plain.
Floats of 8 bits without scales are plain numbers, and pass. So does what `storage.sources.scaled` reads as weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from smelt.errors import InputError
from smelt.planning.locate import Model
from smelt.specs import TensorSpec
from smelt.storage.sources.scaled import ScaledCheckpoint

SHOWN = 4
"""Tensors of a kind that an error names before it only counts."""

SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_scales",
    "weight_global_scale",
    "weight_zero_point",
    "scale_weight",
    "input_scale",
    "input_global_scale",
    "scale_input",
    "activation_scale",
    "act_scale",
    "scale",
    "scales",
    "scale_inv",
    "SCB",
    "comfy_quant",
)
"""Names in a module by which the weight beside them is a quantised one."""
SUFFIXES = ("_scale", "_scale_inv", "_scales", "_scale_2", ".scale", "._scale")
"""What is appended to the name of a quantised tensor to name its scale."""

_LOADED = "load it with transformers"
_WAYS = {
    "fp8": f"{_LOADED} and FineGrainedFP8Config(dequantize=True), then save_pretrained",
    "compressed-tensors": f"{_LOADED} and CompressedTensorsConfig(dequantize=True), then save_pretrained",
    "bitsandbytes": f"{_LOADED}, then model.dequantize() and save_pretrained",
    "mxfp4": f"{_LOADED} and Mxfp4Config(dequantize=True), then save_pretrained",
    "gptq": "load it with GPTQModel, and save what dequantize_weight() of each layer gives",
    "awq": "load it with AutoAWQ, and save what awq.utils.packing_utils.dequantize_gemm gives for each layer",
    "scaled": "multiply each weight by its scale, and save the products without the scales",
}
"""How a kind is turned into plain weights. What is lost in quantising stays lost."""


@dataclass(frozen=True, slots=True)
class Sign:
    """Why a checkpoint is taken for a quantised one: its kind, in one word, and the tensors that say so."""

    kind: str
    tensors: tuple[TensorSpec, ...]


def refuse(model: Model) -> InputError | None:
    """The error for a quantised model, None for one that stores its weights."""
    stated = _stated(model.config)
    signs = list(_signs(model.source.tensors))
    if stated is None and not signs:
        return None
    kinds = [*([stated[1]] if stated is not None else []), *(sign.kind for sign in signs)]
    where = [f"config.json  {stated[0]}"] if stated is not None else []
    for sign in signs:
        where += [f"tensor {tensor}" for tensor in sign.tensors[:SHOWN]]
        if len(sign.tensors) > SHOWN:
            where.append(f"… and {len(sign.tensors) - SHOWN} more such tensors ({sign.kind})")
    known = [] if stated is None or stated[1] == "unknown" else [stated[1]]
    named = list(dict.fromkeys(known or [sign.kind for sign in signs])) or ["unknown"]
    way = next((_WAYS[kind] for kind in kinds if kind in _WAYS), None)
    return InputError(
        f"model {model.name} is quantised ({', '.join(named)}), and its numbers cannot be merged as they are",
        where=where,
        fix="use the model's original weights (float16, bfloat16 or float32)"
        + (f"; if there are none, dequantise it first: {way}" if way else ", or dequantise it first"),
    )


def _stated(config: Mapping[str, object] | None) -> tuple[str, str] | None:
    """What a config says: where it does, and the method that it names."""
    nodes: list[tuple[str, Mapping[str, object]]] = [("", config or {})]
    nodes += [(f"{key}.", value) for key, value in (config or {}).items() if isinstance(value, dict)]
    for place, node in nodes:
        for key in ("quantization_config", "compression_config"):
            found = node.get(key)
            if isinstance(found, dict):
                return place + key, str(found.get("quant_method", "unknown"))
    return None


def _signs(tensors: Mapping[str, TensorSpec]) -> Iterator[Sign]:
    """All that a checkpoint's names and types say, each tensor once."""
    found: dict[str, list[TensorSpec]] = {}
    for name, spec in tensors.items():
        kind = _kind(name, spec, tensors)
        if kind is not None:
            found.setdefault(kind, []).append(spec)
    for kind, specs in found.items():
        yield Sign(kind, tuple(specs))


def _kind(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    """The kind of quantisation that one tensor shows, or None; a scale shows none where its weight does."""
    module, _, leaf = name.rpartition(".")
    beside = _Beside(module, tensors)
    if leaf == "qweight" and beside.any("qzeros", "scales", "g_idx"):
        return _gptq_or_awq(spec, beside)
    if leaf in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") or ".quant_state." in name:
        return "bitsandbytes"
    if leaf == "weight" and spec.dtype.code in ("I8", "U8") and beside.any("SCB"):
        return "bitsandbytes"
    if leaf == "weight_packed":
        return "compressed-tensors"
    if name.endswith("_blocks") and spec.dtype.code == "U8" and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return "mxfp4"
    if leaf == "W_q" and beside.any("zero"):
        return "hqq"
    if leaf == "codes" and beside.any("codebooks"):
        return "aqlm"
    if leaf == "_data" and beside.any("_scale"):
        return "quanto"
    if leaf == "scaled_fp8":
        return "scaled"
    if spec.dtype.bits == 8 and (spec.dtype.floating or spec.dtype.code in ("I8", "U8")):
        return _scaled(name, spec, beside)
    if spec.dtype.code.startswith("F") and not spec.dtype.floating and not _is_scale(name, tensors):
        return spec.dtype.name
    return None


@dataclass(frozen=True, slots=True)
class _Beside:
    """The tensors of one module."""

    module: str
    tensors: Mapping[str, TensorSpec]

    def get(self, leaf: str) -> TensorSpec | None:
        return self.tensors.get(f"{self.module}.{leaf}" if self.module else leaf)

    def any(self, *leaves: str) -> bool:
        return any(self.get(leaf) is not None for leaf in leaves)


def _gptq_or_awq(spec: TensorSpec, beside: _Beside) -> str:
    """GPTQ packs along the rows, so that its scales are as wide as the packed weight; AWQ along the columns."""
    scales = beside.get("scales")
    as_wide = scales is not None and spec.shape[-1:] == scales.shape[-1:]
    return "gptq" if beside.any("g_idx") or as_wide else "awq"


def _scaled(name: str, spec: TensorSpec, beside: _Beside) -> str | None:
    """Whether a tensor of one byte an element has a scale beside it, and by which convention."""
    leaf = name.rpartition(".")[2]
    if leaf in SCALES or name.endswith(SUFFIXES):
        return None
    if f"{name}_scale_inv" in beside.tensors:
        return "fp8"
    appended = any(f"{name}{suffix}" in beside.tensors for suffix in SUFFIXES)
    if spec.dtype.code == "U8" and beside.any("weight_scale_2", "weight_global_scale"):
        return "nvfp4"
    if appended or (leaf == "weight" and beside.any(*SCALES)):
        return "scaled"
    return None


def _is_scale(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor is the scale of another: then that one is told."""
    stem = next((name.removesuffix(suffix) for suffix in ("_scales", *SUFFIXES) if name.endswith(suffix)), None)
    return stem is not None and (stem in tensors or f"{stem}_packed" in tensors or f"{stem}_blocks" in tensors)


def quantised(models: Sequence[Model]) -> dict[int, InputError]:
    """The error for each quantised model, by its place."""
    return {place: error for place, model in enumerate(models) if (error := refuse(model)) is not None}


def dequantised(model: Model) -> str | None:
    """What the plan says of a model whose quantised tensors are read as the weights that they stand for."""
    if not isinstance(model.source, ScaledCheckpoint):
        return None
    scaled = model.source.scaled
    high, wide = next(iter(scaled.values())).block
    tensors = "1 tensor" if len(scaled) == 1 else f"{len(scaled)} tensors"
    return f"{tensors} of {model.name}: float8_e4m3fn times the scales of {high} × {wide} blocks, read as float32"
