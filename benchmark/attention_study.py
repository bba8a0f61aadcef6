"""GCNet's question, asked of a trained network: does what a block does depend on the position?

::

    python -m benchmark.attention_study exps/models/TASK_ep --inputs FOLDER
    python -m benchmark.attention_study exps/models/TASK_ep --inputs FOLDER --all-epochs

For each GloRe unit and context block: mean distance over all pairs of positions of its input, of
what it adds, and of its attention (:mod:`network.block_statistics`), beside what rows without any
structure would give. Of GloRe: how alike the nodes are, the effective rank of the projection and,
with ``--all-epochs``, how far the nodes' maps turn during training.
"""

import dataclasses
import logging
import os
import sys
from typing import Any, Optional

import numpy as np

from checkpoint.paths import epochs
from data.common.options import PixelOptions
from glore_common import UsageError, progress, run_main, write_text
from glore_options import JobOptions, Options, group, option, parse
from jobs.evaluate import table_text
from jobs.explain import find_inputs, read_explained, read_input
from jobs.options import ExplainDataOptions, WeightsOptions
from network.block_statistics import drift, random_rows, random_vectors, statistics
from network.internals import View, views
from network.summary import markdown
from train.report import log_to

LOGGER = logging.getLogger("glore")


@dataclasses.dataclass
class StudyOptions(Options):
    """What is studied beside the newest epoch, and where the table goes."""

    title = "study"

    all_epochs: bool = option(
        False,
        "all stored epochs of the prefix, and how far nodes turn between them (train with --keep N "
        "to have some)",
    )
    output: str = option("", "write the table (CSV) as well", metavar="FILE")


@dataclasses.dataclass
class AttentionStudyOptions(JobOptions):
    """Options of the command."""

    network: WeightsOptions = group(WeightsOptions)
    data: ExplainDataOptions = group(ExplainDataOptions, limit=50)
    pixels: PixelOptions = group(PixelOptions)
    study: StudyOptions = group(StudyOptions)


def study(options: AttentionStudyOptions) -> list[dict[str, Any]]:
    """Return one row per block (and epoch) of means over the inputs."""
    network = options.network
    numbers: list[Optional[int]] = [network.epoch]
    if options.study.all_epochs:
        numbers = list(epochs(network.weights or ""))
        if not numbers:
            raise UsageError(f"{network.weights} is no prefix of stored epochs")
    # {epoch: views of all inputs, by block}; the last epoch is what drift is measured against.
    seen: dict[Any, dict[str, list[View]]] = {}
    for number in numbers:
        which = dataclasses.replace(network, epoch=number)
        model, blocks = read_explained(which, options.data, options.pixels)
        files = find_inputs(options.data.inputs, model.facts.task == "video", options.data.limit)
        interval = options.data.frame_interval or model.facts.frame_interval or 1
        params = {**model.arg_params, **model.aux_params}
        found = seen.setdefault(number, {block.name: [] for block in blocks})
        for path in progress(files, "Reading", len(files), every=5.0, unit="file"):
            _, data = read_input(path, model, interval)
            for view in views(model.symbol, params, data):
                found[view.block.name].append(view)
    last = seen[numbers[-1]]
    return [
        row_of(number, parts, last[name])
        for number, found in seen.items()
        for name, parts in found.items()
    ]


def row_of(epoch: Optional[int], parts: list[View], last: list[View]) -> dict[str, Any]:
    """Return the figures of one block: means over the inputs."""
    every = [statistics(view) for view in parts]
    first = parts[0]
    row: dict[str, Any] = {
        "epoch": "" if epoch is None else epoch,
        "block": first.block.name,
        "kind": first.block.kind,
        "inputs": len(parts),
        "positions": every[0].positions,
    }
    for name in ("input", "output", "attention", "divergence", "nodes", "states", "rank"):
        values = [getattr(one, name) for one in every if getattr(one, name) is not None]
        row[name] = float(np.mean(values)) if values else None
    row["drift"] = None
    if first.block.kind == "glore":
        row["number of nodes"] = first.weights.shape[1]
        pair = (np.concatenate([view.weights for view in views_]) for views_ in (parts, last))
        row["drift"] = drift(*pair)
    return row


def shown(value: Any, digits: int = 4) -> str:
    """Return a cell of the table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return "untrained" if np.isnan(value) else f"{value:.{digits}f}"
    return str(value)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the tables and their reference lines as Markdown."""
    head = ["epoch", "block", "positions", "input", "output", "attention", "divergence"]
    cells = [[shown(row[name]) for name in head] for row in rows]
    lines = [markdown(head, cells, left=2), ""]
    for positions in sorted({row["positions"] for row in rows}):
        cosine, jsd = random_rows(positions, positions)
        lines.append(
            f"Without structure, {positions} positions: softmax of normal scores {cosine:.3f} "
            f"(divergence {jsd:.3f}), normal vectors {random_vectors(positions, 64, False):.3f}, "
            f"their positive part {random_vectors(positions, 64, True):.3f}; one-hot rows "
            f"{(1 - 1 / positions) / 2:.3f} ({np.log(2) * (1 - 1 / positions):.3f})."
        )
    units = [row for row in rows if row["kind"] == "glore"]
    if units:
        head = ["epoch", "block", "number of nodes", "nodes", "states", "rank", "drift"]
        cells = [[shown(row[name], 3) for name in head] for row in units]
        names = ["epoch", "unit", "nodes", "nodes' maps", "nodes' states", "effective rank",
                 "drift to the last epoch"]  # fmt: skip
        lines += ["", markdown(names, cells, left=2)]
    return "\n".join(lines)


def main(argv: Optional[list[str]] = None) -> None:
    """Run the command."""
    description = (__doc__ or "").split("\n\n")[0]
    options = parse(
        AttentionStudyOptions(), argv, description, prog="python -m benchmark.attention_study"
    )
    with log_to(None):
        rows = study(options)
        print(report(rows))
        if options.study.output:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = [[row.get(key, "") for key in columns] for row in rows]
            write_text(options.study.output, table_text([columns, *table]))
            LOGGER.info("written %s", os.path.abspath(options.study.output))


if __name__ == "__main__":
    sys.exit(run_main(main))
