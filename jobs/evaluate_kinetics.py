"""Test a video network: one clip per video as upstream, or several clips and crops averaged.

``test/test-single-clip.py`` is the name that upstream's users know it by.
"""

import json
import logging
import os
import time

from checkpoint.params import check
from data.video.iterator import write_bad_files
from data.video.loaders import get_test_loader
from dataset import get_config, list_datasets, prepare_demo
from glore_common import GloReError, UsageError, write_text
from jobs import arguments
from jobs import run as glore_cli
from network.block import build_block
from network.builder import get_spec, get_symbol
from network.pretrained import read_source
from train.plots import plot_confusion
from train.report import log_to
from train.scoring import average_scores, predictions, predictor, summarize

LOGGER = logging.getLogger("glore")
# Settings that a run file of train_kinetics.py holds and an option of the same name overrules.
FROM_RUN = (
    "network",
    "dataset",
    "split",
    "data_root",
    "clip_length",
    "frame_interval",
    "crop_size",
    "batch_size",
    "num_workers",
    "gpus",
    "model_root",
    "model_subpath",
)
DEFAULTS = {
    "network": "RESNET50_GLORE",
    "dataset": "Kinetics",
    "split": 1,
    "batch_size": 32,
    "model_root": "./exps/models",
}


def get_parser():
    """Return the script's argument parser."""
    parser = arguments.Parser(__doc__.split("\n\n")[0])
    group = glore_cli.add_architecture_arguments(parser, None, dropout="no matter here")
    group.add_argument(
        "--from-run", metavar="JSON", help="take what is not given here from this training run"
    )
    group.add_argument("--model-root", help=f"folder (default: {DEFAULTS['model_root']})")
    group.add_argument("--model-subpath", help=".params or .pth file in it; needed")
    group = parser.add_argument_group("data")
    known = ", ".join(list_datasets())
    group.add_argument("--dataset", help=f"{known} (default: {DEFAULTS['dataset']})")
    group.add_argument("--data-root", help="folder that holds DATASET/raw (default: ./dataset)")
    group.add_argument("--split", type=arguments.positive_int, help="official split")
    for name, text in (
        ("--clip-length", "frames of a clip"),
        ("--frame-interval", "frames from one to the next"),
        ("--crop-size", "side of the input in pixels"),
    ):
        text += " (default: the data set's)"
        group.add_argument(name, type=arguments.positive_int, help=text)
    group.add_argument(
        "--num-clips", type=arguments.positive_int, default=1, help="clips per video, evenly spread"
    )
    group.add_argument(
        "--num-crops", type=arguments.positive_int, default=1, help="crops per clip; see --crops"
    )
    group.add_argument(
        "--crops",
        choices=("centre", "spatial", "mixed"),
        help="one in the centre; 3 along the longer side; the centre and random ones (default: "
        "what fits --num-crops)",
    )
    group.add_argument(
        "--batch-size",
        type=arguments.positive_int,
        help=f"clips at a time, crops counted (default: {DEFAULTS['batch_size']})",
    )
    group.add_argument("--num-workers", type=arguments.count, help="decoding processes")
    group.add_argument("--max-videos", type=arguments.positive_int, help="stop after so many")
    group.add_argument("--random-seed", type=arguments.count, default=0, help="of random crops")
    arguments.add_flag(group, "--strict-data", "stop at the first unreadable video")
    arguments.add_device_arguments(parser, dtype=False)
    group = parser.add_argument_group("output")
    group.add_argument("--log-file", default="", help="log file (default: none)")
    group.add_argument(
        "--output",
        default="",
        metavar="PREFIX",
        help="beginning of the names of the results (default: ./exps/results/MODEL)",
    )
    return parser


def settle(args):
    """Fill in what was not given: from the training run, else the defaults."""
    run = {}
    if args.from_run:
        try:
            with open(args.from_run, encoding="utf-8") as stream:
                run = json.load(stream)
            run["gpus"] = None if run["gpus"] is None else tuple(run["gpus"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--from-run {args.from_run} is not a run file of train_kinetics.py: {error}"
            ) from error
    # What was built by other overrides cannot take the weights of another network.
    args.overrides = {} if args.network else run.get("overrides", {})
    args.overrides.update(glore_cli.network_overrides(args))
    args.curves = run.get("curves")
    for name in FROM_RUN:
        if getattr(args, name) is None:
            setattr(args, name, run.get(name, DEFAULTS.get(name)))
    if not args.model_subpath:
        raise UsageError("name the weights: --model-subpath FILE (in --model-root), or --from-run")
    config = get_config(args.dataset, args.data_root, split=args.split)
    for name, of_dataset in (
        ("clip_length", config.clip_length),
        ("frame_interval", config.val_frame_interval),
        ("crop_size", config.crop_size),
    ):
        if getattr(args, name) is None:
            setattr(args, name, of_dataset)
    return config


def write_results(prefix, args, config, figures, scores, confusion, paths):
    """Write ``PREFIX.json`` and ``PREFIX_confusion.png``."""
    names = None
    if os.path.exists(config.mapping_table):
        names = config.class_names()
    content = {
        "network": get_spec(args.network).name,
        "weights": os.path.join(args.model_root, args.model_subpath),
        "dataset": config.name,
        "clip_length": args.clip_length,
        "frame_interval": args.frame_interval,
        "crop_size": args.crop_size,
        "num_clips": args.num_clips,
        "num_crops": args.num_crops,
        **figures,
        "class_names": names,
        "predictions": predictions(scores, "video", paths),
    }
    write_text(f"{prefix}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    title = f"{content['network']} on {config.name}: top-1 {figures['top1']:.2%}"
    plot_confusion(confusion.matrix, f"{prefix}_confusion.png", names, title)


def main(argv=None):
    """Test as the command line says."""
    args = get_parser().parse_args(argv)
    config = settle(args)
    with log_to(args.log_file or None):
        args.overrides.update(clip_length=args.clip_length, crop_size=args.crop_size)
        symbol, input_conf = get_symbol(args.network, config.num_classes, **args.overrides)
        if len(input_conf.data_shape) != 4:
            raise UsageError(f"{args.network} reads single images; this script tests on clips")
        contexts = arguments.devices(args.gpus)
        weights = os.path.join(args.model_root, args.model_subpath)
        inputs = {"data": (1, *input_conf.data_shape)}
        arg_params, aux_params, weights = read_source(weights, symbol)
        check(symbol, arg_params, aux_params, inputs, where=weights)
        if config.name == "Demo":
            prepare_demo(args.data_root)
        config.check(["val"])
        block = build_block(
            symbol, input_conf, ctx=contexts, params=(arg_params, aux_params), training=False
        )
        loader = get_test_loader(
            config.val_list,
            config.val_root,
            num_classes=config.num_classes,
            num_clips=args.num_clips,
            num_crops=args.num_crops,
            crops=args.crops,
            clip_length=args.clip_length,
            frame_interval=args.frame_interval,
            crop_size=args.crop_size,
            mean=input_conf.mean,
            std=input_conf.std,
            batch_size=args.batch_size,
            seed=args.random_seed,
            num_workers=args.num_workers,
            strict=args.strict_data,
        )
        stem = os.path.splitext(os.path.basename(args.model_subpath))[0]
        prefix = args.output or os.path.join(".", "exps", "results", stem)
        LOGGER.info(
            "Testing %s on %d videos of %s, %d clip(s) x %d crop(s) each",
            weights,
            loader.num_samples,
            config.name,
            args.num_clips,
            args.num_crops,
        )
        started = time.perf_counter()
        try:
            scores = average_scores(predictor(block, contexts), loader, limit=args.max_videos)
            seconds = time.perf_counter() - started
            bad = write_bad_files([loader], f"{prefix}_bad-files.tsv")
        finally:
            loader.close()
        if not scores:
            raise GloReError(f"no video of {config.val_list} could be read: there is no result")
        figures, confusion = summarize(scores, config.num_classes)
        figures = {"videos": figures.pop("count"), **figures}
        figures["videos_per_second"] = round(len(scores) / seconds, 3)
        paths = loader.dataset.video_list
        names = {video: paths.rows[video].path for video in scores}
        write_results(prefix, args, config, figures, scores, confusion, names)
        LOGGER.info(
            "loss-ce %.4f  top1 %.2f %%  top5 %.2f %%  (%d videos, chance: %.2f %%; "
            "%.2f videos/s, %.2f clips/s)",
            figures["loss"],
            100 * figures["top1"],
            100 * figures["top5"],
            len(scores),
            100 / config.num_classes,
            figures["videos_per_second"],
            sum(clips for _, _, clips in scores.values()) / seconds,
        )
        if bad:
            LOGGER.warning("%d videos could not be read: %s_bad-files.tsv", bad, prefix)
        LOGGER.info("Checkpoint         %s", weights)
        if args.curves:
            LOGGER.info("Training curves    %s", args.curves)
        LOGGER.info("Predictions        %s.json", prefix)
        LOGGER.info("Confusion matrix   %s_confusion.png", prefix)
