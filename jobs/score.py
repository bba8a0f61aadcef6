"""Score an image network: one centre crop, ten crops averaged, or the whole image.

Weights are read with the graph they come with, or, with --network, with this project's own graph,
which takes any input size.
"""

import csv
import io
import json
import logging
import os
import re
import time
from typing import NamedTuple

from checkpoint.params import check, param_shapes
from checkpoint.released import list_released, locate
from data.common.loader import write_bad_files
from data.image.loaders import READERS, get_image_val_loader
from data.image.source import open_image_source
from data.image.transforms import default_resize
from glore_common import GloReError, UsageError, write_text
from jobs import arguments
from jobs import run as glore_cli
from network.block import build_block
from network.builder import InputConf, get_spec, get_symbol, logits
from network.pretrained import epochs, find, load, paths, read_source
from network.specs import MEAN, PUBLISHED_TOP1, STD
from train.metric import ConfusionMatrix
from train.plots import plot_confusion
from train.report import log_to
from train.scoring import average_scores, class_rows, predictions, predictor, summarize

LOGGER = logging.getLogger("glore")
# A picture of more shows nothing.
MOST_PICTURED_CLASSES = 100
DEFAULT_CROP_SIZE = 224


class Model(NamedTuple):
    """A network with its weights.

    Attributes
    ----------
    symbol : mx.sym.Symbol
        Ends in a SoftmaxOutput.
    arg_params, aux_params : dict
    path : str
        What the weights were read from.
    name : str or None
        The network's row; None for a graph of its own.
    published_top1 : float or None
        In percent.
    """

    symbol: object
    arg_params: dict
    aux_params: dict
    path: str
    name: object
    published_top1: object


class Evaluation(NamedTuple):
    """Mean scores by image (see :func:`train.scoring.average_scores`), figures, confusions."""

    scores: dict
    figures: dict
    confusion: ConfusionMatrix


def get_parser():
    """Return the script's argument parser."""
    parser = arguments.Parser(__doc__.split("\n\n")[0])
    group = glore_cli.add_architecture_arguments(parser, None, dropout="no matter here")
    group.add_argument(
        "--weights",
        metavar="PATH|PREFIX|NAME",
        required=True,
        help=".params, prefix of a checkpoint, .pth, or the name of a released network; without "
        "--network its own -symbol.json is used",
    )
    group.add_argument("--epoch", type=arguments.count, help="of a prefix (default: the newest)")
    group = parser.add_argument_group("data")
    where = group.add_mutually_exclusive_group(required=True)
    where.add_argument("--rec", metavar="FILE", help=".rec file of im2rec")
    where.add_argument("--folder", metavar="DIR", help="folder of classes")
    group.add_argument(
        "--crops",
        choices=("centre", "ten", "full"),
        default="centre",
        help="one in the centre; corners and centre, also mirrored; the whole image",
    )
    group.add_argument(
        "--crop-size",
        type=arguments.positive_int,
        help=f"side of a crop, e.g. 224 or 320 (default: the network's, else {DEFAULT_CROP_SIZE})",
    )
    group.add_argument(
        "--resize",
        type=arguments.positive_int,
        help="shorter side before cropping (default: --crop-size / 0.875, that is 256 for 224 and, "
        "our choice, 366 for 320; with --crops full it is --crop-size itself)",
    )
    group.add_argument(
        "--batch-size",
        type=arguments.positive_int,
        default=32,
        help="crops at a time; whole images of one size",
    )
    glore_cli.add_pixel_arguments(group)
    group.add_argument(
        "--record-reader",
        choices=READERS,
        default="own",
        help="of a .rec file; native: mx.io.ImageRecordIter, centre crops only",
    )
    group.add_argument("--num-workers", type=arguments.count, help="decoding processes")
    group.add_argument("--max-images", type=arguments.positive_int, help="stop after so many")
    arguments.add_flag(group, "--strict-data", "stop at the first unreadable image")
    arguments.add_device_arguments(parser, dtype=False)
    group = parser.add_argument_group("output")
    group.add_argument("--per-class", metavar="FILE", help="write a table of the classes (CSV)")
    group.add_argument("--log-file", default="", help="log file (default: none)")
    group.add_argument(
        "--output",
        default="",
        metavar="PREFIX",
        help="beginning of the names of the results (default: ./exps/results/WEIGHTS_CROPS-SIZE)",
    )
    return parser


def settle(args):
    """Fill in what follows from other options."""
    if args.network is None:
        for name in glore_cli.network_overrides(args):
            if name != "crop_size":
                raise UsageError(
                    f"--{name.replace('_', '-')} changes a network of this project: give --network "
                    "too, or leave it out to use the graph that the weights come with"
                )
    elif get_spec(args.network).ndim != 2:
        raise UsageError(f"{args.network} reads clips; evaluate_kinetics.py tests it")
    if args.crop_size is None:
        known = args.network is not None
        args.crop_size = get_spec(args.network).data_shape[-1] if known else DEFAULT_CROP_SIZE
    if args.resize is None:
        full = args.crops == "full"
        args.resize = args.crop_size if full else default_resize(args.crop_size)
    if args.crops != "full" and args.resize < args.crop_size:
        raise UsageError(f"--resize {args.resize} is smaller than --crop-size {args.crop_size}")


def read_model(args):
    """Return the :class:`Model` that the command line names."""
    path = locate(args.weights)
    if args.network is None:
        symbol, arg_params, aux_params, path = read_with_graph(path, args.epoch)
        name = None
        released = {known.lower(): known for known in list_released()}
        published = released.get(re.sub(r"\.tar$", "", args.weights.lower()))
    else:
        overrides = glore_cli.network_overrides(args)
        symbol, _ = get_symbol(args.network, **overrides)
        arg_params, aux_params, path = read_source(path, symbol, args.epoch)
        bias = arg_params.get("classifier_bias")
        if bias is not None:
            symbol, _ = get_symbol(args.network, len(bias), **overrides)
        name = get_spec(args.network).name
        published = name if set(overrides) == {"crop_size"} else None
        inputs = {"data": (1, 3, args.crop_size, args.crop_size)}
        check(symbol, arg_params, aux_params, inputs, where=path)
    return Model(symbol, arg_params, aux_params, path, name, PUBLISHED_TOP1.get(published))


def read_with_graph(path, epoch):
    """Return (symbol, arg_params, aux_params, path) of a checkpoint with a graph beside it."""
    if os.path.isfile(path):
        graph = f"{find(path, None)[0]}-symbol.json"
        if not os.path.exists(graph):
            raise UsageError(
                f"{path} has no graph beside it ({graph}): name its network with --network"
            )
        return (*load(path, epoch), path)
    known = epochs(path)
    epoch = known[-1] if known and epoch is None else epoch
    return (*load(path, epoch), path if epoch is None else paths(path, epoch)[1])


def takes(model, height, width):
    """Return whether the weights fit the graph for images of this size."""
    try:
        args, auxs = param_shapes(logits(model.symbol), {"data": (1, 3, height, width)})
    except UsageError:
        return False
    params = {**model.arg_params, **model.aux_params}
    return all(tuple(params[name].shape) == shape for name, shape in {**args, **auxs}.items())


def check_sizes(model, args):
    """Find out before anything slow starts whether the graph takes the sizes that will come."""
    side = args.resize if args.crops == "full" else args.crop_size
    # Whole images have all shapes.
    sizes = [(side, side), (side, 2 * side)] if args.crops == "full" else [(side, side)]
    for height, width in sizes:
        if takes(model, height, width):
            continue
        raise UsageError(
            f"{model.path}: its own graph does not take colour images of {height} x {width} "
            "pixels. (The released graphs average over a fixed 7 x 7 map, which means 224 x 224.) "
            "With --network NAME the weights are put into this project's graph of that network, "
            "which takes any size."
        )


def evaluate(predict, loader, limit=None):
    """Score a network on images.

    Parameters
    ----------
    predict : callable
        See :func:`train.scoring.predictor`.
    loader : iterable
        Of :func:`data.image.loaders.get_image_val_loader`: yields (data, label, index).
    limit : int, optional
        Images.

    Returns
    -------
    Evaluation
        Its figures are those of :func:`train.scoring.summarize` and ``images_per_second``.

    Raises
    ------
    GloReError
        If no image could be read.
    """
    started = time.perf_counter()
    scores = average_scores(predict, loader, limit=limit)
    seconds = time.perf_counter() - started
    if not scores:
        raise GloReError("no image could be read: there is no result")
    figures, confusion = summarize(scores, loader.num_classes)
    figures["images_per_second"] = round(len(scores) / seconds, 3)
    return Evaluation(scores, figures, confusion)


def write_class_table(path, result, class_names):
    """Write one row per class."""
    rows = class_rows(result.scores, result.confusion, class_names)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    write_text(path, text.getvalue())


def write_results(prefix, args, model, result, source, class_names):
    """Write ``PREFIX.json`` and, of few classes, ``PREFIX_confusion.png``; return the paths."""
    names = {index: source.name(index) for index in result.scores}
    content = {
        "network": model.name,
        "weights": model.path,
        "data": source.origin,
        "crops": args.crops,
        "crop_size": None if args.crops == "full" else args.crop_size,
        "resize": args.resize,
        **result.figures,
        "published_top1": model.published_top1,
        "class_names": class_names,
        "predictions": predictions(result.scores, "image", names),
    }
    written = [f"{prefix}.json"]
    write_text(written[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if result.confusion.num_classes <= MOST_PICTURED_CLASSES:
        written.append(f"{prefix}_confusion.png")
        title = f"{model.name or os.path.basename(model.path)}: top-1 {result.figures['top1']:.2%}"
        plot_confusion(result.confusion.matrix, written[1], class_names, title)
    return written


def get_loader(args, source, mean, std):
    """Return the loader of the images."""
    return get_image_val_loader(
        source,
        crop_size=args.crop_size,
        resize=args.resize,
        mean=mean,
        std=std,
        batch_size=args.batch_size,
        crops=args.crops,
        num_workers=args.num_workers,
        strict=args.strict_data,
        reader=args.record_reader,
    )


def log_result(result, model):
    """Log the figures, and the published one beside them."""
    figures = result.figures
    LOGGER.info(
        "loss-ce %.4f  top1 %.2f %%  top5 %.2f %%  mean class accuracy %.2f %%  (%d images, "
        "chance: %.2f %%; %.2f images/s)",
        figures["loss"],
        100 * figures["top1"],
        100 * figures["top5"],
        100 * figures["mean_class_accuracy"],
        figures["count"],
        100 / result.confusion.num_classes,
        figures["images_per_second"],
    )
    if model.published_top1 is not None:
        LOGGER.info(
            "Published top-1 of this network: %.1f %% (ImageNet-1k validation, one centre crop of "
            "224)",
            model.published_top1,
        )


def main(argv=None):
    """Score as the command line says."""
    args = get_parser().parse_args(argv)
    with log_to(args.log_file or None):
        settle(args)
        model = read_model(args)
        check_sizes(model, args)
        contexts = arguments.devices(args.gpus)
        side = args.resize if args.crops == "full" else args.crop_size
        mean, std = glore_cli.normalisation(
            args, get_spec(model.name) if model.name else InputConf((3, side, side), MEAN, STD)
        )
        output = logits(model.symbol)
        num_classes = output.infer_shape(data=(1, 3, side, side))[1][0][1]
        source = open_image_source(args.rec or args.folder, num_classes)
        block = build_block(
            model.symbol,
            InputConf((3, side, side), mean, std),
            ctx=contexts,
            params=(model.arg_params, model.aux_params),
            output=output.name,
            training=False,
        )
        loader = get_loader(args, source, mean, std)
        # Names are those of the data, which may have fewer classes than the network.
        names = source.class_names
        names = list(names) if names and len(names) == num_classes else None
        stem = os.path.splitext(os.path.basename(os.path.normpath(model.path)))[0]
        prefix = args.output or os.path.join(".", "exps", "results", f"{stem}_{args.crops}-{side}")
        LOGGER.info(
            "Scoring %s on %d images of %s: %s, shorter side %d%s",
            model.path,
            loader.num_samples,
            source.origin,
            {"centre": "centre crop", "ten": "ten crops", "full": "whole images"}[args.crops],
            args.resize,
            "" if args.crops == "full" else f", {side} x {side} pixels",
        )
        try:
            result = evaluate(predictor(block, contexts), loader, args.max_images)
            bad = write_bad_files([loader], f"{prefix}_bad-files.tsv")
        finally:
            loader.close()
        log_result(result, model)
        if bad:
            LOGGER.warning("%d images could not be read: %s_bad-files.tsv", bad, prefix)
        written = write_results(prefix, args, model, result, source, names)
        if args.per_class:
            write_class_table(args.per_class, result, names)
            written.append(args.per_class)
        LOGGER.info("Written    %s", ", ".join(written))
