"""Say what videos or images show: the classes that a checkpoint's network finds likeliest.

A line for each file, as JSON or CSV. A network that segments writes a mask, its colours and an
overlay of each image (``--masks``); the line names them, and the shares of the classes. A detector
writes a picture of each image (``--masks``); the line has its objects with boxes and masks. With
``--stride`` a video is gone through window by window, which takes no more memory for a long one; a
timeline and subtitles are made of that. Files that cannot be read are named and passed over, and
the exit code is then 1.
"""

import contextlib
import csv
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, Callable, Optional

import numpy as np

from data.common.options import PixelOptions
from data.detection.loaders import read_image
from data.image.decode import ImageError
from data.segmentation.masks import write_mask
from data.video.windows import (
    Length,
    LengthDataset,
    WindowDataset,
    WindowSampling,
    grouped,
    window_starts,
)
from glore_common import UsageError, atomic_path, command, write_text
from glore_options import JobOptions, Options, group, option, parse, positive_float, positive_int
from mxnet_compat import mx
from train.devices import contexts_of
from train.plots import plot_timeline
from train.report import log_to

from .detect import Finder, described, picture_of
from .detect import masks_of as object_masks_of
from .evaluate import log_input, read_model
from .media import (
    FileOptions,
    View,
    averaged,
    every_batch,
    file_names,
    files_loader,
    find_files,
    loader_of,
    names_of,
    of_another_kind,
    reasons,
    scorer,
    view_of,
)
from .model import Model
from .options import (
    FindOptions,
    InferenceOptions,
    PixelViewOptions,
    ViewOptions,
    WeightsOptions,
)
from .segment import Segmenter, masks_of

LOGGER = logging.getLogger("glore")
FORMATS = ("jsonl", "csv")
# Windows that are read together.
GROUP = 8
COLUMNS = ("file", "start", "end", "rank", "class", "name", "score")


@dataclasses.dataclass
class PredictOutputOptions(Options):
    """What is said of each file, and where."""

    title = "output"

    top_k: int = option(5, "classes that are named", kind=positive_int, aliases=("--topk",))
    format: Optional[str] = option(
        None, "of the output (default: by the name of --output, else jsonl)", choices=FORMATS
    )
    output: str = option("", "write to this file (default: standard output)", metavar="FILE")
    stride: Optional[float] = option(
        None,
        "go through videos in windows that begin so many seconds apart (default: one view of the "
        "whole; with --timeline or --subtitles windows that follow each other)",
        kind=positive_float,
        metavar="SECONDS",
    )
    timeline: str = option("", "draw the likeliest classes over time: DIR/NAME.png", metavar="DIR")
    subtitles: str = option("", "write the likeliest class over time: DIR/NAME.srt", metavar="DIR")
    masks: str = option(
        "./exps/results/masks",
        "pictures of a network that segments (NAME_mask.png, NAME_colours.png, NAME_overlay.png) "
        "or detects (NAME_objects.png)",
        metavar="DIR",
    )
    log_file: str = option("", "log file (default: none)")


@dataclasses.dataclass
class PredictOptions(JobOptions):
    """Options of ``predict.py``."""

    network: WeightsOptions = group(WeightsOptions)
    files: FileOptions = group(FileOptions)
    data: ViewOptions = group(ViewOptions)
    segmentation: PixelViewOptions = group(PixelViewOptions)
    detection: FindOptions = group(FindOptions)
    pixels: PixelOptions = group(PixelOptions)
    devices: InferenceOptions = group(InferenceOptions)
    output: PredictOutputOptions = group(PredictOutputOptions)


def best(scores: np.ndarray, top: int, names: Optional[list[str]]) -> list[dict[str, Any]]:
    """Return the likeliest classes, the likeliest first; of equal ones the lower class."""
    order = np.argsort(-scores, kind="stable")[:top]
    return [
        {
            "class": int(index),
            "name": names[index] if names else None,
            "score": round(float(scores[index]), 6),
        }
        for index in order
    ]


class Writer:
    """Writes a line for each file (CSV: for each of its likeliest classes).

    Parameters
    ----------
    stream
    as_csv
    """

    def __init__(self, stream: IO[str], as_csv: bool) -> None:
        self.stream = stream
        self.csv = csv.writer(stream, lineterminator="\n") if as_csv else None
        if self.csv:
            self.csv.writerow(COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        """Write what is known of a file, or of a window of it."""
        if self.csv is None:
            self.stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        for rank, found in enumerate(row.get("top", ()) if self.csv else (), 1):
            values = (row.get("start", ""), row.get("end", ""), rank, *found.values())
            self.csv.writerow((row["file"], *values))
        self.stream.flush()


def format_of(options: PredictOutputOptions) -> str:
    """Return the format of the output."""
    return options.format or ("csv" if options.output.lower().endswith(".csv") else "jsonl")


@contextlib.contextmanager
def writing(options: PredictOutputOptions) -> Iterator[Writer]:
    """Yield the writer that is asked for; a file appears whole or not at all."""
    as_csv = format_of(options) == "csv"
    if not options.output:
        # Names of files may be no text of the terminal's.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield Writer(sys.stdout, as_csv)
        return
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(atomic_path(options.output))
        # Names of files may be no UTF-8.
        stream = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
        yield Writer(stack.enter_context(stream), as_csv)
    LOGGER.info("Written    %s", options.output)


# --- windows --------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """Return a time as subtitles have it: ``00:01:02,500``."""
    whole = round(1000 * seconds)
    return (
        f"{whole // 3600000:02d}:{whole // 60000 % 60:02d}:{whole // 1000 % 60:02d},"
        f"{whole % 1000:03d}"
    )


def subtitles(windows: list[dict[str, Any]]) -> str:
    """Return an SRT file: what is likeliest from one window's beginning to the next one's.

    Neighbours of one class are one title, with the mean of their scores.
    """
    titles: list[list[Any]] = []
    for place, window in enumerate(windows):
        top = window["top"][0]
        end = windows[place + 1]["start"] if place + 1 < len(windows) else window["end"]
        if titles and titles[-1][2] == top["class"]:
            titles[-1][1] = end
            titles[-1][4].append(top["score"])
        else:
            name = top["name"] or f"class {top['class']}"
            titles.append([window["start"], end, top["class"], name, [top["score"]]])
    parts = [
        f"{number}\n{clock(start)} --> {clock(end)}\n{name}  {np.mean(scores):.0%}\n"
        for number, (start, end, _, name, scores) in enumerate(titles, 1)
    ]
    return "\n".join(parts)


def lengths_of(view: View, paths: list[str], bad: dict[str, str]) -> dict[int, Length]:
    """Return the lengths of videos by their place in ``paths``; add what cannot be read to bad."""
    with files_loader(view, LengthDataset(view.dataset.with_files(paths))) as loader:
        rows = {
            int(place): Length(int(frames), float(rate))
            for data, _, index in every_batch(loader)
            for place, (frames, rate) in zip(index, data.asnumpy())
        }
        bad.update((file.path, file.reason) for file in loader.bad_files())
    return rows


def _by_window(loader: Any, crops: int, kept: list[Optional[int]]) -> Iterator[tuple]:
    """Go through groups of windows with an index for each window; leave out what fills them up."""
    inner = np.repeat(np.arange(GROUP), crops)
    for data, label, index in every_batch(loader):
        windows = index * GROUP + np.tile(inner, len(index) // len(inner))
        rows = [row for row, window in enumerate(windows) if kept[window] is not None]
        yield mx.nd.take(data, mx.nd.array(rows, dtype="int32")), label, windows[rows]


class Windows:
    """Goes through videos window by window, and writes what it finds.

    Parameters
    ----------
    view, paths
    run
        Of :func:`jobs.media.scorer`.
    names
        Of the classes.
    options
    writer
    """

    def __init__(
        self,
        view: View,
        paths: list[str],
        run: Any,
        names: Optional[list[str]],
        options: PredictOutputOptions,
        writer: Writer,
    ) -> None:
        self.view, self.paths, self.run = view, paths, run
        self.names, self.options, self.writer = names, options, writer
        self.pictures = file_names(paths, ".png")
        self.titles = file_names(paths, ".srt")

    def predict(self, bad: dict[str, str]) -> None:
        """Go through all videos; add what cannot be read to ``bad``."""
        reading, stride = self.view.reading, self.options.stride
        span = (reading.clip_length - 1) * reading.frame_interval + 1
        lengths = lengths_of(self.view, self.paths, bad)
        groups: list[tuple[int, tuple[int, ...]]] = []
        kept: list[Optional[int]] = []  # first frame of each window, None of those that fill up
        for place, length in sorted(lengths.items()):
            step = stride or span / length.rate
            starts = window_starts(length, step, span)
            groups += grouped(place, starts, GROUP)
            kept += [*starts, *[None] * (-len(starts) % GROUP)]
        if not groups:
            return
        sampler = WindowSampling(reading.clip_length, reading.frame_interval)
        dataset = WindowDataset(self.view.dataset.with_files(self.paths), sampler, groups)
        current = -1
        rows: list[dict[str, Any]] = []
        scores: list[np.ndarray] = []
        with files_loader(self.view, dataset) as loader:
            for item, mean, _ in averaged(self.run, _by_window(loader, dataset.crops, kept)):
                place, start = groups[item // GROUP][0], kept[item]
                if place != current and rows:
                    self._finish(current, rows, scores)
                    rows, scores = [], []
                current, length = place, lengths[place]
                end = min(start + span, length.frames)
                row = {
                    "file": self.paths[place],
                    "start": round(start / length.rate, 3),
                    "end": round(end / length.rate, 3),
                    "top": best(mean, self.options.top_k, self.names),
                }
                self.writer.write(row)
                rows.append(row)
                scores.append(mean.astype(np.float32))
            if rows:
                self._finish(current, rows, scores)
            bad.update((file.path, file.reason) for file in loader.bad_files())

    def _finish(self, place: int, rows: list[dict[str, Any]], scores: list[np.ndarray]) -> None:
        """Say what a whole video shows, and draw it."""
        table = np.array(scores)
        path, options = self.paths[place], self.options
        top = best(table.mean(axis=0), options.top_k, self.names)
        self.writer.write({"file": path, "windows": len(rows), "top": top})
        if options.timeline:
            times = [(row["start"] + row["end"]) / 2 for row in rows]
            target = os.path.join(options.timeline, self.pictures[place])
            plot_timeline(times, table, target, self.names, os.path.basename(path))
            LOGGER.info("Timeline   %s", target)
        if options.subtitles:
            target = os.path.join(options.subtitles, self.titles[place])
            write_text(target, subtitles(rows))
            LOGGER.info("Subtitles  %s", target)


# --- command --------------------------------------------------------------------------------------


def _predict_whole(
    view: View, paths: list[str], run: Any, names: Optional[list[str]], top: int, writer: Writer
) -> dict[str, str]:
    """Write what each file shows; return what could not be read."""
    with loader_of(view, paths) as loader:
        for index, mean, views in averaged(run, every_batch(loader)):
            row = {"file": paths[index], "views": views, "top": best(mean, top, names)}
            writer.write(row)
        return {file.path: file.reason for file in loader.bad_files()}


def _segmented(options: PredictOptions, model: Model) -> Callable[[str, str], dict[str, Any]]:
    """Return what segments an image file, draws it, and says what is on it."""
    names = names_of(model.facts, options.files.class_names)
    segmenter = Segmenter(model, contexts_of(options.devices), options.segmentation)

    def look(path: str, stem: str) -> dict[str, Any]:
        shares, pictures = masks_of(segmenter, path, stem)
        top = [row for row in best(shares, options.output.top_k, names) if row["score"]]
        return {**pictures, "top": top}

    return look


def _detected(options: PredictOptions, model: Model) -> Callable[[str, str], dict[str, Any]]:
    """Return what finds the objects on an image file, draws them, and lists them."""
    names = names_of(model.facts, options.files.class_names)
    devices = options.devices
    finder = Finder(model, contexts_of(devices), options.detection)

    def look(path: str, stem: str) -> dict[str, Any]:
        image = read_image(path)
        found = finder.find(image)
        masks = object_masks_of(found, *image.shape[:2])
        write_mask(f"{stem}_objects.png", picture_of(image, found, masks, model.facts))
        return {
            "picture": f"{stem}_objects.png",
            "height": image.shape[0],
            "width": image.shape[1],
            "objects": described(found, masks, names),
        }

    return look


def _predict_pictures(options: PredictOptions, model: Model) -> int:
    """Segment all images, or find the objects on them; return how many could not be read."""
    paths = find_files(options.files, "image")
    output, failed = options.output, 0
    if model.facts.task == "segmentation":
        log_input(model, f"{len(paths)} images, whole or in windows")
        look = _segmented(options, model)
    else:
        short, long = model.facts.data_shape[1:]
        log_input(model, f"{len(paths)} images, shorter side {short}, longer one {long} at most")
        if format_of(output) == "csv":
            raise UsageError("a detector's objects are written as JSON lines, not as CSV")
        look = _detected(options, model)
    with writing(output) as writer:
        for path, stem in zip(paths, file_names(paths, "")):
            try:
                row = look(path, os.path.join(output.masks, stem))
            except ImageError as error:
                LOGGER.warning("cannot read the image %s: %s", path, error.reason)
                row = {"error": error.reason}
                failed += 1
            writer.write({"file": path, **row})
    LOGGER.info("Pictures   %d of %d images: %s", len(paths) - failed, len(paths), output.masks)
    return failed


def main(argv: Optional[list[str]] = None) -> int:
    """Predict as the command line says; the exit code is 1 if a file could not be read."""
    options = parse(PredictOptions(), argv, (__doc__ or "").split("\n\n")[0])
    output = options.output
    started = time.perf_counter()
    with log_to(output.log_file or None):
        if options.network.weights is None:
            raise UsageError(f"name a checkpoint: {command('predict')} CHECKPOINT PATH ...")
        model = read_model(options)
        task = model.facts.task
        engine = options.devices.engine(task)
        if task in ("segmentation", "detection"):
            return 1 if _predict_pictures(options, model) else 0
        windowed = bool(output.stride or output.timeline or output.subtitles)
        if windowed and task != "video":
            raise UsageError("--stride, --timeline and --subtitles are for videos")
        names = names_of(model.facts, options.files.class_names)
        paths = find_files(options.files, task)
        view = view_of(model, options.data)
        log_input(view.model, f"{len(paths)} {task}{'s' if len(paths) > 1 else ''}")
        run = scorer(view.model, contexts_of(options.devices), engine)
        bad = of_another_kind(paths, task)
        good = [path for path in paths if path not in bad]
        with writing(output) as writer:
            if good and windowed:
                Windows(view, good, run, names, output, writer).predict(bad)
            elif good:
                bad.update(_predict_whole(view, good, run, names, output.top_k, writer))
            failed = reasons(paths, bad)  # the loader has said so in the log
            for path, reason in failed.items():
                writer.write({"file": path, "error": reason})
        LOGGER.info(
            "Done       %d of %d %ss, %.1f s",
            len(paths) - len(failed),
            len(paths),
            task,
            time.perf_counter() - started,
        )
        return 1 if failed else 0
