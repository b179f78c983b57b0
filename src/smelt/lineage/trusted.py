"""What the record beside a model says of tensors that are copied from it, for those who trust such records.

A record is used only if it fits the weights as far as can be seen without reading them: every weight file has the size
and the header that it names, and of every weight file one small matrix, which is read, has its digest. What is
taken on trust is that the other tensors have theirs, and as many NaNs and infinities as it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.errors import InputError
from smelt.lineage.record import DIGEST, FORMAT, RECORD
from smelt.lineage.verify import read_record, tensor_digest
from smelt.planning.entries import Action, Plan
from smelt.specs import TensorSpec
from smelt.storage.checkpoint import Checkpoint, TensorSource

_HEX = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a record says of a stored tensor: its digest, and how many of its numbers are NaN or infinite."""

    digest: str
    nonfinite: int


def trusted(plan: Plan, sources: Sequence[TensorSource]) -> tuple[dict[str, Claim], list[str]]:
    """The claims for those tensors of the output that are copied from models with a record, by name; and warnings.

    A record that does not fit its model is not used, which is one of the warnings, and that nothing is trusted another.
    """
    copied = [entry for entry in plan.entries if entry.action is not Action.MERGE and entry.nbytes]
    claims: dict[int, dict[str, Claim]] = {}
    warnings = []
    for model in dict.fromkeys(entry.inputs[0].model for entry in copied):
        source = sources[model]
        if not isinstance(source, Checkpoint):
            continue
        try:
            claims[model] = _claims(source)
        except InputError as error:
            reason = "; ".join([error.message, *error.where])
            warnings.append(
                f"{RECORD} of {plan.models[model].published} is not trusted, its tensors are read: {reason}"
            )
    found = {
        entry.name: claims[entry.inputs[0].model][entry.inputs[0].tensor.name]
        for entry in copied
        if claims.get(entry.inputs[0].model)
    }
    if not found and not warnings:
        why = f"no model that they come from has a {RECORD}" if copied else "no tensor is copied as it is"
        warnings.append(f"--trust-digests has no effect: {why}")
    return found, warnings


def check_record(source: Checkpoint, folder: Path) -> None:
    """Raise InputError unless the model has a sound record, which fits as far as is seen without reading all.

    Of every weight file, size and header are compared, and the digest of one small tensor.
    """
    read_record(source, folder)
    _claims(source)


def _claims(source: Checkpoint) -> dict[str, Claim]:
    """What the model's record says of its tensors; nothing without a record. InputError where it does not fit."""
    tree = source.json(RECORD)
    if tree is None:
        return {}
    rows, listed = tree.get("tensors"), tree.get("files")
    known = (tree.get("format"), tree.get("digest")) == (FORMAT, DIGEST)
    if not known or not isinstance(rows, dict) or not isinstance(listed, dict):
        raise InputError("it is not a record that this version reads")
    for info in source.files:
        row = listed.get(info.name)
        if not isinstance(row, dict) or (row.get("size"), row.get("header")) != (info.size, info.header_digest):
            raise InputError(f"{info.name} has another size or header than it names")
    claims = {}
    for name, spec in source.tensors.items():
        claim = _claim(rows.get(name), spec)
        if claim is None:
            raise InputError(f"it is damaged at tensor '{name}'")
        claims[name] = claim
    for spec in _samples(source):
        if tensor_digest(source, spec.name) != claims[spec.name].digest:
            raise InputError(f"tensor '{spec.name}' has another digest than it names")
    return claims


def _claim(row: Any, spec: TensorSpec) -> Claim | None:
    digest, count = (row.get("digest"), row.get("nonfinite")) if isinstance(row, dict) else (None, None)
    if not isinstance(digest, str) or not _HEX.fullmatch(digest) or type(count) is not int:
        return None
    most = spec.size if spec.dtype.floating else 0
    return Claim(digest, count) if 0 <= count <= most else None


def _samples(source: Checkpoint) -> list[TensorSpec]:
    """Of each weight file the smallest matrix, or the smallest tensor: norms are often alike in different models."""
    smallest: dict[str, TensorSpec] = {}
    for spec in source.tensors.values():
        held = smallest.get(spec.file)
        if held is None or (len(spec.shape) < 2, spec.nbytes) < (len(held.shape) < 2, held.nbytes):
            smallest[spec.file] = spec
    return list(smallest.values())
