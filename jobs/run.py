"""What the scripts share: options of the network, and what is made of the options.

It joins ``network/`` and ``train/``, which do not know one another; ``jobs.arguments`` has the
options that concern training alone.
"""

import argparse
import logging
import os
import time

from checkpoint.released import locate
from checkpoint.store import CheckpointStore
from glore_common import UsageError
from jobs import arguments
from mxnet_compat import mx
from network.batch_norm import with_batch_norm
from network.block import FINE_TUNE_LR_MULT, build_block
from network.builder import get_spec
from network.initializer import CONTEXTS, DEFAULT_RULES, UNITS
from network.pretrained import load_pretrained
from network.specs import PLACEMENTS
from network.summary import count
from network.symbol_context import MODES
from train import workers as distributed
from train.loop import Learner, RunConfig, epoch_bounds, train_and_evaluate
from train.precise_bn import PreciseBN
from train.report import Reporter
from train.schedule import make_schedule, steps_from_samples

LOGGER = logging.getLogger("glore")

# Where --loss-scale dynamic begins.
DYNAMIC_LOSS_SCALE = 2.0**16
# Network options that are overrides of get_symbol under the same name.
_OVERRIDES = (
    "clip_length",
    "crop_size",
    "glore",
    "block",
    "block_ratio",
    "block_positions",
    "block_placement",
    "nl_mode",
    "nl_sub_sample",
    "num_node",
    "num_state",
    "normalize",
    "glore_flavour",
    "dropout",
)


def add_architecture_arguments(parser, network, dropout="0.5 in 3D"):
    """Add the group ``network``: which one, and its overrides.

    Parameters
    ----------
    parser : jobs.arguments.Parser
    network : str
        The default.
    dropout : str
        What ``--help`` says of the default of ``--dropout``.

    Returns
    -------
    The group.
    """
    group = parser.add_argument_group("network")
    group.add_argument("--network", default=network, help="see README's table of networks")
    group.add_argument(
        "--glore",
        metavar="UNITS",
        help="GloRe units: '2-3' (that many in conv3 and conv4), '3:1,3;4:1,3,5' or none "
        "(default: the network's own)",
    )
    group.add_argument(
        "--block",
        metavar="KINDS",
        help="blocks of the kinds gc, se, snl, nl, glore: 'gc', 'gc@c3-c5,nl@4:5/after', or none "
        "(default: the network's own)",
    )
    group.add_argument(
        "--block-ratio", metavar="SHARE", help="width within context blocks, such as 1/16"
    )
    group.add_argument(
        "--block-positions", metavar="WHERE", help="of all context blocks: c3-c5, all, '3:1,3;4:5'"
    )
    group.add_argument(
        "--block-placement",
        choices=PLACEMENTS,
        help="of all context blocks: before the shortcut sum, or after it",
    )
    group.add_argument("--nl-mode", choices=MODES, help="form of the Non-local blocks")
    arguments.add_flag(
        group, "--nl-sub-sample", "Non-local blocks compare with a 2x2 pooled map", default=None
    )
    group.add_argument("--num-node", type=arguments.positive_int, help="nodes of each unit")
    group.add_argument("--num-state", type=arguments.positive_int, help="states of each unit")
    arguments.add_flag(
        group, "--normalize", "units divide by the number of positions", default=None
    )
    group.add_argument("--dropout", type=float, help=f"before the classifier (default: {dropout})")
    return group


def add_network_arguments(parser, network, dropout="0.5 in 3D"):
    """Add the group ``network``: which one, its overrides, and what it starts from.

    See :func:`add_architecture_arguments`.
    """
    group = add_architecture_arguments(parser, network, dropout)
    group.add_argument(
        "--pretrained",
        metavar="FILE|NAME",
        default="",
        help="start from these weights: an MXNet prefix or .params, a PyTorch .pth, or the name of "
        "a released network; a 2D network's kernels are inflated for a 3D one",
    )
    arguments.add_flag(
        group,
        "--fresh-units",
        "units and context blocks that --pretrained lacks start afresh",
    )
    arguments.add_flag(
        group, "--fine-tune", "all layers but the classifier learn at half the learning rate"
    )


def three(element):
    """Return a type for three comma-separated numbers, or one for all channels."""

    def convert(text):
        values = arguments.comma_list(element)(text)
        if len(values) not in (1, 3):
            raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} values, not 3 (or 1)")
        return values if len(values) == 3 else values * 3

    return convert


def add_pixel_arguments(group):
    """Add --rgb-mean and --rgb-std or --scale, in the units of MXNet's own scripts."""
    group.add_argument(
        "--rgb-mean",
        type=three(float),
        metavar="R,G,B",
        help="what is subtracted, of pixels 0..255 (default: the network's, 124,117,104)",
    )
    scale = group.add_mutually_exclusive_group()
    scale.add_argument(
        "--rgb-std",
        type=three(arguments.positive_float),
        metavar="R,G,B",
        help="what is then divided by (default: the network's, 1 / 0.0167)",
    )
    scale.add_argument(
        "--scale", type=arguments.positive_float, help="what is multiplied by instead"
    )


def add_image_arguments(group, rotation, workers_alias):
    """Add how training images are turned, mirrored and read.

    Parameters
    ----------
    group : argparse's group
    rotation : float
        Default of --rotation, in degrees.
    workers_alias : str
        Another name of --num-workers.
    """
    arguments.add_flag(group, "--flip", "mirror half of the images", default=True)
    group.add_argument(
        "--rotation",
        type=arguments.number(float, 0.0, 180.0),
        default=rotation,
        help="largest random rotation in degrees",
    )
    group.add_argument(
        "--num-workers",
        workers_alias,
        type=arguments.count,
        help="decoding processes; 0: none (default: the physical cores, at most 8)",
    )
    arguments.add_flag(group, "--strict-data", "stop at the first unreadable image")


def normalisation(args, own):
    """Return mean and std on the scale 0..1: those asked for, else ``own.mean`` and ``own.std``."""
    mean, std = own.mean, own.std
    if args.rgb_mean:
        mean = tuple(value / 255 for value in args.rgb_mean)
    if args.rgb_std:
        std = tuple(value / 255 for value in args.rgb_std)
    if args.scale:
        std = (1 / (255 * args.scale),) * 3
    return mean, std


def add_other_arguments(parser):
    """Add the group ``other``: --dry-run and --debug-mode; returns it."""
    group = parser.add_argument_group("other")
    arguments.add_flag(group, "--dry-run", "build everything, run one batch, print the plan")
    arguments.add_flag(group, "--debug-mode", "log more")
    return group


def settle_run(args, data_name):
    """Fill in what follows from other options: the task's name, the length of a validation."""
    if args.max_val_batches is None:
        # A trial of a few steps is not followed by a validation that takes far longer.
        args.max_val_batches = args.max_steps or 0
    if not args.task_name:
        args.task_name = f"{data_name}_{get_spec(args.network).name}"


def check_network_arguments(args):
    """Find mistakes before anything slow starts."""
    get_spec(args.network)
    if args.pretrained.lower() in ("false", "none"):
        args.pretrained = ""
    if args.pretrained.lower() == "true":
        raise UsageError(
            "--pretrained takes the file or the name of the weights to start from. "
            "See 'Comparing with the released weights' and 'Converting released PyTorch weights' "
            "in README.md."
        )


def network_overrides(args):
    """Return the keywords for ``get_symbol`` that the command line asks for."""
    given = ((name, getattr(args, name, None)) for name in _OVERRIDES)
    return {name: value for name, value in given if value is not None}


def get_block(args, symbol, input_conf, contexts, lr_mult=None, wd_mult=None, rules=()):
    """Return the network as a Gluon block: fresh, or with the weights of ``--pretrained``.

    ``lr_mult`` and ``wd_mult`` are rule sets of :mod:`network.block`; ``--fine-tune`` has its own
    for the learning rate. ``rules`` (:mod:`network.initializer`) go before the default ones for
    what starts afresh.
    """
    if args.dtype == "float16" and any(c.device_type.startswith("cpu") for c in contexts):
        raise UsageError(
            "--dtype float16 is for GPUs: MXNet has no fast float16 on a CPU. Leave it out, or "
            "name GPUs with --gpus."
        )
    params = None
    plain = symbol
    symbol = with_batch_norm(symbol, args.batch_norm, contexts)
    if args.pretrained:
        params = load_pretrained(
            symbol,
            locate(args.pretrained),
            {"data": (1, *input_conf.data_shape)},
            allow_missing=(UNITS, CONTEXTS) if args.fresh_units else (),
            seed=args.random_seed,
            rules=(*rules, *DEFAULT_RULES),
        )
    block = build_block(
        symbol,
        input_conf,
        ctx=contexts,
        params=params,
        initializer=None if args.pretrained else rules,
        seed=args.random_seed,
        lr_mult=FINE_TUNE_LR_MULT if args.fine_tune else lr_mult,
        wd_mult=wd_mult,
    )
    # What checkpoints keep is for any number of devices.
    block.symbol = plain
    if args.dtype != "float32":
        block.cast(args.dtype)
    return block


def join(args):
    """Join the workers of a distributed run (``--kv-store``); to be used in a ``with`` block."""
    return distributed.join(args.kv_store)


def get_contexts(args):
    """Return the devices of ``--gpus`` or ``--cpus``."""
    return arguments.devices(args.gpus, cpus=args.cpus)


def get_schedule(args, train_batches, workers=1):
    """Return the learning-rate schedule for a training set of so many batches.

    ``train_batches`` are those of one of ``workers`` workers.
    """

    def steps(logged_epochs):
        parts = range(logged_epochs)
        bounds = (epoch_bounds(part, train_batches, args.epoch_div_factor) for part in parts)
        return sum(-(-(last - first) // args.accumulate) for _, first, last in bounds)

    lr_steps = steps_from_samples(args.lr_steps, args.batch_size * args.accumulate * workers)
    warmup_steps = args.warmup_steps
    steps_per_pass = steps(args.epoch_div_factor)
    if args.lr_step_epochs is not None:
        lr_steps = [int(passes * steps_per_pass) for passes in args.lr_step_epochs]
    if args.warmup_epochs is not None:
        warmup_steps = int(args.warmup_epochs * steps_per_pass)
    return make_schedule(
        args.lr_schedule,
        args.lr_base * (workers if args.lr_scaling == "linear" else 1),
        steps=lr_steps,
        factor=args.lr_factor,
        total_steps=steps(args.end_epoch),
        power=args.lr_power,
        final_lr=args.lr_final,
        warmup_steps=warmup_steps,
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
        loss_scale=args.loss_scale or DYNAMIC_LOSS_SCALE,
        dynamic_loss_scale=args.loss_scale is None,
        label_smoothing=args.label_smoothing,
        precise_bn=PreciseBN(*args.precise_bn_batches) if args.precise_bn else None,
        kvstore=args.kv_store,
        update_on_kvstore=args.update_on_kvstore,
        compression=(args.compression_threshold if args.gradient_compression == "2bit" else None),
        share_task=args.share_task_name,
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


def log_schedule(args, train_batches, group=None):
    """Log how long the training is going to be, and where its files go."""
    if group is not None and group.size > 1:
        LOGGER.info(
            "Workers    this is %d of %d (%s); learning rates below %s",
            group.rank,
            group.size,
            args.kv_store,
            f"times {group.size}" if args.lr_scaling == "linear" else "as they are",
        )
    LOGGER.info(
        "Schedule   %d logged epochs of 1/%d pass (%d batches of %d), %s, learning rate %g (%s)",
        args.end_epoch,
        args.epoch_div_factor,
        -(-train_batches // args.epoch_div_factor),
        args.batch_size,
        args.optimizer,
        args.lr_base,
        args.lr_schedule,
    )
    LOGGER.info("Files      %s", os.path.join(args.model_dir, args.task_name + "_*"))


def dry_run(block, loader, optimizer, schedule, run, contexts, batch_hook=None, group=None):
    """Train one batch, and write nothing."""
    learner = Learner(block, optimizer, contexts, run, batch_hook, group, schedule)
    started = time.perf_counter()
    batch = next(iter(loader))
    read = time.perf_counter()
    samples, _ = learner.group.agree(batch[0].shape[0], None)
    results = learner.step([batch], schedule(1), run.seed, samples)
    loss = sum(float(loss.sum().asscalar()) for losses, _, _ in results for loss in losses)
    done = time.perf_counter()
    LOGGER.info(
        "One batch: loss %.4f, %.1f s to read, %.1f s to train. Nothing was written.",
        loss / batch[0].shape[0],
        read - started,
        done - read,
    )


def benchmark(block, batch, optimizer, schedule, run, contexts, steps, batch_hook=None, group=None):
    """Time training steps on one batch that stays in memory, and log samples per second.

    Parameters
    ----------
    batch : (NDArray, NDArray)
        Data and labels.
    steps : int
        How many; the first ones (a fifth, at most 10, and one at least where there are two) are
        not timed.
    group : train.workers.Group, optional
        The workers, which all do this.

    Returns
    -------
    float
        Samples per second over all workers, the mean over the timed steps.
    """
    learner = Learner(block, optimizer, contexts, run, batch_hook, group, schedule)
    warmup = min(max(1, steps // 5), 10, steps - 1)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        samples, _ = learner.group.agree(batch[0].shape[0] * run.accumulate, None)
        results = learner.step([batch] * run.accumulate, schedule(step), run.seed, samples)
        if step in (warmup, steps):
            # Else steps are queued, as in training.
            loss = sum(float(loss.sum().asscalar()) for loss in results[-1][0])
            mx.nd.waitall()
        if step == warmup:
            started = time.perf_counter()
    seconds = (time.perf_counter() - started) / (steps - warmup)
    LOGGER.info(
        "Benchmark  %.2f samples/s in training: %.3f s a step of %d, mean of %d steps after %d of "
        "warm-up; loss %.4f. Nothing was read or written.",
        samples / seconds,
        seconds,
        samples,
        steps - warmup,
        warmup,
        loss / batch[0].shape[0],
    )
    return samples / seconds


def train_network(
    args,
    block,
    loaders,
    optimizer,
    schedule,
    contexts,
    log_file,
    settings,
    write_bad_files,
    batch_hook=None,
    group=None,
):
    """Train, or try one batch with ``--dry-run``; report unreadable files; close the loaders.

    Parameters
    ----------
    args : argparse.Namespace
    block : network.block.SymbolNet
    loaders : (loader, loader)
        For training and validation; the latter may be None.
    optimizer, schedule, contexts, batch_hook :
        See :func:`train.loop.train_and_evaluate`.
    log_file : str or None
        Other logs go to its folder.
    settings : dict
        Kept in checkpoints beside the network's name and overrides; None is left out.
    write_bad_files : callable
        (loaders, path) -> number of files that could not be read.
    group : train.workers.Group, optional
        The workers, if there are several; each has its own share of the data and its own list of
        unreadable files.

    Returns
    -------
    (train.loop.Summary, str) or None
        What was reached, and the path of the curves; None after a dry run.
    """
    train, val = loaders
    run = get_run_config(args)
    log_dir = os.path.dirname(log_file or "") or "."
    worker = group.rank if group is not None else 0
    try:
        if args.dry_run:
            dry_run(block, train, optimizer, schedule, run, contexts, batch_hook, group)
            return None
        reporter = Reporter(
            args.task_name, log_dir=log_dir, tensorboard=args.tensorboard, files=not worker
        )
        summary = train_and_evaluate(
            block,
            train,
            val,
            optimizer,
            schedule,
            run,
            contexts=contexts,
            batch_hook=batch_hook,
            reporter=reporter,
            settings={
                "network": get_spec(args.network).name,
                "overrides": network_overrides(args),
                **{name: value for name, value in settings.items() if value is not None},
            },
            group=group,
        )
        return summary, reporter.curves_path
    finally:
        loaders = [loader for loader in loaders if loader is not None]
        if not args.dry_run:
            name = f"bad-files-worker{worker}" if worker else "bad-files"
            path = os.path.join(log_dir, f"{args.task_name}_{name}.tsv")
            found = write_bad_files(loaders, path)
            if found:
                LOGGER.warning("%d files could not be read; they are listed in %s", found, path)
        for loader in loaders:
            loader.close()
