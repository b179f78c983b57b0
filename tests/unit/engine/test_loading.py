"""Compiled loops: kept on disk, loaded without numba, compiled again where what lies there is not whole."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba, hence any kernel, is missing")

CODE = """
import sys
import numpy as np
from smelt.dtypes import BF16
from smelt.engine.kernels import codecs
raw = np.arange(1 << 16, dtype=np.uint16)
out = np.empty(raw.size, dtype=np.float32)
codecs.decode(raw.view(np.uint8), BF16, out)
right = (out.view(np.uint32) == raw.astype(np.uint32) << 16).all()
print(bool(right), "numba" in sys.modules)
"""


def decoded(folder: Path) -> list[str]:
    """In a process of its own: whether the numbers are right, and whether numba was loaded for them."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_loop_is_compiled_once(tmp_path: Path) -> None:
    assert decoded(tmp_path) == ["True", "True"]
    assert [path.name.split(".")[1:3] for path in kept(tmp_path)] == [["codecs", "decode"]]
    assert decoded(tmp_path) == ["True", "False"]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder"])
def test_code_that_is_not_whole_is_compiled_again(tmp_path: Path, damage: str) -> None:
    decoded(tmp_path)
    (path,) = kept(tmp_path)
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"cut": data[: len(data) // 2], "bit": data, "empty": b""}[damage])
    assert decoded(tmp_path) == ["True", "True"]
    assert decoded(tmp_path) == ["True", "True" if damage == "folder" else "False"]


def test_where_nothing_can_be_kept_it_works_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert decoded(tmp_path / "file") == ["True", "True"]


def test_every_type_of_argument_is_told_apart() -> None:
    from smelt.engine.kernels.loading import _flatten, _packed

    codes: list[str] = []
    words: list[object] = []
    array = np.zeros((2, 3), dtype=np.float32)
    _flatten((array, (array, 1.5), 7, True, np.uint32(8), np.float64(2.5), ()), codes, words)
    assert codes == ["f2", "(", "f2", "d", ")", "q", "q", "I", "d", "(", ")"]
    assert words[1:3] == [2, 3]
    assert words[6:] == [1.5, 7, True, 8, 2.5]
    assert "".join(map(_packed, codes)) == "QQQ" + "QQQ" + "d" + "qq" + "Q" + "d"


def test_an_array_with_gaps_is_refused() -> None:
    from smelt.engine.kernels.loading import Loop

    with pytest.raises(ValueError, match="contiguous"):
        Loop("codecs", "decode")(np.zeros(8, dtype=np.uint16)[::2], np.zeros(4, dtype=np.float32))


def test_a_loop_that_needs_python_is_refused() -> None:
    """Its code would end the process when it is linked."""
    from smelt.engine.kernels.loading import host_machine
    from smelt.engine.kernels.loops import building, codecs

    def makes_an_array(count: int) -> int:
        return int(np.empty(count).size)

    codecs.makes_an_array = building._numba.njit(makes_an_array)  # type: ignore[attr-defined]
    try:
        with pytest.raises(RuntimeError, match="NRT_"):
            building.build("codecs", "makes_an_array", ("q",), symbol="refused", machine=host_machine())
    finally:
        del codecs.makes_an_array  # type: ignore[attr-defined]
