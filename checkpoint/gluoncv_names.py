"""The weights of gluoncv's model zoo under our names: post-activation ResNets, Mask R-CNN.

gluoncv has two families of the same layers, ``resnet18_v1`` and ``resnet18_v1b``, and MXNet has two
ways of naming parameters in a file: by attributes (``features.5.0.body.3.weight``,
``layer2.0.conv2.weight``), as ``save_parameters`` does, and by the layers' own names, as ``export``
does, with or without the network's prefix (``resnetv10_stage2_conv1_weight``). All are read. Those
of a detector, ``mask_rcnn_fpn_resnet50_v1b_coco``, are attributes, but within ``features`` names.

The network is that of He et al., CVPR 2016; the names are those of the project dmlc/gluon-cv.
"""

import os
import re
import zipfile
from typing import Any, Callable, Optional

import numpy as np

from glore_common import GloReError, UsageError

from .params import Arrays

LEAVES = {"running_mean": "moving_mean", "running_var": "moving_var"}
# Of a batch normalisation in torchvision and timm.
TORCH_LEAVES = {"weight": "gamma", "bias": "beta"}
LEAF = r"(?P<leaf>weight|bias|gamma|beta|running_mean|running_var)$"
KINDS = {"conv": "conv", "batchnorm": "bn", "bn": "bn"}
# Convolutions of a basic block, and of a bottleneck. The shortcut of resnet*_v1, which the first
# block of a stage but the first one has, is counted after a basic block's own two.
BASIC, BOTTLENECK, SHORTCUT = 2, 3, 2


def _block(stage, block, branch, kind):
    return f"conv{stage + 1}_B{block:02d}_conv-{branch}_{kind}"


def _stem(found):
    return f"conv1_{KINDS[found['kind']]}"


def _features(found):
    return "conv1_conv" if found["index"] == "0" else "conv1_bn"


def _body(found):
    layer, step = divmod(int(found["index"]), 3)
    kind = ("conv", "bn", None)[step]
    # features.4 is the first stage; in a body each third layer is a rectifier.
    return kind and _block(int(found["stage"]) - 3, int(found["block"]) + 1, f"m{layer + 1}", kind)


def _downsample(found):
    stage = int(found["stage"]) - 3 if found["family"] == "features" else int(found["stage"])
    kind = ("conv", "bn")[int(found["index"])]
    return _block(stage, int(found["block"]) + 1, "w1", kind)


def _layer(found):
    branch = f"m{found['index']}"
    return _block(int(found["stage"]), int(found["block"]) + 1, branch, KINDS[found["kind"]])


def _counted(found):
    """Place the layer number ``index`` of a stage."""
    stage, index, kind = int(found["stage"]), int(found["index"]), KINDS[found["kind"]]
    if found["family"] == "stage" and stage > 1:
        if index == SHORTCUT:
            return _block(stage, 1, "w1", kind)
        index -= index > SHORTCUT
    block, branch = divmod(index, found["per_block"])
    return _block(stage, block + 1, f"m{branch + 1}", kind)


def _down(found):
    return _block(int(found["stage"]), 1, "w1", KINDS[found["kind"]])


# What a name without its leaf looks like, and what makes ours of it.
PATTERNS: tuple[tuple[re.Pattern, Callable[[Any], Optional[str]]], ...] = tuple(
    (re.compile(pattern), make)
    for pattern, make in (
        (r"features\.(?P<index>[01])$", _features),
        (r"features\.(?P<stage>[4-7])\.(?P<block>\d+)\.body\.(?P<index>\d+)$", _body),
        (
            r"(?P<family>features|layer)\.?(?P<stage>[1-7])\.(?P<block>\d+)\.downsample\."
            r"(?P<index>[01])$",
            _downsample,
        ),
        (r"(?P<kind>conv|bn)1$", _stem),
        (r"layer(?P<stage>[1-4])\.(?P<block>\d+)\.(?P<kind>conv|bn)(?P<index>\d+)$", _layer),
        (
            r"(\w+?_)??(?P<family>stage|layers)(?P<stage>[1-4])_(?P<kind>conv|batchnorm)"
            r"(?P<index>\d+)$",
            _counted,
        ),
        (r"(\w+?_)??down(?P<stage>[1-4])_(?P<kind>conv|batchnorm)0$", _down),
        # After those whose names end like it.
        (r"(\w+?_)??(?P<kind>conv|batchnorm)0$", _stem),
        (r"(\w+_)?(output|fc|dense0)$", lambda found: "classifier"),
    )
)
# Of a detector, besides its backbone.
DETECTOR = {
    **{f"features.P{level}_conv_lat": f"p{level}_lateral_conv" for level in (2, 3, 4, 5)},
    **{f"features.P{level}_conv1": f"p{level}_conv" for level in (2, 3, 4, 5, 6)},
    "rpn.rpn_head.conv1.0": "rpn_conv_conv",
    "rpn.rpn_head.score": "rpn_score_conv",
    "rpn.rpn_head.loc": "rpn_delta_conv",
    "box_features.1": "box_fc1",
    "box_features.3": "box_fc2",
    "class_predictor": "box_score",
    "box_predictor": "box_delta",
    **{f"mask.deconv.{2 * number}": f"mask_{number + 1}_conv" for number in range(4)},
    "mask.deconv.8": "mask_larger",
    "mask.mask": "mask_score_conv",
}
# Anchors are computed, not learnt.
ANCHORS = re.compile(r"rpn\.anchor_generator\.\d+\.anchors$")
# A file is gluoncv's if it has the first convolution of its second stage under one of its names.
MARK = re.compile(
    r"^((arg|aux):)?(features\.5\.0\.body\.0\.|layer2\.0\.conv1\.|"
    r"(features\.)?(\w+_)?(stage|layers)2_conv0_)weight$"
)


def is_gluoncv(name: str) -> bool:
    """Return whether a file with this name in it has one of those networks."""
    return MARK.match(name) is not None


def convolutions_of_blocks(params: Arrays) -> int:
    """Return how many convolutions each residual block of a file has, but for shortcuts."""
    first = (value for name, value in params.items() if MARK.match(name))
    return BOTTLENECK if np.shape(next(first))[-1:] == (1,) else BASIC


def our_name(name: str, per_block: int = BASIC) -> Optional[str]:
    """Return our name of a gluoncv parameter, or None if it is none of those networks'.

    ``per_block`` is that of :func:`convolutions_of_blocks`, which names by layers need.
    """
    match = re.match(r"(?P<kind>(arg|aux):)?(?P<path>.+?)[._]" + LEAF, name)
    if match is None:
        return None
    path = match["path"]
    if path in DETECTOR:
        return f"{match['kind'] or ''}{DETECTOR[path]}_{match['leaf']}"
    if "_" in path:
        path = path.removeprefix("features.")
    for pattern, make in PATTERNS:
        found = pattern.match(path)
        if found:
            made = make({**found.groupdict(), "per_block": per_block})
            leaf = LEAVES.get(match["leaf"], match["leaf"])
            if made and made.endswith("_bn"):
                leaf = TORCH_LEAVES.get(leaf, leaf)
            return made and f"{match['kind'] or ''}{made}_{leaf}"
    return None


def from_gluoncv(params: Arrays) -> Arrays:
    """Return a file's parameters under our names, if it is one of gluoncv; else unchanged.

    Parameters
    ----------
    params
        Name in the file to array.

    Returns
    -------
    dict
        What has no name here keeps its own, so that a strict comparison lists it.
    """
    if not any(map(is_gluoncv, params)):
        return params
    per_block = convolutions_of_blocks(params)
    return {
        our_name(name, per_block) or name: value
        for name, value in params.items()
        if not ANCHORS.match(name)
    }


def zoo_weights(name: str) -> str:
    """Return the path of a network's ImageNet weights of gluoncv's model zoo.

    They lie where gluoncv keeps them, ``$MXNET_HOME/models`` or ``~/.mxnet/models``; missing, they
    are downloaded.

    Parameters
    ----------
    name
        Such as ``resnet18_v1``: our rows are called as gluoncv's networks are.

    Raises
    ------
    UsageError
        If gluoncv has no weights of that name.
    GloReError
        If they cannot be downloaded: what to download, and where to put it.
    """
    from gluoncv.model_zoo.model_store import apache_repo_url, get_model_file, short_hash

    try:
        file = f"{name}-{short_hash(name)}"
    except ValueError:
        raise UsageError(
            f"gluoncv's model zoo has no weights for {name}: name a file with --pretrained FILE"
        ) from None
    home = os.environ.get("MXNET_HOME") or os.path.join("~", ".mxnet")
    folder = os.path.expanduser(os.path.join(home, "models"))
    try:
        return get_model_file(name)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise GloReError(
            f"the weights of {name} cannot be downloaded ({error}). Where there is a network, "
            f"download {apache_repo_url}gluon/models/{file}.zip, unpack it and put {file}.params "
            f"into {folder}; or name the file with --pretrained FILE."
        ) from error
