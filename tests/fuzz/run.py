"""Coverage-guided fuzzing of one reader, by atheris (libFuzzer): `make fuzz`.

    python tests/fuzz/run.py header --runs 1000000
    python tests/fuzz/run.py index --runs 1000000

Ends with 0 when no law of `laws.py` was broken. An input that breaks one is written to crash-* in the corpus folder and
printed; add it to `tests/fuzz/test_laws.py` when it is mended. Needs atheris, which has no place in the test
environment: `make fuzz` keeps it in one of its own.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import time
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["smelt.storage"]):
    from fuzz import laws

from fuzz import grammar, seeds

counts = {"inputs": 0, "accepted": 0}


def header_input(data: bytes) -> None:
    """The first byte says what the others are: below 64 a header, and it counts the bytes behind it; then a whole file,
    and from 128 on choices of the grammar."""
    counts["inputs"] += 1
    first = data[0] if data else 0
    if first >= 128:
        counts["accepted"] += laws.header_law(*grammar.header(data[1:]))
    else:
        counts["accepted"] += laws.header_law(data[1:], first) if first < 64 else laws.file_law(data[1:])


def index_input(data: bytes) -> None:
    """A first byte from 128 on: the others are choices of the grammar."""
    counts["inputs"] += 1
    chosen = data and data[0] >= 128 and not data.startswith(b"\xef\xbb\xbf")
    counts["accepted"] += laws.index_law(grammar.index(data[1:]) if chosen else data)


TARGETS = {
    "header": (
        header_input,
        [
            *(bytes([size]) + text for text, size in seeds.HEADERS),
            *(b"\x40" + struct.pack("<Q", len(text)) + text + bytes(size) for text, size in seeds.HEADERS),
            *(b"\x80" + bytes([0, count]) + bytes(range(80)) for count in range(6)),
        ],
    ),
    "index": (index_input, [*seeds.INDEXES, b"\x80", b"\x80" + bytes(range(60))]),
}


def main() -> None:
    """Fill the corpus with the seeds, and let libFuzzer run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what was found; default: a new one")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    run_input, first = TARGETS[given.target]
    corpus = given.corpus or Path(tempfile.mkdtemp(prefix=f"smelt-fuzz-{given.target}-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(first):
        (corpus / f"seed-{number}").write_bytes(data)
    words = corpus.with_name(corpus.name + ".words")
    escaped = ["".join(f"\\x{byte:02x}" for byte in word) for word in seeds.WORDS]
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = [f"-runs={given.runs}", f"-seed={given.seed}", f"-dict={words}", "-max_len=600", "-timeout=10"]
    options += [f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    started = time.monotonic()

    def counted(data: bytes) -> None:
        run_input(data)
        if counts["inputs"] == given.runs:
            rate = counts["inputs"] / (time.monotonic() - started)
            print(
                f"{given.target}: {counts['inputs']} inputs, {counts['accepted']} accepted, {rate:.0f}/s, no law broken"
            )
            sys.stdout.flush()

    atheris.Setup([sys.argv[0], *options, str(corpus)], counted)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
