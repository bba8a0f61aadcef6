"""gluoncv's Mask R-CNN with random weights, initialised part by part (a whole pass is slow)."""

from unittest import mock

import numpy as np

from mxnet_compat import mx


def mask_rcnn(name="mask_rcnn_fpn_resnet50_v1b_coco", seed=0):
    """Return gluoncv's network; its RPN layers are ``net.rpn.rpn_head``."""
    from gluoncv import model_zoo

    # Their anchors are made with a name that NumPy 1.24 dropped.
    with mock.patch.object(np, "float", float, create=True):
        net = model_zoo.get_model(name, pretrained=False, pretrained_base=False)
    net.initialize(mx.init.Normal(0.02))
    maps = net.features(mx.nd.zeros((1, 3, 64, 64)))
    head = net.rpn.rpn_head
    hidden = head.conv1(maps[0])
    head.score(hidden)
    head.loc(hidden)
    hidden = net.box_features(mx.nd.zeros((1, 256, 14, 14)))
    net.class_predictor(hidden)
    net.box_predictor(hidden)
    net.mask(mx.nd.zeros((1, 256, 14, 14)))
    randomize(net, seed)
    return net


def randomize(net, seed=0):
    """Give every parameter values of its own, running statistics too; maps stay about 1."""
    generator = np.random.RandomState(seed)
    for name, parameter in net.collect_params().items():
        if "anchor" in name:
            continue
        shape = parameter.shape
        if name.endswith(("gamma", "var")):
            value = generator.uniform(0.8, 1.2, shape)
        elif name.endswith("weight"):
            value = generator.normal(0, np.sqrt(1 / np.prod(shape[1:])), shape)
        else:
            value = generator.uniform(-0.1, 0.1, shape)
        parameter.set_data(mx.nd.array(value))
