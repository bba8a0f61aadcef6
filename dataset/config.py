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

A data root replaces the leading ``dataset``: with ``--data-root /data`` the Kinetics lists are
``/data/Kinetics/raw/list_cvt/…``.
"""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from typing import Any, Callable, Optional

from glore_common import GloReError, PathLike, UsageError, closest_first, module_command

# GloRe's single-node recipe: the rate falls after 45, 65 and 85 passes of 240,000 clips. When the
# run ends is our choice: 15 passes (of 4 logged epochs) after the last fall.
KINETICS_LR_STEPS = (45 * 240_000, 65 * 240_000, 85 * 240_000)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set: its files, and the settings that it is trained with unless told otherwise.

    Attributes
    ----------
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


def get_config(name: str, data_root: Optional[PathLike] = None, split: int = 1) -> DatasetConfig:
    """Return the configuration of a data set.

    Parameters
    ----------
    name
        One of :func:`list_datasets`; letter case does not matter.
    data_root
        Folder that holds ``<name>/raw/…``; :func:`default_data_root` when None.
    split
        Official split, 1 to 3 for UCF101 and HMDB51; the others have one.

    Paths are absolute. Nothing is read: :meth:`DatasetConfig.check` looks at the files.

    Raises
    ------
    UsageError
        Unknown name (the nearest known one is named first) or split.
    """
    known = {candidate.lower(): candidate for candidate in _DATASETS}
    if name.lower() not in known:
        names = ", ".join(closest_first(name, _DATASETS))
        raise UsageError(f"unknown data set {name!r}; known (nearest first): {names}")
    name = known[name.lower()]
    splits, make = _DATASETS[name]
    if not 1 <= split <= splits:
        raise UsageError(f"{name} has no split {split}; it has 1 to {splits}")
    parent = default_data_root() if data_root is None else os.path.abspath(data_root)
    root = os.path.join(parent, name)
    raw = os.path.join(root, "raw")
    return DatasetConfig(
        name=name,
        root=root,
        mapping_table=os.path.join(raw, "list_cvt", "mapping_table.txt"),
        split=split if splits > 1 else None,
        **make(raw, split),
    )


def read_mapping_table(path: str) -> list[str]:
    """Read a mapping table, rows ``label<TAB>class name``; return the names by label.

    Raises
    ------
    GloReError
        The file cannot be read, a row is malformed (named by its line), a label or a name occurs
        twice, or the labels are not 0, 1, …
    """
    try:
        with open(path, encoding="utf-8") as stream:
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
