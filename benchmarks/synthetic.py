"""Synthetic checkpoints for benchmarks, sharded bfloat16 safetensors: a base and fine-tunes near it.

Llama-shaped ones with numbers; ones of headers alone, whose data is a hole in the file and takes no disk; and mixtures
of experts of many tensors.
usage: python benchmarks/synthetic.py SIZE FOLDER COUNT      SIZE is tiny, 160m, 1b or 7b
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from smelt.dtypes import BF16, encode
from smelt.storage.layout import INDEX, OutputTensor
from smelt.storage.writer import Build, layout

SIZES = {
    "tiny": {"hidden": 64, "ffn": 176, "layers": 4, "heads": 4, "kv": 2, "vocab": 512},
    "160m": {"hidden": 768, "ffn": 2048, "layers": 12, "heads": 12, "kv": 12, "vocab": 32000},
    "1b": {"hidden": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000},
    "7b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32000},
}
CHUNK = 1 << 22
Shapes: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sizes of a mixture of experts."""

    layers: int
    experts: int
    hidden: int
    ffn: int
    vocab: int = 32000


def tensors(size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of this size."""
    hidden, ffn, kv = size["hidden"], size["ffn"], size["hidden"] // size["heads"] * size["kv"]
    yield "model.embed_tokens.weight", (size["vocab"], hidden)
    for layer in range(size["layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", (ffn, hidden)
        yield prefix + "mlp.up_proj.weight", (ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, ffn)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size["vocab"], hidden)


def config(size: dict[str, int]) -> dict[str, object]:
    """The config.json of such a model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["ffn"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def size_bytes(name: str, **changed: int) -> int:
    """Bytes of the weights of such a model."""
    return 2 * sum(math.prod(shape) for _, shape in tensors(SIZES[name] | changed))


def make(name: str, folder: Path, count: int, **changed: int) -> list[Path]:
    """Write `count` Llamas, the first of them the base, and return their folders; `changed`: other sizes, as layers."""
    size = SIZES[name] | changed
    shapes = list(tensors(size))
    folders = _folders(folder, count)
    plan = layout([OutputTensor(n, BF16, shape) for n, shape in shapes], shard_bytes=2 << 30)
    builds = [Build.start(out, plan, overwrite=True) for out in folders]
    random = np.random.Generator(np.random.SFC64(0))
    raw = np.empty(2 * CHUNK, dtype=np.uint8)
    for tensor, shape in shapes:
        total = math.prod(shape)
        for start in range(0, total, CHUNK):
            span = min(CHUNK, total - start)
            base = random.standard_normal(span, dtype=np.float32) * np.float32(0.02)
            if len(shape) == 1:
                base = 1 + base / 2
            for i, build in enumerate(builds):
                noise = random.standard_normal(span, dtype=np.float32) * np.float32(0.002) if i else np.float32(0)
                encode(base + noise, BF16, raw[: 2 * span])
                build.write(tensor, 2 * start, raw[: 2 * span])
    for build in builds:
        build.put("config.json", json.dumps(config(size)).encode())
        build.commit()
    return folders


def expert_tensors(mixture: Mixture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a mixture of experts."""
    hidden, ffn = mixture.hidden, mixture.ffn
    yield "model.embed_tokens.weight", (mixture.vocab, hidden)
    for layer in range(mixture.layers):
        prefix = f"model.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}self_attn.{part}.weight", (hidden, hidden)
        yield prefix + "mlp.gate.weight", (mixture.experts, hidden)
        for expert in range(mixture.experts):
            yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (ffn, hidden)
            yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (ffn, hidden)
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, ffn)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (mixture.vocab, hidden)


def expert_config(mixture: Mixture) -> dict[str, object]:
    """The config.json of such a model."""
    size = {"hidden": mixture.hidden, "ffn": mixture.ffn, "layers": mixture.layers, "heads": 8, "kv": 8}
    return config(size | {"vocab": mixture.vocab}) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": mixture.ffn,
        "num_experts": mixture.experts,
        "num_experts_per_tok": min(8, mixture.experts),
    }


def make_headers(shapes: Shapes, config: dict[str, object], folder: Path, count: int) -> list[Path]:
    """Write models of headers alone: every weight file has its full length, and its data is a hole."""
    plan = layout([OutputTensor(name, BF16, shape) for name, shape in shapes], shard_bytes=5_000_000_000)
    folders = _folders(folder, count)
    for out in folders:
        out.mkdir(parents=True)
        for shard in plan.shards:
            with open(out / shard.file, "wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        if plan.index is not None:
            (out / INDEX).write_bytes(plan.index)
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folders


def make_experts(mixture: Mixture, folder: Path, count: int) -> list[Path]:
    """Write mixtures of experts with numbers, a file at a time: one write for each of 60 000 tensors takes long."""
    folders = make_headers(list(expert_tensors(mixture)), expert_config(mixture), folder, count)
    random = np.random.Generator(np.random.SFC64(0))
    for file in sorted(folders[0].glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as head:
            start = 8 + int.from_bytes(head.read(8), "little")
        for low in range(start, size, 2 * CHUNK):
            span = (min(low + 2 * CHUNK, size) - low) // 2
            base = random.standard_normal(span, dtype=np.float32) * np.float32(0.02)
            raw = np.empty(2 * span, dtype=np.uint8)
            for i, out in enumerate(folders):
                noise = random.standard_normal(span, dtype=np.float32) * np.float32(0.002) if i else np.float32(0)
                encode(base + noise, BF16, raw)
                with open(out / file.name, "r+b") as data:
                    data.seek(low)
                    data.write(raw)
    return folders


def _folders(folder: Path, count: int) -> list[Path]:
    return [folder / ("base" if i == 0 else f"ft{i}") for i in range(count)]


if __name__ == "__main__":
    for made in make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])):
        print(made)
