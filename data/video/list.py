"""Video lists in upstream's form, and the cache of frame counts that lies beside them.

A list is a text file with one row ``v_id label sub/path`` per video, as in
facebookresearch/GloRe (``dataset/Kinetics/raw/list_cvt/kinetics_train_avi.txt``). Here the columns
may be separated by spaces or tabs and the path, the rest of the row, may contain spaces.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Optional

from glore_common import GloReError, write_text

from .container import ROUTES, Turn, VideoFacts

LOGGER = logging.getLogger("glore.data")
RATE = re.compile(r"#\s*fps\s+([0-9]+(?:\.[0-9]+)?)")


class ListError(GloReError):
    """A list or mapping table that cannot be used; the message names file and line."""


class VideoRow(NamedTuple):
    """One row of a list: identifier, class (0-based) and path below the root."""

    v_id: str
    label: int
    path: str


class VideoList(NamedTuple):
    """The rows of one list and where their files lie.

    Attributes
    ----------
    path
        The list file (absolute).
    root
        Folder that the rows' paths start from (absolute).
    rows
    lines
        Line number (1-based) of each row in the list file.
    rate
        Frames per second of all videos, where the first line says it: ``# fps 25``.
    """

    path: str
    root: str
    rows: tuple[VideoRow, ...]
    lines: tuple[int, ...]
    rate: Optional[float] = None

    def full_path(self, index: int) -> str:
        """Return the absolute path of row ``index``'s file."""
        return os.path.join(self.root, self.rows[index].path)


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without line end) of the lines of ``path`` that are not blank."""
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise ListError(f"cannot read the video list {path}: {error.strerror}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ListError(f"{path}: this is UTF-16 text; save the list as UTF-8.")
    for number, raw in enumerate(content.split(b"\n"), 1):
        # Names in another encoding are those of the files as they are.
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r")
        if line.strip():
            yield number, line


def read_video_list(path: str, root: str, num_classes: Optional[int] = None) -> VideoList:
    """Read a video list.

    Parameters
    ----------
    path
        The list file: rows ``v_id label sub/path``, columns separated by spaces or tabs. The first
        line may be ``# fps RATE``.
    root
        Folder that ``sub/path`` starts from.
    num_classes
        Labels must lie in 0 .. num_classes - 1; without it they only must not be negative.

    Raises
    ------
    ListError
        The list or the root folder is missing, the list is empty, or a row is malformed, has a
        label out of range or repeats a v_id (with file and line number).
    """
    path, root = os.path.abspath(path), os.path.abspath(root)
    rows: list[VideoRow] = []
    lines: list[int] = []
    first_seen: dict[str, int] = {}
    rate = None
    for number, line in _read_lines(path):
        said = RATE.fullmatch(line.strip()) if number == 1 else None
        if said:
            rate = float(said[1])
            continue
        columns = line.split(None, 2)
        if len(columns) != 3:
            raise ListError(
                f"{path}:{number}: expected 'v_id label sub/path', found {len(columns)} "
                f"column{'s' if len(columns) > 1 else ''}: {line.strip()!r}"
            )
        v_id, label_text, sub_path = columns[0], columns[1], columns[2].rstrip()
        try:
            label = int(label_text)
        except ValueError:
            raise ListError(
                f"{path}:{number}: the label (second column) is no whole number: {label_text!r}"
            ) from None
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = f"0 to {num_classes - 1}" if num_classes is not None else "0 or more"
            raise ListError(f"{path}:{number}: label {label} is out of range ({allowed}).")
        if v_id in first_seen:
            raise ListError(
                f"{path}:{number}: v_id {v_id} is used twice, first in line {first_seen[v_id]}."
            )
        first_seen[v_id] = number
        rows.append(VideoRow(v_id, label, sub_path))
        lines.append(number)
    if not rows:
        raise ListError(f"the video list {path} is empty: expected rows 'v_id label sub/path'.")
    if not os.path.isdir(root):
        raise ListError(
            f"the folder {root} does not exist; the videos of {path} should lie in it "
            f"(the first one as {os.path.join(root, rows[0].path)})."
        )
    return VideoList(path, root, tuple(rows), tuple(lines), rate)


def without_absent(videos: VideoList, max_missing: float) -> VideoList:
    """Return the list without the videos that are not there, of which the log says how many.

    Videos disappear from where data sets are downloaded: these are not damaged, they are absent.

    Parameters
    ----------
    videos
    max_missing
        Share of the videos that may be absent, 0 to 1.

    Raises
    ------
    ListError
        More are absent, or all are.
    """
    folders: dict[str, set[str]] = {}
    there: list[int] = []
    absent: list[int] = []
    for place in range(len(videos.rows)):
        folder, name = os.path.split(videos.full_path(place))
        if folder not in folders:
            # A look at each folder, not at each of hundreds of thousands of files.
            folders[folder] = _names_in(folder)
        (there if name in folders[folder] else absent).append(place)
    if not absent:
        return videos
    count = f"{len(absent):,} of {len(videos.rows):,} videos of {videos.path} are not there"
    first = videos.full_path(absent[0])
    if not there or len(absent) > max_missing * len(videos.rows):
        raise ListError(
            f"{count}, e.g. {first}: more than --max-missing {max_missing:g} of them. Is "
            f"{videos.root} the right folder?"
        )
    LOGGER.info("%s and left out, e.g. %s", count, first)
    return videos._replace(
        rows=tuple(videos.rows[place] for place in there),
        lines=tuple(videos.lines[place] for place in there),
    )


def _names_in(folder):
    """Return the names of the files in a folder that is to be read, links to nothing left out."""
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name
                for entry in entries
                if not entry.is_symlink() or os.path.exists(entry.path)
            }
    except OSError:
        return set()


def check_lists(
    train: VideoList, val: VideoList, num_classes: int, names: Optional[Sequence[str]] = None
) -> None:
    """Say what is odd about the lists of a data set, before anything is trained on them.

    Warns of videos that are in both or in one twice, and of classes without videos for training.
    """

    def named(labels: Iterable[int]) -> str:
        shown = [str(label) if names is None else names[label] for label in sorted(labels)]
        return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")

    files = []
    for videos in (train, val):
        paths = [os.path.realpath(videos.root) + os.sep + row.path for row in videos.rows]
        files.append(set(paths))
        if len(files[-1]) < len(paths):
            LOGGER.warning(
                "%s names %d videos more than once", videos.path, len(paths) - len(files[-1])
            )
    both = files[0] & files[1]
    if both:
        LOGGER.warning(
            "%d videos are in both lists, e.g. %s: the validation will look better than it is",
            len(both),
            min(both),
        )
    absent = set(range(num_classes)) - {row.label for row in train.rows}
    if absent:
        LOGGER.warning(
            "%d of %d classes have no video in %s: %s",
            len(absent),
            num_classes,
            train.path,
            named(absent),
        )


def list_of_files(paths: Sequence[str]) -> VideoList:
    """Return the list of some files, none of which has a class: all labels are 0."""
    rows = tuple(VideoRow(str(n), 0, os.path.abspath(path)) for n, path in enumerate(paths))
    return VideoList("the videos given", os.sep, rows, tuple(range(1, len(rows) + 1)))


def _cache_folder():
    """Return the folder for caches of lists whose own folder cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "glore-mxnet", "frames")


class FrameCounts:
    """How many frames the videos of a list have and how they are read, remembered between runs.

    The loader notes what it finds out whenever it opens a file and :mod:`data.verify` notes how
    many frames can really be decoded, so a sampler never asks for the broken tail of a file that
    was verified. A note belongs to a file size: it is of no use when the file has changed.

    The cache is a text file beside the list, or in ``$XDG_CACHE_HOME/glore-mxnet/frames`` when
    that folder cannot be written. Its first line is a key made of the list's content, its
    modification time and the root; a cache with another key is not used. A row is
    ``line<TAB>facts``, the facts being those of :class:`data.video.container.VideoFacts` as JSON.
    """

    def __init__(self, video_list: VideoList) -> None:
        with open(video_list.path, "rb") as stream:
            content = hashlib.sha256(stream.read()).hexdigest()
        modified = os.stat(video_list.path).st_mtime_ns
        root_hash = hashlib.sha256(os.fsencode(video_list.root)).hexdigest()
        self._key = f"# glore frame counts 2 {content} {modified} {root_hash}"
        stem = f"{os.path.basename(video_list.path)}.{root_hash[:8]}.frames"
        path_hash = hashlib.sha256(os.fsencode(video_list.path)).hexdigest()[:8]
        self._paths = (
            os.path.join(os.path.dirname(video_list.path), "." + stem),
            os.path.join(_cache_folder(), f"{path_hash}.{stem}"),
        )
        # By the lines of the list, as rows may be left out; as text, as there are many.
        self._lines = video_list.lines
        self._noted: dict[int, str] = {}
        self._changed = False
        self._load()

    @property
    def paths(self) -> tuple[str, str]:
        """Where the cache may lie: beside the list, and the place to fall back to."""
        return self._paths

    def _load(self):
        for path in self._paths:
            try:
                with open(path, encoding="utf-8") as stream:
                    key, *lines = stream.read().splitlines()
                if key != self._key:
                    continue
                noted = {}
                for line in lines:
                    number, _, text = line.partition("\t")
                    _facts_of(text)
                    noted[int(number)] = text
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                LOGGER.warning("ignoring the frame count cache %s: %s", path, error)
                continue
            self._noted = noted
            return

    def noted(self, index: int) -> Optional[VideoFacts]:
        """Return what was noted for row ``index``."""
        text = self._noted.get(self._lines[index])
        return None if text is None else _facts_of(text)

    def get(self, index: int, size: int) -> Optional[int]:
        """Return the frame count of row ``index`` if it was noted for a file of ``size`` bytes."""
        facts = self.noted(index)
        return facts.frames if facts is not None and facts.size == size else None

    def note(self, index: int, facts: VideoFacts, replace: bool = False) -> None:
        """Note what is known of the file of row ``index``.

        A count that is already there for this size is kept unless ``replace``, or the file is to
        be read in another way: it may come from decoding the whole file, which knows better than
        the container's header.
        """
        known = self.noted(index)
        if known == facts:
            return
        same = known is not None and (known.size, known.route) == (facts.size, facts.route)
        if same and not replace:
            return
        self._noted[self._lines[index]] = json.dumps([*facts[:3], list(facts.turn), *facts[4:]])
        self._changed = True

    def known(self) -> int:
        """Return how many videos have a count."""
        return len(self._noted)

    def save(self) -> None:
        """Write the cache if anything was noted; a place that cannot be written is no error."""
        if not self._changed:
            return
        rows = (f"{line}\t{text}" for line, text in sorted(self._noted.items()))
        text = "\n".join([self._key, *rows]) + "\n"
        for path in self._paths:
            with contextlib.suppress(OSError):
                write_text(path, text)
                self._changed = False
                return
        LOGGER.warning("the frame counts could not be saved in any of: %s", ", ".join(self._paths))
        self._changed = False


def _facts_of(text: str) -> VideoFacts:
    """Return the facts that a row of the cache holds; ValueError or TypeError for other text."""
    frames, size, route, turn, *rest = json.loads(text)
    if route not in ROUTES or not int(frames) > 0:
        raise ValueError(f"no facts of a video: {text[:80]!r}")
    return VideoFacts(frames, size, route, Turn(*turn), *rest)
