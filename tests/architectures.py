"""Tiny models of many architectures, as `transformers` saves and loads them: the material of the end-to-end tests.

Every configuration is a real one with small numbers: a few KB to about 200 KB on disk. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96

# The dimensions that most decoders name alike.
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: calling it gives its tiny configuration; `model` names the class that builds and loads it."""

    model: str
    settings: Callable[[], PreTrainedConfig]

    def __call__(self) -> PreTrainedConfig:
        return self.settings()


def _one(config: str, model: str = "AutoModelForCausalLM", /, **settings: Any) -> Architecture:
    """An architecture whose configuration class is `config`, with these settings."""

    def build() -> PreTrainedConfig:
        import transformers

        return getattr(transformers, config)(**settings)

    return Architecture(model, build)


def _decoder(config: str, model: str = "AutoModelForCausalLM", /, **settings: Any) -> Architecture:
    return _one(config, model, **{**_DECODER, **settings})


def _nested(config: str, model: str, /, **settings: Any) -> Architecture:
    """An architecture whose text model is a nested `text_config` with the usual dimensions."""
    text = {**_DECODER, **settings.pop("text_config")}
    return _one(config, model, text_config=text, **settings)


_FULL = "full_attention"
_SLIDING = "sliding_attention"

ARCHITECTURES: dict[str, Architecture] = {
    # decoders, one block per layer
    "llama": _decoder("LlamaConfig", tie_word_embeddings=False),
    "mistral": _decoder("MistralConfig", tie_word_embeddings=False, sliding_window=16, head_dim=8),
    "qwen2": _decoder("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3Config", tie_word_embeddings=False, head_dim=16),
    "gemma3_text": _decoder("Gemma3TextConfig", head_dim=8, sliding_window=16, layer_types=[_SLIDING, _SLIDING, _FULL]),
    "phi3": _decoder("Phi3Config", tie_word_embeddings=False),
    "olmo2": _decoder("Olmo2Config", tie_word_embeddings=False),
    "starcoder2": _decoder("Starcoder2Config", use_bias=True),
    "gpt2": _one(
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": _one(
        "GPTNeoXConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _one(
        "OPTConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bloom": _one(
        "BloomConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "falcon": _one(
        "FalconConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        new_decoder_architecture=True,
        num_kv_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # mixtures of experts
    "mixtral": _decoder("MixtralConfig", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _decoder(
        "Qwen3MoeConfig",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3Config",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": _decoder(
        "GptOssConfig",
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=16,
        layer_types=[_SLIDING, _FULL, _SLIDING],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # state space models
    "mamba": _one(
        "MambaConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=3,
        time_step_rank=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "mamba2": _one(
        "Mamba2Config",
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        chunk_size=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    # encoders, and encoders with decoders
    "bert": _one(
        "BertConfig",
        "AutoModelForMaskedLM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "t5": _one(
        "T5Config",
        "AutoModelForSeq2SeqLM",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "whisper": _one(
        "WhisperConfig",
        "AutoModelForSpeechSeq2Seq",
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "vit": _one(
        "ViTConfig",
        "AutoModelForImageClassification",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    ),
    # a vision tower beside a language model
    "qwen2_5_vl": _nested(
        "Qwen2_5_VLConfig",
        "AutoModelForImageTextToText",
        text_config={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    ),
    "gemma3": _nested(
        "Gemma3Config",
        "AutoModelForImageTextToText",
        text_config={"head_dim": 8, "sliding_window": 16, "layer_types": [_SLIDING, _SLIDING, _FULL]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    ),
}


def make(
    name: str,
    folder: Path,
    *,
    count: int,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[Path]:
    """Save `count` models of architecture `name` into `folder`: the base, then fine-tunes of it.

    The base is the freshly initialised model with noise on every floating parameter, so that no two tensors are
    alike; a fine-tune is the base with a little more noise. Buffers are the same in all of them. The same
    arguments give the same bytes.
    """
    import torch

    paths = []
    with _seeded(seed):
        model = _class(name)(ARCHITECTURES[name](), dtype=getattr(torch, dtype)).eval()
        _keep_float32(model)
        _perturb(model, scale=0.05)
        base = {key: value.detach().clone() for key, value in model.named_parameters()}
    for index in range(count):
        if index:
            with _seeded(1000 * seed + index):
                _restore(model, base)
                _perturb(model, scale=0.02)
        path = Path(folder) / ("base" if index == 0 else f"tuned-{index}")
        model.save_pretrained(path)
        paths.append(path)
    return paths


def load(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a folder as users do, without a network: the model, and what transformers says of the loading."""
    model, info = getattr(_transformers(), ARCHITECTURES[name].model).from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    return model.eval(), info


def assert_clean(info: Mapping[str, Any]) -> None:
    """Demand that every tensor of the files met one of the model, and the other way round."""
    complaints = {key: value for key, value in info.items() if value}
    assert not complaints, f"not loaded cleanly: {complaints}"
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)


def _transformers() -> Any:
    import transformers

    return transformers


def _class(name: str) -> Callable[..., PreTrainedModel]:
    """What builds a model of this architecture from its configuration."""
    return getattr(_transformers(), ARCHITECTURES[name].model).from_config


def _keep_float32(model: PreTrainedModel) -> None:
    """Make the tensors float32 that loading would: real bfloat16 checkpoints mix types in the same way."""
    words = model._keep_in_fp32_modules_strict or ()
    for owner in (dict(model.named_parameters()), dict(model.named_buffers())):
        for key, tensor in owner.items():
            if any(word in key for word in words):
                tensor.data = tensor.data.float()


def _perturb(model: PreTrainedModel, *, scale: float) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # tied parameters come once
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, dtype=torch.float32)
                parameter.copy_(parameter.float() + scale * noise)


def _restore(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(values[key])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator seeded inside, and as it was afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
