"""LAPACK on one thread while methods on whole tensors run, and as many as before afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from smelt.engine import blas
from smelt.engine.run import uses_linear_algebra

pytestmark = pytest.mark.skipif(blas.threads() is None, reason="NumPy has no OpenBLAS of its own here")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, json
import numpy as np
from smelt.engine import blas
from smelt.in_memory import merge_state_dicts

random = np.random.default_rng(0)
base = {"a": random.normal(size=(300, 200)).astype(np.float32), "b": random.normal(size=(150, 260)).astype(np.float32)}
tuned = [{n: (v + random.normal(0, 0.1, v.shape)).astype(np.float32) for n, v in base.items()} for _ in range(3)]
found = {"threads": blas.threads()}
for method in ("iso_c", "iso_cts", "tsv", "wudi"):
    for workers in (1, 2):
        merged = merge_state_dicts(tuned, method=method, base=base, workers=workers)
        found[f"{method} {workers}"] = hashlib.sha256(merged["a"].tobytes() + merged["b"].tobytes()).hexdigest()
found["after"] = blas.threads()
print(json.dumps(found))
"""


def digests(threads: int) -> dict[str, str | int]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_the_number_of_threads_does_not_show() -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core: OpenBLAS has one thread in any case")
    one, two = digests(1), digests(2)
    assert (one.pop("threads"), two.pop("threads")) == (1, 2)
    assert (one.pop("after"), two.pop("after")) == (1, 2)
    assert one == two
    assert all(one[f"{method} 1"] == one[f"{method} 2"] for method in ("iso_c", "iso_cts", "tsv", "wudi"))


def test_the_last_holder_gives_it_back() -> None:
    controls = blas._controls()
    assert controls is not None
    before = blas.threads()
    controls[1](2)
    wanted = blas.threads()
    seen = []
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with blas.single_threaded():
            inside.set()
            leave.wait(10)
            seen.append(blas.threads())

    thread = threading.Thread(target=other)
    with blas.single_threaded():
        thread.start()
        assert inside.wait(10)
        seen.append(blas.threads())
    leave.set()
    thread.join()
    assert seen == [1, 1]
    assert blas.threads() == wanted
    with pytest.raises(ZeroDivisionError), blas.single_threaded():
        raise ZeroDivisionError
    assert blas.threads() == wanted
    assert before is not None
    controls[1](before)


def test_only_methods_on_whole_tensors_ask_for_it() -> None:
    from conformance.driver import plan_of

    tensor = {"w": np.zeros((4, 3), np.float32)}
    for method, values, expected in (
        ("tsv", {}, True),
        ("wudi", {}, True),
        ("task_arithmetic", {"weight": 1.0}, False),
        ("della", {"weight": 1.0, "density": 0.5}, False),
    ):
        plan, _ = plan_of(method, [tensor, tensor], tensor, values=values, out=np.dtype(np.float32))
        assert uses_linear_algebra(plan) is expected, method
