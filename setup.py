"""Packaging of glore-mxnet; see README.md for the scripts' own environment."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGES = ("network", "data", "train", "dataset")

EXTRAS = {
    "prepare": ["imageio-ffmpeg>=0.5"],
    "tensorboard": ["tensorboardX>=2.6"],
    "torch": ["torch>=2.0"],
    "dev": ["pytest>=8", "ruff==0.12.10", "wheel"],
}

setup(
    name="glore-mxnet",
    version="0.1.0",
    description="Graph-Based Global Reasoning Networks (GloRe) for MXNet",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9,<3.13",
    # A checkout has `network`, `data`, `train`, `dataset` at its top, as upstream. Installed, they
    # are parts of `glore`, so that nothing with a generic name lands in site-packages.
    packages=[f"glore.{name}" for name in PACKAGES],
    package_dir={f"glore.{name}": name for name in PACKAGES},
    py_modules=["glore_common", "mxnet_compat"],
    install_requires=[
        "mxnet==1.9.1",
        "numpy>=1.23,<2",
        # The newest wheels that accept NumPy 1. gluoncv asks for opencv-python by name, so pip
        # installs both; run_local.sh's environment has the headless one only (requirements.txt).
        "opencv-python-headless<4.12",
        "opencv-python<4.12",
        "decord==0.6.0",
        "pillow>=9",
        "gluoncv==0.10.5.post0",
        "setuptools<81",
        "tqdm>=4.60",
        "matplotlib>=3.7",
        "portalocker>=2.7",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
