"""A recipe written back in one fixed form, and its digest: the identity of a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from smelt.dtypes import OUTPUT_NAMES
from smelt.recipe.references import ModelName
from smelt.recipe.schema import Body, Module, Recipe, Slice, Source, Step, Tokenizer, TokenRule, TokenSource
from smelt.recipe.settings import Conditional, Gradient, Plain, Scalar, Setting

_BARE = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_./@+\-]*")
_SPECIAL = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf", "infinity"))
"""Words that one or the other YAML reads as something else than text."""
_ESCAPED = re.compile("[\x7f-\xa0\xad\u2028\u2029\ufeff\ufffe\uffff]")


def canonical(recipe: Recipe, *, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The recipe as plain values: MergeKit's keys in a fixed order, no defaults, every setting in its plain type.

    `rename` maps model names (as `str(name)` gives them) and paths of method files to what to write in their place.
    """
    return _Writer(rename or {}).recipe(recipe)


def digest(recipe: Recipe, *, rename: Mapping[str, str] | None = None) -> str:
    """sha256 (hex) of the canonical form; the same for any formatting and any order of keys, not of models."""
    text = json.dumps(canonical(recipe, rename=rename), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that every parser of 1.1 and 1.2 reads alike; numbers and text in lists stand in a line.

    >>> print(to_yaml({"merge_method": "slerp", "parameters": {"t": [0, 0.5]}}), end="")
    merge_method: slerp
    parameters:
      t: [0, 0.5]
    """
    return "".join(f"{line}\n" for line in _lines(tree)) or "{}\n"


class _Writer:
    """The parts of a recipe as plain values."""

    def __init__(self, rename: Mapping[str, str]) -> None:
        self.rename = rename

    def recipe(self, recipe: Recipe) -> dict[str, Any]:
        body = self._body(recipe)
        allow = body.pop("allow", None)
        return _given(
            name=recipe.name,
            merges={name: self._step(step) for name, step in (recipe.merges or {}).items()},
            **body,
            methods=[self.rename.get(path, path) for path in recipe.methods],
            allow=allow,
        )

    def _step(self, step: Step) -> dict[str, Any]:
        return self._body(step) | _given(keep=step.keep or None)

    def _body(self, body: Body) -> dict[str, Any]:
        modules = sorted((body.modules or {}).items())
        return _given(
            merge_method=body.merge_method,
            base_model=self._name(body.base_model),
            models=[self._source(source) for source in body.models or ()],
            slices=[self._slice(part) for part in body.slices or ()],
            modules={name: self._module(module) for name, module in modules},
            parameters=_parameters(body.parameters),
            lines=None if body.lines is None else {"alpha": _plain(body.lines.alpha), "beta": _plain(body.lines.beta)},
            dtype=_dtype(body.dtype),
            out_dtype=_dtype(body.out_dtype),
            tokenizer_source=self._vocabulary(body.tokenizer_source),
            tokenizer=None if body.tokenizer is None else self._tokenizer(body.tokenizer),
            chat_template=body.chat_template,
            allow=sorted(set(body.allow)),
            missing=None if body.missing == "error" else body.missing,
        )

    def _source(self, source: Source) -> dict[str, Any]:
        return _given(
            model=self._name(source.model),
            layer_range=list(source.layer_range or ()),
            parameters=_parameters(source.parameters),
        )

    def _slice(self, part: Slice) -> dict[str, Any]:
        return _given(
            sources=[self._source(source) for source in part.sources],
            base_model=self._name(part.base_model),
            parameters=_parameters(part.parameters),
        )

    def _module(self, module: Module) -> dict[str, Any]:
        return _given(
            models=[self._source(source) for source in module.models or ()],
            slices=[self._slice(part) for part in module.slices or ()],
            parameters=_parameters(module.parameters),
        )

    def _tokenizer(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return _given(
            source=self._vocabulary(tokenizer.source),
            tokens={token: self._rule(rule) for token, rule in sorted(tokenizer.tokens.items())},
            pad_to_multiple_of=tokenizer.pad_to_multiple_of,
        )

    def _rule(self, rule: TokenRule) -> dict[str, Any]:
        source = rule.source
        if isinstance(source, TokenSource):
            written: Any = _given(
                kind=source.kind, model=self._name(source.model), token_id=source.token_id, token=source.token
            )
        else:
            written = self._name(source)
        return _given(source=written, force=rule.force or None)

    def _vocabulary(self, source: ModelName | str | None) -> Any:
        if source is None or isinstance(source, str):
            return source
        written = self._name(source)
        # a model of that name, told from the word; and early MergeKit's `model:` prefix, which parsing takes off
        if isinstance(written, str) and (written in ("union", "base") or written.startswith("model:")):
            return {"model": written}
        return written

    def _name(self, name: ModelName | None) -> Any:
        if name is None:
            return None
        if name.text in self.rename:
            return self.rename[name.text]
        if name.lora is None and name.override_architecture is None and (name.path is None or name.is_one_line):
            return name.text
        model: Any = name.text.removesuffix(f"+{name.lora}")
        if name.path is not None:
            model = _given(path=name.path, revision=name.revision)
        return _given(model=model, lora=name.lora, override_architecture=name.override_architecture)


def _given(**entries: Any) -> dict[str, Any]:
    """The entries that say something."""
    return {key: value for key, value in entries.items() if value is not None and value not in ([], {})}


def _dtype(name: str | None) -> str | None:
    return None if name is None else OUTPUT_NAMES[name].name


def _parameters(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: _setting(setting) for name, setting in sorted(parameters.items())}


def _setting(setting: Setting) -> Any:
    if isinstance(setting, Scalar):
        return _plain(setting.value)
    if isinstance(setting, Gradient):
        return [_plain(value) for value in setting.values]
    assert isinstance(setting, Conditional)
    return [_given(filter=case.filter, match=case.match) | {"value": _setting(case.value)} for case in setting.cases]


def _plain(value: Plain) -> Plain:
    """One form for equal numbers: 1.0 and 1 are 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


# --- YAML -----------------------------------------------------------------------------------------------------------


def _lines(tree: Any) -> list[str]:
    """A mapping, or a list that does not fit a line, as block lines."""
    lines = []
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if _is_flow(value):
                lines.append(f"{_text(str(key))}: {_flow(value)}")
            else:
                lines.append(f"{_text(str(key))}:")
                lines.extend(f"  {line}" for line in _lines(value))
        return lines
    for value in tree:
        if _is_flow(value):
            lines.append(f"- {_flow(value)}")
        else:
            first, *rest = _lines(value)
            lines.extend([f"- {first}", *(f"  {line}" for line in rest)])
    return lines


def _is_flow(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    return not isinstance(value, (list, tuple)) or not any(isinstance(e, (Mapping, list, tuple)) for e in value)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_flow(entry) for entry in value)}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes 1e-05 for text: a number needs its point there
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    return str(value) if isinstance(value, int) else _text(str(value))


def _text(text: str) -> str:
    if _BARE.fullmatch(text) and text.lower() not in _SPECIAL:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
