"""`smelt COMMAND`: dispatch, and every error in one place.

Exit codes: 0 all is well and verified; 1 a defect of smelt; 2 usage or recipe; 3 bad input; 4 reading, writing or
space; 5 numbers; 128 + the signal's number where one ended it: 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import signal
import sys
from types import FrameType
from typing import Any

from cyclopts import App, CycloptsError

from smelt._version import __version__
from smelt.cli.show import visible
from smelt.errors import ManyProblems, RecipeError, SmeltError, StorageError, nearest
from smelt.storage.signals import deferred

app = App(
    name="smelt",
    version=__version__,
    help="Merge language-model weights: streamed, reproducible, safe.",
    help_epilogue="Start with `smelt methods`, then `smelt plan RECIPE`, then `smelt merge RECIPE OUT`.",
    version_flags=["--version"],
)
app.command("smelt.cli.merge:merge", name="merge", help="Merge models as a recipe says, into a new folder.")
app.command("smelt.cli.sweep:sweep", name="sweep", help="Merge a recipe with many settings at once, and score them.")
app.command("smelt.cli.plan:plan", name="plan", help="Show what a merge would do, without doing it.")
app.command("smelt.cli.check:check", name="check", help="Check a recipe from configs and headers alone.")
app.command(
    "smelt.cli.methods:methods",
    name="methods",
    help="List the merge methods, or explain one.",
    usage="Usage: smelt methods [OPTIONS] [NAME]",
)
app.command("smelt.cli.schema:schema", name="schema", help="Print the JSON schema of the recipe language.")
app.command("smelt.cli.verify:verify", name="verify", help="Check an output against its record.")
app.command(
    "smelt.cli.clean:clean",
    name="clean",
    help="Remove what cut-off merges have left.",
    usage="Usage: smelt clean [OPTIONS] [FOLDER]",
)


_OBJECTS = 50_000
"""New objects before Python looks for garbage: libraries make many more than its 700, and all of them stay."""


class Stopped(BaseException):
    """A signal asked the process to end; unwinds, so that nothing is left behind."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    gc.set_threshold(_OBJECTS)
    stop = _Stop()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    code = run(words)
    if stop.stopping:
        for number in _SIGNALS:  # all is cleaned up: an impatient signal must not change the exit code now
            signal.signal(number, signal.SIG_IGN)
    if arguments is None:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    """End the process at once. All is written and closed; taking compiled code apart would take a fifth of a second."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads any more: the ordinary way knows what to do
        return
    os._exit(code)


def run(words: list[str]) -> int:
    """Run the command line; gives the exit code. Errors are printed as text, or with `--json` as JSON."""
    as_json = "--json" in words
    try:
        _check_command(words)
        if words and words[0] in _commands():
            with deferred():  # large libraries are imported here
                importlib.import_module(f"smelt.cli.{words[0]}")
            app[words[0]].help = None  # on its own page a command has all of its text, in the list one line
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code if isinstance(code, int) and not isinstance(code, bool) else 0
    except SmeltError as error:
        return _report(error, as_json)
    except CycloptsError as error:
        return _report(_usage(error, words), as_json)
    except (KeyboardInterrupt, Stopped) as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        said = "interrupted" if number == signal.SIGINT else "terminated"
        print(f"{said}: {_left(error) or 'nothing was left behind'}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("SMELT_DEBUG"):
            raise
        if _lacks_memory(error):
            fix = "use fewer threads (--threads 1), or raise the limit"
            return _report(StorageError("not enough memory", fix=fix), as_json)
        fix = "please report it, with what SMELT_DEBUG=1 smelt … prints"
        return _report(SmeltError(f"a defect of smelt: {type(error).__name__}: {error}", fix=fix), as_json)


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error goes back to a lack of memory (SystemError: what Python says when it has none to say more)."""
    while error is not None:
        if isinstance(error, MemoryError | SystemError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        error = error.__cause__ or error.__context__
    return False


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Stop:
    """Handles signals: the first one ends the work, the others must not cut short the cleaning up that it began."""

    def __init__(self) -> None:
        self.stopping = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            raise Stopped(number)


def _commands() -> list[str]:
    return [name for name in app if not name.startswith("-")]


def _check_command(words: list[str]) -> None:
    known = _commands()
    if words and not words[0].startswith("-") and words[0] not in known:
        close = nearest(words[0], known)
        fix = f"did you mean `smelt {close}`?" if close else f"commands are {', '.join(known)}"
        raise RecipeError(f"there is no command '{words[0]}'", fix=fix)


def _usage(error: CycloptsError, words: list[str]) -> RecipeError:
    """A mistake on the command line in our words."""
    command = f"{words[0]} " if words and words[0] in _commands() else ""
    return RecipeError(" ".join(str(error).split()), fix=f"see `smelt {command}--help`")


def _report(error: SmeltError, as_json: bool) -> int:
    if as_json:
        print(_json(error))
    else:
        print(visible(error.render()), file=sys.stderr)
        if left := _left(error):
            print(visible(f"note: {left}"), file=sys.stderr)
        if isinstance(error, ManyProblems):
            print(f"{len(error.problems)} problems", file=sys.stderr)
    return error.exit_code


def _left(error: BaseException) -> str:
    """What the error's notes say was kept, if anything."""
    return "; ".join(getattr(error, "__notes__", ()))


def _json(error: SmeltError) -> str:
    import json

    problems: list[dict[str, Any]] = [
        {"kind": type(p).__name__, "message": p.message, "where": list(p.where), "fix": p.fix} for p in error.problems
    ]
    kept = {"kept": left} if (left := _left(error)) else {}
    return json.dumps({"ok": False, "exit_code": error.exit_code, "problems": problems, **kept}, indent=1)
