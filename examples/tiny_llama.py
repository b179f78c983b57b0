"""A Llama forward pass in NumPy, so that a merged model can be run on a machine without torch.

It shows how little a checkpoint is: a JSON header, some bytes, and about fifty lines of arithmetic. It is meant
for models of a few million parameters, and reads them without the help of any library.

Shapes: b sequences, t new tokens, s tokens seen so far, d hidden size, h query heads, g key-value heads,
e head size. Everything is float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of one safetensors file as float32: 8 bytes of length, a JSON header, then the data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[start + begin : start + end]
        tensors[name] = _to_float32(data, entry["dtype"], name).reshape(entry["shape"])
    return tensors


def _to_float32(data: bytes, dtype: str, name: str) -> Array:
    match dtype:
        case "BF16":  # bfloat16 is the upper half of a float32
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(data, "<f2").astype(np.float32)
        case "F32":
            return np.frombuffer(data, "<f4")
    raise ValueError(f"tensor {name!r} has dtype {dtype}; this reader knows BF16, F16 and F32")


def read_weights(folder: Path) -> dict[str, Array]:
    """The weights of a checkpoint folder: one model.safetensors, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in read_safetensors(folder / shard).items()}


@dataclass(slots=True)
class Cache:
    """Keys and values of the tokens seen so far, per layer, each [b, g, s, e]; `visible` [b, s] masks padding."""

    visible: Array
    keys: dict[int, Array] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)

    def extend(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        if layer in self.keys:
            keys = np.concatenate([self.keys[layer], keys], axis=2)
            values = np.concatenate([self.values[layer], values], axis=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


class TinyLlama:
    """A Llama model from a safetensors folder: `logits` for scoring, `greedy` for generation."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != "llama" or config["hidden_act"] != "silu":
            raise ValueError(f"{folder} holds a {config['model_type']} model; this file runs Llama models only")
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{folder} uses rotary embeddings of type {rope['rope_type']}, unknown here")

        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_size: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.epsilon: float = config["rms_norm_eps"]
        powers = np.arange(0, self.head_size, 2) / self.head_size
        self.frequencies = float(rope["rope_theta"]) ** -powers  # [e/2], radians per position
        self.tied: bool = config.get("tie_word_embeddings", False)
        self.load(read_weights(folder))

    def load(self, weights: Mapping[str, Array]) -> None:
        """Take these weights, of the same shapes and names, in place of those it had."""
        self.norms = {name: tensor for name, tensor in weights.items() if tensor.ndim == 1}
        self.embedding = weights["model.embed_tokens.weight"]  # [vocabulary, d]
        if self.tied or "lm_head.weight" not in weights:
            weights = {**weights, "lm_head.weight": self.embedding}
        # Linear layers are stored [out, in] and applied as x @ w.T; transposed once, here.
        self.matrices = {name: np.ascontiguousarray(w.T) for name, w in weights.items() if w.ndim == 2}

    def logits(self, tokens: Array) -> Array:
        """Scores of the next token after each token: tokens [b, t] of equal length -> [b, t, vocabulary]."""
        return self._head(self._hidden(tokens, Cache(visible=np.ones(tokens.shape, bool))))

    def greedy(self, prompts: list[list[int]], *, stop: set[int], most: int) -> list[list[int]]:
        """The likeliest continuation of each prompt, token by token, until a token of `stop` or `most` tokens."""
        width = max(map(len, prompts))
        tokens = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])  # padded on the left
        cache = Cache(visible=np.arange(width) >= width - np.array([[len(prompt)] for prompt in prompts]))
        answers: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        for _ in range(most):
            best = self._head(self._hidden(tokens, cache)[:, -1]).argmax(-1)  # [b]
            running &= ~np.isin(best, list(stop))
            for row in np.flatnonzero(running):
                answers[row].append(int(best[row]))
            if not running.any():
                break
            tokens = best[:, None]
            cache.visible = np.pad(cache.visible, ((0, 0), (0, 1)), constant_values=True)
        return answers

    def _hidden(self, tokens: Array, cache: Cache) -> Array:
        """The last layer's output [b, t, d] for new tokens [b, t], the last t of those that `cache.visible` counts."""
        new = tokens.shape[1]
        positions = np.maximum(np.cumsum(cache.visible, axis=1) - 1, 0)[:, -new:]  # padding does not count
        angles = positions[:, None, :, None] * self.frequencies  # [b, 1, t, e/2]
        rotation = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        seen = cache.visible.shape[1]
        causal = np.arange(seen) <= np.arange(seen - new, seen)[:, None]  # [t, s]
        allowed = causal & cache.visible[:, None, :]  # [b, t, s]
        mask = np.where(allowed, np.float32(0), np.float32(-1e9))[:, None, None]  # [b, 1, 1, t, s]

        x: Array = self.embedding[tokens]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(x, prefix + "input_layernorm.weight")
            x = x + self._attention(normed, layer, prefix + "self_attn.", rotation, mask, cache)
            normed = self._norm(x, prefix + "post_attention_layernorm.weight")
            x = x + self._feed_forward(normed, prefix + "mlp.")
        return x

    def _head(self, x: Array) -> Array:
        return self._linear(self._norm(x, "model.norm.weight"), "lm_head")

    def _norm(self, x: Array, name: str) -> Array:
        """RMSNorm: x / sqrt(mean(x²) + epsilon), times a learned scale."""
        mean_square = np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]
        scaled: Array = x / np.sqrt(mean_square + np.float32(self.epsilon)) * self.norms[name]
        return scaled

    def _linear(self, x: Array, name: str) -> Array:
        y: Array = x.reshape(-1, x.shape[-1]) @ self.matrices[name + ".weight"]  # one matrix product, not b of them
        if (bias := self.norms.get(name + ".bias")) is not None:
            y += bias
        return y.reshape(*x.shape[:-1], -1)

    def _attention(
        self, x: Array, layer: int, prefix: str, rotation: tuple[Array, Array], mask: Array, cache: Cache
    ) -> Array:
        """Grouped-query attention: each key-value head serves h/g query heads."""
        b, t, _ = x.shape
        g, group, e = self.kv_heads, self.heads // self.kv_heads, self.head_size
        q = self._split(x, prefix + "q_proj")  # [b, h, t, e]
        k = self._split(x, prefix + "k_proj")  # [b, g, t, e]
        v = self._split(x, prefix + "v_proj")
        q = rotate(q, *rotation).reshape(b, g, group, t, e)
        k, v = cache.extend(layer, rotate(k, *rotation), v)
        scores = q @ k[:, :, None].swapaxes(-1, -2)  # [b, g, group, t, s]
        scores *= np.float32(e**-0.5)
        scores += mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = (scores @ v[:, :, None]) / scores.sum(-1, keepdims=True)  # [b, g, group, t, e]
        return self._linear(mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, -1), prefix + "o_proj")

    def _split(self, x: Array, name: str) -> Array:
        b, t, _ = x.shape
        return self._linear(x, name).reshape(b, t, -1, self.head_size).transpose(0, 2, 1, 3)

    def _feed_forward(self, x: Array, prefix: str) -> Array:
        """SwiGLU: down(silu(gate(x)) * up(x)) with silu(z) = z / (1 + exp(-z))."""
        gate = self._linear(x, prefix + "gate_proj")
        with np.errstate(over="ignore"):  # exp(-z) -> inf gives the right limit, 0
            gate /= 1 + np.exp(-gate)
        return self._linear(gate * self._linear(x, prefix + "up_proj"), prefix + "down_proj")


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding: turn each pair (x[i], x[i + e/2]) by position x frequency[i]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
