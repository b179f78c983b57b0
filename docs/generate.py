"""Write what the documents say by themselves, from the program as it is.

    python docs/generate.py            rewrite what is out of date
    python docs/generate.py --check    name what is out of date, and end with 1 if anything is

`methods.md` comes from the declarations of the methods, `commands.md` from the help texts. In the other pages, every
command in a ```console block is run again and its output put in its place. The commands of a page run in a folder that
holds the models of `tests/golden/data` and those recipes and Python files of the page that begin with a comment
`# NAME.yml` or `# NAME.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smelt.cli import main as command_line
from smelt.cli.methods import default_text, kind_text
from smelt.methods import api

DOCS = Path(__file__).resolve().parent
DATA = DOCS.parent / "tests" / "golden" / "data"
GENERATED = ("methods.md", "commands.md")
WRITTEN = tuple(sorted(path.name for path in DOCS.glob("*.md") if path.name not in GENERATED))
SHOWN_FOLDER = "/home/me/merges"
"""What stands in the pages for the folder in which the commands ran."""

_FENCE = re.compile(r"^```(\w+)[ ]?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARYING = (
    (re.compile(r"\d+(\.\d+)?(e[-+]\d+)? (s\b|[kMG]?B/s)"), "# s"),
    (re.compile(r'(seconds": )[\d.]+'), r"\1#"),
    (re.compile(r"about \d+ MB of memory( with \d+ threads)?"), "about # MB of memory"),
)
_NOTICE = "<!-- Written by docs/generate.py. Change the declarations, not this page. -->\n"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the words after it, its text, and where the text lies in the page."""

    language: str
    words: str
    text: str
    start: int
    stop: int


def blocks(page: str, language: str) -> Iterator[Block]:
    """The fenced blocks of one language."""
    for found in _FENCE.finditer(page):
        if found[1] == language:
            yield Block(found[1], found[2], found[3], found.start(3), found.end(3))


def file_name(block: Block) -> str | None:
    """The file name that a block gives itself in its first line: `# ties.yml`."""
    found = re.match(r"# ([\w.-]+\.(?:yml|py))\n", block.text)
    return found[1] if found else None


_METHODS_INTRO = """`smelt methods NAME` prints the same on the command line.

In the equations x_i is model i's tensor, b the base's, d_i = x_i − b the task vector, w_i the weight, n the number of
models without the base, N the number of entries of the tensor. Each tensor is merged by itself. Tensors are decoded to
float32; d_i is the float32 difference, and cuts, ranks and drops are decided on it; everything after it is float64,
rounded once to float32 and then to the output's type.

[recipes.md](recipes.md) tells how a parameter is written: one number, a gradient over the layers, cases by tensor name.
[mergekit.md](mergekit.md) lists where a method differs from MergeKit's of the same name. The examples name models of
`tests/golden/data`, and run there.
"""


_METHODS_END = """
## Methods on singular directions

iso_c, iso_cts, tsv and wudi see a matrix whole and decompose it. That costs memory (the matrix of every model in
float32, and several copies in float64) and time: an SVD of m × n takes about 6 M r² + 20 r³ operations, r = min(m,
n), M = max(m, n). `smelt plan` says for each matrix how many operations its method needs, about how many seconds they
take on one core, and how many bytes, and at its end what all of them come to. Embeddings and heads are matrices too,
and the largest; their rows are tokens, and not what the papers speak of. `decompose` leaves them to the mean:

```yaml
merge_method: tsv
base_model: models/llama-base
models:
  - model: models/llama-ft1
  - model: models/llama-ft2
parameters:
  decompose:
    - filter: embed_tokens
      value: false
    - filter: lm_head
      value: false
    - value: true
```

All cores are used by working on several matrices at once, each in one thread: more threads within one would change
the last bits of the result. With NumPy's own wheels smelt holds their OpenBLAS at one thread while such a method
runs, so the result is the same whatever the threads. With another BLAS set its variable to 1 (`OMP_NUM_THREADS`,
`MKL_NUM_THREADS`); otherwise the same bits are promised only for the same number of its threads.

`randomized: true` finds the leading k directions (of `rank`, shared out as the method says) by the randomised SVD of
Halko, Martinsson & Tropp 2011 ([arXiv:0909.4061](https://arxiv.org/abs/0909.4061), Algorithms 4.4 and 5.1) with k +
`oversampling` Gaussian vectors and `power` iterations. It is taken where 2 (k + `oversampling`) < min(m, n);
elsewhere the exact SVD costs no more. With p = `oversampling`, s = 2 `power` + 1 and A's singular values σ, the mean
error in the spectral norm of what it looks at keeps to their Theorem 10.6 and Corollary 10.10:

```text
E ‖A − Q Qᵀ A‖ ≤ ((1 + √(k / (p − 1))) σ_(k+1)^s + e √(k + p) / p · (Σ_(j>k) σ_j^(2s))^(1/2))^(1/s)
```

so that it is near σ_(k+1), the least possible, after a few iterations. The Gaussian vectors come from the seed, as
all random numbers here.

## Tensor, row or whole model

Some methods look at all entries before they merge one: for a cut, a norm, an angle. Papers differ in what "all" is, and
`granularity` says it: `tensor` (the default), `row` (along the last dimension) or `model`, all tensors together, as if
they were one long vector. [recipes.md](recipes.md#tensor-row-or-whole-model-granularity) tells how it is used and what
it costs.

| method | in the paper, or its authors' program | `granularity` |
|---|---|---|
| ties | the whole task vector is trimmed | tensor, model |
| localize | regions of the whole task vector | tensor, row, model |
| pcb | scales and shares of the whole task vector | tensor, row, model |
| ramplus_tl | entries are counted over the whole model | tensor, model |
| geometric_median | distances between whole models | tensor, row, model |
| breadcrumbs, breadcrumbs_ties | each layer; the program masks each row | tensor, row, model |
| model_stock | an angle for each layer | tensor, row, model |
| sce | each parameter matrix | tensor, model |
| slerp, nuslerp, multislerp, karcher | none says; MergeKit takes each tensor | tensor, model |

The others have no such choice. task_arithmetic, linear, passthrough, nearswap, consensus, ram, expo and the averages of
checkpoints look at each entry by itself; so does dare, as what its paper divides by is the density, and only MergeKit's
`rescale: true` takes norms, of each tensor. della ranks each row, arcee_fusion compares the entries of a tensor, and
tsv, iso_c, iso_cts and wudi decompose one matrix at a time. nuslerp has rows and columns by `nuslerp_flatten: false`.
"""


# --- pages made of declarations --------------------------------------------------------------------------------------


def methods_page() -> str:
    """`methods.md`: a table of all methods, and a section on each."""
    infos = [info for info in map(api.get, api.names()) if info.type.__module__.startswith("smelt.methods.")]
    base = {"none": "no", "optional": "optional", "required": "yes"}
    lines = [_NOTICE, "# Methods", ""]
    lines += [f"{len(infos)} methods. {_METHODS_INTRO}"]
    lines += [
        "| method | base | models | what it does |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| [{info.name}](#{info.name}) | {base[info.base]} | {info.arity().removesuffix('s').removesuffix(' model')} "
        f"| {_cell(info.summary)} |"
        for info in infos
    ]
    for info in infos:
        lines += ["", *_method_section(info)]
    return "\n".join(lines) + "\n" + _METHODS_END


def doc_sections(doc: str) -> dict[str, str]:
    """A method's docstring in parts: summary, equation, use, note (may be absent), example; the headings taken off."""
    parts = re.split(r"\n(?=(?:Equation:|Use it|Note:|Example:))", doc)
    found = {"summary": " ".join(parts[0].split())}
    for part in parts[1:]:
        heading = part.split(maxsplit=1)[0].rstrip(":").lower()
        body = part if heading == "use" else part.split(":", 1)[1]
        block = heading in ("equation", "example")
        found[heading] = textwrap.dedent(body.strip("\n")).rstrip() if block else " ".join(body.split())
    return found


def _method_section(info: api.MethodInfo) -> list[str]:
    parts = doc_sections(info.doc)
    base = {"none": "no base is needed", "optional": "a base is optional", "required": "a base is needed"}[info.base]
    lines = [f"## {info.name}", "", parts["summary"], "", "```text", parts["equation"], "```", "", parts["use"], ""]
    if "note" in parts:
        lines += [f"Note: {parts['note']}", ""]
    lines += [f"Takes {info.arity()}; {base}.", ""]
    if info.fields:
        lines += ["| parameter | value | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{field.name}` | {_cell(kind_text(field))} | {default_text(field)} | {_cell(field.doc)} |"
            for field in info.fields.values()
        ]
    else:
        lines.append("It has no parameters.")
    ignored = ", ".join(f"`{name}` ({reason})" for name, reason in info.ignored.items())
    lines += ["", f"Accepted, without effect: {ignored}.", "", f"Source: {info.source}.", "", "Example:", ""]
    return [*lines, "```yaml", parts["example"], "```"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """`commands.md`: the help text of every command."""
    names = [name for name in command_line.app if not name.startswith("-")]
    lines = [_NOTICE, "# Commands", "", "Exit codes and messages are told in [errors.md](errors.md).", ""]
    for words in ([], *([name] for name in names)):
        command = " ".join(["smelt", *words])
        with tempfile.TemporaryDirectory() as folder:
            text = _smelt([*words, "--help"], Path(folder))
        text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        lines += [f"## {command}", "", "```text", text, "```", ""]
    return "\n".join(lines)


# --- pages with commands ---------------------------------------------------------------------------------------------


def refreshed(page: str) -> str:
    """The page with the output of every command as it is now; what differs in times alone is left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "merges"
        prepare(page, folder)
        result, end = [], 0
        for block in blocks(page, "console"):
            fresh = _session(block.text, folder)
            result.append(page[end : block.start])
            result.append(block.text if _settled(fresh) == _settled(block.text) else fresh)
            end = block.stop
        return "".join([*result, page[end:]])


def prepare(page: str, folder: Path) -> None:
    """Fill the folder in which a page's commands run: the models, and the recipes and files that the page names."""
    shutil.copytree(DATA / "models", folder / "models")
    for block in (*blocks(page, "yaml"), *blocks(page, "python")):
        if (name := file_name(block)) is not None:
            (folder / name).write_text(block.text, encoding="utf-8")


def _session(text: str, folder: Path) -> str:
    """A ```console block with its commands run again."""
    lines: list[str] = []
    commands = re.findall(r"^\$ (?:.*\\\n)*.*$", text, re.MULTILINE)
    for command in commands:
        output = _run(command[2:], folder).replace(str(folder), SHOWN_FOLDER)
        if "error: a defect of smelt" in output:
            raise RuntimeError(f"not to be shown to anybody:\n{command}\n{output}")
        lines += [command, *(line.rstrip() for line in output.splitlines())]
    return "\n".join(lines) + "\n"


def _run(command: str, folder: Path) -> str:
    foreign = "--trust-methods" in command  # a method that is loaded stays known in this process
    if command.startswith("smelt ") and not foreign and not re.search(r"[|;<>&$\\`]", command):
        return _smelt(shlex.split(command)[1:], folder)
    environment = {**os.environ, **_environment(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.stdout.decode()


def _smelt(words: list[str], folder: Path) -> str:
    """What `smelt WORDS` prints, on both streams, run in this process to save the start."""
    printed = io.StringIO()
    before = dict(os.environ)
    os.environ.update(_environment(folder))
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            command_line.run(words)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return printed.getvalue()


def _environment(folder: Path) -> dict[str, str]:
    """No network, no colours, the same width everywhere."""
    return {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "FORCE_COLOR": "",
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
    }


def _settled(text: str) -> str:
    """Text without what differs from run to run."""
    for pattern, written in _VARYING:
        text = pattern.sub(written, text)
    return text


# --- the command -----------------------------------------------------------------------------------------------------


def current(name: str) -> str:
    """What the page `name` must hold now."""
    if name == "methods.md":
        return methods_page()
    if name == "commands.md":
        return commands_page()
    return refreshed((DOCS / name).read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Rewrite the pages that are out of date, or with --check only name them."""
    stale = 0
    for name in (*GENERATED, *WRITTEN):
        path = DOCS / name
        text = current(name)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        sys.stdout.write(f"{'out of date' if '--check' in arguments else 'written'}: docs/{name}\n")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
