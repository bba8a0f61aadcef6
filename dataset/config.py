"""What each data set is called, where its lists and videos lie, and how it is trained on.

Layout and file names are those of facebookresearch/GloRe::

    dataset/Kinetics/raw/list_cvt/kinetics_{train,val}_avi.txt, mapping_table.txt
    dataset/Kinetics/raw/data/{train,val}_avi-288p/<class>/<video>.avi
    dataset/UCF101/raw/list_cvt/{train,test}list01.txt, mapping_table.txt
    dataset/UCF101/raw/data/<class>/<video>.avi
    dataset/HMDB51/raw/list_cvt/hmdb51_split1_{train,test}.txt, mapping_table.txt
    dataset/HMDB51/raw/data/<class>/<video>.avi
    dataset/Demo/raw/list_cvt/demo_{train,val}_avi.txt, mapping_table.txt
    dataset/Demo/raw/data/{train,val}_avi-96p/<class>/<video>.avi
    dataset/NAME/raw/list_cvt/{train,val}.txt, mapping_table.txt           a data set of one's own
    dataset/NAME/raw/data/{train,val}/<class>/<video>.avi

A data root replaces the leading ``dataset``: with ``--data-root /data`` the Kinetics lists are
``/data/Kinetics/raw/list_cvt/…``.
"""

import dataclasses
import difflib
import os
import shlex
from collections.abc import Sequence
from typing import Any, Callable, Optional

from glore_common import GloReError, PathLike, UsageError, closest_first, module_command

# GloRe's single-node recipe: the rate falls after 45, 65 and 85 passes of 240,000 clips. When the
# run ends is our choice: 15 passes (of 4 logged epochs) after the last fall.
KINETICS_LR_STEPS = (45 * 240_000, 65 * 240_000, 85 * 240_000)
# Likeness to a known name from which on another one is taken for a typing error.
TYPING_ERROR = 0.85


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set: its files, and the settings that it is trained with unless told otherwise.

    Attributes
    ----------
    num_classes
        0 for a data set of one's own that is not there yet.
    root
        Folder of the data set; everything below lies in its ``raw`` folder.
    train_list, val_list
        List files with rows ``v_id label sub/path``.
    train_root, val_root
        Folders that ``sub/path`` is relative to.
    mapping_table
        File with rows ``label<TAB>class name``.
    flip
        Whether a mirrored clip still shows its class.
    augmentation
        ``full`` (upstream's random scale, aspect, crop, colours and noise) or ``crop`` (a random
        crop alone).
    epoch_div_factor
        A logged epoch is this fraction of a pass over the data.
    split
        The official split that the lists belong to.
    clip_length, train_frame_interval, val_frame_interval
        Frames per clip and frames between two of them.
    crop_size
        Side of the network's input, in pixels.
    lr_schedule
        One of ``train.schedule.SCHEDULES``.
    lr_steps
        Samples after which the step schedule lowers the rate.
    warmup_steps
    end_epoch
        Logged epochs.
    """

    name: str
    num_classes: int
    root: str
    train_list: str
    val_list: str
    train_root: str
    val_root: str
    mapping_table: str
    flip: bool = True
    augmentation: str = "full"
    epoch_div_factor: int = 1
    split: Optional[int] = None
    clip_length: int = 8
    train_frame_interval: int = 8
    val_frame_interval: int = 8
    crop_size: int = 224
    batch_size: int = 64
    lr_base: float = 0.05
    lr_schedule: str = "step"
    lr_steps: tuple[int, ...] = KINETICS_LR_STEPS
    warmup_steps: int = 1500
    end_epoch: int = 400

    def check(self, parts: Sequence[str] = ("train", "val")) -> None:
        """Make sure that lists and video folders are there.

        Parameters
        ----------
        parts
            Which of the two are needed.

        Raises
        ------
        GloReError
            With every path that is expected, the state of each, and the commands that make them.
        """
        expected: list[tuple[str, str, Callable]] = []
        for part in parts:
            if part not in ("train", "val"):
                raise UsageError(f"unknown part {part!r} of a data set; known: 'train', 'val'")
            expected.append((f"{part} list", getattr(self, f"{part}_list"), os.path.isfile))
            expected.append((f"{part} videos", getattr(self, f"{part}_root"), os.path.isdir))
        # The mapping table only names the classes: it is listed, but nothing fails without it.
        missing = [path for _, path, exists in expected if not exists(path)]
        if not missing:
            return
        expected.append(("class names", self.mapping_table, os.path.isfile))
        rows = []
        for what, path, exists in expected:
            state = "found  " if exists(path) else "MISSING"
            rows.append(f"  {state}  {what:12s}  {_shown(path)}")
        raise GloReError(
            f"the {self.name} data are not complete. Expected are\n"
            + "\n".join(rows)
            + f"\nTo make them:\n{self._how_to_make()}\n"
            + f"If they lie elsewhere as <folder>/{self.name}/raw/…, name it: --data-root <folder>"
        )

    @property
    def is_own(self) -> bool:
        """Whether it is none of :func:`list_datasets`."""
        return self.name not in _DATASETS

    def class_names(self) -> list[str]:
        """Return the class names in the order of their labels, as the mapping table has them.

        Raises
        ------
        GloReError
            The table is missing, malformed, or has another number of classes than the data set.
        """
        names = read_mapping_table(self.mapping_table)
        if len(names) != self.num_classes:
            raise GloReError(
                f"{_shown(self.mapping_table)} names {len(names)} classes, "
                f"{self.name} has {self.num_classes}"
            )
        return names

    def _how_to_make(self) -> str:
        parent = os.path.dirname(self.root)
        option = "" if parent == default_data_root() else f" --data-root {shlex.quote(parent)}"
        if self.name == "Demo":
            return f"  {module_command('dataset.demo')}{option}"
        prepare = f"  {module_command('dataset.prepare_videos')} --dataset {self.name}{option}"
        if self.is_own:
            return (
                f"{prepare} --videos FOLDER\n"
                "(FOLDER holds a folder of videos per class, or such folders in train/ and val/)"
            )
        if self.name == "Kinetics":
            return (
                f"{prepare} \\\n      --csv train.csv --csv validate.csv --videos DOWNLOADED\n"
                "or, from folders that hold one folder of videos per class,\n"
                f"{prepare} \\\n      --train-videos TRAIN --val-videos VAL"
            )
        return (
            f"{prepare} \\\n      --splits OFFICIAL_SPLIT_FILES --videos DOWNLOADED --link\n"
            "(the folder of the official split files, and the one with a folder of videos per "
            "class)"
        )


def default_data_root() -> str:
    """Return the folder that holds the data sets when no other is named.

    In a checkout it is the checkout's ``dataset`` folder, whatever the working directory; an
    installed package must not fill ``site-packages``: there it is ``dataset`` in the working
    directory.
    """
    if __package__ == "dataset":
        return os.path.dirname(os.path.abspath(__file__))
    return os.path.abspath("dataset")


def _kinetics(raw, split):
    return {
        "num_classes": 400,
        "train_list": os.path.join(raw, "list_cvt", "kinetics_train_avi.txt"),
        "val_list": os.path.join(raw, "list_cvt", "kinetics_val_avi.txt"),
        "train_root": os.path.join(raw, "data", "train_avi-288p"),
        "val_root": os.path.join(raw, "data", "val_avi-288p"),
        "epoch_div_factor": 4,
    }


def _ucf101(raw, split):
    # The three splits share the videos.
    return {
        "num_classes": 101,
        "train_list": os.path.join(raw, "list_cvt", f"trainlist{split:02d}.txt"),
        "val_list": os.path.join(raw, "list_cvt", f"testlist{split:02d}.txt"),
        "train_root": os.path.join(raw, "data"),
        "val_root": os.path.join(raw, "data"),
    }


def _hmdb51(raw, split):
    return {
        "num_classes": 51,
        "train_list": os.path.join(raw, "list_cvt", f"hmdb51_split{split}_train.txt"),
        "val_list": os.path.join(raw, "list_cvt", f"hmdb51_split{split}_test.txt"),
        "train_root": os.path.join(raw, "data"),
        "val_root": os.path.join(raw, "data"),
    }


def _demo(raw, split):
    return {
        "num_classes": 8,
        "train_list": os.path.join(raw, "list_cvt", "demo_train_avi.txt"),
        "val_list": os.path.join(raw, "list_cvt", "demo_val_avi.txt"),
        "train_root": os.path.join(raw, "data", "train_avi-96p"),
        "val_root": os.path.join(raw, "data", "val_avi-96p"),
        # A mirrored pan to the left is a pan to the right.
        "flip": False,
        # The scenes are random as they are; noise that stands still would only hide their motion.
        "augmentation": "crop",
        "train_frame_interval": 2,
        "val_frame_interval": 2,
        "crop_size": 64,
        "batch_size": 8,
        "lr_base": 0.02,
        "lr_schedule": "cosine",
        "lr_steps": (),
        "warmup_steps": 20,
        "end_epoch": 3,
    }


def _own(raw, split):
    paths = {
        "train_list": os.path.join(raw, "list_cvt", "train.txt"),
        "val_list": os.path.join(raw, "list_cvt", "val.txt"),
        "train_root": os.path.join(raw, "data", "train"),
        "val_root": os.path.join(raw, "data", "val"),
    }
    table = os.path.join(raw, "list_cvt", "mapping_table.txt")
    labels = _labels_of(paths["train_list"])
    classes = (
        len(read_mapping_table(table)) if os.path.exists(table) else max(labels, default=-1) + 1
    )
    return {"num_classes": classes, **paths, **recipe_for(len(labels))}


def _labels_of(list_path):
    """Return the labels of a list, as far as they are there and can be read: for its size."""
    try:
        with open(list_path, encoding="utf-8-sig", errors="replace") as stream:
            rows = [line.split(None, 2) for line in stream if not line.startswith("#")]
    except OSError:
        return []
    return [int(row[1]) for row in rows if len(row) == 3 and row[1].isdecimal()]


def recipe_for(videos: int) -> dict[str, Any]:
    """Return how a data set of so many training videos is trained on; the figures are our choice.

    Batches of 64 at most and at least 16 in a pass, the rate in proportion to them; 30 passes, or
    100 as for Kinetics where there are as many videos; a twentieth of them to warm up.
    """
    batch = 64
    while batch > 2 and batch * 16 > videos:
        batch //= 2
    batch = max(1, min(batch, videos))
    factor = 4 if videos >= 100_000 else 1
    passes = 100 if videos >= 100_000 else 30
    steps = passes * max(1, videos // batch)
    return {
        "batch_size": batch,
        "lr_base": 0.05 * batch / 64,
        "lr_schedule": "cosine",
        "lr_steps": (),
        "warmup_steps": min(1500, steps // 20),
        "epoch_div_factor": factor,
        "end_epoch": passes * factor,
    }


# name: (number of official splits, what differs from the defaults)
_DATASETS: dict[str, tuple[int, Callable[[str, int], dict[str, Any]]]] = {
    "Kinetics": (1, _kinetics),
    "UCF101": (3, _ucf101),
    "HMDB51": (3, _hmdb51),
    "Demo": (1, _demo),
}


def list_datasets() -> list[str]:
    """Return the names of the data sets."""
    return list(_DATASETS)


def get_config(
    name: str,
    data_root: Optional[PathLike] = None,
    split: int = 1,
    num_classes: Optional[int] = None,
    new: bool = False,
) -> DatasetConfig:
    """Return the configuration of a data set.

    Parameters
    ----------
    name
        One of :func:`list_datasets` (letter case does not matter), or that of a data set of one's
        own: of a folder below ``data_root``.
    data_root
        Folder that holds ``<name>/raw/…``; :func:`default_data_root` when None.
    split
        Official split, 1 to 3 for UCF101 and HMDB51; the others have one.
    num_classes
        Instead of what the data set is known to have or its mapping table says.
    new
        Whether a data set of one's own need not be there yet.

    Paths are absolute. Of a known data set nothing is read: :meth:`DatasetConfig.check` looks at
    the files. Of one's own the mapping table and the training list tell classes and size.

    Raises
    ------
    UsageError
        Unknown name (the nearest known one is named first) or split.
    GloReError
        A mapping table that cannot be used.
    """
    known = {candidate.lower(): candidate for candidate in _DATASETS}
    name = known.get(name.lower(), name)
    splits, make = _DATASETS.get(name, (1, _own))
    if not 1 <= split <= splits:
        raise UsageError(f"{name} has no split {split}; it has 1 to {splits}")
    parent = default_data_root() if data_root is None else os.path.abspath(data_root)
    root = os.path.join(parent, name)
    raw = os.path.join(root, "raw")
    if name not in _DATASETS:
        if not name or name.startswith(".") or os.path.basename(name) != name:
            raise UsageError(f"{name!r} cannot be the name of a data set: it names a folder")
        nearest = difflib.get_close_matches(name.lower(), known, 1, cutoff=TYPING_ERROR)
        if not os.path.isdir(raw) and (nearest or not new):
            names = ", ".join(closest_first(name, _DATASETS))
            raise UsageError(
                f"unknown data set {name!r}; known (nearest first): {names}. One of your own is "
                f"made by {module_command('dataset.prepare_videos')} --dataset {shlex.quote(name)} "
                f"--videos FOLDER; its lists would lie in {_shown(os.path.join(raw, 'list_cvt'))}"
            )
    config = DatasetConfig(
        name=name,
        root=root,
        mapping_table=os.path.join(raw, "list_cvt", "mapping_table.txt"),
        split=split if splits > 1 else None,
        **make(raw, split),
    )
    return config if num_classes is None else dataclasses.replace(config, num_classes=num_classes)


def read_mapping_table(path: str) -> list[str]:
    """Read a mapping table, rows ``label<TAB>class name``; return the names by label.

    Raises
    ------
    GloReError
        The file cannot be read, a row is malformed (named by its line), a label or a name occurs
        twice, or the labels are not 0, 1, …
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GloReError(f"cannot read the mapping table {_shown(path)}: {error}") from error
    names: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number_text, _, name = line.partition("\t")
        name = name.strip()
        where = f"{_shown(path)}, line {number}"
        if not number_text.strip().isdecimal() or not name:
            raise GloReError(f"{where}: expected 'label<TAB>class name', found {line!r}")
        label = int(number_text)
        if label in names:
            raise GloReError(f"{where}: label {label} occurs a second time")
        if name in names.values():
            raise GloReError(f"{where}: class {name!r} occurs a second time")
        names[label] = name
    absent = [label for label in range(len(names)) if label not in names]
    if absent or not names:
        what = f"label {absent[0]} is missing" if absent else "no classes"
        raise GloReError(f"{_shown(path)}: {what}; the labels must be 0, 1, 2, …")
    return [names[label] for label in range(len(names))]


def _shown(path: str) -> str:
    """Return a path as messages show it: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
