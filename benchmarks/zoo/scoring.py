"""What a model can do: bits per byte of texts and answers to problems, by the programs of `examples/`.

Texts are cut into windows of 192 tokens, of which the first WINDOWS count; every third window and every fourth problem
belong to the half on which settings are chosen (`dev`), the others, of the problems every second, to that on which they
are judged (`test`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import evaluate
from tiny_llama import TinyLlama, read_weights
from tokenizers import Tokenizer

WINDOWS = 120
"""Windows of a text at most, dev and test together."""
PROBLEMS = 400
"""Problems of a kind at most, those of the prompt included."""
TEXTS = ("general", "legal", "code")
SUMS = ("math", "minus")
BATCH = 8
"""Windows run at once: their activations fit a cache."""

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Measured:
    """Bits per byte of each window of each text, and whether each problem of each kind was answered."""

    bits: Mapping[str, NDArray[np.float64]]
    right: Mapping[str, NDArray[np.bool_]]

    def as_json(self) -> dict[str, Any]:
        return {
            "bits": {name: [float(one) for one in values] for name, values in self.bits.items()},
            "right": {name: "".join("01"[int(one)] for one in values) for name, values in self.right.items()},
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Measured:
        return cls(
            {name: np.array(values, dtype=np.float64) for name, values in given["bits"].items()},
            {name: np.array([one == "1" for one in text], dtype=bool) for name, text in given["right"].items()},
        )


class Zoo:
    """The models of a folder, and what they are measured on. Raises SystemExit where the base or all skills lack."""

    def __init__(self, folder: Path, *, windows: int = WINDOWS, problems: int = PROBLEMS) -> None:
        if not (folder / "base" / "config.json").exists() or not (folder / "eval").is_dir():
            raise SystemExit(f"error: {folder} holds no zoo: it needs `base` and `eval`, as examples/zoo has them")
        self.folder = folder
        self.model = TinyLlama(folder / "base")
        self.tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
        vocabulary = (folder / "base" / "tokenizer.json").read_bytes()
        self.weights: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name in ("base", *(skill for skill in (*TEXTS, *SUMS) if self._has(skill))):
            if (folder / name / "tokenizer.json").read_bytes() != vocabulary:
                raise SystemExit(f"error: {folder / name} has another tokenizer than the base")
            self.weights[name] = read_weights(folder / name)
        self.windows: dict[str, tuple[NDArray[np.int64], float]] = {}
        for name in TEXTS:
            if (path := folder / "eval" / f"{name}.txt").exists():
                self.windows[name] = self._cut(path.read_text(encoding="utf-8"), windows)
        self.problems: dict[str, list[dict[str, str]]] = {}
        for name in SUMS:
            if (path := folder / "eval" / f"{name}.json").exists():
                given = json.loads(path.read_text(encoding="utf-8"))
                self.problems[name] = (
                    [*given[: problems - evaluate.SHOTS], *given[-evaluate.SHOTS :]] if problems < len(given) else given
                )

    def fingerprint(self) -> str:
        """Digest of all weights and of what is measured; results of another zoo, or of fewer windows, are not these."""
        digest = hashlib.sha256(json.dumps(self.problems).encode())
        for name, tensors in sorted(self.weights.items()):
            digest.update(name.encode())
            for tensor in tensors.values():
                digest.update(np.ascontiguousarray(tensor).data)
        for name, (cut, _) in self.windows.items():
            digest.update(name.encode() + cut.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    def _has(self, skill: str) -> bool:
        held_out = any((self.folder / "eval" / f"{skill}.{kind}").exists() for kind in ("txt", "json"))
        return held_out and (self.folder / skill / "config.json").exists()

    def _cut(self, text: str, most: int) -> tuple[NDArray[np.int64], float]:
        """The windows of tokens, and the tokens per byte of the whole text."""
        tokens = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)
        count = min(most, len(tokens) // evaluate.WINDOW)
        return tokens[: count * evaluate.WINDOW].reshape(count, evaluate.WINDOW), len(tokens) / len(text.encode())

    def measure(self, weights: Weights, tasks: Sequence[str], *, split: str) -> Measured:
        """Run a model on the `dev` or `test` half of the given texts and problems."""
        self.model.load(weights)
        scored = {name: self._bits(name, split) for name in tasks if name in self.windows}
        right = {name: self._right(name, split) for name in tasks if name in self.problems}
        return Measured(scored, right)

    def _bits(self, name: str, split: str) -> NDArray[np.float64]:
        windows, tokens_per_byte = self.windows[name]
        chosen = windows[[i for i in range(len(windows)) if (i % 3 == 0) == (split == "dev")]]
        means = [evaluate.bits(self.model, chosen[i : i + BATCH]).mean(axis=1) for i in range(0, len(chosen), BATCH)]
        return np.round(
            np.concatenate(means) * tokens_per_byte, 5
        )  # as they are kept, so that going on changes nothing

    def _right(self, name: str, split: str) -> NDArray[np.bool_]:
        asked, solved = self.problems[name][: -evaluate.SHOTS], self.problems[name][-evaluate.SHOTS :]
        places = [i for i in range(len(asked)) if (i % 4 == 0 if split == "dev" else i % 2 == 1)]
        return np.array(
            evaluate.answered(self.model, self.tokenizer, [asked[i] for i in places], solved=solved), dtype=bool
        )


def shares(merged: Measured, base: Measured, experts: Mapping[str, Measured]) -> dict[str, float]:
    """What a merge keeps of each skill.

    Of a skill that reads text, the share of the expert's gain over the base, in bits per byte: 0 is the base, 1 the
    expert, less than 0 worse than the base. Of one that solves problems, the share of what the expert solves.
    """
    picks = {task: np.arange(values.size)[None] for task, values in {**merged.bits, **merged.right}.items()}
    return {skill: float(share[0]) for skill, share in resampled(merged, base, experts, picks).items()}


def resampled(
    merged: Measured, base: Measured, experts: Mapping[str, Measured], picks: Mapping[str, NDArray[np.intp]]
) -> dict[str, NDArray[np.float64]]:
    """`shares` for several draws of windows and problems: picks [draws, n] for each task -> [draws] for each skill."""
    found = {}
    for skill, expert in experts.items():
        pick = picks[skill]
        if skill in merged.bits:
            before, best = base.bits[skill][pick].mean(axis=1), expert.bits[skill][pick].mean(axis=1)
            found[skill] = (before - merged.bits[skill][pick].mean(axis=1)) / (before - best)
        else:
            found[skill] = merged.right[skill][pick].mean(axis=1) / expert.right[skill][pick].mean(axis=1)
    return found


def score(merged: Measured, base: Measured, experts: Mapping[str, Measured]) -> float:
    """The mean of the shares: 1 is as good at everything as each expert is at its own."""
    return float(np.mean(list(shares(merged, base, experts).values())))
