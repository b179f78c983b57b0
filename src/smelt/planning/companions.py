"""The small files beside the merged weights: config.json patched as raw JSON, and what is copied from the donor.

Re-saving a config through a model library would rewrite its keys; here only what the merge changed is touched.
"""

from __future__ import annotations

import copy
import fnmatch
import json
from collections.abc import Sequence
from typing import Any

from smelt.planning.anatomy import layer_lists, layer_numbers
from smelt.planning.build import output_dtype
from smelt.planning.entries import Plan
from smelt.planning.locate import Model

COPIED = (
    "generation_config.json",
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


def copied_files(donor: Model) -> list[str]:
    """The donor's files that go beside the merged weights, sorted."""
    return [
        name for name in donor.source.other_files() if any(fnmatch.fnmatchcase(name, pattern) for pattern in COPIED)
    ]


def merged_config(plan: Plan, models: Sequence[Model]) -> dict[str, Any] | None:
    """The donor's config.json with layer count, per-layer lists, dtype, vocabulary and tying as the merge made them.

    Keys that begin with `_` are private to the library that wrote them and are left out. None if the donor has none.
    """
    donor = models[plan.donor]
    if donor.config is None:
        return None
    config: dict[str, Any] = {
        key: copy.deepcopy(value) for key, value in donor.config.items() if not key.startswith("_")
    }
    if plan.layers is not None and plan.source_layers is not None:
        _patch_layers(config, plan, donor)
    _patch_dtype(config, plan)
    _patch_vocabulary(config, plan, donor)
    _patch_tying(config, plan, donor)
    return config


def config_bytes(config: dict[str, Any]) -> bytes:
    """JSON as model libraries write it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _node(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def _patch_layers(config: dict[str, Any], plan: Plan, donor: Model) -> None:
    assert plan.layers is not None
    assert plan.source_layers is not None
    anatomy = donor.anatomy
    old = anatomy.stacks[anatomy.main or ""] - anatomy.extra_layers
    for path in layer_lists(config, old):
        node = _node(config, path[:-1])
        values = node[path[-1]]
        taken = [values[layer] for layer in plan.source_layers if layer < len(values)]
        node[path[-1]] = "".join(taken) if isinstance(values, str) else taken
    for path in layer_numbers(config, old):
        node = _node(config, path[:-1])
        wanted = set(node[path[-1]])
        node[path[-1]] = [place for place, layer in enumerate(plan.source_layers) if layer in wanted]
    for path in anatomy.layer_count_keys:
        _node(config, path[:-1])[path[-1]] = plan.layers


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
    if not found:
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
