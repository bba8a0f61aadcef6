"""Losses of a detector: values, images without objects, twenty steps without a NaN, clipping."""

import numpy as np
import pytest
from train_runs import train_options

from data.detection.objects import CELLS, Truth, label_length, pack, unpack
from mxnet_compat import mx
from network.batch_norm import with_batch_norm
from network.builder import get_symbol, resolve
from network.detector import PROPOSALS, DetectionRule, Detector, freeze, frozen_pattern
from network.targets import ANCHOR_RULE, ROI_RULE
from train.detection import (
    PARTS,
    Detection,
    binary_cross_entropy,
    binned_ap,
    matches,
    smooth_l1,
)
from train.metric import StreamingMetrics
from train.optimizer import make_optimizer
from train.step import Learner

PLACES = 3
SIZE = (64, 96)


def detector(seed=0, contexts=None):
    symbol, _ = get_symbol("mask_rcnn_tiny_w-gc", 2)
    spec = resolve("mask_rcnn_tiny_w-gc")
    return Detector(symbol, spec, contexts or [mx.cpu()], seed=seed)


def task(rois=32):
    rules = tuple(rule._replace(before=100, after=100, most=60) for rule in PROPOSALS["gcnet"])
    return Detection(
        unpack,
        rules,
        ANCHOR_RULE._replace(number=64),
        ROI_RULE._replace(number=rois),
        DetectionRule(),
    )


def label(boxes, seed=1, size=SIZE):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    masks = np.ones((len(boxes), CELLS, CELLS), bool)
    classes = np.arange(len(boxes)) % 2
    return pack(Truth(size, boxes, classes, masks, seed), PLACES)


def batch(*objects, seed=0):
    generator = np.random.RandomState(seed)
    data = generator.normal(0, 1, (len(objects), 3, *SIZE)).astype("f")
    return mx.nd.array(data), mx.nd.array(np.stack([label(each) for each in objects]))


ONE, TWO, NONE = [[8, 8, 40, 40]], [[8, 8, 40, 40], [50, 10, 90, 60]], []


def test_smooth_l1_and_cross_entropy():
    values = mx.nd.array([-2.0, -0.05, 0.0, 0.1, 3.0])
    for beta in (1.0, 1 / 9):
        expected = [
            v * v / (2 * beta) if abs(v) < beta else abs(v) - beta / 2 for v in values.asnumpy()
        ]
        assert smooth_l1(values, beta).asnumpy() == pytest.approx(expected, rel=1e-5)
    logits = mx.nd.array([-100.0, -1.0, 0.0, 2.0, 100.0])
    for target in (0.0, 1.0):
        with np.errstate(over="ignore"):
            x = logits.asnumpy().astype("float64")
            expected = np.logaddexp(0, x) - x * target
        found = binary_cross_entropy(logits, target).asnumpy()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_loss_of_an_image_is_that_of_the_image_alone():
    """A step's loss does not depend on how its images are divided between devices."""
    block, plan = detector(), task()
    # Statistics of a batch would make images depend on each other.
    data, labels = batch(ONE, TWO, NONE)
    with mx.autograd.predict_mode():
        (parts, _), losses = plan.forward(block, data, labels)
        alone = [
            plan.forward(block, data[k : k + 1], labels[k : k + 1])[1].asscalar() for k in range(3)
        ]
    assert losses.asnumpy() == pytest.approx(alone, rel=1e-4)
    assert parts.shape == (3, len(PARTS))
    assert parts.sum(axis=1).asnumpy() == pytest.approx(losses.asnumpy(), rel=1e-5)


def test_an_image_without_objects_has_negatives_only():
    """maskrcnn-benchmark 805, torchvision 2144: no NaN, and no loss of boxes or masks."""
    block, plan = detector(), task()
    data, labels = batch(NONE)
    with mx.autograd.record():
        (parts, _), loss = plan.forward(block, data, labels)
    loss.backward()
    rpn_class, rpn_box, own_class, own_box, mask = parts[0].asnumpy()
    assert rpn_class > 0
    assert own_class > 0
    assert rpn_box == own_box == mask == 0
    for name, parameter in block.collect_params().items():
        if parameter.grad_req == "null":
            continue
        gradient = parameter.grad().asnumpy()
        assert np.isfinite(gradient).all(), name
        if name.startswith(("box_delta", "mask_")):
            assert not gradient.any(), name


def test_boxes_that_log_cannot_take():
    """Mask_RCNN 159: the logarithm of a side of 0; these are left out, thin ones are learnt."""
    block, plan = detector(), task()
    data, labels = batch([[5, 5, 6, 60]])
    _, loss = plan.forward(block, data, labels)
    assert np.isfinite(loss.asnumpy()).all()


def test_twenty_steps_leave_no_parameter_nan():
    """gluoncv's network on a CPU: parameters turn NaN while losses look healthy."""
    block, plan = detector(), task(rois=16)
    learner = Learner(block, make_optimizer("sgd", 0.9, 1e-4), [mx.cpu()], train_options(), plan)
    batches = [[ONE], [NONE], [TWO, ONE], [NONE, TWO], [ONE, NONE, TWO], [NONE, NONE, NONE]]
    before = {name: p.data().asnumpy() for name, p in block.collect_params().items()}
    metrics = StreamingMetrics(plan)
    for step in range(20):
        made = batch(*batches[step % len(batches)], seed=step)
        for result in learner.step([made], 0.01, step + 1):
            metrics.update(*result, step=step)
        assert learner.is_finite(), step
    totals = metrics.totals()
    assert metrics.first_bad is None
    assert totals["samples"] == sum(len(batches[step % len(batches)]) for step in range(20))
    for name, parameter in block.collect_params().items():
        value = parameter.data().asnumpy()
        assert np.isfinite(value).all(), name
        # Images of this size have no anchors on the last levels; a softmax knows no bias.
        unused = name.startswith(("p4_conv", "p5_conv")) or "_mask_conv_bias" in name
        if parameter.grad_req != "null" and not unused:
            assert (value != before[name]).any(), name


def test_frozen_stages_keep_weights_and_statistics():
    symbol, _ = get_symbol("mask_rcnn_tiny", 2)
    frozen = frozen_pattern(2)
    graph = with_batch_norm(symbol, "local", [mx.cpu()], frozen)
    block = Detector(symbol, resolve("mask_rcnn_tiny"), [mx.cpu()], graph, seed=0)
    freeze(block, frozen)
    before = {name: p.data().asnumpy() for name, p in block.collect_params().items()}
    options = train_options()
    learner = Learner(block, make_optimizer("sgd", 0.9, 1e-2), [mx.cpu()], options, task())
    learner.step([batch(ONE, TWO)], 0.1, 3)
    changed = {
        name
        for name, p in block.collect_params().items()
        if (p.data().asnumpy() != before[name]).any()
    }
    assert not any(name.startswith(("conv1", "conv2")) for name in changed)
    assert "conv3_B01_conv-m1_conv_weight" in changed
    assert "conv3_B01_conv-m1_bn_moving_mean" in changed


def test_the_form_of_gluoncv_learns_too():
    spec = resolve("mask_rcnn_tiny", style="gluoncv")
    symbol, _ = get_symbol("mask_rcnn_tiny", 2, style="gluoncv")
    block = Detector(symbol, spec, [mx.cpu()], seed=0)
    plan = task()
    rules = tuple(rule._replace(most=60) for rule in PROPOSALS["gluoncv"])
    plan = Detection(unpack, rules, plan.anchors, plan.rois, DetectionRule())
    learner = Learner(block, make_optimizer("sgd", 0.9, 0), [mx.cpu()], train_options(), plan)
    losses = [
        float(learner.step([batch(ONE, TWO)], 0.02, 7)[0][0][0].mean().asscalar()) for _ in range(4)
    ]
    assert losses[-1] < losses[0]
    assert learner.is_finite()


def test_several_devices_learn_what_one_does():
    made = batch(ONE, TWO, seed=1)
    values = []
    for contexts in ([mx.cpu(0)], [mx.cpu(0), mx.cpu(1)]):
        symbol, _ = get_symbol("mask_rcnn_tiny", 2)
        graph = with_batch_norm(symbol, "frozen", contexts)
        block = Detector(symbol, resolve("mask_rcnn_tiny"), contexts, graph, seed=0)
        options = train_options()
        learner = Learner(block, make_optimizer("sgd", 0.9, 0), contexts, options, task())
        learner.step([made], 0.1, 3)
        values.append({n: p.data(contexts[0]).asnumpy() for n, p in block.collect_params().items()})
    for name, value in values[0].items():
        np.testing.assert_allclose(value, values[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_gradients_are_scaled_to_a_norm():
    changes = []
    for limit in (0.0, 0.5, 1e9):
        block = detector()
        options = train_options()
        options.schedule.clip_norm = limit
        learner = Learner(block, make_optimizer("sgd", 0.0, 0.0), [mx.cpu()], options, task())
        trained = {n: p for n, p in block.collect_params().items() if p.grad_req != "null"}
        before = {n: p.data().asnumpy() for n, p in trained.items()}
        learner.step([batch(ONE, TWO)], 1.0, 3)
        changes.append(
            np.concatenate(
                [(p.data().asnumpy() - before[n]).reshape(-1) for n, p in trained.items()]
            )
        )
    plain, clipped, loose = changes
    np.testing.assert_array_equal(plain, loose)
    assert np.linalg.norm(plain) > 0.5
    assert np.linalg.norm(clipped) == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_allclose(clipped * np.linalg.norm(plain) / 0.5, plain, rtol=1e-2, atol=1e-5)


class Objects:
    def __init__(self, boxes, classes):
        self.boxes, self.classes = np.array(boxes, "f").reshape(-1, 4), np.array(classes)


def test_each_object_is_found_once_by_the_best_box():
    truth = Objects([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 1])
    found = Objects(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]], [0, 0, 0, 1]
    )
    assert matches(found, truth).tolist() == [True, False, False, True]
    assert matches(found, Objects([], [])).tolist() == [False] * 4
    assert matches(Objects([], []), truth).tolist() == []


def test_precision_of_counted_scores():
    # Bins from the lowest score on: all right ones above all wrong ones.
    assert binned_ap(np.array([0, 2, 2]), np.array([5, 0, 0]), 4) == 1.0
    assert binned_ap(np.array([0, 0, 2]), np.array([5, 0, 0]), 4) == 0.5
    assert binned_ap(np.array([2, 0, 0]), np.array([0, 0, 2]), 2) == 0.5
    assert binned_ap(np.zeros(3), np.zeros(3), 2) == 0


def test_figures_of_training_and_of_validation():
    plan = task()
    assert plan.figures[0] == "ap50"
    totals = dict.fromkeys(("samples", "loss", *plan.sums), 0.0)
    totals.update(samples=2.0, loss=6.0, objects=4.0, right_49=2.0)
    totals["loss-mask"] = 1.0
    means = plan.means(totals)
    assert (means["loss"], means["loss-mask"], means["ap50"]) == (3.0, 0.5, 0.5)
    # In training nothing is looked for.
    assert plan.means({**totals, "objects": 0.0})["ap50"] is None
    earlier = {**totals, "samples": 1.0, "loss": 1.0}
    assert plan.means(totals, earlier)["loss"] == 5.0


def test_labels_have_room_for_all():
    assert label(TWO).shape == (label_length(PLACES),)
