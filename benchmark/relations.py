"""Which block lets a network of small receptive field relate distant figures; how it learns to.

::

    python -m benchmark.relations               # all experiments, tables and diagrams
    python -m benchmark.relations --quick       # one seed of the main effect, in minutes
    python -m benchmark.relations --experiments images,gap --seeds 0,1

The task is that of :mod:`dataset.relations`; what is found is in docs/understanding.md. Each run
is kept in a file, so that a study that was stopped goes on.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmark.short_runs import (
    fit,
    grouped,
    name_list,
    new_block,
    outputs,
    run_missing,
    spread,
    values_of,
    write_csv,
)
from dataset import relations
from dataset.relations import UNSEEN, Task
from glore_common import run_main, write_text
from glore_options import Parser, comma_list, positive_int
from mxnet_compat import mx
from network.block_statistics import statistics
from network.builder import logits
from network.initializer import Rule, xavier_uniform
from network.internals import views
from network.summary import count
from network.summary import markdown as table
from train.plots import Line, Panel, plot_panels
from train.report import log_to

BATCH = {"image": 64, "clip": 32}
WARM_STEPS = 240  # of the bare network, with one figure in each sample; twice that for more kinds
EVERY = 20  # steps between tests
QUADRUPLES = {"image": 96, "clip": 48}
STUDIED = 32  # samples whose attention is measured
SOLVED = 0.97  # share of quadruples
NETWORKS = {"image": "local39", "clip": "LOCAL41_3D"}
WIDE = "local39_wide"
# {kind of block: setting}, in the order of the tables. The place is put in between.
BLOCKS = {
    "none": "",
    "glore": "glore@{}",
    "nl": "nl@{}",
    "snl": "snl@{}",
    "gc": "gc@{}/after:ratio=1/2",
    "se": "se@{}/after:ratio=1/2",
    "gc 1/16": "gc@{}/after:ratio=1/16",
    "se 1/16": "se@{}/after:ratio=1/16",
}
MAIN = ("none", "glore", "nl", "snl", "gc", "se")
COLOURS = dict(zip(MAIN, ("black", "tab:green", "tab:blue", "tab:orange", "tab:red", "tab:purple")))
PLACE = "4:1"
# The last convolution of each block drawn like any other's, instead of zeros.
DRAWN: tuple[Rule, ...] = ((r"_(add|add-2|out|fc-2)_conv_weight$", xavier_uniform),)


class Case(NamedTuple):
    """One run.

    ``start``: 'warm' from the bare network that has learnt single figures, 'scratch' otherwise;
    with 'drawn' the block's last layer does not start at zero. ``control``: '' or what is done to
    the data, see :func:`batch_of`. ``nodes``: of GloRe, 0 for the default.
    """

    experiment: str
    kind: str
    block: str
    start: str = "warm"
    gap: int = 41
    kinds: int = 2
    nodes: int = 0
    place: str = PLACE
    control: str = ""
    seed: int = 0
    steps: int = 200

    @property
    def name(self) -> str:
        """Name of its file."""
        words = (str(value) for value in self if value != "")
        return "_".join(words).replace("/", "-").replace(" ", "-").replace(":", "-")

    @property
    def task(self) -> Task:
        """What is drawn."""
        # Clips are half as high, for speed: objects come back at the other end anyway.
        frames, height = (8, 32) if self.kind == "clip" else (0, 64)
        width = 144 if self.control == "arrangement far from borders" else 64
        return Task(frames, self.gap, self.kinds, height, width)


def _starts(experiment: str, starts: tuple[str, ...], steps: int) -> list[Case]:
    every = [
        Case(experiment, "image", block, start, steps=steps) for start in starts for block in MAIN
    ]
    # Nothing to draw where there is no block, and SE has no layer that starts at zero.
    return [case for case in every if "drawn" not in case.start or case.block not in ("none", "se")]


def _images(steps: int) -> list[Case]:
    return _starts("images", ("warm", "warm drawn", "scratch"), steps)


def _long(steps: int) -> list[Case]:
    return _starts("long", ("scratch", "scratch drawn"), 4 * steps)


def _clips(steps: int) -> list[Case]:
    cases = [Case("clips", "clip", block, steps=steps) for block in MAIN]
    for block in ("glore", "nl"):
        cases.append(Case("clips", "clip", block, control="shuffled frames", steps=steps))
    return cases


def _gap(steps: int) -> list[Case]:
    return [
        Case("gap", "image", block, gap=gap, steps=steps)
        for gap in (9, 17, 25, 33)
        for block in ("none", "glore")
    ]


def _kinds(steps: int) -> list[Case]:
    blocks = ("none", "glore", "nl", "snl", "gc", "gc 1/16", "se", "se 1/16")
    return [
        Case("kinds", "image", block, kinds=kinds, steps=2 * steps)
        for kinds in (2, 4, 8)
        for block in blocks
    ]


def _nodes(steps: int) -> list[Case]:
    return [
        Case("nodes", "image", "glore", nodes=nodes, steps=steps) for nodes in (1, 2, 4, 8, 16, 64)
    ]


def _place(steps: int) -> list[Case]:
    return [
        Case("place", "image", block, place=f"{stage}:1", steps=steps)
        for stage in (2, 3, 4, 5)
        for block in ("glore", "nl", "gc")
    ]


def _controls(steps: int) -> list[Case]:
    rows = [("none", "one figure"), ("none", "wide"), ("none", "shuffled labels")]
    rows += [("glore", "shuffled labels")]
    for where in ("near", "far from"):
        rows += [(block, f"arrangement {where} borders") for block in ("none", "glore", "nl")]
    return [
        Case("controls", "image", block, control=control, steps=steps) for block, control in rows
    ]


EXPERIMENTS = {
    "images": _images,
    "long": _long,
    "clips": _clips,
    "gap": _gap,
    "kinds": _kinds,
    "nodes": _nodes,
    "place": _place,
    "controls": _controls,
}


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for, those of one seed together."""
    if args.quick:
        return [Case("images", "image", block, steps=args.steps) for block in MAIN]
    return [
        case._replace(seed=seed)
        for experiment in args.experiments
        for seed in args.seeds
        for case in EXPERIMENTS[experiment](args.steps)
        if case.block in args.blocks
    ]


def batch_of(case: Case, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, label) of a batch of training."""
    if case.control == "one figure":
        return relations.singles(case.task, count, rng)
    if case.control.startswith("arrangement"):
        return relations.arrangements(case.task, count, rng)
    data, label = relations.pairs(case.task, count, rng)
    if case.control == "shuffled labels":
        label = rng.permutation(label)
    if case.control == "shuffled frames":
        data = relations.shuffled_frames(data, rng)
    return data, label


def rng_of(case: Case, *parts: int) -> np.random.Generator:
    """Return a generator for a purpose; the same one for all blocks."""
    return np.random.default_rng([case.seed, len(case.kind), case.gap, case.kinds, *parts])


def overrides_of(case: Case) -> dict[str, Any]:
    """Return the overrides of ``get_symbol``."""
    block = BLOCKS[case.block].format(case.place) or None
    found: dict[str, Any] = {"block": block, "crop_size": case.task.shape[-2:]}
    if case.nodes:
        found["num_node"] = case.nodes
    return found


def network_of(case: Case) -> str:
    """Return the row."""
    return WIDE if case.control == "wide" else NETWORKS[case.kind]


def start_of(case: Case, folder: str) -> dict[str, np.ndarray]:
    """Return the bare network trained on single figures; kept in a file."""
    kind = f"{network_of(case)}_{case.gap}_{case.kinds}_{case.seed}"
    path = os.path.join(folder, f"start_{kind}.params")
    if not os.path.exists(path):
        task = dataclasses.replace(case.task, width=Task.width)
        overrides = {"crop_size": task.shape[-2:]}
        block = new_block(network_of(case), case.kinds, overrides, case.seed)

        def batch(step):
            return relations.singles(task, BATCH[case.kind], rng_of(case, 1, step))

        fit(block, batch, WARM_STEPS * (1 + (case.kinds > 2)), case.seed)
        mx.nd.save(path, {name: mx.nd.array(value) for name, value in values_of(block).items()})
    return {name: value.asnumpy() for name, value in mx.nd.load(path).items()}


def run(case: Case, folder: str) -> dict[str, Any]:
    """Train and test one case."""
    trained = start_of(case, folder) if "warm" in case.start else None
    rules = DRAWN if "drawn" in case.start else ()
    classes = case.kinds if case.control == "one figure" else 2
    overrides = overrides_of(case)
    # Another seed than the start's: its classifier would fit.
    block = new_block(network_of(case), classes, overrides, case.seed + 100, rules, trained)
    size = BATCH[case.kind]
    in_pairs = case.control != "one figure" and not case.control.startswith("arrangement")
    test, history = quadruples_of(case), []

    def watch(step):
        if in_pairs and (step % EVERY == 0 or step == case.steps):
            history.append([step, *relations.score(outputs(block, test[0]), test[1])])

    losses = fit(block, lambda step: batch_of(case, size, rng_of(case, 2, step)), case.steps,
                 case.seed, after=watch)  # fmt: skip
    result: dict[str, Any] = {
        "parameters": count(logits(block.symbol), block.input_conf).params,
        "losses": [round(loss, 5) for loss in losses],
        "history": history,
    }
    if not in_pairs:
        data, label = batch_of(case, 4 * QUADRUPLES[case.kind], rng_of(case, 3))
        made = outputs(block, data).astype("float64")
        chosen = made[np.arange(len(made)), label.astype(int)]
        loss = float((np.logaddexp.reduce(made, 1) - chosen).mean())
        return {**result, "accuracy": float((made.argmax(1) == label).mean()), "loss": loss}
    result.update(relations.score(outputs(block, test[0]), test[1])._asdict())
    seen = views(block.symbol, values_of(block), test[0][:STUDIED])
    result["blocks"] = [statistics(view)._asdict() for view in seen]
    if case.control == "shuffled frames":
        return result
    for what in UNSEEN:
        if what != "rows" or case.kind == "image":
            data, label = quadruples_of(case, what)
            score = relations.score(outputs(block, data), label)
            result[f"all_four_{what}"] = score.all_four
    return result


def quadruples_of(case: Case, unseen: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return the test data of a case."""
    rng = rng_of(case, 3)
    words = (unseen,) if unseen else ()
    data, label = relations.quadruples(case.task, QUADRUPLES[case.kind], rng, words)
    if case.control == "shuffled frames":
        data = relations.shuffled_frames(data, rng)
    return data, label


def solved_at(result: Mapping[str, Any]) -> float:
    """Return the steps after which nearly all quadruples were right at a test; NaN for never."""
    return next((step for step, _, _, four, *_ in result["history"] if four >= SOLVED), np.nan)


# --- report ---------------------------------------------------------------------------------------

COLUMNS = ("accuracy", "loss", "all_four", "interaction", "largest_interaction")


def rows_of(results: list[dict]) -> list[dict[str, Any]]:
    """Return one row of the CSV per run."""
    rows = []
    for result in results:
        row = {name: result[name] for name in Case._fields}
        row["parameters"] = result["parameters"]
        for name in (*COLUMNS, *(f"all_four_{what}" for what in UNSEEN)):
            value = result.get(name)
            row[name] = "" if value is None else float(f"{value:.4g}")
        row["solved_at"] = "" if np.isnan(solved_at(result)) else solved_at(result)
        row["seconds"] = result["seconds"]
        rows.append(row)
    return rows


def _cells(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a table's row: means over the seeds, and smallest and largest."""
    times = [solved_at(result) for result in group]
    known = [time for time in times if not np.isnan(time)]
    steps = f"{np.mean(known):.0f}" if known else "–"
    if known and len(known) < len(times):
        steps += f" ({len(known)} of {len(times)})"
    four = [100 * result["all_four"] for result in group] if "all_four" in group[0] else None
    return [
        spread([100 * result["accuracy"] for result in group], ".1f"),
        spread([result["loss"] for result in group]),
        "" if four is None else spread(four, ".1f"),
        "" if four is None else f"{np.mean([result['interaction'] for result in group]):.3g}",
        "" if four is None else f"{max(r['largest_interaction'] for r in group):.2g}",
        steps if four is not None else "",
    ]


HEAD = ["accuracy %", "cross entropy", "all four %", "mean abs I", "largest", "steps to 97 %"]


def tables(results: list[dict]) -> str:
    """Return a Markdown table per experiment, and one of what training had not seen."""
    lines = []
    for (experiment,), group in grouped(results, "experiment").items():
        seeds = len({result["seed"] for result in group})
        # What differs among the runs of an experiment.
        keys = [
            key
            for key in ("start", "gap", "kinds", "nodes", "place", "control", "block")
            if len({result[key] for result in group}) > 1 or key == "block"
        ]
        rows = [
            [*(str(value) or "–" for value in values), f"{part[0]['parameters']:,}", *_cells(part)]
            for values, part in grouped(group, *keys).items()
        ]
        steps = sorted({result["steps"] for result in group})
        title = f"**{experiment}**: {seeds} seed(s), {' or '.join(map(str, steps))} steps"
        lines += [title, "", table([*keys, "parameters", *HEAD], rows, left=len(keys)), ""]
        unseen = [key for key in (f"all_four_{what}" for what in UNSEEN) if key in group[0]]
        if experiment in ("images", "clips") and unseen:
            rows = [
                [
                    block,
                    *(spread([100 * r[key] for r in part], ".1f") for key in ("all_four", *unseen)),
                ]
                for (block,), part in grouped(
                    [r for r in group if r["start"] == "warm" and not r["control"]], "block"
                ).items()
            ]
            head = [
                "block",
                "as in training",
                *(key.replace("all_four_", "unseen ") for key in unseen),
            ]
            lines += [f"All four right in %, {experiment}, warm start", "", table(head, rows), ""]
    studied = [r for r in results if r.get("blocks") and r["start"] == "warm" and not r["control"]]
    studied = [r for r in studied if r["experiment"] in ("images", "clips")]
    if studied:
        names = ("input", "output", "attention", "divergence", "nodes", "rank")
        rows = [
            [*key, str(len(part)), *(_figure(part, name) for name in names)]
            for key, part in grouped(studied, "experiment", "block").items()
        ]
        lines += ["Distances of positions, and of nodes, warm start", ""]
        lines += [table(["experiment", "block", "seeds", *names], rows, left=2), ""]
    return "\n".join(lines)


def _figure(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return the mean of a figure of the blocks' statistics."""
    values = [result["blocks"][0][name] for result in group]
    return "–" if None in values else spread(values)


def draw(results: list[dict], folder: str) -> list[str]:
    """Draw the share of solved quadruples over training; return the paths."""
    paths = []
    for (experiment,), group in grouped(results, "experiment").items():
        if experiment not in ("images", "long", "clips"):
            continue
        group = [result for result in group if not result["control"]]
        panels = []
        names = {
            "warm": "warm start",
            "warm drawn": "warm start, last layer drawn",
            "scratch": "from scratch",
            "scratch drawn": "from scratch, last layer drawn",
        }
        for (start,), part in grouped(group, "start").items():
            lines = [
                Line(
                    [point[0] for point in result["history"]],
                    [100 * point[3] for point in result["history"]],
                    result["block"] if result["block"] != "none" else "no block",
                    colour=COLOURS[result["block"]],
                    width=1.2,
                )
                for result in part
            ]
            panels.append(Panel(names[start], "step", lines, limits=(-3, 103), marker=None))
        path = os.path.join(folder, f"relations-{experiment}.png")
        title = "quadruples with all four right, %"
        # One line for each seed, one label for each block.
        size = (4.2, 3.2) if len(panels) > 1 else (6.0, 5.0)
        plot_panels(panels, path, title, size=size, one_legend=True)
        paths.append(path)
    sweeps = {"gap": "columns between the figures", "kinds": "kinds of glyphs", "nodes": "nodes"}
    panels = []
    for (experiment,), group in grouped(results, "experiment").items():
        if experiment in sweeps:
            lines = []
            for (block,), part in grouped(group, "block").items():
                points = sorted(grouped(part, experiment).items())
                lines.append(
                    Line(
                        [value for (value,), _ in points],
                        [100 * float(np.mean([r["all_four"] for r in runs])) for _, runs in points],
                        block if block != "none" else "no block",
                        "--" if "1/16" in block else "-",
                        COLOURS[block.split()[0]],
                    )
                )
            panels.append(Panel(experiment, sweeps[experiment], lines, limits=(-3, 103)))
    if panels:
        path = os.path.join(folder, "relations-sweeps.png")
        title = "quadruples with all four right, % (mean over seeds)"
        plot_panels(panels, path, title, size=(4.2, 3.4))
        paths.append(path)
    return paths


def draw_examples(path: str) -> None:
    """Draw one quadruple of images and frames of a clip."""
    import cv2

    rng = np.random.default_rng(3)
    data, _ = relations.quadruples(Task(), 1, rng)
    clip, _ = relations.pairs(Task(frames=8), 1, rng)
    rows = [
        np.concatenate(list(data), 2),
        np.concatenate(list(clip[0].transpose(1, 0, 2, 3)[::2]), 2),
    ]
    pixels = np.concatenate(rows, 1).transpose(1, 2, 0)
    pixels = np.clip(127.5 + 50 * pixels, 0, 255).astype("uint8").repeat(3, 0).repeat(3, 1)
    cv2.imwrite(path, pixels)


def main(argv=None) -> None:
    """Run the command."""
    parser = Parser(__doc__.split("\n\n")[0], prog="python -m benchmark.relations")
    parser.add_argument(
        "--quick", action="store_true", help="one seed of all blocks on images, warm start"
    )
    parser.add_argument(
        "--experiments",
        type=name_list(EXPERIMENTS),
        default=tuple(EXPERIMENTS),
        metavar="LIST",
        help=f"of {','.join(EXPERIMENTS)} (default: all)",
    )
    parser.add_argument(
        "--blocks",
        type=name_list(BLOCKS),
        default=tuple(BLOCKS),
        metavar="LIST",
        help=f"of {','.join(BLOCKS)} (default: all)",
    )
    parser.add_argument("--seeds", type=comma_list(int), default=(0, 1, 2), metavar="LIST")
    parser.add_argument("--steps", type=positive_int, help="(default: 200; with --quick 100)")
    parser.add_argument(
        "--results",
        default=os.path.join("exps", "relations"),
        metavar="DIR",
        help="of the runs, tables and diagrams (default: exps/relations)",
    )
    args = parser.parse_args(argv)
    args.steps = args.steps or (100 if args.quick else 200)
    with log_to(None):
        wanted = cases_of(args)
        results = run_missing(wanted, args.results, lambda case: run(case, args.results))
        write_csv(os.path.join(args.results, "relations.csv"), rows_of(results))
        text = tables(results)
        write_text(os.path.join(args.results, "relations.md"), text + "\n")
        draw(results, args.results)
        draw_examples(os.path.join(args.results, "relations-examples.png"))
        print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
