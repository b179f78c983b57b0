"""Chat templates: what the built-in ones render, and which one a model carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

import factory
from smelt.storage.sources.local import open_folder
from smelt.tokens.chat import BUILTIN, most_common, template_of

USER = {"role": "user", "content": "Add 2 and 3."}
ANSWER = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": " And 4?\n"}

# As the standard library of templates has it, and as transformers renders chat templates.
ENVIRONMENTS = {
    "plain": jinja2.Environment(),
    "transformers": jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True),
}


def rendered(template: str, messages: list[dict[str, str]], *, generate: bool, environment: str) -> str:
    return (
        ENVIRONMENTS[environment]
        .from_string(template)
        .render(messages=messages, add_generation_prompt=generate, bos_token="<s>", eos_token="</s>")
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, ANSWER],
        [SYSTEM, USER, ANSWER, MORE],
        [SYSTEM],
        [],
        [{"role": "tool", "content": "{{ x }} {% y %}"}],
    ],
    ids=["user", "answered", "long", "system", "none", "tool"],
)
def test_chatml_renders_as_that_of_mergekit(messages: list[dict[str, str]], generate: bool, environment: str) -> None:
    golden = (factory.GOLDEN / "cases" / "chat-template" / "expected_chat_template.jinja").read_text()
    one, two = (
        rendered(template, messages, generate=generate, environment=environment)
        for template in (BUILTIN["chatml"], golden)
    )
    assert one == two


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd 4?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:\n5\n\n"
            "### Instruction:\n And 4?\n\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Add 2 and 3.\n[|assistant|]5[|endofturn|]\n"
            "[|user|] And 4?\n\n[|assistant|]",
        ),
    ],
)
def test_builtin_templates(name: str, text: str, environment: str) -> None:
    messages = [SYSTEM, USER, ANSWER, MORE]
    assert rendered(BUILTIN[name], messages, generate=True, environment=environment) == text


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_exaone_begins_with_a_system_turn(environment: str) -> None:
    found = rendered(BUILTIN["exaone"], [USER], generate=False, environment=environment)
    assert found == "[|system|][|endofturn|]\n[|user|]Add 2 and 3.\n"


@pytest.mark.parametrize("name", BUILTIN)
def test_no_generation_prompt_without_asking(name: str) -> None:
    for environment in ENVIRONMENTS:
        with_it, without = (
            rendered(BUILTIN[name], [USER], generate=generate, environment=environment) for generate in (True, False)
        )
        assert with_it.startswith(without)
        assert with_it != without


# --- which one a model carries --------------------------------------------------------------------------------------


def source(folder: Path, **files: Any) -> Any:
    known = {"tokenizer_config": "tokenizer_config.json", "jinja": "chat_template.jinja"}
    made = factory.model(
        folder, factory.llama(), factory.config(), files={known[name]: text for name, text in files.items()}
    )
    return open_folder(made, name=folder.name)


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config": "{}"}, None),
        ({"tokenizer_config": '{"chat_template": "{{ a }}"}'}, "{{ a }}"),
        ({"jinja": "{{ b }}"}, "{{ b }}"),
        ({"jinja": "{{ b }}", "tokenizer_config": '{"chat_template": "{{ a }}"}'}, "{{ b }}"),
        ({"tokenizer_config": '{"chat_template": null}'}, None),
        (
            {
                "tokenizer_config": '{"chat_template": [{"name": "tool_use", "template": "{{ t }}"}, '
                '{"name": "default", "template": "{{ d }}"}]}'
            },
            "{{ d }}",
        ),
        ({"tokenizer_config": '{"chat_template": [{"name": "tool_use", "template": "{{ t }}"}]}'}, None),
        ({"tokenizer_config": '{"chat_template": [3, {"name": "default"}]}'}, None),
    ],
    ids=str,
)
def test_template_of(files: dict[str, str], template: str | None, tmp_path: Path) -> None:
    with source(tmp_path / "m", **files) as model:
        assert template_of(model) == template


@pytest.mark.parametrize(
    ("carried", "chosen"),
    [
        (["a", "b", "b"], "b"),
        (["a", "b"], "a"),
        ([None, "b"], "b"),
        ([None, None], None),
        ([], None),
        (["b", "a", "a", "b"], "b"),
    ],
    ids=str,
)
def test_most_common(carried: list[str | None], chosen: str | None, tmp_path: Path) -> None:
    opened = [
        source(tmp_path / f"m{index}", **({} if text is None else {"jinja": text}))
        for index, text in enumerate(carried)
    ]
    assert most_common(opened) == chosen
    for one in opened:
        one.close()
