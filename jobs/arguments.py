"""The command-line options that all training scripts share, with types that mean what they say.

``argparse``'s ``type=bool`` takes ``False`` for true and ``type=list`` splits a text into letters;
:func:`boolean` and :func:`comma_list` are what scripts use instead.
"""

import argparse
import logging
import math
import os

from glore_common import UsageError, closest_first
from mxnet_compat import mx
from train.optimizer import OPTIMIZERS
from train.schedule import SCHEDULES

LOGGER = logging.getLogger("glore.train")
# Of one process, and of the workers of a job.
KV_STORES = ("device", "local", "nccl", "dist_sync", "dist_device_sync", "dist_async")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # An option that is empty or worked out later has no default worth showing.
        if action.default in (None, "", ()) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` without abbreviations that names the closest option after a typo.

    Parameters
    ----------
    description : str
        What the script does.
    prog : str, optional
        Name of the script.
    """

    def __init__(self, description, prog=None):
        super().__init__(
            description=description, prog=prog, formatter_class=_Formatter, allow_abbrev=False
        )

    def parse_args(self, args=None, namespace=None):
        """Parse strictly: an unknown option ends the program with exit code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            option = unknown[0].split("=")[0]
            if option.startswith("-"):
                message += f" (closest: {closest_first(option, self._option_string_actions)[0]})"
            self.error(message)
        return parsed


def boolean(text):
    """Return the truth value of ``True``, ``no``, ``1``, … (letter case ignored)."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_flag(group, name, help, default=False):
    """Add a switch that takes ``--name``, ``--name True`` and ``--name False``.

    Parameters
    ----------
    group : argparse.ArgumentParser or argument group
        Where to add it.
    name : str
        ``--name``.
    help : str
        What it switches on.
    default : bool
        Value without the option.
    """
    group.add_argument(
        name, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help
    )


def comma_list(element, length=None):
    """Return a type for comma-separated values, e.g. ``comma_list(int)("45,65") == (45, 65)``.

    Parameters
    ----------
    element : callable
        Type of one value.
    length : int, optional
        How many there must be.
    """

    def convert(text):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            values = tuple(element(part) for part in parts)
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no comma-separated list of {element.__name__}"
            ) from None
        if length is not None and len(values) != length:
            raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} values, not {length}")
        return values

    return convert


def number(element, low=-math.inf, high=math.inf, above=None):
    """Return a type for a bounded number.

    Parameters
    ----------
    element : {int, float}
        What is read.
    low, high : float
        Smallest and largest value.
    above : float, optional
        Lower bound that is itself excluded.
    """

    def convert(text):
        try:
            value = element(text)
        except ValueError:
            kind = "whole number" if element is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}") from None
        if not low <= value <= high or (above is not None and value <= above):
            bounds = f"above {above}" if above is not None else f"{low} or more"
            bounds += "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return convert


positive_int = number(int, low=1)
count = number(int, low=0)
positive_float = number(float, above=0.0)
share = number(float, low=0.0, high=1.0)


def samples(text):
    """Return a sample count; ``2.4e5`` is accepted beside ``240000``."""
    value = float(text)
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise ValueError(text)
    return int(value)


def gpu_list(text):
    """Return the devices of ``--gpus``: ``()`` for a CPU (empty or ``cpu``), else GPU numbers."""
    if text.strip().lower() in ("", "cpu"):
        return ()
    numbers = comma_list(int)(text)
    if any(index < 0 for index in numbers) or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must name different GPUs, counted from 0")
    return numbers


def loss_scale(text):
    """Return the loss scale, or None for ``dynamic``."""
    return None if text.lower() == "dynamic" else positive_float(text)


def devices(gpus=None, seen=None, cpus=None):
    """Turn ``--gpus`` into MXNet contexts, and say in the log what runs where.

    Parameters
    ----------
    gpus : tuple of int, optional
        GPU numbers, ``()`` for the CPU, None for all GPUs that MXNet sees, else the CPU.
    seen : int, optional
        Number of GPUs; asked of MXNet by default.
    cpus : int, optional
        That many devices on the CPU, between which each batch is divided as between GPUs.

    Returns
    -------
    list of mxnet.Context

    Raises
    ------
    UsageError
        If a GPU does not exist.
    """
    if cpus is not None:
        if gpus:
            raise UsageError("give --gpus or --cpus, not both")
        LOGGER.info("Running on %d device(s) of the CPU, as asked", cpus)
        return [mx.cpu(index) for index in range(cpus)]
    if gpus == ():
        LOGGER.info("Running on the CPU, as asked")
        return [mx.cpu()]
    seen = mx.context.num_gpus() if seen is None else seen
    if gpus is None:
        gpus = tuple(range(seen))
        if not gpus:
            LOGGER.info("MXNet sees no GPU: running on the CPU")
            return [mx.cpu()]
    missing = [index for index in gpus if index >= seen]
    if missing:
        raise UsageError(
            f"GPU {missing[0]} was asked for, but MXNet sees {seen}. Give the ones to use with "
            "--gpus 0,1, or --gpus '' for the CPU."
            + ("" if seen else " (The package mxnet is built for CPUs; mxnet-cu112 is for GPUs.)")
        )
    LOGGER.info("Running on GPU %s", ", ".join(map(str, gpus)))
    return [mx.gpu(index) for index in gpus]


def add_device_arguments(parser, dtype=True):
    """Add the group ``devices``: --gpus, and with ``dtype`` what concerns training on several."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--gpus",
        type=gpu_list,
        metavar="LIST",
        help="GPU numbers such as 0,1; '' for the CPU (default: all GPUs, else the CPU)",
    )
    if dtype:
        group.add_argument(
            "--kv-store",
            choices=KV_STORES,
            default="device",
            help="where the gradients of several devices are added up; dist_...: of the workers of "
            "a job, see run_dist.sh",
        )
        group.add_argument(
            "--cpus",
            type=positive_int,
            metavar="N",
            help="divide each batch between N devices of the CPU, as between GPUs (for trials)",
        )
        add_flag(
            group,
            "--update-on-kvstore",
            "the key-value store (its servers) updates the weights; dist_async always does",
        )
        group.add_argument(
            "--gradient-compression",
            choices=("none", "2bit"),
            default="none",
            help="between workers: two bits for each number, what is lost is added later",
        )
        group.add_argument(
            "--compression-threshold",
            type=positive_float,
            default=0.5,
            help="2bit: gradients (sums over a batch) become minus this, 0, or this",
        )
        group.add_argument(
            "--lr-scaling",
            choices=("none", "linear"),
            default="none",
            help="linear: the learning rate is multiplied by the number of workers",
        )
        group.add_argument(
            "--batch-norm",
            choices=("local", "sync", "frozen"),
            default="local",
            help="statistics of each device; of all devices of a process together; or the running "
            "ones, which stay as they are",
        )
        group.add_argument(
            "--dtype",
            choices=("float32", "float16"),
            default="float32",
            help="type of the network; float16 keeps float32 master weights and is for GPUs",
        )
        group.add_argument(
            "--loss-scale",
            type=loss_scale,
            default=1.0,
            metavar="NUMBER|dynamic",
            help="what the loss is multiplied by before the backward pass (float16: e.g. 128); "
            "dynamic: from 65536, halved by each overflow, doubled after 2000 steps without",
        )
    return group


def add_run_arguments(parser, end_epoch, random_seed=1):
    """Add the group ``run``: how long to train, and the seed.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where to add it.
    end_epoch : int
        Default number of logged epochs.
    random_seed : int
        Default seed.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--end-epoch",
        "--num-epochs",
        type=positive_int,
        default=end_epoch,
        help="logged epochs to train",
    )
    group.add_argument(
        "--max-steps", type=positive_int, help="stop after this many steps, resumed ones included"
    )
    group.add_argument(
        "--max-val-batches",
        type=count,
        help="batches per validation; 0: no limit (default: as many as --max-steps, if given)",
    )
    group.add_argument(
        "--random-seed", type=number(int, 0, 2**31 - 1), default=random_seed, help="seed"
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up for one step",
    )
    group.add_argument(
        "--label-smoothing",
        type=number(float, 0.0, 0.99),
        default=0.0,
        help="share of each target that is spread over all classes",
    )
    return group


def add_schedule_arguments(
    parser,
    lr_base=0.05,
    lr_steps=(),
    lr_factor=0.1,
    schedule="step",
    warmup_steps=0,
    momentum=0.9,
    weight_decay=1e-4,
    optimizer="nesterov",
):
    """Add the group ``optimiser``: which one, learning rate, schedule, momentum, weight decay.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where to add it.
    lr_base, lr_steps, lr_factor, schedule, warmup_steps, momentum, weight_decay, optimizer
        Defaults of the options; ``lr_steps`` in samples.
    """
    group = parser.add_argument_group("optimiser")
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=optimizer,
        help="nesterov: PyTorch's form, the learning rate outside of the momentum; sgd: MXNet's "
        "plain momentum; nag: MXNet's Nesterov",
    )
    group.add_argument(
        "--lr-base",
        "--lr",
        type=positive_float,
        default=lr_base,
        help="learning rate after the warm-up",
    )
    group.add_argument(
        "--lr-schedule", choices=SCHEDULES, default=schedule, help="how the rate falls"
    )
    steps = group.add_mutually_exclusive_group()
    steps.add_argument(
        "--lr-steps",
        type=comma_list(samples),
        default=tuple(lr_steps),
        metavar="LIST",
        help="samples after which the rate is multiplied by --lr-factor, e.g. 1.08e7,1.56e7"
        + (f" (default: {','.join(f'{value:g}' for value in lr_steps)})" if lr_steps else ""),
    )
    steps.add_argument(
        "--lr-step-epochs",
        type=comma_list(positive_float),
        metavar="LIST",
        help="the same in passes over the data, e.g. 30,60,90",
    )
    group.add_argument("--lr-factor", type=positive_float, default=lr_factor, help="see --lr-steps")
    group.add_argument(
        "--lr-final", type=number(float, 0.0), default=0.0, help="last rate of poly and cosine"
    )
    group.add_argument("--lr-power", type=positive_float, default=0.9, help="power of poly")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument(
        "--warmup-steps", type=count, default=warmup_steps, help="steps of the linear warm-up"
    )
    warmup.add_argument(
        "--warmup-epochs",
        type=number(float, 0.0),
        help="the same in passes over the data",
    )
    group.add_argument(
        "--warmup-factor",
        type=number(float, high=1.0, above=0.0),
        default=0.1,
        help="share of the rate that the warm-up starts from",
    )
    group.add_argument(
        "--momentum",
        "--mom",
        type=number(float, 0.0, 0.999),
        default=momentum,
        help="momentum of the optimiser",
    )
    group.add_argument(
        "--weight-decay", "--wd", type=number(float, 0.0), default=weight_decay, help="weight decay"
    )
    return group


def add_precise_bn_arguments(parser):
    """Add the group ``precise BatchNorm``: --precise-bn and how many batches it takes."""
    group = parser.add_argument_group("precise BatchNorm")
    add_flag(
        group,
        "--precise-bn",
        "after each logged epoch tune BatchNorm's gammas and betas and re-estimate its statistics",
    )
    group.add_argument(
        "--precise-bn-batches",
        type=comma_list(int, 2),
        default=(400, 100),
        metavar="TUNE,ESTIMATE",
        help="batches for each (default: 400,100)",
    )
    return group


class _ModelPrefix(argparse.Action):
    """Sets ``model_dir`` and ``task_name`` of a prefix as MXNet's own scripts take it."""

    def __call__(self, parser, namespace, values, option_string=None):
        folder, name = os.path.split(values)
        if not name:
            parser.error(f"{option_string} {values} ends in no name: give DIR/NAME")
        namespace.model_prefix = values
        namespace.model_dir, namespace.task_name = folder or ".", name


def add_checkpoint_arguments(parser, model_dir="./exps/models"):
    """Add the group ``checkpoints``: where they go, how often, how many, and resuming."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--model-dir", default=model_dir, help="folder of the checkpoints")
    group.add_argument(
        "--task-name", default="", help="beginning of all file names (default: made from the rest)"
    )
    group.add_argument(
        "--model-prefix",
        action=_ModelPrefix,
        metavar="DIR/NAME",
        help="--model-dir and --task-name in one",
    )
    group.add_argument(
        "--save-frequency", type=positive_int, default=1, help="logged epochs between checkpoints"
    )
    group.add_argument(
        "--save-every-steps",
        type=count,
        default=0,
        help="steps between checkpoints within an epoch; 0: none",
    )
    group.add_argument(
        "--keep",
        type=count,
        default=0,
        help="epoch checkpoints to keep, besides the best one; 0: all",
    )
    group.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="continue from the newest whole checkpoint of this task, or from a given one",
    )
    group.add_argument(
        "--resume-epoch",
        "--load-epoch",
        type=number(int, low=-1),
        default=-1,
        help="continue after this many logged epochs; -1: see --resume",
    )
    add_flag(
        group,
        "--share-task-name",
        "do not mind another run that is writing checkpoints of this task to this folder",
    )
    add_flag(
        group,
        "--overwrite",
        "delete checkpoints of this task that are newer than the start instead of refusing",
    )
    return group


def add_logging_arguments(parser):
    """Add the group ``logging``: log file, how often, TensorBoard."""
    group = parser.add_argument_group("logging")
    group.add_argument(
        "--log-file", default="", help="log file (default: ./exps/logs/TASK_NAME.log)"
    )
    group.add_argument(
        "--log-frequency",
        "--disp-batches",
        type=positive_int,
        default=50,
        help="batches between step lines",
    )
    add_flag(group, "--tensorboard", "write TensorBoard events beside the log file")
    return group


def resume_from(args, store):
    """Combine --resume and upstream's --resume-epoch into one value for ``RunConfig.resume``.

    Parameters
    ----------
    args : argparse.Namespace
        With ``resume`` and ``resume_epoch``.
    store : checkpoint.store.CheckpointStore
        Knows how an epoch's checkpoint is called.
    """
    if args.resume_epoch < 0:
        return args.resume
    if args.resume != "none":
        raise UsageError("give --resume or --resume-epoch, not both")
    return store.epoch_path(args.resume_epoch)
