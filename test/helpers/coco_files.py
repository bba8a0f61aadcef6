"""Small files of COCO's format, with their images, for tests."""

import json
import os

import numpy as np
from segmentation_files import save


def annotation(number, image=1, category=1, box=(2, 3, 10, 8), **more):
    """Return an annotation whose mask is its box."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        **more,
    }


def content(annotations, images=((1, 40, 60),), categories=((1, "cat"), (2, "dog"))):
    """Return the content of a file: images are (id, height, width)."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, h, w in images
        ],
        "annotations": list(annotations),
        "categories": [{"id": i, "name": name} for i, name in categories],
    }


def write_coco(folder, what, name="objects.json", pictures=True):
    """Write a file, and noise for its images; return (file, folder of images)."""
    os.makedirs(f"{folder}/images", exist_ok=True)
    path = f"{folder}/{name}"
    with open(path, "w") as stream:
        json.dump(what, stream)
    for number, row in enumerate(what["images"] if pictures else ()):
        generator = np.random.RandomState(number)
        image = generator.randint(0, 255, (row["height"], row["width"], 3)).astype("uint8")
        save(f"{folder}/images/{row['file_name']}", image)
    return path, f"{folder}/images"


def coloured_boxes(folder, counts, sizes=((64, 80), (80, 64)), seed=0):
    """Write trees with a red and a blue kind of rectangle; return {part: (file, images)}."""
    written = {}
    for part, count in counts.items():
        generator = np.random.RandomState(seed + len(written))
        images, rows, arrays = [], [], []
        for number in range(1, count + 1):
            height, width = sizes[number % len(sizes)]
            images.append((number, height, width))
            array = generator.randint(90, 120, (height, width, 3)).astype("uint8")
            for category in (1, 2)[: 1 + number % 2]:
                wide, high = (int(v) for v in generator.randint(16, 30, 2))
                left = int(generator.randint(0, width - wide))
                top = int(generator.randint(0, height - high))
                array[top : top + high, left : left + wide] = ((250, 0, 0), (0, 0, 250))[
                    category - 1
                ]
                rows.append(annotation(len(rows) + 1, number, category, (left, top, wide, high)))
            arrays.append(array)
        path, root = write_coco(
            f"{folder}/{part}", content(rows, images, ((1, "red"), (2, "blue"))), pictures=False
        )
        for number, array in enumerate(arrays, 1):
            save(f"{root}/{number}.png", array)
        written[part] = (path, root)
    return written
