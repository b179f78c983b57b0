"""Two measurements of a tiny model on data it never saw: how well it reads law, and whether it can still add.

    python examples/evaluate.py examples/zoo/legal      # one line per folder given

- bits per byte (lower is better): mean bits per token over the first 40 windows of 192 tokens of `legal.txt`
  (the first token of each window is given, the other 191 are predicted), times the tokens per byte of the whole
  text. The factor is the text's, not the windows': these begin with lists of file names, whose tokens are short.
- exact match (higher is better): the share of the first 100 problems of `math.json` answered exactly. The prompt
  is the last two problems, solved, then the question; the answer is what the model writes, greedily, until the
  end of the line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_llama import Array, TinyLlama
from tokenizers import Tokenizer

EVAL = Path(__file__).parent / "zoo" / "eval"
WINDOWS, WINDOW = 40, 192  # windows of tokens scored
PROBLEMS = 100  # problems asked
SHOTS = 2  # solved problems in the prompt
LONGEST_ANSWER = 20  # tokens


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model reaches: law in bits per byte (lower is better), addition as a share solved (higher is better)."""

    law: float
    addition: float


def evaluate(folder: str | Path, *, data: Path = EVAL) -> Scores:
    """Both measurements for a checkpoint folder with its own tokenizer.json."""
    model = TinyLlama(folder)
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = (data / "legal.txt").read_text(encoding="utf-8")
    problems = json.loads((data / "math.json").read_text(encoding="utf-8"))
    return Scores(law=bits_per_byte(model, tokenizer, text), addition=exact_match(model, tokenizer, problems))


def bits_per_byte(model: TinyLlama, tokenizer: Tokenizer, text: str, *, windows: int = WINDOWS) -> float:
    """Mean -log2 p(token | tokens before it) in the first windows, times the tokens per byte of the whole text."""
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    count = min(windows, len(tokens) // WINDOW)
    cut = tokens[: count * WINDOW].reshape(count, WINDOW)
    scored = np.concatenate([bits(model, cut[i : i + 8]) for i in range(0, count, 8)])  # 8 at once fit a cache
    return float(scored.mean() * len(tokens) / len(text.encode()))


def bits(model: TinyLlama, windows: Array) -> Array:
    """-log2 p of each token but the first of each window: [n, t] -> [n, t - 1] float64."""
    logits = model.logits(windows)[:, :-1]
    chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    highest = logits.max(-1)
    total = np.exp(logits - highest[..., None]).sum(-1, dtype=np.float64)
    surprise: Array = (np.log(total) + highest - chosen) / np.log(2)
    return surprise


def exact_match(model: TinyLlama, tokenizer: Tokenizer, problems: list[dict[str, str]]) -> float:
    """Share of the first problems answered exactly, after a prompt of the last ones, solved."""
    correct = answered(model, tokenizer, problems[:PROBLEMS], solved=problems[-SHOTS:])
    return sum(correct) / len(correct)


def answered(
    model: TinyLlama, tokenizer: Tokenizer, asked: list[dict[str, str]], *, solved: list[dict[str, str]]
) -> list[bool]:
    """Whether each problem is answered exactly, after a prompt of the `solved` ones."""
    before = "".join(f"{problem['prompt']} {problem['answer']}\n" for problem in solved)
    prompts = [tokenizer.encode(before + p["prompt"], add_special_tokens=False).ids for p in asked]
    line_end = {i for piece, i in tokenizer.get_vocab().items() if "Ċ" in piece}  # a newline in byte-level BPE
    answers = model.greedy(prompts, stop=line_end, most=LONGEST_ANSWER)
    return [tokenizer.decode(a).strip() == p["answer"] for a, p in zip(answers, asked, strict=True)]


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        scores = evaluate(name)
        print(f"{name}: law {scores.law:.3f} bits per byte, addition {scores.addition:.2f} exact")
