"""The documents: generated parts are current, links lead somewhere, recipes are valid, examples give what they show.

A fenced ```yaml block is a whole recipe and must be valid; ```yaml bad marks one that shows a mistake, ```yaml own one
whose method is the reader's own.
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import smelt
from smelt.recipe.check import check_parameters
from smelt.recipe.parse import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = _load_generator()
OWN = [*sorted(DOCS.rglob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*OWN, *(ROOT / folder / "README.md" for folder in (".", "examples", "benchmarks"))]
CONSOLE = [name for name in generate.WRITTEN if "```console" in (DOCS / name).read_text(encoding="utf-8")]
IN_HEADINGS = re.compile(r"[^\w\- ]")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {IN_HEADINGS.sub("", heading.strip().lower()).replace(" ", "-") for heading in headings}


def recipes() -> list[tuple[str, object]]:
    return [
        (f"{name(path)}-{number}", block)
        for path in PAGES
        for number, block in enumerate(generate.blocks(path.read_text(encoding="utf-8"), "yaml"), 1)
    ]


# --- what is generated -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", generate.GENERATED)
def test_generated_pages_are_current(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == generate.current(page), "run `python docs/generate.py`"


@pytest.mark.parametrize("page", CONSOLE)
def test_commands_print_what_is_shown(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == generate.current(page), "run `python docs/generate.py`"


# --- what is named ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{name(path)} links to {target}"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), f"{name(path)} links to {target}"


@pytest.mark.parametrize("path", OWN, ids=name)
def test_named_files_exist(path: Path) -> None:
    """Paths of the repository in backticks; a module may be named from `src/smelt` on."""
    for span in re.findall(r"`([\w./-]+)`", prose(path.read_text(encoding="utf-8"))):
        of_source = re.fullmatch(r"[a-z_]+(/[a-z_]+)*/[a-z_]+\.py", span)
        if re.match(r"(docs|src|tests|examples|benchmarks)/", span):
            assert (ROOT / span).exists(), f"{name(path)} names {span}"
        elif of_source:
            assert (ROOT / "src" / "smelt" / span).exists(), f"{name(path)} names {span}"


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "block"), recipes(), ids=lambda value: value if isinstance(value, str) else "")
def test_recipes_are_valid(place: str, block: generate.Block) -> None:
    if block.words == "bad":
        return
    recipe = parse(block.text, source=place)
    if block.words == "own":
        assert recipe.methods
        return
    assert not block.words
    assert check_parameters(recipe) == []


def test_library_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "library.md").read_text(encoding="utf-8")
    code = "\n".join(block.text for block in generate.blocks(page, "python"))
    folder = tmp_path / "merges"
    generate.prepare(page, folder)
    monkeypatch.chdir(folder)
    examples = doctest.DocTestParser().get_doctest(code, {}, "library.md", "docs/library.md", 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=said.append)
    assert result.attempted > 10
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("function", ["merge", "plan", "merge_state_dicts", "verify"])
def test_signatures_in_library(function: str) -> None:
    """Each is written out with all its arguments, in order."""
    page = (DOCS / "library.md").read_text(encoding="utf-8")
    shown = re.search(rf"^smelt\.{function}\((.*?)\) -> ", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    written = [re.split(r"=", argument.strip())[0].lstrip("*") for argument in shown[1].split(",")]
    declared = [*inspect.signature(getattr(smelt, function)).parameters]
    assert [argument for argument in written if argument and argument != ")"] == declared


def test_every_field_of_the_record_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "outputs.md").read_text(encoding="utf-8")
    monkeypatch.chdir(generate.DATA)
    smelt.merge("cases/ties/recipe.yml", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "smelt.json").read_text(encoding="utf-8"))
    fields = {*record, *record["recipe"], *record["inputs"][0], *record["inputs"][0]["files"][0]}
    fields |= {key for row in record["files"].values() for key in row}
    fields |= {key for row in record["tensors"].values() for key in row}
    explained = set(re.findall(r"`(\w+)`", page[page.index("## smelt.json") :]))
    assert fields <= explained


def test_every_method_is_compared_with_its_namesake() -> None:
    """The table of differences speaks of each of smelt's methods."""
    page = (DOCS / "mergekit.md").read_text(encoding="utf-8")
    table = page[page.index("## Numbers, method by method") : page.index("## Outputs")]
    rows = {word for cell in re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE) for word in cell.split(", ")}
    methods = set(re.findall(r"^## (\w+)$", generate.methods_page(), re.MULTILINE))
    assert methods <= rows


def test_changelog_names_this_version() -> None:
    assert f"## [{smelt.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
