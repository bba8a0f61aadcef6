"""Train a video network on Kinetics, UCF101, HMDB51 or the demo videos.

The options are those of facebookresearch/GloRe's script of the same name, and more; the recipe is
its single-node one. See README.md for what a run leaves behind and how to continue it.
"""

import json
import logging
import os

from data.video.iterator import write_bad_files
from data.video.loaders import get_train_loader, get_val_loader, random_crop_transform
from dataset import get_config, list_datasets, prepare_demo
from glore_common import UsageError, write_text
from jobs import arguments
from jobs import run as glore_cli
from network.block import KINETICS_LR_MULT, KINETICS_WD_MULT
from network.builder import get_spec, get_symbol
from train.optimizer import make_optimizer
from train.report import default_log_file, log_to

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
    "lr_step_epochs",
    "warmup_steps",
    "warmup_epochs",
    "optimizer",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "fine_tune",
    "dtype",
)
# Upstream's options of torch.distributed.
FOREIGN = {
    "backend": "MXNet's key-value store takes its place",
    "world_size": "run_dist.sh starts the workers of a distributed job",
    "dist_url": "run_dist.sh starts the workers of a distributed job",
}


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
    glore_cli.add_network_arguments(parser, "RESNET50_GLORE")
    add_data_arguments(parser)
    arguments.add_schedule_arguments(parser)
    # The data set's, unless given: Kinetics has the published recipe.
    parser.set_defaults(**dict.fromkeys(OF_DATASET))
    arguments.add_precise_bn_arguments(parser)
    arguments.add_run_arguments(parser, end_epoch=None)
    arguments.add_device_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
    arguments.add_logging_arguments(parser)
    group = glore_cli.add_other_arguments(parser)
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
    glore_cli.settle_run(args, config.name)


def get_loaders(args, config, input_conf, group):
    """Return the loaders for training and validation, of this worker's share of the videos."""
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
        "rank": group.rank,
        "num_ranks": group.size,
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


def log_plan(args, config, symbol, input_conf, loaders, group):
    """Log what is going to be trained on what, and for how long."""
    train, val = loaders
    glore_cli.log_network(args, symbol, input_conf)
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
    glore_cli.log_schedule(args, len(train), group)


def write_run_file(args, config, checkpoint, curves):
    """Write what ``test/test-single-clip.py --from-run`` wants to know."""
    folder, stem = os.path.split(checkpoint)
    content = {
        "network": get_spec(args.network).name,
        "overrides": glore_cli.network_overrides(args),
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


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    get_spec(args.network)
    config = get_config(args.dataset, args.data_root, split=args.split)
    settle(args, config)
    log_file = None if args.dry_run else args.log_file or default_log_file(args.task_name)
    level = logging.DEBUG if args.debug_mode else logging.INFO
    with glore_cli.join(args) as group, log_to(log_file if group.is_main else None, level):
        glore_cli.check_network_arguments(args)
        for name, instead in FOREIGN.items():
            if getattr(args, name) is not None:
                LOGGER.warning("--%s has no effect: %s", name.replace("_", "-"), instead)
        overrides = glore_cli.network_overrides(args)
        symbol, input_conf = get_symbol(args.network, config.num_classes, **overrides)
        if len(input_conf.data_shape) != 4:
            raise UsageError(
                f"{args.network} reads single images; train_kinetics.py trains on clips"
            )
        contexts = glore_cli.get_contexts(args)
        if config.name == "Demo":
            prepare_demo(args.data_root)
        config.check()
        loaders = train, _ = get_loaders(args, config, input_conf, group)
        train.start()  # while the network is built
        log_plan(args, config, symbol, input_conf, loaders, group)
        done = glore_cli.train_network(
            args,
            glore_cli.get_block(
                args, symbol, input_conf, contexts, KINETICS_LR_MULT, KINETICS_WD_MULT
            ),
            loaders,
            make_optimizer(args.optimizer, args.momentum, args.weight_decay),
            glore_cli.get_schedule(args, len(train), group.size),
            contexts,
            log_file,
            {"dataset": config.name, **{name: getattr(args, name) for name in RECORDED}},
            write_bad_files,
            group=group,
        )
        if done and done[0].checkpoint and args.run_file and group.is_main:
            write_run_file(args, config, done[0].checkpoint, done[1])
            LOGGER.info("Test it    python test/test-single-clip.py --from-run %s", args.run_file)
