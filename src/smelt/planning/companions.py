"""The small files beside the merged weights: config.json patched as raw JSON, and what is copied from the donor.

Re-saving a config through a model library would rewrite its keys; here only what the merge changed is touched.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from smelt.planning.anatomy import layer_lists, layer_numbers, other_count_keys
from smelt.planning.build import output_dtype
from smelt.planning.entries import Plan
from smelt.planning.locate import Model
from smelt.storage.layout import METADATA, STEM
from smelt.tokens import chat

OF_DONOR = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What is taken from the donor as it is; code (*.py) and cards never are."""
OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is taken from the model that gives the tokenizer."""


def weight_stem(donor: Model) -> str:
    """What the output's weight files are called: as those of a part of a pipeline are, else as those of a model."""
    if donor.config is None or library(donor.config) != "diffusers":
        return STEM
    return _OF_PART if all(info.name.startswith(_OF_PART) for info in donor.source.files) else STEM


def library(config: Mapping[str, object] | None) -> str | None:
    """The library that a config is written for; None without one."""
    if config is None:
        return None
    return "diffusers" if isinstance(config.get("_class_name"), str) else "transformers"


def metadata(donor: Model) -> dict[str, str]:
    """The `__metadata__` of the output's weight files: `format: pt`, and of a donor in one file what is plain text.

    Left out are hashes, which would be wrong of other tensors, and what is binary (pictures in `data:` form).
    """
    kept = donor.source.metadata if len(donor.source.files) == 1 else {}
    plain = {
        key: text for key, text in kept.items() if key not in METADATA and not _FALSE.match(key) and _is_plain(text)
    }
    return {**METADATA, **plain}


def _is_plain(text: str) -> bool:
    return not text.startswith("data:") and text.translate(_LINES).isprintable()


_LINES = dict.fromkeys(map(ord, "\n\r\t"))
_FALSE = re.compile(r"modelspec\.hash|sshs_|(?:sha256|hash|checksum|digest|total_size|total_parameters)$")
"""What is said of the donor's tensors, and would be wrong of others."""
_OF_PART = "diffusion_pytorch_model"
"""What diffusers calls the weights of a part of a pipeline."""


def small_files(plan: Plan, models: Sequence[Model], tokenizer: Model) -> dict[str, bytes]:
    """Everything beside the weights that does not speak of the merge itself: name -> content.

    `tokenizer` is the model that gives the tokenizer's files.
    """
    donor = models[plan.donor]
    files: dict[str, bytes] = {}
    config = merged_config(plan, models)
    if config is not None:
        files["config.json"] = json_bytes(config)
    for model, patterns in ((donor, OF_DONOR), (tokenizer, OF_TOKENIZER)):
        for name in model.source.other_files():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                content = model.source.bytes(name)
                if content is not None:
                    files[name] = content
    if plan.chat_template is not None:
        files.pop("chat_template.json", None)
        files[chat.FILE] = plan.chat_template.encode()
        settings = tokenizer.source.json("tokenizer_config.json")
        if settings is not None and settings.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = json_bytes(settings)
    return files


def merged_config(plan: Plan, models: Sequence[Model]) -> dict[str, Any] | None:
    """The donor's config.json with layer count, per-layer lists, dtype, vocabulary and tying as the merge made them.

    None if the donor has none.
    """
    donor = models[plan.donor]
    if donor.config is None:
        return None
    config = {key: copy.deepcopy(value) for key, value in donor.config.items() if not _is_private(key, value)}
    _patch_code(config, plan)
    _patch_layers(config, plan, donor)
    _patch_dtype(config, plan)
    _patch_vocabulary(config, plan, donor)
    _patch_tying(config, plan, donor)
    return config


def _is_private(key: str, value: object) -> bool:
    """Paths, commits and implementation names begin with `_` and are text; flags such as `_remove_final_layer_norm`
    begin with `_` too, and say what the model is."""
    return key.startswith("_") and key not in _OF_DIFFUSERS and not isinstance(value, bool | int | float)


_OF_DIFFUSERS = ("_class_name", "_diffusers_version")
"""What diffusers needs of a config to know what it is of."""


def _patch_code(config: dict[str, Any], plan: Plan) -> None:
    """Code is never copied: `auto_map` must name the repository that has it, or go."""
    mapped = config.get("auto_map")
    if not isinstance(mapped, dict):
        config.pop("auto_map", None)
        return
    donor = plan.models[plan.donor]
    named = {}
    for key, value in mapped.items():
        if isinstance(value, str) and "--" in value:
            named[key] = value
        elif isinstance(value, str) and donor.repository is not None:
            named[key] = f"{donor.repository}--{value}"
    config["auto_map"] = named
    if not named:
        del config["auto_map"]


def json_bytes(config: dict[str, Any]) -> bytes:
    """JSON as model libraries write it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _node(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def _patch_layers(config: dict[str, Any], plan: Plan, donor: Model) -> None:
    for stack, sources in plan.restacked.items():
        anatomy = donor.anatomy
        old = anatomy.stacks[stack] - (anatomy.extra_layers if stack == anatomy.main else 0)
        keys = count_keys(donor, stack)
        for beside in [None] if stack == anatomy.main else keys:
            _renew_lists(config, old, sources, beside)
        for path in keys:
            _node(config, path[:-1])[path[-1]] = len(sources)


def _renew_lists(config: dict[str, Any], old: int, sources: Sequence[int], beside: tuple[str, ...] | None) -> None:
    """Cut, join and repeat what the config says of each layer as the layers were."""
    for path in layer_lists(config, old, beside=beside):
        node = _node(config, path[:-1])
        values = node[path[-1]]
        taken = [values[layer] for layer in sources if layer < len(values)]
        node[path[-1]] = "".join(taken) if isinstance(values, str) else taken
    for path in layer_numbers(config, old, beside=beside):
        node = _node(config, path[:-1])
        wanted = set(node[path[-1]])
        node[path[-1]] = [place for place, layer in enumerate(sources) if layer in wanted]


def count_keys(model: Model, stack: str) -> tuple[tuple[str, ...], ...]:
    """Where the config counts the layers of a stack."""
    if stack == model.anatomy.main:
        return model.anatomy.layer_count_keys
    return other_count_keys(model.config or {}, stack, model.anatomy.stacks[stack])


def _patch_dtype(config: dict[str, Any], plan: Plan) -> None:
    dtype = output_dtype(plan)
    if dtype is None:
        return
    found = False
    for node in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if isinstance(node.get(key), str):
                node[key] = dtype.name
                found = True
    if not found and library(config) == "transformers":
        config["torch_dtype"] = dtype.name


def _patch_vocabulary(config: dict[str, Any], plan: Plan, donor: Model) -> None:
    name = donor.anatomy.embedding
    entry = next((entry for entry in plan.entries if entry.name == name), None)
    if entry is None or name is None or not entry.shape:
        return
    before = donor.source.tensors[name].shape[0]
    for node in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if node.get("vocab_size") == before:
            node["vocab_size"] = entry.shape[0]


def _patch_tying(config: dict[str, Any], plan: Plan, donor: Model) -> None:
    stated = False
    text = config.get("text_config")
    for node in [config, *([text] if isinstance(text, dict) else [])]:
        if isinstance(node.get("tie_word_embeddings"), bool):
            stated = True
            node["tie_word_embeddings"] = plan.tied and node["tie_word_embeddings"]
    if not stated and donor.anatomy.tied and not plan.tied:
        config["tie_word_embeddings"] = False
