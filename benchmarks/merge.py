"""Time and memory of merges next to the I/O floor, and next to MergeKit where it is installed.

usage: python benchmarks/merge.py [--size 1b] [--folder /dev/shm] [--rounds 3] [--only linear,ties]
                                  [--peer /path/to/environment/bin/mergekit-yaml]

Makes synthetic checkpoints in a temporary folder (removed at the end; four models and an output: 11 GB for 1b), runs
floor, smelt and the peer in turn, and prints the least time of each. The ratio to the floor is of the engine's time
(inputs opened -> all tensors written); the ratio to the peer is of whole processes. Memory is the resident peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from floor import floor
from synthetic import SIZES, make

import smelt

RECIPES = {
    "linear": """
merge_method: linear
models:
  - {{model: {m}/base, parameters: {{weight: 0.4}}}}
  - {{model: {m}/ft1, parameters: {{weight: 0.3}}}}
  - {{model: {m}/ft2, parameters: {{weight: 0.3}}}}
dtype: bfloat16
""",
    "slerp": """
merge_method: slerp
base_model: {m}/base
models:
  - model: {m}/base
  - model: {m}/ft1
parameters: {{t: 0.4}}
dtype: bfloat16
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: {m}/base
models:
  - {{model: {m}/ft1, parameters: {{weight: 0.5}}}}
  - {{model: {m}/ft2, parameters: {{weight: 0.5}}}}
dtype: bfloat16
""",
    "dare_ties": """
merge_method: dare_ties
base_model: {m}/base
models:
  - {{model: {m}/ft1, parameters: {{weight: 0.5, density: 0.5}}}}
  - {{model: {m}/ft2, parameters: {{weight: 0.5, density: 0.5}}}}
dtype: bfloat16
""",
    "ties": """
merge_method: ties
base_model: {m}/base
models:
  - {{model: {m}/ft1, parameters: {{weight: 0.5, density: 0.5}}}}
  - {{model: {m}/ft2, parameters: {{weight: 0.5, density: 0.5}}}}
dtype: bfloat16
""",
    "model_stock": """
merge_method: model_stock
base_model: {m}/base
models:
  - model: {m}/ft1
  - model: {m}/ft2
dtype: bfloat16
""",
    "passthrough": """
merge_method: passthrough
models:
  - model: {m}/base
""",
}
INPUTS = {"slerp": ["base", "ft1"], "passthrough": ["base"]}


def measured(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, resident peak in MB and standard output of a command. Raises if it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{errors.read().decode()[-2000:]}")
        out.seek(0)
        return seconds, usage.ru_maxrss / 1024, out.read().decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peer", default=None, help="a mergekit-yaml program")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    folder = Path(tempfile.mkdtemp(prefix="smelt-bench-", dir=arguments.folder))
    try:
        machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
        print(f"smelt {smelt.__version__}, {machine}, {time.strftime('%Y-%m-%d')}")
        models = make(arguments.size, folder, 3)
        size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
        print(f"models of {size / 1e9:.2f} GB each in {folder.parent}; least of {arguments.rounds} rounds\n")
        heads = (
            "recipe",
            "floor s",
            "engine s",
            "engine / floor",
            "process s",
            "MB",
            "peer s",
            "peer MB",
            "peer / smelt",
        )
        print(f"| {' | '.join(heads)} |")
        print("|---" * len(heads) + "|")
        for name in names:
            recipe = folder / f"{name}.yml"
            recipe.write_text(RECIPES[name].format(m=folder))
            print(row(name, recipe, folder, arguments.rounds, threads, arguments.peer), flush=True)
    finally:
        shutil.rmtree(folder)


def row(name: str, recipe: Path, folder: Path, rounds: int, threads: list[str], peer: str | None) -> str:
    """One line of the table: floor, smelt and the peer in turn."""
    out = folder / "out"
    floors, engines, wholes, memories, peers, peer_memories = [], [], [], [], [], []
    inputs = [folder / one for one in INPUTS.get(name, ["base", "ft1", "ft2"])]
    for _ in range(rounds):
        floors.append(floor(folder / "floor.bin", inputs))
        command = [sys.executable, "-m", "smelt", "merge", str(recipe), str(out), "--json", *threads]
        seconds, memory, printed = measured(command)
        wholes.append(seconds)
        memories.append(memory)
        engines.append(json.loads(printed)["engine_seconds"])
        shutil.rmtree(out)
        if peer is not None:
            command = [peer, str(recipe), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
            seconds, memory, _ = measured(command)
            peers.append(seconds)
            peer_memories.append(memory)
            shutil.rmtree(out)
    cells = [
        name,
        f"{min(floors):.2f}",
        f"{min(engines):.2f}",
        f"{min(engines) / min(floors):.1f}",
        f"{min(wholes):.2f}",
        f"{max(memories):.0f}",
        f"{min(peers):.1f}" if peers else "–",
        f"{max(peer_memories):.0f}" if peers else "–",
        f"{min(peers) / min(wholes):.1f} ×" if peers else "–",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
