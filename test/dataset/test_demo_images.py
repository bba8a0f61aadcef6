"""dataset/demo_images.py: what the images show, and that they are made once and completely."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

import dataset
from data.image.source import read_image_folder
from dataset import demo_images
from glore_common import UsageError


def figures(class_name, seed):
    """Return the two figures' places, sizes and hues as they are drawn, found in the picture.

    The layout is drawn with the generator's own functions in its own order.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    demo_images._background(rng)
    rng.permutation(demo_images.HUES)
    return demo_images._layout(class_name.split("_")[0], rng)


def hue_at(picture, point):
    x, y = (int(value) for value in point)
    # Numbers of floating point: an image without much contrast has few whole ones for a hue.
    patch = picture[y - 2 : y + 3, x - 2 : x + 3].astype(np.float32).mean((0, 1)) / 255
    return cv2.cvtColor(patch[None, None], cv2.COLOR_BGR2HLS)[0, 0, 0].item()


@pytest.mark.parametrize("class_name", demo_images.CLASSES)
def test_image_shows_its_class(class_name):
    place, likeness = class_name.split("_")
    for number in range(30):
        picture = demo_images.render_image(class_name, (5, number))
        disc_at, disc, square_at, square = figures(class_name, (5, number))
        right, down = disc_at - square_at
        if place == "inside":
            assert max(abs(right), abs(down)) + disc < square
        else:
            steep = abs(down) > 1.5 * abs(right)
            flat = abs(right) > 1.5 * abs(down)
            seen = {"above": steep and down < 0, "below": steep and down > 0, "beside": flat}
            assert seen[place]
            assert np.hypot(right, down) > disc + square
        # Nothing of a figure may be lost to a crop, 64 of 73 at a random place.
        for centre, radius in ((disc_at, disc), (square_at, square)):
            assert centre.min() - radius > 96 * 9 / 73 - 1e-6
            assert centre.max() + radius < 96 - 96 * 9 / 73 + 1e-6
        # The square's colour where the disc does not cover it: in a corner.
        corner = square_at - np.sign(disc_at - square_at + 1e-9) * (square - 5)
        difference = abs(hue_at(picture, disc_at) - hue_at(picture, corner)) % 360
        difference = min(difference, 360 - difference)
        assert difference < 30 if likeness == "same" else difference > 60


def test_contrast_is_drawn_evenly_on_a_log_scale(monkeypatch):
    low, high = demo_images.CONTRAST
    seeds = [(6, number) for number in range(60)]

    def spreads():
        return np.array(
            [demo_images.render_image("above_other", seed).std((0, 1)).mean() for seed in seeds]
        )

    varied = spreads()
    monkeypatch.setattr(demo_images, "CONTRAST", (1.0, 1.0))
    # The same images in full contrast; whole numbers and those cut off at 255 leave some error.
    shares = varied / spreads()
    assert low - 0.02 < shares.min() < 1.4 * low
    assert high / 1.4 < shares.max() < high + 0.02
    assert np.log(shares).mean() == pytest.approx(np.log([low, high]).mean(), abs=0.2)


def test_image_is_a_function_of_class_and_seed():
    first = demo_images.render_image("above_same", (1, 2))
    assert first.shape == (96, 96, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, demo_images.render_image("above_same", (1, 2)))
    assert np.abs(first.astype(int) - demo_images.render_image("above_same", (1, 3))).mean() > 10
    with pytest.raises(ValueError, match="unknown class"):
        demo_images.render_image("above", (1, 2))


def test_made_once_in_folders_of_classes(tmp_path, root):
    numbers = {"images_per_class": 2, "val_images_per_class": 1, "test_images_per_class": 1}
    config = dataset.prepare_demo_images(tmp_path, jobs=1, **numbers)
    assert config.class_names == demo_images.CLASSES
    for part, number in (("train", 2), ("val", 1), ("test", 1)):
        source = read_image_folder(getattr(config, f"{part}_root"))
        assert source.class_names == config.class_names
        assert [label for _, label in source.samples] == np.repeat(range(8), number).tolist()
    path = os.path.join(config.test_root, "beside_other", "beside_other_0000.jpg")
    drawn = demo_images.render_image("beside_other", (demo_images.SEED, 2, 4, 0))
    assert np.abs(cv2.imread(path).astype(int) - drawn).mean() < 6
    with open(os.path.join(config.root, "raw", "manifest.json")) as stream:
        manifest = json.load(stream)
    assert manifest["images_per_class"] == {"train": 2, "val": 1, "test": 1}
    assert len(manifest["files"]) == 32
    stamp = tmp_path / "DemoImages" / "raw" / "stamp"
    stamp.touch()
    dataset.prepare_demo_images(tmp_path, jobs=1)
    assert stamp.exists()
    with open(path, "rb") as stream:
        before = stream.read()
    os.remove(path)
    command = [sys.executable, "-m", "dataset.demo_images", "--root", str(tmp_path), "--jobs", "2"]
    done = subprocess.run(
        [*command, "--images-per-class", "2", "--val-images-per-class", "1"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"{path.split('raw/')[1]} is missing" in done.stderr
    assert not stamp.exists()
    # The number of test images was not given: it stays what it was.
    assert [len(names) for *_, names in os.walk(config.test_root)] == [0] + [1] * 8
    with open(path, "rb") as stream:
        assert stream.read() == before
    with pytest.raises(UsageError, match="test images per class must be 1 or more, not 0"):
        dataset.prepare_demo_images(tmp_path, test_images_per_class=0)
