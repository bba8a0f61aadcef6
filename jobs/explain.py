"""Draw what the GloRe units and context blocks of a network do on images or clips.

Projection weights of GloRe's nodes over the image or the frames, the learnt relation of the nodes,
attention maps, channel factors: as pictures, as films of clips, in one HTML file without anything
outside it, and as numbers (npz, csv). What is computed are internal outputs of the network's one
Symbol (:mod:`network.internals`), so that a released checkpoint needs nothing but its own graph.
"""

import base64
import dataclasses
import html
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from data.common.options import PixelOptions
from data.common.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    Resize,
    ToArray,
    default_resize,
)
from data.image.dataset import decode_image
from data.image.source import EXTENSIONS
from data.video.readers import read_frames
from data.video.sampler import EvenlySampling
from data.video.windows import USUAL_RATE
from dataset.video_plans import VIDEO_EXTENSIONS
from glore_common import UsageError, atomic_path, progress, write_text
from glore_options import parse
from network.block_statistics import Statistics, statistics
from network.builder import logits
from network.internals import Inserted, View, compute, inserted_blocks, view_of, wanted_nodes
from train.report import log_to

from .evaluate import table_text
from .model import Model, open_model
from .options import (
    ExplainDataOptions,
    ExplainOptions,
    ExplainOutputOptions,
    WeightsOptions,
)
from .pictures import Maps, Shown, draw_factors, draw_maps, draw_relation, write_film

LOGGER = logging.getLogger("glore")
TOP = 5
KINDS = {
    "glore": "GloRe unit",
    "nl": "Non-local block",
    "snl": "simplified Non-local block",
    "gc": "global context block",
    "se": "squeeze-and-excitation",
}
MOST_GRAPH_NODES = 12


class Picture(NamedTuple):
    """A file of the report, and what is written below it."""

    path: str
    caption: str


# --- input ----------------------------------------------------------------------------------------


def find_inputs(paths: Sequence[str], video: bool, limit: int) -> list[str]:
    """Return the files that are meant: those named, and those in the folders named.

    Raises
    ------
    UsageError
        If there is none, or one is of the other kind.
    """
    wanted, other = (VIDEO_EXTENSIONS, EXTENSIONS) if video else (EXTENSIONS, VIDEO_EXTENSIONS)
    kind = "videos" if video else "images"
    found: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise UsageError(f"--inputs: there is no {path}")
        if not os.path.isdir(path):
            if path.lower().endswith(other):
                raise UsageError(f"--inputs: {path}: this network reads {kind}")
            found.append(path)
            continue
        inside = [
            os.path.join(folder, name)
            for folder, _, names in sorted(os.walk(path))
            for name in sorted(names)
            if name.lower().endswith(wanted) and not name.startswith(".")
        ]
        if not inside:
            raise UsageError(f"--inputs: {path} has no {kind} ({', '.join(wanted)})")
        # Spread over the folder, which may have one of its own per class.
        step = max(1.0, len(inside) / limit)
        found += [inside[int(number * step)] for number in range(min(limit, len(inside)))]
    if not found:
        raise UsageError(f"name {kind}: --inputs FILE ... or a folder")
    return found


def read_input(path: str, model: Model, interval: int) -> tuple[Shown, np.ndarray]:
    """Return an input as it is shown, and as the network is fed it: (1, 3, [T], h, w)."""
    facts = model.facts
    side = facts.data_shape[-1]
    resize = facts.resize if facts.resize and side == facts.trained_size else default_resize(side)
    seconds: tuple[float, ...] = ()
    if facts.task == "video":
        picked: list[int] = []

        def pick(total):
            picked.extend(EvenlySampling(facts.data_shape[1], interval).sample(total))
            return picked

        frames, found = read_frames(path, pick)
        seconds = tuple(index / (found.rate or USUAL_RATE) for index in picked)
    else:
        with open(path, "rb") as stream:
            frames = decode_image(stream.read(), path)[None]
    frames = np.ascontiguousarray(Compose([Resize(resize), CenterCrop(side)])(frames))
    data = Compose([ToArray(), Normalize(facts.mean, facts.std)])(frames)
    data = data if facts.task == "video" else data[:, 0]
    return Shown(os.path.basename(path), frames, seconds), data[None]


# --- one block ------------------------------------------------------------------------------------


def order_of(weights: np.ndarray) -> np.ndarray:
    """Return the nodes of a unit by energy, the sum of their squared weights, largest first."""
    return np.argsort(-(weights**2).sum(-1), kind="stable")


def maps_of(view: View, options: ExplainOutputOptions) -> tuple[Maps, list[dict[str, Any]]]:
    """Return the maps of a block that are drawn, and a row of numbers for each of all its maps."""
    block, weights = view.block, view.weights[0]
    level = 1 / weights.shape[-1]

    def row(label, values, **more):
        return {
            "block": block.name,
            "kind": block.kind,
            "map": label,
            "energy": float((values**2).sum()),
            "min": float(values.min()),
            "max": float(values.max()),
            "mean": float(values.mean()),
            "uniform": level,
            **more,
        }

    if block.kind == "glore":
        order = order_of(weights)
        share = (weights**2).sum(-1) / max((weights**2).sum(), 1e-300)
        rows = [row(f"node {k}", weights[k], share=float(share[k])) for k in order]
        chosen = order[: options.maps]
        titles = [f"node {k}\nenergy {100 * share[k]:.0f} %" for k in chosen]
        values = weights[chosen].reshape(len(chosen), *view.shape)
        return Maps(values, titles, True, "projection weight"), rows
    if block.kind == "nl":
        cells = [cell_at(point, view.shape) for point in options.queries]
        flat = [int(np.ravel_multi_index(cell, view.shape)) for cell in cells]
        rows = [row(f"query {cell}", weights[k], share=None) for cell, k in zip(cells, flat)]
        titles = [f"query {', '.join(map(str, cell[-2:]))}" for cell in cells]
        values = weights[flat].reshape(len(flat), *view.key_shape)
        signed = not block.is_distribution and bool((values < 0).any())
        label = "attention" if block.is_distribution else "weight"
        # The centre of a pooled cell lies between those of its parts.
        offset = (1 - view.key_shape[-1] / view.shape[-1]) / 2
        return Maps(values, titles, signed, label, cells, view.shape, offset), rows
    values = weights.reshape(1, *view.shape)
    return Maps(values, ["attention"], False, "attention"), [row("all positions", weights[0])]


def cell_at(point: tuple[float, float], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the cell ([t], y, x) of a map at shares of width and height, in the middle slice."""
    x, y = point
    height, width = shape[-2:]
    cell = (min(height - 1, int(y * height)), min(width - 1, int(x * width)))
    return (shape[0] // 2, *cell) if len(shape) == 3 else cell


def caption_of(view: View, found: Statistics, rows: Sequence[dict[str, Any]]) -> str:
    """Return what is written below the maps of a block."""
    low, high = (function(view.weights) for function in (np.min, np.max))
    text = f"{KINDS[view.block.kind]} {view.block.name}: "
    if view.block.kind == "glore":
        top = ", ".join(row["map"].split()[1] for row in rows[:MOST_GRAPH_NODES])
        text += (
            f"{view.weights.shape[1]} nodes over {' x '.join(map(str, view.shape))} positions; "
            f"weights are signed and not normalised, from {low:.3g} to {high:.3g} (a uniform map "
            f"of sum 1 would have {rows[0]['uniform']:.3g} everywhere). Nodes by energy: {top}. "
            f"Effective rank of the projection {found.rank:.1f} of {view.weights.shape[1]}; mean "
            f"cosine distance of two nodes' maps {found.nodes:.3f}."
        )
    else:
        text += (
            f"{' x '.join(map(str, view.key_shape))} positions; weights from {low:.3g} to "
            f"{high:.3g}, uniform {rows[0]['uniform']:.3g}."
        )
    if view.block.kind == "nl":
        shown = "not defined" if found.divergence is None else f"{found.divergence:.4f}"
        text += (
            " The box is the cell that asks. Mean distance of the attention of two positions: "
            f"cosine {found.attention:.4f}, Jensen-Shannon divergence {shown}."
        )
    if found.output is not None and np.isnan(found.output):
        text += " The block adds nothing yet: it is untrained."
    return text


def draw_block(
    view: View, shown: Shown, stem: str, options: ExplainOutputOptions
) -> tuple[list[Picture], list[dict[str, Any]]]:
    """Draw one block for one input.

    Parameters
    ----------
    view
        For this input alone.
    shown
    stem
        Beginning of the files' names.
    options

    Returns
    -------
    The pictures, and the rows of the CSV.
    """
    block, name = view.block, view.block.name
    title = f"{KINDS[block.kind]} {name}, {shown.name}"
    path = f"{stem}_{name}.png"
    if block.kind == "se":
        factors = view.weights[0]
        draw_factors(factors, path, title)
        rows = [
            {"block": name, "kind": "se", "map": f"channel {k}", "mean": float(value)}
            for k, value in enumerate(factors)
        ]
        caption = f"{KINDS['se']} {name}: factors from {factors.min():.3f} to {factors.max():.3f}."
        return [Picture(path, caption)], rows
    maps, rows = maps_of(view, options)
    draw_maps(shown, maps, path, title, options.smooth)
    pictures = [Picture(path, caption_of(view, statistics(view), rows))]
    if len(shown.frames) > 1:
        film = f"{stem}_{name}.mp4"
        write_film(shown, maps, film)
        pictures.append(Picture(film, f"{name}: the same over all frames of the clip"))
    return pictures, rows


# --- report ---------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
img, video { max-width: 100%; display: block; }
figure { margin: 1.2em 0; }
figcaption, .note { color: #444; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
"""


def _embedded(picture: Picture) -> str:
    """Return a picture or film as HTML that holds it."""
    with open(picture.path, "rb") as stream:
        content = base64.b64encode(stream.read()).decode()
    caption = html.escape(picture.caption)
    if picture.path.endswith(".mp4"):
        source = f"data:video/mp4;base64,{content}"
        shown = f'<video controls loop muted src="{source}"></video>'
    else:
        shown = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def report_of(model: Model, sections: Sequence[tuple[str, str, Sequence[Picture]]]) -> str:
    """Return the report as HTML that needs no other file.

    Parameters
    ----------
    model
    sections
        (heading, text, pictures).
    """
    facts = model.facts
    size = " x ".join(map(str, facts.data_shape[1:]))
    name = html.escape(facts.network or "the graph beside the weights")
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>What {name} does</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>What the blocks of {name} do</h1>",
        f"<p>{html.escape(model.path)}; input {size}; {html.escape(model.origin)}.</p>",
        '<p class="note">Maps lie on the grey image where their cells are centred, one cell one '
        "colour unless --smooth was given. All maps of a block share one scale. GloRe's projection "
        "weights are signed: red is above 0, blue below. Numbers are in the npz and csv files "
        "beside this file.</p>",
    ]
    for heading, text, pictures in sections:
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(text)}</p>"]
        parts += map(_embedded, pictures)
    return "\n".join([*parts, "</body></html>\n"])


def prediction_text(scores: np.ndarray, names: Optional[Sequence[str]]) -> str:
    """Return the classes of the largest logits with their probabilities."""
    powers = np.exp(scores - scores.max())
    share = powers / powers.sum()
    best = np.argsort(-share)[:TOP]
    return ", ".join(f"{names[k] if names else f'class {k}'} {100 * share[k]:.1f} %" for k in best)


def explain(options: ExplainOptions, model: Model, blocks: Sequence[Inserted]) -> str:
    """Draw all blocks for all inputs; return the path of the report."""
    facts, data, output = model.facts, options.data, options.output
    interval = data.frame_interval or facts.frame_interval or 1
    stem = os.path.splitext(os.path.basename(model.path))[0]
    folder = output.output or os.path.join(".", "exps", "explain", stem)
    os.makedirs(folder, exist_ok=True)
    files = find_inputs(data.inputs, facts.task == "video", data.limit)
    params = {**model.arg_params, **model.aux_params}
    head = logits(model.symbol).name
    sections, table, relations = [], [], {}
    for number, path in enumerate(progress(files, "Drawing", len(files), every=5.0, unit="file")):
        shown, array = read_input(path, model, interval)
        nodes = [*wanted_nodes(model.symbol, blocks), head]
        arrays = compute(model.symbol, params, array, nodes)
        name = f"{number:02d}_{os.path.splitext(shown.name)[0]}"
        pictures, numbers = [], {}
        for block in blocks:
            view = view_of(block, arrays)
            drawn, rows = draw_block(view, shown, os.path.join(folder, name), output)
            pictures += drawn
            table += [{"input": shown.name, **row} for row in rows]
            numbers[f"{block.name}/weights"] = view.weights[0].astype("float32")
            numbers[f"{block.name}/shape"] = np.array(view.shape)
            if view.relation is not None and block.name not in relations:
                order = order_of(view.weights[0])[:MOST_GRAPH_NODES].tolist()
                picture = os.path.join(folder, f"relation_{block.name}.png")
                draw_relation(view.relation, order, picture, f"GloRe unit {block.name}")
                caption = (
                    f"{block.name}: what the unit has learnt to pass from node to node; nodes by "
                    f"energy on {shown.name}"
                )
                relations[block.name] = Picture(picture, caption)
                numbers[f"{block.name}/relation"] = view.relation.astype("float32")
        path = os.path.join(folder, f"{name}.npz")
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, input=shown.frames, **numbers)
        prediction = prediction_text(arrays[head][0].astype("float64"), facts.class_names)
        sections.append((shown.name, f"Prediction: {prediction}", pictures))
    if relations:
        text = "Rows are the nodes that receive, columns those that give."
        sections.append(("Relations of the nodes", text, list(relations.values())))
    columns = list(dict.fromkeys(key for row in table for key in row))
    cells = [[row.get(key, "") for key in columns] for row in table]
    write_text(os.path.join(folder, "maps.csv"), table_text([columns, *cells]))
    report = os.path.join(folder, "report.html")
    write_text(report, report_of(model, sections))
    return report


def read_explained(
    network: WeightsOptions, data: ExplainDataOptions, pixels: PixelOptions
) -> tuple[Model, list[Inserted]]:
    """Return the network that the command line names, and its units and blocks.

    Raises
    ------
    UsageError
        If it has none, or does not take the input's size.
    """
    if network.weights is None:
        raise UsageError("name the weights: CHECKPOINT --inputs FILE ...")
    model = open_model(
        network.weights,
        network.epoch,
        network.network,
        network.overrides(),
        crop_size=data.crop_size,
        clip_length=data.clip_length,
    )
    mean, std = pixels.normalisation(model.facts.mean, model.facts.std)
    model = dataclasses.replace(model, facts=dataclasses.replace(model.facts, mean=mean, std=std))
    blocks = inserted_blocks(model.symbol)
    if not blocks:
        raise UsageError(
            f"{model.path}: its network has no GloRe unit and no context block, so there is "
            "nothing to draw"
        )
    return model, blocks


def main(argv: Optional[list[str]] = None) -> None:
    """Draw as the command line says."""
    options = parse(ExplainOptions(), argv, (__doc__ or "").split("\n\n")[0])
    with log_to(None):
        model, blocks = read_explained(options.network, options.data, options.pixels)
        LOGGER.info("Network    %s (%s)", model.facts.network or model.path, model.origin)
        LOGGER.info("Blocks     %s", ", ".join(block.name for block in blocks))
        LOGGER.info("Report     %s", explain(options, model, blocks))
