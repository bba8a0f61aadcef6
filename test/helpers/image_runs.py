"""What the tests of the image scripts share: a tiny network, and folders of real image files."""

import dataclasses
import os

import cv2
import numpy as np

from network import builder
from network.builder import get_spec

CLASSES = ("blue", "green", "red")  # in the order of their BGR channels
NETWORK = "tiny-2d"


def add_tiny_network(monkeypatch):
    """Add a row of 8 to 16 channels, with a GloRe unit after conv4."""
    row = dataclasses.replace(
        get_spec("resnet18_w-glore_1-1").with_units(NETWORK, (0, 1)),
        blocks=(1, 1, 1, 1),
        num_mid=(8, 8, 16, 16),
        num_out=(8, 8, 16, 16),
        stem=get_spec("resnet18").stem._replace(width=8),
        data_shape=(3, 64, 64),
        num_classes=len(CLASSES),
    )
    monkeypatch.setattr(builder, "ALL_ROWS", (*builder.ALL_ROWS, row))


def write_images(root, per_class, seed=0):
    """Write JPEG files into one folder per class; each class is brightest in one channel."""
    generator = np.random.RandomState(seed)
    for channel, name in enumerate(CLASSES):
        folder = os.path.join(str(root), name)
        os.makedirs(folder)
        for number in range(per_class):
            size = (44 + 2 * number, 52) if number % 2 else (52, 44 + 2 * number)
            image = generator.randint(0, 120, (*size, 3)).astype("uint8")
            image[..., channel] += 110
            cv2.imwrite(os.path.join(folder, f"{number:02d}.jpg"), image)
