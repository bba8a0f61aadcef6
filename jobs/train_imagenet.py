"""Train an image network on ImageNet, or on any .rec file or folder of classes.

The options are those of MXNet's own image-classification examples where these have them, and
those of the other scripts here. Augmentation is that of the networks' author (cypw/DPNs); the
exact ImageNet schedule of GloRe (Chen et al., CVPR 2019) is not known, so the default one is our
choice: cosine after 5 epochs of warm-up, as in the same author's OctConv.
"""

import argparse
import logging
import os

from data.common.loader import write_bad_files
from data.image.loaders import READERS, get_image_train_loader, get_image_val_loader
from data.image.source import open_image_source
from data.image.transforms import default_resize
from glore_common import UsageError
from jobs import arguments
from jobs import run as glore_cli
from mxnet_compat import mx
from network.block import KINETICS_WD_MULT, NO_DECAY_BN_BIAS
from network.builder import get_spec, get_symbol
from network.initializer import identity_units
from train.loss import Mixup
from train.optimizer import make_optimizer
from train.report import default_log_file, log_to

LOGGER = logging.getLogger("glore")

BATCH_SIZE = 256
# Of --benchmark: what any machine's memory takes, and enough steps for a steady mean.
CPU_BENCHMARK_BATCH_SIZE = 8
BENCHMARK_STEPS = 20
# Kept in checkpoints: a resumed run says which of them are not as they were.
RECORDED = (
    "batch_size",
    "crop_size",
    "augmentation",
    "flip",
    "rotation",
    "record_reader",
    "optimizer",
    "lr_base",
    "lr_schedule",
    "lr_steps",
    "lr_step_epochs",
    "lr_factor",
    "warmup_steps",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "no_decay_bn_bias",
    "label_smoothing",
    "mixup",
    "fine_tune",
    "dtype",
)


def image_shape(text):
    """Return the side of ``3,224,224``: colour images, square."""
    channels, *sides = arguments.comma_list(int, 3)(text)
    if channels != 3 or sides[0] != sides[1] or sides[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no square colour image such as 3,224,224")
    return sides[0]


def add_data_arguments(parser):
    """Add the group ``data``: where images lie, and how they are read and augmented."""
    group = parser.add_argument_group("data")
    group.add_argument("--folder", metavar="DIR", help="holds train/ and val/, folders of classes")
    group.add_argument(
        "--data-train", metavar="PATH", help="a .rec file of im2rec, or a folder of classes"
    )
    group.add_argument("--data-val", metavar="PATH", help="the same for validation (may be absent)")
    for name in ("--data-train-idx", "--data-val-idx"):
        group.add_argument(
            name, metavar="FILE", help="the .idx file, which must lie beside its .rec file"
        )
    group.add_argument(
        "--record-reader",
        choices=READERS,
        default="own",
        help="of .rec files; native: mx.io.ImageRecordIter",
    )
    group.add_argument(
        "--num-classes",
        type=arguments.positive_int,
        help="(default: counted in the training data, which for a .rec file takes a pass over it)",
    )
    group.add_argument(
        "--num-examples",
        type=arguments.positive_int,
        help="compared with what the training data hold, which is what counts",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--image-shape",
        dest="crop_size",
        type=image_shape,
        metavar="3,SIDE,SIDE",
        help="input (default: the network's, 3,224,224)",
    )
    size.add_argument(
        "--crop-size", type=arguments.positive_int, metavar="SIDE", help="the same as one number"
    )
    group.add_argument(
        "--resize",
        type=arguments.positive_int,
        help="shorter side before a validation's centre crop, and before the crop of "
        "--augmentation crop (default: the input's side / 0.875)",
    )
    group.add_argument(
        "--batch-size",
        type=arguments.positive_int,
        help=f"images per step (default: {BATCH_SIZE}, our choice; with --benchmark on a CPU "
        f"{CPU_BENCHMARK_BATCH_SIZE})",
    )
    group.add_argument(
        "--epoch-div-factor",
        type=arguments.positive_int,
        default=1,
        help="logged epochs per pass over the data",
    )
    group.add_argument(
        "--augmentation",
        choices=("reference", "crop", "none"),
        default="reference",
        help="reference: crops of random area and aspect, flip, colours; crop: resized, random "
        "crop and flip; none: as in validation",
    )
    group.add_argument(
        "--mixup",
        type=arguments.number(float, 0.0),
        default=0.0,
        metavar="ALPHA",
        help="blend pairs of images by shares of Beta(ALPHA, ALPHA); 0: off",
    )
    glore_cli.add_pixel_arguments(group)
    glore_cli.add_image_arguments(group, rotation=0.0, workers_alias="--data-nthreads")


def get_parser():
    """Return the script's argument parser."""
    parser = arguments.Parser(__doc__.split("\n\n")[0])
    glore_cli.add_network_arguments(parser, "resnet50_w-glore_2-3", dropout="none in 2D")
    add_data_arguments(parser)
    group = arguments.add_schedule_arguments(
        parser, lr_base=0.1, schedule=None, warmup_steps=None, optimizer="sgd"
    )
    arguments.add_flag(
        group,
        "--no-decay-bn-bias",
        "no weight decay of anything in a BatchNorm (by default its gamma decays, its beta and "
        "biases do not: as MXNet's Module has it)",
    )
    arguments.add_flag(
        group,
        "--zero-init-units",
        "GloRe units start as the identity: the last BatchNorm's gamma is 0 where a unit ends in "
        "one, else the last convolution's weight; residual blocks, which end in no BatchNorm, are "
        "left alone",
        default=True,
    )
    arguments.add_precise_bn_arguments(parser)
    arguments.add_run_arguments(parser, end_epoch=100)
    arguments.add_device_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
    group = arguments.add_logging_arguments(parser)
    group.add_argument(
        "--top-k",
        type=int,
        choices=(0, 1, 5),
        default=5,
        help="accepted: top-1 and top-5 are always reported",
    )
    group = glore_cli.add_other_arguments(parser)
    arguments.add_flag(
        group,
        "--benchmark",
        f"time --max-steps steps (default: {BENCHMARK_STEPS}) on made-up images and write nothing",
    )
    parser.epilog = (
        "Defaults of learning rate (0.1 for a batch of 256), warm-up (5 epochs, at most a "
        "quarter of the run), --end-epoch and "
        "--optimizer are our choice: the paper's schedule is not known."
    )
    return parser


def settle(args):
    """Fill in what was not given, and find mistakes before anything slow starts."""
    spec = get_spec(args.network)
    if spec.ndim != 2:
        raise UsageError(f"{spec.name} reads clips; train_imagenet.py trains on images")
    glore_cli.check_network_arguments(args)
    args.crop_size = args.crop_size or spec.data_shape[-1]
    args.resize = args.resize or default_resize(args.crop_size)
    if args.resize < args.crop_size:
        raise UsageError(f"--resize {args.resize} is smaller than the input, {args.crop_size}")
    if args.lr_schedule is None:
        given = args.lr_steps or args.lr_step_epochs
        args.lr_schedule = "step" if given else "cosine"
    if args.warmup_steps is None:
        args.warmup_steps = 0
        if args.warmup_epochs is None:
            args.warmup_epochs = min(5.0, args.end_epoch / args.epoch_div_factor / 4)
    glore_cli.settle_run(args, "ImageNet")
    if args.benchmark:
        return
    if args.folder:
        if args.data_train or args.data_val:
            raise UsageError("give --folder, or --data-train and --data-val, not both")
        args.data_train = os.path.join(args.folder, "train")
        args.data_val = os.path.join(args.folder, "val")
    if not args.data_train:
        raise UsageError(
            "name the images: --data-train FILE.rec (and --data-val), --folder DIR with train/ and "
            "val/, or --benchmark for made-up ones"
        )
    for option in ("data_train", "data_val"):
        check_index(getattr(args, option), getattr(args, f"{option}_idx"), option)
    use_module_weights(args)


def check_index(path, index, option):
    """Accept the .idx file that lies beside a .rec file, which is where it is looked for."""
    if not index:
        return
    beside = os.path.splitext(path or "")[0] + ".idx"
    if os.path.realpath(index) != os.path.realpath(beside):
        name = f"--{option.replace('_', '-')}"
        raise UsageError(
            f"{name}-idx {index} is not the index beside {name} {path}: it must be {beside}"
        )


def use_module_weights(args):
    """Let ``--model-prefix P --load-epoch N`` start from ``P-NNNN.params`` of a legacy job.

    Such a file holds weights alone. A checkpoint of our own, which holds all, goes first.
    """
    prefix = getattr(args, "model_prefix", None)
    if args.resume_epoch < 0 or prefix is None:
        return
    legacy = f"{prefix}-{args.resume_epoch:04d}.params"
    ours = f"{prefix}_ep-{args.resume_epoch:04d}.json"
    if os.path.exists(legacy) and not os.path.exists(ours):
        if args.pretrained:
            raise UsageError(f"give --pretrained or --load-epoch of {legacy}, not both")
        LOGGER.warning("%s has weights alone: they are the start of a new run from epoch 1", legacy)
        args.pretrained, args.resume_epoch = legacy, -1


def get_loaders(args, mean, std, group):
    """Return the loaders for training and validation (or None), and the number of classes.

    They read this worker's share of the images.
    """
    source = open_image_source(args.data_train, args.num_classes)
    if args.num_examples not in (None, len(source.samples)):
        LOGGER.warning(
            "--num-examples %d: the training data hold %d, which is what counts",
            args.num_examples,
            len(source.samples),
        )
    common = {
        "crop_size": args.crop_size,
        "resize": args.resize,
        "mean": mean,
        "std": std,
        "batch_size": args.batch_size,
        "num_classes": source.num_classes,
        "num_workers": args.num_workers,
        "strict": args.strict_data,
        "rank": group.rank,
        "num_ranks": group.size,
    }
    val = None
    if args.data_val:
        val_source = open_image_source(args.data_val, source.num_classes, source.class_names)
        val_reader = args.record_reader if val_source.records else "own"
        val = get_image_val_loader(val_source, with_index=False, reader=val_reader, **common)
    train = get_image_train_loader(
        source,
        augmentation=args.augmentation,
        flip=args.flip,
        rotation=args.rotation,
        seed=args.random_seed,
        reader=args.record_reader,
        **common,
    )
    return (train, val), source.num_classes


def get_network(args, num_classes, contexts):
    """Return (symbol, input_conf, block)."""
    symbol, input_conf = get_symbol(args.network, num_classes, **glore_cli.network_overrides(args))
    glore_cli.log_network(args, symbol, input_conf)
    block = glore_cli.get_block(
        args,
        symbol,
        input_conf,
        contexts,
        wd_mult=NO_DECAY_BN_BIAS if args.no_decay_bn_bias else KINETICS_WD_MULT,
        rules=identity_units(symbol) if args.zero_init_units else (),
    )
    return block, input_conf


def run_benchmark(args, group):
    """Time training on a made-up batch."""
    contexts = glore_cli.get_contexts(args)
    if args.batch_size is None:
        on_cpu = contexts[0].device_type == "cpu"
        args.batch_size = CPU_BENCHMARK_BATCH_SIZE if on_cpu else BATCH_SIZE
    steps = args.max_steps or BENCHMARK_STEPS
    num_classes = args.num_classes or get_spec(args.network).num_classes
    block, input_conf = get_network(args, num_classes, contexts)
    mx.random.seed(args.random_seed)
    batch = (
        mx.nd.random.normal(shape=(args.batch_size, *input_conf.data_shape)),
        mx.nd.arange(args.batch_size) % num_classes,
    )
    glore_cli.benchmark(
        block,
        batch,
        make_optimizer(args.optimizer, args.momentum, args.weight_decay),
        # Its length matters for the rate alone.
        glore_cli.get_schedule(args, max(steps, args.epoch_div_factor), group.size),
        glore_cli.get_run_config(args),
        contexts,
        steps,
        Mixup(args.mixup, num_classes) if args.mixup else None,
        group,
    )


def run_training(args, log_file, group):
    """Train on images."""
    contexts = glore_cli.get_contexts(args)
    args.batch_size = args.batch_size or BATCH_SIZE
    mean, std = glore_cli.normalisation(args, get_spec(args.network))
    loaders, num_classes = get_loaders(args, mean, std, group)
    train, val = loaders
    train.start()  # while the network is built
    block, _ = get_network(args, num_classes, contexts)
    LOGGER.info(
        "Data       %s: %d images to train, %d to validate, %d classes (chance: %.2f %% top-1)",
        args.data_train,
        train.num_samples,
        val.num_samples if val is not None else 0,
        num_classes,
        100 / num_classes,
    )
    LOGGER.info(
        "Images     %d x %d pixels, augmentation %s (validation: shorter side %d, centre)",
        args.crop_size,
        args.crop_size,
        args.augmentation,
        args.resize,
    )
    glore_cli.log_schedule(args, len(train), group)
    glore_cli.train_network(
        args,
        block,
        loaders,
        make_optimizer(args.optimizer, args.momentum, args.weight_decay),
        glore_cli.get_schedule(args, len(train), group.size),
        contexts,
        log_file,
        {"data": args.data_train, **{name: getattr(args, name) for name in RECORDED}},
        write_bad_files,
        Mixup(args.mixup, num_classes) if args.mixup else None,
        group,
    )


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    get_spec(args.network)
    dry = args.dry_run or args.benchmark
    with log_to(None, logging.INFO):
        settle(args)
    log_file = None if dry else args.log_file or default_log_file(args.task_name)
    level = logging.DEBUG if args.debug_mode else logging.INFO
    with glore_cli.join(args) as group, log_to(log_file if group.is_main else None, level):
        if args.benchmark:
            run_benchmark(args, group)
        else:
            run_training(args, log_file, group)
