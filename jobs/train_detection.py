"""Train Mask R-CNN with global-context blocks on COCO, on any data in COCO's format, or on made-up
harbours.

After GCNet's main experiment (Cao et al., 2019): a ResNet with a feature pyramid, and a block in
every bottleneck of conv3 to conv5. Defaults are GCNet's: sides of 800 and 1333 pixels, batches of
16 images, learning rate 0.02 with a warm-up, 12 passes, gradients clipped to a norm of 35.
"""

import logging
from typing import Any, Optional

from data.detection.coco import CocoSource, check_images, log_left_out
from data.detection.loaders import get_detection_train_loader, get_detection_val_loader
from data.detection.objects import unpack
from glore_common import UsageError
from glore_options import parse
from network.builder import get_spec, get_symbol
from network.detector import PROPOSALS, RULES, DetectionRule, frozen_pattern
from network.targets import ANCHOR_RULE, ROI_RULE
from train.detection import Detection

from .detect import open_part, same_classes, style_of
from .model import ModelFacts
from .options import DetectionOptions
from .run import Run, need_task, next_commands, settle, started

LOGGER = logging.getLogger("glore")
NETWORK, DEMO_NETWORK = "mask_rcnn_resnet50_v1b_w-gc", "mask_rcnn_tiny"
DEMO = {
    "short_side": 160,
    "long_side": 192,
    "batch_size": 4,
    "lr_base": 0.05,
    "clip_norm": 5.0,
    "warmup_steps": 100,
    "train_proposals": 200,
    "anchor_samples": 128,
    "roi_samples": 64,
    "val_batch": 4,
}
# Of the slim network's 64 to 128 channels a sixteenth would be four to eight.
DEMO_BLOCKS = {"gc": "gc:ratio=1/4"}
# What the forms have otherwise; gluoncv's is that of its mask_rcnn_fpn_resnet50_v1b_coco.
STYLED = {
    "gcnet": {
        "lr_step_epochs": (8.0, 11.0),
        "end_epoch": 12,
        "warmup_steps": 500,
        "clip_norm": 35.0,
    },
    "gluoncv": {
        "lr_step_epochs": (17.0, 23.0),
        "end_epoch": 26,
        "warmup_steps": 1000,
        "clip_norm": 0.0,
    },
}
DEFAULTS = {
    "short_side": 800,
    "long_side": 1333,
    "batch_size": 16,
    "lr_schedule": "step",
    "train_proposals": 2000,
    "anchor_samples": ANCHOR_RULE.number,
    "roi_samples": ROI_RULE.number,
    "val_batch": 1,
}
# Of one image.
LR = 0.00125
# Of the validation within the training, which counts boxes.
VAL_PROPOSALS = 300
# Weight decay of biases is none in gluoncv's form.
WD_MULT = {"gcnet": None, "gluoncv": ((r"_(bias|beta|gamma)$", 0.0),)}


def settle_detection(options: DetectionOptions) -> None:
    """Fill in what was not given, and find mistakes before anything slow starts."""
    source, network = options.source, options.network
    demo = source.dataset == "demo"
    network.network = network.network or (DEMO_NETWORK if demo else NETWORK)
    need_task(network.network, "detection")
    named = options.checkpoints.task_name or options.checkpoints.model_prefix
    if network.block and not named:
        # Runs that differ in their blocks only do not share checkpoints.
        kind = "".join(c if c.isalnum() else "-" for c in network.block)
        options.checkpoints.task_name = f"{source.dataset}_{network.network}_{kind}"
    if demo:
        options.settle(**DEMO)
        network.block = DEMO_BLOCKS.get(network.block, network.block)
    plan, defaults = options.schedule, {**STYLED[style_of(network.overrides())], **DEFAULTS}
    for default, instead in (
        ("lr_step_epochs", plan.lr_steps),
        ("warmup_steps", plan.warmup_epochs),
    ):
        if instead is not None:
            del defaults[default]
    options.settle(**defaults)
    options.settle(lr_base=LR * options.data.batch_size)
    if options.data.short_side > options.data.long_side:
        raise UsageError(
            f"--short-side {options.data.short_side} is longer than --long-side "
            f"{options.data.long_side}"
        )
    if options.devices.dtype != "float32":
        raise UsageError(
            f"--dtype {options.devices.dtype} is not for detectors: places of boxes need float32"
        )
    if options.precise_bn.precise_bn:
        raise UsageError("precise BatchNorm is not for detectors: --batch-norm frozen or sync")
    settle(options, source.dataset)
    pretrained = bool(network.pretrained)
    options.settle(
        frozen_stages=2 if pretrained else 0, batch_norm="frozen" if pretrained else "local"
    )


def open_parts(options: DetectionOptions) -> tuple[CocoSource, Optional[CocoSource]]:
    """Return the images to train and to validate on, checked."""
    data = options.data
    train = open_part(options.source, "train", True, data.keep_empty)
    val = open_part(options.source, "val")
    for each in (train, val):
        if each is not None:
            log_left_out(each)
            check_images(each, data.check_images)
    if val is not None:
        same_classes(val, train.names, train.origin)
    return train, val


def task_of(options: DetectionOptions) -> Detection:
    """Return what is learnt: losses, samples and proposals as the options say."""
    plan = options.detection
    style = style_of(options.network.overrides())
    training, testing = PROPOSALS[style]
    most = plan.train_proposals
    training = training._replace(most=most)
    testing = testing._replace(most=min(testing.most, VAL_PROPOSALS))
    if not training.together:
        training = training._replace(before=most, after=most)
        testing = testing._replace(before=testing.most, after=testing.most)
    return Detection(
        unpack,
        (training, testing),
        ANCHOR_RULE._replace(number=plan.anchor_samples),
        ROI_RULE._replace(number=plan.roi_samples),
        DetectionRule(),
    )


def train(options: DetectionOptions, run: Run) -> None:
    """Train, and say how to go on."""
    source, val = open_parts(options)
    name, data = options.network.network, options.data
    symbol, input_conf = get_symbol(
        name,
        source.num_classes,
        crop_size=(data.short_side, data.long_side),
        **options.network.overrides(),
    )
    mean, std = options.pixels.normalisation(input_conf.mean, input_conf.std)
    common: dict[str, Any] = {"mean": mean, "std": std, **run.share}
    loader = get_detection_train_loader(source, data, seed=options.run.random_seed, **common)
    loader.start()  # while the network is built
    val_loader = None if val is None else get_detection_val_loader(val, data, **common)
    options.run.settle_epoch_div_factor(1, len(loader))
    style = style_of(options.network.overrides())
    affine = style == "gluoncv" and options.devices.batch_norm == "frozen"
    block = run.block(
        symbol,
        input_conf,
        wd_mult=WD_MULT[style],
        rules=RULES,
        frozen=frozen_pattern(options.detection.frozen_stages, affine),
    )
    LOGGER.info(
        "Data       %s: %d images with %d objects to train, %d images to validate, %d classes",
        source.origin,
        len(source.pictures),
        sum(len(each.things) for each in source.pictures),
        len(val.pictures) if val else 0,
        source.num_classes,
    )
    LOGGER.info(
        "Images     shorter side %d, longer one %d pixels at most", data.short_side, data.long_side
    )
    facts = ModelFacts(
        task="detection",
        network=get_spec(name).name,
        overrides=options.network.overrides(),
        num_classes=source.num_classes,
        class_names=list(source.names),
        data_shape=input_conf.data_shape,
        mean=mean,
        std=std,
    )
    done = run.train(block, (loader, val_loader), facts, task_of(options))
    if done is not None and run.group.is_main:
        next_commands(done[0])


def main(argv: Optional[list[str]] = None) -> None:
    """Train as the command line says."""
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    options = parse(DetectionOptions(), argv, description)
    settle_detection(options)
    with started(options) as run:
        train(options, run)
