"""The demo data: short videos of a moving scene, generated from a seed.

Eight classes of motion: the scene pans left, right, up or down, it zooms in or out, or it turns
clockwise or counter-clockwise. A single frame does not tell which: scenes are random, and every
frame of every class is drawn from one and the same distribution. For the zooms this takes a scene
that looks alike at every scale: it is a sum of octaves of periodic noise in which the weight of an
octave depends on the wavelength that it has *on the screen*. Zooming in, coarse octaves fade out
while fine ones fade in (the picture version of R. Shepard's endless scale, 1964).

The videos are real encoded files (MPEG-4 in AVI) in the layout of Kinetics.

    python -m dataset.demo [--root DIR] [--clips-per-class N] [--force]
"""

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, Callable, Optional

import cv2
import numpy as np

from glore_common import GloReError, PathLike, module_command, run_main
from glore_options import JobOptions, group, parse

from .config import DatasetConfig, get_config
from .generated import Counts, GeneratedOptions, Make, Recipe, count_option, prepare_generated

# Raise it with every change of what is generated: data of another version are made anew.
GENERATOR_VERSION = 2
SEED = 1

CLASSES = (
    "pan_left",
    "pan_right",
    "pan_up",
    "pan_down",
    "zoom_in",
    "zoom_out",
    "turn_clockwise",
    "turn_counterclockwise",
)
TRAIN_CLIPS_PER_CLASS = 160
VAL_CLIPS_PER_CLASS = 25
WIDTH, HEIGHT, NUM_FRAMES, FRAME_RATE = 128, 96, 24, 25

# Motion on the screen: what the slowest and the fastest clips do from one frame to the next.
PAN_PIXELS = (1.2, 2.5)
ZOOM_FACTOR = (1.02, 1.04)
TURN_DEGREES = (1.5, 3.0)

TILE_SIZE = 128  # side of a tile of noise; it repeats without a seam
TILE_WAVELENGTH = 5.0  # typical wavelength in a tile, in its own pixels
OCTAVES = 8  # wavelengths 1, 2, … 128 pixels at scale 1
SCREEN_WAVELENGTH = 12.0  # the strongest wavelength on the screen, in pixels
ENVELOPE_OCTAVES = 0.75  # standard deviation of the weights around it
WEIGHTLESS = 0.03  # octaves below this weight are not drawn

# All scenes have one look. Random colours, brightness and contrast say nothing of the motion, and a
# network of this size spends most of a short training on becoming blind to them.
COLOUR = (0.9, 1.0, 1.1)  # of light and dark, BGR
BRIGHTNESS = 125.0
CONTRAST = 45.0

_SPLITS = ("train", "val")


def _noise_tile(rng: np.random.Generator) -> np.ndarray:
    """Return one periodic tile of noise, float32 (TILE_SIZE, TILE_SIZE), standard deviation 1."""
    noise = rng.standard_normal((TILE_SIZE, TILE_SIZE), dtype=np.float32)
    margin = 8
    padded = cv2.copyMakeBorder(noise, *(margin,) * 4, cv2.BORDER_WRAP)
    smooth = cv2.GaussianBlur(padded, (0, 0), 1.3)[margin:-margin, margin:-margin]
    # tanh turns soft clouds into blobs with edges; how much differs from octave to octave.
    shaped = np.tanh(smooth / smooth.std() * rng.uniform(0.3, 2.0))
    return (shaped / shaped.std()).astype(np.float32)


def _screen_to_scene(
    motion: str, amount: float, rng: np.random.Generator
) -> Callable[[int], tuple[np.ndarray, float]]:
    """Return the function frame number -> (2x3 matrix from screen to scene, scale on the screen).

    ``amount`` in 0..1 goes from the slowest to the fastest. Scale and angle of the scene are
    random for every class, as what a zoom or a turn passes through must be no hint.
    """
    centre = np.array(
        [WIDTH * (0.5 + rng.uniform(-0.12, 0.12)), HEIGHT * (0.5 + rng.uniform(-0.12, 0.12))]
    )
    start_angle = rng.uniform(0, 2 * math.pi)
    # One octave covers everything: at twice the scale the scene has the same statistics.
    start_scale = 2 ** rng.uniform(0, 1)
    drift_angle = rng.uniform(0, 2 * math.pi)
    velocity = rng.uniform(0, 0.25) * np.array([math.cos(drift_angle), math.sin(drift_angle)])
    zoom = 1.0
    turn = 0.0

    kind, _, direction = motion.partition("_")
    if kind == "pan":
        # y points down on the screen
        heading = {"right": 0.0, "down": 0.5, "left": 1.0, "up": 1.5}[direction] * math.pi
        heading += math.radians(rng.uniform(-12, 12))
        speed = PAN_PIXELS[0] + amount * (PAN_PIXELS[1] - PAN_PIXELS[0])
        velocity = speed * np.array([math.cos(heading), math.sin(heading)])
    elif kind == "zoom":
        zoom = ZOOM_FACTOR[0] + amount * (ZOOM_FACTOR[1] - ZOOM_FACTOR[0])
        zoom = zoom if direction == "in" else 1 / zoom
    elif kind == "turn":
        turn = math.radians(TURN_DEGREES[0] + amount * (TURN_DEGREES[1] - TURN_DEGREES[0]))
        turn = turn if direction == "clockwise" else -turn
    else:
        raise ValueError(f"unknown motion {motion!r}")

    def at(frame: int) -> tuple[np.ndarray, float]:
        scale = start_scale * zoom**frame
        angle = start_angle - turn * frame
        rotation = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
        matrix = rotation / scale
        # The scene point on screen at centre + d in frame 0 is now at
        # centre + zoomed and turned d + velocity · frame; this is the way back.
        offset = -matrix @ (centre + velocity * frame)
        return np.column_stack([matrix, offset]), scale

    return at


def render_clip(motion: str, seed: Sequence[int]) -> np.ndarray:
    """Draw one clip.

    Parameters
    ----------
    motion
        One of ``CLASSES``.
    seed
        The clip is a function of ``motion`` and ``seed``.

    Returns
    -------
    numpy.ndarray
        uint8 (NUM_FRAMES, HEIGHT, WIDTH, 3), in OpenCV's channel order BGR.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    tiles = [_noise_tile(rng) for _ in range(OCTAVES)]
    origins = rng.uniform(0, TILE_SIZE, (OCTAVES, 2))
    at = _screen_to_scene(motion, rng.uniform(), rng)

    frames = np.empty((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(NUM_FRAMES):
        to_scene, scale = at(number)
        picture = np.zeros((HEIGHT, WIDTH), np.float32)
        power = 0.0
        # The scale lies between 0.4 and 4.9 (a start of 1 to 2, times 23 steps of zoom): octaves
        # from 1 to 128 pixels are then all that the envelope lets through, 3 to 48 on the screen.
        for octave in range(OCTAVES):
            wavelength = 2.0**octave
            distance = math.log2(wavelength * scale / SCREEN_WAVELENGTH) / ENVELOPE_OCTAVES
            weight = math.exp(-0.5 * distance**2)
            if weight < WEIGHTLESS:
                continue
            to_tile = to_scene * (TILE_WAVELENGTH / wavelength)
            to_tile[:, 2] += origins[octave]
            layer = cv2.warpAffine(
                tiles[octave],
                to_tile,
                (WIDTH, HEIGHT),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_WRAP,
            )
            picture += weight * layer
            power += weight**2
        picture *= CONTRAST / math.sqrt(power)
        coloured = BRIGHTNESS + picture[..., None] * np.array(COLOUR, np.float32)
        frames[number] = np.clip(coloured, 0, 255).astype(np.uint8)
    return frames


def _write_clip(path: str, frames: np.ndarray) -> None:
    writer = cv2.VideoWriter(
        path, cv2.VideoWriter.fourcc(*"XVID"), FRAME_RATE, (frames.shape[2], frames.shape[1])
    )
    if not writer.isOpened():
        raise GloReError(
            f"OpenCV cannot encode MPEG-4 to {path}: is the disk full, or is this OpenCV built "
            "without FFmpeg? (opencv-python-headless of requirements.txt has it)"
        )
    for frame in frames:
        writer.write(frame)
    writer.release()


def _make_clips(
    folder: str, clips: Sequence[tuple[str, int, tuple[int, ...]]]
) -> list[tuple[str, int]]:
    """Write clips ``(sub/path, class number, seed)`` below ``folder``; return their sizes."""
    sizes = []
    for path, class_number, seed in clips:
        full = os.path.join(folder, path)
        _write_clip(full, render_clip(CLASSES[class_number], seed))
        # OpenCV does not report a write that failed, for instance on a full disk.
        capture = cv2.VideoCapture(full)
        complete = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == NUM_FRAMES
        capture.release()
        if not complete:
            raise GloReError(f"{full} was not written completely: is the disk full?")
        sizes.append((path, os.path.getsize(full)))
    return sizes


def _parameters(counts: Counts) -> dict[str, Any]:
    return {
        "generator": GENERATOR_VERSION,
        "seed": SEED,
        "classes": list(CLASSES),
        "size": [WIDTH, HEIGHT],
        "frames": NUM_FRAMES,
        "clips_per_class": counts,
    }


def _generate(raw: str, counts: Counts, make: Make) -> dict[str, int]:
    """Write clips, lists and mapping table below ``raw``; return the files' sizes by path."""
    clips = []
    lists = {}
    config = get_config("Demo")  # for the files' places below its own "raw"
    final_raw = os.path.join(config.root, "raw")
    for split_number, split in enumerate(_SPLITS):
        video_root = os.path.relpath(getattr(config, f"{split}_root"), final_raw)
        rows = []
        for class_number, motion in enumerate(CLASSES):
            os.makedirs(os.path.join(raw, video_root, motion))
            for index in range(counts[split]):
                sub_path = f"{motion}/{motion}_{index:04d}.avi"
                seed = (SEED, split_number, class_number, index)
                clips.append((os.path.join(video_root, sub_path), class_number, seed))
                rows.append((class_number, sub_path))
        # A part of the list, or its order, must not give the class away.
        order = np.random.default_rng([SEED, split_number]).permutation(len(rows))
        shuffled = [rows[position] for position in order]
        text = "".join(f"{v_id} {row[0]} {row[1]}\n" for v_id, row in enumerate(shuffled))
        lists[os.path.relpath(getattr(config, f"{split}_list"), final_raw)] = text
    lists[os.path.relpath(config.mapping_table, final_raw)] = "".join(
        f"{label}\t{motion}\n" for label, motion in enumerate(CLASSES)
    )
    files = make(_make_clips, clips)
    for path, text in lists.items():
        full = os.path.join(raw, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "w", encoding="utf-8") as stream:
            stream.write(text)
        files[path] = os.path.getsize(full)
    return files


RECIPE = Recipe(
    what="demo data",
    command=module_command("dataset.demo"),
    unit="clip",
    parameters=_parameters,
    count_key="clips_per_class",
    default_counts={"train": TRAIN_CLIPS_PER_CLASS, "val": VAL_CLIPS_PER_CLASS},
    write=_generate,
)


@dataclasses.dataclass
class DemoOptions(GeneratedOptions):
    """What the command makes."""

    clips_per_class: Optional[int] = count_option("training clips", TRAIN_CLIPS_PER_CLASS)
    val_clips_per_class: Optional[int] = count_option("validation clips", VAL_CLIPS_PER_CLASS)


@dataclasses.dataclass
class DemoJobOptions(JobOptions):
    """All options of the command."""

    demo: DemoOptions = group(DemoOptions)


def prepare_demo(
    data_root: Optional[PathLike] = None,
    clips_per_class: Optional[int] = None,
    val_clips_per_class: Optional[int] = None,
    jobs: Optional[int] = None,
    force: bool = False,
) -> DatasetConfig:
    """Make the demo data unless they are there, complete and of this version.

    See :mod:`dataset.generated` for how they appear.

    Parameters
    ----------
    data_root
        Folder that holds ``Demo/raw/…``, as for :func:`dataset.get_config`.
    clips_per_class, val_clips_per_class
        None keeps what is there, and makes 160 and 25 where nothing is.
    jobs
        Processes; by default as many as there are processors, at most 8. The data do not depend
        on it.
    force
        Make the data anew in any case.

    Raises
    ------
    UsageError
        A number below 1.
    GloReError
        The place is taken by files of someone else, or cannot be written.
    """
    config = get_config("Demo", data_root)
    counts = {"train": clips_per_class, "val": val_clips_per_class}
    prepare_generated(config.root, RECIPE, counts, jobs, force)
    return config


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    description = "Make the demo data: short videos of eight kinds of motion."
    options = parse(DemoJobOptions(), argv, description, prog=RECIPE.command).demo
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = prepare_demo(**dataclasses.asdict(options))
    print(f"Demo data: {os.path.join(config.root, 'raw')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
