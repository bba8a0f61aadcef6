"""Real encoded image files, and datasets that misbehave, for the tests of data/.

Imports nothing of MXNet: worker processes unpickle the datasets from here.
"""

import os
import signal
import subprocess
import sys

import cv2
import numpy as np

from data.image.dataset import ImageDataset

MEAN, STD = (0.47, 0.46, 0.45), (0.28, 0.27, 0.29)


def picture(seed, height=60, width=80):
    """Return a smooth random picture (height, width, 3) uint8, RGB."""
    noise = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)


def write_image(path, rgb):
    """Encode an RGB image by the path's extension."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.lower().endswith("g") else []
    encoded, content = cv2.imencode(os.path.splitext(path)[1].lower(), rgb[..., ::-1], quality)
    assert encoded
    with open(path, "wb") as stream:
        stream.write(content.tobytes())
    return path


def make_classes(root, classes=3, images=4, size=None):
    """Write ``images`` JPEG files in each of ``classes`` folders (c0, c1, …); return the root.

    Sizes (height, width) vary unless ``size`` is given.
    """
    rng = np.random.RandomState(0)
    for label in range(classes):
        for number in range(images):
            height, width = size or rng.randint(50, 90, 2)
            path = os.path.join(str(root), f"c{label}", f"i{number}.jpg")
            write_image(path, picture(10 * label + number, height, width))
    return str(root)


def run_im2rec(checkout, prefix, folder, *options):
    """Run MXNet's im2rec: list, then pack; return the .rec file's path."""
    tool = [sys.executable, "-m", "dataset.im2rec"]
    listing = ["--list", "--recursive", prefix, folder]
    for arguments in (listing, [*(options or ["--pass-through"]), prefix, folder]):
        done = subprocess.run(
            [*tool, *arguments], cwd=checkout, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    return f"{prefix}.rec"


def pack(folder, prefix):
    """Pack a folder of classes as im2rec does, in sorted order; return the .rec file's path."""
    from mxnet_compat import mx

    writer = mx.recordio.MXIndexedRecordIO(f"{prefix}.idx", f"{prefix}.rec", "w")
    names = [
        os.path.join(name, file)
        for name in sorted(os.listdir(folder))
        for file in sorted(os.listdir(os.path.join(folder, name)))
    ]
    for key, name in enumerate(names):
        with open(os.path.join(folder, name), "rb") as stream:
            header = mx.recordio.IRHeader(0, int(name[1]), key, 0)
            writer.write_idx(key, mx.recordio.pack(header, stream.read()))
    writer.close()
    return f"{prefix}.rec"


class KillingImages(ImageDataset):
    """Kills its process at ``c1/i1.jpg``."""

    def load(self, request, rng):
        if str(request[0]).endswith(os.path.join("c1", "i1.jpg")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(request, rng)
