"""Quantized sites as descent takes them, and what it learned stored and put back."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.checkpoints import Arrays
from qcompiler.graph import Site, original_weight, write_weight
from qcompiler.numerics.affine import Grid
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.packing import pack_codes, unpack_codes
from qcompiler.tuning.learned_weight import Start
from qcompiler.tuning.rounding import Outcome

__all__ = [
    "addition_problem",
    "code_arrays",
    "codes_of",
    "outcome_arrays",
    "outcome_of",
    "put_back",
    "start_of",
    "tuning_problem",
]

# A layer whose output is this many times as wide as what it reads is no part of a block: its targets would not fit.
_WIDEST = 8
_PROJECTION = "it projects onto the vocabulary"


def tuning_problem(site: Site, *, whole: bool = False) -> str:
    """Why a site cannot be tuned, by itself or with the whole model, or nothing."""
    if problem := _place_problem(site):
        return problem
    if site.quantized is None or "original" not in site.quantized.meta:
        return "its float weight is gone"
    if site.quantized.spec.fp8:
        return "8-bit floats are not learned"
    if site.quantized.spec.sparse:
        return "its values are pruned"
    if site.quantized.spec.vector:
        return "its codes name entries of tables"
    if site.dtype != ir.DataType.FLOAT:
        return f"its weight is {site.dtype.name}, and descent is done in FLOAT"
    if whole:
        return _PROJECTION if site.role == "lm_head" else ""
    if site.rows > _WIDEST * site.columns:
        return f"its output is more than {_WIDEST} times as wide as its input"
    return ""


def addition_problem(site: Site) -> str:
    """Why nothing can be trained beside a site whose weight stays, or nothing."""
    if problem := _place_problem(site):
        return problem
    if site.dtype != ir.DataType.FLOAT:
        return f"it is {site.dtype.name}, and descent is done in FLOAT"
    return _PROJECTION if site.role == "lm_head" else ""


def _place_problem(site: Site) -> str:
    """Why no gradient comes to where a site is, or nothing."""
    if site.nested:
        return f"inside the body of {site.nested}"
    return "a lookup table has no activations" if site.role == "embedding" else ""


def start_of(site: Site) -> Start:
    """A site's weight as it is quantized now."""
    tensor = site.quantized
    assert tensor is not None
    return Start(site.weight.name or "", original_weight(site), tensor.codes(), tensor.grid, tensor.spec, site.layout)


def outcome_arrays(outcome: Outcome, sites: Sequence[Site]) -> Arrays:
    """What was learned of some sites as arrays, for a checkpoint."""
    judged = {"before": np.array(outcome.before), "after": np.array(outcome.after)}
    return {**judged, **code_arrays(sites, outcome.codes, outcome.grids)}


def outcome_of(arrays: Mapping[str, np.ndarray], sites: Sequence[Site]) -> Outcome:
    """The reverse of `outcome_arrays`."""
    return Outcome(*codes_of(arrays, sites), float(arrays["before"]), float(arrays["after"]))


def code_arrays(sites: Sequence[Site], codes: Sequence[np.ndarray], grids: Sequence[Grid]) -> Arrays:
    """Codes and grids of some sites as arrays."""
    found = {}
    for at, (site, each, grid) in enumerate(zip(sites, codes, grids, strict=True)):
        packed = pack_codes(each, _bits(site))
        found.update({f"codes{at}": packed, f"scale{at}": grid.scale, f"zero{at}": grid.zero_point})
    return found


def codes_of(arrays: Mapping[str, np.ndarray], sites: Sequence[Site]) -> tuple[list[np.ndarray], list[Grid]]:
    """The reverse of `code_arrays`."""
    codes = [unpack_codes(arrays[f"codes{at}"], _bits(site), site.columns) for at, site in enumerate(sites)]
    return codes, [Grid(arrays[f"scale{at}"], arrays[f"zero{at}"]) for at in range(len(sites))]


def _bits(site: Site) -> int:
    assert site.quantized is not None
    return site.quantized.spec.bits


def put_back(site: Site, codes: np.ndarray, grid: Grid, pass_name: str) -> dict[str, float]:
    """Write what was learned; returns figures for the record."""
    old = site.quantized
    assert old is not None
    changed = float(np.mean(old.codes() != codes))
    tensor = write_weight(site, codes, grid, old.spec, pass_name)
    tensor.meta["original"] = old.meta["original"]
    return {
        "sqnr_db": sqnr_db(original_weight(site), tensor.dequantized()),
        "bits_per_weight": old.spec.stored_bits(site.columns),
        "changed_codes": changed,
    }
