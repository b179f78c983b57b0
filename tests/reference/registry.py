"""The reference of every method, by the name that recipes use.

Each is `f(models, base, *, keep=None, **parameters) -> float64 array` of the tensor's shape. `models` are
float32 arrays of one shape, the base not among them; `keep` decides what is left to chance (see
`reference.keep`). Per-model parameters (weight, density, gamma, della's epsilon, passthrough's scale) are
lists with one number per model; all others are plain values. Parameters have the names of the recipe
language, except `lambda`, a Python keyword: it is `lambda_` here. With granularity "model" the tensors given are
whole models, each as one vector (`reference.whole` makes them): a reference sees no difference to "tensor".
"""

from __future__ import annotations

from collections.abc import Callable

from reference.averaging import ema, expo, geometric_median, sma, wma
from reference.balancing import consensus, localize, pcb
from reference.inputs import Array
from reference.linear import linear
from reference.model_stock import model_stock
from reference.passthrough import passthrough
from reference.ram import ram, ramplus_tl
from reference.sce import sce
from reference.singular import iso_c, iso_cts, tsv, wudi
from reference.spherical import karcher, multislerp, nuslerp, slerp
from reference.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)
from reference.two_model import arcee_fusion, nearswap

REFERENCE: dict[str, Callable[..., Array]] = {
    "arcee_fusion": arcee_fusion,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "consensus": consensus,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
    "ema": ema,
    "expo": expo,
    "geometric_median": geometric_median,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "karcher": karcher,
    "linear": linear,
    "localize": localize,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "nearswap": nearswap,
    "nuslerp": nuslerp,
    "passthrough": passthrough,
    "pcb": pcb,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "sce": sce,
    "slerp": slerp,
    "sma": sma,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "tsv": tsv,
    "wma": wma,
    "wudi": wudi,
}
