"""Every registered method on torch tensors against the same method on NumPy arrays.

The suite walks the registry. It runs on torch's CPU device, and on one that torch alone can read (`foreign`), so that
nothing which works there touches a tensor through NumPy or mixes it with tensors of the CPU.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conformance.draws import NAMES, TYPES, kinds, plain, settings, tensors  # noqa: E402
from conformance.driver import BF16, F16, F32, F64, Outcome, merge, merge_tensors, step  # noqa: E402
from conformance.foreign import Foreign, ForeignBackend  # noqa: E402
from conformance.test_invariance import SHAPES, busy_settings  # noqa: E402
from smelt.engine.backends import HOST, choose  # noqa: E402
from smelt.engine.backends.torch_numbers import DECODERS, ENCODERS, uniform  # noqa: E402
from smelt.engine.backends.torch_reducers import Partials  # noqa: E402
from smelt.engine.backends.torch_tiles import TorchBackend  # noqa: E402
from smelt.engine.rng import key  # noqa: E402
from smelt.engine.rng import uniform as uniform_on_cpu  # noqa: E402
from smelt.errors import NumericError, RecipeError, SmeltError  # noqa: E402
from smelt.methods import api, decomposition  # noqa: E402
from smelt.methods.della import prune_by_rank  # noqa: E402
from smelt.methods.reducers import Gram, Sum  # noqa: E402
from smelt.methods.selection import KthLargest, KthLargest64  # noqa: E402
from smelt.methods.stages import drop  # noqa: E402
from smelt.specs import Grain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error")

CPU = choose("torch:cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """torch's own threads beside the engine's make small tiles slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BLOCK = 65536

_ROUNDED = re.compile(
    r"\bxp\.(linalg\.(?!diagonal)\w+|exp\w*|log\w*|a?sinh?|a?cosh?|a?tan[2h]?|pow|matmul|tensordot)\b"
)
"""Functions whose last bit is a library's own choice, where others (+, ×, ÷, √) have one right answer."""


def reason(info: api.MethodInfo) -> str | None:
    """Why results may differ by more than one step: the function in its file, or in `decomposition`, that says so."""
    text = Path(inspect.getfile(info.type)).read_text(encoding="utf-8")
    if f"from {decomposition.__name__} import" in text:
        text += Path(inspect.getfile(decomposition)).read_text(encoding="utf-8")
    found = _ROUNDED.search(text)
    return None if found is None else f"{found[0]} is rounded as each library likes"


def bound(info: api.MethodInfo, want: np.ndarray, inputs: list[np.ndarray], out: np.dtype) -> np.ndarray:
    """How far a result may lie from the CPU's: one step of the output's type; with a `reason` some of float32 more."""
    wide = want.astype(np.float64)
    allowed = step(wide, out)
    if reason(info) is None:
        return allowed
    largest = np.maximum.reduce([np.abs(wide), *(np.abs(tensor.astype(np.float64)) for tensor in inputs)])
    return np.asarray(allowed + 4.0 * step(largest, F32))


def ended(method: str, models: Any, base: Any, **options: Any) -> Outcome | str:
    """The outcome, or the kind of error."""
    try:
        return merge(method, models, base, **options)
    except SmeltError as error:
        return f"{type(error).__name__}: {error.message}"


def agree(
    method: str, models: Any, base: Any, *, out: np.dtype, backend: Any = CPU, distinct: bool = False, **options: Any
) -> None:
    """Assert that a device gives what the CPU does, errors included.

    With a `reason`, a decision about numbers that are equal but for the last bit may go another way, and the entry is
    then that of an input; not where all moves are `distinct`.
    """
    info = api.get(method)
    here = ended(method, models, base, out=out, **options)
    there = ended(method, models, base, out=out, backend=backend, **options)
    if isinstance(here, str) or isinstance(there, str):
        assert here == there
        return
    inputs = models if base is None else [*models, base]
    allowed = bound(info, here.values, inputs, out)
    found = there.values.astype(np.float64)
    well = np.abs(here.values.astype(np.float64) - found) <= allowed
    if reason(info) is not None and not distinct:
        well |= np.minimum.reduce([np.abs(found - tensor.astype(np.float64)) for tensor in inputs]) <= allowed
    assert well.all(), (models[0].shape, options, here.values[~well], found[~well])
    assert (here.result.created, here.result.inherited) == (there.result.created, there.result.inherited)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("method", NAMES)
def test_the_results_are_those_of_the_cpu(method: str, types: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng((len(types), NAMES.index(method)))
    ways = kinds(info)
    for i, shape in enumerate([(), (1,), (0,), (7,), (257, 1), (64, 33), (3, 5, 7), (64, 33), (301,)]):
        n, with_base = ways[i % len(ways)]
        models, base = tensors(shape, rng, n, TYPES[types], steps=i % 2 == 1)
        values = settings(info, rng, n) if i else plain(info, n)
        given, out = base if with_base else None, [F32, BF16, F16, F64][i % 4]
        agree(method, models, given, values=values, out=out, seed=i, distinct=types == "float32" and i % 2 == 0)
    n, with_base = ways[-1]
    models, base = tensors((70001,) if types == "mixed" else (70, 1003), rng, n, TYPES[types], steps=True)
    agree(method, models, base if with_base else None, values=settings(info, rng, n), out=BF16)


@pytest.mark.parametrize("method", NAMES)
def test_nothing_touches_a_tensor_but_torch(method: str) -> None:
    """On a device that NumPy cannot read, and that does not mix with the CPU: for each grain the busiest settings."""
    info = api.get(method)
    for n, with_base in {way[1]: way for way in kinds(info)}.values():
        for i, values in enumerate([*busy_settings(info, n).values(), plain(info, n)]):
            for shape in [(257, 1), (64, 33), (1,) if i else (70001,)]:
                models, base = tensors(shape, np.random.default_rng(3), n, TYPES["mixed"], steps=True)
                given = base if with_base else None
                agree(method, models, given, values=values, out=BF16, backend=ForeignBackend(), tile=BLOCK)


def test_the_foreign_device_is_as_strict_as_a_gpu() -> None:
    """Else the test above would show nothing."""
    with ForeignBackend().making():
        here = ForeignBackend().to_device(np.arange(4.0))
        with pytest.raises(RuntimeError):
            np.asarray(here)
        with pytest.raises(RuntimeError, match="meets one of the device"):
            _ = here + torch.from_numpy(np.arange(4.0))
        assert isinstance(torch.arange(3), Foreign)
        assert (here[1:] * 2 + torch.ones(3)).tolist() == [3.0, 5.0, 7.0]


@pytest.mark.parametrize("method", NAMES)
def test_cuts_do_not_show(method: str) -> None:
    """Tiles, threads and memory to spare change no bit on a device either."""
    info = api.get(method)
    n, with_base = [(n, base) for n, base in kinds(info) if n <= 2 or n == info.models[0]][-1]
    for grain, values in busy_settings(info, n).items():
        shape = SHAPES[grain][0] if grain is Grain.TENSOR else {Grain.ELEMENT: (140_001,)}.get(grain, (141, 17, 59))
        models, base = tensors(shape, np.random.default_rng(5), n, TYPES["mixed"])
        given = base if with_base else None
        whole = merge(method, models, given, values=values, backend=CPU)
        for options in ({"workers": 3}, {"keep_bytes": 0}):
            other = merge(method, models, given, values=values, backend=CPU, tile=BLOCK, **options)
            assert (other.bits, other.result) == (whole.bits, whole.result), (grain, options, values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", NAMES)
def test_numbers_that_are_none(method: str, bad: float) -> None:
    """They are counted, or refused, as on the CPU."""
    info = api.get(method)
    rng = np.random.default_rng(4)
    n, with_base = kinds(info)[-1]
    models, base = tensors((23, 19), rng, n, [F32])
    models[0][3, 4] = bad
    given, values = base if with_base else None, plain(info, n)
    here, there = (ended(method, models, given, values=values, backend=backend) for backend in (choose("cpu"), CPU))
    if isinstance(here, str):
        assert here == there
    else:
        assert isinstance(there, Outcome)
        assert (here.result.inherited, here.result.created) == (there.result.inherited, there.result.created)
        np.testing.assert_array_equal(np.isfinite(here.values), np.isfinite(there.values))


def test_a_new_infinity_is_refused() -> None:
    models = [np.full(9, 60000, dtype=F16), np.full(9, 60000, dtype=F16)]
    with pytest.raises(NumericError, match="would get a NaN or infinity"):
        merge("linear", models, values={"weight": 1.0, "normalize": False}, out=F16, backend=CPU)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_types_that_the_host_decodes(kind: str) -> None:
    """Floats of 8 bits, in and out; numbers beyond their range are treated as on the CPU."""
    out = np.dtype(getattr(ml_dtypes, kind))
    models, base = tensors((300,), np.random.default_rng(1), 2, [out])
    values = {"weight": (0.5, 0.7), "density": 0.5}
    for backend in (CPU, ForeignBackend()):
        there = merge("ties", models, base, values=values, out=out, backend=backend)
        assert there.bits == merge("ties", models, base, values=values, out=out).bits
        large = [np.full(9, 400.0, dtype=out), np.full(9, 400.0, dtype=out)]
        settings = {"weight": 200.0, "normalize": False}
        here, there = (ended("linear", large, None, values=settings, out=out, backend=b) for b in (HOST, backend))
        assert here == there
        assert isinstance(here, str)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 1), (1, 2), (3, 1000), (4, 999), (65536, 131071)])
@pytest.mark.parametrize("far", [0, 1 << 33])
def test_random_numbers_are_the_same(start: int, stop: int, far: int) -> None:
    for number in range(4):
        stream = key(number, "w", number)
        found = uniform(stream, far + start, far + stop, torch.arange).numpy()
        assert found.dtype == np.float32
        assert found.tobytes() == uniform_on_cpu(stream, far + start, far + stop).tobytes()


def test_codecs_are_the_same() -> None:
    from smelt import dtypes

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bits = np.concatenate([bits, np.array([0, 0x80000000, 0x7F800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF], "u4")])
    values = bits.view(np.float32)
    for code, encode in ENCODERS.items():
        dtype = dtypes.BY_CODE[code]
        stored = np.empty(dtype.nbytes(len(values)), dtype=np.uint8)
        dtypes.encode(values, dtype, stored)
        found = encode(torch.from_numpy(values)).numpy()
        number = np.isfinite(values) if code in ("F16", "F64") else np.ones(len(values), dtype=bool)
        width = dtype.bits // 8
        assert (found.reshape(-1, width)[number] == stored.reshape(-1, width)[number]).all(), code
        decoded = np.empty(len(values), dtype=np.float32)
        dtypes.decode(stored, dtype, decoded)
        back = DECODERS[code](torch.from_numpy(stored)).numpy()
        np.testing.assert_array_equal(back, decoded)
        assert back[number].tobytes() == decoded[number].tobytes(), code


@pytest.mark.parametrize("scope", ["tensor", "column"])
@pytest.mark.parametrize("reducer", [Sum, Gram])
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 255, 512), (3, 512, 512), (10, 700, 2100), (5, 3, 6)])
def test_sums_are_the_same_to_the_bit(reducer: Any, scope: str, rows: int, width: int, block: int) -> None:
    """So cuts, factors and angles are too. Blocks are those of a tile of rows."""
    values = np.random.default_rng(rows).standard_normal((3, rows, width), dtype=np.float32)
    if reducer is Sum and scope == "tensor":
        values = np.abs(values)
    kernel = Partials(CPU.to_host)[reducer]
    found = kernel(reducer(scope=scope, size=rows * width), torch.from_numpy(values), block)
    unit = max(1, block // width)
    want = [reducer(scope=scope, size=0).partial(values[:, low : low + unit]) for low in range(0, rows, unit)]
    assert [part.tobytes() for part in found] == [np.ascontiguousarray(part).tobytes() for part in want]


@pytest.mark.parametrize(("selector", "kind"), [(KthLargest, np.float32), (KthLargest64, np.float64)])
def test_cuts_are_found_the_same(selector: Any, kind: Any) -> None:
    rng = np.random.default_rng(1)
    numbers = np.round(rng.standard_normal((3, 5000)) * 40).astype(kind) / 7
    numbers[1] = rng.standard_normal(5000)
    numbers = np.abs(numbers) if selector is KthLargest else numbers
    numbers[2, :3] = (np.inf, np.nan, 0.0)
    counts = np.array([[1, 4999], [700, 2500], [0, 5000]])
    kernel = Partials(CPU.to_host)[selector]
    here, there = (selector(scope="tensor", size=5000) for _ in range(2))
    for _ in range(selector.rounds):
        total = None
        for piece in (slice(0, 1200), slice(1200, 5000)):
            mine = here.partial((numbers[:, piece], counts))
            made = kernel(there, (torch.from_numpy(numbers[:, piece].copy()), torch.from_numpy(counts)), 0)
            np.testing.assert_array_equal(np.squeeze(mine[1]), np.squeeze(made[1]))
            total = there.fold(total, made)
        there.close(total)
        here.close(here.partial((numbers, counts)))
    for name in ("value", "share", "count", "above", "equal"):
        assert getattr(here.finish(), name).tobytes() == getattr(there.finish(), name).tobytes(), name


class _Largest:
    """A reducer of somebody's own: the largest number per model, block by block, over NumPy arrays alone."""

    rounds = 1
    ordered = True

    def __init__(self, *, scope: str, size: int) -> None:
        self.blocks = 0

    def refuses(self, values: Any, ndim: int) -> None:
        return None

    def partial(self, values: Any) -> Any:
        assert isinstance(values, np.ndarray)
        return values.reshape(len(values), -1).max(axis=1)

    def fold(self, total: Any, partial: Any) -> Any:
        self.blocks += 1
        return partial if total is None else np.maximum(total, partial)

    def close(self, total: Any) -> None:
        self.total = total

    def finish(self) -> Any:
        return self.total


@pytest.mark.parametrize("shape", [(3, 150_000), (3, 40, 5), (3, 2, 3, 4)])
def test_an_unknown_reducer_is_given_arrays(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    block = {2: BLOCK, 3: 35, 4: 24}[len(shape)]
    reducer = _Largest(scope="tensor", size=0)
    total = None
    for part in Partials(CPU.to_host)[_Largest](reducer, torch.from_numpy(values), block):
        total = reducer.fold(total, part)
    assert reducer.blocks == {2: 3, 3: 6, 4: 1}[len(shape)]
    np.testing.assert_array_equal(total, values.reshape(3, -1).max(axis=1))


def test_a_result_that_is_no_tile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = api.get("linear").type
    models = [np.ones(9, dtype=F32)]
    for wrong, said in ((lambda self, x, coefficients: x[0].to(torch.float64), r"float64 \[9\]"), (None, "None")):
        monkeypatch.setattr(linear, "tile", wrong or (lambda self, x, coefficients: None))
        with pytest.raises(RecipeError, match=said):
            merge("linear", models, values={"weight": 1.0}, backend=CPU)


def test_the_memory_of_a_device_can_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, x: Any, coefficients: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(api.get("linear").type, "tile", full)
    with pytest.raises(SmeltError, match="the memory of torch:cpu is not enough") as caught:
        merge("linear", [np.ones(9, dtype=F32)], values={"weight": 1.0}, backend=CPU)
    assert "--threads 1" in (caught.value.fix or "")


def test_several_tensors_in_one_run() -> None:
    """Workers share a device; what is kept between passes serves the next tensor."""
    rng = np.random.default_rng(9)
    made = {f"t{i}": tensors((211 + i, 101), rng, 2, TYPES["mixed"], steps=True) for i in range(6)}
    models = [{name: pair[0][i] for name, pair in made.items()} for i in range(2)]
    base = {name: pair[1] for name, pair in made.items()}
    values = {"weight": (0.5, 0.6), "density": (0.3, 0.5), "rescale": True}
    here = merge_tensors("ties", models, base, values=values, out=BF16)
    there = merge_tensors("ties", models, base, values=values, out=BF16, workers=3, backend=CPU)
    assert {name: one.result for name, one in here.items()} == {name: one.result for name, one in there.items()}


def test_a_density_is_not_rounded() -> None:
    """A number of no dimensions, beside float32 ones, would be rounded to float32 by torch, and then equal them."""
    density = torch.full((1, 1, 1), 0.75 + 2.0**-30, dtype=torch.float64)
    numbers, ones = torch.full((1, 4, 1), 0.75), torch.ones((1, 4, 1))
    assert prune_by_rank(ones, density, torch.zeros_like(density), numbers).sum() == 4
    assert drop(ones, density, numbers).sum() == 4


class _Cuda(TorchBackend):
    """A backend of a GPU whose tensors lie in memory: what is left of it are its streams."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0), name="cuda")
        self._pinned = False

    def making(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def to_device(self, array: Any, *, wait: bool = False) -> Any:
        return torch.from_numpy(array)


def test_each_worker_has_a_stream_and_waits_for_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    running: dict[int, str] = {}
    waited: list[str] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.name = f"stream {len(running)}"

        def synchronize(self) -> None:
            waited.append(running[threading.get_ident()])

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        running[threading.get_ident()] = stream.name
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    models, base = tensors((40 * BLOCK,), np.random.default_rng(1), 2, [BF16])
    options: dict[str, Any] = {"values": {"weight": (0.5, 0.7)}, "out": BF16, "workers": 2}
    there = merge("task_arithmetic", models, base, **options, tile=8 * BLOCK, backend=_Cuda())
    assert there.bits == merge("task_arithmetic", models, base, **options).bits
    assert len(running) == 2
    assert len(waited) == 5, "once for each tile's result"
    assert set(waited) <= set(running.values())
