"""Train an image classifier on CUB-200-2011, on a folder of classes or on made-up images.

Made for fine-grained classification with a post-activation ResNet-18 and GloRe units (Chen et al.,
CVPR 2019) in it. Options and recipe are those of a public reproduction whose units made training
worse or impossible; ``--glore-flavour report`` builds its unit, and docs/res4-stability.md says
what was wrong. One epoch is chosen on images held out of the training part, and the test part is
looked at once, in the end.
"""

import argparse
import csv
import io
import json
import logging
import math
import os
import re

from checkpoint.gluoncv_names import zoo_weights
from checkpoint.store import CheckpointStore
from data.common.loader import write_bad_files
from data.image.loaders import get_image_train_loader, get_image_val_loader
from data.image.source import image_source_of_rows, read_image_folder
from dataset import prepare_demo_images
from dataset.cub200 import hold_out, read_cub200
from glore_common import GloReError, UsageError, write_text
from jobs import arguments, score
from jobs import run as glore_cli
from network.block import build_block
from network.builder import InputConf, get_spec, get_symbol, logits
from network.pretrained import find, read_source, read_symbol
from network.symbol_glore import FLAVOURS
from train.optimizer import make_optimizer
from train.plots import plot_confusion, plot_metric
from train.report import log_to
from train.scoring import predictions, predictor

LOGGER = logging.getLogger("glore")

# Of CUB-200-2011's photographs, RGB on the scale 0..1.
MEAN, STD = (0.4707, 0.4601, 0.4549), (0.2767, 0.2760, 0.2850)
CROP_SIZE, RESIZE = 224, 256
DATASETS = ("cub200", "folder", "demo")
# Res3 and Res4 of the reproduction are the stages with 256 and 512 channels of a ResNet-18, whose
# input they halve for the fourth and the fifth time: conv4 and conv5 here.
GLORE_STAGES = {"none": (), "res3": (4,), "res4": (5,), "res3+res4": (4, 5)}
ZOO = "zoo"
# Kept in checkpoints: a resumed run says which of them are not as they were.
RECORDED = (
    "dataset",
    "val_fraction",
    "test_fraction",
    "split_seed",
    "select_on_test",
    "batch_size",
    "resize",
    "flip",
    "rotation",
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
    "label_smoothing",
    "fine_tune",
    "dtype",
)


def add_alias(group, name, of, help, **more):
    """Add the reproduction's name of an option that exists under the destination ``of``."""
    group.add_argument(name, dest=of, default=argparse.SUPPRESS, help=help, **more)


def add_network_arguments(parser):
    """Add the group ``network``."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--network",
        "--net-type",
        default="resnet18_v1",
        help="see README's table of networks; resnet18_v1 is the reproduction's ResNet-18",
    )
    group.add_argument(
        "--glore",
        choices=tuple(GLORE_STAGES),
        default="none",
        help="a GloRe unit behind the last block of the stage with 256 (res3) or 512 channels "
        "(res4) of a ResNet-18",
    )
    group.add_argument(
        "--insert-after",
        metavar="STAGE:BLOCK;...",
        help="units behind these blocks instead, e.g. '4:1;5:1,2' for block 1 of conv4 and both "
        "of conv5 (res3 is conv4, res4 is conv5)",
    )
    group.add_argument(
        "--glore-flavour",
        choices=FLAVOURS,
        default="video",
        help="video: starts as the identity; released: that of the ImageNet networks; report: the "
        "reproduction's, which trains worse than no unit",
    )
    group.add_argument(
        "--nodes",
        "--num-node",
        dest="num_node",
        type=arguments.positive_int,
        default=16,
        help="nodes of each unit",
    )
    group.add_argument(
        "--num-state",
        type=arguments.positive_int,
        help="states of each unit (default: half the channels; report: as many as channels)",
    )
    arguments.add_flag(
        group,
        "--normalize",
        "units divide by the number of positions (default: yes; report: no)",
        default=None,
    )
    group.add_argument("--dropout", type=float, help="before the classifier (default: none)")
    group.add_argument(
        "--pretrained",
        nargs="?",
        const=ZOO,
        default="",
        metavar="FILE|NAME",
        help="start from these weights, units and another classifier afresh; without a value: the "
        "ImageNet weights of gluoncv's model zoo",
    )
    arguments.add_flag(
        group, "--fine-tune", "all layers but the classifier learn at half the learning rate"
    )
    # Weights of a bare network are the rule.
    group.set_defaults(fresh_units=True)


def add_data_arguments(parser):
    """Add the group ``data``: which images, how they are divided, read and augmented."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default="cub200",
        help="folder: --data-root is a folder of classes, or holds train/ and perhaps val/ and "
        "test/; demo: made-up images",
    )
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="cub200: CUB_200_2011 or the folder that holds it (default: ./dataset)",
    )
    group.add_argument(
        "--val-fraction",
        type=arguments.number(float, high=0.9, above=0.0),
        default=0.1,
        help="part of the training images, of each class, that the epoch is chosen on (demo: it "
        "has such a part)",
    )
    group.add_argument(
        "--test-fraction",
        type=arguments.number(float, high=0.9, above=0.0),
        default=0.2,
        help="part of a folder of classes without test/ that is for testing",
    )
    group.add_argument(
        "--split-seed",
        type=arguments.count,
        default=0,
        help="which images are held out; --seed does not change it",
    )
    arguments.add_flag(
        group,
        "--select-on-test",
        "train on all training images and choose the epoch on the test part, as the reproduction "
        "did: its accuracy is then too good",
    )
    group.add_argument(
        "--batch-size",
        "--train-batch",
        type=arguments.positive_int,
        default=32,
        help="training images per step",
    )
    group.add_argument(
        "--test-batch", type=arguments.positive_int, default=32, help="images at a time in testing"
    )
    group.add_argument(
        "--crop-size",
        type=arguments.positive_int,
        help=f"side of the input (default: {CROP_SIZE}; demo: 64)",
    )
    group.add_argument(
        "--resize",
        type=arguments.positive_int,
        help=f"shorter side before the crop (default: {RESIZE}, or in proportion)",
    )
    glore_cli.add_image_arguments(group, rotation=10.0, workers_alias="--workers")


def get_parser():
    """Return the script's argument parser."""
    parser = arguments.Parser(__doc__.split("\n\n")[0])
    add_network_arguments(parser)
    add_data_arguments(parser)
    group = arguments.add_schedule_arguments(
        parser, lr_base=0.01, weight_decay=5e-4, optimizer="sgd"
    )
    add_alias(
        group,
        "--schedule",
        "lr_step_epochs",
        "epochs after which the rate falls, e.g. 6 8: --lr-step-epochs",
        nargs="+",
        type=arguments.positive_float,
        metavar="EPOCH",
    )
    add_alias(group, "--gamma", "lr_factor", "see --lr-factor", type=arguments.positive_float)
    arguments.add_precise_bn_arguments(parser)
    group = arguments.add_run_arguments(parser, end_epoch=10)
    add_alias(group, "--epochs", "end_epoch", "see --end-epoch", type=arguments.positive_int)
    add_alias(
        group,
        "--seed",
        "random_seed",
        "see --random-seed",
        type=arguments.number(int, 0, 2**31 - 1),
    )
    group.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="do not train: test this checkpoint of an earlier run, with the graph beside it",
    )
    group = arguments.add_device_arguments(parser)
    add_alias(
        group,
        "--gpu-id",
        "gpus",
        "the same; '' is the CPU",
        type=arguments.gpu_list,
        metavar="LIST",
    )
    group = arguments.add_checkpoint_arguments(parser, model_dir="")
    group.add_argument(
        "--output-dir",
        metavar="DIR",
        help="of all that a run writes (default: ./exps/classifier/TASK_NAME)",
    )
    arguments.add_logging_arguments(parser)
    glore_cli.add_other_arguments(parser)
    # The best and the last checkpoint; one logged epoch is a pass.
    parser.set_defaults(keep=1, log_frequency=10, epoch_div_factor=1)
    return parser


def settle(args):
    """Fill in what was not given, and find mistakes before anything slow starts."""
    spec = get_spec(args.network)
    if spec.ndim != 2:
        raise UsageError(f"{spec.name} reads clips; train_classifier.py trains on images")
    settle_sizes(args)
    if args.evaluate:
        return
    settle_units(args, spec)
    glore_cli.settle_run(args, args.dataset)
    if args.output_dir is None:
        args.output_dir = os.path.join(".", "exps", "classifier", args.task_name)
    args.model_dir = args.model_dir or os.path.join(args.output_dir, "checkpoints")
    args.log_file = args.log_file or os.path.join(args.output_dir, "log.txt")
    if args.pretrained.lower() in (ZOO, "true") and not os.path.exists(args.pretrained):
        args.pretrained = zoo_weights(spec.name)
    glore_cli.check_network_arguments(args)


def settle_sizes(args):
    """Fill in the sizes of images, which the data set decides."""
    demo = args.dataset == "demo"
    if args.crop_size is None:
        args.crop_size = 64 if demo else CROP_SIZE
    if args.resize is None:
        args.resize = round(RESIZE * args.crop_size / CROP_SIZE)
    if args.resize < args.crop_size:
        raise UsageError(f"--resize {args.resize} is smaller than the input, {args.crop_size}")
    if args.data_root is None and args.dataset == "folder":
        raise UsageError("--dataset folder needs --data-root DIR, the folder of classes")


def settle_units(args, spec):
    """Turn --glore and --insert-after into positions, and name the task after them."""
    name = args.task_name or f"{args.dataset}_{spec.name}"
    wanted = args.glore
    if args.insert_after:
        if wanted != "none":
            raise UsageError("give --glore, or --insert-after for other places, not both")
        args.glore, wanted = args.insert_after, "glore"
    else:
        stages = GLORE_STAGES[wanted]
        args.glore = {stage: (spec.blocks[stage - 2],) for stage in stages} or None
    if args.glore is None:
        if args.glore_flavour != "video" or args.normalize or args.num_state:
            raise UsageError(
                "--glore-flavour, --normalize and --num-state say what GloRe units are like: give "
                "--glore res3, res4 or res3+res4 too"
            )
        args.glore_flavour = args.num_node = args.normalize = None
    else:
        report = args.glore_flavour == "report"
        args.normalize = not report if args.normalize is None else args.normalize
        if not args.task_name:
            name += f"_{wanted}" + ("-report" if report else "")
    args.task_name = name


def get_sources(args):
    """Return the sources (train, val, test) of the data set; val is None with --select-on-test."""
    if args.dataset == "demo":
        config = prepare_demo_images(args.data_root)
        names = config.class_names
        parts = [
            read_image_folder(root, names)
            for root in (config.train_root, config.val_root, config.test_root)
        ]
    elif args.dataset == "cub200":
        splits = read_cub200(
            args.data_root or "dataset",
            0.0 if args.select_on_test else args.val_fraction,
            args.split_seed,
        )
        parts = [
            image_source_of_rows(rows, splits.root, splits.class_names, origin=f"CUB-200 {part}")
            if rows
            else None
            for part, rows in (("train", splits.train), ("val", splits.val), ("test", splits.test))
        ]
    else:
        parts = get_folder_sources(args)
    train, val, test = parts
    return train, None if args.select_on_test else val, test


def get_folder_sources(args):
    """Return the sources of a folder of classes, or of one that holds such folders."""
    inner = {part: os.path.join(args.data_root, part) for part in ("train", "val", "test")}
    if not os.path.isdir(inner["train"]):
        train, test = divide(read_image_folder(args.data_root), args.test_fraction, args, "test")
        val = None
    else:
        train = read_image_folder(inner["train"])
        names = train.class_names
        val, test = (
            read_image_folder(inner[part], names) if os.path.isdir(inner[part]) else None
            for part in ("val", "test")
        )
        if test is None:
            train, test = divide(train, args.test_fraction, args, "test")
    if val is None and not args.select_on_test:
        train, val = divide(train, args.val_fraction, args, "val")
    return train, val, test


def divide(source, fraction, args, part):
    """Hold a part out of a source; return both."""
    kept, held_out = hold_out(source.samples, fraction, args.split_seed)
    if not held_out:
        raise GloReError(
            f"{source.origin} has too few images to hold some out for the {part} part: put at "
            f"least two into a class, or give it a folder of its own, "
            f"{os.path.join(args.data_root, part)}"
        )
    return tuple(
        image_source_of_rows(rows, source.root, source.class_names, origin=source.origin)
        for rows in (kept, held_out)
    )


def loading(args):
    """Return what all loaders have in common."""
    return {
        "crop_size": args.crop_size,
        "resize": args.resize,
        "mean": MEAN,
        "std": STD,
        "num_workers": args.num_workers,
        "strict": args.strict_data,
    }


def get_loaders(args, train, val, group):
    """Return the loaders for training and for choosing the epoch, of this worker's share."""
    share = {"rank": group.rank, "num_ranks": group.size}
    return (
        get_image_train_loader(
            train,
            batch_size=args.batch_size,
            augmentation="crop",
            flip=args.flip,
            rotation=args.rotation,
            seed=args.random_seed,
            **share,
            **loading(args),
        ),
        get_image_val_loader(
            val, batch_size=args.test_batch, with_index=False, **share, **loading(args)
        ),
    )


def write_confusion(path, matrix):
    """Write a confusion matrix as CSV: a row is a true class, a column a predicted one."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(matrix.tolist())
    write_text(path, text.getvalue())


def read_block(args, path, contexts):
    """Return (block for inference, number of classes) of a checkpoint with its run's graph."""
    symbol = read_symbol(f"{find(path, None)[0]}-symbol.json")
    arg_params, aux_params, _ = read_source(path, symbol)
    output = logits(symbol)
    input_conf = InputConf((3, args.crop_size, args.crop_size), MEAN, STD)
    block = build_block(
        symbol,
        input_conf,
        ctx=contexts,
        params=(arg_params, aux_params),
        output=output.name,
        training=False,
    )
    return block, output.infer_shape(data=(1, *input_conf.data_shape))[1][0][1]


def test(args, path, source, contexts, prefix):
    """Score a checkpoint, with its own graph, on the test part; log and write the results.

    Parameters
    ----------
    path : str
        Its ``.params``.
    source : data.image.source.ImageSource
    contexts : list of mx.Context
    prefix : str
        Beginning of the names of the files.

    Returns
    -------
    dict
        See :func:`train.scoring.summarize`.
    """
    block, num_classes = read_block(args, path, contexts)
    if source.num_classes != num_classes:
        raise UsageError(
            f"{path} has {num_classes} classes, {source.origin} has {source.num_classes}: give the "
            "--dataset and --data-root that it was trained on"
        )
    loader = get_image_val_loader(source, batch_size=args.test_batch, **loading(args))
    try:
        result = score.evaluate(predictor(block, contexts), loader)
        bad = write_bad_files([loader], f"{prefix}_bad-files.tsv")
    finally:
        loader.close()
    figures, names = result.figures, source.class_names
    LOGGER.info(
        "Test       loss-ce %.4f  top1 %.2f %%  top5 %.2f %%  mean class accuracy %.2f %%  (%d "
        "images, %s)",
        figures["loss"],
        *(100 * figures[name] for name in ("top1", "top5", "mean_class_accuracy")),
        figures["count"],
        path,
    )
    if bad:
        LOGGER.warning("%d images could not be read: %s_bad-files.tsv", bad, prefix)
    paths = [f"{prefix}{end}" for end in (".json", "_per-class.csv", "_confusion.csv")]
    files = {index: source.name(index) for index in result.scores}
    content = {
        "weights": path,
        "data": source.origin,
        **figures,
        "class_names": names,
        "predictions": predictions(result.scores, "image", files),
    }
    write_text(paths[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    score.write_class_table(paths[1], result, names)
    write_confusion(paths[2], result.confusion.matrix)
    paths.append(f"{prefix}_confusion.png")
    plot_confusion(result.confusion.matrix, paths[-1], names, f"top-1 {figures['top1']:.2%}")
    LOGGER.info("Written    %s", ", ".join(paths))
    return figures


def run_training(args, group):
    """Train, choose an epoch, test it."""
    contexts = glore_cli.get_contexts(args)
    train_source, val_source, test_source = get_sources(args)
    if args.select_on_test:
        LOGGER.warning(
            "--select-on-test: the epoch is chosen on the test part, so that the best accuracy is "
            "too good to compare with others'"
        )
        val_source = test_source
    num_classes = train_source.num_classes
    symbol, input_conf = get_symbol(args.network, num_classes, **glore_cli.network_overrides(args))
    loaders = get_loaders(args, train_source, val_source, group)
    glore_cli.log_network(args, symbol, input_conf)
    LOGGER.info(
        "Data       %s: %d images to train, %d to choose the epoch%s, %d to test, %d classes "
        "(chance: %.2f %% top-1)",
        train_source.origin,
        len(train_source.samples),
        len(val_source.samples),
        " (the test part)" if args.select_on_test else "",
        len(test_source.samples),
        num_classes,
        100 / num_classes,
    )
    block = glore_cli.get_block(args, symbol, input_conf, contexts)
    glore_cli.log_schedule(args, len(loaders[0]), group)
    recorded = {name: getattr(args, name) for name in RECORDED}
    trained = glore_cli.train_network(
        args,
        block,
        loaders,
        make_optimizer(args.optimizer, args.momentum, args.weight_decay),
        glore_cli.get_schedule(args, len(loaders[0]), group.size),
        contexts,
        args.log_file,
        {"data": train_source.origin, **recorded},
        write_bad_files,
        group=group,
    )
    if trained is None or not group.is_main:
        return
    summary, _ = trained
    warn_if_nothing_was_learned(args, summary.history[-1]["train_loss"], num_classes)
    graphs = [os.path.join(args.output_dir, "graphs", name) for name in ("loss.png", "acc.png")]
    plot_metric(summary.history, "loss", graphs[0], "cross entropy")
    plot_metric(summary.history, "top1", graphs[1], "accuracy")
    LOGGER.info("Graphs     %s", ", ".join(graphs))
    best = best_checkpoint(args, summary)
    LOGGER.info("Best       %s (last: %s.params)", best, summary.checkpoint)
    with group.progress.phase("testing"):
        test(args, best, test_source, contexts, os.path.join(args.output_dir, "test"))


def warn_if_nothing_was_learned(args, loss, num_classes):
    """Say that the last epoch's training loss is that of a guess or worse, and what may help."""
    guess = math.log(num_classes)
    if loss < guess:
        return
    way_out = f"a smaller --lr than {args.lr_base:g}"
    if args.glore_flavour == "report":
        way_out += ", or --glore-flavour video: the reproduction's unit is known to fail"
    LOGGER.warning(
        "The network has learned nothing: the training loss of the last epoch, %.4g, is not below "
        "that of a guess among %d classes, %.4g. What may help: more epochs, %s",
        loss,
        num_classes,
        guess,
        way_out,
    )


def best_checkpoint(args, summary):
    """Return the parameters' file of the best epoch that was saved."""
    store = CheckpointStore(args.model_dir, args.task_name, args.keep)
    best = f"{store.epoch_path(summary.best['epoch'])}.params"
    if os.path.exists(best):
        return best
    LOGGER.warning(
        "Epoch %d, the best, has no checkpoint (it was cut short, or --save-frequency passed it "
        "over): the last one is tested",
        summary.best["epoch"],
    )
    return f"{summary.checkpoint}.params"


def run_evaluation(args):
    """Test a checkpoint with the graph that it came with."""
    path = re.sub(r"(\.params|\.states|\.json)?$", ".params", args.evaluate, count=1)
    if not os.path.isfile(path):
        raise UsageError(f"--evaluate {args.evaluate}: there is no file {path}")
    contexts = glore_cli.get_contexts(args)
    stem = os.path.splitext(os.path.basename(path))[0]
    folder = args.output_dir or os.path.dirname(path)
    test(args, path, get_sources(args)[2], contexts, os.path.join(folder, f"{stem}_test"))


def main(argv=None):
    """Train or test as the command line says."""
    args = get_parser().parse_args(argv)
    with log_to(None, logging.INFO):
        settle(args)
    log_file = None if args.dry_run or args.evaluate else args.log_file
    level = logging.DEBUG if args.debug_mode else logging.INFO
    with glore_cli.join(args) as group, log_to(log_file if group.is_main else None, level):
        if args.evaluate:
            run_evaluation(args)
        else:
            run_training(args, group)
