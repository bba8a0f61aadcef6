"""Write what a network computes inside of videos or images: features, and neighbours by them.

By default the vector that the classifier reads, averaged over the views of a file; ``--output``
names any node of the graph. A file of features for each file read, or one of all; what is there
already is not computed again. ``--query`` lists the files that are most like others.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from typing import Any, Optional

import numpy as np

from data.common.options import PixelOptions
from glore_common import GloReError, UsageError, atomic_path, check_writable, command
from glore_options import JobOptions, Options, group, option, parse, positive_int
from network.builder import logits
from train.devices import contexts_of
from train.options import DeviceOptions
from train.report import log_to

from .evaluate import log_input, read_model
from .media import (
    FileOptions,
    View,
    averaged,
    every_batch,
    file_names,
    find_files,
    loader_of,
    of_another_kind,
    reasons,
    view_of,
)
from .model import Model
from .options import ViewOptions, WeightsOptions

LOGGER = logging.getLogger("glore")


@dataclasses.dataclass
class FeatureOptions(Options):
    """Which features, and where they go."""

    title = "features"

    output: str = option(
        "",
        "node of the graph, such as conv4_B06_sum (default: what the classifier reads); "
        "python -m network.summary NETWORK lists them",
        metavar="NODE",
    )
    to: str = option(
        "",
        "a folder, for a file NAME.npz of each file read; or FILE.npz for one of all",
        metavar="DIR|FILE.npz",
    )
    query: tuple[str, ...] = option(
        (),
        "list what is most like these, among all of --to",
        kind=str,
        several=True,
        metavar="PATH",
    )
    nearest: int = option(5, "how many --query lists", kind=positive_int)
    log_file: str = option("", "log file (default: none)")


@dataclasses.dataclass
class ExtractOptions(JobOptions):
    """Options of ``extract_features.py``."""

    network: WeightsOptions = group(WeightsOptions)
    files: FileOptions = group(FileOptions)
    data: ViewOptions = group(ViewOptions)
    pixels: PixelOptions = group(PixelOptions)
    devices: DeviceOptions = group(DeviceOptions)
    features: FeatureOptions = group(FeatureOptions)


def pooled_node(model: Model) -> str:
    """Return the name of the node that the classifier reads."""
    return logits(model.symbol).get_children()[0].name


def _stamp(path: str, view: View, node: str) -> str:
    """Return what features depend on: a file of another stamp is made anew."""
    weights, facts = view.model.path, view.model.facts
    views = {
        name: getattr(view.reading, name)
        for name in ("num_clips", "num_crops", "crops", "random_seed")
    }
    stats = [(os.path.abspath(name), os.stat(name).st_size, os.stat(name).st_mtime_ns)
             for name in (path, weights)]  # fmt: skip
    text = json.dumps([stats, node, facts.as_dict(), views], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _is_there(path: str, stamp: str) -> bool:
    try:
        with np.load(path) as content:
            return str(content["stamp"]) == stamp
    except (OSError, ValueError, KeyError, EOFError):
        return False


def _write(path: str, **arrays: Any) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def extract(view: View, paths: list[str], node: str, folder: str, contexts: list) -> dict[str, str]:
    """Write the features of files, one ``NAME.npz`` each, that are not there yet.

    Parameters
    ----------
    view, paths
    node
        See ``--output``.
    folder
        Is made.
    contexts

    Returns
    -------
    dict
        Files that could not be read, with the reasons.
    """
    block = view.model.block(contexts, node)

    def run(data: Any) -> np.ndarray:
        return block(data.as_in_context(contexts[0])).asnumpy()

    targets = [os.path.join(folder, name) for name in file_names(paths, ".npz")]
    bad = of_another_kind(paths, view.model.facts.task)
    for path in paths:
        if not os.path.exists(path):
            bad[path] = "No such file or directory"
            LOGGER.warning("cannot read %s: %s", path, bad[path])
    stamps = ["" if path in bad else _stamp(path, view, node) for path in paths]
    todo = [
        place
        for place, path in enumerate(paths)
        if path not in bad and not _is_there(targets[place], stamps[place])
    ]
    LOGGER.info("Features   %s: %d files, %d of them are there", node, len(paths),
                len(paths) - len(todo) - len(bad))  # fmt: skip
    if todo:
        with loader_of(view, [paths[place] for place in todo]) as loader:
            for index, mean, _ in averaged(run, every_batch(loader)):
                place = todo[index]
                _write(
                    targets[place],
                    features=mean.astype(np.float32),
                    source=paths[place],
                    node=node,
                    stamp=stamps[place],
                )
            bad.update((file.path, file.reason) for file in loader.bad_files())
    return reasons(paths, bad)


def scatter(target: str, paths: list[str], folder: str) -> None:
    """Undo :func:`gather` for what is not to be computed again."""
    with contextlib.suppress(FileNotFoundError), np.load(target) as content:
        rows = zip(content["files"], content["features"], content["stamps"], content["nodes"])
        known = {str(file): tuple(others) for file, *others in rows}
        for name, path in zip(file_names(paths, ".npz"), paths):
            if path in known and not os.path.exists(os.path.join(folder, name)):
                row, stamp, node = known[path]
                part = os.path.join(folder, name)
                _write(part, features=row, source=path, node=node, stamp=stamp)


def gather(paths: list[str], folder: str, target: str) -> int:
    """Put the features of files into one: ``features`` (n, …) and ``files`` (n,); return n.

    Raises
    ------
    GloReError
        If they have several shapes.
    """
    rows, files, stamps, nodes = [], [], [], []
    for name, path in zip(file_names(paths, ".npz"), paths):
        with contextlib.suppress(FileNotFoundError), np.load(os.path.join(folder, name)) as content:
            rows.append(content["features"])
            files.append(path)
            stamps.append(content["stamp"])
            nodes.append(content["node"])
    if len({row.shape for row in rows}) > 1:
        raise GloReError("the features have several shapes: write them to a folder")
    if rows:
        _write(target, features=np.stack(rows), files=files, stamps=stamps, nodes=nodes)
    return len(rows)


def read_features(path: str) -> tuple[np.ndarray, list[str]]:
    """Return features (n, numbers) and the files that they are of.

    Parameters
    ----------
    path
        What ``--to`` named.

    Raises
    ------
    GloReError
        If it holds none.
    """
    try:
        if os.path.isdir(path):
            rows, files = [], []
            for name in sorted(os.listdir(path)):
                if name.endswith(".npz") and not name.startswith("."):
                    with np.load(os.path.join(path, name)) as content:
                        rows.append(content["features"].reshape(-1))
                        files.append(str(content["source"]))
            return np.stack(rows), files
        with np.load(path) as content:
            features = content["features"]
            return features.reshape(len(features), -1), [str(file) for file in content["files"]]
    except (OSError, ValueError, KeyError) as error:
        raise GloReError(f"{path} holds no features: {error}") from error


def nearest(features: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the rows most like ``query`` (numbers,) and the cosines of the angles between them."""
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    cosines = features @ query / np.maximum(lengths, np.finfo(np.float32).tiny)
    return [(int(row), float(cosines[row])) for row in np.argsort(-cosines, kind="stable")[:count]]


def answer(view: View, options: FeatureOptions, node: str, contexts: list) -> dict[str, str]:
    """Write a line for each query and neighbour; return the queries that could not be read."""
    features, files = read_features(options.to)
    queries = list(options.query)
    scratch = f"{options.to.rstrip(os.sep)}.query"
    try:
        bad = extract(view, queries, node, scratch, contexts)
        for name, path in zip(file_names(queries, ".npz"), queries):
            if path in bad:
                continue
            with np.load(os.path.join(scratch, name)) as content:
                query = content["features"].reshape(-1)
            if len(query) != features.shape[1]:
                raise UsageError(
                    f"{options.to} has features of {features.shape[1]} numbers, {node} gives "
                    f"{len(query)}: name the --output that they are of"
                )
            for rank, (row, cosine) in enumerate(nearest(features, query, options.nearest), 1):
                said = {"query": path, "rank": rank, "file": files[row]}
                print(json.dumps({**said, "similarity": round(cosine, 6)}), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return bad


def main(argv: Optional[list[str]] = None) -> int:
    """Extract as the command line says; the exit code is 1 if a file could not be read."""
    options = parse(ExtractOptions(), argv, (__doc__ or "").split("\n\n")[0])
    wanted = options.features
    with log_to(wanted.log_file or None):
        if options.network.weights is None or not wanted.to:
            raise UsageError(f"say: {command('extract_features')} CHECKPOINT PATH ... --to DIR")
        check_writable(
            wanted.to if wanted.to.lower().endswith(".npz") else os.path.join(wanted.to, "x"),
            "--to",
        )
        model = read_model(options)
        asked = options.files.inputs or options.files.list
        if not asked and not wanted.query:
            raise UsageError("name the files to read, or --query PATH")
        view = view_of(model, options.data)
        contexts = contexts_of(options.devices)
        node = wanted.output or pooled_node(model)
        bad: dict[str, str] = {}
        if asked:
            paths = find_files(options.files, model.facts.task)
            log_input(view.model, f"{len(paths)} {model.facts.task}s")
            one = wanted.to.lower().endswith(".npz")
            folder = f"{wanted.to}.parts" if one else wanted.to
            if one:
                scatter(wanted.to, paths, folder)
            bad = extract(view, paths, node, folder, contexts)
            if one:
                LOGGER.info("Written    %s: %d files", wanted.to, gather(paths, folder, wanted.to))
                shutil.rmtree(folder, ignore_errors=True)
        if wanted.query:
            bad = {**bad, **answer(view, wanted, node, contexts)}
    return 1 if bad else 0
