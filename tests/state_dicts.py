"""State dicts as single files hold them: a Stable Diffusion checkpoint, text encoders, LoRA files; small and random.

Names, ranks and types are those of the real files; only the numbers of channels and blocks are small. The same seed
gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import factory
from factory import Array

UNET = "model.diffusion_model"
CLIP = "cond_stage_model.transformer.text_model"


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: Any) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _with_bias(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]
    return found


def stable_diffusion(*, seed: int = 0, channels: int = 8, dtype: Any = np.float16) -> dict[str, Array]:
    """The layout of a Stable Diffusion 1 file: UNet, VAE and CLIP text encoder, a schedule and counters beside them."""
    c, wide = channels, 2 * channels
    unet: dict[str, tuple[int, ...]] = {
        "time_embed.0": (4 * c, c),
        "time_embed.2": (4 * c, 4 * c),
        "input_blocks.0.0": (c, 4, 3, 3),
        "out.0": (c,),
        "out.2": (4, c, 3, 3),
    }
    for block in (1, 2):
        at = f"input_blocks.{block}"
        unet |= {
            f"{at}.0.in_layers.0": (c,),
            f"{at}.0.in_layers.2": (c, c, 3, 3),
            f"{at}.0.emb_layers.1": (c, 4 * c),
            f"{at}.1.norm": (c,),
            f"{at}.1.proj_in": (c, c, 1, 1),
            f"{at}.1.transformer_blocks.0.ff.net.0.proj": (wide, c),
        }
    for block in range(3):
        unet |= {
            f"output_blocks.{block}.0.in_layers.2": (c, wide, 3, 3),
            f"output_blocks.{block}.0.skip_connection": (c, wide, 1, 1),
        }
    unet |= {f"middle_block.{i}.in_layers.2": (c, c, 3, 3) for i in range(3)}
    shapes = {f"{UNET}.{name}": shape for name, shape in _with_bias(unet).items()}
    for block in (1, 2):  # attention without biases
        for projection, width in (("to_q", c), ("to_k", 12)):
            shapes[f"{UNET}.input_blocks.{block}.1.transformer_blocks.0.attn2.{projection}.weight"] = (c, width)
    vae: dict[str, tuple[int, ...]] = {
        "encoder.conv_in": (c, 3, 3, 3),
        "encoder.down.0.block.0.conv1": (c, c, 3, 3),
        "encoder.down.1.block.0.conv1": (c, c, 3, 3),
        "decoder.conv_out": (3, c, 3, 3),
        "quant_conv": (8, 8, 1, 1),
    }
    shapes |= {f"first_stage_model.{name}": shape for name, shape in _with_bias(vae).items()}
    shapes |= {f"{CLIP}.{name}": shape for name, shape in _text_model(layers=2, hidden=12).items()}
    tensors = _random(shapes, seed, dtype)
    tensors[f"{CLIP}.embeddings.position_ids"] = np.arange(7, dtype=np.int64)[None]
    tensors["alphas_cumprod"] = np.linspace(1, 0.01, 20, dtype=np.float32)
    tensors["logit_scale"] = np.asarray(4.6 + seed / 8, dtype=np.float32)
    tensors["model_ema.num_updates"] = np.asarray(100 + seed, dtype=np.int32)
    return tensors


def _text_model(*, layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (40, hidden),
        "embeddings.position_embedding.weight": (7, hidden),
    }
    for layer in range(layers):
        at = f"encoder.layers.{layer}"
        shapes |= _with_bias(
            {
                f"{at}.self_attn.q_proj": (hidden, hidden),
                f"{at}.mlp.fc1": (2 * hidden, hidden),
                f"{at}.layer_norm1": (hidden,),
            }
        )
    return shapes | _with_bias({"final_layer_norm": (hidden,)})


def clip_text(*, seed: int = 0) -> dict[str, Array]:
    """A CLIP text encoder with its projection and scale."""
    shapes = {f"text_model.{name}": shape for name, shape in _text_model(layers=3, hidden=8).items()}
    tensors = _random(shapes | {"text_projection.weight": (8, 8)}, seed, np.float32)
    tensors["text_model.embeddings.position_ids"] = np.arange(7, dtype=np.int64)[None]
    tensors["logit_scale"] = np.asarray(4.0 + seed, dtype=np.float32)
    return tensors


def bert(*, seed: int = 0) -> dict[str, Array]:
    """A BERT encoder, and a batch norm as a classifier may have one."""
    hidden = 8
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (30, hidden),
        "bert.embeddings.position_embeddings.weight": (16, hidden),
        "bert.embeddings.token_type_embeddings.weight": (2, hidden),
    }
    outside = {"bert.pooler.dense": (hidden, hidden), "bert.embeddings.LayerNorm": (hidden,), "norm": (hidden,)}
    layers = {
        f"bert.encoder.layer.{layer}.{name}": (hidden, hidden)
        for layer in range(3)
        for name in ("attention.self.query", "output.dense")
    }
    tensors = _random(shapes | _with_bias(outside | layers), seed, np.float32)
    tensors["norm.num_batches_tracked"] = np.asarray(1000 + seed, dtype=np.int64)
    tensors["bert.embeddings.position_ids"] = np.arange(16, dtype=np.int64)[None]
    return tensors


def lora(*, seed: int = 0, rank: int = 2, alpha: float | None = 2.0, names: str = "kohya") -> dict[str, Array]:
    """A LoRA file as kohya's scripts, peft or diffusers name its tensors (`names`); only the first has an alpha."""
    random = np.random.default_rng(seed)
    modules, (down, up) = {
        "kohya": (
            ["lora_unet_input_blocks_1_1_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"],
            ("lora_down", "lora_up"),
        ),
        "peft": ([f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)], ("lora_A", "lora_B")),
        "diffusers": ([f"unet.mid_block.attentions.{i}.to_q" for i in range(2)], ("lora.down", "lora.up")),
    }[names]
    tensors = {}
    for module in modules:
        tensors[f"{module}.{down}.weight"] = random.standard_normal((rank, 8)).astype(np.float32)
        tensors[f"{module}.{up}.weight"] = random.standard_normal((6, rank)).astype(np.float32)
        if names == "kohya" and alpha is not None:
            tensors[f"{module}.alpha"] = np.asarray(alpha, dtype=np.float32)
    return tensors


def write(path: Path, tensors: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None) -> Path:
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(factory.file(tensors, metadata=metadata))
    return path
