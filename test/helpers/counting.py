"""Datasets that count or weigh, for the tests of loaders and workers; imports nothing of MXNet."""

import os
import time

import numpy as np

from data.common.samples import Dataset, Sample


class Numbers(Dataset):
    """Items that are their own number; what is read is noted in ``folder``, as empty files.

    ``payload`` is pickled with it, ``weight`` bytes travel with each request.
    """

    origin, advice = "the numbers", ""

    def __init__(self, folder, count, payload=b"", weight=0):
        self.folder = str(folder)
        self.count = count
        self.payload = payload
        self.weight = weight

    def __len__(self):
        return self.count

    def shape_of(self, index):
        return (1, 2)

    def name(self, index):
        return f"number {index}"

    def request(self, index):
        return index, bytes(self.weight)

    def load(self, request, rng):
        number, _ = request
        open(os.path.join(self.folder, f"{number}-{time.monotonic_ns()}"), "w").close()
        return Sample(np.full((1, 2), number, np.float32), number)

    def read(self):
        """Return the numbers that were read, sorted; one read twice comes twice."""
        return sorted(int(name.split("-")[0]) for name in os.listdir(self.folder))
