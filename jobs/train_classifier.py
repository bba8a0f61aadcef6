"""Train an image classifier on CUB-200-2011, on a folder of classes or on made-up images.

Made for fine-grained classification with a post-activation ResNet-18 and GloRe units (Chen et al.,
CVPR 2019) in it. Options and recipe are those of a public reproduction whose units made training
worse or impossible; ``--glore-flavour report`` builds its unit, and docs/res4-stability.md says
what was wrong. One epoch is chosen on images held out of the training part, and the test part is
looked at once, in the end.
"""

import logging
import math
import os
from typing import Optional

from checkpoint.store import CheckpointStore
from glore_common import UsageError
from glore_options import parse
from network.builder import get_spec
from train.loop import Summary
from train.plots import plot_metric
from train.report import log_to

from .evaluate import evaluate_images
from .model import open_model
from .options import ClassifierOptions
from .run import Run, started
from .sources import open_parts, settle_files
from .train_image import run_training, settle_images

LOGGER = logging.getLogger("glore")
CROP_SIZE, DEMO_CROP_SIZE = 224, 64
# Res3 and Res4 of the reproduction are the stages with 256 and 512 channels of a ResNet-18, whose
# input they halve for the fourth and the fifth time: conv4 and conv5 here.
GLORE_STAGES = {"res3": (4,), "res4": (5,), "res3+res4": (4, 5)}


def settle(options: ClassifierOptions) -> None:
    """Fill in what was not given, and find mistakes before anything slow starts."""
    task = settle_units(options)
    demo = options.source.dataset == "demo"
    settle_images(options, options.source.dataset, DEMO_CROP_SIZE if demo else CROP_SIZE)
    settle_files(options.source)
    checkpoints, output = options.checkpoints, options.output
    if task:
        checkpoints.task_name = task
    if output.output_dir is None:
        output.output_dir = os.path.join(".", "exps", "classifier", checkpoints.task_name)
    checkpoints.model_dir = checkpoints.model_dir or os.path.join(output.output_dir, "checkpoints")
    options.logging.log_file = options.logging.log_file or os.path.join(
        output.output_dir, "log.txt"
    )


def settle_units(options: ClassifierOptions) -> str:
    """Turn --glore and --insert-after into places; return the task's name, unless it was given."""
    network = options.network
    spec = get_spec(network.network)
    name = f"{options.source.dataset}_{spec.name}"
    wanted = network.glore or "none"
    if network.insert_after:
        if wanted != "none":
            raise UsageError("give --glore, or --insert-after for other places, not both")
        network.glore, wanted = network.insert_after, "glore"
    elif wanted in GLORE_STAGES:
        stages = GLORE_STAGES[wanted]
        network.glore = ";".join(f"{stage}:{spec.blocks[stage - 2]}" for stage in stages)
    elif wanted != "none":
        wanted = "glore"
    if wanted == "none":
        if network.glore_flavour or network.normalize or network.num_state:
            raise UsageError(
                "--glore-flavour, --normalize and --num-state say what GloRe units are like: give "
                "--glore res3, res4 or res3+res4 too"
            )
        network.num_node = network.normalize = None
    else:
        network.glore_flavour = network.glore_flavour or "video"
        report = network.glore_flavour == "report"
        if network.normalize is None:
            network.normalize = not report
        name += f"_{wanted}" + ("-report" if report else "")
    given = options.checkpoints.task_name or options.checkpoints.model_prefix
    return "" if given else name


def warn_if_nothing_was_learned(options: ClassifierOptions, loss: float, num_classes: int) -> None:
    """Say that the last epoch's training loss is that of a guess or worse, and what may help."""
    guess = math.log(num_classes)
    if loss < guess:
        return
    way_out = f"a smaller --lr than {options.schedule.lr_base:g}"
    if options.network.glore_flavour == "report":
        way_out += ", or --glore-flavour video: the reproduction's unit is known to fail"
    LOGGER.warning(
        "The network has learned nothing: the training loss of the last epoch, %.4g, is not below "
        "that of a guess among %d classes, %.4g. What may help: more epochs, %s",
        loss,
        num_classes,
        guess,
        way_out,
    )


def best_checkpoint(options: ClassifierOptions, summary: Summary) -> str:
    """Return the parameters' file of the best epoch that was saved."""
    checkpoints = options.checkpoints
    store = CheckpointStore(checkpoints.model_dir, checkpoints.task_name, checkpoints.keep)
    best = f"{store.epoch_path(summary.best['epoch'])}.params"
    if os.path.exists(best):
        return best
    LOGGER.warning(
        "Epoch %d, the best, has no checkpoint (it was cut short, or --save-frequency passed it "
        "over): the last one is tested",
        summary.best["epoch"],
    )
    return f"{summary.checkpoint}.params"


def train(options: ClassifierOptions, run: Run) -> None:
    """Train, draw the graphs, choose an epoch, test it."""
    parts, done = run_training(options, run)
    if done is None or not run.group.is_main:
        return
    summary, _ = done
    folder = options.output.output_dir
    warn_if_nothing_was_learned(options, summary.history[-1]["train_loss"], parts.train.num_classes)
    graphs = [os.path.join(folder, "graphs", name) for name in ("loss.png", "acc.png")]
    plot_metric(summary.history, "loss", graphs[0], "cross entropy")
    plot_metric(summary.history, "top1", graphs[1], "accuracy")
    LOGGER.info("Graphs     %s", ", ".join(graphs))
    best = best_checkpoint(options, summary)
    LOGGER.info("Best       %s (last: %s.params)", best, summary.checkpoint)
    if parts.test is not None:
        with run.group.heartbeat.phase("testing"):
            evaluate_images(
                open_model(best),
                parts.test,
                options.data,
                contexts=run.contexts,
                prefix=os.path.join(folder, "test"),
                batch_size=options.images.test_batch,
            )


def test(options: ClassifierOptions, run: Run) -> None:
    """Test a checkpoint of an earlier run on the test part."""
    model = open_model(options.output.evaluate, crop_size=options.data.crop_size)
    part = open_parts(options.source).test
    if part is None:
        raise UsageError("the data have no test part: test with evaluate.py --folder or --rec")
    folder = options.output.output_dir or os.path.dirname(model.path)
    stem = os.path.splitext(os.path.basename(model.path))[0]
    evaluate_images(
        model,
        part,
        options.data,
        contexts=run.contexts,
        prefix=os.path.join(folder, f"{stem}_test"),
        batch_size=options.images.test_batch,
    )


def main(argv: Optional[list[str]] = None) -> None:
    """Train or test as the command line says."""
    options = parse(ClassifierOptions(), argv, (__doc__ or "").split("\n\n")[0])
    if options.output.evaluate:
        # Its own manifest says what it is of; the options here say which images.
        settle_files(options.source)
        options.logging.dry_run = True
        with started(options) as run:
            test(options, run)
        return
    with log_to(None, logging.INFO):
        settle(options)
    with started(options) as run:
        train(options, run)
