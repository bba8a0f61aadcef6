"""Packaging of glore-mxnet; see docs/install.md for the scripts' own environment.

A checkout has `network`, `data`, `train`, … at its top, as upstream. Installed, all of them lie
below `glore` (`glore.network`, …), so that nothing with a generic name lands in site-packages.
Rooms import each other by their names in a checkout; the build writes `glore.` in front of these.
"""

import ast
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).parent
ROOMS = ("network", "data", "train", "dataset", "checkpoint", "cluster", "jobs")
MODULES = ("glore_common", "glore_options", "mxnet_compat", "mxnet_gpu")
PACKAGES = [
    package for room in ROOMS for package in find_packages(str(ROOT), include=[room, f"{room}.*"])
]


def requirements(name):
    """Return the pinned packages of a requirements file, without comments."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def below_glore(source, path):
    """Return a module's source with the imports of this project's modules put below `glore`."""
    ours = {*ROOMS, *MODULES}
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            name, pattern, replacement = node.module, r"from +", r"\g<0>glore."
        elif isinstance(node, ast.Import):
            (alias, *others) = node.names
            name, pattern = alias.name, r"import +"
            if any(other.name.partition(".")[0] in ours for other in others) or (
                name.partition(".")[0] in ours and "." in name and not alias.asname
            ):
                raise SetupError(f"{path}:{node.lineno}: write this as `from … import …`")
            # `import network` binds the name `network`, and so must its replacement.
            replacement = r"\g<0>glore." if alias.asname else r"from glore import "
        else:
            continue
        if name.partition(".")[0] in ours:
            # ast counts columns in bytes; nothing but blanks stands before a statement here.
            line, start = lines[node.lineno - 1], node.col_offset
            rest = re.sub(rf"^{pattern}(?={re.escape(name)}\b)", replacement, line[start:])
            lines[node.lineno - 1] = line[:start] + rest
    return "".join(lines)


class BuildBelowGlore(build_py):
    """Copy modules into the build with :func:`below_glore` applied."""

    def run(self):
        """Build; refuse an editable installation, which would leave the imports as they are."""
        if self.editable_mode:
            raise SetupError(
                "an editable installation is not supported: use the checkout itself (its folder "
                "is the import path; docs/install.md), or pip install ."
            )
        super().run()

    def build_module(self, module, module_file, package):
        """Copy one module."""
        copied, changed = super().build_module(module, module_file, package)
        target = Path(copied)
        source = target.read_text(encoding="utf-8")
        target.write_text(below_glore(source, module_file), encoding="utf-8")
        return copied, changed


setup(
    name="glore-mxnet",
    version="0.1.0",
    description="Graph-Based Global Reasoning Networks (GloRe) for MXNet",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9,<3.14",
    packages=[f"glore.{package}" for package in PACKAGES],
    py_modules=[f"glore.{module}" for module in MODULES],
    package_dir={"glore": "", **{f"glore.{name}": name.replace(".", "/") for name in PACKAGES}},
    package_data={"glore.jobs": ["serve_page.html"]},
    cmdclass={"build_py": BuildBelowGlore},
    entry_points={"console_scripts": ["glore = glore.jobs.cli:main"]},
    install_requires=[
        # MXNet itself comes with one of the extras `cpu` and `gpu`: `mxnet` and `mxnet-cu117` hold
        # the same package and must never both be installed. Its own requirements are here, because
        # on Python 3.13 it is installed with --no-deps (it asks for NumPy 1).
        "graphviz>=0.8.1,<0.9",
        "requests>=2.20",
        "numpy>=1.23,<2; python_version < '3.13'",
        # NumPy 2.3 has no ndarray.tostring, with which mx.recordio packs images.
        "numpy>=2.1,<2.3; python_version >= '3.13'",
        # As gluoncv asks for. requirements.txt has the headless one, which needs no libGL.
        "opencv-python<4.12; python_version < '3.13'",
        "opencv-python>=4.12,<4.13; python_version >= '3.13'",
        "decord==0.6.0",
        "av>=15.1",
        "pillow>=9",
        "gluoncv==0.10.5.post0",
        "setuptools<81",
        "tqdm>=4.60",
        "matplotlib>=3.7",
        "portalocker>=2.7",
        "pyyaml>=6",
    ],
    extras_require={
        "cpu": ["mxnet==1.9.1; python_version < '3.13'"],
        "gpu": [
            f"{line}; python_version < '3.13'" if line.startswith("mxnet") else line
            for line in requirements("requirements-gpu.txt")
        ],
        "prepare": ["imageio-ffmpeg>=0.5"],
        "tensorboard": ["tensorboardX>=2.6"],
        # Other versions write or read other operator sets; see network/onnx_graph.py.
        "onnx": ["onnx>=1.16,<2", "onnxruntime>=1.18"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "torch": ["torch>=2.0"],
        # The digits of benchmark/open_questions.py; wheels for Python 3.9 to 3.13.
        "study": ["scikit-learn==1.6.1"],
        # Cityscapes' own scores; the package asks for more than its evaluation imports.
        "cityscapes": ["cityscapesscripts>=2.2", "pyquaternion>=0.9.5"],
        # Average precision; NumPy 1 and 2, wheels for Python 3.9 to 3.13.
        "detection": ["pycocotools>=2.0.8"],
        "dev": [
            "pytest>=8",
            "ruff==0.12.10",
            "mypy==1.18.2",
            "types-PyYAML",
            "types-tqdm",
            "wheel",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
