"""Fixtures of the whole suite."""

import os

import numpy as np
import pytest
from golden_weights import GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Return a function that opens a file of ``test/golden`` (``.npz`` as arrays by key)."""

    def load(name):
        path = os.path.join(GOLDEN, name)
        return np.load(path) if name.endswith(".npz") else path

    return load


@pytest.fixture(scope="session")
def root():
    """Return the checkout's root folder."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
