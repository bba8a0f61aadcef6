"""What the training scripts share: options of the network, and what is made of the options.

It joins ``network/`` and ``train/``, which do not know one another; ``train.arguments`` has the
options that concern training alone.
"""

import logging
import os
import time

from glore_common import UsageError
from network.block import FINE_TUNE_LR_MULT, build_block
from network.checkpoint import load_pretrained
from network.summary import count
from network.symbol_builder import get_spec
from train import arguments
from train.callback import Reporter
from train.checkpoint import CheckpointStore
from train.lr_scheduler import make_schedule, steps_from_samples
from train.model import Learner, RunConfig, epoch_bounds, train_and_evaluate
from train.precise_bn import PreciseBN

LOGGER = logging.getLogger("glore")

# Network options that are overrides of get_symbol under the same name.
_OVERRIDES = ("glore", "num_node", "num_state", "normalize", "dropout")


def add_network_arguments(parser, network, dropout="0.5 in 3D"):
    """Add the group ``network``: which one, its overrides, and what it starts from.

    Parameters
    ----------
    parser : train.arguments.Parser
    network : str
        The default.
    dropout : str
        What ``--help`` says of the default of ``--dropout``.
    """
    group = parser.add_argument_group("network")
    group.add_argument("--network", default=network, help="see README's table of networks")
    group.add_argument(
        "--glore",
        metavar="UNITS",
        help="GloRe units: '2-3' (that many in conv3 and conv4), '3:1,3;4:1,3,5' or none "
        "(default: the network's own)",
    )
    group.add_argument("--num-node", type=arguments.positive_int, help="nodes of each unit")
    group.add_argument("--num-state", type=arguments.positive_int, help="states of each unit")
    arguments.add_flag(
        group, "--normalize", "units divide by the number of positions", default=None
    )
    group.add_argument("--dropout", type=float, help=f"before the classifier (default: {dropout})")
    group.add_argument(
        "--pretrained",
        metavar="FILE",
        default="",
        help="start from these weights: an MXNet prefix or .params, a PyTorch .pth, or the name of "
        "a released network; a 2D network's kernels are inflated for a 3D one",
    )
    arguments.add_flag(
        group, "--fine-tune", "all layers but the classifier learn at half the learning rate"
    )


def check_network_arguments(args):
    """Find mistakes before anything slow starts."""
    get_spec(args.network)
    if args.pretrained.lower() in ("false", "none"):
        args.pretrained = ""
    if args.pretrained.lower() == "true":
        raise UsageError(
            "--pretrained takes the file or the name of the weights to start from. "
            "See 'Converting released weights' in README.md."
        )


def network_overrides(args):
    """Return the keywords for ``get_symbol`` that the command line asks for."""
    overrides = {"crop_size": args.crop_size}
    if getattr(args, "clip_length", None) is not None:
        overrides["clip_length"] = args.clip_length
    for name in _OVERRIDES:
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    return overrides


def get_block(args, symbol, input_conf, contexts, lr_mult=None, wd_mult=None):
    """Return the network as a Gluon block: fresh, or with the weights of ``--pretrained``.

    ``lr_mult`` and ``wd_mult`` are rule sets of :mod:`network.block`; ``--fine-tune`` has its own
    for the learning rate.
    """
    params = None
    if args.pretrained:
        inputs = {"data": (1, *input_conf.data_shape)}
        params = load_pretrained(symbol, args.pretrained, inputs, seed=args.random_seed)
    block = build_block(
        symbol,
        input_conf,
        ctx=contexts,
        params=params,
        seed=args.random_seed,
        lr_mult=FINE_TUNE_LR_MULT if args.fine_tune else lr_mult,
        wd_mult=wd_mult,
    )
    if args.dtype != "float32":
        block.cast(args.dtype)
    return block


def get_schedule(args, train_batches):
    """Return the learning-rate schedule."""
    parts = range(args.end_epoch)
    bounds = (epoch_bounds(part, train_batches, args.epoch_div_factor) for part in parts)
    return make_schedule(
        args.lr_schedule,
        args.lr_base,
        steps=steps_from_samples(args.lr_steps, args.batch_size * args.accumulate),
        factor=args.lr_factor,
        total_steps=sum(-(-(last - first) // args.accumulate) for _, first, last in bounds),
        power=args.lr_power,
        final_lr=args.lr_final,
        warmup_steps=args.warmup_steps,
        warmup_factor=args.warmup_factor,
    )


def get_run_config(args):
    """Return how the run is carried out."""
    store = CheckpointStore(args.model_dir, args.task_name, args.keep)
    return RunConfig(
        task_name=args.task_name,
        end_epoch=args.end_epoch,
        model_dir=args.model_dir,
        epoch_div_factor=args.epoch_div_factor,
        seed=args.random_seed,
        max_steps=args.max_steps,
        max_val_batches=args.max_val_batches,
        log_frequency=args.log_frequency,
        save_frequency=args.save_frequency,
        save_every_steps=args.save_every_steps,
        keep=args.keep,
        resume=arguments.resume_from(args, store),
        overwrite=args.overwrite,
        accumulate=args.accumulate,
        dtype=args.dtype,
        loss_scale=args.loss_scale,
        label_smoothing=args.label_smoothing,
        precise_bn=PreciseBN(*args.precise_bn_batches) if args.precise_bn else None,
    )


def log_network(args, symbol, input_conf):
    """Log the network's name, parameters and multiply-adds."""
    counted = count(symbol, input_conf)
    LOGGER.info(
        "Network    %s: %s parameters, %.2f G multiply-adds for an input of %s",
        get_spec(args.network).name,
        f"{counted.params:,}",
        counted.macs / 1e9,
        " x ".join(map(str, input_conf.data_shape)),
    )


def log_schedule(args, train_batches):
    """Log how long the training is going to be, and where its files go."""
    LOGGER.info(
        "Schedule   %d logged epochs of 1/%d pass (%d batches of %d), learning rate %g (%s)",
        args.end_epoch,
        args.epoch_div_factor,
        -(-train_batches // args.epoch_div_factor),
        args.batch_size,
        args.lr_base,
        args.lr_schedule,
    )
    LOGGER.info("Files      %s", os.path.join(args.model_dir, args.task_name + "_*"))


def dry_run(block, loader, optimizer, schedule, run, contexts):
    """Train one batch, and write nothing."""
    learner = Learner(block, optimizer, contexts, run)
    started = time.perf_counter()
    batch = next(iter(loader))
    read = time.perf_counter()
    results = learner.step([batch], schedule(1), run.seed)
    loss = sum(float(loss.sum().asscalar()) for losses, _, _ in results for loss in losses)
    done = time.perf_counter()
    LOGGER.info(
        "One batch: loss %.4f, %.1f s to read, %.1f s to train. Nothing was written.",
        loss / batch[0].shape[0],
        read - started,
        done - read,
    )


def train_network(
    args, block, loaders, optimizer, schedule, contexts, log_file, settings, write_bad_files
):
    """Train, or try one batch with ``--dry-run``; report unreadable files; close the loaders.

    Parameters
    ----------
    args : argparse.Namespace
    block : network.block.SymbolNet
    loaders : (loader, loader)
        For training and validation.
    optimizer, schedule, contexts :
        See :func:`train.model.train_and_evaluate`.
    log_file : str or None
        Other logs go to its folder.
    settings : dict
        Kept in checkpoints beside the network's name and overrides.
    write_bad_files : callable
        (loaders, path) -> number of files that could not be read.

    Returns
    -------
    (train.model.Summary, str) or None
        What was reached, and the path of the curves; None after a dry run.
    """
    train, val = loaders
    run = get_run_config(args)
    log_dir = os.path.dirname(log_file or "") or "."
    try:
        if args.dry_run:
            dry_run(block, train, optimizer, schedule, run, contexts)
            return None
        reporter = Reporter(args.task_name, log_dir=log_dir, tensorboard=args.tensorboard)
        summary = train_and_evaluate(
            block,
            train,
            val,
            optimizer,
            schedule,
            run,
            contexts=contexts,
            reporter=reporter,
            settings={
                "network": get_spec(args.network).name,
                "overrides": network_overrides(args),
                **settings,
            },
        )
        return summary, reporter.curves_path
    finally:
        if not args.dry_run:
            path = os.path.join(log_dir, f"{args.task_name}_bad-files.tsv")
            found = write_bad_files(loaders, path)
            if found:
                LOGGER.warning("%d files could not be read; they are listed in %s", found, path)
        for loader in loaders:
            loader.close()
