"""`make faults`: real refusals of the system, not a double's: strace injects errors, small and read-only mounts.

What is missing here (strace, the right to mount) is skipped with its reason. Not part of `make test`: a minute.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import factory
from factory import command, linear, recipe, snapshot

TIES = {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}
INJECTED = [
    ("pwrite64", "error=EIO:when=1", "write: Input/output error"),
    ("pwrite64", "error=EIO:when=6+", "write: Input/output error"),
    ("pwrite64", "error=ENOSPC:when=3+", "write: no space left"),
    ("pwrite64", "error=EDQUOT:when=12+", "write: no space left"),
    ("preadv2", "error=EIO:when=1", "read: Input/output error"),
    ("preadv2", "error=EIO:when=4+", "read: Input/output error"),
    ("fallocate", "error=ENOSPC:when=1", "reserve space for: no space left"),
    ("fallocate", "error=ENOSPC:when=2", "reserve space for: no space left"),
    ("fsync", "error=EIO:when=1", "sync: Input/output error"),
    ("fsync", "error=EIO:when=4+", "Input/output error"),
    ("rename", "error=EXDEV:when=1", "rename to out: Invalid cross-device link"),
    ("mkdir", "error=EROFS:when=1", "create folder: Read-only file system"),
    ("flock", "error=ENOLCK:when=1", "lock: No locks available"),
]
KILLED = [("pwrite64", n) for n in (1, 4, 8, 12)] + [("fsync", n) for n in (1, 3, 5, 9)] + [("rename", 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three models, a recipe, its output `whole/out`, and a place for outputs."""
    factory.llamas(tmp_path, 3)
    recipe(tmp_path / "recipe.yml", linear("m1", "m2", base_model="m0", **TIES))
    for name in ("whole", "place"):
        (tmp_path / name).mkdir()
    assert factory.smelt("merge", tmp_path / "recipe.yml", tmp_path / "whole" / "out", "--shard-size", "1kB").code == 0
    return tmp_path


def words(folder: Path, *more: object, place: str = "place") -> list[str]:
    return command("merge", folder / "recipe.yml", folder / place / "out", "--shard-size", "1kB", *more)


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


# --- errors that strace injects ---------------------------------------------------------------------------------------


def strace(*faults: tuple[str, str], of: Path | None = None) -> list[str]:
    """The words before a command that let its system calls fail, or those on one file; skips where strace cannot trace.

    A fault is a call and what strace is to inject.
    """
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    if run(["strace", "-qq", "-o", os.devnull, "true"]).returncode != 0:
        pytest.skip("strace may not trace here")
    traced = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={','.join(call for call, _ in faults)}"]
    injected = [word for call, inject in faults for word in ("-e", f"inject={call}:{inject}")]
    return [*traced, *injected, *(["-P", str(of)] if of is not None else [])]


@pytest.mark.parametrize(("call", "inject", "says"), INJECTED, ids=lambda value: str(value).replace(" ", "_"))
def test_an_injected_error(folder: Path, call: str, inject: str, says: str) -> None:
    done = run([*strace((call, inject)), *words(folder)])
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert "error: cannot " in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert set(os.listdir(folder / "place")) <= {".out.smelt-build.lock"}


@pytest.mark.parametrize(("call", "number"), KILLED)
def test_a_kill_in_a_system_call(folder: Path, call: str, number: int) -> None:
    """Delivered by the kernel as the call returns; then it is resumed."""
    done = run([*strace((call, f"signal=SIGKILL:when={number}")), *words(folder, "--threads", 1)])
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (done.returncode, done.stderr)
    out = folder / "place" / "out"
    assert not out.exists() or snapshot(out) == snapshot(folder / "whole" / "out")
    if not out.exists():
        again = run(words(folder, "--resume"))
        assert again.returncode == 0, again.stderr
        assert os.listdir(folder / "place") == ["out"]
    assert snapshot(out) == snapshot(folder / "whole" / "out")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 24 MB, whose merge is worth loading kernels that read by themselves; its output `whole/out`."""
    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba, hence any kernel, is missing")
    folder = tmp_path_factory.mktemp("large")
    for i in range(3):
        numbers = np.random.default_rng(i).standard_normal((1500, 4096), dtype=np.float32)
        factory.model(folder / f"m{i}", {"model.layers.0.mlp.up_proj.weight": numbers}, factory.config(layers=1))
    recipe(folder / "recipe.yml", linear("m1", "m2", base_model="m0", **TIES))
    assert factory.smelt("merge", folder / "recipe.yml", folder / "whole" / "out").code == 0
    return folder


@pytest.mark.parametrize("when", ["1", "3+"])
def test_a_kernel_s_read_that_fails_is_made_again(large: Path, tmp_path: Path, when: str) -> None:
    """Kernels read with `pread64`; where that fails, the ordinary `preadv2` finds out whether all is well."""
    faults = strace(("pread64", f"error=EIO:when={when}"), of=large / "m1" / "model.safetensors")
    log = tmp_path / "calls"
    faults[faults.index(os.devnull)] = str(log)
    done = run([*faults, *command("merge", large / "recipe.yml", tmp_path / "out", "--threads", 2)])
    assert done.returncode == 0, done.stderr
    assert "EIO" in log.read_text()
    made, whole = (folder / "out" / "model.safetensors" for folder in (tmp_path, large / "whole"))
    assert made.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("when", ["1+", "2+"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["", "resume"])
def test_a_disk_on_which_no_read_of_a_kernel_succeeds(large: Path, tmp_path: Path, when: str, more: list[str]) -> None:
    faults = [("pread64", f"error=EIO:when={when}"), ("preadv2", f"error=EIO:when={when}")]
    if when == "1+":  # the header is read the ordinary way, once, before any kernel is asked
        faults[1] = ("preadv2", "error=EIO:when=3+")
    weights = large / "m1" / "model.safetensors"
    words = command("merge", large / "recipe.yml", tmp_path / "place" / "out", "--threads", 1, *more)
    (tmp_path / "place").mkdir()
    done = run([*strace(*faults, of=weights), *words])
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert "error: cannot read: Input/output error" in done.stderr
    assert str(weights) in done.stderr
    assert "Traceback" not in done.stderr
    left = {name for name in os.listdir(tmp_path / "place") if not name.endswith(".lock")}
    assert left <= ({".out.smelt-build", ".out.smelt-build.journal"} if more else set())
    again = run(words)
    assert again.returncode == 0, again.stderr
    assert os.listdir(tmp_path / "place") == ["out"]


# --- file systems -------------------------------------------------------------------------------------------------


def mounted(folder: Path, options: str, then: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a name space of its own where `place` is a tmpfs with these options."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    begin = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    mount = f"mount -t tmpfs -o {options} none {folder / 'place'}"
    if run([*begin, "sh", "-c", mount]).returncode != 0:
        pytest.skip("nothing may be mounted here")
    return run([*begin, "sh", "-c", f"{mount} || exit 99; cd {folder}\n{then}"])


def merge(folder: Path, *more: object) -> str:
    return " ".join(words(folder, *more))


def test_a_disk_that_is_too_small(folder: Path) -> None:
    done = mounted(folder, "size=1m", f"{merge(folder)}; echo $?; ls -A place")
    assert done.stdout == "4\n"
    assert "error: not enough space: 16.8 MB needed, 1.05 MB free" in done.stderr


@pytest.mark.parametrize("inodes", range(2, 14))
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["", "resume"])
def test_a_disk_that_is_full_of_files(folder: Path, inodes: int, more: list[str]) -> None:
    """Space for bytes but not for names: each number stops the merge at another file."""
    then = f"{merge(folder, *more)}; echo code $?; ls -A place; mount -o remount,nr_inodes=100 place;"
    then += f"[ -e place/out ] || {merge(folder, '--resume')} || exit 98; cp -r place/out copy; ls -A place"
    done = mounted(folder, f"size=64m,nr_inodes={inodes}", then)
    assert done.returncode == 0, done.stderr
    first = done.stdout.split("done: ")[0]
    code = int(first.split("code ")[1].split("\n")[0]) if "code " in first else 0
    assert code in (0, 4), done.stderr
    if code == 4:
        assert "no space left" in done.stderr
        left = {line for line in first.splitlines() if line.startswith(".out") or line == "out"}
        assert left <= ({".out.smelt-build", ".out.smelt-build.journal"} if more else set())
    assert snapshot(folder / "copy") == snapshot(folder / "whole" / "out")


def test_a_read_only_file_system(folder: Path) -> None:
    """Inputs may lie there, outputs not."""
    there = "cp -r m0 m1 m2 recipe.yml place; mount -o remount,ro place"
    refused = command("merge", "place/recipe.yml", "place/out")
    works = command("merge", "place/recipe.yml", "elsewhere/out", "--shard-size", "1kB")
    done = mounted(folder, "size=64m", f"{there}\n{' '.join(refused)}; echo $?; {' '.join(works)} -q; echo $?")
    assert done.stdout == "4\n0\n", done.stderr
    assert "Read-only file system" in done.stderr
    assert "fix: check the permissions, or choose another folder" in done.stderr
    new, whole = snapshot(folder / "elsewhere" / "out"), snapshot(folder / "whole" / "out")
    assert {name for name in whole if new[name] != whole[name]} <= {"README.md", "smelt.json"}
