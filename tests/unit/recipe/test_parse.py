"""Recipes from text, files and dicts; misspelt, misplaced and mistyped keys; all at once, with line and column."""

from __future__ import annotations

import os
import random
import textwrap
from pathlib import Path
from typing import Any

import pytest

from smelt.errors import RecipeError, SmeltError
from smelt.recipe.parse import from_dict, load, parse
from smelt.recipe.schema import Case, Conditional, Gradient, ModelName, Recipe, Scalar, TokenSource

CASES = Path(__file__).parents[2] / "golden" / "data" / "cases"
GOLDEN = sorted(CASES.glob("*/recipe.yml"))


def recipe(text: str) -> Recipe:
    return parse(textwrap.dedent(text), source="recipe.yml")


def problems(text: str) -> list[SmeltError]:
    with pytest.raises(SmeltError) as caught:
        recipe(text)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def only(text: str) -> tuple[str, str, str | None]:
    """Message, place and fix of the one problem of a recipe."""
    (problem,) = problems(text)
    return problem.message, problem.where[0].removeprefix("recipe.yml:"), problem.fix


# --- what is read ---------------------------------------------------------------------------------------------------


def test_golden_recipes_are_there() -> None:
    assert len(GOLDEN) == 37


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_recipes_parse(path: Path) -> None:
    found = load(path)
    assert found.merge_method
    assert found == parse(path.read_bytes())


def test_a_whole_recipe() -> None:
    found = recipe("""\
        name: mine
        merge_method: ties
        base_model: {path: org/base, revision: abc}
        models:
          - model: org/a@main
            parameters:
              weight: "5e-1"
              density: [1, 0.7, 0.1]
          - model: {model: {path: org/b}, override_architecture: LlamaForCausalLM}
            parameters:
              weight:
                - {filter: mlp, value: [0, 1]}
                - {match: "model.layers.*.self_attn.*", value: 0.5}
                - value: 1
        parameters: {normalize: yes, int8_mask: true, rescale: density}
        dtype: float32
        out_dtype: bf16
        tokenizer:
          source: union
          tokens:
            <|im_start|>: {source: org/a@main, force: on}
            <|im_end|>: {source: {kind: zero}}
            <|end|>: {source: {kind: model_token, model: org/b, token_id: 2}}
          pad_to_multiple_of: 64
        chat_template: chatml
        methods: [./mine.py]
        allow: [nonfinite]
        """)
    assert found.base_model == ModelName("org/base@abc", "org/base", "abc")
    assert found.models is not None
    first, second = found.models
    assert first.model == ModelName("org/a@main")
    assert first.parameters == {"weight": Scalar(0.5), "density": Gradient((1, 0.7, 0.1))}
    assert second.model == ModelName("org/b", "org/b", override_architecture="LlamaForCausalLM")
    assert second.parameters["weight"] == Conditional(
        (
            Case("mlp", None, Gradient((0, 1))),
            Case(None, "model.layers.*.self_attn.*", Scalar(0.5)),
            Case(None, None, Scalar(1)),
        )
    )
    assert found.parameters == {"normalize": Scalar(True), "int8_mask": Scalar(True), "rescale": Scalar("density")}
    assert found.tokenizer is not None
    assert found.tokenizer.tokens["<|im_start|>"].force is True
    assert found.tokenizer.tokens["<|im_end|>"].source == TokenSource(kind="zero")
    assert found.tokenizer.tokens["<|end|>"].source == TokenSource(
        kind="model_token", model=ModelName("org/b"), token_id=2
    )
    assert found.tokenizer.pad_to_multiple_of == 64
    assert found.methods == ("./mine.py",)
    assert found.allow == ("nonfinite",)
    assert [str(name) for name in found.model_names()] == ["org/a@main", "org/b", "org/base@abc"]


def test_slices_blocks_and_positions() -> None:
    found = recipe("""\
        merge_method: linear
        base_model: a
        slices:
          - sources:
              - {model: a, layer_range: [0, 2]}
              - {model: b, layer_range: [1, 3]}
            parameters: {weight: 1}
          - base_model: c
            sources: [{model: c}]
        """)
    one, two = found.blocks()
    assert one.path == ("slices", 0, "sources")
    assert one.sources[1].layer_range == (1, 3)
    assert [scope.label for scope in one.scopes] == ["slice 1", "recipe"]
    assert one.source_scope(1).label == "model b"
    assert [one.is_base(0), one.is_base(1), two.is_base(0)] == [True, False, True]
    assert found.position("slices", 0, "sources", 1, "layer_range") == "recipe.yml:6:20"
    assert found.position("slices", 1) == "recipe.yml:8:5"
    assert found.where("slices", 1, "base_model", value=True) == ["recipe.yml:8:17", "|   - base_model: c"]


def test_modules() -> None:
    found = recipe("""\
        merge_method: linear
        modules:
          text_decoder:
            models: [{model: a}, {model: b}]
            parameters: {weight: 1}
          audio:
            slices: [{sources: [{model: a, layer_range: [0, 2]}]}]
        """)
    one, two = found.blocks()
    assert (one.module, one.is_slice, two.module, two.is_slice) == ("text_decoder", False, "audio", True)
    assert [scope.label for scope in two.scopes] == ["slice 1", "module audio", "recipe"]


@pytest.mark.parametrize(("given", "text"), [("union", "union"), ("base", "base")])
def test_vocabulary_words(given: str, text: str) -> None:
    found = recipe(f"merge_method: linear\nmodels: [{{model: a}}]\ntokenizer_source: {given}\n")
    assert found.tokenizer_source == text
    assert found.vocabulary is not None
    assert found.vocabulary.source == text


@pytest.mark.parametrize("given", ["org/a", "model:org/a", "{model: org/a}"])
def test_vocabulary_of_a_model(given: str) -> None:
    found = recipe(f"merge_method: linear\nmodels: [{{model: org/a}}]\ntokenizer_source: {given}\n")
    assert str(found.tokenizer_source) == "org/a"
    assert isinstance(found.tokenizer_source, ModelName)


def test_empty_optional_keys_are_as_if_absent() -> None:
    bare = recipe("merge_method: linear\nmodels: [{model: a}]\n")
    assert bare == recipe(
        "merge_method: linear\nmodels: [{model: a, parameters: }]\nbase_model:\nslices:\nparameters:\n"
    )


def test_equal_wherever_it_was_read() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\n"
    assert parse(text, source="one") == parse("# moved\n" + text, source="two")
    assert parse(text) == from_dict({"merge_method": "linear", "models": ({"model": Path("a")},)})


def test_words_of_yaml_1_1_are_booleans_in_settings_and_text_in_names() -> None:
    found = recipe("merge_method: ties\nmodels: [{model: no}]\nparameters: {a: yes, b: Off, c: [on, no]}\n")
    assert str((found.models or ())[0].model) == "no"
    assert found.parameters == {"a": Scalar(True), "b": Scalar(False), "c": Gradient((True, False))}


@pytest.mark.parametrize(
    ("given", "expected"), [('"1e-5"', 1e-5), ("'2'", 2), ('"-.5"', -0.5), ('"density"', "density")]
)
def test_numeric_text_is_a_number(given: str, expected: object) -> None:
    found = recipe(f"merge_method: ties\nmodels: [{{model: a}}]\nparameters: {{w: {given}}}\n")
    assert found.parameters["w"] == Scalar(expected)  # type: ignore[arg-type]


def test_a_case_without_its_list() -> None:
    found = recipe("merge_method: ties\nmodels: [{model: a}]\nparameters: {t: {filter: mlp, value: 1}}\n")
    assert found.parameters["t"] == Conditional((Case("mlp", None, Scalar(1)),))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_exact_text_of_a_misspelt_key() -> None:
    (problem,) = problems("""\
        merge_method: ties
        dype: float32
        models: [{model: a}]
        """)
    assert problem.render() == (
        "error: unknown key `dype`\n  recipe.yml:2:1\n  | dype: float32\n  fix: did you mean `dtype`?"
    )


def test_exact_text_of_a_parameter_beside_its_model() -> None:
    (problem,) = problems("""\
        merge_method: ties
        models:
          - model: a
            weight: 0.5
        """)
    assert problem.render() == (
        "error: unknown key `weight`\n"
        "  recipe.yml:4:5\n"
        "  |     weight: 0.5\n"
        "  fix: it is a parameter of a method: move it under `parameters:` of this entry"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normalize: true", ("unknown key `normalize`", "3:1", "under `parameters:`")),
        ("t: 0.5", ("unknown key `t`", "3:1", "under `parameters:`")),
        ("normalise: true", ("unknown key `normalise`", "3:1", "did you mean `normalize`, under `parameters:`?")),
        ("layer_range: [0, 2]", ("unknown key `layer_range`", "3:1", "move it beside `model:`")),
        ("sources: []", ("unknown key `sources`", "3:1", "move it into an entry of `slices:`")),
        ("zzz: 1", ("unknown key `zzz`", "3:1", "known here: merge_method, base_model")),
        ("out_dytpe: float32", ("unknown key `out_dytpe`", "3:1", "did you mean `out_dtype`?")),
        ("dtype: floot32", ("'floot32' is no type that a recipe can ask for", "3:8", "did you mean `float32`?")),
        ("dtype: int8", ("'int8' is no type that a recipe can ask for", "3:8", "use one of float64")),
        ("dtype: 16", ("`dtype` must be text, not 16", "3:8", 'put it in quotes: "16"')),
        ("base_model: 7", ("a model must be a name, not 7", "3:13", 'put it in quotes: "7"')),
        ("base_model: ''", ("a model name is empty", "3:13", "")),
        ("base_model: {pth: a}", ("unknown key `pth`", "3:14", "did you mean `path`?")),
        (
            "allow: [extra_tensors]",
            ("an entry of `allow` cannot be 'extra_tensors'", "3:9", "did you mean `extra_tensor`?"),
        ),
        ("allow: nonfinite", ("`allow` must be a list, not 'nonfinite'", "3:8", "")),
        ("slices: [{sources: [{model: a}]}]", ("`models` and `slices` are both given", "3:1", "keep one of")),
        ("parameters: [1]", ("`parameters` must be a mapping", "3:1", "")),
        ("parameters: {weight: }", ("a setting without a value", "3:14", "give a value, or remove the key")),
        ("parameters: {weight: []}", ("an empty list is no value", "3:14", "")),
        ("parameters: {weight: [[1]]}", ("a setting must be a number, true, false or a word, not a list", "3:23", "")),
        ("parameters: {w: [1, {value: 2}]}", ("1 stands among `filter:` entries", "3:18", "`- value: ...`")),
        ("parameters: {w: [{filter: x}]}", ("an entry without `value`", "3:18", "add `value: ...`")),
        ("parameters: {w: [{filtr: x, value: 1}]}", ("unknown key `filtr`", "3:19", "did you mean `filter`?")),
        ("parameters: {w: [{filter: 3, value: 1}]}", ("`filter` must be text, not 3", "3:27", 'quotes: "3"')),
        ("parameters: {w: [{filter: '', value: 1}]}", ("`filter` is empty", "3:27", "leave out `filter`")),
        ("parameters: {w: [{value: 1}, {filter: a, value: 2}]}", ("this entry holds for all", "3:18", "to the end")),
        ("parameters: {w: [{filter: '*', value: 1}, {value: 2}]}", ("this entry holds for all", "3:18", "to the end")),
        ("parameters: {w: '1e999'}", ("the number is too large", "3:17", "")),
        ("parameters: {layer_range: [0, 2]}", ("`layer_range` does not belong under `para", "3:14", "beside `model:`")),
        ("parameters: {models: [{model: a}]}", ("`models` does not belong under `para", "3:14", "top of the recipe")),
        ("tokenizer: {source: union}\ntokenizer_source: base", ("`tokenizer` and `tokenizer_source`", "4:1", "keep")),
        ("tokenizer: {pad_to_multiple_of: 0}", ("`pad_to_multiple_of` must be at least 1, not 0", "3:33", "")),
        ("tokenizer: {tokens: {x: {sorce: a}}}", ("unknown key `sorce`", "3:26", "did you mean `source`?")),
        ("tokenizer: {tokens: {x: {force: 3}}}", ("`force` must be true or false, not 3", "3:33", "")),
        ("tokenizer: {tokens: {x: {source: {kind: zer}}}}", ("`kind` cannot be 'zer'", "3:41", "`zero`")),
        ("tokenizer: {tokens: {x: {source: {kind: zero, token: a}}}}", ("`token` has no effect", "3:47", "remove")),
        ("chat_template: {a: 1}", ("`chat_template` must be text, not a mapping", "3:1", "")),
    ],
)
def test_one_wrong_line(text: str, expected: tuple[str, str, str]) -> None:
    message, place, fix = only(f"merge_method: ties\nmodels: [{{model: a}}]\n{text}\n")
    assert message.startswith(expected[0])
    assert place == expected[1]
    assert expected[2] in (fix or "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1, 1]", "`layer_range` [1, 1] is empty"),
        ("[3, 1]", "`layer_range` [3, 1] is reversed"),
        ("[-1, 2]", "`layer_range` [-1, 2] begins before layer 0"),
        ("[0, 1.5]", "`layer_range` must be two whole numbers, not 1.5"),
        ("[0, true]", "`layer_range` must be two whole numbers, not true"),
        ("[0, 1, 2]", "`layer_range` must be two whole numbers, not a list of 3"),
        ("0-5", "`layer_range` must be two whole numbers, not '0-5'"),
    ],
)
def test_layer_ranges(given: str, message: str) -> None:
    (problem,) = problems(f"merge_method: ties\nslices:\n- sources:\n  - model: a\n    layer_range: {given}\n")
    assert problem.message == message
    assert problem.where[0].startswith("recipe.yml:5:")


def test_layer_ranges_of_different_lengths() -> None:
    message, place, _ = only("""\
        merge_method: linear
        slices:
          - sources:
              - {model: a, layer_range: [0, 3]}
              - {model: b, layer_range: [1, 5]}
        """)
    assert message == "`layer_range` [0, 3] has 3 layers and [1, 5] has 4, in one slice"
    assert place == "5:20"


def test_layer_range_outside_slices() -> None:
    assert only("merge_method: linear\nmodels:\n- model: a\n  layer_range: [0, 3]\n") == (
        "`layer_range` has no effect under `models:`",
        "4:3",
        "remove it, or write `slices:` with `sources:` to choose layers",
    )


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("merge_method: linear\nbase_model: a\n", "the recipe names no models to merge", "1:1"),
        ("merge_method: linear\nmodels: []\n", "`models` is empty", "2:1"),
        ("merge_method: linear\nmodels: {model: a}\n", "`models` must be a list, not a mapping", "2:1"),
        (
            "merge_method: linear\nmodels: [a]\n",
            "an entry of `models` must be a mapping (`key: value` lines), not 'a'",
            "2:10",
        ),
        ("merge_method: linear\nmodels: [{parameters: {}}]\n", "`model` is missing", "2:10"),
        ("merge_method: linear\nslices: [{parameters: {}}]\n", "`sources` is missing", "2:10"),
        ("merge_method: linear\nmodules: {x: {}}\n", "module `x` names no models to merge", "2:11"),
        ("models: [{model: a}]\n", "`merge_method` is missing", "1:1"),
        ("- a\n", "a recipe must be a mapping (`key: value` lines), not a list", "1:1"),
        ("ties\n", "a recipe must be a mapping (`key: value` lines), not 'ties'", "1:1"),
    ],
)
def test_missing_parts(text: str, message: str, place: str) -> None:
    assert only(text)[:2] == (message, place)


def test_a_misspelt_required_key_is_not_missing_too() -> None:
    assert only("merg_method: ties\nmodels: [{model: a}]\n")[2] == "did you mean `merge_method`?"
    assert only("method: ties\nmodels: [{model: a}]\n")[2] == "did you mean `merge_method`?"
    assert only("merge_method: ties\nmodel: [{model: a}]\n")[2] is not None
    assert only("merge_method: ties\nmodels: [{modle: a}]\n")[2] == "did you mean `model`?"


def test_everything_at_once_in_the_order_of_the_text() -> None:
    found = problems("""\
        merge_method: ties
        dype: float32
        models:
          - model: a
            wieght: 1
          - modle: b
            parameters: {density: [1, {value: 2}]}
        parameters: {normalize: .nan, weight: }
        allow: [all]
        """)
    assert sorted(int(problem.where[0].split(":")[1]) for problem in found) == [2, 5, 6, 7, 8, 8, 9]
    assert [problem.message for problem in found if "5:" in problem.where[0]] == ["unknown key `wieght`"]


def test_from_dict_points_by_path() -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict({"merge_method": "ties", "models": [{"model": "a", "wight": 1}]})
    assert caught.value.where == ("recipe: models[0].wight",)
    found = from_dict({"merge_method": "ties", "models": [{"model": "a"}]}, source="in memory")
    assert found.position("models", 0) == "in memory"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**30, object(), b"x", "a\0b", {1: 2}, {"a": {"b": float("nan")}}]
)
def test_from_dict_holds_values_to_the_same_rules(value: Any) -> None:
    with pytest.raises(RecipeError):
        from_dict({"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"x": value}})


def test_from_dict_survives_a_loop() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecipeError):
        from_dict({"merge_method": "ties", "models": loop})


# --- files ----------------------------------------------------------------------------------------------------------


def test_load_names_the_file_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: ties\nmodels: []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load("recipe.yml")
    assert caught.value.where[0] == "recipe.yml:2:1"


def test_load_refuses_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: ties\n")
    cases = {
        tmp_path / "recpie.yml": ("there is no such recipe", f"did you mean {tmp_path / 'recipe.yml'}?"),
        tmp_path / "zzz": ("there is no such recipe", None),
        tmp_path / "no" / "recipe.yml": ("there is no such recipe", None),
        tmp_path: ("the recipe is a folder, not a file", f"did you mean {tmp_path / 'recipe.yml'}?"),
        Path("a\0b"): ("a file name cannot hold a NUL character", None),
    }
    for path, (message, fix) in cases.items():
        with pytest.raises(RecipeError) as caught:
            load(path)
        assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_load_never_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yml")
    with pytest.raises(RecipeError, match="not a regular file"):
        load(tmp_path / "recipe.yml")


def test_load_reads_at_most_a_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(b"#" * 10_000_000)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.exit_code == 2


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damaged_recipes_are_read_or_refused() -> None:
    """Lines of the golden recipes dropped, doubled, moved in and mixed: never anything but a Recipe or a SmeltError."""
    dice = random.Random(0)
    texts = [path.read_text().splitlines() for path in GOLDEN]
    for _ in range(300):
        lines = list(dice.choice(texts))
        for _ in range(dice.randint(1, 4)):
            index = dice.randrange(len(lines))
            action = dice.randrange(4)
            if action == 0 and len(lines) > 1:
                del lines[index]
            elif action == 1:
                lines.insert(index, dice.choice(dice.choice(texts)))
            elif action == 2:
                lines[index] = "  " + lines[index]
            else:
                cut = dice.randrange(len(lines[index]) + 1)
                lines[index] = lines[index][:cut] + dice.choice(":-[]{}'0x ") + lines[index][cut:]
        found: list[SmeltError] = []
        try:
            parse("\n".join(lines), source="recipe.yml")
        except SmeltError as error:
            found.extend(error.problems)
        assert all(problem.where for problem in found)
