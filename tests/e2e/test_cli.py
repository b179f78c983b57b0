"""The command line as people meet it: streams, help, progress with and without a terminal, odd environments."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import factory
from factory import GOLDEN, command, linear, process, recipe, smelt
from smelt import __version__
from smelt.cli import show
from smelt.engine.kernels import loading
from smelt.errors import RecipeError
from smelt.methods import api


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe over two small models."""
    factory.llamas(tmp_path, 2)
    return recipe(tmp_path / "recipe.yml", linear("m0", "m1"))


# --- words --------------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert smelt("--version").out.strip() == __version__
    bare, asked = smelt(), smelt("--help")
    assert bare.code == asked.code == 0
    for name in ("merge", "plan", "methods", "verify"):
        assert name in bare.out
        assert name in asked.out
        told = smelt(name, "--help")
        assert (told.code, told.err) == (0, "")
        assert "Usage: smelt " + name in told.out


def test_help_of_merge_names_every_option() -> None:
    text = smelt("merge", "--help").out
    for option in (
        "--overwrite",
        "--shard-size",
        "--threads",
        "--seed",
        "--allow",
        "--strict",
        "--hash-inputs",
        "--trust-digests",
        "--json",
    ):
        assert option in text, option


COMMANDS = ["merge", "sweep", "plan", "check", "methods", "schema", "verify", "clean"]
FRAME = re.compile(r"[\u2500-\u257f]+")
"""What tables are drawn with."""


@functools.cache
def help_of(name: str, columns: int) -> str:
    """A help page for a terminal of this width, as one line of words without frames."""
    text = process(*([name] if name else []), "--help", COLUMNS=str(columns), NO_COLOR="1", TERM="dumb").out
    assert max(map(len, text.splitlines())) <= columns
    return " ".join(FRAME.sub(" ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_pages_say_all_and_nothing_twice(name: str) -> None:
    """The whole text of the command, every option with its own, and no default that is nothing."""
    page = help_of(name, 10_000)
    function = getattr(importlib.import_module(f"smelt.cli.{name}"), name)
    text, _, options = inspect.getdoc(function).partition("\nParameters\n")
    for words in (*text.split("\n\n"), *re.findall(r"^    .*(?:\n    .*)*", options, re.MULTILINE)):
        assert unmarked(words) in page, words
    written = {part.strip() for part in re.findall(r"^(\w+)$", options, re.MULTILINE)}
    assert written == set(inspect.signature(function).parameters)
    assert not re.search(r"\[default: (False|None|\[\]|\.)\]", page)
    assert page.count("Usage: smelt") == 1
    assert "[ARGS]" not in page
    for parameter in inspect.signature(function).parameters.values():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default in ("cpu", 0)
            and parameter.default is not False
        ):
            assert f"[default: {parameter.default}]" in page
    shown = smelt("--help").out
    assert text.split("\n\n")[0].strip() in " ".join(FRAME.sub(" ", shown).split())  # as in the list of commands


def unmarked(text: str) -> str:
    """Text on one line, without the marks of code."""
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_cut_nowhere(name: str) -> None:
    narrow, wide = help_of(name, 60), help_of(name, 10_000)
    assert "\u2026" not in narrow
    assert sorted(narrow.split()) == sorted(wide.split())


def test_options_as_mergekit_writes_them(path: Path) -> None:
    out = path.parent / "out"
    done = smelt("merge", path, out, "--out-shard-size", "1", "--random-seed", "3", "-v")
    assert done.code == 0, done.text
    assert json.loads((out / "smelt.json").read_text())["recipe"]["seed"] == 3
    assert len(list(out.glob("*.safetensors"))) == 9


def test_the_result_goes_to_stdout_and_the_rest_to_stderr(path: Path) -> None:
    out = path.parent / "out"
    done = smelt("merge", path, out)
    assert re.fullmatch(rf"done: {re.escape(str(out))}  \S+ kB in \S+ s \(tensors \S+ s, \S+ \S+/s\)\n", done.out)
    first, second = done.err.splitlines()
    assert first == f"linear of m0, m1 -> {out}"
    assert re.fullmatch(
        r"9 tensors, 600 parameters; reads 4.80 kB, writes 2.40 kB, at most about \S+ MB of memory", second
    )
    assert (smelt("verify", out).err, smelt("plan", path).err) == ("", "")


def test_quiet_is_quiet(path: Path) -> None:
    out = path.parent / "out"
    assert smelt("merge", path, out, "--quiet").text == ""
    assert smelt("verify", out, "-q").text == ""
    refused = smelt("merge", path, out, "-q")
    assert (refused.code, refused.out) == (4, "")
    assert refused.err.startswith("error: the output folder is not empty\n")


def test_methods_are_all_listed_and_explained() -> None:
    listed = smelt("methods").out
    for name in api.names():
        assert re.search(rf"^{name} ", listed, re.MULTILINE)
        page = smelt("methods", name)
        assert page.code == 0
        for field in api.get(name).fields.values():
            assert re.search(rf"^  {field.name} ", page.out, re.MULTILINE), (name, field.name)
        assert "Equation:" in page.out


def test_the_plan_groups_what_is_treated_alike() -> None:
    folder = GOLDEN / "cases" / "ties"
    with contextlib.chdir(GOLDEN):
        text = smelt("plan", folder / "recipe.yml").out
    lines = text.splitlines()
    assert lines[0] == "method  ties"
    assert any(line.startswith("  base   llama-base") for line in lines)
    rows = [line for line in lines if "mlp.up_proj" in line]
    assert len(rows) == 1
    assert "model.layers.{0-3}.mlp.up_proj.weight" in rows[0]
    assert "ties(llama-ft1, llama-ft2, base llama-base)  weight=[0.5, 0.3]  density=[0.5, 0.6]" in rows[0]
    assert "39 tensors, 56.35 k parameters" in text


def test_the_plan_shows_each_step_of_a_gradient(tmp_path: Path) -> None:
    for i in range(2):
        factory.model(tmp_path / f"m{i}", factory.llama(layers=5, seed=i), factory.config(layers=5))
    tree = linear("m0", "m1", parameters={"weight": 1})
    tree["models"][0]["parameters"] = {"weight": [0, 1]}
    text = smelt("plan", recipe(tmp_path / "recipe.yml", tree)).out
    for layer, weight in enumerate(("0", "0.25", "0.5", "0.75", "1")):
        assert re.search(rf"model\.layers\.{layer}\.mlp\.up_proj\.weight .* weight=\[{weight}, 1\]", text), text


# --- environments -----------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(path: Path) -> None:
    for words in (["methods"], ["plan", path, "--json"], ["methods", "--json"]):
        running = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_the_letters(tmp_path: Path, encoding: str) -> None:
    """Names and signs that the encoding lacks are written in another way; no merge ends for it."""
    factory.llamas(tmp_path, 1, layers=3)
    (tmp_path / "m0").rename(tmp_path / "模型-ü")
    path = recipe(tmp_path / "recipe.yml", linear("./模型-ü", "./模型-ü"))
    plan = process("plan", path, encoding=encoding, PYTHONUTF8="0")
    merge = process("merge", path, tmp_path / "模型", encoding=encoding, PYTHONUTF8="0")
    wrong = process("merge", path, tmp_path / "模型", encoding=encoding, PYTHONUTF8="0")
    assert (plan.code, merge.code, wrong.code) == (0, 0, 4), (plan.text, merge.text, wrong.text)
    assert "\\u6a21\\u578b" in plan.out


def test_json_is_ascii(path: Path, tmp_path: Path) -> None:
    (tmp_path / "m0").rename(tmp_path / "ü")
    recipe(path, linear("./ü", "m1"))
    for words in (["plan", path], ["merge", path, tmp_path / "out"], ["merge", path, tmp_path / "out"]):
        done = process(*words, "--json", encoding="ascii")
        assert done.out.isascii()
        assert json.loads(done.out)


def test_a_full_device_for_stdout(path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("plan", path), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_of_a_defect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oh")

    monkeypatch.setattr("smelt.cli.merge.run_merge", broken)
    done = smelt("merge", path, path.parent / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: a defect of smelt: KeyError: 'oh'\n  fix: please report it")
    with pytest.raises(KeyError):
        smelt("merge", path, path.parent / "out", SMELT_DEBUG="1")


def test_help_loads_little() -> None:
    """`--help` answers at once: nothing heavy is on its way."""
    script = "import sys\nfrom smelt.cli.main import run\nrun(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numba"}


# --- progress ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(show.time, "monotonic", lambda: self.now)


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), show.progress("merging") as report:
        for second in range(21):
            clock.now = 100.0 + second
            report(second * 50_000_000, 2_000_000_000)
    assert err.getvalue().splitlines() == [
        "merging: 12 %, 250 MB of 2.00 GB, 50.00 MB/s, 35 s left",
        "merging: 25 %, 500 MB of 2.00 GB, 50.00 MB/s, 30 s left",
        "merging: 38 %, 750 MB of 2.00 GB, 50.00 MB/s, 25 s left",
        "merging: 50 %, 1.00 GB of 2.00 GB, 50.00 MB/s, 20 s left",
    ]


def test_compiling_is_told_once() -> None:
    """With a loop that is compiled for the first time, and only where something is shown at all."""
    log = logging.getLogger(show._COMPILER)
    said = []
    for quiet in (False, True):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), show.progress("merging", quiet=quiet):
            log.info("compiling span.weighted_sum")
            log.info("compiled span.weighted_sum in 1.0 s")
            log.info("compiling span.sum_of_deltas")
        said.append(err.getvalue())
    assert said == ["merging: compiling its loops, once on this machine\n", ""]
    assert not log.handlers
    assert log.level == logging.NOTSET
    assert loading.__name__ == show._COMPILER


def test_plain_lines_of_a_short_run_of_none_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), show.progress("merging") as report:
        report(0, 0)
        report(10, 10)
        clock.now += 60
        report(0, 0)
        report(0, 100)
    assert err.getvalue() == ""
    with contextlib.redirect_stderr(err), show.progress("merging", quiet=True) as report:
        clock.now += 60
        report(50, 100)
    assert err.getvalue() == ""


class Screen:
    """What a terminal shows in the end, of the few codes that progress bars use."""

    def __init__(self, raw: str) -> None:
        self.lines: list[str] = [""]
        self.cursor_hidden = False
        row = column = 0
        for code, character in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z])|(.)", raw, re.DOTALL):
            if code in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor_hidden = code.endswith("l")
            elif code.endswith("A"):
                row = max(0, row - int(code[2:-1] or 1))
            elif code.endswith("K"):
                self.lines[row] = "" if code[2:-1] == "2" else self.lines[row][:column]
            elif code:
                assert code.endswith("m"), f"unexpected code {code!r}"
            elif character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                self.lines += [""] * (row + 1 - len(self.lines))
            else:
                line = self.lines[row].ljust(column)
                self.lines[row] = line[:column] + character + line[column + 1 :]
                column += 1

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


def in_terminal(words: list[str], *, interrupt_at: str | None = None, **environment: str) -> tuple[int, str]:
    """Run a command in a pseudo-terminal of 200 columns; gives its exit code and all that it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        settings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **environment}
        os.execve(words[0], words, settings)
    raw, sent = b"", False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([terminal], [], [], 60)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        raw += piece
        if interrupt_at is not None and not sent and interrupt_at in raw.decode(errors="replace"):
            sent = True
            os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), raw.decode()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over models of 32 MB; its method has no loops, so it takes long enough for a bar to be drawn."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32)
    for i in range(3):
        tensors = {f"model.layers.{layer}.mlp.up_proj.weight": noise + i for layer in range(4)}
        factory.model(folder / f"m{i}", tensors, factory.config(layers=4))
    tree = linear("m1", "m2", merge_method="pcb", base_model="m0", parameters={"density": 0.5, "granularity": "row"})
    return recipe(folder / "recipe.yml", tree)


def test_the_bar_in_a_terminal_leaves_no_garbage(large: Path) -> None:
    out = large.parent / "out"
    code, raw = in_terminal(command("merge", large, out, "--threads", 1))
    assert code == 0, raw
    shown = raw.replace("\x1b", "")
    assert "merging" in shown
    assert "━" in shown
    assert re.search(r"[\d.]+/134\.2 MB", shown), "bytes are shown"
    screen = Screen(raw)
    assert not screen.cursor_hidden
    first, second, last = screen.text
    assert first.startswith("pcb of m1, m2, m0 -> ")
    assert second.startswith("4 tensors, 8.39 M parameters; ")
    assert last.startswith(f"done: {out}  ")
    code, raw = in_terminal(command("verify", out, "--sample", 0))
    assert (code, Screen(raw).text) == (0, [f"{out}: 4 tensors, 33.55 MB, all as written"])


def test_an_interrupt_in_a_terminal_leaves_no_garbage(large: Path) -> None:
    before = factory.snapshot(large.parent)
    out = large.parent / "stopped"
    code, raw = in_terminal(command("merge", large, out, "--threads", 1), interrupt_at="4 tensors")
    assert code == 130, raw
    screen = Screen(raw)
    assert not screen.cursor_hidden
    assert [line for line in screen.text if "━" in line or "merging" in line] == []
    assert screen.text[-1] == "interrupted: nothing was left behind"
    assert factory.snapshot(large.parent) == before


def test_an_error_in_a_terminal_leaves_no_garbage(path: Path) -> None:
    recipe(path, linear("m0", "./m11"))
    code, raw = in_terminal(command("merge", path, path.parent / "out"))
    assert code == 3
    screen = Screen(raw)
    assert not screen.cursor_hidden
    assert screen.text[0] == "error: there is no model at './m11'"


def test_a_terminal_without_codes(path: Path) -> None:
    code, raw = in_terminal(command("merge", path, path.parent / "out"), TERM="dumb")
    assert code == 0
    assert "\x1b" not in raw


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("2GiB", 2 << 30),
        ("1.5kb", 1500),
        ("1000000", 10**6),
        ("0.1", 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert show.parse_size(text) == size


def test_a_size_that_mergekit_reads_otherwise() -> None:
    with pytest.raises(RecipeError, match="'7B' may mean bytes or billions"):
        show.parse_size("7B")


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "1e9", "0", "0GB", "5GBB", "inf", "nan", "5i"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        show.parse_size(text)


def test_sizes_for_people() -> None:
    assert [show.size_text(n) for n in (0, 999, 1000, 123_456, 2_200_000_000, 7.5e12)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "123 kB",
        "2.20 GB",
        "7.50 TB",
    ]
    assert [show.count_text(n) for n in (999, 1_370_000, 7_240_000_000)] == ["999", "1.37 M", "7.24 B"]
