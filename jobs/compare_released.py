"""Compare a released MXNet checkpoint with this project's network: names, outputs, accuracy.

The checkpoint is a tar, a prefix or a name of ``python -m checkpoint.released list``. Its own graph
is run beside ours on the same input. Exit code: 0 when all parameters have their names and shapes
and the outputs are equal within --tolerance, 1 when something differs, 2 when nothing can be
compared (a damaged or foreign file, bad usage).
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from typing import Any, Callable, Optional

import numpy as np

from checkpoint.graph import read_symbol
from checkpoint.params import check, param_shapes
from checkpoint.paths import find
from checkpoint.released import locate
from data.common.loader import BatchSource
from data.image.ilsvrc import classes_of_network
from data.image.loaders import get_image_val_loader
from data.image.options import ImageReadingOptions
from data.image.source import image_source_of_rows, open_image_source
from glore_common import GloReError, UsageError, check_writable, write_text
from glore_options import parse
from mxnet_compat import mx
from network import get_symbol, logits
from network.block import build_block
from network.builder import InputConf, get_spec
from network.compare import Match, compare_outputs, layer_distances, match_params
from network.identify import Identified, identify_network
from network.pretrained import read_source
from network.specs import PUBLISHED_TOP1
from train.devices import contexts_of
from train.report import log_to
from train.scoring import average_scores, predictor, summarize

from .options import CompareOptions, ComparisonOptions

LOGGER = logging.getLogger("glore")
# Maps a batch (n, 3, h, w) to (n, classes).
Run = Callable[[mx.nd.NDArray], np.ndarray]
# Longest list of names, layers or images in the Markdown; the JSON has all.
SHOWN = 20
# What of a network's table row or overrides makes another network of it.
STRUCTURAL = ("glore", "block", "num_node", "num_state", "glore_flavour", "normalize")


class NotCompared(GloReError):
    """A checkpoint or data that nothing can be compared with: exit code 2, as 1 means different."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it is on disk.

    Attributes
    ----------
    path
        Its ``.params`` file.
    symbol
        Its own graph.
    args, auxs
        Name to NumPy array.
    """

    path: str
    symbol: mx.sym.Symbol
    args: dict[str, np.ndarray]
    auxs: dict[str, np.ndarray]

    @property
    def params(self) -> dict[str, np.ndarray]:
        """All parameters in one dictionary."""
        return {**self.args, **self.auxs}

    @property
    def order(self) -> list[str]:
        """Names of the parameters and inputs in the order of the graph."""
        return [*self.symbol.list_arguments(), *self.symbol.list_auxiliary_states()]


def read_checkpoint(
    text: str, root: Optional[str] = None, epoch: Optional[int] = None
) -> Checkpoint:
    """Read what the user named, with its own graph; names and shapes are not compared yet.

    Raises
    ------
    GloReError
        If it is missing, damaged or of another kind.
    """
    source = locate(text, root)
    if os.path.isfile(source) and not source.endswith(".params"):
        raise GloReError(f"{source} is neither a .params file nor a .tar of a checkpoint")
    found = find(source, epoch)
    symbol = read_symbol(found.symbol)
    args, auxs, path = read_source(found.params, symbol)
    return Checkpoint(path, symbol, args, auxs)


def find_network(checkpoint: Checkpoint, name: Optional[str] = None) -> Identified:
    """Return which network a checkpoint holds; ``name`` forces a row without overrides.

    Returns
    -------
    network.identify.Identified
    """
    shapes = {key: value.shape for key, value in checkpoint.params.items()}
    if name is None:
        return identify_network(shapes, checkpoint.symbol, checkpoint.path)
    try:
        found = identify_network(shapes, checkpoint.symbol, checkpoint.path)
    except GloReError as error:
        LOGGER.warning("%s", error)
        return Identified(get_spec(name).name, get_spec(name).num_classes, {}, {})
    if found.name == get_spec(name).name:
        return found
    LOGGER.warning("The parameters look like %s, not %s", found.name, get_spec(name).name)
    return Identified(get_spec(name).name, found.num_classes, {}, found.found)


def is_published(network: Identified) -> bool:
    """Tell whether it is a network whose accuracy is published, as it was published."""
    return network.name in PUBLISHED_TOP1 and not set(STRUCTURAL) & set(network.overrides)


def describe_match(match: Match) -> dict[str, Any]:
    """Return a Match as a dictionary for the report."""
    return {
        "total": match.total,
        "matched": len(match.matched),
        "missing": list(match.missing),
        "extra": list(match.extra),
        "reshaped": {
            name: {"checkpoint": theirs, "network": ours}
            for name, (theirs, ours) in match.reshaped.items()
        },
        "renamed": dict(match.renamed),
    }


def shapes_of(symbol: mx.sym.Symbol, input_conf: InputConf) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of all parameters and auxiliary states of a graph."""
    args, auxs = param_shapes(symbol, {"data": (1, *input_conf.data_shape)})
    return {**args, **auxs}


def get_runner(
    symbol: mx.sym.Symbol, input_conf: InputConf, params: Any, contexts: list
) -> tuple[Run, Run]:
    """Return two functions of a batch that give logits, NumPy arrays (n, classes).

    The first runs on the first context, the second on all.
    """
    block = build_block(
        symbol,
        input_conf,
        ctx=contexts,
        params=params,
        output=logits(symbol).name,
        training=False,
    )

    def run(data):
        """(n, 3, h, w) -> (n, classes), NumPy."""
        return block(data.as_in_context(contexts[0])).asnumpy()

    return run, predictor(block, contexts)


def get_loader(
    source: Any, args: ComparisonOptions, network: Identified, input_conf: InputConf, **options: Any
) -> BatchSource:
    """Return the loader of validation images; to be closed, which ``with`` does."""
    if len(input_conf.data_shape) != 3:
        raise UsageError(f"{network.name} reads clips: --images, --rec and --folder do not apply")
    reading = ImageReadingOptions(
        crop_size=input_conf.data_shape[-1],
        resize=args.resize,
        batch_size=args.batch_size,
        **options,
    )
    return get_image_val_loader(
        open_image_source(
            source,
            network.num_classes,
            classes_of_network(source, network.num_classes),
        ),
        reading,
        mean=input_conf.mean,
        std=input_conf.std,
    )


def get_input(
    args: ComparisonOptions, network: Identified, input_conf: InputConf
) -> list[mx.nd.NDArray]:
    """Return the input that the outputs are compared on: batches of (n, 3, h, w)."""
    if not args.images:
        shape = (args.batch_size, *input_conf.data_shape)
        noise = np.random.RandomState(args.seed % 2**32).standard_normal(shape)
        return [mx.nd.array(noise.astype("float32"))]
    rows = [(os.path.abspath(path), 0) for path in args.images]
    for path, _ in rows:
        if not os.path.isfile(path):
            raise UsageError(f"--images: there is no file {path}")
    source = image_source_of_rows(rows, os.sep, None, network.num_classes, "--images")
    with get_loader(source, args, network, input_conf, num_workers=0, strict_data=True) as loader:
        return [data for data, _, _ in loader]


def evaluate(
    predict: Run, args: ComparisonOptions, network: Identified, input_conf: InputConf
) -> tuple[dict, dict, Callable[[int], str]]:
    """Return (figures, scores by image, index to name) of a network on --rec or --folder."""
    source, workers = args.rec or args.folder, args.num_workers
    with get_loader(source, args, network, input_conf, num_workers=workers) as loader:
        scores = average_scores(predict, loader, total=len(loader), limit=args.max_images)
        name = loader.dataset.name
    if not scores:
        raise GloReError(f"no image of {source} could be read")
    return summarize(scores, network.num_classes)[0], scores, name


def differing_predictions(
    released: dict, ours: dict, names: Callable[[int], str]
) -> dict[str, Any]:
    """Compare the predictions of two networks on the images that both have scored.

    Parameters
    ----------
    released, ours : dict
        As :func:`train.scoring.average_scores`.
    names : callable
        Index to name of an image.
    """
    kinds = {(1, 1): "both", (1, 0): "released_only", (0, 1): "ours_only", (0, 0): "neither"}
    counts, rows = dict.fromkeys(kinds.values(), 0), []
    for index in sorted(set(released) & set(ours)):
        label = released[index].label
        first, second = (int(scores[index].log_mean.argmax()) for scores in (released, ours))
        counts[kinds[first == label, second == label]] += 1
        if first != second:
            row = {"image": names(index), "label": label, "released": first, "ours": second}
            rows.append(row)
    return {"images": sum(counts.values()), "right": counts, "different": rows}


def own_graph(checkpoint: Checkpoint, input_conf: InputConf) -> Match:
    """Return how a checkpoint's parameters fit its own graph."""
    shapes = shapes_of(checkpoint.symbol, input_conf)
    return match_params(shapes, checkpoint.params, checkpoint.order)


def compare_training(
    args: ComparisonOptions,
    base: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
    input_conf: InputConf,
    contexts: list,
    batches: list[mx.nd.NDArray],
    outputs: Optional[np.ndarray],
) -> tuple[dict[str, Any], Optional[Run]]:
    """Compare the user's own training with the released checkpoint.

    Parameters
    ----------
    args : argparse.Namespace
    base : dict
        The released parameters by our names.
    shapes : dict
        Shapes of our network's parameters.
    input_conf : InputConf
        What the released network reads.
    contexts : list of mx.Context
    batches : list of NDArray
        (n, 3, h, w).
    outputs : numpy.ndarray or None
        The released network's logits (n, classes) of all batches, if it can be run.

    Returns
    -------
    report : dict
    predict : callable
        Data to scores of the user's network.
    """
    own = read_checkpoint(args.ours, args.root, args.ours_epoch)
    inputs = {"data": (1, *input_conf.data_shape)}
    check(own.symbol, own.args, own.auxs, inputs, where=own.path)
    run, predict = get_runner(own.symbol, input_conf, (own.args, own.auxs), contexts)
    match = match_params(shapes, own.params, own.order)
    weights, statistics = layer_distances(base, match.values(own.params, shapes))
    report = {
        "checkpoint": own.path,
        "parameters": describe_match(match),
        "weights": weights,
        "statistics": statistics,
        "outputs": None,
    }
    if outputs is not None:
        theirs = np.concatenate([run(data) for data in batches])
        if theirs.shape == outputs.shape:
            report["outputs"] = compare_outputs(outputs, theirs, args.tolerance)
        else:
            LOGGER.warning("%s has %d classes: outputs are not compared", own.path, theirs.shape[1])
            predict = None
    return report, predict


def compare(args: ComparisonOptions, contexts: list) -> dict:
    """Carry out the whole comparison; return the report, a dictionary for JSON.

    Raises
    ------
    GloReError
        If a checkpoint or image cannot be read, or is nothing to compare with.
    """
    checkpoint = read_checkpoint(args.checkpoint, args.root, args.epoch)
    network = find_network(checkpoint, args.network)
    if args.crop_size is not None:
        network.overrides["crop_size"] = args.crop_size
    symbol, input_conf = get_symbol(network.name, network.num_classes, **network.overrides)
    shapes = shapes_of(symbol, input_conf)
    match = match_params(shapes, checkpoint.params, checkpoint.order)
    own = own_graph(checkpoint, input_conf)
    report: dict[str, Any] = {
        "checkpoint": checkpoint.path,
        "network": network.name,
        "num_classes": network.num_classes,
        "overrides": network.overrides,
        "found": network.found,
        "data_shape": input_conf.data_shape,
        "published_top1": PUBLISHED_TOP1[network.name] if is_published(network) else None,
        "parameters": describe_match(match),
        "own_graph": None if own.is_exact else describe_match(own),
        "input": list(args.images) or f"{args.batch_size} random, seed {args.seed}",
        "outputs": None,
        "accuracy": None,
        "training": None,
    }
    batches = get_input(args, network, input_conf)
    base = match.values(checkpoint.params, shapes)
    runners = {}
    if own.is_exact:
        params = (checkpoint.args, checkpoint.auxs)
        runners["own graph"] = get_runner(checkpoint.symbol, input_conf, params, contexts)
    if match.is_complete:
        runners["our network"] = get_runner(symbol, input_conf, base, contexts)
    outputs = {
        who: np.concatenate([run(data) for data in batches]) for who, (run, _) in runners.items()
    }
    if len(outputs) == 2:
        theirs, ours = outputs.values()
        report["outputs"] = compare_outputs(theirs, ours, args.tolerance)
    report["equal"] = match.is_exact and report["outputs"] is not None
    report["equal"] = report["equal"] and report["outputs"]["equal"]

    predictors = {who: predict for who, (_, predict) in list(runners.items())[:1]}
    if args.ours:
        first = next(iter(outputs.values()), None)
        report["training"], predict = compare_training(
            args, base, shapes, input_conf, contexts, batches, first
        )
        if predict is not None:
            predictors["your training"] = predict
    if (args.rec or args.folder) and not predictors:
        LOGGER.warning("No network has all of its parameters: there is no accuracy to measure")
    elif args.rec or args.folder:
        report["accuracy"] = compare_accuracy(args, predictors, network, input_conf)
    return report


def compare_accuracy(
    args: ComparisonOptions,
    predictors: dict[str, Run],
    network: Identified,
    input_conf: InputConf,
) -> dict[str, Any]:
    """Return the accuracy of each network on --rec or --folder, and where two predict otherwise."""
    figures, scores = {}, {}
    for who, predict in predictors.items():
        figures[who], scores[who], names = evaluate(predict, args, network, input_conf)
    report: dict[str, Any] = {
        "images": args.rec or args.folder,
        "figures": figures,
        "predictions": None,
    }
    if len(scores) == 2:
        released, ours = scores.values()
        report["predictions"] = differing_predictions(released, ours, names)
    return report


def shown(names: Iterable[str]) -> str:
    """Return names for Markdown, the first ones of many."""
    names = [f"`{name}`" for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def number(value: Optional[float]) -> str:
    """Return a number for a table, ``n/a`` for what is not finite."""
    return "n/a" if value is None else f"{value:.3g}"


def match_lines(parameters: dict[str, Any]) -> list[str]:
    """Return the Markdown of a comparison of parameters."""
    lines = [
        f"{parameters['matched']} of {parameters['total']} matched",
        "",
        "| parameters | number | which |",
        "|---|---:|---|",
        f"| matched | {parameters['matched']} | |",
    ]
    reshaped = [
        f"{name} {tuple(both['checkpoint'])}, here {tuple(both['network'])}"
        for name, both in parameters["reshaped"].items()
    ]
    renamed = [f"{theirs}, here {ours}" for ours, theirs in parameters["renamed"].items()]
    for kind, names in (
        ("missing", parameters["missing"]),
        ("extra", parameters["extra"]),
        ("of another shape", reshaped),
        ("renamed", renamed),
    ):
        lines.append(f"| {kind} | {len(names)} | {shown(names)} |")
    return lines


def output_lines(outputs: dict[str, Any], images: list[str]) -> list[str]:
    """Return the Markdown of a comparison of outputs."""
    verdict = "equal" if outputs["equal"] else "different"
    lines = [
        "| | |",
        "|---|---:|",
        f"| inputs | {outputs['inputs']} |",
        f"| largest difference | {number(outputs['largest_difference'])} |",
        f"| … of the largest logit | {number(outputs['largest_relative_difference'])} |",
        f"| tolerance | {outputs['tolerance']:g}: {verdict} |",
        f"| same top-1 | {outputs['top1_agreement']:.2%} |",
        f"| same five in the top-5 | {outputs['top5_agreement']:.2%} |",
    ]
    if images:
        lines += [
            "",
            "| image | top-5 classes, checkpoint | top-5 classes, other |",
            "|---|---|---|",
        ]
        lines += [
            f"| {path} | {' '.join(map(str, top['checkpoint']))} "
            f"| {' '.join(map(str, top['network']))} |"
            for path, top in list(zip(images, outputs["top5"]))[:SHOWN]
        ]
    return lines


def accuracy_lines(report: dict[str, Any]) -> list[str]:
    """Return the Markdown of the accuracies, beside the published one."""
    accuracy = report["accuracy"]
    lines = [f"Images: {accuracy['images']}", ""]
    lines += ["| network | images | top-1, % | top-5, % | loss |", "|---|---:|---:|---:|---:|"]
    for who, figures in accuracy["figures"].items():
        lines.append(
            f"| {who} | {figures['count']} | {100 * figures['top1']:.2f} "
            f"| {100 * figures['top5']:.2f} | {figures['loss']:.4f} |"
        )
    if report["published_top1"] is not None:
        lines.append(
            f"| published (ImageNet-1k, single centre crop) | | {report['published_top1']} | | |"
        )
    predictions = accuracy["predictions"]
    if predictions is not None:
        right = predictions["right"]
        lines += [
            "",
            f"{len(predictions['different'])} of {predictions['images']} predictions differ. "
            f"Right: both {right['both']}, the released only {right['released_only']}, yours only "
            f"{right['ours_only']}, neither {right['neither']}.",
        ]
        if predictions["different"]:
            lines += ["", "| image | label | released | yours |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['image']} | {row['label']} | {row['released']} | {row['ours']} |"
            for row in predictions["different"][:SHOWN]
        ]
    return lines


def training_lines(training: dict[str, Any]) -> list[str]:
    """Return the Markdown of the user's own training."""
    lines = [f"`{training['checkpoint']}`: {match_lines(training['parameters'])[0]}"]
    for key, columns, title in (
        ("weights", ("relative_distance", "cosine"), "Weights, the most different layers first"),
        ("statistics", ("mean_shift", "var_log_ratio"), "Running statistics of BatchNorm"),
    ):
        rows = sorted(training[key], key=lambda row: -(row[columns[0]] or 0.0))[:SHOWN]
        lines += ["", f"### {title}", "", f"| layer | {' | '.join(columns)} |", "|---|---:|---:|"]
        lines += [
            f"| `{row['layer']}` | {number(row[columns[0]])} | {number(row[columns[1]])} |"
            for row in rows
        ]
    return lines


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    overrides = ", ".join(f"{key}={value!r}" for key, value in report["overrides"].items())
    lines = [
        f"# {report['checkpoint']} beside `{report['network']}`",
        "",
        f"Network: `get_symbol({report['network']!r}, {report['num_classes']}"
        f"{', ' if overrides else ''}{overrides})`",
        "",
        *(f"- {key}: {value}" for key, value in report["found"].items()),
        "",
        "## Parameters",
        "",
        *match_lines(report["parameters"]),
    ]
    if report["own_graph"] is not None:
        lines += ["", "The parameters do not fit the checkpoint's own graph either:", ""]
        lines += match_lines(report["own_graph"])
    images = report["input"] if isinstance(report["input"], list) else []
    lines += ["", f"## Outputs ({len(images) or report['input']})", ""]
    if report["outputs"] is None:
        lines.append("Not run: parameters are missing or of another shape, or not the graph's own.")
    else:
        lines += output_lines(report["outputs"], images)
    if report["accuracy"] is not None:
        lines += ["", "## Accuracy", "", *accuracy_lines(report)]
    if report["training"] is not None:
        lines += ["", "## Your own training", "", *training_lines(report["training"])]
        if report["training"]["outputs"] is not None:
            lines += ["", "### Its outputs beside the released ones", ""]
            lines += output_lines(report["training"]["outputs"], images)
    return "\n".join([*lines, "", *result_lines(report)])


def result_lines(report: dict[str, Any]) -> list[str]:
    """Return what it all comes to, a line for each comparison that was made."""
    lines = [f"Result: {'equal' if report['equal'] else 'different'}"]
    training = report["training"]
    if training is not None:
        same = training["outputs"] is not None and training["outputs"]["equal"]
        lines[0] += " (the released checkpoint and this project's network)"
        lines.append(f"Result: {'equal' if same else 'different'} (your own training)")
    return lines


def main(argv: Optional[list[str]] = None) -> int:
    """Compare as the command line says; returns the exit code."""
    options = parse(CompareOptions(), argv, (__doc__ or "").split("\n\n")[0])
    args = options.comparison
    if not args.checkpoint:
        raise UsageError("name one checkpoint: --checkpoint PREFIX, TAR or NAME")
    stem = re.sub(r"(-\d{4,})?\.(params|tar)$", "", os.path.basename(args.checkpoint))
    prefix = args.output or os.path.join(".", "exps", "results", f"compare_{stem}")
    check_writable(f"{prefix}.md", "--output")
    with log_to(None):
        try:
            report = compare(args, contexts_of(options.devices))
        except GloReError as error:
            raise NotCompared(str(error)) from error
        text = markdown(report)
        print(text)
        write_text(f"{prefix}.md", text + "\n")
        write_text(f"{prefix}.json", json.dumps(report, indent=1) + "\n")
        print(f"Written: {prefix}.md, {prefix}.json")
    return 0 if report["equal"] else 1
