"""Train an image network: what ``train_imagenet.py`` and ``train_classifier.py`` do.

They differ in their options' defaults, and in what the latter draws and tests in the end.
"""

import dataclasses
import logging
from typing import Any, Optional

from data.common.loader import BatchSource
from data.common.transforms import default_resize
from data.image.loaders import get_image_train_loader, get_image_val_loader
from glore_common import UsageError
from mxnet_compat import mx
from network.block import KINETICS_WD_MULT, NO_DECAY_BN_BIAS
from network.builder import InputConf, get_spec, get_symbol
from network.initializer import identity_units
from train.loop import Summary
from train.loss import Mixup
from train.report import Reporter
from train.task import Classification

from .model import ModelFacts
from .options import ImageJobOptions
from .run import Run, need_task, settle
from .sources import ImageParts, open_parts

LOGGER = logging.getLogger("glore")

BATCH_SIZE = 256
# Of --benchmark: what any machine's memory takes, and enough steps for a steady mean.
CPU_BENCHMARK_BATCH_SIZE = 8
BENCHMARK_STEPS = 20


def settle_images(options: ImageJobOptions, data_name: str, crop_size: Optional[int]) -> None:
    """Fill in what was not given, and find mistakes before anything slow starts.

    Parameters
    ----------
    options
    data_name
        Beginning of the task's name.
    crop_size
        The default; None: the network's.
    """
    name = options.network.network
    need_task(name, "image")
    data = options.data
    data.crop_size = data.crop_size or crop_size or get_spec(name).data_shape[-1]
    data.resize = data.resize or default_resize(data.crop_size)
    if data.resize < data.crop_size:
        raise UsageError(f"--resize {data.resize} is smaller than the input, {data.crop_size}")
    settle(options, data_name)


def get_network(
    options: ImageJobOptions, run: Run, num_classes: int
) -> tuple[mx.gluon.Block, InputConf]:
    """Return the network as a block, and what it is to be fed."""
    symbol, input_conf = get_symbol(
        options.network.network,
        num_classes,
        crop_size=options.data.crop_size,
        **options.network.overrides(),
    )
    images = options.images
    block = run.block(
        symbol,
        input_conf,
        wd_mult=NO_DECAY_BN_BIAS if images.no_decay_bn_bias else KINETICS_WD_MULT,
        rules=identity_units(symbol) if images.zero_init_units else (),
    )
    mean, std = options.pixels.normalisation(input_conf.mean, input_conf.std)
    return block, dataclasses.replace(input_conf, mean=mean, std=std)


def task_of(options: ImageJobOptions, num_classes: int) -> Classification:
    """Return what is learnt: classes, of blended pairs if --mixup asks for it."""
    mixup = options.images.mixup
    return Classification(Mixup(mixup, num_classes) if mixup else None)


def get_loaders(
    options: ImageJobOptions, parts: ImageParts, run: Run, conf: Any
) -> tuple[BatchSource, Optional[BatchSource]]:
    """Return the loaders for training and for validation, of this worker's share.

    ``conf`` has the ``mean`` and ``std`` of the input.
    """
    common = {"mean": conf.mean, "std": conf.std, **run.share}
    val = None
    if parts.val is not None:
        # MXNet's reader cannot share a file among workers without leaving images out.
        alone = run.group.size == 1
        reader = options.data.record_reader if parts.val.records and alone else "own"
        val = get_image_val_loader(
            parts.val,
            dataclasses.replace(options.data, record_reader=reader),
            batch_size=options.images.test_batch or options.data.batch_size,
            with_index=False,
            **common,
        )
    train = get_image_train_loader(
        parts.train, options.data, seed=options.run.random_seed, **common
    )
    return train, val


def run_benchmark(options: ImageJobOptions, run: Run) -> float:
    """Time training on a made-up batch; return samples per second."""
    on_cpu = run.contexts[0].device_type == "cpu"
    options.settle(
        batch_size=CPU_BENCHMARK_BATCH_SIZE if on_cpu else BATCH_SIZE, epoch_div_factor=1
    )
    spec = get_spec(options.network.network)
    num_classes = options.source.num_classes or spec.num_classes
    block, input_conf = get_network(options, run, num_classes)
    mx.random.seed(options.run.random_seed)
    size = options.data.batch_size
    batch = (
        mx.nd.random.normal(shape=(size, *input_conf.data_shape)),
        mx.nd.arange(size) % num_classes,
    )
    steps = options.run.max_steps or BENCHMARK_STEPS
    return run.benchmark(block, batch, steps, task_of(options, num_classes))


def run_training(
    options: ImageJobOptions, run: Run
) -> tuple[ImageParts, Optional[tuple[Summary, Reporter]]]:
    """Train on images; return them, and what was reached (None after a dry run)."""
    options.settle(batch_size=BATCH_SIZE)
    parts = open_parts(options.source)
    num_classes = parts.train.num_classes
    spec = get_spec(options.network.network)
    mean, std = options.pixels.normalisation(spec.mean, spec.std)
    loaders = train, _ = get_loaders(options, parts, run, InputConf(spec.data_shape, mean, std))
    train.start()  # while the network is built
    options.run.settle_epoch_div_factor(1, len(train))
    block, input_conf = get_network(options, run, num_classes)
    log_data(options, parts)
    names = parts.train.class_names
    facts = ModelFacts(
        task="image",
        network=spec.name,
        overrides=options.network.overrides(),
        num_classes=num_classes,
        class_names=None if names is None else list(names),
        data_shape=input_conf.data_shape,
        mean=input_conf.mean,
        std=input_conf.std,
        resize=options.data.resize,
    )
    return parts, run.train(block, loaders, facts, task_of(options, num_classes))


def log_data(options: ImageJobOptions, parts: ImageParts) -> None:
    """Log what is going to be trained on."""
    num_classes = parts.train.num_classes

    def size(part: Any) -> int:
        return 0 if part is None else len(part.samples)

    LOGGER.info(
        "Data       %s: %d images to train, %d to validate%s%s, %d classes (chance: %.2f %% top-1)",
        parts.train.origin,
        size(parts.train),
        size(parts.val),
        " (the test part)" if options.source.select_on_test else "",
        "" if parts.test is None else f", {size(parts.test)} to test",
        num_classes,
        100 / num_classes,
    )
    LOGGER.info(
        "Images     %d x %d pixels, augmentation %s (validation: shorter side %d, centre)",
        options.data.crop_size,
        options.data.crop_size,
        options.data.augmentation,
        options.data.resize,
    )
