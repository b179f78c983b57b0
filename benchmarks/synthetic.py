"""Synthetic Llama-shaped checkpoints for benchmarks: a base and fine-tunes near it, sharded bfloat16 safetensors.

usage: python benchmarks/synthetic.py SIZE FOLDER COUNT      SIZE is tiny, 160m, 1b or 7b
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smelt.dtypes import BF16, encode
from smelt.storage.layout import OutputTensor
from smelt.storage.writer import Build, layout

SIZES = {
    "tiny": {"hidden": 64, "ffn": 176, "layers": 4, "heads": 4, "kv": 2, "vocab": 512},
    "160m": {"hidden": 768, "ffn": 2048, "layers": 12, "heads": 12, "kv": 12, "vocab": 32000},
    "1b": {"hidden": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000},
    "7b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32000},
}
CHUNK = 1 << 22


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


def make(name: str, folder: Path, count: int) -> list[Path]:
    """Write `count` checkpoints, the first of them the base, and return their folders."""
    size = SIZES[name]
    folders = [folder / ("base" if i == 0 else f"ft{i}") for i in range(count)]
    plan = layout([OutputTensor(n, BF16, shape) for n, shape in tensors(size)], shard_bytes=2 << 30)
    builds = [Build.start(out, plan, overwrite=True) for out in folders]
    random = np.random.Generator(np.random.SFC64(0))
    raw = np.empty(2 * CHUNK, dtype=np.uint8)
    for tensor, shape in tensors(size):
        total = int(np.prod(shape))
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


if __name__ == "__main__":
    for made in make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])):
        print(made)
