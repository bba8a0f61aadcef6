"""What the studies of small networks share: train for some steps, keep each run in a file."""

import argparse
import csv
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np

from glore_common import GloReError, write_text
from glore_options import comma_list
from mxnet_compat import mx
from network.block import SymbolNet, build_block
from network.builder import get_symbol, logits
from network.initializer import DEFAULT_RULES, Rule, identity_units, initial_params
from train.options import TrainOptions
from train.step import Learner, derived_seed

LOGGER = logging.getLogger("glore")
RATE = 3e-3

Batch = tuple[np.ndarray, np.ndarray]


def new_block(
    network: str,
    num_classes: int,
    overrides: Mapping[str, Any],
    seed: int,
    rules: Sequence[Rule] = (),
    trained: Optional[Mapping[str, np.ndarray]] = None,
) -> SymbolNet:
    """Return a network to be trained on the CPU.

    Parameters
    ----------
    network, num_classes, overrides
        As for ``get_symbol``.
    seed
        Of fresh values.
    rules
        Go before those that let every unit and block but SE start as the identity.
    trained
        Values to begin with, where names and shapes are the network's; a classifier starts afresh.
    """
    symbol, conf = get_symbol(network, num_classes, **overrides)
    every = (*rules, *identity_units(symbol), *DEFAULT_RULES)
    params = initial_params(logits(symbol), {"data": (1, *conf.data_shape)}, seed, every)
    for part in params:
        for name, value in part.items():
            known = (trained or {}).get(name)
            if known is not None and known.shape == value.shape and "classifier" not in name:
                part[name] = known
    return build_block(symbol, conf, ctx=mx.cpu(), params=params)


def values_of(block: SymbolNet) -> dict[str, np.ndarray]:
    """Return all parameters of a block."""
    args, auxs = block.arg_aux_params()
    return {name: value.asnumpy() for name, value in {**args, **auxs}.items()}


def fit(
    block: SymbolNet,
    next_batch: Callable[[int], Batch],
    steps: int,
    seed: int,
    rate: float = RATE,
    after: Optional[Callable[[int], None]] = None,
) -> list[float]:
    """Train with Adam and a rate that falls to 0 along a cosine; return the losses.

    Parameters
    ----------
    block
    next_batch
        ``next_batch(step)`` returns data and labels of a step, from 1.
    steps, seed, rate
    after
        Called after each step.
    """
    learner = Learner(block, mx.optimizer.Adam(), [mx.cpu()], TrainOptions())
    losses = []
    for step in range(1, steps + 1):
        lr = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        ((parts, _, _),) = learner.step([next_batch(step)], lr, derived_seed(seed, step))
        losses.append(float(parts[0].mean().asscalar()))
        if after is not None:
            after(step)
    return losses


def outputs(block: SymbolNet, data: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Return what a block makes of data in evaluation mode, batch by batch."""
    with mx.autograd.predict_mode():
        parts = [
            block(mx.nd.array(data[start : start + batch_size])).asnumpy()
            for start in range(0, len(data), batch_size)
        ]
    return np.concatenate(parts)


def run_missing(
    wanted: Sequence[Any], folder: str, run: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run the cases that have no file in ``folder`` yet; return the results of all.

    Parameters
    ----------
    wanted
        Named tuples with a ``name``.
    folder
    run
        Returns what JSON holds of a case's results; the case's fields are put in front.
    """
    os.makedirs(folder, exist_ok=True)
    paths = {case.name: os.path.join(folder, f"{case.name}.json") for case in wanted}
    missing = [case for case in wanted if not os.path.exists(paths[case.name])]
    LOGGER.info("%d runs, %d of them to do", len(wanted), len(missing))
    for number, case in enumerate(missing, 1):
        started = time.perf_counter()
        result = run(case)
        seconds = round(time.perf_counter() - started, 1)
        content = {**case._asdict(), **result, "seconds": seconds}
        write_text(paths[case.name], json.dumps(content))
        shown = ", ".join(f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, float))
        LOGGER.info("%d/%d %s: %s (%.0f s)", number, len(missing), case.name, shown, seconds)
    results = []
    for path in paths.values():
        with open(path, encoding="utf-8") as stream:
            results.append(json.load(stream))
    return results


def grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return rows by the values of some of their columns, in the order in which they come."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean of several seeds and, of more than one, their smallest and largest."""
    mean = format(float(np.mean(values)), form)
    if len(values) < 2:
        return mean
    return f"{mean} ({format(min(values), form)}–{format(max(values), form)})"


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that have the same columns."""
    if not rows:
        raise GloReError("there are no runs")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def name_list(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type for comma-separated names out of ``known``."""

    def convert(text):
        names = comma_list(str)(text)
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return convert
