"""Weights for the golden figures: a value that depends only on a parameter's name and shape."""

import os
import zlib

import numpy as np

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "golden")
# Damping that keeps whole networks in the range of float32; longest match is not needed, the
# first fragment found in the name counts.
GAIN = {"conv_proj": 0.003, "conv-proj": 0.03, "GCN-GHW": 0.03, "fc-2": 0.1}


def seeded(name, shape, salt=0, gentle=True):
    """Return the float32 array that the golden figures use for parameter ``name``.

    ``gentle`` damps some layers for whole networks; the stand-alone blocks use ``gentle=False``.
    """
    shape = tuple(shape)
    generator = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    is_vector_weight = name.split(".")[-1] == "weight" and len(shape) == 1
    if name.endswith(("running_var", "moving_var")):
        value = generator.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", "moving_mean")):
        value = generator.uniform(-0.1, 0.1, shape)
    elif name.endswith("gamma") or is_vector_weight:
        low, high = (5e-4, 2e-3) if gentle and "blocker" in name else (0.5, 1.5)
        value = generator.uniform(low, high, shape)
    elif name.endswith(("beta", "bias")):
        value = generator.uniform(-0.1, 0.1, shape)
    else:
        gain = next((g for key, g in GAIN.items() if key in name), 1.0) if gentle else 1.0
        value = generator.standard_normal(shape) * gain / np.sqrt(np.prod(shape[1:]))
    return value.astype("float32")


def read_table(file_name):
    """Yield (name, shape) of each line of a ``torch_*.tsv`` golden table."""
    with open(os.path.join(GOLDEN, file_name)) as stream:
        for line in stream:
            name, shape = line.rstrip("\n").split("\t")
            yield name, tuple(int(size) for size in shape.split(",") if size)
