"""How different the positions of a map are to a block: GCNet's statistics, and the same of GloRe.

GCNet (Cao et al., 2019, arXiv 1904.11492, section 3.1) measures that Non-local attention hardly
depends on the query: the mean over all ordered pairs of positions of one image, i = j included, of
a distance of two vectors, which are a block's input at a position, what it adds there, or a row of
its attention. The distances are (1 - cos) / 2 and the Jensen-Shannon divergence (natural
logarithm). All sums are in float64.
"""

from typing import NamedTuple, Optional

import numpy as np

from .internals import View

# Rows of attention that divergences are averaged over; of more, so many evenly spaced ones are
# taken: the work grows with the square.
MOST_ROWS = 196


def cosine_distance(vectors: np.ndarray) -> float:
    """Return the mean of (1 - cos(v_i, v_j)) / 2 over all ordered pairs, i = j included.

    Parameters
    ----------
    vectors
        (N, C). Rows of zeros, of which there is no cosine, are left out.

    Returns
    -------
    float
        From 0 (all point one way) to 1; NaN if all rows are zero. Of vectors without a negative
        number at most 0.5.

    Notes
    -----
    The mean cosine of all pairs is the squared length of the mean unit vector: O(N C).
    """
    vectors = np.asarray(vectors, "float64")
    length = np.linalg.norm(vectors, axis=1)
    if not length.any():
        return float("nan")
    unit = vectors[length > 0] / length[length > 0, None]
    return float((1 - (unit.mean(0) ** 2).sum()) / 2)


def divergence(rows: np.ndarray, most_rows: int = MOST_ROWS) -> float:
    """Return the mean Jensen-Shannon divergence of all ordered pairs of rows, i = j included.

    Parameters
    ----------
    rows
        (N, L), each not negative with sum 1.
    most_rows
        So many evenly spaced rows stand for more.

    Returns
    -------
    float
        From 0 to ln 2.
    """
    rows = np.asarray(rows, "float64")
    if len(rows) > most_rows:
        rows = rows[np.linspace(0, len(rows) - 1, most_rows).round().astype(int)]

    def negative_entropy(p):
        return (p * np.log(np.where(p > 0, p, 1))).sum(-1)

    own, total = negative_entropy(rows), 0.0
    for number, row in enumerate(rows):
        mixture = negative_entropy((row + rows) / 2)
        total += float(((own[number] + own) / 2 - mixture).sum())
    return max(0.0, total / len(rows) ** 2)


def effective_rank(matrix: np.ndarray) -> float:
    """Return exp of the entropy of the singular values' shares (Roy and Vetterli 2007).

    1 for a matrix of rank one, the number of rows if they are orthogonal and of one length; 0 for
    zeros.
    """
    values = np.linalg.svd(np.asarray(matrix, "float64"), compute_uv=False)
    if not values.any():
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


class Statistics(NamedTuple):
    """Means over the samples of a batch; None where a figure has no meaning.

    Attributes
    ----------
    samples, positions
    input, output
        Cosine distance of the block's input at two positions, and of what it adds there; NaN for a
        block that adds nothing, which is untrained.
    attention, divergence
        Of the attention rows of two positions: cosine distance and divergence, the latter only
        where rows are distributions.
    nodes
        GloRe: cosine distance of the projection weights of two nodes.
    states
        GloRe: cosine distance of the states of two nodes.
    rank
        GloRe: effective rank of the projection weights, at most the number of nodes.
    """

    samples: int
    positions: int
    input: float
    output: Optional[float]
    attention: Optional[float] = None
    divergence: Optional[float] = None
    nodes: Optional[float] = None
    states: Optional[float] = None
    rank: Optional[float] = None


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def statistics(view: View) -> Statistics:
    """Return the statistics of a block for a batch.

    GC and SNL have one map for all positions, so that their rows are equal by construction; SE has
    no map, and what it multiplies with is no vector per position.
    """
    kind, weights = view.block.kind, view.weights
    source = _mean([cosine_distance(sample.T) for sample in view.data])
    output = None
    if kind != "se":
        output = _mean([cosine_distance(sample.T) for sample in view.added])
    positions = view.data.shape[2]
    result = Statistics(len(weights), positions, source, output)
    if kind == "nl":
        result = result._replace(attention=_mean([cosine_distance(rows) for rows in weights]))
        if view.block.is_distribution:
            result = result._replace(divergence=_mean([divergence(rows) for rows in weights]))
    elif kind in ("gc", "snl"):
        result = result._replace(attention=0.0, divergence=0.0)
    elif kind == "glore":
        result = result._replace(
            nodes=_mean([cosine_distance(sample) for sample in weights]),
            states=_mean([cosine_distance(sample.T) for sample in view.nodes]),
            rank=_mean([effective_rank(sample) for sample in weights]),
        )
    return result


def random_rows(positions: int, keys: int, seed: int = 0) -> tuple[float, float]:
    """Return (cosine distance, divergence) of softmax rows of normal scores: no structure at all.

    Parameters
    ----------
    positions, keys
        Rows and their length.
    seed
    """
    scores = np.random.default_rng(seed).standard_normal((positions, keys))
    rows = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return cosine_distance(rows), divergence(rows)


def random_vectors(positions: int, channels: int, rectified: bool, seed: int = 0) -> float:
    """Return the cosine distance of normal vectors, or of what a relu leaves of them."""
    vectors = np.random.default_rng(seed).standard_normal((positions, channels))
    return cosine_distance(np.maximum(vectors, 0) if rectified else vectors)


def drift(before: np.ndarray, after: np.ndarray) -> float:
    """Return how far the nodes' maps have turned: mean over nodes of 1 - cos.

    Parameters
    ----------
    before, after
        (n, N, L) projection weights of the same inputs, of two stages of a training. A node's
        vector is its map on all inputs.

    Returns
    -------
    float
        0 for the same maps up to positive factors, 1 for unrelated ones, 2 for opposite ones; NaN
        where no node has a map.
    """
    one, other = (
        np.asarray(part, "float64").transpose(1, 0, 2).reshape(part.shape[1], -1)
        for part in (before, after)
    )
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    known = lengths > 0
    cosine = (one[known] * other[known]).sum(1) / lengths[known]
    return max(0.0, _mean(list(1 - cosine))) if known.any() else float("nan")
