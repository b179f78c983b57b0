"""`smelt plan --explain`, `smelt check` and `smelt schema`, held against plain readings of the published recipes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import factory
import shelf
import smelt
from smelt.methods import api
from smelt.recipe import yaml
from smelt.recipe.parse import from_dict

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = sorted((RECIPES / "good").glob("*.yml"))
BAD = sorted((RECIPES / "bad").glob("*.yml"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelf.build(tmp_path_factory.mktemp("explained"))


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


def explain(stem: str, tensor: str) -> list[str]:
    done = factory.smelt("plan", RECIPES / "good" / f"{stem}.yml", "--explain", tensor)
    assert done.code == 0, done.text
    return done.out.splitlines()


# --- plan --explain -------------------------------------------------------------------------------------------------


def test_a_gradient_of_a_case(here: Path) -> None:
    lines = explain("slerp-gradients-per-filter", "model.layers.1.self_attn.q_proj.weight")
    assert lines == [
        "model.layers.1.self_attn.q_proj.weight  [32, 32] bfloat16",
        "  slerp(tiny-code, base tiny-chat)  t=0.433333  granularity=tensor",
        "  input  tiny-code  model.layers.1.self_attn.q_proj.weight [32, 32] float32",
        "  base   tiny-chat  model.layers.1.self_attn.q_proj.weight [32, 32] float32",
        "  t = 0.433333  recipe, filter: self_attn, gradient [0, 0.5, 0.3, 0.7, 1] at 0.3333 -> 0.433333",
        "  granularity = tensor  the default",
    ]


def test_numbers_of_several_models(here: Path) -> None:
    lines = explain("density-and-weight-gradients", "model.layers.2.mlp.up_proj.weight")
    assert [line.strip() for line in lines if " of llama" in line] == [
        "weight of llama-ft1 = 1  model llama-ft1",
        "weight of llama-ft2 = 0.7  model llama-ft2, gradient [0, 0.3, 0.7, 1] at 0.6667 -> 0.7",
        "weight of llama-ft3 = 0.5  model llama-ft3, filter: mlp",
        "density of llama-ft1 = 0.5  model llama-ft1, gradient [1, 0.7, 0.1] at 0.6667 -> 0.5",
        "density of llama-ft2 = 0.5  model llama-ft2",
        "density of llama-ft3 = 0.33  model llama-ft3",
    ]
    assert "  normalize = true  recipe" in lines
    assert "  lambda = 1  the default" in lines


def test_levels(here: Path) -> None:
    first = explain("normalize-at-several-levels", "model.layers.0.mlp.up_proj.weight")
    assert "  normalize = false  slice 1" in first
    assert "  weight of llama-ft2 = 0.75  model llama-ft2" in first
    last = explain("normalize-at-several-levels", "model.layers.3.mlp.up_proj.weight")
    assert "  normalize = true  recipe" in last
    assert "  weight of llama-ft2 = 2  slice 2" in last


def test_a_module_level(here: Path) -> None:
    shelf.add(here, "tiny-gemma")
    lines = explain("vision-language-all-parts", "model.layers.2.mlp.up_proj.weight")
    text = "\n".join(lines)
    assert "weight of tiny-gemma-tuned-1 = 0.8  module text_decoder, gradient [0.2, 0.8] at 1 -> 0.8" in text
    assert "density of tiny-gemma-tuned-1 = 0.9  recipe" in text


def test_globs(here: Path) -> None:
    lines = explain("match-globs", "model.layers.1.self_attn.q_proj.weight")
    assert "  weight of llama-ft1 = 0.2  model llama-ft1, match: model.layers.[01].*" in lines
    lines = explain("match-globs", "model.layers.3.self_attn.q_proj.weight")
    assert any(line.endswith("match: *.self_attn.?_proj.weight, gradient [0.4, 0.6] at 1 -> 0.6") for line in lines)


def test_a_layer_from_elsewhere(here: Path) -> None:
    lines = explain("frankenmerge-overlapping", "model.layers.5.mlp.up_proj.weight")
    assert lines[1] == "  passthrough(tiny-chat:model.layers.2.mlp.up_proj.weight)  scale=[1]"
    assert lines[2] == "  input  tiny-chat  model.layers.2.mlp.up_proj.weight [64, 32] float32"


def test_a_copy(here: Path) -> None:
    shelf.add(here, "tiny-vl")
    lines = explain("vision-language-text-only", "visual.patch_embed.proj.weight")
    assert lines[1] == "  copy of tiny-vl: its part is in no module"


def test_part_of_a_name_explains_every_tensor_that_has_it(here: Path) -> None:
    lines = explain("ram", "layers.2.mlp")
    assert [line.split("  ")[0] for line in lines if line.startswith("model.")] == [
        f"model.layers.2.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


def test_a_whole_name_explains_that_tensor_alone(tmp_path: Path) -> None:
    names = ["norm.weight", "model.norm.weight"]
    one, two = (
        factory.model(tmp_path / name, {key: factory.llama()["model.norm.weight"] for key in names}, {})
        for name in ("a", "b")
    )
    recipe = factory.recipe(tmp_path / "r.yml", factory.linear(one, two))
    done = factory.smelt("plan", recipe, "--explain", "norm.weight")
    assert [line for line in done.out.splitlines() if not line.startswith(" ")] == ["norm.weight  [8] float32"]


def test_a_tensor_that_is_not_there(here: Path) -> None:
    done = factory.smelt("plan", RECIPES / "good" / "ram.yml", "--explain", "model.norm.wieght")
    assert done.code == 2
    assert "no tensor of the plan is called 'model.norm.wieght'" in done.err
    assert "did you mean model.norm.weight?" in done.err


def case_fits(case: dict[str, Any], name: str) -> bool:
    if case.get("match") is not None:
        pattern = "".join({"*": ".*", "?": "."}.get(c, c if c in "[]" else re.escape(c)) for c in case["match"])
        return re.fullmatch(pattern, name) is not None
    return case.get("filter") in (None, "*") or case["filter"] in name


def plain(value: Any, t: float) -> Any:
    """A setting without cases at place t, as METHODS of MergeKit have it."""
    if isinstance(value, list):
        place = t * (len(value) - 1)
        low = int(place)
        high = min(low + 1, len(value) - 1)
        return (1 - (place - low)) * value[low] + (place - low) * value[high]
    if isinstance(value, str):
        return {"yes": True, "no": False}.get(value, value) if value.isalpha() else float(value)
    return value


def reading(name: str, levels: list[dict[str, Any] | None], tensor: str, t: float) -> Any:
    """The value that a setting has by the first level that gives one; None if none does."""
    for level in levels:
        if level is None or name not in level:
            continue
        setting = level[name]
        if not (isinstance(setting, list) and isinstance(setting[0], dict)):
            return plain(setting, t)
        for case in setting:
            if case_fits(case, tensor):
                return plain(case["value"], t)
    return None


def expected_values(tree: dict[str, Any], entry: dict[str, Any], layers: int) -> dict[str, Any]:
    """A tensor's parameters from the recipe's plain values alone."""
    info = api.get(tree["merge_method"])
    outer = [tree.get("parameters")]
    if "models" in tree:
        sources, base, offset = tree["models"], tree.get("base_model"), None
        t = 0.0 if entry["layer"] is None else entry["layer"] / (layers - 1) if layers > 1 else 1.0
    else:
        part, t, offset = _slice_of(tree, entry)
        sources, base = part["sources"], part.get("base_model", tree.get("base_model"))
        outer = [part.get("parameters"), *outer]
    if info.base != "none":
        sources = [source for source in sources if source["model"] != base]
    values: dict[str, Any] = {}
    for name, field in info.fields.items():
        default = None if field.is_required else field.default
        if not field.per_model:
            found = reading(name, outer, entry["name"], t)
            values[name] = default if found is None else bool(found) if field.kind == "bool" else found
            if name == "lambda" and "lines" in tree:
                depth = float(entry["role"] in ("after", "head")) if entry["layer"] is None else t
                values[name] *= tree["lines"]["alpha"] + tree["lines"]["beta"] * depth
            continue
        row = []
        for source in sources:
            tensor = entry["name"]
            if offset is not None:
                tensor = re.sub(r"\.layers\.\d+\.", f".layers.{source['layer_range'][0] + offset}.", tensor)
            found = reading(name, [source.get("parameters"), *outer], tensor, t)
            row.append(default if found is None else found)
        values[name] = row
    return values


def _slice_of(tree: dict[str, Any], entry: dict[str, Any]) -> tuple[dict[str, Any], float, int | None]:
    """The slice that makes a tensor, its place t in the slice, and its layer within it."""
    if entry["layer"] is None:
        part = tree["slices"][-1 if entry["role"] in ("after", "head") else 0]
        return part, 0.0, None
    start = 0
    for part in tree["slices"]:
        first, end = part["sources"][0]["layer_range"]
        if entry["layer"] < start + end - first:
            offset = entry["layer"] - start
            return part, offset / (end - first - 1) if end - first > 1 else 1.0, offset
        start += end - first
    raise AssertionError(entry["name"])


PLAIN = [path for path in GOOD if "modules:" not in path.read_text(encoding="utf-8-sig")]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_every_number_of_every_tensor(path: Path, here: Path) -> None:
    """The plan's numbers are those that a second, plain reading of the recipe gives."""
    loader = YAML(typ="safe")
    loader.version = "1.2"
    tree = loader.load(path.read_text(encoding="utf-8-sig"))
    done = factory.smelt("plan", path, "--json")
    assert done.code == 0, done.text
    tensors = done.json["tensors"]
    layers = 1 + max(entry["layer"] for entry in tensors if entry["layer"] is not None)
    for entry in tensors:
        if entry["action"] != "merge":
            continue
        wanted = expected_values(tree, entry, layers)
        assert set(entry["values"]) == set(wanted), entry["name"]
        for name, value in wanted.items():
            assert entry["values"][name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), (
                f"{entry['name']}: {name}"
            )


@pytest.mark.parametrize("stem", ["slerp-gradients-per-filter", "match-globs", "normalize-at-several-levels"])
def test_explanations_for_programs(stem: str, here: Path) -> None:
    path = RECIPES / "good" / f"{stem}.yml"
    explained = factory.smelt("plan", path, "--explain", "weight", "--json").json
    planned = factory.smelt("plan", path, "--json").json["tensors"]
    assert [entry["name"] for entry in explained] == [entry["name"] for entry in planned]
    for entry, same in zip(explained, planned, strict=True):
        origins = entry.pop("origins")
        same.pop("passes")
        assert entry == same
        assert set(origins) == set(entry["values"])
        for name, value in entry["values"].items():
            assert isinstance(origins[name], list) == isinstance(value, list)


# --- check ----------------------------------------------------------------------------------------------------------


def test_check_reads_no_weights(tmp_path: Path) -> None:
    """Of the weight files the headers are enough: the rest may as well be holes, or unreadable numbers."""
    for folder in factory.llamas(tmp_path, dtype="float32"):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = 8 + int.from_bytes(raw[:8], "little")
        path.write_bytes(raw[:length])
        os.truncate(path, len(raw))
    recipe = factory.recipe(tmp_path / "recipe.yml", factory.linear("m0", "m1"))
    done = factory.smelt("check", recipe)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(
        r".*recipe\.yml: sound\. linear of 2 models, 9 tensors, 600 parameters, 2\.40 kB to write\n", done.out
    )


def test_check_tells_notes_and_warnings(here: Path) -> None:
    done = factory.smelt("check", RECIPES / "good" / "base-listed-with-parameters.yml")
    assert done.code == 0
    assert re.search(r"note: .*:6:5: `weight`, `density` of llama-base has no effect: it is the base model", done.out)
    path = RECIPES / "good" / "slerp-gradients-per-filter.yml"
    done = factory.smelt("check", path)
    assert "warning: " in done.out
    assert "filter 'modelnorm' fits no tensor" in done.out
    strict = factory.smelt("check", path, "--strict")
    assert strict.code == 2
    assert "a warning, and --strict makes it an error" in strict.err


def test_check_lists_all_problems_of_the_models(tmp_path: Path) -> None:
    factory.llamas(tmp_path)
    tensors = factory.llama(seed=7)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:4]
    del tensors["lm_head.weight"]
    factory.model(tmp_path / "odd", tensors, factory.config())
    recipe = factory.recipe(tmp_path / "recipe.yml", factory.linear("m0", "odd"))
    done = factory.smelt("check", recipe, "--json")
    assert done.code == 3
    messages = " ".join(problem["message"] for problem in done.json["problems"])
    assert "model.norm.weight" in messages
    assert "lm_head.weight" in messages
    allowed = factory.smelt("check", recipe, "--json", "--allow", "missing_tensor")
    assert "lm_head.weight" not in " ".join(problem["message"] for problem in allowed.json["problems"])


def test_check_writes_nothing(here: Path, tmp_path: Path) -> None:
    before = factory.snapshot(here / "acme")
    assert factory.smelt("check", RECIPES / "good" / "frankenmerge-overlapping.yml").code == 0
    assert factory.snapshot(here / "acme") == before
    assert list(tmp_path.iterdir()) == []


# --- schema ---------------------------------------------------------------------------------------------------------

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}
SILENT = {"title", "description", "default", "$defs", "$schema"}


def is_type(value: Any, name: str) -> bool:
    if name in ("number", "integer") and isinstance(value, bool):
        return False
    return isinstance(value, TYPES[name])


def same(one: Any, two: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    return one == two and isinstance(one, bool) == isinstance(two, bool)


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "$") -> list[str]:
    """What a value has against a schema; the part of JSON Schema that smelt's uses, and an error for any other."""
    found: list[str] = []
    for word, told in schema.items():
        if word in SILENT:
            continue
        if word == "$ref":
            found += faults(value, root["$defs"][told.removeprefix("#/$defs/")], root, path)
        elif word == "type":
            names = told if isinstance(told, list) else [told]
            if not any(is_type(value, name) for name in names):
                found.append(f"{path}: is no {told}")
        elif word in ("anyOf", "oneOf"):
            fits = [one for one in told if not faults(value, one, root, path)]
            if not fits or (word == "oneOf" and len(fits) > 1):
                found.append(f"{path}: fits {len(fits)} of {word}")
        elif word == "enum":
            found += [] if any(same(value, one) for one in told) else [f"{path}: not one of {told}"]
        elif word == "const":
            found += [] if same(value, told) else [f"{path}: not {told}"]
        elif word == "pattern":
            found += [f"{path}: does not match"] if isinstance(value, str) and not re.search(told, value) else []
        elif word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            found += [] if not is_type(value, "number") or within(word, value, told) else [f"{path}: {word} {told}"]
        elif word in ("minItems", "maxItems"):
            bad = isinstance(value, list) and (len(value) < told if word == "minItems" else len(value) > told)
            found += [f"{path}: {word} {told}"] if bad else []
        elif word == "minProperties":
            found += [f"{path}: too few"] if isinstance(value, dict) and len(value) < told else []
        elif word == "items":
            for index, entry in enumerate(value if isinstance(value, list) else []):
                found += faults(entry, told, root, f"{path}[{index}]")
        elif word == "required":
            found += [f"{path}: lacks {key}" for key in told if isinstance(value, dict) and key not in value]
        elif word == "properties":
            for key, entry in value.items() if isinstance(value, dict) else ():
                if key in told:
                    found += faults(entry, told[key], root, f"{path}.{key}")
        elif word == "additionalProperties":
            for key, entry in value.items() if isinstance(value, dict) else ():
                if key not in schema.get("properties", {}):
                    found += faults(entry, told, root, f"{path}.{key}") if told else [f"{path}: unknown {key}"]
        else:
            raise AssertionError(f"{path}: the schema uses {word}, which this test does not read")
    return found


def within(word: str, value: float, bound: float) -> bool:
    return {
        "minimum": value >= bound,
        "maximum": value <= bound,
        "exclusiveMinimum": value > bound,
        "exclusiveMaximum": value < bound,
    }[word]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """What the command prints, and held against the standard's own schema where the jsonschema package is there."""
    tree = factory.smelt("schema").json
    try:
        import jsonschema
    except ImportError:
        return tree
    jsonschema.Draft202012Validator.check_schema(tree)
    return tree


def validate(tree: Any, schema: dict[str, Any]) -> list[str]:
    """The faults of a recipe; by the jsonschema package too where it is there, which must agree."""
    found = faults(tree, schema, schema)
    try:
        import jsonschema
    except ImportError:
        return found
    assert bool(found) == bool(list(jsonschema.Draft202012Validator(schema).iter_errors(tree)))
    return found


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_recipes_fit_the_schema(path: Path, schema: dict[str, Any]) -> None:
    assert validate(yaml.read(path.read_bytes()).value, schema) == []


def test_examples_of_the_methods_fit_the_schema(schema: dict[str, Any]) -> None:
    for name in api.names():
        example = api.get(name).doc.partition("Example:\n")[2]
        tree = YAML(typ="safe").load(example)
        assert tree["merge_method"] == name
        assert validate(tree, schema) == []


def told_by_keys(path: Path) -> bool:
    """Whether a bad recipe has an unknown key, or a method or parameter that no method has."""
    parameters = {name for method in api.names() for name in (*api.get(method).fields, *api.get(method).ignored)}
    for message in re.findall(r"^# error: (.*)", path.read_text(), re.M):
        if message.startswith(("unknown key", "unknown merge_method", "`merge_method` is missing")):
            return True
        if (found := re.search(r"has no parameter `(\w+)`", message)) and found[1] not in parameters:
            return True
        if "does not belong under `parameters:`" in message:
            return True
    return False


@pytest.mark.parametrize("path", [path for path in BAD if told_by_keys(path)], ids=lambda path: path.stem)
def test_bad_keys_are_refused_by_the_schema(path: Path, schema: dict[str, Any]) -> None:
    assert validate(yaml.read(path.read_bytes()).value, schema)


def test_enough_bad_recipes_are_about_keys() -> None:
    assert sum(told_by_keys(path) for path in BAD) >= 15


@pytest.mark.parametrize(
    "parameters",
    [
        {"weight": "half"},
        {"weight": [0.1, "x"]},
        {"weight": [{"filter": "mlp"}]},
        {"weight": [{"filters": "mlp", "value": 1}]},
        {"weight": []},
        {"normalize": 3},
        {"gamma": 2},
        {"max_iter": -1},
        {"nuslerp_flatten": "maybe"},
        [],
    ],
    ids=str,
)
def test_bad_values_are_refused_by_the_schema(parameters: Any, schema: dict[str, Any]) -> None:
    assert validate({"merge_method": "ties", "models": [{"model": "a"}], "parameters": parameters}, schema)


@pytest.mark.parametrize(
    "keys",
    [
        {"models": [{"model": {"pth": "a"}}]},
        {"models": ["a"]},
        {"models": []},
        {"models": {"model": "a"}},
        {"slices": [{"model": "a"}]},
        {"slices": [{"sources": [{"model": "a", "layer_range": "0-4"}]}]},
        {"slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]},
        {"dtype": "int8"},
        {"allow": ["anything"]},
        {"tokenizer": {"tokens": {"x": {"sorce": "a"}}}},
    ],
    ids=str,
)
def test_bad_structure_is_refused_by_the_schema(keys: dict[str, Any], schema: dict[str, Any]) -> None:
    assert validate({"merge_method": "linear", **keys}, schema)


@pytest.mark.parametrize(
    "tree",
    [
        {"parameters": {"weight": "1e-5", "normalize": "yes"}},
        {"parameters": {"weight": {"filter": "mlp", "value": 1}}},
        {"parameters": {"weight": [{"match": "*", "value": [1, 2]}], "normalize": 0}},
        {"parameters": None, "dtype": "torch.bfloat16", "out_dtype": None},
        {"tokenizer": {"source": {"path": "a"}, "tokens": {"<s>": {"source": {"kind": "zero"}, "force": True}}}},
        {"tokenizer_source": "union", "chat_template": "auto", "name": "x", "allow": ["nonfinite"]},
        {"base_model": {"model": {"path": "a", "revision": None}, "override_architecture": "X"}},
    ],
    ids=str,
)
def test_what_smelt_takes_fits_the_schema(tree: dict[str, Any], schema: dict[str, Any]) -> None:
    whole = {"merge_method": "linear", "models": [{"model": "a"}], **tree}
    from_dict(whole)
    assert validate(whole, schema) == []


def test_the_schema_names_everything(schema: dict[str, Any]) -> None:
    methods = {one["const"]: one["description"] for one in schema["properties"]["merge_method"]["oneOf"]}
    assert methods == {name: api.get(name).summary for name in api.names()}
    known = schema["$defs"]["Parameters"]["properties"]
    for name in api.names():
        for parameter, field in api.get(name).fields.items():
            assert name in known[parameter]["description"]
            assert field.doc
    assert set(smelt.recipe.schema.Recipe.model_fields) == set(schema["properties"])
