"""Train a video network on Kinetics, UCF101, HMDB51 or the demo videos.

The options are those of facebookresearch/GloRe's script of the same name, and more; the recipe is
its single-node one. See README.md for what a run leaves behind and how to continue it.
"""

import json
import logging
import os
import sys
import time

from data.iterator_factory import get_train_loader, get_val_loader, random_crop_transform
from data.video_iterator import write_bad_files
from dataset import get_config, list_datasets, prepare_demo
from glore_common import UsageError, run_main, write_text
from network.block import FINE_TUNE_LR_MULT, KINETICS_LR_MULT, KINETICS_WD_MULT, build_block
from network.checkpoint import load_pretrained
from network.summary import count
from network.symbol_builder import get_spec, get_symbol
from train import arguments
from train.callback import Reporter, default_log_file, log_to
from train.checkpoint import CheckpointStore
from train.lr_scheduler import make_schedule, steps_from_samples
from train.model import Learner, RunConfig, epoch_bounds, train_and_evaluate
from train.optimizer import NesterovSGD
from train.precise_bn import PreciseBN

LOGGER = logging.getLogger("glore")

# What the recipe leaves to the data set; an option given on the command line wins.
OF_DATASET = (
    "clip_length",
    "train_frame_interval",
    "val_frame_interval",
    "crop_size",
    "augmentation",
    "batch_size",
    "lr_base",
    "lr_schedule",
    "lr_steps",
    "warmup_steps",
    "end_epoch",
    "epoch_div_factor",
)
# Kept in checkpoints: a resumed run says which of them are not as they were.
RECORDED = (
    "batch_size",
    "train_frame_interval",
    "augmentation",
    "lr_base",
    "lr_schedule",
    "lr_steps",
    "lr_factor",
    "warmup_steps",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "fine_tune",
    "dtype",
)
# Upstream's options of torch.distributed.
FOREIGN = {
    "backend": "MXNet's key-value store takes its place",
    "world_size": "one process uses all the devices of --gpus",
    "dist_url": "one process uses all the devices of --gpus",
}


def add_network_arguments(parser):
    """Add the group ``network``: which one, and its overrides."""
    group = parser.add_argument_group("network")
    group.add_argument("--network", default="RESNET50_GLORE", help="see README's table of networks")
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
    group.add_argument("--dropout", type=float, help="before the classifier (default: 0.5 in 3D)")
    group.add_argument(
        "--pretrained",
        metavar="FILE",
        default="",
        help="start from these weights: an MXNet prefix or .params, or a PyTorch .pth; a 2D "
        "network's are inflated",
    )
    arguments.add_flag(
        group, "--fine-tune", "all layers but the classifier learn at half the learning rate"
    )


def add_data_arguments(parser):
    """Add the group ``data``: which data set, how clips are taken, and the workers."""
    group = parser.add_argument_group("data (defaults marked * are the data set's)")
    group.add_argument("--dataset", default="Kinetics", help=", ".join(list_datasets()))
    group.add_argument("--data-root", help="folder that holds DATASET/raw (default: ./dataset)")
    group.add_argument(
        "--split", type=arguments.positive_int, default=1, help="official split (UCF101, HMDB51)"
    )
    for name, text in (
        ("--clip-length", "frames of a clip *"),
        ("--train-frame-interval", "frames from one to the next *"),
        ("--val-frame-interval", "the same for validation *"),
        ("--crop-size", "side of the input in pixels *"),
        ("--batch-size", "clips per step *"),
        ("--epoch-div-factor", "logged epochs per pass over the data *"),
    ):
        group.add_argument(name, type=arguments.positive_int, help=text)
    group.add_argument(
        "--augmentation",
        choices=("full", "crop"),
        help="full: random scale, aspect, crop, flip, colours, noise; crop: random crop and flip *",
    )
    group.add_argument(
        "--num-workers",
        type=arguments.count,
        help="decoding processes; 0: none (default: the physical cores, at most 8)",
    )
    group.add_argument(
        "--max-failures",
        type=arguments.positive_int,
        default=10,
        help="distinct unreadable videos in a row that stop the run",
    )
    arguments.add_flag(group, "--strict-data", "stop at the first unreadable video")


def get_parser():
    """Return the script's argument parser."""
    parser = arguments.Parser(__doc__.split("\n\n")[0])
    add_network_arguments(parser)
    add_data_arguments(parser)
    arguments.add_schedule_arguments(parser)
    # The data set's, unless given: Kinetics has the published recipe.
    parser.set_defaults(**dict.fromkeys(OF_DATASET))
    arguments.add_precise_bn_arguments(parser)
    arguments.add_run_arguments(parser, end_epoch=None)
    arguments.add_device_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
    arguments.add_logging_arguments(parser)
    group = parser.add_argument_group("other")
    arguments.add_flag(group, "--dry-run", "build everything, run one batch, print the plan")
    arguments.add_flag(group, "--debug-mode", "log more")
    group.add_argument(
        "--run-file", default="", help="write what the testing script needs to know to this file"
    )
    for name, instead in FOREIGN.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, metavar="X", help=f"accepted, without effect: {instead}")
    return parser


def settle(args, config):
    """Fill in what the command line left to the data set."""
    for name in OF_DATASET:
        if getattr(args, name) is None:
            setattr(args, name, getattr(config, name))
    if args.max_val_batches is None:
        # A trial of a few steps is not followed by a validation that takes far longer.
        args.max_val_batches = args.max_steps or 0
    if not args.task_name:
        args.task_name = f"{config.name}_{get_spec(args.network).name}"


def network_overrides(args):
    """Return the keywords for ``get_symbol`` that the command line asks for."""
    overrides = {"clip_length": args.clip_length, "crop_size": args.crop_size}
    for name in ("glore", "num_node", "num_state", "normalize", "dropout"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    return overrides


def get_loaders(args, config, input_conf):
    """Return the loaders for training and validation."""
    common = {
        "num_classes": config.num_classes,
        "clip_length": args.clip_length,
        "crop_size": args.crop_size,
        "mean": input_conf.mean,
        "std": input_conf.std,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "strict": args.strict_data,
        "max_failures": args.max_failures,
    }
    transform = None
    if args.augmentation == "crop":
        transform = random_crop_transform(
            args.crop_size, input_conf.mean, input_conf.std, config.flip
        )
    train = get_train_loader(
        config.train_list,
        config.train_root,
        frame_interval=args.train_frame_interval,
        flip=config.flip,
        transform=transform,
        seed=args.random_seed,
        **common,
    )
    val = get_val_loader(
        config.val_list, config.val_root, frame_interval=args.val_frame_interval, **common
    )
    return train, val


def get_block(args, symbol, input_conf, contexts):
    """Return the network as a Gluon block, with the recipe's multipliers."""
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
        lr_mult=FINE_TUNE_LR_MULT if args.fine_tune else KINETICS_LR_MULT,
        wd_mult=KINETICS_WD_MULT,
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


def log_plan(args, config, symbol, input_conf, loaders):
    """Log what is going to be trained on what, and for how long."""
    counted = count(symbol, input_conf)
    train, val = loaders
    shape = " x ".join(map(str, input_conf.data_shape))
    LOGGER.info(
        "Network    %s: %s parameters, %.2f G multiply-adds for an input of %s",
        get_spec(args.network).name,
        f"{counted.params:,}",
        counted.macs / 1e9,
        shape,
    )
    LOGGER.info(
        "Data       %s: %d videos to train, %d to validate, %d classes (chance: %.2f %% top-1)",
        config.name,
        len(train.dataset),
        val.num_samples,
        config.num_classes,
        100 / config.num_classes,
    )
    LOGGER.info(
        "Clips      %d frames, one in %d (validation: one in %d), %d x %d pixels",
        args.clip_length,
        args.train_frame_interval,
        args.val_frame_interval,
        args.crop_size,
        args.crop_size,
    )
    LOGGER.info(
        "Schedule   %d logged epochs of 1/%d pass (%d batches of %d), learning rate %g (%s)",
        args.end_epoch,
        args.epoch_div_factor,
        -(-len(train) // args.epoch_div_factor),
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
    loader.close()
    LOGGER.info(
        "One batch: loss %.4f, %.1f s to read, %.1f s to train. Nothing was written.",
        loss / batch[0].shape[0],
        read - started,
        done - read,
    )


def write_run_file(args, config, checkpoint, curves):
    """Write what ``test/test-single-clip.py --from-run`` wants to know."""
    folder, stem = os.path.split(checkpoint)
    content = {
        "network": get_spec(args.network).name,
        "overrides": network_overrides(args),
        "dataset": config.name,
        "split": args.split,
        "data_root": os.path.dirname(config.root),
        "clip_length": args.clip_length,
        "frame_interval": args.val_frame_interval,
        "crop_size": args.crop_size,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "gpus": args.gpus,
        "model_root": folder,
        "model_subpath": f"{stem}.params",
        "curves": curves,
    }
    write_text(args.run_file, json.dumps(content, indent=1) + "\n")


def check_early(args):
    """Find mistakes before anything slow starts: names, values that exclude one another."""
    get_spec(args.network)
    if args.pretrained.lower() in ("false", "none"):
        args.pretrained = ""
    if args.pretrained.lower() == "true":
        raise UsageError(
            "--pretrained takes the file to start from; released weights are not downloaded. "
            "See 'Converting released weights' in README.md."
        )
    for name, instead in FOREIGN.items():
        if getattr(args, name) is not None:
            LOGGER.warning("--%s has no effect: %s", name.replace("_", "-"), instead)


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    get_spec(args.network)
    config = get_config(args.dataset, args.data_root, split=args.split)
    settle(args, config)
    log_file = None if args.dry_run else args.log_file or default_log_file(args.task_name)
    with log_to(log_file, logging.DEBUG if args.debug_mode else logging.INFO):
        check_early(args)
        symbol, input_conf = get_symbol(args.network, config.num_classes, **network_overrides(args))
        if len(input_conf.data_shape) != 4:
            raise UsageError(
                f"{args.network} reads single images; train_kinetics.py trains on clips"
            )
        contexts = arguments.devices(args.gpus)
        run = get_run_config(args)
        if config.name == "Demo":
            prepare_demo(args.data_root)
        config.check()
        loaders = train, val = get_loaders(args, config, input_conf)
        train.start()  # while the network is built
        log_plan(args, config, symbol, input_conf, loaders)
        block = get_block(args, symbol, input_conf, contexts)
        optimizer = NesterovSGD(momentum=args.momentum, wd=args.weight_decay)
        schedule = get_schedule(args, len(train))
        if args.dry_run:
            return dry_run(block, train, optimizer, schedule, run, contexts)
        reporter = Reporter(
            args.task_name,
            log_dir=os.path.dirname(log_file) or ".",
            tensorboard=args.tensorboard,
        )
        bad_files = os.path.join(
            os.path.dirname(log_file) or ".", f"{args.task_name}_bad-videos.tsv"
        )
        try:
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
                    "dataset": config.name,
                    **{name: getattr(args, name) for name in RECORDED},
                },
            )
        finally:
            found = write_bad_files(loaders, bad_files)
            if found:
                LOGGER.warning(
                    "%d videos could not be read; they are listed in %s", found, bad_files
                )
            for loader in loaders:
                loader.close()
        if args.run_file and summary.checkpoint:
            write_run_file(args, config, summary.checkpoint, reporter.curves_path)
            LOGGER.info("Test it    python test/test-single-clip.py --from-run %s", args.run_file)
    return None


if __name__ == "__main__":
    sys.exit(run_main(main))
