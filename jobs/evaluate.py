"""Test a checkpoint on videos, images, or images with masks or objects; views are averaged.

Network, input size, interval, mean, std and data are those that the checkpoint was trained with,
as its manifest says, unless told otherwise. ``test/test-single-clip.py`` is the name that
upstream's users know this by.
"""

import csv
import dataclasses
import io
import json
import logging
import os
import time
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from data.common.loader import BatchSource, write_bad_files
from data.common.transforms import default_resize
from data.image.ilsvrc import classes_of_network
from data.image.loaders import get_image_val_loader
from data.image.options import ImageReadingOptions
from data.image.source import ImageSource, open_image_source, with_classes
from data.video.loaders import get_test_loader
from dataset import DatasetConfig, get_config, prepare_demo
from glore_common import GloReError, UsageError, check_writable, command, write_text
from glore_options import parse
from network.pretrained import plain
from network.specs import PUBLISHED_TOP1
from train.devices import contexts_of
from train.metric import ConfusionMatrix
from train.plots import plot_confusion
from train.report import log_to
from train.scoring import average_scores, class_rows, predictions, summarize

from .evaluate_detection import evaluate_detection
from .evaluate_segmentation import evaluate_segmentation
from .model import Model, open_model
from .options import EvaluateOptions, ImageSourceOptions
from .sources import open_parts

LOGGER = logging.getLogger("glore")
# A picture of more shows nothing.
MOST_PICTURED_CLASSES = 200
IMAGE_CROPS = {"centre": "centre crop", "ten": "ten crops", "full": "whole images"}
BATCH_SIZE = 32


class Evaluation(NamedTuple):
    """Mean scores by sample (see :func:`train.scoring.average_scores`), figures, confusions."""

    scores: dict
    figures: dict
    confusion: ConfusionMatrix


def evaluate(
    predict: Callable[[Any], np.ndarray],
    loader: BatchSource,
    num_classes: int,
    limit: Optional[int],
) -> Evaluation:
    """Score a network on what a loader reads.

    Parameters
    ----------
    predict
        See :func:`train.scoring.predictor`.
    loader
        Yields (data, label, index).
    num_classes
        Of the network.
    limit
        Samples.

    Returns
    -------
    Its figures are those of :func:`train.scoring.summarize` and ``seconds``.

    Raises
    ------
    GloReError
        If nothing could be read.
    """
    started = time.perf_counter()
    scores = average_scores(predict, loader, limit=limit)
    seconds = time.perf_counter() - started
    if not scores:
        raise GloReError(f"no {loader.dataset.kind} of {loader.dataset.origin} could be read")
    figures, confusion = summarize(scores, num_classes)
    return Evaluation(scores, {**figures, "seconds": seconds}, confusion)


def table_text(rows: Any) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_results(
    prefix: str, result: Evaluation, content: dict[str, Any], names: dict, per_class: str = ""
) -> None:
    """Write the results of a test, and log where.

    Parameters
    ----------
    prefix
        Beginning of the files' names: ``PREFIX.json``, ``PREFIX_per-class.csv``,
        ``PREFIX_confusion.csv`` (a row is a true class) and, of few classes, ``_confusion.png``.
    result
        Of :func:`evaluate`.
    content
        Of the JSON, besides the predictions; ``class_names`` among it.
    names
        A sample's index to its name.
    per_class
        Instead of ``PREFIX_per-class.csv``.
    """
    class_names, matrix = content["class_names"], result.confusion.matrix
    rows = class_rows(result.scores, result.confusion, class_names)
    table = [list(rows[0])]
    table += [["" if value is None else value for value in row.values()] for row in rows]
    content = {**content, "predictions": predictions(result.scores, content["kind"], names)}
    per_class = per_class or f"{prefix}_per-class.csv"
    write_text(f"{prefix}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(per_class, table_text(table))
    write_text(f"{prefix}_confusion.csv", table_text(matrix.tolist()))
    written = [f"{prefix}.json", per_class, f"{prefix}_confusion.csv"]
    if len(matrix) <= MOST_PICTURED_CLASSES:
        written.append(f"{prefix}_confusion.png")
        name = content["network"] or os.path.basename(content["weights"])
        title = f"{name}: top-1 {result.figures['top1']:.2%}"
        plot_confusion(matrix, written[-1], class_names, title)
    LOGGER.info("Predictions        %s", written[0])
    LOGGER.info("Classes            %s", ", ".join(written[1:]))


def score(
    model: Model,
    loader: BatchSource,
    limit: Optional[int],
    predict: Callable[[Any], np.ndarray],
    prefix: str,
) -> tuple[Evaluation, dict[str, Any]]:
    """Test a network and log the figures; return the result and what the JSON says of any data."""
    facts, kind = model.facts, loader.dataset.kind
    try:
        result = evaluate(predict, loader, facts.num_classes, limit)
        bad = write_bad_files([loader], f"{prefix}_bad-files.tsv")
    finally:
        loader.close()
    figures = dict(result.figures)
    seconds, samples = figures.pop("seconds"), figures.pop("count")
    views = sum(each.views for each in result.scores.values())
    LOGGER.info(
        "Test       loss-ce %.4f  top1 %.2f %%  top5 %.2f %%  mean class accuracy %.2f %%  (%d "
        "%ss, chance: %.2f %%; %.2f %ss/s, %.2f views/s)",
        figures["loss"],
        *(100 * figures[name] for name in ("top1", "top5", "mean_class_accuracy")),
        samples,
        kind,
        100 / facts.num_classes,
        samples / seconds,
        kind,
        views / seconds,
    )
    if bad:
        LOGGER.warning("%d %ss could not be read: %s_bad-files.tsv", bad, kind, prefix)
    LOGGER.info("Checkpoint         %s", model.path)
    content = {
        "network": facts.network,
        "weights": model.path,
        "kind": kind,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "count": samples,
        f"{kind}s": samples,
        f"{kind}s_per_second": round(samples / seconds, 3),
        **figures,
    }
    return result, content


def log_input(model: Model, text: str) -> None:
    """Say what the network is fed, and where that comes from."""
    facts = model.facts
    LOGGER.info("Network    %s (%s)", facts.network or model.path, model.origin)
    LOGGER.info(
        "Input      %s; RGB mean %s, std %s of 255",
        text,
        ", ".join(f"{255 * value:.4g}" for value in facts.mean),
        ", ".join(f"{255 * value:.4g}" for value in facts.std),
    )


# --- images ---------------------------------------------------------------------------------------


def settle_images(
    model: Model, reading: ImageReadingOptions, crops: str
) -> tuple[Model, ImageReadingOptions]:
    """Fill in sizes from the checkpoint, and find out whether the network takes them.

    Raises
    ------
    UsageError
        If the graph is for another size.
    """
    facts = model.facts
    side = reading.crop_size or facts.data_shape[-1]
    resize = reading.resize
    if resize is None:
        as_trained = facts.resize is not None and side == facts.trained_size
        resize = facts.resize if as_trained else default_resize(side)
        resize = side if crops == "full" else resize
    if crops != "full" and resize < side:
        raise UsageError(f"--resize {resize} is smaller than --crop-size {side}")
    # Whole images have all shapes.
    sizes = [(resize, resize), (resize, 2 * resize)] if crops == "full" else [(side, side)]
    for height, width in sizes:
        if not model.takes((3, height, width)):
            raise UsageError(
                f"{model.path}: its own graph does not take colour images of {height} x {width} "
                "pixels. (The released graphs average over a fixed 7 x 7 map, which means 224 x "
                "224.) With --network NAME the weights are put into this project's graph of that "
                "network, which takes any size."
            )
    facts = dataclasses.replace(facts, data_shape=(3, *sizes[0]), resize=resize)
    return (
        dataclasses.replace(model, facts=facts),
        dataclasses.replace(reading, crop_size=side, resize=resize),
    )


def evaluate_images(
    model: Model,
    source: ImageSource,
    reading: ImageReadingOptions,
    *,
    contexts: list,
    backend: str = "mxnet",
    prefix: str = "",
    batch_size: Optional[int] = None,
    crops: str = "centre",
    limit: Optional[int] = None,
    per_class: str = "",
) -> dict[str, Any]:
    """Test a network on images; log and write the results; return what the JSON says."""
    if source.num_classes != model.facts.num_classes:
        raise UsageError(
            f"{model.path} has {model.facts.num_classes} classes, {source.origin} has "
            f"{source.num_classes}: give the data that it was trained for"
        )
    model, reading = settle_images(model, reading, crops)
    facts = model.facts
    side = reading.resize if crops == "full" else reading.crop_size
    stem = os.path.splitext(os.path.basename(os.path.normpath(model.path)))[0]
    prefix = prefix or os.path.join(".", "exps", "results", f"{stem}_{crops}-{side}")
    check_writable(f"{prefix}.json", "--output")
    log_input(
        model,
        f"{IMAGE_CROPS[crops]}, shorter side {reading.resize}"
        + ("" if crops == "full" else f", {side} x {side} pixels"),
    )
    loader = get_image_val_loader(
        source,
        reading,
        mean=facts.mean,
        std=facts.std,
        batch_size=batch_size or reading.batch_size or BATCH_SIZE,
        crops=crops,
    )
    LOGGER.info("Testing    %d images of %s", loader.num_samples, source.origin)
    predict = model.predictor(contexts, backend)
    result, content = score(model, loader, limit, predict, prefix)
    published = PUBLISHED_TOP1.get(facts.network or "") if not facts.overrides else None
    if published is not None:
        LOGGER.info(
            "Published top-1 of this network: %.1f %% (ImageNet-1k validation, one centre crop of "
            "224)",
            published,
        )
    names = source.class_names or facts.class_names
    content.update(
        data=source.origin,
        crops=crops,
        crop_size=None if crops == "full" else side,
        resize=reading.resize,
        published_top1=published,
        class_names=list(names) if names and len(names) == facts.num_classes else None,
    )
    files = {index: source.name(index) for index in result.scores}
    write_results(prefix, result, content, files, per_class)
    return content


def image_source(options: EvaluateOptions, model: Model) -> ImageSource:
    """Return the images that are asked for, else the test or validation part of the training."""
    facts, asked = model.facts, options.data.rec or options.data.folder
    if options.data.rec and options.data.folder:
        raise UsageError("give --rec or --folder, not both")
    if asked:
        names = facts.class_names or classes_of_network(asked, facts.num_classes)
        labels = options.data.labels
        return open_image_source(asked, facts.num_classes, names, labels=labels)
    trained = model.options.get("source")
    if not trained:
        raise UsageError(f"{model.path} does not say which images: give --folder DIR or --rec FILE")
    known = {field.name for field in dataclasses.fields(ImageSourceOptions)}
    source = ImageSourceOptions(**{k: v for k, v in trained.items() if k in known})
    source.data_root = options.data.data_root or source.data_root
    parts = open_parts(source)
    part = parts.test or parts.val
    if part is None:
        raise UsageError(
            f"{model.path} was trained without validation images: give --folder DIR or --rec FILE"
        )
    return with_classes(part, facts.class_names)


# --- clips ----------------------------------------------------------------------------------------


def classes_of(name: str, trained: dict[str, Any]) -> Optional[int]:
    """Return the ``--num-classes`` that a network was trained with, of the same data set."""
    return trained.get("num_classes") if name == trained.get("dataset") else None


def same_classes(model: Model, config: DatasetConfig) -> Optional[list[str]]:
    """Return the names of a network's classes, once they are known to be the data set's.

    Raises
    ------
    UsageError
        They are not.
    """
    facts, names = model.facts, None
    if config.num_classes != facts.num_classes:
        raise UsageError(
            f"{model.path} has {facts.num_classes} classes, {config.name} has "
            f"{config.num_classes}: give the --dataset that it was trained for"
        )
    if os.path.exists(config.mapping_table):
        names = config.class_names()
    if names is None or facts.class_names is None:
        return facts.class_names or names
    for label, (ours, theirs) in enumerate(zip(facts.class_names, names)):
        if plain(ours) != plain(theirs):
            raise UsageError(
                f"class {label} is {ours!r} in {model.path} and {theirs!r} in "
                f"{config.mapping_table}: give the --dataset that it was trained for"
            )
    return facts.class_names


def evaluate_clips(options: EvaluateOptions, model: Model, contexts: list) -> dict[str, Any]:
    """Test a network on the validation videos of a data set; log and write the results."""
    facts, data = model.facts, options.data
    trained = model.options.get("data", {})
    name = data.dataset or trained.get("dataset")
    if name is None:
        raise UsageError(f"{model.path} does not say which videos: give --dataset NAME")
    root = data.data_root or trained.get("data_root")
    config = get_config(
        name, root, data.split or trained.get("split", 1), classes_of(name, trained)
    )
    if config.name == "Demo":
        prepare_demo(root)
    config.check(["val"])
    names = same_classes(model, config)
    reading = dataclasses.replace(
        data,
        batch_size=data.batch_size or BATCH_SIZE,
        clip_length=facts.data_shape[1],
        crop_size=facts.data_shape[-1],
        # A network without a manifest is tested as the data set has it.
        frame_interval=data.frame_interval or facts.frame_interval or config.val_frame_interval,
        clip_seconds=data.clip_seconds
        or (None if data.frame_interval else trained.get("clip_seconds")),
    )
    distance = f"one in {reading.frame_interval}"
    if reading.clip_seconds is not None:
        distance = f"over {reading.clip_seconds:g} s"
    log_input(
        model,
        f"{reading.clip_length} frames, {distance}, {reading.crop_size} x {reading.crop_size} "
        "pixels",
    )
    loader = get_test_loader(
        config.val_list,
        config.val_root,
        reading,
        mean=facts.mean,
        std=facts.std,
        num_classes=config.num_classes,
        seed=data.random_seed,
    )
    stem = os.path.splitext(os.path.basename(model.path))[0]
    prefix = options.output.output or os.path.join(".", "exps", "results", stem)
    clips = loader.num_samples
    check_writable(f"{prefix}.json", "--output")
    LOGGER.info(
        "Testing    %d videos of %s, %d clips (%d of each), %d crops (%d of each clip)",
        clips // data.num_clips,
        config.name,
        clips,
        data.num_clips,
        clips * data.num_crops,
        data.num_crops,
    )
    model = dataclasses.replace(
        model, facts=dataclasses.replace(facts, frame_interval=reading.frame_interval)
    )
    predict = model.predictor(contexts, options.devices.engine(facts.task))
    result, content = score(model, loader, data.max_samples, predict, prefix)
    content.update(
        dataset=config.name,
        clip_length=reading.clip_length,
        frame_interval=reading.frame_interval,
        crop_size=reading.crop_size,
        num_clips=data.num_clips,
        num_crops=data.num_crops,
        class_names=names,
    )
    names_of = {
        video: os.path.relpath(loader.dataset.name(video * data.num_clips), config.val_root)
        for video in result.scores
    }
    write_results(prefix, result, content, names_of, options.output.per_class)
    return content


# --- command --------------------------------------------------------------------------------------


def read_model(options: Any) -> Model:
    """Return the network that the command line names, with its mean and std settled.

    Parameters
    ----------
    options
        With the groups ``network`` (:class:`~jobs.options.WeightsOptions`), ``data``
        (:class:`~jobs.options.ViewOptions`) and ``pixels``.
    """
    network, data = options.network, options.data
    weights = network.weights
    if weights is None and network.model_subpath:
        weights = os.path.join(network.model_root, network.model_subpath)
    if weights is None:
        raise UsageError(
            f"name the weights: {command('evaluate')} CHECKPOINT, or --model-subpath FILE (in "
            "--model-root)"
        )
    model = open_model(
        weights,
        network.epoch,
        network.network,
        network.overrides(),
        crop_size=data.crop_size,
        clip_length=data.clip_length,
    )
    mean, std = options.pixels.normalisation(model.facts.mean, model.facts.std)
    origin = model.origin
    if (mean, std) != (model.facts.mean, model.facts.std):
        origin += "; mean and std as given"
    facts = dataclasses.replace(model.facts, mean=mean, std=std)
    return dataclasses.replace(model, facts=facts, origin=origin)


def main(argv: Optional[list[str]] = None) -> None:
    """Test as the command line says."""
    options = parse(EvaluateOptions(), argv, (__doc__ or "").split("\n\n")[0])
    data, output = options.data, options.output
    level = logging.DEBUG if output.debug_mode else logging.INFO
    for path, what in ((output.output, "--output"), (output.per_class, "--per-class")):
        if path:
            check_writable(f"{path}.json" if what == "--output" else path, what)
    with log_to(output.log_file or None, level):
        model = read_model(options)
        contexts = contexts_of(options.devices)
        engine = options.devices.engine(model.facts.task)
        if model.facts.task == "video":
            if data.crops in ("ten", "full"):
                raise UsageError(f"--crops {data.crops} is for images")
            evaluate_clips(options, model, contexts)
            return
        if model.facts.task == "segmentation":
            evaluate_segmentation(options, model, contexts)
            return
        if model.facts.task == "detection":
            evaluate_detection(options, model, contexts)
            return
        if data.crops in ("spatial", "mixed"):
            raise UsageError(f"--crops {data.crops} is for clips")
        evaluate_images(
            model,
            image_source(options, model),
            data,
            contexts=contexts,
            backend=engine,
            prefix=output.output,
            crops=data.crops or "centre",
            limit=data.max_samples,
            per_class=output.per_class,
        )
