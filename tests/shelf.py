"""A folder of tiny models as recipes find them beside themselves: the golden ones, more of their kind, other kinds.

`llama-base`, `llama-ft1` ... are the golden models. `llama-ft4` to `llama-ft10` are further fine-tunes of `llama-base`.
`acme/tiny-base`, `acme/tiny-chat`, `acme/tiny-code` and `acme/tiny-math-v0.1` are copies of `llama-base` and its first
three fine-tunes, some with a chat template. `tiny-vl`, `tiny-gemma` and `tiny-t5` are made when a text names them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

import factory
from architectures import make

GOLDEN = factory.GOLDEN / "models"
ACME = {"tiny-base": "llama-base", "tiny-chat": "llama-ft1", "tiny-code": "llama-ft2", "tiny-math-v0.1": "llama-ft3"}
KINDS = {"tiny-vl": "qwen2_5_vl", "tiny-gemma": "gemma3", "tiny-t5": "t5"}
"""Models that are made on demand: name -> architecture. NAME-tuned-1 and NAME-tuned-2 are fine-tunes of NAME."""

COMMON_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
"""The chat template that tiny-base and tiny-chat carry in their tokenizer_config.json."""
OTHER_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
"""That of tiny-code, in a file of its own."""


def build(root: Path) -> Path:
    """Make the folder `root/models` and give it."""
    models = root / "models"
    models.mkdir(parents=True)
    for path in GOLDEN.iterdir():
        (models / path.name).symlink_to(path)
    base = factory.stored(GOLDEN / "llama-base")
    for number in range(4, 11):
        random = np.random.default_rng(number)
        tuned = {name: value + random.normal(0, 0.02, value.shape).astype(np.float32) for name, value in base.items()}
        folder = factory.copy(GOLDEN / "llama-base", models / f"llama-ft{number}")
        (folder / "model.safetensors").write_bytes(factory.file(tuned, metadata={"format": "pt"}))
    for name, origin in ACME.items():
        factory.copy(GOLDEN / origin, models / "acme" / name)
    for name in ("tiny-base", "tiny-chat"):
        settings = models / "acme" / name / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": COMMON_TEMPLATE}))
    (models / "acme" / "tiny-code" / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    return models


def add(models: Path, text: str) -> None:
    """Make the models of KINDS that a text names and that are not there yet."""
    for name, architecture in KINDS.items():
        if name in text and not (models / name).exists():
            for path in make(architecture, models / f".{name}", count=3):
                shutil.move(path, models / (name if path.name == "base" else f"{name}-{path.name}"))
