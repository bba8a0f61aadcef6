"""Train a fully convolutional network with a context block on Cityscapes, Pascal VOC, ADE20K, your
own folders of images and masks, or on made-up streets.

After the segmentation experiments of GloRe (Chen et al., CVPR 2019): one unit before the classifier
of an FCN. Defaults follow the closest open recipe (PaddleSeg): output stride 8, poly schedule of
power 0.9 from 0.01, auxiliary loss of weight 0.4, crops of 1024 x 512, batches of 8 images.
"""

import logging
from typing import Any, Optional

from data.segmentation.loaders import (
    get_segmentation_train_loader,
    get_segmentation_val_loader,
)
from data.segmentation.source import Looked, SegmentationSource, check
from glore_options import parse
from network.block import KINETICS_WD_MULT
from network.builder import get_spec, get_symbol
from train.segmentation import Segmentation

from .model import ModelFacts
from .options import SegmentationOptions
from .run import Run, need_task, next_commands, settle, started
from .segment import open_part

LOGGER = logging.getLogger("glore")
NETWORK, DEMO_NETWORK = "fcn_resnet50_w-glore", "fcn_tiny"
# 80,000 steps of 8 of Cityscapes' 2,975 images.
EPOCHS = 215
DEMO = {
    "crop": (96, 128),
    "scale_range": (1.0, 1.0),
    "batch_size": 8,
    "lr_base": 0.1,
    "end_epoch": 15,
    "colours": False,
}
DEFAULTS = {
    "scale_range": (0.5, 2.0),
    "batch_size": 8,
    "lr_base": 0.01,
    "end_epoch": EPOCHS,
    "colours": True,
}
# What is not the backbone.
HEADS = r"^(head|aux|classifier)_"


def settle_segmentation(options: SegmentationOptions) -> None:
    """Fill in what was not given, and find mistakes before anything slow starts."""
    source, network = options.source, options.network
    demo = source.dataset == "demo"
    network.network = network.network or (DEMO_NETWORK if demo else NETWORK)
    need_task(network.network, "segmentation")
    if demo:
        options.settle(**DEMO)
    crop = (512, 1024) if source.dataset == "cityscapes" else (512, 512)
    options.settle(crop=crop, **DEFAULTS)
    named = options.checkpoints.task_name or options.checkpoints.model_prefix
    settle(options, source.dataset)
    if network.context and not named:
        # Runs that differ in their block only do not share checkpoints.
        kind = network.context.partition(":")[0]
        options.checkpoints.task_name += f"_{kind}"


def log_data(
    options: SegmentationOptions,
    train: SegmentationSource,
    val: Optional[SegmentationSource],
    looked: Optional[Looked],
) -> None:
    """Log what is going to be trained on."""
    data = options.data
    LOGGER.info(
        "Data       %s: %d images to train, %d to validate, %d classes",
        train.origin,
        len(train.pairs),
        len(val.pairs) if val else 0,
        train.labels.num_classes,
    )
    if looked is not None:
        absent = [n for n, pixels in zip(train.labels.names, looked.pixels) if not pixels]
        if absent:
            LOGGER.warning("No training mask has the classes: %s", ", ".join(absent))
    LOGGER.info(
        "Images     crops of %d x %d pixels (width x height), scale %g to %g; whole in validation",
        data.crop[1],
        data.crop[0],
        *data.scale_range,
    )


def train(options: SegmentationOptions, run: Run) -> None:
    """Train, and say how to go on."""
    source = open_part(options.source, "train")
    val = open_part(options.source, "val", source.labels)
    looked = check(source, options.data.check_masks)
    if val is not None:
        check(val, options.data.check_masks)
    num_classes = source.labels.num_classes
    name, data = options.network.network, options.data
    symbol, input_conf = get_symbol(
        name, num_classes, crop_size=data.crop, **options.network.overrides()
    )
    mean, std = options.pixels.normalisation(input_conf.mean, input_conf.std)
    common: dict[str, Any] = {"mean": mean, "std": std, **run.share}
    loader = get_segmentation_train_loader(source, data, seed=options.run.random_seed, **common)
    loader.start()  # while the network is built
    val_loader = None if val is None else get_segmentation_val_loader(val, data, **common)
    options.run.settle_epoch_div_factor(1, len(loader))
    plan = options.segmentation
    lr_mult = ((HEADS, plan.head_lr),) if plan.head_lr != 1 else None
    block = run.block(symbol, input_conf, lr_mult=lr_mult, wd_mult=KINETICS_WD_MULT)
    log_data(options, source, val, looked)
    facts = ModelFacts(
        task="segmentation",
        network=get_spec(name).name,
        overrides=options.network.overrides(),
        num_classes=num_classes,
        class_names=list(source.labels.names),
        data_shape=input_conf.data_shape,
        mean=mean,
        std=std,
        palette=source.labels.colours.tolist(),
    )
    task = Segmentation(num_classes, plan.aux_weight, plan.ohem)
    done = run.train(block, (loader, val_loader), facts, task)
    if done is not None and run.group.is_main:
        next_commands(done[0])


def main(argv: Optional[list[str]] = None) -> None:
    """Train as the command line says."""
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    options = parse(SegmentationOptions(), argv, description)
    settle_segmentation(options)
    with started(options) as run:
        train(options, run)
