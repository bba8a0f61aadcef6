"""A detector as a Gluon block: its parts, and what stands between them.

Proposals, suppression and the choice of levels are computed in NumPy (:mod:`network.boxes`) from
the network's outputs, as no gradient flows through them. So batches may have any number of images,
of ROIs and of objects, which gluoncv's Mask R-CNN fixes when it is built.

**Pooling.** gluoncv pools every box on every level and marks the boxes of other levels by the batch
index -1. ``contrib.ROIAlign`` of MXNet 1.9.1 leaves the rows of such boxes uninitialised on a CPU:
sums over levels hold what happened to be in memory, parameters become NaN while losses look
healthy.
Here each level pools its own boxes only, and the rows are put back in order (:func:`pool`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from mxnet_compat import mx

from .block import SymbolNet, build_block
from .boxes import (
    anchors_of,
    clip,
    decode,
    encode,
    level_of,
    suppress,
    suppress_by_class,
)
from .builder import InputConf
from .initializer import Rule, small_normal
from .specs import Spec
from .symbol_detection import (
    BOX_HEAD,
    LEVELS,
    MASK_CELLS,
    MASK_HEAD,
    STRIDES,
    head_shapes,
    trunk_nodes,
)
from .targets import (
    ANCHOR_RULE,
    ROI_RULE,
    SampleRule,
    choose_anchors,
    choose_rois,
    mask_targets,
)

# Deviations that a box's shifts are divided by.
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
# Points per side of a pooled cell.
SAMPLES = 2
# Masks are computed for a number of boxes that is a multiple of this: few shapes, little waste.
MASK_GROUP = 8
# What depends on the number of classes.
CLASS_LAYERS = ("box_score", "box_delta", "mask_score_conv")
# Of what is not the backbone.
HEADS = r"^(p\d_(lateral_)?conv|rpn|box|mask)_"


def tiny_normal(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return a normal weight of standard deviation 0.001."""
    return small_normal(shape, generator) / 10


# How the heads start, as in GCNet; the rest as by default.
RULES: tuple[Rule, ...] = (
    (r"^rpn_\w+_weight$", small_normal),
    (r"^box_score_weight$", small_normal),
    (r"^box_delta_weight$", tiny_normal),
)


class ProposalRule(NamedTuple):
    """Which boxes are proposed.

    ``before`` and ``after`` suppression on each level, ``most`` in all levels together. With
    ``together`` levels are not told apart (gluoncv).
    """

    before: int
    after: int
    most: int
    threshold: float = 0.7
    together: bool = False


# In training and in testing; the second pair is gluoncv's.
PROPOSALS = {
    "gcnet": (ProposalRule(2000, 2000, 2000), ProposalRule(1000, 1000, 1000)),
    "gluoncv": (
        ProposalRule(12000, 12000, 2000, together=True),
        ProposalRule(6000, 6000, 1000, together=True),
    ),
}


class DetectionRule(NamedTuple):
    """Which boxes are objects: score, overlap within a class, most of an image."""

    score: float = 0.05
    overlap: float = 0.5
    most: int = 100


class Maps(NamedTuple):
    """What the trunk makes of a batch of n images.

    ``features``: p2 to p6; ``scores`` (n, T) logits and ``deltas`` (n, T, 4) of the T anchors;
    ``anchors`` of each level, NumPy (t, 4).
    """

    features: list
    scores: Any
    deltas: Any
    anchors: tuple[np.ndarray, ...]


class Samples(NamedTuple):
    """What a batch teaches: see :meth:`Detector.choose`. NumPy; a weight of 0 fills up.

    ``anchor_places`` (n, s) places in the flat scores of the batch, ``anchor_labels`` and
    ``anchor_weights`` (n, s), ``anchor_deltas`` (n, s, 4); ``rois`` (n * r, 5), ``roi_labels``
    (n, r) with 0 for background, ``roi_weights`` (n, r), ``roi_deltas`` (n, r, 4); ``mask_rois``
    (m, 5), ``mask_labels`` (m,) from 1, ``masks`` (m, 28, 28), ``mask_weights`` (n, m): the share
    of each mask in its image's loss.
    """

    anchor_places: np.ndarray
    anchor_labels: np.ndarray
    anchor_weights: np.ndarray
    anchor_deltas: np.ndarray
    rois: np.ndarray
    roi_labels: np.ndarray
    roi_weights: np.ndarray
    roi_deltas: np.ndarray
    mask_rois: np.ndarray
    mask_labels: np.ndarray
    masks: np.ndarray
    mask_weights: np.ndarray


class Found(NamedTuple):
    """Objects of one image, the best first, in its pixels: (k, 4), (k,), (k,), (k, 28, 28)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: Optional[np.ndarray] = None


def pool(
    features: Sequence[mx.nd.NDArray],
    rois: np.ndarray,
    cells: int,
    strides: Sequence[int] = STRIDES,
) -> mx.nd.NDArray:
    """Pool boxes from the levels that their sizes belong to (RoIAlign).

    Parameters
    ----------
    features
        p2, p3, p4, p5, …: (n, c, h, w).
    rois
        (R, 5) float32: image of the batch, and box.
    cells
        Side of the grid.
    strides
        Of the levels.

    Returns
    -------
    mx.nd.NDArray
        (R, c, cells, cells), on the features' device.
    """
    context = features[0].context
    levels = level_of(rois[:, 1:]) - LEVELS[0]
    parts, places = [], []
    for level in np.unique(levels):
        own = np.flatnonzero(levels == level)
        places.append(own)
        parts.append(
            mx.nd.contrib.ROIAlign(
                features[level],
                mx.nd.array(rois[own], ctx=context, dtype=features[level].dtype),
                pooled_size=(cells, cells),
                spatial_scale=1 / strides[level],
                sample_ratio=SAMPLES,
            )
        )
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate(places))
    return mx.nd.concat(*parts, dim=0).take(mx.nd.array(order, ctx=context, dtype="int32"))


def propose(
    anchors: Sequence[np.ndarray],
    scores: np.ndarray,
    deltas: np.ndarray,
    size: tuple[float, float],
    rule: ProposalRule,
    most_growth: float,
) -> np.ndarray:
    """Return the boxes of one image that probably hold an object, (k, 4), the best first.

    Parameters
    ----------
    anchors
        Of each level, (t, 4).
    scores, deltas
        (T,) and (T, 4), level after level.
    size
        (height, width) of the image in the batch.
    rule, most_growth
    """
    groups = [np.concatenate(anchors)] if rule.together else anchors
    found_boxes, found_scores, start = [], [], 0
    for group in groups:
        part = slice(start, start + len(group))
        start += len(group)
        own, count = scores[part], min(rule.before, len(group))
        # Of equal scores the earlier ones, on any machine.
        best = np.argsort(-own, kind="stable")[:count]
        boxes = clip(decode(group[best], deltas[part][best], most_growth=most_growth), *size)
        whole = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
        boxes, best = boxes[whole], best[whole]
        kept = suppress(
            boxes, own[best], rule.threshold, rule.most if rule.together else rule.after
        )
        found_boxes.append(boxes[kept])
        found_scores.append(own[best[kept]])
    boxes, merit = np.concatenate(found_boxes), np.concatenate(found_scores)
    return boxes[np.argsort(-merit, kind="stable")[: rule.most]].astype(np.float32)


class Detector(mx.gluon.Block):
    """Mask R-CNN: called with a batch of images it gives :class:`Maps`.

    Parameters
    ----------
    symbol
        Of :func:`network.builder.get_symbol`.
    spec
        Its row, overrides applied.
    contexts
        Where the parameters go.
    graph
        What is computed, if it is another form of ``symbol`` (:mod:`network.batch_norm`).
    **how
        ``params``, ``seed``, ``lr_mult``, ``wd_mult``, ``training`` of
        :func:`network.block.build_block`.

    Attributes
    ----------
    symbol
        What a checkpoint stores.
    spec
    trunk, box_head, mask_head : SymbolNet
    """

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        spec: Spec,
        contexts: Sequence[mx.Context],
        graph: Optional[mx.sym.Symbol] = None,
        **how: Any,
    ) -> None:
        super().__init__(prefix="")
        self.symbol = symbol
        self.spec = spec
        shapes = {"data": (1, *spec.data_shape), **head_shapes(spec)}
        graph = symbol if graph is None else graph

        def part(name: str, nodes: tuple[str, ...]) -> SymbolNet:
            conf = InputConf(shapes[name][1:], spec.mean, spec.std, name)
            rules = None if how.get("params") else RULES
            output = nodes if len(nodes) > 1 else nodes[0]
            return build_block(graph, conf, contexts, output=output, initializer=rules, **how)

        self.trunk = part("data", trunk_nodes(spec))
        self.box_head = part("box_features", BOX_HEAD)
        self.mask_head = part("mask_features", MASK_HEAD)

    def forward(self, data: mx.nd.NDArray) -> Maps:
        """Return the :class:`Maps` of images (n, 3, h, w)."""
        *features, scores, deltas = self.trunk(data)
        sizes = tuple((int(f.shape[2]), int(f.shape[3])) for f in features)
        head = self.spec.detector
        return Maps(
            features,
            scores,
            deltas,
            anchors_of(sizes, STRIDES, head.anchor_scale, head.rounded_anchors),
        )

    def proposals(
        self, maps: Maps, sizes: Sequence[tuple[float, float]], rule: ProposalRule
    ) -> list[np.ndarray]:
        """Return the proposals of each image (:func:`propose`); no gradient flows through them.

        ``sizes`` are (height, width) of each image in the batch, without what fills it up.
        """
        scores, deltas = maps.scores.asnumpy(), maps.deltas.asnumpy()
        growth = self.spec.detector.most_growth
        return [
            propose(maps.anchors, *each, size, rule, growth)
            for each, size in zip(zip(scores, deltas), sizes)
        ]

    def choose(
        self,
        maps: Maps,
        truth: Sequence[Any],
        proposal_rule: ProposalRule,
        anchor_rule: SampleRule = ANCHOR_RULE,
        roi_rule: SampleRule = ROI_RULE,
    ) -> Samples:
        """Choose the anchors and ROIs that are learnt from, with their targets.

        Parameters
        ----------
        maps
        truth
            Of each image: ``size`` (height, width) in the batch, ``boxes`` (k, 4), ``classes``
            (k,) from 0, ``masks`` (k, s, s) within the boxes, and ``seed`` of the choice.
        proposal_rule, anchor_rule, roi_rule
        """
        proposed = self.proposals(maps, [each.size for each in truth], proposal_rule)
        anchors = np.concatenate(maps.anchors)
        images, most = len(truth), roi_rule.number
        none = np.zeros(0, np.float32)
        made = Samples(
            anchor_places=np.zeros((images, anchor_rule.number), np.int64),
            anchor_labels=np.zeros((images, anchor_rule.number), np.float32),
            anchor_weights=np.zeros((images, anchor_rule.number), np.float32),
            anchor_deltas=np.zeros((images, anchor_rule.number, 4), np.float32),
            rois=np.zeros((images, most, 5), np.float32),
            roi_labels=np.zeros((images, most), np.int64),
            roi_weights=np.zeros((images, most), np.float32),
            roi_deltas=np.zeros((images, most, 4), np.float32),
            mask_rois=none,
            mask_labels=none,
            masks=none,
            mask_weights=none,
        )
        mask_rois, mask_labels, masks = [], [], []
        for image, each in enumerate(truth):
            rng = np.random.default_rng(each.seed)
            chosen, deltas = choose_anchors(anchors, each.boxes, each.size, anchor_rule, rng)
            count, right = len(chosen.places), chosen.positives
            made.anchor_places[image, :count] = chosen.places
            made.anchor_places[image] += image * len(anchors)
            made.anchor_labels[image, :right] = 1
            made.anchor_weights[image, :count] = 1
            made.anchor_deltas[image, :right] = deltas
            boxes, chosen = choose_rois(proposed[image], each.boxes, roi_rule, rng)
            boxes, count, right = boxes[chosen.places], len(chosen.places), chosen.positives
            made.rois[image, :, 0] = image
            made.rois[image, :count, 1:] = boxes
            # What fills up is a box like any other: it is computed and not learnt.
            made.rois[image, count:, 3:] = 1
            made.roi_labels[image, :right] = 1 + each.classes[chosen.objects]
            made.roi_weights[image, :count] = 1
            own = each.boxes[chosen.objects]
            made.roi_deltas[image, :right] = encode(boxes[:right], own, BOX_STDS)
            mask_rois.append(boxes[:right])
            mask_labels.append(made.roi_labels[image, :right])
            masks.append(
                mask_targets(boxes[:right], own, each.masks[chosen.objects], 2 * MASK_CELLS)
            )
        counts = [len(each) for each in mask_rois]
        shares = np.zeros((images, sum(counts)), np.float32)
        ends = np.cumsum(counts)
        for image, (end, count) in enumerate(zip(ends, counts)):
            shares[image, end - count : end] = 1 / max(count, 1)
        if not sum(counts):
            # The mask head computes something all the same, or it would have no gradient at all,
            # which is an error of the trainer's.
            mask_rois[0] = np.array([[0, 0, 1, 1]], np.float32)
            mask_labels[0] = np.ones(1, np.int64)
            masks[0] = np.zeros((1, 2 * MASK_CELLS, 2 * MASK_CELLS), np.float32)
            shares = np.zeros((images, 1), np.float32)
        missing = -len(shares[0]) % MASK_GROUP
        return made._replace(
            rois=made.rois.reshape(-1, 5),
            mask_rois=filled(with_image(mask_rois), MASK_GROUP),
            mask_labels=filled(np.concatenate(mask_labels), MASK_GROUP),
            masks=filled(np.concatenate(masks), MASK_GROUP),
            mask_weights=np.pad(shares, ((0, 0), (0, missing))),
        )

    def boxes(self, maps: Maps, rois: np.ndarray) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return scores (R, 1 + classes) and shifts (R, classes, 4) of ROIs (R, 5)."""
        cells = self.spec.detector.box_cells
        scores, deltas = self.box_head(pool(maps.features, rois, cells))
        # (R, 4 classes) -> (R, classes, 4)
        return scores, deltas.reshape((0, -1, 4))

    def masks(self, maps: Maps, rois: np.ndarray) -> mx.nd.NDArray:
        """Return the logits of masks (M, classes, 28, 28) of ROIs (M, 5)."""
        return self.mask_head(pool(maps.features, rois, MASK_CELLS))

    def detect(
        self,
        data: mx.nd.NDArray,
        sizes: Sequence[tuple[float, float]],
        proposal_rule: ProposalRule = PROPOSALS["gcnet"][1],
        rule: DetectionRule = DetectionRule(),  # noqa: B008
        masks: bool = True,
    ) -> list[Found]:
        """Find the objects of images.

        Parameters
        ----------
        data
            (n, 3, h, w).
        sizes
            (height, width) of each image within it.
        proposal_rule, rule
        masks
            Compute masks too.
        """
        with mx.autograd.predict_mode():
            return self._detect(self(data), sizes, proposal_rule, rule, masks)

    def find(self, maps: Maps, sizes: Sequence, proposal_rule: ProposalRule, rule: DetectionRule):
        """Return the objects of each image, without masks."""
        return self._detect(maps, sizes, proposal_rule, rule, False)

    def _detect(self, maps, sizes, proposal_rule, rule, masks) -> list[Found]:
        proposed = self.proposals(maps, sizes, proposal_rule)
        rois = with_image(proposed)
        if not len(rois):
            return [self._nothing(masks) for _ in sizes]
        scores, deltas = self.boxes(maps, rois)
        scores, deltas = mx.nd.softmax(scores).asnumpy(), deltas.asnumpy()
        found, start = [], 0
        for boxes, size in zip(proposed, sizes):
            part = slice(start, start + len(boxes))
            start += len(boxes)
            found.append(self._objects(boxes, scores[part], deltas[part], size, rule))
        return self._with_masks(maps, found) if masks else found

    def _nothing(self, masks: bool) -> Found:
        none = np.zeros(0, np.float32)
        empty = np.zeros((0, 2 * MASK_CELLS, 2 * MASK_CELLS), np.float32) if masks else None
        return Found(np.zeros((0, 4), np.float32), none, none.astype(np.int64), empty)

    def _objects(self, boxes, scores, deltas, size, rule: DetectionRule) -> Found:
        # Background is the first column.
        place, label = np.nonzero(scores[:, 1:] > rule.score)
        merit = scores[place, 1 + label]
        growth = self.spec.detector.most_growth
        moved = clip(decode(boxes[place], deltas[place, label], BOX_STDS, growth), *size)
        whole = ((moved[:, 2:] - moved[:, :2]) > 0).all(axis=1)
        moved, merit, label = moved[whole], merit[whole], label[whole]
        kept = suppress_by_class(moved, merit, label, rule.overlap, rule.most)
        return Found(moved[kept].astype(np.float32), merit[kept], label[kept])

    def _with_masks(self, maps: Maps, found: list[Found]) -> list[Found]:
        rois = with_image([each.boxes for each in found])
        if not len(rois):
            return [self._nothing(True) for _ in found]
        labels = np.concatenate([each.classes for each in found])
        logits = self.masks(maps, filled(rois, MASK_GROUP))
        chosen = pick_class(logits, filled(labels, MASK_GROUP))
        masks = mx.nd.sigmoid(chosen)[: len(rois)].asnumpy()
        ends = np.cumsum([len(each.boxes) for each in found])[:-1]
        return [each._replace(masks=part) for each, part in zip(found, np.split(masks, ends))]


def with_image(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Return boxes (k, 4) of each image as ROIs (R, 5), which say the image first."""
    rows = [
        np.concatenate([np.full((len(each), 1), image, np.float32), each], axis=1)
        for image, each in enumerate(boxes)
    ]
    return np.concatenate(rows).astype(np.float32)


def filled(rows: np.ndarray, group: int) -> np.ndarray:
    """Return rows with the first one repeated, until their number is a multiple of ``group``."""
    if not len(rows):
        return rows
    return np.concatenate([rows, np.repeat(rows[:1], -len(rows) % group, axis=0)])


def pick_class(values: mx.nd.NDArray, classes: np.ndarray) -> mx.nd.NDArray:
    """Return what belongs to a class of each row: (R, classes, …), (R,) -> (R, …)."""
    rows, count = values.shape[:2]
    place = mx.nd.array(np.arange(rows) * count + classes, ctx=values.context, dtype="int32")
    return values.reshape((-3, *((0,) * (values.ndim - 2)))).take(place)


def frozen_pattern(stages: int, affine: bool = False) -> Optional[str]:
    """Return which parameters do not learn: a regular expression of their names' beginnings.

    Those of the first ``stages`` (conv1 is the first one); with ``affine`` the gammas and betas of
    all BatchNorms too, but not those of context blocks.
    """
    patterns = [rf"conv[1-{stages}]_"] if stages else []
    patterns += [r"conv\d_.*_bn_(gamma|beta)$"] if affine else []
    return "|".join(patterns) or None


def freeze(block: mx.gluon.Block, pattern: Optional[str]) -> list[str]:
    """Let parameters whose names begin like ``pattern`` keep their values; return the names."""
    names = []
    for name, parameter in block.collect_params().items():
        if pattern is not None and re.match(pattern, name):
            parameter.grad_req = "null"
            names.append(name)
    return names
