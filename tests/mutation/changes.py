"""Places where one small change of the source text gives another program: the mutants of a file.

A change replaces a stretch of bytes; line numbers stay. Left out are annotations, docstrings, `if TYPE_CHECKING`, what
is inside `raise`, log calls and f-strings (texts for people), options of dataclass and cache decorators, and
`zip(strict=)`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_compat.numpy

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
FUNCTIONS = {
    one: other
    for pair in (
        ("min", "max"),
        ("minimum", "maximum"),
        ("argmin", "argmax"),
        ("any", "all"),
        ("floor", "ceil"),
        ("zeros_like", "ones_like"),
    )
    for one, other in (pair, pair[::-1])
}
NUMERIC = {"Array", "float", "int", "Any"}
"""Annotations of functions whose result can be negated."""
ANNOTATION_WORDS = {"Literal", "Callable", "ClassVar", "Final", "Iterator", "list", "dict", "tuple", "type", "set"}
OPTION_DECORATORS = {"dataclass", "cache", "lru_cache"}


@dataclass(frozen=True, slots=True)
class Change:
    """One mutant: bytes `start` to `stop` of `file` become `new`.

    `first` and `last` are the lines of the statement it lies in; `scope` holds the lines of the functions and classes
    around it, from the nearest to the widest.
    """

    file: str
    line: int
    start: int
    stop: int
    new: str
    kind: str
    shown: tuple[str, str]
    """The text before and after, with the expression around it where that helps."""
    first: int
    last: int
    scope: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    """Constants that the statement defines for the whole module, or methods that the class around it registers."""

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.stop :]

    def told(self) -> str:
        """`a < b` → `a <= b`, without line breaks."""
        old, new = (" ".join(text.split()) for text in self.shown)
        return f"`{old}` → `{new}`" if new else f"`{old}` dropped"


def changes_of(path: Path, *, root: Path, module: str) -> list[Change]:
    """Every change of the file, in the order of the text; the module is imported to know what its calls accept."""
    source = path.read_bytes()
    finder = _Finder(source, path.relative_to(root).as_posix(), vars(importlib.import_module(module)))
    finder.visit(finder.tree)
    before = ast.dump(finder.tree)
    found: dict[tuple[int, int, str], Change] = {}
    for change in finder.found:
        try:
            after = ast.dump(ast.parse(change.applied(source)))
        except SyntaxError:
            continue
        if after != before:
            found.setdefault((change.start, change.stop, change.new), change)
    return sorted(found.values(), key=lambda change: (change.start, change.stop, change.new))


class _Finder(ast.NodeVisitor):
    """Walks a module and notes changes."""

    def __init__(self, source: bytes, file: str, namespace: dict[str, Any]) -> None:
        self.source = source
        self.file = file
        self.namespace = {**namespace, "xp": array_api_compat.numpy}
        self.tree = ast.parse(source)
        self.found: list[Change] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._lines = (1, 1)
        self._around: list[ast.FunctionDef | ast.ClassDef] = []
        self._constants: tuple[str, ...] = ()

    # Where things stand

    def _span(self, node: Any) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: Any) -> str:
        start, stop = self._span(node)
        return self.source[start:stop].decode()

    def _note(self, kind: str, start: int, stop: int, new: str, *, shown: Any = None) -> None:
        """A change; `shown`: what to show of the text, if more than what is replaced."""
        old = self.source[start:stop].decode()
        missing = old.count("\n") - new.count("\n")
        if missing > 0:
            new += "\n" * missing
        line = self.source.count(b"\n", 0, start) + 1
        low, high = (start, stop) if shown is None else self._span(shown)
        both = self.source[low:high].decode(), (self.source[low:start] + new.encode() + self.source[stop:high]).decode()
        scope = tuple(tuple(range(node.lineno, (node.end_lineno or 0) + 1)) for node in reversed(self._around))
        names = self._constants or tuple(registered(self._around[0]) if self._around else ())
        self.found.append(Change(self.file, line, start, stop, new, kind, both, *self._lines, scope, names))

    def _between(self, kind: str, left: Any, right: Any, old: str, new: str, shown: Any) -> None:
        """Exchange the operator that stands between two operands."""
        low, high = self._span(left)[1], self._span(right)[0]
        pattern = re.escape(old).replace(r"\ ", r"\s+")
        match = re.search(rf"\b{pattern}\b" if old[0].isalpha() else pattern, self.source[low:high].decode())
        if match is not None:
            self._note(kind, low + match.start(), low + match.end(), new, shown=shown)

    # Statements

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)) or _is_text(node):
            return
        kept, self._lines = self._lines, self._header(node)
        super().visit(node)
        self._lines = kept

    @staticmethod
    def _header(node: ast.stmt) -> tuple[int, int]:
        """The lines of a statement without the statements in it."""
        body = getattr(node, "body", None)
        last = (node.end_lineno or node.lineno) if not body else max(node.lineno, body[0].lineno - 1)
        return node.lineno, last

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        kept = self._lines
        for decorator in node.decorator_list:
            if _called(decorator) not in OPTION_DECORATORS:
                self._lines = (decorator.lineno, decorator.end_lineno or decorator.lineno)
                self._around.append(node)
                self.visit(decorator)
                self._around.pop()
        self._lines = kept
        self._around.append(node)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._around.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._around.append(node)
        for statement in node.body:
            self.visit(statement)
        self._around.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        names = tuple(target.id for target in node.targets if isinstance(target, ast.Name))
        if "__all__" in names or _is_annotation(node.value):
            return
        self._constants = () if self._around else names
        for target in node.targets:
            self.visit(target)
        self.visit(node.value)
        self._constants = ()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._constants = (node.target.id,) if isinstance(node.target, ast.Name) and not self._around else ()
            self.visit(node.value)
            self._constants = ()

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if pair := ARITHMETIC.get(type(node.op)):
            self._between("arithmetic", node.target, node.value, pair[0] + "=", pair[1] + "=", node)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None):
            return
        start, stop = self._span(node)
        start += len("return ")
        text = self.source[start:stop].decode()
        self._note("return", start, stop, _padded("None", text))
        function = next((one for one in reversed(self._around) if isinstance(one, ast.FunctionDef)), None)
        returns = ast.unparse(function.returns) if function is not None and function.returns else ""
        if returns == "bool":
            self._note("return", start, stop, f"not ({text})")
        elif returns.split(" |")[0] in NUMERIC:
            self._note("return", start, stop, f"-({text})")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self._force(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._force(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._force(test)
        self.generic_visit(node)

    def _force(self, test: ast.expr) -> None:
        start, stop = self._span(test)
        for forced in ("True", "False"):
            self._note("condition", start, stop, _padded(forced, self._text(test)))

    def visit_Break(self, node: ast.Break) -> None:
        self._note("jump", *self._span(node), "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._note("jump", *self._span(node), "break")

    # Expressions

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        return

    def visit_Constant(self, node: ast.Constant) -> None:
        value, (start, stop) = node.value, self._span(node)
        if isinstance(value, bool):
            self._note("boolean", start, stop, str(not value))
        elif isinstance(value, (int, float)):
            for new in _other_numbers(value):
                self._note("number", start, stop, repr(new))

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            self._between("comparison", left, right, *COMPARISONS[type(operator)], node)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        pair = ARITHMETIC.get(type(node.op))
        texts = any(
            isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (node.left, node.right)
        )
        if pair and not texts:
            self._between("arithmetic", node.left, node.right, *pair, node)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between("and/or", left, right, *words, node)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, _ = self._span(node)
        token = {ast.Not: "not ", ast.USub: "-", ast.Invert: "~"}.get(type(node.op))
        if token:
            kind = "not" if isinstance(node.op, ast.Not) else "arithmetic"
            self._note(kind, start, start + len(token), "", shown=node)
        if isinstance(node.operand, ast.Constant) and node.operand.value == 1:
            self._note("number", *self._span(node.operand), "0", shown=node)  # -2 as a length is read as -1 is
        else:
            self.visit(node.operand)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _is_annotation(node):
            return
        index = node.slice
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        for part in parts:
            self._other_place(part, node)
        if isinstance(index, ast.Tuple) and len(parts) == 2 and any(_is_none(part) for part in parts):
            start, stop = self._span(parts[0])[0], self._span(parts[1])[1]
            self._note("index", start, stop, f"{self._text(parts[1])}, {self._text(parts[0])}", shown=node)
        self.generic_visit(node)

    def _other_place(self, part: ast.expr, shown: ast.Subscript) -> None:
        start, stop = self._span(part)
        if isinstance(part, ast.Name) and part.id in ("i", "j", "index", "row", "place"):
            self._note("index", start, stop, f"{part.id} - 1", shown=shown)
        elif isinstance(part, ast.Constant) and type(part.value) is int:
            self._note("index", start, stop, str(part.value + 1), shown=shown)
        elif isinstance(part, ast.Slice):
            for bound in (part.lower, part.upper, part.step):
                if bound is not None:
                    self._note("index", *self._span(bound), "", shown=shown)

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if name in ("TypeVar", "cast") or ast.unparse(node.func).startswith(("log.", "logger.", "logging.")):
            return
        if name in FUNCTIONS:
            stop = self._span(node.func)[1]
            self._note("function", stop - len(name), stop, FUNCTIONS[name], shown=node)
        if name == "where" and len(node.args) == 3:
            one, other = self._span(node.args[1]), self._span(node.args[2])
            between = self.source[one[1] : other[0]].decode()
            self._note(
                "where", one[0], other[1], f"{self._text(node.args[2])}{between}{self._text(node.args[1])}", shown=node
            )
        self._fewer_arguments(node, name)
        for child in (node.func, *node.args, *node.keywords):
            if not (isinstance(child, ast.keyword) and child.arg == "strict"):
                self.visit(child)

    def _fewer_arguments(self, node: ast.Call, name: str) -> None:
        given: list[ast.expr | ast.keyword] = sorted([*node.args, *node.keywords], key=lambda one: self._span(one)[0])
        for place, dropped in enumerate(given):
            rest = [one for one in given if one is not dropped]
            if name == "range":
                legal = len(given) == 2 and place == 0
            else:
                legal = name not in ("where", "zip", "array_namespace") and self._accepts(node.func, rest)
            if not legal:
                continue
            start, stop = self._span(dropped)
            if place == 0 and rest:
                stop = self._span(given[1])[0]
            elif place:
                start = self._span(given[place - 1])[1]
            self._note("argument", start, stop, "", shown=node)

    def _accepts(self, function: ast.expr, given: list[ast.expr | ast.keyword]) -> bool:
        """Whether the function that is called is known, and can be called with these arguments."""
        try:
            target: Any = self.namespace
            parts = ast.unparse(function).split(".")
            if parts[0] in ("self", "cls"):
                owner = next(one for one in self._around if isinstance(one, ast.ClassDef))
                member = inspect.getattr_static(self.namespace[owner.name], ".".join(parts[1:]))
                bound = not isinstance(member, staticmethod)
                signature = inspect.signature(getattr(member, "__func__", member))
            else:
                target, bound = self.namespace[parts[0]], False
                for part in parts[1:]:
                    target = getattr(target, part)
                signature = inspect.signature(target)
            keywords = {one.arg: None for one in given if isinstance(one, ast.keyword)}
            positional = [one for one in given if not isinstance(one, ast.keyword)]
            if None in keywords or any(isinstance(one, ast.Starred) for one in positional):
                return False
            signature.bind(*[None] * (len(positional) + bound), **keywords)
        except (KeyError, AttributeError, TypeError, ValueError, StopIteration):
            return False
        return True


def _other_numbers(value: float) -> Iterator[float]:
    if value == 0:
        yield type(value)(1)
    elif value == 1:
        yield type(value)(0)
        yield type(value)(2)
    elif isinstance(value, float) and 0.0 < value < 1e-3:
        yield 1e-3
    else:
        yield type(value)(value * 1.5)


def _padded(new: str, old: str) -> str:
    """`new`, with the line breaks of `old` inside brackets."""
    breaks = "\n" * old.count("\n")
    return f"({new}{breaks})" if breaks else new


def _called(node: ast.expr) -> str:
    function = node.func if isinstance(node, ast.Call) else node
    return getattr(function, "attr", None) or getattr(function, "id", "")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_annotation(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and _called(node.value) in ANNOTATION_WORDS


def registered(node: ast.AST) -> Iterator[str]:
    """The names under which a class registers itself as a method."""
    for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
        if isinstance(decorator, ast.Call) and _called(decorator) == "register":
            yield ast.literal_eval(decorator.args[0])
