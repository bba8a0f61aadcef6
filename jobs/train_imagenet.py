"""Train an image network on ImageNet, or on any .rec file or folder of classes.

The options are those of MXNet's own image-classification examples where these have them, and
those of the other scripts here. Augmentation is that of the networks' author (cypw/DPNs); the
exact ImageNet schedule of GloRe (Chen et al., CVPR 2019) is not known, so the default one is our
choice: cosine after 5 epochs of warm-up, as in the same author's OctConv.
"""

import logging
import os
from typing import Optional

from glore_common import UsageError
from glore_options import parse

from .options import ImagenetOptions
from .run import next_commands, started
from .sources import settle_files
from .train_image import run_benchmark, run_training, settle_images

LOGGER = logging.getLogger("glore")
EPILOG = (
    "Defaults of learning rate (0.1 for a batch of 256), warm-up (5 epochs, at most a quarter of "
    "the run), --end-epoch and --optimizer are our choice: the paper's schedule is not known."
)


def settle(options: ImagenetOptions) -> None:
    """Fill in what was not given, and find mistakes before anything slow starts."""
    schedule, run = options.schedule, options.run
    if schedule.lr_schedule is None:
        given = schedule.lr_steps or schedule.lr_step_epochs
        schedule.lr_schedule = "step" if given else "cosine"
    if schedule.warmup_steps is None and schedule.warmup_epochs is None:
        schedule.warmup_epochs = min(5.0, run.end_epoch / (run.epoch_div_factor or 1) / 4)
    settle_images(options, "ImageNet", None)
    if not options.images.benchmark:
        settle_files(options.source)
        use_module_weights(options)


def use_module_weights(options: ImagenetOptions) -> None:
    """Let ``--model-prefix P --load-epoch N`` start from ``P-NNNN.params`` of a legacy job.

    Such a file holds weights alone. A checkpoint of our own, which holds all, goes first.
    """
    checkpoints = options.checkpoints
    prefix, epoch = checkpoints.model_prefix, checkpoints.resume_epoch
    if epoch < 0 or not prefix:
        return
    legacy = f"{prefix}-{epoch:04d}.params"
    if os.path.exists(legacy) and not os.path.exists(f"{prefix}_ep-{epoch:04d}.json"):
        if options.network.pretrained:
            raise UsageError(f"give --pretrained or --load-epoch of {legacy}, not both")
        LOGGER.warning("%s has weights alone: they are the start of a new run from epoch 1", legacy)
        options.network.pretrained, checkpoints.resume_epoch = legacy, -1


def main(argv: Optional[list[str]] = None) -> None:
    """Train as the command line says."""
    options = parse(ImagenetOptions(), argv, (__doc__ or "").split("\n\n")[0], epilog=EPILOG)
    settle(options)
    with started(options) as run:
        if options.images.benchmark:
            run_benchmark(options, run)
            return
        _, done = run_training(options, run)
        if done is not None and run.group.is_main:
            next_commands(done[0])
