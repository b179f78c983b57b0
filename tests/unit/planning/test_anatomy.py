"""What each tensor is: real name tables of many architectures, and tables that are wrong in some way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from smelt.dtypes import BF16
from smelt.errors import InputError
from smelt.planning.anatomy import Anatomy, Role, anatomy, check, layer_lists, layer_numbers
from smelt.specs import TensorSpec

V, H = 96, 32  # vocabulary, hidden size

Shapes = Mapping[str, tuple[int, ...]]


def specs(shapes: Shapes) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, BF16, shape) for name, shape in shapes.items()}


def stack(prefix: str, layers: Sequence[int] | int, *suffixes: str) -> dict[str, tuple[int, ...]]:
    numbers = range(layers) if isinstance(layers, int) else layers
    return {f"{prefix}.{number}.{suffix}": (H, H) for number in numbers for suffix in suffixes}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what should be found in it."""

    shapes: Shapes
    config: dict[str, object] | None
    stacks: dict[str, int]
    main: str | None
    embedding: str | None
    head: str | None = None
    tied: bool = False
    keys: tuple[tuple[str, ...], ...] = (("num_hidden_layers",),)
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    heads: tuple[str, ...] = field(default=())


def decoder(**settings: object) -> dict[str, object]:
    return {"vocab_size": V, "num_hidden_layers": 3, "hidden_size": H, **settings}


LLAMA = stack("model.layers", 3, "self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
ENDS = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
HEAD = {"lm_head.weight": (V, H)}

CASES = {
    "llama": Case(
        LLAMA | ENDS | HEAD,
        decoder(tie_word_embeddings=False),
        {"model.layers": 3},
        "model.layers",
        "model.embed_tokens.weight",
        "lm_head.weight",
        after=("model.norm.weight",),
    ),
    "qwen2 tied": Case(
        LLAMA | ENDS,
        decoder(tie_word_embeddings=True),
        {"model.layers": 3},
        "model.layers",
        "model.embed_tokens.weight",
        tied=True,
    ),
    "gpt2, as the hub has it": Case(
        {
            "wte.weight": (V, H),
            "wpe.weight": (64, H),
            "ln_f.weight": (H,),
            "ln_f.bias": (H,),
            **stack("h", 3, "attn.c_attn.weight", "attn.c_attn.bias", "ln_1.weight"),
        },
        {"vocab_size": V, "n_layer": 3, "architectures": ["GPT2LMHeadModel"]},
        {"h": 3},
        "h",
        "wte.weight",
        tied=True,
        keys=(("n_layer",),),
        before=("wpe.weight",),
        after=("ln_f.weight", "ln_f.bias"),
    ),
    "gpt_neox": Case(
        {
            "gpt_neox.embed_in.weight": (V, H),
            "embed_out.weight": (V, H),
            "gpt_neox.final_layer_norm.weight": (H,),
            **stack("gpt_neox.layers", 3, "attention.dense.weight", "attention.dense.bias"),
        },
        decoder(tie_word_embeddings=False),
        {"gpt_neox.layers": 3},
        "gpt_neox.layers",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        after=("gpt_neox.final_layer_norm.weight",),
    ),
    "bloom": Case(
        {
            "transformer.word_embeddings.weight": (V, H),
            "transformer.word_embeddings_layernorm.weight": (H,),
            "transformer.ln_f.weight": (H,),
            **stack("transformer.h", 3, "mlp.dense_h_to_4h.weight"),
        },
        {"vocab_size": V, "n_layer": 3, "tie_word_embeddings": True},
        {"transformer.h": 3},
        "transformer.h",
        "transformer.word_embeddings.weight",
        tied=True,
        keys=(("n_layer",),),
        before=("transformer.word_embeddings_layernorm.weight",),
        after=("transformer.ln_f.weight",),
    ),
    "opt": Case(
        {
            "model.decoder.embed_tokens.weight": (V, H),
            "model.decoder.embed_positions.weight": (V, H),
            "model.decoder.final_layer_norm.weight": (H,),
            **stack("model.decoder.layers", 3, "self_attn.k_proj.weight", "final_layer_norm.weight"),
        },
        decoder(),
        {"model.decoder.layers": 3},
        "model.decoder.layers",
        "model.decoder.embed_tokens.weight",
        tied=True,
        before=("model.decoder.embed_positions.weight",),
    ),
    "mamba": Case(
        {
            "backbone.embeddings.weight": (V, H),
            "backbone.norm_f.weight": (H,),
            **stack("backbone.layers", 3, "mixer.A_log", "mixer.D", "norm.weight"),
        },
        decoder(tie_word_embeddings=True),
        {"backbone.layers": 3},
        "backbone.layers",
        "backbone.embeddings.weight",
        tied=True,
        after=("backbone.norm_f.weight",),
    ),
    "bert": Case(
        {
            "bert.embeddings.word_embeddings.weight": (V, H),
            "bert.embeddings.position_embeddings.weight": (V, H),
            "bert.embeddings.token_type_embeddings.weight": (2, H),
            "bert.embeddings.LayerNorm.weight": (H,),
            "cls.predictions.bias": (V,),
            "cls.predictions.transform.dense.weight": (H, H),
            "cls.predictions.transform.dense.bias": (H,),
            "bert.pooler.dense.weight": (H, H),
            **stack("bert.encoder.layer", 3, "attention.self.query.weight", "output.LayerNorm.weight"),
        },
        decoder(architectures=["BertForMaskedLM"]),
        {"bert.encoder.layer": 3},
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings.weight",
        tied=True,
        before=(
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
            "bert.embeddings.LayerNorm.weight",
        ),
        after=("cls.predictions.transform.dense.weight", "bert.pooler.dense.weight"),
        heads=("cls.predictions.bias",),
    ),
    "bert, untied, head under predictions": Case(
        {
            "bert.embeddings.word_embeddings.weight": (V, H),
            "cls.predictions.decoder.weight": (V, H),
            "cls.predictions.decoder.bias": (V,),
            **stack("bert.encoder.layer", 3, "attention.self.query.weight"),
        },
        decoder(tie_word_embeddings=False),
        {"bert.encoder.layer": 3},
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        heads=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    ),
    "t5, with the embedding three times": Case(
        {
            "shared.weight": (V, H),
            "encoder.embed_tokens.weight": (V, H),
            "decoder.embed_tokens.weight": (V, H),
            "encoder.final_layer_norm.weight": (H,),
            **stack("encoder.block", 3, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
            **stack("decoder.block", 2, "layer.0.SelfAttention.q.weight", "layer.2.DenseReluDense.wi.weight"),
        },
        {"vocab_size": V, "num_layers": 3, "num_decoder_layers": 2, "is_encoder_decoder": True},
        {"encoder.block": 3, "decoder.block": 2},
        None,
        "shared.weight",
        tied=True,
        keys=(),
    ),
    "whisper": Case(
        {
            "model.decoder.embed_tokens.weight": (V, H),
            "model.decoder.embed_positions.weight": (H, H),
            "model.encoder.conv1.weight": (H, 8, 3),
            "model.encoder.layer_norm.weight": (H,),
            **stack("model.encoder.layers", 2, "fc1.weight"),
            **stack("model.decoder.layers", 3, "fc1.weight"),
        },
        {"vocab_size": V, "encoder_layers": 2, "decoder_layers": 3, "is_encoder_decoder": True},
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        None,
        "model.decoder.embed_tokens.weight",
        tied=True,
        keys=(),
        before=("model.decoder.embed_positions.weight", "model.encoder.conv1.weight"),
        after=("model.encoder.layer_norm.weight",),
    ),
    "vit": Case(
        {
            "vit.embeddings.cls_token": (1, 1, H),
            "vit.embeddings.position_embeddings": (1, 5, H),
            "vit.embeddings.patch_embeddings.projection.weight": (H, 3, 8, 8),
            "vit.layernorm.weight": (H,),
            "classifier.weight": (5, H),
            **stack("vit.encoder.layer", 3, "attention.output.dense.weight"),
        },
        {"num_hidden_layers": 3},
        {"vit.encoder.layer": 3},
        "vit.encoder.layer",
        None,
        before=(
            "vit.embeddings.cls_token",
            "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight",
        ),
        after=("vit.layernorm.weight", "classifier.weight"),
    ),
    "qwen2_5_vl, its vision tower longer": Case(
        LLAMA
        | ENDS
        | HEAD
        | stack("visual.blocks", 5, "attn.qkv.weight")
        | {
            "visual.merger.mlp.0.weight": (H, H),
            "visual.merger.mlp.2.weight": (H, H),
            "visual.patch_embed.proj.weight": (H, 3, 2, 4, 4),
        },
        {"tie_word_embeddings": False, "text_config": decoder(), "vision_config": {"depth": 5}},
        {"model.layers": 3, "visual.blocks": 5},
        "model.layers",
        "model.embed_tokens.weight",
        "lm_head.weight",
        keys=(("text_config", "num_hidden_layers"),),
        before=("visual.merger.mlp.0.weight", "visual.patch_embed.proj.weight"),
    ),
    "flat and nested count, towers of equal length": Case(
        LLAMA | ENDS | stack("visual.blocks", 3, "attn.qkv.weight"),
        {**decoder(tie_word_embeddings=True), "text_config": decoder(), "vision_config": {"depth": 3}},
        {"model.layers": 3, "visual.blocks": 3},
        "model.layers",
        "model.embed_tokens.weight",
        tied=True,
        keys=(("num_hidden_layers",), ("text_config", "num_hidden_layers")),
    ),
    "gemma3 with vision": Case(
        {
            "language_model.model.embed_tokens.weight": (V, H),
            "language_model.model.norm.weight": (H,),
            "multi_modal_projector.mm_input_projection_weight": (H, H),
            "vision_tower.vision_model.post_layernorm.weight": (H,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (V, H),
            **stack("language_model.model.layers", 3, "mlp.up_proj.weight"),
            **stack("vision_tower.vision_model.encoder.layers", 2, "mlp.fc1.weight"),
        },
        {"text_config": decoder(), "vision_config": {"num_hidden_layers": 2}},
        {"language_model.model.layers": 3, "vision_tower.vision_model.encoder.layers": 2},
        "language_model.model.layers",
        "language_model.model.embed_tokens.weight",
        tied=True,
        keys=(("text_config", "num_hidden_layers"),),
        before=(
            "multi_modal_projector.mm_input_projection_weight",
            "vision_tower.vision_model.post_layernorm.weight",
            "vision_tower.vision_model.embeddings.position_embedding.weight",
        ),
        after=("language_model.model.norm.weight",),
    ),
    "original Mistral names, no config": Case(
        {
            "tok_embeddings.weight": (V, H),
            "output.weight": (V, H),
            "norm.weight": (H,),
            **stack("layers", 3, "attention.wq.weight"),
        },
        None,
        {"layers": 3},
        "layers",
        "tok_embeddings.weight",
        "output.weight",
        keys=(),
        after=("norm.weight",),
    ),
    "names of no known kind": Case(
        {"transformer.w.weight": (V, H), **stack("transformer.things", 3, "first.kernel")},
        {"vocab_size": V, "num_layers": 3},
        {"transformer.things": 3},
        "transformer.things",
        "transformer.w.weight",
        tied=True,
        keys=(("num_layers",),),
    ),
}


def found(case: Case) -> Anatomy:
    return anatomy(specs(case.shapes), case.config)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_its_part(name: str) -> None:
    case = CASES[name]
    body = found(case)
    assert list(body.parts) == list(case.shapes)
    assert (body.stacks, body.main, body.embedding, body.head, body.tied) == (
        case.stacks,
        case.main,
        case.embedding,
        case.head,
        case.tied,
    )
    assert body.layer_count_keys == case.keys
    assert (body.extra_layers, body.broken) == (0, {})
    for names, role in ((case.before, Role.BEFORE), (case.after, Role.AFTER), (case.heads, Role.HEAD)):
        assert {name: body.parts[name].role for name in names} == dict.fromkeys(names, role)
    for part_name, part in body.parts.items():
        if part.stack is not None:
            assert part.role is Role.LAYER
            assert part_name == f"{part.stack}.{part.layer}.{part.suffix}"
        else:
            assert (part.layer, part.suffix) == (None, part_name)
    assert check(body, case.config, "m") == []


def test_the_same_embedding_stored_again_is_an_embedding() -> None:
    body = found(CASES["t5, with the embedding three times"])
    assert body.parts["decoder.embed_tokens.weight"].role is Role.EMBEDDING


# --- experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "expert"),
    [
        ("block_sparse_moe.experts.3.w1.weight", 3),
        ("mlp.experts.11.gate_proj.weight", 11),
        ("mlp.experts.expert_2.wi.weight", 2),
        ("mlp.experts.gate_up_proj", None),
        ("mlp.shared_experts.up_proj.weight", None),
        ("mlp.shared_expert_gate.weight", None),
        ("mlp.gate.weight", None),
    ],
)
def test_experts(suffix: str, expert: int | None) -> None:
    body = anatomy(specs(LLAMA | {f"model.layers.1.{suffix}": (H, H)}), None)
    part = body.parts[f"model.layers.1.{suffix}"]
    assert (part.stack, part.layer, part.suffix, part.expert) == ("model.layers", 1, suffix, expert)
    assert body.stacks == {"model.layers": 3}


# --- stacks -----------------------------------------------------------------------------------------------


def test_one_layer() -> None:
    body = anatomy(specs(ENDS | stack("model.layers", 1, "mlp.up.weight")), {"num_hidden_layers": 1})
    assert (body.stacks, body.main) == ({"model.layers": 1}, "model.layers")


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2, 3), (3,), (0, 1, 7)])
def test_numbers_with_a_gap_are_no_stack(numbers: tuple[int, ...]) -> None:
    shapes = ENDS | stack("model.layers", numbers, "block.0.deep.weight", "block.1.deep.weight")
    body = anatomy(specs(shapes), decoder())
    assert (body.stacks, body.main, body.broken) == ({}, None, {"model.layers": numbers})
    (problem,) = check(body, decoder(num_hidden_layers=4), "org/cut")
    assert isinstance(problem, InputError)
    assert "org/cut" in problem.message
    absent = sorted(set(range(max(4, numbers[-1] + 1))) - set(numbers))
    assert problem.where[-1].endswith(", ".join(map(str, absent)))


def test_a_sequential_is_no_stack_and_what_is_inside_may_be() -> None:
    shapes = {
        "mlp1.0.weight": (H, H),
        "mlp1.1.weight": (H, H),
        "net.0.weight": (H, H),
        **stack("net.1.blocks", 2, "attn.weight"),
    }
    body = anatomy(specs(shapes), None)
    assert body.stacks == {"net.1.blocks": 2}
    assert body.parts["mlp1.0.weight"].stack is None
    assert body.parts["net.1.blocks.1.attn.weight"].layer == 1


@pytest.mark.parametrize(
    "name",
    ["0.weight.x", "a.00.b.c", "a.1234567.b.c", "", ".", "..0..", "a.0", "0", "a.0.", "a b.0.ü.c", "a.٣.b.c"],
)
def test_odd_names_are_parts_like_others(name: str) -> None:
    body = anatomy(specs({name: (H, H), **LLAMA}), None)
    assert body.main == "model.layers"
    assert body.parts[name].role in (Role.LAYER, Role.AFTER)


def test_without_config_the_longest_stack_is_the_main_one() -> None:
    body = anatomy(specs(stack("a.layers", 2, "x.weight") | stack("b.layers", 3, "x.weight")), None)
    assert body.main == "b.layers"
    equal = anatomy(specs(stack("a.layers", 2, "x.weight") | stack("b.layers", 2, "x.weight")), None)
    assert equal.main is None


def test_nothing_at_all() -> None:
    body = anatomy({}, None)
    assert (body.parts, body.main, body.tied) == ({}, None, False)
    assert check(body, decoder(), "empty") == []


# --- head and embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, True),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"vision_config": {"tie_word_embeddings": False}}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["LlamaModel"]}, False),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({}, True),
        (None, True),
    ],
)
def test_tied(config: dict[str, object] | None, tied: bool) -> None:
    assert anatomy(specs(LLAMA | ENDS), config).tied is tied
    assert anatomy(specs(LLAMA | ENDS | HEAD), config).tied is False


def test_a_padded_vocabulary_and_a_head_of_another_size_are_still_found() -> None:
    body = anatomy(specs(LLAMA | {"model.embed_tokens.weight": (128, H), "lm_head.weight": (V, H)}), decoder())
    assert (body.embedding, body.head) == ("model.embed_tokens.weight", "lm_head.weight")


def test_a_small_vocabulary_does_not_make_norms_into_heads() -> None:
    shapes = {
        "model.embed_tokens.weight": (H, H),
        "model.norm.weight": (H,),
        "model.norm.bias": (H,),
        "pooler.dense.weight": (H, H),
        "lm_head.bias": (H,),
        "lm_head.weight": (H, H),
    }
    body = anatomy(specs(LLAMA | shapes), decoder(vocab_size=H))
    roles = [body.parts[name].role for name in shapes]
    assert roles == [Role.EMBEDDING, Role.AFTER, Role.AFTER, Role.AFTER, Role.HEAD, Role.HEAD]


# --- buffers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "buffer"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,), True),
        ("model.rotary_emb.inv_freq", (16,), True),
        ("model.layers.0.attn.masked_bias", (), True),
        ("model.layers.0.attention.masked_bias", (), True),
        ("model.layers.0.attn.bias", (1, 1, 64, 64), True),
        ("model.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("model.layers.0.attn.attention.bias", (1, 1, 64, 64), True),
        ("model.layers.0.attn.bias", (H,), False),
        ("model.layers.0.attn.bias", (1, 1, 8, H), False),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("position_ids", (1, 512), True),
        ("bert.embeddings.token_type_ids", (1, 512), True),
        ("model.my_position_ids", (1, 512), False),
    ],
)
def test_buffers(name: str, shape: tuple[int, ...], buffer: bool) -> None:
    part = anatomy(specs(LLAMA | {name: shape}), None).parts[name]
    assert (part.role is Role.BUFFER) is buffer
    assert (part.layer == 0) is name.startswith("model.layers.0.")


# --- config against files ---------------------------------------------------------------------------------


def test_a_config_that_counts_other_layers_is_refused() -> None:
    config = decoder(num_hidden_layers=4)
    body = anatomy(specs(LLAMA | ENDS), config)
    assert (body.main, body.layer_count_keys) == ("model.layers", ())
    (problem,) = check(body, config, "org/short")
    assert isinstance(problem, InputError)
    assert problem.message == "model org/short: config.json says 4 layers, the files have 3"
    assert problem.where == (
        "config.json  num_hidden_layers: 4",
        "files        model.layers.0 to model.layers.2",
    )
    assert problem.fix


def test_an_encoder_or_decoder_of_another_length_is_refused() -> None:
    case = CASES["t5, with the embedding three times"]
    config = {"num_layers": 3, "num_decoder_layers": 4}
    (problem,) = check(anatomy(specs(case.shapes), config), config, "org/t5")
    assert "the files have 2" in problem.message


@pytest.mark.parametrize("layers", [3, 4])
def test_layers_that_predict_further_tokens_are_legitimate(layers: int) -> None:
    config = decoder(num_nextn_predict_layers=1)
    shapes = ENDS | HEAD | stack("model.layers", layers, "mlp.up_proj.weight")
    if layers == 4:
        shapes |= {"model.layers.3.embed_tokens.weight": (V, H), "model.layers.3.shared_head.head.weight": (V, H)}
    body = anatomy(specs(shapes), config)
    assert check(body, config, "m") == []
    assert (body.embedding, body.head) == ("model.embed_tokens.weight", "lm_head.weight")
    assert (body.main, body.extra_layers) == ("model.layers", layers - 3)
    assert body.layer_count_keys == (("num_hidden_layers",),)


def test_layers_that_share_weights_are_legitimate() -> None:
    config: dict[str, object] = {"num_hidden_layers": 12, "num_hidden_groups": 1, "vocab_size": V}
    shapes = {"albert.embeddings.word_embeddings.weight": (V, H)}
    shapes |= stack("albert.encoder.albert_layer_groups", 1, "albert_layers.0.ffn.weight")
    assert check(anatomy(specs(shapes), config), config, "albert") == []


def test_towers_and_convolutions_are_not_judged_by_the_language_model_s_count() -> None:
    speech = LLAMA | ENDS | stack("model.audio_tower.encoder.stages", 7, "conv.weight")
    speech |= stack("model.audio_tower.decoder.stages", 6, "conv.weight")
    body = anatomy(specs(speech), {"text_config": decoder()})
    assert body.main == "model.layers"
    assert check(body, {"text_config": decoder()}, "speech") == []

    network = specs(stack("net.encoder.blocks", 5, "conv.weight"))
    assert check(anatomy(network, {"num_hidden_layers": 64}), {"num_hidden_layers": 64}, "net") == []

    nested = {**decoder(), "encoder_config": {"num_hidden_layers": 4}, "is_encoder_decoder": True}
    both = {"model.decoder.embed_tokens.weight": (V, H)}
    both |= stack("model.encoder.layers", 4, "fc.weight") | stack("model.decoder.layers", 3, "fc.weight")
    assert check(anatomy(specs(both), nested), nested, "asr") == []


def test_a_config_without_a_count_contradicts_nothing() -> None:
    assert check(anatomy(specs(LLAMA), {"text_config": {}}), {"text_config": {}}, "m") == []
    assert check(anatomy(specs(LLAMA), None), None, "m") == []
    odd: dict[str, object] = {"num_hidden_layers": "3", "n_layer": True, "depth": [1, 2], "text_config": []}
    assert check(anatomy(specs(LLAMA), odd), odd, "m") == []


def test_a_gap_is_seen_beside_a_tower_of_the_right_length() -> None:
    config = {"text_config": decoder(), "vision_config": {"depth": 3}}
    shapes = {"language_model.embed_tokens.weight": (V, H)}
    shapes |= stack("language_model.layers", (0, 2), "mlp.weight") | stack("visual.blocks", 3, "attn.weight")
    (problem,) = check(anatomy(specs(shapes), config), config, "org/vl")
    assert problem.where[-1] == "files        language_model.layers.N without N = 1"
    unrelated = CASES["llama"].shapes | stack("features", (1, 3), "conv.weight")
    assert check(anatomy(specs(unrelated), decoder()), decoder(), "m") == []


# --- per-layer settings -----------------------------------------------------------------------------------


def test_lists_of_one_value_per_layer() -> None:
    config: dict[str, object] = {
        "architectures": ["A", "B", "C"],
        "eos_token_id": [1, 2, 3],
        "vision_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
        "rope_parameters": {"mrope_section": [1, 1, 2]},
        "text_config": decoder(
            layer_types=["full_attention"] * 3,
            intermediate_size=[8, 16, 8],
            no_rope_layers=[1, 1, 0],
            hybrid_override_pattern="M-*",
            model_type="abc",
            mlp_only_layers=[0, 2],
            moe_layers=[0, 1, 2],
            cross_attention_layers=[],
            time_step_limit=[0.0, 1.0, 2.0],
        ),
    }
    assert layer_lists(config, 3) == (
        ("text_config", "layer_types"),
        ("text_config", "intermediate_size"),
        ("text_config", "no_rope_layers"),
        ("text_config", "hybrid_override_pattern"),
    )
    assert layer_numbers(config, 3) == (("text_config", "mlp_only_layers"), ("text_config", "moe_layers"))
    assert layer_lists(config, 4) == ()


def test_a_list_may_be_all_that_counts_the_layers() -> None:
    config: dict[str, object] = {"layers_block_type": ["mamba", "attention"], "languages": ["en", "de"]}
    assert layer_lists(config, 2) == (("layers_block_type",),)


# --- size -------------------------------------------------------------------------------------------------


def test_sixty_thousand_tensors() -> None:
    shapes = ENDS | HEAD
    for layer in range(61):
        for expert in range(328):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"] = (8, 8)
    tensors = specs(shapes)
    body = anatomy(tensors, decoder(num_hidden_layers=61))
    assert (len(tensors) > 60_000, body.main, body.stacks["model.layers"]) == (True, "model.layers", 61)
