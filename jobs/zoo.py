"""``get_model`` and ``list_models``: a network of the table as a Gluon block, ready to use.

::

    net = get_model("resnet50_w-glore_2-3", pretrained=True)
    scores = mx.nd.softmax(net(net.transform(image)))

The block knows its input and its classes; see :func:`get_model`.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np

from checkpoint.gluoncv_names import zoo_weights
from checkpoint.released import RELEASED, locate
from data.common.transforms import Compose
from data.image.loaders import image_val_transform
from data.video.loaders import val_transform
from data.video.sampler import EvenlySampling
from glore_common import UsageError
from mxnet_compat import mx
from network.block import FINE_TUNE_LR_MULT, SymbolNet, build_block, by_rule
from network.builder import get_spec, get_symbol, list_networks, logits
from network.pretrained import load_pretrained
from network.specs import RESNET18_V1, RESNET34_V1

from .media import FRAME_INTERVAL
from .model import ModelFacts, facts_of_row, open_model

ZOO = (RESNET18_V1.name, RESNET34_V1.name)


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """Return the names of networks, in the order of the table.

    Parameters
    ----------
    filter
        A pattern such as ``'resnet50*'`` or ``'*glore*'``, in any letter case.
    pretrained
        Only those for which weights are published.
    """
    return [
        name
        for name in list_networks()
        if fnmatch.fnmatch(name.lower(), filter.lower())
        and (not pretrained or name in RELEASED or name in ZOO)
    ]


class Transform:
    """Frames or an image to what the network reads: the transform of validation.

    Parameters
    ----------
    facts
        Of the network.
    ctx
        Where the result goes.
    """

    def __init__(self, facts: ModelFacts, ctx: mx.Context) -> None:
        self.facts, self.ctx = facts, ctx
        side = facts.data_shape[-1]
        self.steps: Compose
        if facts.task == "video":
            self.steps = val_transform(side, facts.mean, facts.std)
        else:
            self.steps = image_val_transform(side, facts.mean, facts.std, "centre", facts.resize)

    def __call__(self, frames: Any) -> mx.nd.NDArray:
        """Return a batch of one, (1, \\*data_shape) float32.

        Parameters
        ----------
        frames
            uint8, RGB. For an image network (H, W, 3). For a video network (T, H, W, 3): a clip, if
            T is what the network takes, else all frames of a video, whose middle clip is taken.

        Raises
        ------
        UsageError
            If the array has another shape or type.
        """
        array, video = np.asarray(frames), self.facts.task == "video"
        if array.dtype != np.uint8 or array.ndim != (4 if video else 3) or array.shape[-1] != 3:
            wanted = "(frames, height, width, 3)" if video else "(height, width, 3)"
            raise UsageError(f"expected {wanted} uint8, RGB; got {array.dtype} {array.shape}")
        if not video:
            made = self.steps(array[None], None)[:, 0]
        else:
            length = self.facts.data_shape[1]
            if len(array) != length:
                interval = self.facts.frame_interval or FRAME_INTERVAL
                array = array[EvenlySampling(length, interval).sample(len(array))]
            made = self.steps(array, None)
        return mx.nd.array(made[None], ctx=self.ctx)


def _source(name: str, pretrained: Union[bool, str]) -> str:
    """Return the file or prefix of a network's weights."""
    if not isinstance(pretrained, bool):
        return locate(os.fspath(pretrained))
    if name in RELEASED:
        return locate(name)
    if name in ZOO:
        return zoo_weights(name)
    raise UsageError(
        f"no weights of {name} are published; those of {', '.join((*RELEASED, *ZOO))} are. Give a "
        "file: pretrained=PATH"
    )


def get_model(
    name: str,
    pretrained: Union[bool, str] = False,
    classes: Optional[int] = None,
    ctx: Union[None, mx.Context, Sequence[mx.Context]] = None,
    *,
    output: Optional[str] = None,
    frozen: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> SymbolNet:
    """Return a network as a Gluon block, hybridized, with what is known of it.

    Parameters
    ----------
    name
        Of the table; see :func:`list_models`.
    pretrained
        True: the published weights of this network, which are downloaded once, checked and kept
        (``$GLORE_HOME``). A path: a checkpoint of a training, ``.params``, ``.pth``,
        ``.safetensors``, or the name of a released network.
    classes
        Width of the classifier. Where the weights have another one it starts afresh.
    ctx
        Where the parameters go.
    output
        Node whose output the block computes, such as ``'conv4_B06_sum'`` or ``'flatten'`` (the
        pooled vector); by default the logits. The block then has no layers behind it.
    frozen
        Only the classifier gets gradients.
    seed
        Of what starts afresh.
    **overrides
        See :func:`network.builder.get_symbol`.

    Returns
    -------
    SymbolNet
        With the attributes ``facts`` (:class:`jobs.model.ModelFacts`), ``class_names`` (or None)
        and ``transform`` (:class:`Transform`): ``net(net.transform(frames))``. ``net.export(path)``
        writes graph and parameters, ``net.arg_aux_params()`` returns them.

    Raises
    ------
    UsageError
        For an unknown network, option or node, or if no weights are published.
    DownloadError
        If they cannot be fetched; the message says what to put where.
    CheckpointError
        If the weights do not fit.
    """
    name = get_spec(name).name
    facts = None
    source = None if pretrained is False else _source(name, pretrained)
    if source is not None:
        said = open_model(source).facts
        if said.network == name:
            facts, overrides = said, {**said.overrides, **overrides}
            # The size is the checkpoint's unless another one is asked for.
            overrides.setdefault("crop_size", said.data_shape[-1])
            if said.task == "video":
                overrides.setdefault("clip_length", said.data_shape[1])
            classes = classes or said.num_classes
    symbol, conf = get_symbol(name, classes, **overrides)
    inputs = {"data": (1, *conf.data_shape)}
    params = None
    if source is not None:
        params = load_pretrained(symbol, source, inputs, seed=seed)
    sizes = ("crop_size", "clip_length")
    own = {name: value for name, value in overrides.items() if name not in sizes}
    row = facts_of_row(name, overrides, classes or get_spec(name).num_classes)
    found = dataclasses.replace(row, overrides=own)
    if facts is not None:
        found = dataclasses.replace(
            facts,
            overrides=own,
            num_classes=row.num_classes,
            class_names=facts.class_names if facts.num_classes == row.num_classes else None,
            data_shape=row.data_shape,
            resize=facts.resize if facts.data_shape == row.data_shape else None,
        )
    net = build_block(
        symbol,
        conf,
        ctx,
        params=params,
        seed=seed,
        output=output or logits(symbol).name,
    )
    if frozen:
        for parameter in net.collect_params().values():
            if by_rule(FINE_TUNE_LR_MULT, parameter.name) != 1.0:
                parameter.grad_req = "null"
    known = {"facts": found, "class_names": found.class_names}
    for attribute, value in {**known, "transform": Transform(found, net.contexts[0])}.items():
        setattr(net, attribute, value)
    return net
