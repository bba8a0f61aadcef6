"""Objects with boxes and masks: Mask R-CNN's five losses, and how well objects are found.

The losses are those of GCNet (Cao et al., 2019; project xvjiarui/GCNet, on mmdetection 1), but each
is the mean of an image's own samples: the loss of a step, the mean over images, does not depend on
how a batch is divided between devices and workers. A mean over no samples is 0, with gradient 0.
"""

from typing import Any, Callable, Optional

import numpy as np

from mxnet_compat import mx

from .task import Task

PARTS = ("loss-rpn-class", "loss-rpn-box", "loss-class", "loss-box", "loss-mask")
# Scores are counted in so many bins.
BINS = 50
# An object is found by a box of its class that overlaps it so much.
OVERLAP = 0.5


def smooth_l1(difference: Any, beta: float) -> Any:
    """Return d**2 / 2 beta where d is below beta, else d - beta / 2."""
    return mx.nd.smooth_l1(difference, scalar=beta**-0.5)


def binary_cross_entropy(logits: Any, target: Any) -> Any:
    """Return the cross entropy of each logit, without overflow."""
    return (
        mx.nd.relu(logits)
        - logits * target
        + mx.nd.Activation(-mx.nd.abs(logits), act_type="softrelu")
    )


def matches(found: Any, truth: Any) -> np.ndarray:
    """Return which found boxes are right: each object is found once, by the best box.

    Parameters
    ----------
    found, truth
        Have ``boxes`` (k, 4) and ``classes`` (k,); those of ``found`` come in order of their
        scores.
    """
    right, taken = np.zeros(len(found.boxes), bool), np.zeros(len(truth.boxes), bool)
    for place, (box, label) in enumerate(zip(found.boxes, found.classes)):
        low = np.maximum(box[:2], truth.boxes[:, :2])
        sides = np.maximum(np.minimum(box[2:], truth.boxes[:, 2:]) - low, 0)
        shared = sides[:, 0] * sides[:, 1]
        areas = np.prod(truth.boxes[:, 2:] - truth.boxes[:, :2], axis=1)
        overlap = shared / np.maximum(areas + np.prod(box[2:] - box[:2]) - shared, 1e-9)
        overlap[taken | (truth.classes != label)] = 0
        if len(overlap) and overlap.max() >= OVERLAP:
            taken[overlap.argmax()] = right[place] = True
    return right


def binned_ap(right: np.ndarray, wrong: np.ndarray, objects: float) -> float:
    """Return the average precision of detections counted by score, the lowest bin first."""
    right, wrong = right[::-1].cumsum(), wrong[::-1].cumsum()
    precision = right / np.maximum(right + wrong, 1)
    # The best precision at a recall or above it.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(right, prepend=0) * precision).sum() / objects)


class Detection(Task):
    """Losses of proposals, boxes and masks; in validation also the precision of boxes.

    ``ap50``, the figure that chooses the best epoch, is the average precision at overlap 0.5 of all
    classes' detections together, with scores in 50 bins: a figure that adds up over batches and
    workers. COCO's own, class by class, are those of ``evaluate.py``.

    Parameters
    ----------
    read
        ``read(label row)`` gives what is true of an image: ``size``, ``boxes``, ``classes``,
        ``masks``, ``seed``.
    proposals
        Rules of proposals in training and in testing.
    anchors, rois
        Rules of samples; None for the network's.
    detections
        Rule of detections.
    beta
        Where the loss of proposals' boxes turns from square to linear; that of the boxes: 1.
    """

    figures = ("ap50", *PARTS)

    def __init__(
        self,
        read: Callable[[np.ndarray], Any],
        proposals: tuple[Any, Any],
        anchors: Any,
        rois: Any,
        detections: Any,
        beta: float = 1 / 9,
    ) -> None:
        self.read = read
        self.proposals = proposals
        self.anchors = anchors
        self.rois = rois
        self.detections = detections
        self.beta = beta
        self.sums = (
            *PARTS,
            *(f"{what}_{number}" for what in ("right", "wrong") for number in range(BINS)),
            "objects",
        )

    def prepare(self, data: Any, label: Any, generator: np.random.RandomState) -> tuple[Any, Any]:
        """Give each image the seed of what is drawn for it: the label's first number."""
        label[:, 0] = mx.nd.array(generator.randint(1, 2**24, label.shape[0]))
        return data, label

    def forward(
        self, block: Any, data: Any, label: mx.nd.NDArray, smoothing: float = 0.0
    ) -> tuple[Any, mx.nd.NDArray]:
        """Return the five losses (n, 5) with what was found, and their sum (n,).

        Parameters
        ----------
        block
            A :class:`network.detector.Detector`.
        data
            (n, 3, h, w).
        label
            (n, L), for ``read``.
        smoothing
            Not used.
        """
        maps = block(data)
        training = mx.autograd.is_training()
        counts = np.zeros(2 * BINS + 1, np.float32)
        with mx.autograd.pause(train_mode=training):
            truth = [self.read(row) for row in label.asnumpy()]
            samples = block.choose(
                maps, truth, self.proposals[not training], self.anchors, self.rois
            )
            if not training:
                sizes = [each.size for each in truth]
                found = block.find(maps, sizes, self.proposals[1], self.detections)
                for one, other in zip(found, truth):
                    counts += self._counted(one, other)
        losses = mx.nd.stack(*self._losses(block, maps, samples), axis=1)
        return (losses, mx.nd.array(counts, ctx=losses.context)), losses.sum(axis=1)

    def _losses(self, block: Any, maps: Any, samples: Any) -> list[mx.nd.NDArray]:
        context = maps.scores.context

        def on_device(array: np.ndarray) -> mx.nd.NDArray:
            whole = array.dtype.kind == "i"
            return mx.nd.array(array, ctx=context, dtype="int32" if whole else "float32")

        # Anchors: (n, T) -> (n, s)
        places = on_device(samples.anchor_places)
        labels, weights = on_device(samples.anchor_labels), on_device(samples.anchor_weights)
        scores = maps.scores.reshape((-1,)).take(places).astype("float32")
        share = 1 / mx.nd.maximum(weights.sum(axis=1), 1)
        rpn_class = (binary_cross_entropy(scores, labels) * weights).sum(axis=1) * share
        deltas = maps.deltas.reshape((-1, 4)).take(places).astype("float32")
        off = smooth_l1(deltas - on_device(samples.anchor_deltas), self.beta).sum(axis=2)
        rpn_box = (off * labels).sum(axis=1) * share
        # ROIs: (n * r, 1 + classes), (n * r, classes, 4)
        images, most = samples.roi_labels.shape
        scores, deltas = block.boxes(maps, samples.rois)
        flat = samples.roi_labels.reshape(-1)
        chosen = mx.nd.log_softmax(scores.astype("float32")).pick(on_device(flat))
        weights = on_device(samples.roi_weights)
        share = 1 / mx.nd.maximum(weights.sum(axis=1), 1)
        own_class = -(chosen.reshape((images, most)) * weights).sum(axis=1) * share
        classes = deltas.shape[1]
        rows = np.arange(len(flat)) * classes + np.maximum(flat - 1, 0)
        # (n * r, classes, 4) -> (n * r, 4) -> (n, r, 4)
        deltas = deltas.reshape((-1, 4)).take(on_device(rows)).astype("float32")
        off = deltas.reshape((images, most, 4)) - on_device(samples.roi_deltas)
        positive = on_device((samples.roi_labels > 0).astype(np.float32))
        own_box = (smooth_l1(off, 1.0).sum(axis=2) * positive).sum(axis=1) * share
        return [rpn_class, rpn_box, own_class, own_box, self._mask_loss(block, maps, samples)]

    def _mask_loss(self, block: Any, maps: Any, samples: Any) -> mx.nd.NDArray:
        context, count = maps.scores.context, len(samples.mask_rois)
        logits = block.masks(maps, samples.mask_rois).astype("float32")
        rows = np.arange(count) * logits.shape[1] + samples.mask_labels - 1
        # (m, classes, 28, 28) -> (m, 28, 28)
        own = logits.reshape((-3, 0, 0)).take(mx.nd.array(rows, ctx=context, dtype="int32"))
        each = binary_cross_entropy(own, mx.nd.array(samples.masks, ctx=context)).mean(axis=(1, 2))
        # (n, m) x (m,) -> (n,)
        return mx.nd.dot(mx.nd.array(samples.mask_weights, ctx=context), each)

    def _counted(self, found: Any, truth: Any) -> np.ndarray:
        right = matches(found, truth)
        place = np.minimum((found.scores * BINS).astype(int), BINS - 1)
        counts = (np.bincount(place[rows], minlength=BINS) for rows in (right, ~right))
        return np.concatenate([*counts, [len(truth.boxes)]]).astype(np.float32)

    def count(self, output: Any, label: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        """Return the sums of the losses over images, and the counts of :meth:`forward`."""
        losses, counts = output
        return [losses.sum(axis=0), counts]

    def means(
        self, totals: dict[str, float], since: Optional[dict[str, float]] = None
    ) -> dict[str, Optional[float]]:
        """Return the mean of the losses, and ``ap50``: None where nothing was looked for."""
        means = super().means(totals, since)
        if since is not None:
            totals = {name: value - since[name] for name, value in totals.items()}
        right, wrong = (
            np.array([totals[f"{what}_{number}"] for number in range(BINS)])
            for what in ("right", "wrong")
        )
        objects = totals["objects"]
        return {
            "loss": means["loss"],
            "ap50": binned_ap(right, wrong, objects) if objects else None,
            **{name: means[name] for name in PARTS},
        }
