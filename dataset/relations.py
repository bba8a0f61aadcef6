"""A task that needs distant relations: two figures in opposite strips, alike or not.

Images show two glyphs far apart; the label says whether they are of the same kind. In clips two
objects move up or down, and the label says whether they move the same way; no single frame tells
anything. Rows, colours, sign and noise are drawn independently of the kinds, so that one figure
alone says nothing.

A network whose cells see at most one figure and which ends in average pooling and a linear layer
cannot solve it, whatever its weights. Its score is c(z) + A(left, z) + B(right, z), with z all but
the kinds of the two figures. In a quadruple (one z, the four pairs of two kinds) therefore

    I = s(a, b) + s(b, a) - s(a, a) - s(b, b) = 0:

never are all four right, and the cross entropy is ln 2 at least. Accuracy has no such bound:
counting gets three of four (docs/understanding.md).

Everything is made in memory when it is asked for, as a function of a seed.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from glore_common import UsageError

GLYPH = 9  # pixels, width and height
STRIPS = (11, 12)  # columns in which the left and the right glyph may lie
# What a test may draw otherwise than training does.
UNSEEN = ("rows", "colours", "noise")
HIDDEN_ROWS = range(24, 32)  # where no glyph of training begins
LOUD = 1.5  # times the noise of training
SPEEDS = (2, 3)  # pixels per frame
NOBODY = -1  # kind of a figure that is absent


@dataclasses.dataclass(frozen=True)
class Task:
    """What is drawn.

    Attributes
    ----------
    frames
        0 for images; else of a clip.
    gap
        Columns between the two strips. A network must see fewer for the impossibility to hold.
    kinds
        How many kinds of glyphs there are. Objects of clips have two: up and down.
    height, width
        Pixels.
    noise
        Standard deviation; a glyph's colour has length 2.
    """

    frames: int = 0
    gap: int = 41
    kinds: int = 2
    height: int = 64
    width: int = 64
    noise: float = 0.4

    def __post_init__(self) -> None:
        if self.gap < 0 or self.gap + sum(STRIPS) > self.width:
            raise UsageError(f"a gap of {self.gap} columns does not fit into {self.width}")
        if not 2 <= self.kinds <= (2 if self.frames else len(GLYPHS)):
            raise UsageError(f"there are no {self.kinds} kinds")

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, h, w), or (3, frames, h, w)."""
        return (3, *((self.frames,) if self.frames else ()), self.height, self.width)


class Scenes(NamedTuple):
    """All but the kinds of the figures: one entry per sample, and per figure (left, right).

    ``glyph`` is what objects of clips look like.
    """

    top: np.ndarray
    left: np.ndarray
    colour: np.ndarray
    speed: np.ndarray
    glyph: np.ndarray
    noise: np.ndarray


def _glyphs() -> np.ndarray:
    """Return (kinds, GLYPH, GLYPH) patterns of 3 x 3 squares, five of them set.

    The first two are + and x; each further one is as far as possible from all before.
    """
    every = np.array([c for c in itertools.product((0, 1), repeat=9) if sum(c) == 5])
    chosen = [np.array([0, 1, 0, 1, 1, 1, 0, 1, 0]), np.array([1, 0, 1, 0, 1, 0, 1, 0, 1])]
    while len(chosen) < 16:
        distance = np.abs(every[:, None] - np.array(chosen)[None]).sum(2).min(1)
        chosen.append(every[distance.argmax()])
    cells = np.array(chosen, "float32").reshape(-1, 3, 3)
    return cells.repeat(GLYPH // 3, 1).repeat(GLYPH // 3, 2)


GLYPHS = _glyphs()


def draw_scenes(
    task: Task, count: int, rng: np.random.Generator, unseen: Iterable[str] = ()
) -> Scenes:
    """Draw all but the kinds.

    Parameters
    ----------
    task
    count
        Samples.
    rng
    unseen
        Of ``UNSEEN``, what is drawn as training never has it: glyphs that begin at
        ``HIDDEN_ROWS``, colours whose three channels have one sign, or louder noise.

    Raises
    ------
    UsageError
        For another word.
    """
    unseen = set(unseen)
    if unseen - set(UNSEEN):
        raise UsageError(f"unseen: {sorted(unseen - set(UNSEEN))} is not of {UNSEEN}")
    rows: np.ndarray = np.arange(task.height if task.frames else task.height - GLYPH + 1)
    if not task.frames:
        hidden = np.isin(rows, HIDDEN_ROWS)
        rows = rows[hidden if "rows" in unseen else ~hidden]
    first = (task.width - task.gap - sum(STRIPS)) // 2
    starts = (first, first + STRIPS[0] + task.gap)
    left = [
        start + rng.integers(strip - GLYPH + 1, size=count) for start, strip in zip(starts, STRIPS)
    ]
    colour = rng.standard_normal((count, 2, 3))
    # Of three signs one is alone, or else none is: which decides whether a colour is seen.
    if "colours" in unseen:
        colour = np.abs(colour) * rng.choice((-1, 1), (count, 2, 1))
    else:
        alike = abs(np.sign(colour).sum(2)) == 3
        colour[alike, rng.integers(3, size=int(alike.sum()))] *= -1
    colour *= 2 / np.linalg.norm(colour, axis=2, keepdims=True)
    loud = LOUD if "noise" in unseen else 1.0
    noise = rng.standard_normal((count, *task.shape), dtype="float32")
    return Scenes(
        top=rng.choice(rows, (count, 2)),
        left=np.stack(left, 1),
        colour=colour.astype("float32"),
        speed=rng.choice(SPEEDS, (count, 2)),
        glyph=rng.integers(2, size=(count, 2)),
        noise=noise * np.float32(loud * task.noise),
    )


def render(task: Task, scenes: Scenes, kinds: np.ndarray) -> np.ndarray:
    """Draw scenes with figures of these kinds.

    Parameters
    ----------
    task
    scenes
    kinds
        (n, 2) whole numbers below ``task.kinds``, or ``NOBODY``; of clips 0 is up, 1 down.

    Returns
    -------
    numpy.ndarray
        float32 (n, *task.shape), of mean 0.
    """
    out = scenes.noise.copy()
    for number, pair in enumerate(kinds):
        for side, kind in enumerate(pair):
            if kind == NOBODY:
                continue
            top, left = scenes.top[number, side], scenes.left[number, side]
            columns = slice(left, left + GLYPH)
            colour = scenes.colour[number, side][:, None, None]
            if not task.frames:
                out[number, :, top : top + GLYPH, columns] += colour * GLYPHS[kind]
                continue
            step = scenes.speed[number, side] * (1 if kind else -1)
            pattern = colour * GLYPHS[scenes.glyph[number, side]]
            for frame in range(task.frames):
                # What leaves at one end comes back at the other.
                rows = (top + frame * step + np.arange(GLYPH)) % task.height
                out[number, :, frame, rows, columns] += pattern.transpose(1, 0, 2)
    return out


def pairs(
    task: Task, count: int, rng: np.random.Generator, unseen: Iterable[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, label): label 1 where the two are of different kinds; half of them are."""
    scenes = draw_scenes(task, count, rng, unseen)
    label = rng.integers(2, size=count)
    kinds = rng.integers(task.kinds, size=(count, 2))
    other = (kinds[:, 0] + rng.integers(1, task.kinds, size=count)) % task.kinds
    kinds[:, 1] = np.where(label == 1, other, kinds[:, 0])
    return render(task, scenes, kinds), label.astype("float32")


def singles(task: Task, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, label) of samples with one figure only, on either side; label: its kind."""
    scenes = draw_scenes(task, count, rng)
    label = rng.integers(task.kinds, size=count)
    kinds = np.full((count, 2), NOBODY)
    kinds[np.arange(count), rng.integers(2, size=count)] = label
    return render(task, scenes, kinds), label.astype("float32")


def arrangements(task: Task, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, label) where kinds 0 and 1 are both there; label: whether 1 is left.

    Far from the borders both labels have the same patches, and no network of permutation
    equivariant blocks tells them apart; near the border zero padding says which side a patch is on.
    """
    label = rng.integers(2, size=count)
    scenes = draw_scenes(task, count, rng)
    return render(task, scenes, np.stack([label, 1 - label], 1)), label.astype("float32")


def quadruples(
    task: Task, count: int, rng: np.random.Generator, unseen: Iterable[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, label) of ``count`` quadruples, one after the other.

    The four samples of a quadruple have one scene and the kinds (a, a), (a, b), (b, a), (b, b).
    """
    scenes = draw_scenes(task, count, rng, unseen)
    a = rng.integers(task.kinds, size=count)
    b = (a + rng.integers(1, task.kinds, size=count)) % task.kinds
    kinds = np.stack([a, a, a, b, b, a, b, b], 1).reshape(-1, 2)
    scenes = Scenes(*(part.repeat(4, 0) for part in scenes))
    return render(task, scenes, kinds), np.tile([0, 1, 1, 0], count).astype("float32")


def shuffled_frames(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return clips with the frames of each in an order of its own."""
    return np.stack([clip[:, rng.permutation(clip.shape[1])] for clip in data])


class Score(NamedTuple):
    """How well quadruples are told apart.

    Attributes
    ----------
    accuracy, loss
        Share that is right, and mean cross entropy, which is ln 2 for a guess.
    all_four
        Share of quadruples with all four right: 1/16 for guesses, 0 for a local network.
    interaction
        Mean of |I|, and the largest.
    largest_interaction
    """

    accuracy: float
    loss: float
    all_four: float
    interaction: float
    largest_interaction: float


def score(logits: np.ndarray, label: np.ndarray) -> Score:
    """Score the logits (4 n, 2) of :func:`quadruples`."""
    margin = (logits[:, 1].astype("float64") - logits[:, 0]).reshape(-1, 4)
    signs = np.where(np.asarray(label).reshape(-1, 4) == 1, 1.0, -1.0)
    right = margin * signs > 0
    interaction = abs(margin @ np.array([-1.0, 1.0, 1.0, -1.0]))
    return Score(
        accuracy=float(right.mean()),
        loss=float(np.logaddexp(0, -margin * signs).mean()),
        all_four=float(right.all(1).mean()),
        interaction=float(interaction.mean()),
        largest_interaction=float(interaction.max()),
    )
