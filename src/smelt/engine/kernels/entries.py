"""Methods that decide at each entry by the size of its differences: what nearswap, ram, consensus, sce tell loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed, plain
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.task_vectors import limits, stream_keys
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES

_SWAP = Loop("entries", "swap_near")
_AVERAGE = Loop("entries", "average_active")
_COUNT_ACTIVE = Loop("entries", "count_active")
_AGREE = Loop("entries", "agree_tile")
_COUNT_VARYING = Loop("entries", "count_varying")
_COUNT_VARIANCES = Loop("entries", "count_variances")
_ADD_ENERGIES = Loop("entries", "add_energies")
_FUSE = Loop("entries", "fuse_tile")


def swap(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of nearswap."""
    fed = feed(given)
    return None if fed is None else bool(_SWAP(*fed, float(method.t), out))


def average(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of ram."""
    return _average(method, given, (1.0,) * given.models, out)


def boosted_average(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of ramplus_tl."""
    return _average(method, given, given.once("boost", lambda: plain(given["boost"])), out)


def _average(method: Any, given: Given, boost: tuple[float, ...], out: Any) -> bool | None:
    fed = feed(given)
    return None if fed is None else bool(_AVERAGE(*fed, float(method.epsilon), boost, out))


def active(method: Any, given: Given, *reducers: Any) -> Any:
    """Partial results of the sums `unique` and `shared`: lanes [blocks, n, 256] of both."""
    if (fed := feed(given)) is None:
        return None
    counts = np.zeros((_blocks(given), 2 * given.models), dtype=np.int64)
    _COUNT_ACTIVE(*fed, float(method.epsilon), given.count, counts)
    return _in_lanes(counts[:, : given.models]), _in_lanes(counts[:, given.models :])


def _blocks(given: Given) -> int:
    return -(-given.count // BLOCK)


def _in_lanes(counts: Any) -> Any:
    """Whole numbers [blocks, n] as lanes of a sum: which lane they are in changes no bit."""
    lanes = np.zeros((*counts.shape, LANES))
    lanes[..., 0] = counts
    return lanes


def agree(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of consensus."""
    if (fed := feed(given)) is None:
        return None
    weight, threshold = plain(method.weight.reshape(-1)), plain(method.threshold.reshape(-1))
    return bool(_AGREE(*fed, weight, threshold, float(method.agreement), float(method.lambda_), out))


def varying(method: Any, given: Given, reducer: Any) -> Any:
    """Partial results of the number of entries that vary: lanes [blocks, 1, 256]."""
    if (fed := feed(given)) is None:
        return None
    counts = np.zeros(_blocks(given), dtype=np.int64)
    _COUNT_VARYING(*fed, given.count, counts)
    return _in_lanes(counts[:, None])


def variances(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest64 over the variances."""
    if (fed := feed(given)) is None:
        return None
    count = given.once("count to keep", lambda: method.count_to_keep(given["varying"]))
    prefixes = reducer.prefixes(1)[0]
    histogram = np.zeros((1, 1, 1 << 16), dtype=np.int64)
    prefix = prefixes[0] if len(prefixes) else np.uint64(0)
    _COUNT_VARIANCES(*fed, given.count, reducer.digit, prefix, int(not len(prefixes)), histogram[0, 0])
    return np.array([[count]]), histogram


def _chosen(given: Given) -> tuple[Any, ...]:
    """How loops are told what to keep: whether they choose at all, the cut, the stream, the place."""
    cut = given["cut"]
    key = stream_keys(given)[0]
    if cut is None:
        return 0, 0.0, np.uint32(0), key, given.start
    return 1, float(cut.value[0, 0]), limits(cut.share)[0, 0], key, given.start


def energies(method: Any, given: Given, reducer: Any) -> Any:
    """Partial results of Σ d_i² over what is kept: lanes [blocks, n, 256]."""
    if (fed := feed(given)) is None:
        return None
    lanes = np.zeros((given.models, _blocks(given), LANES))
    _ADD_ENERGIES(*fed, *_chosen(given), given.count, lanes)
    return lanes.transpose(1, 0, 2)


def fuse(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of sce."""
    if (fed := feed(given)) is None:
        return None
    shares = given.once("shares", lambda: plain(given["shares"]))
    return bool(_FUSE(*fed, *_chosen(given), shares, out))


FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("nearswap", "tile"): swap,
    ("ram", "tile"): average,
    ("ramplus_tl", "unique", "shared"): active,
    ("ramplus_tl", "tile"): boosted_average,
    ("consensus", "tile"): agree,
    ("sce", "varying"): varying,
    ("sce", "cut"): variances,
    ("sce", "energy"): energies,
    ("sce", "tile"): fuse,
}
"""(method, function) or (method, reductions of one pass...) -> kernel."""
