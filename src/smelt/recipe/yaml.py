"""YAML text -> plain values, each with its line and column; strict, and safe to point at anything.

Several documents are read as one: those with a `name:` stand in the `merges:` of the one that is the output.

ruamel.yaml splits the text into events; the values are built here, from a small part of YAML: mappings with text keys,
sequences, text, numbers, true/false, null. Every limit holds before memory or time is spent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from smelt.errors import RecipeError, SmeltError, raise_all
from smelt.recipe.document import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_NODES,
    Document,
    KeyPath,
    Position,
    holds_unsafe,
    visible,
    where_lines,
)

__all__ = ["Document", "KeyPath", "Position", "read", "read_leniently"]

_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CORE = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NONFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def read(text: str | bytes, *, source: str = "recipe") -> Document:
    """The values of a YAML text. Raises RecipeError (all problems that leave a tree are listed together)."""
    document, problems = read_leniently(text, source=source)
    raise_all(problems)
    return document


def read_leniently(text: str | bytes, *, source: str) -> tuple[Document, list[SmeltError]]:
    """As `read`, with the problems that leave a tree given back, so that others can be listed beside them."""
    decoded = _decode(text, source)
    lines = tuple(re.split(r"\r\n|\n|\r", decoded))
    if bad := _UNPRINTABLE.search(decoded):
        before = re.split(r"\r\n|\n|\r", decoded[: bad.start()])
        raise RecipeError(
            f"the character U+{ord(bad[0]):04X} cannot stand in a recipe",
            where=where_lines(source, lines, Position(len(before), len(before[-1]) + 1)),
            fix="remove it; a recipe is plain text in UTF-8",
        )
    builder = _Builder(source, lines)
    roots = _compose(decoded, builder)
    root = roots[0] if roots else None
    if root is None or (root.kind == "scalar" and root.plain and root.text in _WORDS and _WORDS[root.text] is None):
        raise RecipeError("the recipe is empty", where=[source], fix="start with `merge_method:` and `models:`")
    value = builder.build(root, ()) if len(roots) == 1 else builder.build_together(roots)
    return Document(value, source, builder.positions, builder.values, lines), builder.problems


@dataclass(slots=True)
class _Node:
    kind: Literal["scalar", "sequence", "mapping"]
    place: Position
    text: str = ""
    plain: bool = False
    tag: str | None = None
    children: list[_Node] = field(default_factory=list)


def _decode(text: str | bytes, source: str) -> str:
    try:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        if len(raw) > MAX_BYTES:
            raise RecipeError(
                f"the recipe has {len(raw):,} bytes; at most {MAX_BYTES:,} are read",
                where=[source],
                fix="check that this file is a recipe",
            )
        decoded = text if isinstance(text, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8").split("\n")
        raise RecipeError(
            "the recipe is not UTF-8 text",
            where=[f"{source}:{len(before)}:{len(before[-1]) + 1}"],
            fix="save it as UTF-8",
        ) from None
    return decoded.removeprefix("\ufeff")


def _compose(text: str, builder: _Builder) -> list[_Node]:
    """The tree of nodes of each document; an alias is the node that it names, so a bomb costs nothing here."""
    roots: list[_Node] = []
    stack: list[_Node] = []
    anchors: dict[str, _Node] = {}
    documents = count = 0
    for event in _events(text, builder):
        place = Position(event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents == 2 and _key_of(roots[0], "merge_method") is None:
                builder.second_document(place)
            anchors.clear()
            if event.version not in (None, (1, 2)):
                builder.fail("recipes are YAML 1.2", Position(1, 1), fix="remove the %YAML line")
            continue
        if isinstance(event, CollectionEndEvent):
            closed = stack.pop()
            if (anchor := builder.open_anchors.pop(id(closed), None)) is not None:
                anchors[anchor] = closed
            continue
        if isinstance(event, AliasEvent):
            if event.anchor not in anchors:
                builder.fail(f"the alias *{visible(event.anchor)} names no earlier anchor", place)
            node = anchors[event.anchor]
        elif isinstance(event, ScalarEvent):
            plain = bool(event.implicit[0]) and event.tag is None
            node = _Node("scalar", place, text=event.value, plain=plain, tag=event.tag)
            if event.anchor is not None:
                anchors[event.anchor] = node
        elif isinstance(event, (SequenceStartEvent, MappingStartEvent)):
            kind: Literal["sequence", "mapping"] = "mapping"
            if isinstance(event, SequenceStartEvent):
                kind = "sequence"
            node = _Node(kind, place, tag=event.tag)
            if event.anchor is not None:
                builder.open_anchors[id(node)] = event.anchor
        else:
            continue
        count += 1
        if count > MAX_NODES:
            builder.fail(f"the recipe has more than {MAX_NODES:,} values", place)
        if stack:
            stack[-1].children.append(node)
        else:
            if roots and node.kind != "mapping":
                builder.second_document(node.place)
            roots.append(node)
        if isinstance(event, (SequenceStartEvent, MappingStartEvent)):
            stack.append(node)
            if len(stack) > MAX_DEPTH:
                builder.too_deep(place)
    return roots


def _key_of(node: _Node, key: str) -> _Node | None:
    """The value of a mapping's key, as it stands there."""
    pairs = zip(node.children[::2], node.children[1::2], strict=False) if node.kind == "mapping" else ()
    return next((value for name, value in pairs if name.kind == "scalar" and name.text == key), None)


def _events(text: str, builder: _Builder) -> Iterator[Any]:
    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except SmeltError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
        message, fix = _in_words(str(error.problem), builder.line(place)[place.column - 1 :][:1])
        opened = error.context_mark
        also = []
        if opened is not None and "flow" in str(error.context) + str(error.problem):
            also = [f"opened at {builder.source}:{opened.line + 1}:{opened.column + 1}"]
        builder.fail(message, place, fix=fix, also=also)
    except Exception as error:  # the scanner lets some through as they come: an escape beyond Unicode, say
        raise RecipeError(f"not valid YAML: {visible(str(error))}", where=[builder.source]) from error


def _in_words(problem: str, character: str) -> tuple[str, str | None]:
    if character == "\t":
        return "a tab stands where YAML wants spaces", "replace tabs by spaces"
    for part, message, fix in (
        (
            "mapping values are not allowed",
            "a `:` stands where no key can be",
            "check the indentation here and in the line above; put text that holds `: ` in quotes",
        ),
        ("expected <block end>", "the indentation does not fit the lines above", "line it up with its neighbours"),
        ("expected '<document start>'", "this line does not fit the lines above", "check its indentation and theirs"),
        ("expected ',' or", "a bracket is not closed", "close it, or put a comma between the entries"),
        ("expected the node content", "a value is missing between brackets", "remove the extra comma or bracket"),
        ("could not find expected ':'", "a line is neither `key: value` nor `- entry`", "add the missing `: value`"),
        ("found unexpected end of stream", "a quote is not closed", "close it"),
        (
            "found unknown escape character",
            "a backslash in double quotes begins no known escape",
            "use 'single quotes'",
        ),
        ("that cannot start any token", f"text cannot begin with {character}", "put it in quotes"),
    ):
        if part in problem:
            return message, fix
    return f"not valid YAML: {visible(problem)}", None


class _Builder:
    """Plain values from nodes, with their places and the problems found on the way."""

    def __init__(self, source: str, lines: tuple[str, ...]) -> None:
        self.source = source
        self.lines = lines
        self.positions: dict[KeyPath, Position] = {}
        self.values: dict[KeyPath, Position] = {}
        self.problems: list[SmeltError] = []
        self.open_anchors: dict[int, str] = {}
        self._built = 0

    def line(self, place: Position) -> str:
        return self.lines[place.line - 1] if place.line <= len(self.lines) else ""

    def error(self, message: str, place: Position, *, fix: str | None, also: list[str]) -> RecipeError:
        return RecipeError(message, where=[*where_lines(self.source, self.lines, place), *also], fix=fix)

    def fail(self, message: str, place: Position, *, fix: str | None = None, also: list[str] | None = None) -> NoReturn:
        raise_all([*self.problems, self.error(message, place, fix=fix, also=also or [])])
        raise AssertionError("unreachable")

    def note(self, message: str, place: Position, *, fix: str | None = None, also: list[str] | None = None) -> None:
        self.problems.append(self.error(message, place, fix=fix, also=also or []))

    def too_deep(self, place: Position) -> NoReturn:
        self.fail(f"the recipe is nested more than {MAX_DEPTH} levels deep", place)

    def second_document(self, place: Position) -> NoReturn:
        self.fail(
            "a second document begins here",
            place,
            fix="keep one recipe per file; of a model card, its YAML block alone",
        )

    def build_together(self, roots: list[_Node]) -> Any:
        """Several documents as one tree: those with a name under `merges`, in the one without, or else the last."""
        unnamed = [root for root in roots if _key_of(root, "name") is None]
        if len(unnamed) > 1:
            fix = "name all but the output: `name: NAME`, by which other documents use it as a model"
            self.fail("two documents have no `name:`, and only one can be the output", unnamed[1].place, fix=fix)
        output = unnamed[0] if unnamed else roots[-1]
        tree = self.build(output, ())
        steps: dict[str, Any] = {}
        for root in roots:
            if (inner := _key_of(root, "merges")) is not None:
                self.fail("`merges:` stands beside further documents", inner.place, fix="use one of the two")
            name = _key_of(root, "name")
            if root is output or name is None:
                continue
            text = self._scalar(name) if name.kind == "scalar" else None
            if not isinstance(text, str) or not text:
                self.fail("the name of a document must be text", name.place, fix="write `name: NAME`")
            if text in steps:
                first = self.positions[("merges", text)]
                also = [f"first at {self.source}:{first.line}:{first.column}"]
                self.fail(f"two documents are called `{visible(text)}`", name.place, fix="rename one", also=also)
            self.positions.setdefault(("merges",), name.place)
            self.positions[("merges", text)] = name.place
            steps[text] = self.build(root, ("merges", text))
            steps[text].pop("name", None)
        return tree | {"merges": steps}

    def build(self, node: _Node, path: KeyPath) -> Any:
        self._count(node)
        if len(path) > MAX_DEPTH:
            self.too_deep(node.place)
        self.values[path] = node.place
        self.positions.setdefault(path, node.place)
        if node.kind == "scalar":
            return self._scalar(node)
        self._check_tag(node, "seq" if node.kind == "sequence" else "map")
        if node.kind == "sequence":
            return [self.build(child, (*path, index)) for index, child in enumerate(node.children)]
        return self._mapping(node, path)

    def _mapping(self, node: _Node, path: KeyPath) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key_node, value_node, merged in self._pairs(node, 0):
            key = self._key(key_node)
            if key is None or (merged and key in entries):
                continue
            if key in entries:
                first = self.positions[(*path, key)]
                self.note(
                    f"the key `{visible(key)}` is given twice",
                    key_node.place,
                    fix="keep one of the two",
                    also=[f"first at {self.source}:{first.line}:{first.column}"],
                )
                continue
            self.positions[(*path, key)] = key_node.place
            if value_node.plain and not value_node.text:
                value_node.place = key_node.place  # an empty value: YAML puts it at whatever comes next
            entries[key] = self.build(value_node, (*path, key))
        return entries

    def _pairs(self, node: _Node, depth: int) -> Iterator[tuple[_Node, _Node, bool]]:
        """A mapping's keys and values; after its own, as PyYAML has it, those that `<<` takes from other mappings."""
        if depth > MAX_DEPTH:
            self.too_deep(node.place)
        others: list[_Node] = []
        for key, value in zip(node.children[::2], node.children[1::2], strict=True):
            if key.plain and key.text == "<<":
                if value.kind == "sequence":
                    self._check_tag(value, "seq")
                others += value.children if value.kind == "sequence" else [value]
            else:
                if depth:
                    self._count(key)
                yield key, value, depth > 0
        for other in others:
            if other.kind != "mapping":
                self.note("`<<` takes a mapping, or a list of them", other.place, fix="write `<<: *ANCHOR`")
                continue
            self._check_tag(other, "map")
            self._count(other)
            yield from self._pairs(other, depth + 1)

    def _count(self, node: _Node) -> None:
        self._built += 1
        if self._built > MAX_NODES:
            self.fail(
                f"the recipe has more than {MAX_NODES:,} values once its aliases are expanded",
                node.place,
                fix="write out what the aliases stand for",
            )

    def _key(self, node: _Node) -> str | None:
        if node.kind != "scalar":
            self.note("a key must be text", node.place)
            return None
        key = self._scalar(node)
        if not isinstance(key, str):
            shown = visible(node.text) or "(empty)"
            self.note(f"the key {shown} is not text", node.place, fix=f'put it in quotes: "{visible(node.text)}"')
            return None
        return key

    def _scalar(self, node: _Node) -> str | int | float | bool | None:
        if holds_unsafe(node.text):
            self.note("text must not hold NUL or half characters", node.place, fix="remove the escape")
            return ""
        if node.tag in (None, "!") and not node.plain:
            return node.text
        if node.plain:
            return self._resolve(node)
        kind = (node.tag or "").removeprefix(_CORE)
        if kind not in ("str", "int", "float", "bool", "null"):
            self._check_tag(node, "")
            return node.text
        value = node.text if kind == "str" else self._resolve(node)
        if not isinstance(value, _TYPES[kind]) or (kind in ("int", "float") and isinstance(value, bool)):
            self.note(f"{visible(node.text)} is not what its tag !!{kind} says", node.place, fix="remove the tag")
        return value

    def _resolve(self, node: _Node) -> str | int | float | bool | None:
        """The value of plain text, by YAML 1.2's core rules; `1e-5` is a number, `yes` is text."""
        text = node.text
        if text in _WORDS:
            return _WORDS[text]
        number: int | float
        if _INTEGER.fullmatch(text):
            # digits first: Python refuses, and takes long, to read thousands of them
            number = int(text, 0 if text[:2] in ("0o", "0x") else 10) if len(text) < 80 else MAX_INTEGER + 1
            if abs(number) > MAX_INTEGER:
                self.note("the number is too large", node.place)
                return 0
            return number
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                self.note("the number is too large", node.place)
                return 0
            return number
        if _NONFINITE.fullmatch(text):
            self.note(f"{text} is not a number that a recipe can hold", node.place, fix="give a finite number")
            return 0
        return text

    def _check_tag(self, node: _Node, kind: str) -> None:
        if node.tag in (None, "!", _CORE + kind):
            return
        shown = node.tag.replace(_CORE, "!!")
        self.note(
            f"the tag {visible(shown)} is not allowed", node.place, fix="remove the tag; recipes hold plain values"
        )


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "null": type(None),
}
