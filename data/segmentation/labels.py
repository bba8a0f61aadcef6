"""Classes of segmentation data: names, colours, and which value of a mask is which class.

A mask is a picture whose pixels hold ids. :class:`Labels` maps these to train ids, 0 to the number
of classes - 1, or to ``IGNORED``; other values are mistakes. The mapping is done once, where a mask
is read.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Optional

import numpy as np

from glore_common import GloReError, UsageError

IGNORED = 255
# In a table: a value that masks must not have.
FORBIDDEN = -1


class MaskError(GloReError):
    """A mask that cannot be used; the message names the file, what is wrong, and the way out."""


def colours_of(count: int) -> np.ndarray:
    """Return ``count`` colours that differ, (count, 3) uint8 RGB: the palette of Pascal VOC."""
    index = np.arange(count)
    colours = np.zeros((count, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a data set.

    Attributes
    ----------
    names
        By train id.
    table
        (256,) int16: the train id of each value of a mask, ``IGNORED``, or ``FORBIDDEN``.
    colours
        (classes, 3) uint8 RGB, by train id, for pictures.
    ids
        The value that a mask has for each train id: what submissions hold.
    mask_colours
        Where masks are colour pictures: RGB as one number (r << 16 | g << 8 | b) to train id.
    categories
        Name of the group of each class, if there are any.
    advice
        What to do about values that are not known: the end of a message.
    """

    names: tuple[str, ...]
    table: np.ndarray
    colours: np.ndarray
    ids: tuple[int, ...]
    mask_colours: Optional[dict[int, int]] = None
    categories: tuple[str, ...] = ()
    advice: str = ""

    @property
    def num_classes(self) -> int:
        """How many classes are learnt."""
        return len(self.names)

    def train_ids(self, mask: np.ndarray, path: str) -> np.ndarray:
        """Return the train ids of a mask as it was read, uint8 (h, w).

        Parameters
        ----------
        mask
            (h, w) uint8 ids; or (h, w, 3) uint8 RGB, if ``mask_colours`` say what colours mean.
        path
            For messages.

        Raises
        ------
        MaskError
            With file, values and number of pixels.
        """
        if mask.ndim == 3:
            return self._of_colours(mask, path)
        found = self.table[mask]
        if (found == FORBIDDEN).any():
            wrong = mask[found == FORBIDDEN]
            values = ", ".join(map(str, np.unique(wrong)[:5]))
            raise MaskError(
                f"the mask {path} has {wrong.size} pixels of values that are no class: {values}. "
                + self.advice
            )
        return found.astype(np.uint8)

    def _of_colours(self, mask: np.ndarray, path: str) -> np.ndarray:
        if self.mask_colours is None:
            raise MaskError(
                f"the mask {path} is a colour picture, but ids are expected. Give the colours of "
                "the classes (a class file with columns id, name, r, g, b), or convert the masks."
            )
        wide = mask.astype(np.int32)
        numbers = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        known, places = np.unique(numbers, return_inverse=True)
        ids = np.array([self.mask_colours.get(int(n), FORBIDDEN) for n in known])
        if (ids == FORBIDDEN).any():
            wrong = known[ids == FORBIDDEN]
            some = ", ".join(f"({n >> 16}, {n >> 8 & 255}, {n & 255})" for n in wrong[:5])
            raise MaskError(
                f"the mask {path} has {np.isin(numbers, wrong).sum()} pixels of colours that are "
                f"no class: {some}. {self.advice}"
            )
        return ids[places].reshape(numbers.shape).astype(np.uint8)


def table_of(train_id_of: dict[int, int]) -> np.ndarray:
    """Return the table of :class:`Labels`: all values that are not named are forbidden."""
    table = np.full(256, FORBIDDEN, np.int16)
    for value, train_id in train_id_of.items():
        table[value] = train_id
    return table


# Of cityscapesscripts (labels.py): id, name, category, colour, and whether it is learnt. Ids that
# are not are ignored. The licence plate, -1, does not appear in masks.
_CITYSCAPES = """
0 unlabeled void 0,0,0 -
1 ego_vehicle void 0,0,0 -
2 rectification_border void 0,0,0 -
3 out_of_roi void 0,0,0 -
4 static void 0,0,0 -
5 dynamic void 111,74,0 -
6 ground void 81,0,81 -
7 road flat 128,64,128 +
8 sidewalk flat 244,35,232 +
9 parking flat 250,170,160 -
10 rail_track flat 230,150,140 -
11 building construction 70,70,70 +
12 wall construction 102,102,156 +
13 fence construction 190,153,153 +
14 guard_rail construction 180,165,180 -
15 bridge construction 150,100,100 -
16 tunnel construction 150,120,90 -
17 pole object 153,153,153 +
18 polegroup object 153,153,153 -
19 traffic_light object 250,170,30 +
20 traffic_sign object 220,220,0 +
21 vegetation nature 107,142,35 +
22 terrain nature 152,251,152 +
23 sky sky 70,130,180 +
24 person human 220,20,60 +
25 rider human 255,0,0 +
26 car vehicle 0,0,142 +
27 truck vehicle 0,0,70 +
28 bus vehicle 0,60,100 +
29 caravan vehicle 0,0,90 -
30 trailer vehicle 0,0,110 -
31 train vehicle 0,80,100 +
32 motorcycle vehicle 0,0,230 +
33 bicycle vehicle 119,11,32 +
"""


def _cityscapes() -> Labels:
    rows = [line.split() for line in _CITYSCAPES.split("\n") if line]
    learnt = [row for row in rows if row[4] == "+"]
    ids = tuple(int(row[0]) for row in learnt)
    train_id_of = {int(row[0]): IGNORED for row in rows}
    train_id_of.update((value, index) for index, value in enumerate(ids))
    return Labels(
        names=tuple(row[1].replace("_", " ") for row in learnt),
        table=table_of(train_id_of),
        colours=np.array([row[3].split(",") for row in learnt], np.uint8),
        ids=ids,
        categories=tuple(row[2] for row in learnt),
        advice="Cityscapes' masks of ids (…_gtFine_labelIds.png) hold 0 to 33; train ids (0 to 18 "
        "and 255, …_labelTrainIds.png) are another kind of file.",
    )


CITYSCAPES = _cityscapes()

_VOC_NAMES = """
background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
person pottedplant sheep sofa train tvmonitor
"""
_VOC = _VOC_NAMES.split()
VOC = Labels(
    names=tuple(_VOC),
    table=table_of({**{index: index for index in range(len(_VOC))}, 255: IGNORED}),
    colours=colours_of(len(_VOC)),
    ids=tuple(range(len(_VOC))),
    advice="Pascal VOC's masks hold 0 to 20, and 255 for what is not labelled.",
)


def ade20k(names: Optional[Sequence[str]] = None) -> Labels:
    """Return the 150 classes of ADE20K (SceneParsing): 0 in a mask is ignored, 1 is class 0."""
    names = tuple(names) if names else tuple(f"class {index + 1}" for index in range(150))
    if len(names) != 150:
        raise MaskError(f"ADE20K's scene parsing has 150 classes, not {len(names)}")
    return Labels(
        names=names,
        table=table_of({0: IGNORED, **{value: value - 1 for value in range(1, 151)}}),
        colours=colours_of(151)[1:],
        ids=tuple(range(1, 151)),
        advice="ADE20K's masks hold 0 (not labelled) and 1 to 150.",
    )


def numbered(count: int, names: Optional[Sequence[str]] = None) -> Labels:
    """Return classes 0 to ``count`` - 1, whose masks hold their numbers, or 255: not labelled."""
    if not 1 <= count < IGNORED:
        raise UsageError(f"masks can hold 1 to {IGNORED - 1} classes, not {count}")
    return Labels(
        names=tuple(names) if names else tuple(f"class {index}" for index in range(count)),
        table=table_of({**{index: index for index in range(count)}, 255: IGNORED}),
        colours=colours_of(count),
        ids=tuple(range(count)),
        advice=f"Masks hold 0 to {count - 1}, and 255 for what is not labelled; other values need "
        "a class file.",
    )


def read_classes(path: str) -> Labels:
    """Read a class file: a line ``id name`` or ``id name r g b`` for each value of a mask.

    Names may hold spaces; a name of ``-`` marks what is not labelled. Classes are numbered in the
    order of the lines, and several ids of one name are one class. With colours for all, masks may
    be colour pictures. Lines that begin with ``#`` are passed over.

    Raises
    ------
    UsageError
        With file and line.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the class file {path} cannot be read: {error}") from error
    pattern = re.compile(r"(\d+)\s+(.*?)(?:\s+(\d+)\s+(\d+)\s+(\d+))?")
    names: list[str] = []
    ids: list[int] = []
    train_id_of: dict[int, int] = {}
    colours: dict[int, tuple[int, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = pattern.fullmatch(line.strip())
        value = int(match[1]) if match else 256
        colour = tuple(int(part) for part in match.groups()[2:]) if match and match[3] else None
        if match is None or not match[2] or value > 255 or (colour and max(colour) > 255):
            raise UsageError(
                f"{os.path.basename(path)}:{number}: expected 'id name' or 'id name r g b' with "
                f"numbers from 0 to 255, found {line.strip()!r}"
            )
        if value in train_id_of:
            raise UsageError(f"{os.path.basename(path)}:{number}: the id {value} is there twice")
        name = match[2]
        if name == "-":
            train_id_of[value] = IGNORED
        else:
            if name not in names:
                names.append(name)
                ids.append(value)
            train_id_of[value] = names.index(name)
        if colour:
            colours[value] = colour
    if not names:
        raise UsageError(f"the class file {path} names no class")
    if colours and len(colours) != len(train_id_of):
        raise UsageError(f"the class file {path} gives colours for some ids only")
    if len(set(colours.values())) != len(colours):
        raise UsageError(f"the class file {path} gives one colour to two ids")
    train_id_of.setdefault(255, IGNORED)
    mask_colours = {
        red << 16 | green << 8 | blue: train_id_of[value]
        for value, (red, green, blue) in colours.items()
    }
    shown = np.array([colours[value] for value in ids], np.uint8) if colours else None
    return Labels(
        names=tuple(names),
        table=table_of(train_id_of),
        colours=colours_of(len(names)) if shown is None else shown,
        ids=tuple(ids),
        mask_colours=mask_colours or None,
        advice=f"The class file {path} says which there are.",
    )
