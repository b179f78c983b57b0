"""The same bits whatever the tile, the number of threads, the memory to spare, the process and the order of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.draws import NAMES, TYPES, big, counts, kinds, plain, settings, tensors
from conformance.driver import BF16, F32, complete, merge, merge_tensors, source
from smelt.errors import SmeltError
from smelt.lineage.verify import tensor_digest
from smelt.methods import api
from smelt.specs import Grain

pytestmark = pytest.mark.filterwarnings("error")

BLOCK = 65536
CUTS = [
    {"tile": BLOCK, "workers": 1},
    {"tile": BLOCK, "workers": 5},
    {"tile": 2 * BLOCK, "workers": 2, "keep_bytes": 0},
    {"tile": 3 * BLOCK, "workers": 1, "keep_bytes": 0},
    {"tile": 3 * BLOCK, "workers": 5},
    {"tile": 1 << 20, "workers": 2},
]
"""Each must equal, bit for bit, what one thread gives with the default tile and inputs kept in memory."""

SHAPES: dict[Grain, list[tuple[int, ...]]] = {
    Grain.ELEMENT: [(700_001,)],
    Grain.ROW: [(699, 1003), (3, 200_003)],
    Grain.SLAB: [(699, 17, 59), (3, 200_003)],
    Grain.TENSOR: [(70, 130)],
}
"""Several tiles and tasks each; rows of odd length, and rows longer than a block."""


def busy_settings(info: api.MethodInfo, n: int) -> dict[Grain, dict[str, Any]]:
    """For every grain that the method can have, the drawn settings that need the most reductions."""
    found: dict[Grain, tuple[int, dict[str, Any]]] = {}
    rng = np.random.default_rng(31)
    for _ in range(60):
        values = settings(info, rng, n)
        method = info.type(values, models=n)
        if method.copies():
            continue
        needs = len(method.active())
        if method.grain not in found or needs > found[method.grain][0]:
            found[method.grain] = (needs, values)
    return {grain: values for grain, (_, values) in found.items()}


@pytest.mark.parametrize("method", NAMES)
def test_cuts_do_not_show(method: str) -> None:
    info = api.get(method)
    n, with_base = [(n, base) for n, base in kinds(info) if n <= 2 or n == info.models[0]][-1]
    for grain, values in busy_settings(info, n).items():
        for shape in SHAPES[grain]:
            models, base = big(shape, n)
            given = base if with_base else None
            plain_run = merge(method, models, given, values=values, out=BF16)
            assert np.isfinite(plain_run.values.astype(np.float32)).all()
            for cut in CUTS:
                other = merge(method, models, given, values=values, out=BF16, **cut)
                assert other.bits == plain_run.bits, (grain, shape, cut, values)
                assert other.result == plain_run.result, (grain, shape, cut, values)
            stored = source(0, {"w": plain_run.values})
            assert plain_run.result.digest == tensor_digest(stored, "w")


@pytest.mark.parametrize("method", NAMES)
def test_float32_output_does_not_show_cuts_either(method: str) -> None:
    """A type that rounds less hides less."""
    info = api.get(method)
    n, with_base = kinds(info)[0]
    for grain, values in busy_settings(info, n).items():
        models, base = big(SHAPES[grain][0], n)
        given = base if with_base else None
        first = merge(method, models, given, values=values)
        for cut in (CUTS[1], CUTS[2]):
            other = merge(method, models, given, values=values, **cut)
            assert (other.bits, other.result) == (first.bits, first.result), (grain, cut, values)


def one_of_each(seed: int) -> dict[str, str]:
    """A digest of what every method makes of two tensors with drawn settings, several ways each."""
    found = {}
    for method in NAMES:
        info = api.get(method)
        digest = hashlib.sha256()
        for n, with_base in kinds(info):
            rng = np.random.default_rng(n)
            pairs = [tensors(shape, rng, n, TYPES["mixed"], steps=True) for shape in ((70, 33), (501,))]
            models = [{f"tensor {j}": pair[0][i] for j, pair in enumerate(pairs)} for i in range(n)]
            base = {f"tensor {j}": pair[1] for j, pair in enumerate(pairs)} if with_base else None
            for values in (plain(info, n), settings(info, rng, n)):
                try:
                    merged = merge_tensors(method, models, base, values=values, seed=seed, workers=2)
                except SmeltError as error:
                    digest.update(type(error).__name__.encode())  # which tensor it names is a matter of threads
                else:
                    digest.update(b"".join(outcome.bits for outcome in merged.values()))
        found[method] = digest.hexdigest()
    return found


def in_a_fresh_process(hash_seed: str) -> dict[str, str]:
    code = "import json; from conformance.test_invariance import one_of_each; print(json.dumps(one_of_each(3)))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_another_process_gives_the_same_bits() -> None:
    here = one_of_each(3)
    assert in_a_fresh_process("1") == here
    assert in_a_fresh_process("271828") == here


def asks_for_chance(info: api.MethodInfo) -> bool:
    return any("uniform" in step for step in (info.tile_arguments, *(r.arguments for r in info.reductions)))


@pytest.mark.parametrize("method", NAMES)
def test_the_seed_matters_to_random_methods_alone(method: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng(17)
    n = counts(info)[-1]
    models, base = tensors((70, 33), rng, n, [F32], steps=True)
    given = None if info.base == "none" else base
    differs = False
    for _ in range(20):
        values = settings(info, rng, n)
        zero, again, one = (merge(method, models, given, values=values, seed=seed).bits for seed in (0, 0, 1))
        assert zero == again
        differs = differs or zero != one
    assert differs == asks_for_chance(info)


@pytest.mark.parametrize("method", [name for name in NAMES if asks_for_chance(api.get(name))])
def test_tensors_and_models_have_streams_of_their_own(method: str) -> None:
    """The same tensor under another name, or in another place among the models, meets other random numbers."""
    info = api.get(method)
    rng = np.random.default_rng(18)
    n = counts(info)[-1]
    models, base = tensors((70, 33), rng, n, [F32], steps=True)
    differs = False
    for _ in range(20):
        values = settings(info, rng, n)
        named = [merge(method, models, base, values=values, name=name).bits for name in ("one", "two")]
        differs = differs or named[0] != named[1]
    assert differs


@pytest.mark.parametrize("method", NAMES)
def test_the_order_of_tensors_does_not_matter(method: str) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    rng = np.random.default_rng(19)
    made = {f"t{i}": tensors((37 + i, 11), rng, n, [F32], steps=True) for i in range(5)}
    values = settings(info, rng, n)
    results = []
    for order in (list(made), list(made)[::-1]):
        models = [{name: made[name][0][i] for name in order} for i in range(n)]
        base = {name: made[name][1] for name in order} if with_base else None
        merged = merge_tensors(method, models, base, values=values, workers=3)
        results.append({name: merged[name].bits for name in made})
    assert results[0] == results[1]
    alone = {
        name: merge(method, m, b if with_base else None, values=values, name=name).bits for name, (m, b) in made.items()
    }
    assert alone == results[0]


@pytest.mark.parametrize("method", NAMES)
def test_state_dicts_give_what_plans_give(method: str) -> None:
    """`merge_state_dicts` resolves its arguments to the same settings; the order of its keys does not matter."""
    from smelt.in_memory import merge_state_dicts

    info = api.get(method)
    rng = np.random.default_rng(20)
    for n, with_base in kinds(info):
        models, base = tensors((37, 11), rng, n, [F32], steps=True)
        for values in (plain(info, n), settings(info, rng, n)):
            arguments = {info.fields[name].attribute: value for name, value in complete(info, values, n).items()}
            states = [{"a": model, "b": model[:5]} for model in models]
            bases = {"a": base, "b": base[:5]} if with_base else None
            merged = merge_state_dicts(states, method=method, base=bases, seed=7, **arguments)
            turned = merge_state_dicts(
                [dict(reversed(state.items())) for state in states], method=method, base=bases, seed=7, **arguments
            )
            direct = merge_tensors(method, states, bases, values=values, seed=7)
            for name in ("a", "b"):
                assert merged[name].tobytes() == direct[name].bits == turned[name].tobytes(), values
