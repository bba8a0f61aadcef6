"""Which videos a data set consists of: plans from folders, annotation files and official splits.

A plan says what :mod:`.prepare_videos` has to make and which lists name it; making a plan reads
names and lists, and writes nothing.
"""

import collections
import csv
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Callable, Optional

from glore_common import LOGGER, UsageError, closest_first

from .config import DatasetConfig, get_config, read_mapping_table

# Whatever FFmpeg reads and people call a video.
VIDEO_EXTENSIONS = (
    *(".264", ".265", ".3g2", ".3gp", ".amv", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v"),
    *(".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v"),
    *(".m4v", ".mjpeg", ".mjpg", ".mkv", ".mod", ".mov", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpg"),
    *(".mpv", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".tod", ".tp", ".trp"),
    *(".ts", ".vob", ".webm", ".wmv", ".wtv", ".xvid", ".y4m"),
)

# The columns of the Kinetics annotation files, and what their `split` column calls our two lists.
CSV_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
CSV_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val"}
CSV_UNUSED_SPLITS = ("test", "holdout")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make: ``target`` from ``source``, or from the seconds ``trim`` of it.

    ``others`` are further copies of the source, for when it is broken.
    """

    source: str
    target: str
    trim: Optional[tuple[int, int]] = None
    others: tuple[str, ...] = ()


# (class name, paths of its videos) -> those that validate.
IsVal = Callable[[str, list[str]], set[str]]


@dataclasses.dataclass
class Plan:
    """What a run makes.

    Attributes
    ----------
    classes
        Class names; the position is the label.
    jobs
        Target path -> :class:`Job`.
    lists
        List file -> {path below the video root: (label, target path)}.
    missing
        Videos that an annotation names and that are not there.
    missing_is_failure
        Whether that is a failure: it is for a fixed archive, and not for Kinetics, where videos
        disappear from YouTube all the time.
    problems
        Videos that cannot be used: path and reason.
    """

    classes: list[str]
    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)
    lists: dict[str, dict[str, tuple[int, str]]] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    missing_is_failure: bool = False
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(
        self,
        list_path: str,
        label: int,
        root: str,
        sub_path: str,
        source: str,
        trim: Optional[tuple[int, int]] = None,
        others: tuple[str, ...] = (),
    ) -> None:
        """Plan one row of a list and the video that it needs."""
        # Lists are UTF-8 text with a video per line.
        try:
            sub_path.encode("utf-8")
        except UnicodeEncodeError:
            self.problems.append((repr(source), "the name is not valid UTF-8; rename it"))
            return
        if len(sub_path.splitlines()) != 1:
            self.problems.append((repr(source), "the name contains a line break; rename it"))
            return
        if os.path.isabs(sub_path) or os.pardir in sub_path.split("/"):
            self.problems.append((source, f"{sub_path} lies outside of the data's folder"))
            return
        target = os.path.join(root, sub_path)
        known = self.jobs.setdefault(target, Job(source, target, trim, others))
        if known.source != source or known.trim != trim:
            self.problems.append((source, f"would become {sub_path}, as {known.source} does"))
            return
        self.lists.setdefault(list_path, {})[sub_path] = (label, target)


def class_name(name: str) -> str:
    """Return a class name as the lists of GloRe spell it: underscores for spaces."""
    return re.sub(r"\s", "_", name.strip())


def find_videos(folder: str) -> list[str]:
    """Return the videos below ``folder``, as sorted paths relative to it.

    Hidden files and folders are left out. Links to folders are followed, each folder once. Files
    that are no videos by their names are counted, and a warning says so.

    Raises
    ------
    UsageError
        ``folder`` is no folder, or there is no video in it.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder")
    videos = []
    others: collections.Counter[str] = collections.Counter()
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        keep = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                keep.append(name)
        folders[:] = keep
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(VIDEO_EXTENSIONS):
                videos.append(os.path.relpath(os.path.join(parent, name), folder))
            else:
                others[os.path.splitext(name)[1].lower() or "no extension"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        count = sum(others.values())
        LOGGER.warning(
            "%s: %d files are no videos by their names; left out (%s)", folder, count, kinds
        )
    if not videos:
        raise UsageError(
            f"no videos in {folder} or below (known by their names: {', '.join(VIDEO_EXTENSIONS)})"
        )
    return sorted(videos)


def _videos_by_class(folder: str) -> dict[str, list[str]]:
    """Return class name -> sorted paths relative to ``folder``, from its class folders."""
    classes = collections.defaultdict(list)
    stray = []
    for path in find_videos(folder):
        first, separator, _ = path.partition(os.sep)
        if separator:
            classes[class_name(first)].append(path)
        else:
            stray.append(path)
    if not classes:
        raise UsageError(
            f"the videos of {folder} must lie in one folder per class, as in "
            f"{folder}/abseiling/x.mp4; found {stray[0]} in the folder itself"
        )
    if stray:
        LOGGER.warning("%d videos in %s itself have no class; left out", len(stray), folder)
    _warn_of_empty_classes(folder, classes)
    return dict(classes)


def _labels(config: DatasetConfig, names: Iterable[str], table: Optional[str]) -> list[str]:
    """Return the class list: that of ``table``, else the sorted ``names``; checked."""
    names = sorted(names)
    for name in names:
        if "\t" in name or name in ("", ".", "..") or os.path.basename(name) != name:
            raise UsageError(f"{name!r} cannot be a class name: it must do as a folder's name")
    if table is not None:
        classes = read_mapping_table(table)
        for name in names:
            if name not in classes:
                near = ", ".join(closest_first(name, classes)[:3])
                raise UsageError(f"class {name!r} is not in {table}; nearest there: {near}")
    else:
        classes = names
    _check_number_of_classes(config, classes, table)
    return classes


def _warn_of_empty_classes(folder: str, classes: Iterable[str]) -> None:
    """Say which class folders have no video."""
    empty = [
        name
        for name in sorted(os.listdir(folder))
        if not name.startswith(".")
        and class_name(name) not in classes
        and os.path.isdir(os.path.join(folder, name))
    ]
    if empty:
        names = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        LOGGER.warning("%s: no videos of %d classes: %s", folder, len(empty), names)


def _check_number_of_classes(
    config: DatasetConfig, classes: list[str], table: Optional[str] = None
) -> None:
    if not config.num_classes:  # a data set of one's own: what is there
        return
    if len(classes) > config.num_classes:
        raise UsageError(
            f"{len(classes)} classes found, {config.name} has {config.num_classes}: is this the "
            f"right folder? Found {', '.join(classes[:3])}, …"
        )
    if len(classes) < config.num_classes:
        LOGGER.warning(
            "%d classes found, %s has %d. The labels count the classes found%s",
            len(classes),
            config.name,
            config.num_classes,
            "" if table else "; --mapping-table FILE keeps those of a full mapping table",
        )


def _target_name(sub_path: str, link: bool) -> str:
    return sub_path if link else os.path.splitext(sub_path)[0] + ".avi"


def _class_target(path: str, link: bool) -> str:
    """Return where ``class folder/…/video`` goes below the video root."""
    first, _, rest = path.partition(os.sep)
    return f"{class_name(first)}/{_target_name(rest, link)}"


def plan_from_folders(
    config: DatasetConfig,
    train_folder: str,
    val_folder: str,
    table: Optional[str] = None,
    link: bool = False,
) -> Plan:
    """Plan from two folders that hold one folder of videos per class."""
    found = [_videos_by_class(train_folder), _videos_by_class(val_folder)]
    classes = _labels(config, set(found[0]) | set(found[1]), table)
    plan = Plan(classes)
    for videos, folder, list_path, root in (
        (found[0], train_folder, config.train_list, config.train_root),
        (found[1], val_folder, config.val_list, config.val_root),
    ):
        for name, paths in sorted(videos.items()):
            for path in paths:
                source = os.path.join(folder, path)
                target = _class_target(path, link)
                plan.add(list_path, classes.index(name), root, target, source)
    return plan


def plan_from_one_folder(
    config: DatasetConfig,
    folder: str,
    is_val: IsVal,
    table: Optional[str] = None,
    link: bool = False,
) -> Plan:
    """Plan from one folder of class folders."""
    found = _videos_by_class(folder)
    classes = _labels(config, found, table)
    plan = Plan(classes)
    for name, paths in sorted(found.items()):
        validating = is_val(name, paths)
        for path in paths:
            list_path, root = (
                (config.val_list, config.val_root)
                if path in validating
                else (config.train_list, config.train_root)
            )
            source = os.path.join(folder, path)
            plan.add(list_path, classes.index(name), root, _class_target(path, link), source)
    for list_path, what in ((config.train_list, "training"), (config.val_list, "validation")):
        if not plan.lists.get(list_path):
            raise UsageError(f"this leaves no {what} videos")
    return plan


def validation_fraction(fraction: float, seed: int) -> IsVal:
    """Return an ``is_val`` that draws a fraction of every class (at least one of two videos)."""
    if not 0 < fraction < 1:
        raise UsageError(f"--val-fraction must lie between 0 and 1, not {fraction}")

    def is_val(name: str, paths: list[str]) -> set[str]:
        count = min(max(1, round(fraction * len(paths))), len(paths) - 1)

        def draw(path: str) -> bytes:
            # A draw per video: one more or one less hardly moves the others to the other side.
            return hashlib.sha256(os.fsencode(f"{seed} {path}")).digest()

        return set(sorted(paths, key=draw)[:count])

    return is_val


def validation_file(path: str, folder: str) -> IsVal:
    """Return an ``is_val`` that takes the videos named by a file, a relative path per line."""
    available = set(find_videos(folder))
    chosen = set()
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        name = os.path.normpath(line.strip())
        if name not in available:
            raise UsageError(f"{path}, line {number}: {line.strip()!r} is no video in {folder}")
        chosen.add(name)
    return lambda name, paths: chosen.intersection(paths)


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _read_csv(path: str) -> Iterator[tuple[str, str, int, int, str]]:
    """Yield (line number, row) of a Kinetics annotation file, checked and converted."""
    reader = csv.DictReader(_read_lines(path))
    absent = [column for column in CSV_COLUMNS if column not in (reader.fieldnames or [])]
    if absent:
        raise UsageError(
            f"{path} is not a Kinetics annotation file: column {', '.join(absent)} missing in its "
            f"first line (expected {','.join(CSV_COLUMNS)})"
        )
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        split = (row["split"] or "").strip().lower()
        if split in CSV_UNUSED_SPLITS:
            continue
        if split not in CSV_SPLITS:
            raise UsageError(f"{where}: unknown split {row['split']!r}")
        if not (row["label"] or "").strip() or not (row["youtube_id"] or "").strip():
            raise UsageError(f"{where}: label or youtube_id is empty")
        try:
            start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"{where}: time_start and time_end must be seconds") from None
        if not 0 <= start < end:
            raise UsageError(f"{where}: the clip from {start} s to {end} s is empty")
        yield class_name(row["label"]), row["youtube_id"].strip(), start, end, CSV_SPLITS[split]


def plan_from_csv(
    config: DatasetConfig,
    csv_files: Iterable[str],
    folders: Iterable[str],
    table: Optional[str] = None,
    link: bool = False,
    trim: bool = False,
) -> Plan:
    """Plan from Kinetics annotation files and folders of downloaded videos.

    A row's video is ``{id}_{start:06d}_{end:06d}`` or ``{id}`` with any video extension, anywhere
    in the folders. Of several the first that is whole is taken: those in a folder called
    ``replacement…`` come first, then in one named like the class, then like the split. With
    ``trim``, files called ``{id}`` are whole videos from which the clip is cut.
    """
    rows = [row for path in csv_files for row in _read_csv(path)]
    if not rows:
        raise UsageError(f"no training or validation rows in {', '.join(csv_files)}")
    available: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for folder in folders:
        for path in find_videos(folder):
            stem = os.path.splitext(os.path.basename(path))[0]
            available[stem].append((folder, path))
    # Missing videos count here too: labels must not depend on what could be downloaded.
    classes = _labels(config, {row[0] for row in rows}, table)
    number_of = {name: label for label, name in enumerate(classes)}
    plan = Plan(classes)
    for name, video_id, start, end, split in rows:
        clip = f"{video_id}_{start:06d}_{end:06d}"
        stem = clip if clip in available else video_id

        def fit(
            found: tuple[str, str], name: str = name, split: str = split
        ) -> tuple[bool, bool, bool, tuple[str, str]]:
            parents = [class_name(part) for part in os.path.dirname(found[1]).split(os.sep)]
            in_split = any(CSV_SPLITS.get(part.lower()) == split for part in parents)
            # CVDF's archive of Kinetics has whole copies of what is broken in its other folders.
            replaces = any(part.lower().startswith("replacement") for part in parents)
            return (not replaces, name not in parents, not in_split, found)

        if not available.get(stem):
            plan.missing.append(f"{name}/{clip}")
            continue
        source, *others = (os.path.join(*found) for found in sorted(available[stem], key=fit))
        list_path, root = (
            (config.train_list, config.train_root)
            if split == "train"
            else (config.val_list, config.val_root)
        )
        cut = (start, end) if trim and stem == video_id else None
        extension = os.path.splitext(source)[1] if link else ".avi"
        target = f"{name}/{clip}{extension}"
        plan.add(list_path, number_of[name], root, target, source, cut, tuple(others))
    if not plan.jobs:
        raise UsageError(
            f"none of the {len(rows)} videos of the annotation is in {', '.join(folders)}; "
            f"expected names such as {rows[0][1]}_{rows[0][2]:06d}_{rows[0][3]:06d}.mp4"
        )
    return plan


def _plan_from_rows(
    config: DatasetConfig,
    folder: str,
    classes: list[str],
    rows: list[tuple[str, str, str]],
    link: bool,
) -> Plan:
    """Plan rows (list file, class name, path below ``folder``) of an official split."""
    number_of = {name: label for label, name in enumerate(classes)}
    plan = Plan(classes, missing_is_failure=True)
    missing: dict[str, None] = {}
    for list_path, name, path in rows:
        source = os.path.join(folder, path)
        if not os.path.isfile(source):
            missing[path] = None
            continue
        target = _class_target(path, link)
        plan.add(list_path, number_of[name], config.train_root, target, source)
    plan.missing = list(missing)
    if not plan.jobs:
        raise UsageError(
            f"none of the {len(missing)} videos of the split files is in {folder}; "
            f"expected e.g. {os.path.join(folder, plan.missing[0])}"
        )
    return plan


def plan_ucf101(data_root: Optional[str], splits: str, folder: str, link: bool = False) -> Plan:
    """Plan from ``classInd.txt`` and the ``trainlist01.txt``, ``testlist01.txt``, … of UCF101."""
    config = get_config("UCF101", data_root)
    index = os.path.join(splits, "classInd.txt")
    number_of: dict[str, int] = {}
    for number, line in enumerate(_read_lines(index), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not parts[0].isdecimal() or parts[1] in number_of:
            raise UsageError(f"{index}, line {number}: expected 'number Class', found {line!r}")
        number_of[parts[1]] = int(parts[0]) - 1
    classes = sorted(number_of, key=number_of.__getitem__)
    if [number_of[name] for name in classes] != list(range(len(classes))) or not classes:
        raise UsageError(f"{index}: the classes must be numbered 1, 2, …")
    rows = []
    for split in (1, 2, 3):
        names = [f"{part}list{split:02d}.txt" for part in ("train", "test")]
        there = [os.path.isfile(os.path.join(splits, name)) for name in names]
        if not any(there):
            continue
        split_config = get_config("UCF101", data_root, split)
        for name, list_path in zip(names, (split_config.train_list, split_config.val_list)):
            path = os.path.join(splits, name)
            for number, line in enumerate(_read_lines(path), 1):
                if not line.strip():
                    continue
                # Training rows end with the class number; it is the folder's.
                video = line.strip().rsplit(None, 1)[0] if name[:5] == "train" else line.strip()
                label = video.split("/")[0]
                if label not in number_of or "/" not in video:
                    raise UsageError(f"{path}, line {number}: {label!r} is not in classInd.txt")
                rows.append((list_path, label, video))
    if not rows:
        raise UsageError(f"no trainlist01.txt, testlist01.txt, … in {splits}")
    _check_number_of_classes(config, classes)
    return _plan_from_rows(config, folder, classes, rows, link)


def plan_hmdb51(data_root: Optional[str], splits: str, folder: str, link: bool = False) -> Plan:
    """Plan from the ``<class>_test_split1.txt``, … of HMDB51 (1 trains, 2 tests, 0 is unused)."""
    config = get_config("HMDB51", data_root)
    if not os.path.isdir(splits):
        raise UsageError(f"{splits} is not a folder")
    rows = []
    classes = set()
    for name in sorted(os.listdir(splits)):
        match = re.fullmatch(r"(.+)_test_split([123])\.txt", name)
        if not match:
            continue
        label, split = match.group(1), int(match.group(2))
        classes.add(label)
        split_config = get_config("HMDB51", data_root, split)
        path = os.path.join(splits, name)
        for number, line in enumerate(_read_lines(path), 1):
            if not line.strip():
                continue
            video, _, use = line.strip().rpartition(" ")
            if use not in ("0", "1", "2") or not video:
                raise UsageError(
                    f"{path}, line {number}: expected 'video.avi 0|1|2', found {line!r}"
                )
            if use != "0":
                list_path = split_config.train_list if use == "1" else split_config.val_list
                rows.append((list_path, label, f"{label}/{video.strip()}"))
    if not rows:
        raise UsageError(f"no <class>_test_split1.txt, … in {splits}")
    return _plan_from_rows(config, folder, _labels(config, classes, None), rows, link)
