"""Methods of one's own: a file that the recipe names, or an entry point; and every mistake in them told by its line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import factory
import smelt
from smelt.errors import RecipeError, SmeltError
from smelt.methods import api

HEAD = """\
import numpy as np
from smelt.methods.api import *


@register("midpoint", source="a test")
class Midpoint(Method):
    \"\"\"A point between two models.\"\"\"

    pull: float = scalar(0.5, doc="how far towards the second", within="[0, 1]")
    models = (2, 2)
"""
TILE = """
    def tile(self, x: Array) -> Array:
        return (x[0] * np.float32(1 - self.pull) + x[1] * np.float32(self.pull)).astype(np.float32)
"""
RECIPE = {
    "merge_method": "midpoint",
    "methods": ["./mine.py"],
    "models": [{"model": "m0"}, {"model": "m1"}],
    "parameters": {"pull": 0.25},
}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The methods that are registered here are gone afterwards."""
    api.names()
    before = dict(api._REGISTRY)
    yield
    api._REGISTRY.clear()
    api._REGISTRY.update(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two models, a recipe and a sound method file."""
    factory.llamas(tmp_path)
    factory.recipe(tmp_path / "recipe.yml", RECIPE)
    (tmp_path / "mine.py").write_text(HEAD + TILE)
    return tmp_path


def run(place: Path, *words: object, trust: bool = True) -> factory.Done:
    return factory.smelt("merge", place / "recipe.yml", place / "out", *words, *(["--trust-methods"] if trust else []))


def write(place: Path, text: str) -> None:
    (place / "mine.py").write_text(textwrap.dedent(text))


def line_of(place: Path, part: str) -> int:
    """The number of the first line of the method file that holds `part`."""
    lines = (place / "mine.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if part in line)


# --- a file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_not_run_without_trust(place: Path) -> None:
    write(place, "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    for command in (
        ["merge", place / "recipe.yml", place / "out"],
        ["plan", place / "recipe.yml"],
        ["check", place / "recipe.yml"],
    ):
        done = factory.smelt(*command)
        assert done.code == 2
        assert done.err.splitlines()[0] == "error: the recipe names a method file, which is code: ./mine.py"
        assert "--trust-methods" in done.err
    with pytest.raises(RecipeError, match="trust_methods=True"):
        smelt.plan(place / "recipe.yml")
    assert not (place / "ran").exists()
    assert not (place / "out").exists()


def test_a_trusted_file_merges(place: Path) -> None:
    done = run(place)
    assert done.code == 0, done.text
    one, two = (factory.stored(place / name) for name in ("m0", "m1"))
    for name, value in factory.stored(place / "out").items():
        assert np.array_equal(value, one[name] * np.float32(0.75) + two[name] * np.float32(0.25))


def test_all_commands_take_it(place: Path) -> None:
    planned = factory.smelt("plan", place / "recipe.yml", "--trust-methods")
    assert planned.code == 0
    assert "midpoint(m0, m1)  pull=0.25" in planned.out
    checked = factory.smelt("check", place / "recipe.yml", "--trust-methods")
    assert (checked.code, "sound. midpoint of 2 models" in checked.out) == (0, True)
    assert smelt.plan(place / "recipe.yml", trust_methods=True).method == "midpoint"
    smelt.merge(place / "recipe.yml", place / "out", trust_methods=True)
    assert factory.smelt("verify", place / "out").code == 0


def test_the_file_is_found_beside_the_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run(place).code == 0


def test_a_dict_finds_it_in_the_working_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    smelt.merge(RECIPE, place / "out", trust_methods=True)
    assert (place / "out" / "model.safetensors").exists()


def test_the_record_names_the_file_and_its_hash_and_no_path(place: Path) -> None:
    (place / "tools").mkdir()
    (place / "mine.py").rename(place / "tools" / "mine.py")
    factory.recipe(place / "recipe.yml", RECIPE | {"methods": ["tools/mine.py"]})
    assert run(place).code == 0
    record = json.loads((place / "out" / "smelt.json").read_text())
    sha = hashlib.sha256((place / "tools" / "mine.py").read_bytes()).hexdigest()
    assert record["method_files"] == {"mine.py": sha}
    assert "methods: [mine.py]" in (place / "out" / "mergekit_config.yml").read_text()
    assert "tools" not in (place / "out" / "smelt.json").read_text()


def test_its_parameters_are_checked_as_any_others(place: Path) -> None:
    factory.recipe(place / "recipe.yml", RECIPE | {"parameters": {"pul": 0.5}})
    done = run(place)
    assert (done.code, "midpoint has no parameter `pul`" in done.err, "did you mean `pull`?" in done.err) == (
        2,
        True,
        True,
    )
    factory.recipe(place / "recipe.yml", RECIPE | {"parameters": {"pull": 1.5}})
    assert "`pull` must lie in [0, 1], not 1.5" in run(place).err
    factory.recipe(place / "recipe.yml", RECIPE | {"models": [{"model": "m0"}]})
    assert "midpoint takes exactly 2 models, not 1" in run(place).err


def test_a_filter_and_a_gradient_reach_it(place: Path) -> None:
    cases = [{"filter": "q_proj", "value": [0, 1]}, {"value": 0.5}]
    factory.recipe(place / "recipe.yml", RECIPE | {"parameters": {"pull": cases}})
    assert run(place).code == 0
    merged, one, two = (factory.stored(place / name) for name in ("out", "m0", "m1"))
    assert np.array_equal(
        merged["model.layers.0.self_attn.q_proj.weight"], one["model.layers.0.self_attn.q_proj.weight"]
    )
    assert np.array_equal(
        merged["model.layers.1.self_attn.q_proj.weight"], two["model.layers.1.self_attn.q_proj.weight"]
    )


def test_tiles_and_threads_do_not_show(tmp_path: Path) -> None:
    factory.llamas(tmp_path, hidden=300, vocabulary=1100)
    factory.recipe(tmp_path / "recipe.yml", RECIPE)
    (tmp_path / "mine.py").write_text(HEAD + TILE)
    for name, options in {"a": {"workers": 1, "tile": 65536}, "b": {"workers": 3, "tile": 1 << 20}}.items():
        smelt.merge(tmp_path / "recipe.yml", tmp_path / name, trust_methods=True, **options)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# --- loaded again ---------------------------------------------------------------------------------------------------


def test_the_same_file_twice_in_a_recipe(place: Path) -> None:
    factory.recipe(place / "recipe.yml", RECIPE | {"methods": ["./mine.py", "mine.py"]})
    assert run(place).code == 0


@pytest.mark.parametrize("bytecode", ["", "1"])
def test_a_file_that_changed_is_run_as_it_is_now(place: Path, bytecode: str) -> None:
    """Also within a second and with the same size, when Python would take its cached bytecode for fresh."""
    script = """
        import smelt
        from pathlib import Path
        mine = Path("mine.py")
        plain = mine.read_text()
        for name, number in (("a", "0.25"), ("b", "0.75")):
            mine.write_text(plain.replace("1 - self.pull", number))
            smelt.merge("recipe.yml", name, trust_methods=True)
        """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": bytecode}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=place, env=environment, check=True, timeout=120)
    one, two, a, b = (factory.stored(place / name)["model.norm.weight"] for name in ("m0", "m1", "a", "b"))
    assert np.allclose(a, 0.25 * one + 0.25 * two, atol=1e-6)
    assert np.allclose(b, 0.75 * one + 0.25 * two, atol=1e-6)
    assert not (place / "__pycache__").exists()


def test_a_file_that_fails_leaves_no_method_behind(place: Path) -> None:
    write(place, HEAD + TILE + "\nraise RuntimeError('at the very end')\n")
    assert run(place).code == 2
    assert "midpoint" not in api.names()


def test_a_method_counts_only_for_recipes_that_name_its_file(place: Path) -> None:
    """Nobody uses code that their recipe does not name, and no record leaves it out."""
    assert run(place).code == 0
    plain = {key: value for key, value in RECIPE.items() if key != "methods"}
    factory.recipe(place / "other.yml", plain)
    with pytest.raises(SmeltError, match="midpoint"):
        smelt.merge(place / "other.yml", place / "other")
    assert not (place / "other").exists()


# --- mistakes -------------------------------------------------------------------------------------------------------

IN_THE_FILE = {
    "a package that is not there": ("import no_such_package_at_all\n", "ModuleNotFoundError", "import no_such"),
    "syntax": ("def f(:\n    pass\n", "SyntaxError", "def f(:"),
    "an error deep inside": ("def f():\n    return {}['x']\n\n\nf()\n", "KeyError: 'x'", "return {}['x']"),
    "endless recursion": ("def f():\n    return f()\n\n\nf()\n", "RecursionError", "return f()"),
    "leaving Python": ("import sys\nsys.exit(0)\n", "SystemExit", "sys.exit(0)"),
    "a name that smelt has": (HEAD.replace("midpoint", "linear") + TILE, "linear already", "@register"),
    "an argument that nobody gives": (HEAD + "\n    def tile(self, y):\n        return y\n", r"\['y'\]", "@register"),
    "no tile": (HEAD, "tile", "@register"),
    "no Method": (HEAD.replace("(Method)", "") + TILE, "Method", "@register"),
    "no source": (HEAD.replace(', source="a test"', "") + TILE, "source", "@register"),
    "a parameter of text": (HEAD.replace("pull: float", "pull: str") + TILE, "float, int or bool", "@register"),
    "no interval": (HEAD.replace("[0, 1]", "0..1") + TILE, "0..1", "pull: float"),
    "a reduction that waits for itself": (
        HEAD + "\n    @reduce(Sum)\n    def s(self, x, s):\n        return x\n" + TILE,
        r"\['s'\]",
        "@register",
    ),
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_an_error_in_the_file(name: str, place: Path) -> None:
    text, message, line = IN_THE_FILE[name]
    (place / "mine.py").write_text(text)
    done = run(place)
    first, second, *_ = done.err.splitlines()
    assert done.code == 2
    assert first.startswith("error: the method file mine.py cannot be loaded: ")
    assert re.search(message, first)
    number = line_of(place, line)
    assert second.strip().startswith(f"mine.py:{number}: ")
    assert line in second
    assert not (place / "out").exists()


def test_a_name_that_smelt_has_in_a_process_of_its_own(place: Path) -> None:
    """There the file is loaded before anything else has looked for smelt's own methods."""
    (place / "mine.py").write_text(HEAD.replace("midpoint", "linear") + TILE)
    done = factory.process("merge", "recipe.yml", "out", "--trust-methods", cwd=place)
    assert done.code == 2, done.text
    assert "there is a method linear already" in done.err
    assert f"mine.py:{line_of(place, '@register')}:" in done.err


def test_no_method_in_the_file(place: Path) -> None:
    write(place, "x = 1\n")
    done = run(place)
    assert done.code == 2
    assert "the method file mine.py registers no method" in done.err
    assert "@register" in done.err


def test_another_name_than_the_recipe_says(place: Path) -> None:
    (place / "mine.py").write_text(HEAD.replace("midpoint", "midpiont") + TILE)
    done = run(place)
    assert done.code == 2
    assert "unknown merge_method 'midpoint'" in done.err
    assert "did you mean `midpiont`?" in done.err


@pytest.mark.parametrize("name", ["missing.py", "folder", "text.txt"])
def test_no_python_file(name: str, place: Path) -> None:
    (place / "folder").mkdir()
    (place / "text.txt").write_text("no code")
    factory.recipe(place / "recipe.yml", RECIPE | {"methods": [name]})
    done = run(place)
    assert done.code == 2
    assert name in done.err.splitlines()[0]
    assert "fix: " in done.err


IN_THE_CODE = {
    "tile raises": ("", "raise ValueError('no good')", "ValueError: no good", "no good"),
    "tile misspells": ("", "return self.pul * x[0]", "no attribute 'pul'", "self.pul"),
    "tile of float64": ("", "return x[0].astype('float64')", "float64", "def tile"),
    "tile too small": ("", "return x[0][:3]", r"\[3\]", "def tile"),
    "tile of all models": ("", "return x", r"\[2, \d+\]", "def tile"),
    "no tile given back": ("", "x[0]", "None", "def tile"),
    "one number": ("", "return np.float32(1)", r"\[\]", "def tile"),
    "a derived value": (
        "    @derive\n    def f(self):\n        return 1 / 0\n",
        "return x[0] * f",
        "ZeroDivision",
        "1 / 0",
    ),
    "a reduction that raises": (
        "    @reduce(Sum)\n    def f(self, x):\n        return x @ x\n",
        "return x[0]",
        "matmul",
        "x @ x",
    ),
    "a reduction of nothing": (
        "    @reduce(Sum)\n    def f(self, x):\n        return None\n",
        "return x[0]",
        "None",
        "def f(self, x)",
    ),
    "a reduction without its models": (
        "    @reduce(Sum)\n    def f(self, x):\n        return x[0]\n",
        "return x[0]",
        r"Sum|\[n",
        "def f(self, x)",
    ),
    "check raises": ("    def check(self):\n        return self.nothing\n", "return x[0]", "'nothing'", "self.nothing"),
    "grain raises": (
        "    @property\n    def grain(self):\n        return Grain.ROWS\n",
        "return x[0]",
        "ROWS",
        "Grain.ROWS",
    ),
    "copies raises": ("    def copies(self):\n        return 1 / 0\n", "return x[0]", "ZeroDivision", "1 / 0"),
}


@pytest.mark.parametrize("name", IN_THE_CODE)
def test_an_error_in_the_code_names_the_line(name: str, place: Path) -> None:
    more, body, message, line = IN_THE_CODE[name]
    wanted = "x, f" if "def f" in more else "x"
    (place / "mine.py").write_text(f"{HEAD}\n{more}\n    def tile(self, {wanted}):\n        {body}\n")
    done = run(place, "--quiet")
    assert done.code == 2, done.text
    first, second, *_ = done.err.splitlines()
    assert "midpoint" in first
    assert re.search(message, first), first
    assert second.strip().startswith(f"mine.py:{line_of(place, line)}: "), done.err
    assert "defect" not in done.err
    assert sorted(path.name for path in place.iterdir()) == ["m0", "m1", "mine.py", "recipe.yml"]


def test_check_says_what_is_wrong_with_settings(place: Path) -> None:
    (place / "mine.py").write_text(
        HEAD + '\n    def check(self):\n        raise ValueError("pull is too little", "pull more")\n' + TILE
    )
    done = run(place)
    assert done.code == 2
    assert "error: midpoint: pull is too little" in done.err
    assert "pull: 0.25" in done.err
    assert "fix: pull more" in done.err


def test_undefined_names_the_tensor(place: Path) -> None:
    (place / "mine.py").write_text(
        HEAD + '\n    @derive\n    def f(self):\n        raise Undefined("the inputs cancel")\n'
        "\n    def tile(self, x, f):\n        return x[0]\n"
    )
    done = run(place)
    assert done.code == 5
    assert re.search(r"error: tensor '[\w.]+': the inputs cancel", done.err)


def test_a_nan_of_ones_own_is_refused(place: Path) -> None:
    (place / "mine.py").write_text(HEAD + "\n    def tile(self, x):\n        return x[0] * np.float32('nan')\n")
    done = run(place)
    assert done.code == 5
    assert "would get a NaN or infinity where every model has a number" in done.err
    assert not (place / "out").exists()


def test_arguments_cannot_be_changed(place: Path) -> None:
    """What one function of a method did to its arguments, the next one would see."""
    (place / "mine.py").write_text(HEAD + "\n    def tile(self, x):\n        x += 1\n        return x[0]\n")
    done = run(place)
    assert done.code == 2
    assert "read-only" in done.err
    assert f"mine.py:{line_of(place, 'x += 1')}: x += 1" in done.err


# --- an entry point -------------------------------------------------------------------------------------------------


def install(folder: Path, module: str, *, value: str = "smelt_midpoint") -> Path:
    """What an installed package leaves in site-packages, as far as Python looks."""
    folder.mkdir()
    (folder / "smelt_midpoint.py").write_text(module)
    info = folder / "smelt_midpoint-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smelt-midpoint\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[smelt.methods]\nmidpoint = {value}\n")
    return folder


def test_an_entry_point_is_a_method_like_others(place: Path) -> None:
    """No flag: whoever installed the package trusts it."""
    site = install(place / "site", HEAD + TILE)
    (place / "mine.py").unlink()
    factory.recipe(place / "recipe.yml", {key: value for key, value in RECIPE.items() if key != "methods"})
    merged = factory.process("merge", "recipe.yml", "out", cwd=place, PYTHONPATH=str(site))
    assert merged.code == 0, merged.text
    one, two = (factory.stored(place / name) for name in ("m0", "m1"))
    for name, value in factory.stored(place / "out").items():
        assert np.array_equal(value, one[name] * np.float32(0.75) + two[name] * np.float32(0.25))
    shown = factory.process("methods", "midpoint", cwd=place, PYTHONPATH=str(site))
    assert shown.code == 0
    assert "A point between two models." in shown.out
    assert re.search(r"pull +float in \[0, 1\] +0\.5 +how far towards the second", shown.out)
    assert '"const": "midpoint"' in factory.process("schema", cwd=place, PYTHONPATH=str(site)).out


@pytest.mark.parametrize(
    ("module", "value", "message"),
    [
        ("import no_such_package_at_all\n", "smelt_midpoint", "ModuleNotFoundError"),
        (HEAD.replace("midpoint", "linear") + TILE, "smelt_midpoint", "there is a method linear already"),
        (HEAD + TILE, "smelt_midpiont", "ModuleNotFoundError"),
    ],
    ids=["error", "clash", "no module"],
)
def test_a_broken_package_is_named(module: str, value: str, message: str, place: Path) -> None:
    site = install(place / "site", module, value=value)
    done = factory.process("methods", cwd=place, PYTHONPATH=str(site))
    assert done.code == 2
    assert "installed package smelt-midpoint cannot be loaded" in done.err
    assert message in done.err
    assert f"entry point midpoint = {value}" in done.err
    assert "uninstall smelt-midpoint" in done.err
