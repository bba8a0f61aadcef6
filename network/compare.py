"""How two sets of parameters, and the outputs of two networks, compare.

Names may differ: a parameter that is missing and one that is too many are taken for one that was
renamed when their shapes are equal and either their names are but for spelling (letter case,
separators, a prefix such as ``module.``), or they stand at the same place of the graph, or their
names are much alike, or nothing else of their kind and shape is missing or too many.
"""

import dataclasses
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from .identify import leaf

Shape = tuple[int, ...]
# Names at least this alike may be one parameter when nothing else decides.
LIKE = 0.7


@dataclasses.dataclass(frozen=True)
class Match:
    """How a checkpoint's parameters fit a network.

    Attributes
    ----------
    matched
        Equal name and shape.
    missing, extra
        In the network only, in the checkpoint only.
    reshaped
        Name to (shape in the checkpoint, shape in the network).
    renamed
        The network's name to the checkpoint's.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: dict[str, tuple]
    renamed: dict[str, str]

    @property
    def total(self) -> int:
        """Number of the network's parameters."""
        return len(self.matched) + len(self.missing) + len(self.reshaped) + len(self.renamed)

    @property
    def is_exact(self) -> bool:
        """Whether every parameter has its name and shape, and none is too many."""
        return not (self.missing or self.extra or self.reshaped or self.renamed)

    @property
    def is_complete(self) -> bool:
        """Whether the network has a value for every parameter, under whatever name."""
        return not (self.missing or self.reshaped)

    def values(
        self, given: Mapping[str, np.ndarray], expected: Mapping[str, Shape]
    ) -> dict[str, np.ndarray]:
        """Return {the network's name: array} of a checkpoint's arrays, in the network's shapes."""
        found = {name: given[name] for name in self.matched}
        for name, theirs in self.renamed.items():
            found[name] = given[theirs].reshape(expected[name])
        return found


def squeezed(shape: Sequence[int]) -> Shape:
    """Return a shape without the ones at its end: a 1x1 convolution is a dense layer."""
    shape = tuple(shape)
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def spelling(name: str) -> str:
    """Return a name without what spelling may change: case, separators, usual prefixes."""
    name = re.sub(r"^((arg|aux):|module\.|model\.)+", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", name)


def _places(names: Iterable[str], anchors: Any) -> dict[str, tuple]:
    """Return {name: (anchor before it, rank behind that)} of the names that are no anchors."""
    places, last, rank = {}, None, 0
    for name in names:
        if name in anchors:
            last, rank = name, 0
        else:
            places[name] = (last, rank)
            rank += 1
    return places


def _pair_in_place(missing, extra, our_places, their_places, fits):
    """Pair, behind each common parameter, missing and extra ones in their order."""
    waiting = defaultdict(list)
    for name in sorted(extra, key=lambda n: their_places[n][1]):
        waiting[their_places[name][0]].append(name)
    pairs = {}
    for name in sorted(missing, key=lambda n: our_places[n][1]):
        candidates = waiting[our_places[name][0]]
        # One that says it is a gamma is no beta; one that says nothing may be either.
        found = next((other for other in candidates if fits(name, other)), None)
        if found is not None:
            pairs[name] = found
            candidates.remove(found)
    return pairs


def match_params(
    expected: Mapping[str, Shape],
    given: Mapping[str, Any],
    order: Optional[Sequence[str]] = None,
) -> Match:
    """Compare a network's parameters with a checkpoint's.

    Parameters
    ----------
    expected
        The network's names, in its order, to shapes.
    given
        The checkpoint's names to arrays or anything with a ``shape``.
    order
        Names in the order of the checkpoint's graph; by default the order of ``given``.

    Returns
    -------
    Match
    """
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    matched = [n for n, shape in expected.items() if shapes.get(n) == tuple(shape)]
    reshaped = {
        name: (shapes[name], tuple(shape))
        for name, shape in expected.items()
        if name in shapes and shapes[name] != tuple(shape)
    }
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    renamed = {}

    def fits(ours, theirs, strict=True):
        same = leaf(ours) == leaf(theirs) or (not strict and leaf(theirs) is None)
        return same and squeezed(expected[ours]) == squeezed(shapes[theirs])

    def take(pairs):
        renamed.update(pairs)
        for ours, theirs in pairs.items():
            missing.remove(ours)
            extra.remove(theirs)

    by_spelling = defaultdict(list)
    for name in extra:
        by_spelling[spelling(name)].append(name)
    for name in list(missing):
        candidates = by_spelling[spelling(name)]
        if len(candidates) == 1 and fits(name, candidates[0]):
            take({name: candidates.pop()})
    anchors = set(matched) | set(reshaped)
    ranks = {name: rank for rank, name in enumerate(order or ())}
    # What the graph does not know stands where it stands in the file.
    in_order = [name for name in order or () if name in shapes]
    in_order = in_order if set(extra) <= ranks.keys() else list(shapes)
    for strict in (True, False):
        ours, theirs = _places(expected, anchors), _places(in_order, anchors)
        take(_pair_in_place(missing, extra, ours, theirs, lambda a, b, s=strict: fits(a, b, s)))
    for name in list(extra):
        likeness = sorted(
            (difflib.SequenceMatcher(None, name, other).ratio(), other)
            for other in missing
            if fits(other, name, strict=False)
        )
        best = likeness[-1][0] if likeness else 0.0
        # The likeliest, unless another one is as likely.
        if best >= LIKE and sum(ratio == best for ratio, _ in likeness) == 1:
            take({likeness[-1][1]: name})
    for name in list(extra):
        fitting = [other for other in missing if fits(other, name, strict=False)]
        rivals = [other for other in extra if fitting and fits(fitting[0], other, strict=False)]
        if len(fitting) == len(rivals) == 1:
            take({fitting[0]: name})
    renamed = {name: renamed[name] for name in expected if name in renamed}
    return Match(tuple(matched), tuple(missing), tuple(extra), reshaped, renamed)


def top_classes(row: np.ndarray, count: int = 5) -> list[int]:
    """Return the classes of the largest values, the largest first; of equals the lower one."""
    return [int(index) for index in np.argsort(-row, kind="stable")[:count]]


def compare_outputs(theirs: np.ndarray, ours: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Return how much two arrays of logits (n, classes) differ, for the report."""
    finite = bool(np.isfinite(theirs).all() and np.isfinite(ours).all())
    largest = float(np.abs(theirs).max())
    difference = float(np.abs(theirs.astype("float64") - ours).max()) if finite else None
    relative = difference / largest if difference is not None and largest > 0 else difference
    pairs = [(top_classes(a), top_classes(b)) for a, b in zip(theirs, ours)]
    return {
        "inputs": len(pairs),
        "finite": finite,
        "largest_logit": largest if finite else None,
        "largest_difference": difference,
        "largest_relative_difference": relative,
        "tolerance": tolerance,
        "top1_agreement": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "top5_agreement": float(np.mean([set(a) == set(b) for a, b in pairs])),
        "equal": relative is not None and relative <= tolerance,
        "top5": [{"checkpoint": a, "network": b} for a, b in pairs],
    }


def _ratio(value: Any, by: Any) -> Optional[float]:
    """Return a quotient, or None where it is not finite: JSON knows no NaN."""
    quotient = float(value) / float(by) if by else float("nan")
    return quotient if np.isfinite(quotient) else None


def layer_distances(
    base: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare two sets of parameters of one network, layer by layer.

    Parameters
    ----------
    base, other
        Name to NumPy array; what has no partner of its shape is left out.

    Returns
    -------
    weights
        ``layer``, ``relative_distance`` (norm of the difference by that of ``base``), ``cosine``.
    statistics
        ``layer``, ``mean_shift`` (mean over channels of the distance of the running means in
        standard deviations of ``base``), ``var_log_ratio`` (mean absolute logarithm of the ratio
        of the running variances).

    A figure that is not finite is None.
    """
    # {layer: {kind of parameter: (base, other)}}
    layers: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, value in base.items():
        if name not in other or other[name].shape != value.shape:
            continue
        kind = leaf(name) or "weight"
        pair = (value.astype("float64").ravel(), other[name].astype("float64").ravel())
        layers.setdefault(name[: -len(kind) - 1], {})[kind] = pair
    weights, statistics = [], []
    for layer, parts in layers.items():
        learnt = [pair for kind, pair in parts.items() if not kind.startswith("moving_")]
        if learnt:
            a, b = (np.concatenate(values) for values in zip(*learnt))
            norms = np.linalg.norm(a), np.linalg.norm(b)
            distance, cosine = (
                _ratio(np.linalg.norm(b - a), norms[0]),
                _ratio(a @ b, np.prod(norms)),
            )
            weights.append({"layer": layer, "relative_distance": distance, "cosine": cosine})
        if {"moving_mean", "moving_var"} <= parts.keys():
            (mean_a, mean_b), (var_a, var_b) = parts["moving_mean"], parts["moving_var"]
            least = np.finfo("float32").tiny
            var_a, var_b = np.maximum(var_a, least), np.maximum(var_b, least)
            shift = _ratio(np.sum(np.abs(mean_b - mean_a) / np.sqrt(var_a)), len(var_a))
            log_ratio = _ratio(np.sum(np.abs(np.log(var_b / var_a))), len(var_a))
            row = {"layer": layer, "mean_shift": shift, "var_log_ratio": log_ratio}
            statistics.append(row)
    return weights, statistics
