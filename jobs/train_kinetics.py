"""Train a video network on Kinetics, UCF101, HMDB51, the demo videos or videos of your own.

The options are those of facebookresearch/GloRe's script of the same name, and more; the recipe is
its single-node one. See docs/videos.md for what a run leaves behind and how to continue it.
"""

import dataclasses
import logging
import os
from typing import Any, Optional

from data.common.loader import BatchSource
from data.common.transforms import default_resize
from data.video.list import check_lists
from data.video.loaders import get_train_loader, get_val_loader
from dataset import get_config, prepare_demo
from dataset.config import DatasetConfig
from glore_options import flag_of, parse
from network.block import KINETICS_LR_MULT, KINETICS_WD_MULT
from network.builder import InputConf, get_spec, get_symbol
from train.loss import ClassWeights
from train.task import Classification

from .model import ModelFacts
from .options import KineticsOptions
from .run import Run, need_task, next_commands, settle, started

LOGGER = logging.getLogger("glore")


def settle_with(options: KineticsOptions, config: DatasetConfig) -> None:
    """Fill in what the command line left to the data set."""
    options.settle(
        clip_length=config.clip_length,
        train_frame_interval=config.train_frame_interval,
        val_frame_interval=config.val_frame_interval,
        # A small network has its own size whatever the videos are.
        crop_size=min(config.crop_size, get_spec(options.network.network).data_shape[-1]),
        augmentation=config.augmentation,
        batch_size=config.batch_size,
        lr_base=config.lr_base,
        lr_schedule=config.lr_schedule,
        end_epoch=config.end_epoch,
    )
    schedule = options.schedule
    if schedule.lr_step_epochs is None:
        options.settle(lr_steps=config.lr_steps)
    if schedule.warmup_epochs is None:
        # A run that is shorter than the data set's warms up in less time, if nobody else says how.
        share = min(1.0, options.run.end_epoch / config.end_epoch) if config.is_own else 1.0
        options.settle(warmup_steps=int(share * config.warmup_steps))
    settle(options, config.name)


def get_loaders(
    options: KineticsOptions, config: DatasetConfig, input_conf: InputConf, run: Run
) -> tuple[BatchSource, BatchSource]:
    """Return the loaders for training and validation, of this worker's share of the videos."""
    common: dict[str, Any] = {
        "mean": input_conf.mean,
        "std": input_conf.std,
        "num_classes": config.num_classes,
        **run.share,
    }
    train = get_train_loader(
        config.train_list,
        config.train_root,
        options.data,
        flip=config.flip,
        seed=options.run.random_seed,
        **common,
    )
    return train, get_val_loader(config.val_list, config.val_root, options.data, **common)


def log_data(
    options: KineticsOptions, config: DatasetConfig, train: BatchSource, val: BatchSource
) -> None:
    """Log what is going to be trained on."""
    data = options.data
    LOGGER.info(
        "Data       %s: %d videos to train, %d to validate, %d classes (chance: %.2f %% top-1)",
        config.name,
        len(train.dataset),
        val.num_samples,
        config.num_classes,
        100 / config.num_classes,
    )
    distance = f"one in {data.train_frame_interval} (validation: one in {data.val_frame_interval})"
    if data.clip_seconds is not None:
        distance = f"over {data.clip_seconds:g} s"
    LOGGER.info(
        "Clips      %d frames, %s, %d x %d pixels",
        data.clip_length,
        distance,
        data.crop_size,
        data.crop_size,
    )


def describe(
    options: KineticsOptions,
    config: DatasetConfig,
    input_conf: InputConf,
    names: Optional[list[str]],
) -> ModelFacts:
    """Return what checkpoints say of the network, whose classes have these names."""
    return ModelFacts(
        task="video",
        network=get_spec(options.network.network).name,
        overrides=options.network.overrides(),
        num_classes=config.num_classes,
        class_names=names,
        data_shape=input_conf.data_shape,
        mean=input_conf.mean,
        std=input_conf.std,
        resize=default_resize(options.data.crop_size),
        frame_interval=options.data.val_frame_interval,
    )


def task_of(options: KineticsOptions, train: BatchSource, num_classes: int) -> Classification:
    """Return what is learnt: the classes, weighted as ``--class-balance`` asks."""
    if options.data.class_balance != "weights":
        return Classification()
    return Classification(ClassWeights(train.dataset.labels(), num_classes))


def main(argv: Optional[list[str]] = None) -> None:
    """Train as the command line says."""
    options = parse(KineticsOptions(), argv, (__doc__ or "").split("\n\n")[0])
    need_task(options.network.network, "video")
    data = options.data
    config = get_config(data.dataset, data.data_root, data.split, data.num_classes)
    settle_with(options, config)
    with started(options) as run:
        for field in dataclasses.fields(options.foreign):
            if getattr(options.foreign, field.name) is not None:
                reason = field.metadata["help"].split(": ", 1)[1]
                LOGGER.warning("%s has no effect: %s", flag_of(field.name), reason)
        if config.name == "Demo":
            prepare_demo(data.data_root)
        # All that can be wrong with the data is found before work begins.
        config.check()
        names = config.class_names() if os.path.exists(config.mapping_table) else None
        symbol, input_conf = get_symbol(
            options.network.network,
            config.num_classes,
            clip_length=data.clip_length,
            crop_size=data.crop_size,
            **options.network.overrides(),
        )
        mean, std = options.pixels.normalisation(input_conf.mean, input_conf.std)
        input_conf = dataclasses.replace(input_conf, mean=mean, std=std)
        train, val = get_loaders(options, config, input_conf, run)
        lists = [loader.dataset.video_list for loader in (train, val)]  # type: ignore[attr-defined]
        check_lists(lists[0], lists[1], config.num_classes, names)
        train.start()  # while the network is built
        options.run.settle_epoch_div_factor(config.epoch_div_factor, len(train))
        block = run.block(symbol, input_conf, KINETICS_LR_MULT, KINETICS_WD_MULT, class_names=names)
        log_data(options, config, train, val)
        facts = describe(options, config, input_conf, names)
        task = task_of(options, train, config.num_classes)
        done = run.train(block, (train, val), facts, task)
        if done is not None and run.group.is_main:
            next_commands(done[0])
