"""Chat templates: those that a recipe can ask for by name, and those that models carry.

A template is text here and is never rendered.
"""

from __future__ import annotations

from collections.abc import Sequence

from smelt.storage.checkpoint import TensorSource

FILE = "chat_template.jinja"

_TURNS = "{% for message in messages %}"
_END = "{% endfor %}"
_ANSWER = "{% if add_generation_prompt %}"

BUILTIN = {
    "chatml": (
        _TURNS
        + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        + _END
        + "\n"
        "" + _ANSWER + "{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
    ),
    "llama3": (
        "{{ bos_token }}"
        + _TURNS
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim"
        " + '<|eot_id|>' }}"
        + _END
        + _ANSWER
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}\n"
    ),
    "alpaca": (
        _TURNS + "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}{% endif %}"
        "" + _END + _ANSWER + "{{ '### Response:\\n' }}{% endif %}\n"
    ),
    "exaone": (
        "{% if not messages or messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        + _TURNS
        + "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
        "" + _END + _ANSWER + "{{ '[|assistant|]' }}{% endif %}\n"
    ),
}
"""Templates by the names that recipes use."""


def template_of(source: TensorSource) -> str | None:
    """The chat template that a model carries: its own file, else the one in tokenizer_config.json."""
    if FILE in source.other_files():
        return source.text(FILE)
    found = (source.json("tokenizer_config.json") or {}).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {row.get("name"): row.get("template") for row in found if isinstance(row, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def most_common(sources: Sequence[TensorSource]) -> str | None:
    """The template that most of the models carry; of equally common ones the first. None if no model has one."""
    counts: dict[str, int] = {}
    for source in sources:
        template = (template_of(source) or "").strip()
        if template:
            counts[template] = counts.get(template, 0) + 1
    return max(counts, key=lambda template: counts[template]) if counts else None
