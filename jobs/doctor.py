"""A report of what this machine has and lacks for training: ``python -m mxnet_compat``.

Works without MXNet: that it does not load is one of the findings.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from typing import NamedTuple, Optional

import mxnet_gpu
from glore_common import GloReError, module_command

# Build features of MXNet that matter here.
FEATURES = ("MKLDNN", "OPENMP", "DIST_KVSTORE", "CUDA", "CUDNN", "NCCL")
# Enough for the small networks; RESNET50_GLORE at batch 8 takes about 8 GB.
LITTLE_MEMORY = 2 << 30
_MARK = "  ! "


class Finding(NamedTuple):
    """One line of the report.

    Attributes
    ----------
    subject, text : str
        What was looked at, and what it is.
    problem : str
        What is wrong with it and how to cure it; empty when all is well.
    fatal : bool
        Training cannot work before it is cured.
    """

    subject: str
    text: str
    problem: str = ""
    fatal: bool = False


def main(argv: Optional[list[str]] = None) -> int:
    """Print the report; returns 1 when training cannot work."""
    parser = argparse.ArgumentParser(
        prog=module_command("mxnet_compat") if sys.argv[0].endswith(".py") else None,
        description="Say what this machine has and lacks for training.",
    )
    parser.parse_args(argv)
    findings = examine()
    print(report(findings))
    return int(any(finding.fatal for finding in findings))


def examine() -> list[Finding]:
    """Look at everything; MXNet before decord, the other order crashes."""
    mx, mxnet = _mxnet()
    findings = [_python(), _version("NumPy", "numpy"), mxnet]
    if mx is not None:
        findings += [_features(mx), _step(mx), _threads()]
    findings += [_memory(), *_gpus(mx), *_opencv(), _decord(), _pyav(), _ffmpeg(), _gluoncv()]
    return findings + _folders()


def report(findings: list[Finding]) -> str:
    """Return the text: a line per finding, its problem beneath it, and the verdict."""
    width = max(len(finding.subject) for finding in findings) + 2
    lines = []
    for finding in findings:
        lines.append(f"{finding.subject:{width}}{finding.text}".rstrip())
        lines += [_MARK + line for line in finding.problem.splitlines()]
    problems = [finding for finding in findings if finding.problem]
    if any(finding.fatal for finding in problems):
        lines.append("\nTraining cannot work here: " + _subjects(f for f in problems if f.fatal))
    elif problems:
        lines.append("\nTraining works; see the remarks on " + _subjects(problems))
    else:
        lines.append("\nTraining works.")
    return "\n".join(lines)


def _subjects(findings):
    return ", ".join(dict.fromkeys(finding.subject for finding in findings))


def _python():
    return Finding(
        "Python", f"{platform.python_version()} ({sys.executable}, {platform.platform()})"
    )


def _version(subject, distribution, problem="", fatal=False):
    """Return the finding of an installed distribution; ``problem`` when it is missing."""
    try:
        return Finding(subject, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return Finding(subject, "not installed", problem, fatal)


def _mxnet():
    """Return (the module or None, its finding)."""
    try:
        from mxnet_compat import mx
    except GloReError as error:
        return None, Finding("MXNet", "does not load", str(error), fatal=True)
    except ImportError as error:
        cure = f"{error}. Install the packages again: ./run_local.sh, or pip install glore-mxnet"
        return None, Finding("MXNet", "does not load", cure, fatal=True)
    build = ", ".join(mxnet_gpu.installed_builds()) or "own build"
    return mx, Finding("MXNet", f"{mx.__version__} ({build}, {os.path.dirname(mx.__file__)})")


def _features(mx):
    features = mx.runtime.Features()
    on = [name for name in FEATURES if features.is_enabled(name)]
    problem = ""
    if "MKLDNN" not in on:
        problem = "this MXNet is built without oneDNN: a CPU computes several times slower"
    elif os.environ.get("MXNET_MKLDNN_ENABLED") == "0":
        problem = "MXNET_MKLDNN_ENABLED=0 switches oneDNN off: unset it, or a CPU is slow"
    return Finding("built with", ", ".join(on).replace("MKLDNN", "oneDNN"), problem)


def _step(mx):
    """Try the forward and backward of one convolution."""
    try:
        data, weight = mx.nd.ones((2, 3, 8, 8)), mx.nd.ones((4, 3, 3, 3))
        weight.attach_grad()
        with mx.autograd.record():
            out = mx.nd.Convolution(data, weight, kernel=(3, 3), num_filter=4, no_bias=True)
        out.backward()
        total = float(weight.grad.sum().asscalar())
    except mx.MXNetError as error:
        return Finding("a step", "failed", str(error).strip().splitlines()[-1], fatal=True)
    # 4 * 3 * 3 * 3 weights, each seen at 6 x 6 positions of 2 images.
    expected = 108 * 72
    problem = "" if total == expected else f"a gradient sums up to {total}, not {expected}"
    return Finding("a step", "computed" if not problem else "wrong", problem, bool(problem))


def _threads():
    from mxnet_compat import physical_cores

    threads, cores = os.environ.get("OMP_NUM_THREADS", ""), physical_cores()
    problem = ""
    if threads != str(cores):
        problem = (
            f"OMP_NUM_THREADS={threads} is set, this process may use {cores} physical cores: "
            f"unset it or set {cores}, unless several processes share the machine"
        )
    logical = os.cpu_count() or cores
    return Finding("threads", f"{threads} on {cores} cores ({logical} logical in all)", problem)


def _memory():
    total, available = _meminfo()
    if total is None:
        return Finding("memory", "unknown")
    text = f"{available / 2**30:.1f} of {total / 2**30:.1f} GB available"
    low = available < LITTLE_MEMORY
    return Finding("memory", text, "use a small --batch-size and --crop-size" if low else "")


def _meminfo():
    """Return (total, available) bytes, within the limit of a container."""
    try:
        with open("/proc/meminfo") as stream:
            rows = dict(line.split(":") for line in stream)
    except OSError:
        return None, None
    total, available = (int(rows[k].split()[0]) << 10 for k in ("MemTotal", "MemAvailable"))
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            with open(f"{folder}/{limit}") as most, open(f"{folder}/{usage}") as used:
                allowed = int(most.read())  # "max" is no number: no limit
                available = min(available, allowed - int(used.read()))
                total = min(total, allowed)
        except (OSError, ValueError):
            continue
    return total, max(available, 0)


def _gpus(mx):
    driver = mxnet_gpu.read_driver()
    gpu_build = mx is not None and mx.runtime.Features().is_enabled("CUDA")
    cuda = f"driver of CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else "no driver"
    if driver.problem and (gpu_build or driver.cuda):
        return [Finding("GPU", cuda, f"{driver.problem}; the CPU is used")]
    findings = [Finding("GPU", cuda if driver.gpus else f"none ({cuda})")]
    for gpu in driver.gpus:
        # Of a build of the user's own nothing is known; the one for CPUs could be changed.
        unknown = gpu_build and not mxnet_gpu.is_wheel()
        problem = "" if gpu.has_kernels or unknown else mxnet_gpu.kernel_problem(gpu)
        if gpu.has_kernels and mx is not None and not gpu_build:
            problem = f"this MXNet is built for the CPU. {_how_to_install()}"
        text = (
            f"{gpu.name}, {gpu.memory / 2**30:.1f} GB, compute capability "
            f"{gpu.capability[0]}.{gpu.capability[1]}"
        )
        findings.append(Finding(f"GPU {gpu.number}", text, problem))
    return findings


def _how_to_install():
    from mxnet_compat import how_to_install

    return how_to_install()


def _opencv():
    names = ("opencv-python", "opencv-python-headless")
    found = [_version("OpenCV", name) for name in names]
    installed = [n for n, finding in zip(names, found) if finding.text != "not installed"]
    problem = ""
    if len(installed) > 1:
        problem = (
            "opencv-python and opencv-python-headless overwrite each other: pip uninstall -y "
            "opencv-python opencv-python-headless, then install one of them"
        )
    try:
        import cv2
    except ImportError as error:
        problem = (
            f"{error}. pip install opencv-python-headless"
            if not installed
            else f"{error}. On a slim Debian or Ubuntu: apt-get install libgl1 libglib2.0-0"
        )
        return [Finding("OpenCV", "does not load", problem, fatal=True)]
    return [Finding("OpenCV", f"{cv2.__version__} ({', '.join(installed) or 'own'})", problem)]


def _decord():
    try:
        decord = importlib.import_module("decord")
    except (ImportError, OSError) as error:
        return Finding("decord", "does not load", f"{error}: pip install decord==0.6.0, for videos")
    return Finding("decord", decord.__version__)


def _pyav():
    try:
        return Finding("PyAV", importlib.import_module("av").__version__)
    except (ImportError, OSError) as error:
        return Finding("PyAV", "does not load", f"{error}: pip install av, for videos")


def _ffmpeg():
    from dataset.prepare_videos import find_ffmpeg

    try:
        return Finding("FFmpeg", find_ffmpeg())
    except GloReError as error:
        return Finding("FFmpeg", "none", str(error))


def _gluoncv():
    return _version("gluoncv", "gluoncv", "pretrained weights by name need it: pip install gluoncv")


def _folders():
    from dataset.config import default_data_root

    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        found = [Finding("temporary", "none", f"{error}: set TMPDIR to a folder", fatal=True)]
    else:
        found = [_folder("temporary", temporary, "set TMPDIR to another one", fatal=True)]
    exps = os.path.abspath("exps")
    found.append(_folder("results", exps, "start elsewhere, or name --model-dir and --log-file"))
    found.append(_folder("data sets", default_data_root(), "name another one with --data-root"))
    home = os.environ.get("MXNET_HOME", os.path.join(os.path.expanduser("~"), ".mxnet"))
    cure = "set MXNET_HOME to another one, if weights are to be downloaded"
    return [*found, _folder("weights", home, cure)]


def _folder(subject, path, cure, fatal=False):
    """Say whether a folder, or the nearest one above it that exists, can be written to."""
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError:
        return Finding(subject, path, f"not writable: {cure}", fatal)
    free = shutil.disk_usage(existing).free
    return Finding(subject, f"{path} ({free / 2**30:.0f} GB free)")
