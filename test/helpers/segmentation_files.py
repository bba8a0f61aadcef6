"""Trees of images and masks in the layouts of public data sets, for tests."""

import os

import numpy as np
from PIL import Image


def save(path, array, **options):
    """Write a picture; its folder is made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(path, **options)
    return str(path)


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 255, (height, width, 3)).astype("uint8")


def cityscapes_tree(root, counts, size=(32, 64), ids=(7, 11, 23, 26), seed=0):
    """Make Cityscapes' layout: rectangles of ids, each with its grey value; and instance ids."""
    generator = np.random.RandomState(seed)
    for split, count in counts.items():
        for number in range(count):
            stem = f"town/town_{number:06d}_000019"
            mask = np.full(size, ids[0], np.uint8)
            mask[:2] = 1  # the ego vehicle: not labelled
            for value in ids[1:]:
                top, left = generator.randint(2, size[0] - 8), generator.randint(0, size[1] - 16)
                mask[top : top + 8, left : left + 16] = value
            image = np.repeat(mask[..., None] * 8, 3, axis=2)
            image[..., 1] = generator.randint(0, 30, size)
            save(f"{root}/leftImg8bit/{split}/{stem}_leftImg8bit.png", image)
            if split != "test":
                save(f"{root}/gtFine/{split}/{stem}_gtFine_labelIds.png", mask)
                instances = np.where(mask >= 24, mask.astype(np.uint16) * 1000, mask)
                save(
                    f"{root}/gtFine/{split}/{stem}_gtFine_instanceIds.png",
                    instances.astype(np.uint16),
                )
    return str(root)
