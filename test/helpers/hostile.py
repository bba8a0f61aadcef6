"""Jobs for worker processes that behave badly; imports nothing of MXNet."""

import os

import numpy as np

from data.common.samples import Dataset, Sample


class Greedy(Dataset):
    """Items of which number 1 takes 16 GiB."""

    origin, advice = "greedy items", ""

    def __len__(self):
        return 3

    def shape_of(self, index):
        return (1, 2)

    def name(self, index):
        return f"number {index}"

    def request(self, index):
        return index

    def load(self, request, rng):
        if request == 1:
            return Sample(np.ones((1, 2), np.float32), len(np.ones(2**34, np.uint8)))
        return Sample(np.full((1, 2), request, np.float32), request)


class Chatty(Greedy):
    """Items that a library in C says something about."""

    def load(self, request, rng):
        os.write(2, b"libpng warning: iCCP: known incorrect sRGB profile\n")
        return Sample(np.full((1, 2), request, np.float32), request)
