"""The scripts' environment, and the wheel."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from setuptools.errors import SetupError
from stub_cuda import build_stub
from videos import write_list, write_video

from glore_common import command, module_command
from jobs.cli import COMMANDS

# Stands in for an interpreter: says whether it is a supported one, makes an "environment" that
# holds itself, records what it is asked to install, and knows whether there is a driver.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*libcuda*) [ -e "{log}.driver" ]; exit ;;
"-c "*) exit {unsupported} ;;
"-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-m pip") echo "$@" >> "{log}"; for file; do :; done; cp "$file" "{log}.requirements" ;;
"--version ") echo "Python {version}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path, root):
    """Return a folder with the set-up scripts, without an environment, and a bin folder."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("env.sh", "requirements.txt", "requirements-gpu.txt"):
        shutil.copy(os.path.join(root, name), folder)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in (
        "bash",
        "sh",
        "dirname",
        "basename",
        "cat",
        "mkdir",
        "cp",
        "rm",
        "mv",
        "cmp",
        "id",
        "flock",
    ):
        (tools / name).symlink_to(shutil.which(name))
    return folder


def add_python(checkout, name, version, supported):
    path = checkout.parent / "bin" / name
    log = checkout.parent / "pip.log"
    path.write_text(FAKE_PYTHON.format(unsupported=int(not supported), version=version, log=log))
    path.chmod(0o755)
    return path


def source(checkout, **variables):
    environment = {
        "PATH": str(checkout.parent / "bin"),
        "HOME": str(checkout.parent),
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.run(
        ["bash", "-c", "set -euo pipefail; . ./env.sh; echo $PYTHON"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )


def pip_calls(checkout):
    log = checkout.parent / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def installed(checkout):
    return (checkout.parent / "pip.log.requirements").read_text()


def test_environment_is_made_once_with_the_first_supported_python(checkout):
    add_python(checkout, "python3", "3.14.0", supported=False)
    add_python(checkout, "python3.10", "3.10.4", supported=True)
    first = source(checkout)
    assert first.returncode == 0, first.stderr
    assert "Python 3.10.4" in first.stderr
    assert first.stdout.strip() == str(checkout / ".venv/bin/python")
    assert len(pip_calls(checkout)) == 1
    assert "--no-deps -r" in pip_calls(checkout)[0]
    assert installed(checkout) == (checkout / "requirements.txt").read_text()
    second = source(checkout)
    assert (second.returncode, second.stderr) == (0, "")
    assert len(pip_calls(checkout)) == 1


def test_changed_requirements_are_installed_into_the_same_environment(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    source(checkout)
    with open(checkout / "requirements.txt", "a") as stream:
        stream.write("# changed\n")
    marker = checkout / ".venv" / "kept"
    marker.touch()
    assert source(checkout).returncode == 0
    assert len(pip_calls(checkout)) == 2
    assert marker.exists()


def test_no_supported_python_is_one_clear_message(checkout):
    add_python(checkout, "python3", "3.14.0", supported=False)
    done = source(checkout)
    assert done.returncode == 1
    assert "no Python 3.9 to 3.13 found (python3 is Python 3.14.0)" in done.stderr
    assert "uv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_chosen_python_that_does_not_fit_is_named(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    chosen = add_python(checkout, "mine", "3.8.1", supported=False)
    done = source(checkout, PYTHON=chosen)
    assert done.returncode == 1
    assert f"PYTHON={chosen} is not a Python 3.9 to 3.13" in done.stderr
    assert not (checkout / ".venv").exists()


def test_failed_installation_is_tried_again(checkout):
    python = add_python(checkout, "python3", "3.11.2", supported=True)
    working = python.read_text()
    python.write_text(working.replace('"-m pip")', '"-m pip") exit 1;'))
    failed = source(checkout)
    assert failed.returncode == 1
    assert "could not be installed" in failed.stderr
    (checkout / ".venv/bin/python").write_text(working)
    assert source(checkout).returncode == 0
    assert len(pip_calls(checkout)) == 1


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.13", "3.14"])
def test_which_pythons_fit(root, tmp_path, version):
    minor = int(version.split(".")[1])
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, {minor}, 0)\n'
        'exec(open(0).read())" <<END\n$2\nEND\n'
    )
    python.chmod(0o755)
    function = "glore_python_fits() {" + Path(root, "env.sh").read_text().split("fits() {")[1]
    function = function.split("\n}\n")[0] + "\n}"
    done = subprocess.run(["bash", "-c", f"{function}; glore_python_fits {python}"])
    assert (done.returncode == 0) == (9 <= minor <= 13)


def test_gpu_environment_has_one_mxnet_and_a_folder_of_its_own(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    (checkout.parent / "pip.log.driver").touch()
    done = source(checkout, GLORE_GPU=1)
    assert done.stdout.strip() == str(checkout / ".venv-gpu/bin/python"), done.stderr
    lines = installed(checkout).splitlines()
    assert [line for line in lines if line.startswith("mxnet")] == ["mxnet-cu117==1.9.1"]
    assert [line for line in lines if line.startswith(("numpy==1", "nvidia-cudnn"))]
    assert source(checkout, GLORE_GPU=1).stderr == ""
    assert source(checkout, GLORE_GPU=0).stdout.strip() == str(checkout / ".venv/bin/python")
    assert "mxnet==1.9.1" in installed(checkout).splitlines()


def test_gpu_environment_without_a_driver_downloads_nothing(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    done = source(checkout, GLORE_GPU=1)
    assert done.returncode == 1
    assert "GLORE_GPU is set, but this machine has no NVIDIA driver" in done.stderr
    assert not (checkout / ".venv-gpu").exists()
    assert pip_calls(checkout) == []


def test_a_driver_that_is_not_used_is_told_once(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    (checkout.parent / "bin" / "nvidia-smi").symlink_to(shutil.which("true"))
    assert "for MXNet on the GPU: GLORE_GPU=1" in source(checkout).stderr
    assert source(checkout).stderr == ""


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_a_checkout_of_another_user_without_environment_is_one_clear_message(root):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to others
        os.chmod(folder, 0o755)
        for name in ("env.sh", "requirements.txt"):
            shutil.copy(os.path.join(root, name), folder)
        done = subprocess.run(
            ["bash", "-c", "set -euo pipefail; . ./env.sh"],
            cwd=folder,
            user="nobody",
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert f"{folder} is not writable for nobody" in done.stderr


# --- odd places


@pytest.fixture(scope="module")
def odd_checkout(root):
    """Return a checkout with blanks and non-ASCII letters in its path, videos and .venv."""
    with tempfile.TemporaryDirectory(prefix="glore ä b ") as folder:
        os.chmod(folder, 0o755)
        place = Path(folder) / "Bücher & Regale"
        copy_checkout(root, place)
        environment = place / ".venv"
        environment.mkdir()
        for name in os.listdir(sys.prefix):
            if not name.startswith("."):
                (environment / name).symlink_to(os.path.join(sys.prefix, name))
        shutil.copy(place / "requirements.txt", environment / ".requirements-installed")
        raw = place / "dataset" / "Kinetics" / "raw"
        for split in ("train", "val"):
            videos = raw / "data" / f"{split}_avi-288p"
            videos.mkdir(parents=True)
            names = [f"größe {number}.avi" for number in range(8)]
            for name in names:
                write_video(str(videos / name), codec="MJPG")
            (raw / "list_cvt").mkdir(exist_ok=True)
            write_list(raw / "list_cvt", names, name=f"kinetics_{split}_avi.txt")
        (raw / "list_cvt" / "mapping_table.txt").write_text(
            "".join(f"{number}\tclass {number}\n" for number in range(400))
        )
        yield place


ODD = {
    "nothing set": {},
    "no home": {"HOME": "/proc/none", "LC_ALL": "C"},
    "no temporary folder": {"HOME": "/root", "TMPDIR": "/none", "LANG": "C"},
}
DRY_RUN = (
    *("--dataset", "Kinetics", "--dry-run", "--batch-size", "2", "--clip-length", "4"),
    *("--crop-size", "32", "--train-frame-interval", "1", "--val-frame-interval", "1"),
)


@pytest.mark.parametrize("name", ODD)
def test_run_local_works_in_odd_places(odd_checkout, name):
    done = subprocess.run(
        ["./run_local.sh", *DRY_RUN],
        cwd=odd_checkout,
        env={"PATH": os.environ["PATH"], **ODD[name]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,  # no terminal
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"One batch: loss" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_run_local_works_in_the_checkout_of_another_user(odd_checkout):
    try:
        subprocess.run([sys.executable, "-c", ""], user="nobody", check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this interpreter is closed to other users")
    done = subprocess.run(
        ["./run_local.sh", *DRY_RUN],
        cwd=odd_checkout,
        env={"PATH": os.environ["PATH"]},
        user="nobody",
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"One batch: loss" in done.stderr


# --- the wheel


def copy_checkout(root, target):
    ignore = shutil.ignore_patterns(".*", "exps", "raw", "build", "*.egg-info", "__pycache__")
    shutil.copytree(root, target, ignore=ignore)


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """Return the path of the project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(root, folder / "tree")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)],
        cwd=folder / "tree",
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("glore_mxnet-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Return a folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def run_installed(site, folder, *arguments):
    """Run Python with the installed wheel; the checkout is not on its path."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_wheel_installs_everything_below_glore(site, tmp_path):
    top_level = {name for name in os.listdir(site) if not name.endswith(".dist-info")}
    assert top_level - {"__pycache__", "bin"} == {"glore"}
    code = (
        "import importlib, pkgutil, sys\n"
        "import glore\n"
        "found = [m.name for m in pkgutil.walk_packages(glore.__path__, 'glore.')]\n"
        "for name in found:\n"
        "    importlib.import_module(name)\n"
        "tops = {name.partition('.')[0] for name in found} | set(sys.modules)\n"
        "rooms = {name.split('.')[1] for name in found}\n"
        "print(len(found) > 60, sorted(rooms & tops))"
    )
    done = run_installed(site, tmp_path, "-c", code)
    assert done.stdout == "True []\n", done.stderr


def test_installed_commands_say_their_own_names(site, tmp_path):
    glore = site / "bin" / "glore"
    done = run_installed(site, tmp_path, glore, "train-kinetics", "--help")
    assert done.stdout.startswith("usage: glore train-kinetics"), done.stderr
    done = run_installed(site, tmp_path, glore, "train-kinetics", "--network", "TINI_GLORE")
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0)
    assert "glore train-kinetics: error:" in done.stderr
    done = run_installed(site, tmp_path, glore, "train-kinetic")
    assert done.returncode == 2
    assert "no command 'train-kinetic' (closest: train-kinetics" in done.stderr
    done = run_installed(site, tmp_path, glore, "doctor")
    assert (done.returncode, "Training works" in done.stdout) == (0, True), done.stderr
    done = run_installed(site, tmp_path, "-m", "glore.mxnet_compat")
    assert (done.returncode, "Training works" in done.stdout) == (0, True), done.stderr
    assert run_installed(site, tmp_path, glore).returncode == 2
    done = run_installed(site, tmp_path, "-m", "glore.data.verify", "--help")
    assert done.stdout.startswith("usage: python -m glore.data.verify"), done.stderr
    code = (
        "from glore.glore_common import command, module_command\n"
        "print(command('train_kinetics'), '|', module_command('data.verify'))"
    )
    done = run_installed(site, tmp_path, "-c", code)
    assert done.stdout == "glore train-kinetics | python -m glore.data.verify\n"


def test_commands_are_those_of_the_checkout():
    assert command("train-kinetics") == "python train_kinetics.py"
    assert module_command("data.verify") == "python -m data.verify"
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(f"jobs.{module}"), module


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from network import a, b\n", "from glore.network import a, b\n"),
        (
            "from data.common.loader import (\n    a,\n)\n",
            "from glore.data.common.loader import (\n    a,\n)\n",
        ),
        ("import mxnet_compat  # why\n", "from glore import mxnet_compat  # why\n"),
        ("import data.common.pool as p\n", "import glore.data.common.pool as p\n"),
        ("if 1:\n    from train import loop\n", "if 1:\n    from glore.train import loop\n"),
        ("from .data import a\nfrom network_x import b\nimport json\n", None),
        ('"""Example.\n\nfrom network import a\n"""\n', None),
    ],
)
def test_imports_are_put_below_glore(setup_module, before, after):
    changed = setup_module["below_glore"](before, "m.py")
    assert changed == (before if after is None else after)


@pytest.mark.parametrize("source", ["import network.specs\n", "import json, network\n"])
def test_imports_that_cannot_be_put_below_glore_stop_the_build(setup_module, source):
    with pytest.raises(SetupError, match="m.py:1: write this as"):
        setup_module["below_glore"](source, "m.py")


@pytest.fixture(scope="module")
def setup_module(root):
    """Return the names of setup.py, without its call of ``setup``."""
    path = os.path.join(root, "setup.py")
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    names = {"__file__": path, "__name__": "setup"}
    exec(compile(tree, path, "exec"), names)
    return names


def make_environment(folder):
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / "bin" / "python")


USE_IT = """
import glore.network, numpy as np
from glore.mxnet_compat import mx
from glore.network.block import build_block
symbol, conf = glore.network.get_symbol("TINY_GLORE", num_classes=3)
block = build_block(symbol, conf)
block.initialize() if hasattr(block, "initialize") else None
trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.1})
data = mx.nd.random.uniform(shape=(2, *conf.data_shape))
loss_of = mx.gluon.loss.SoftmaxCrossEntropyLoss()
with mx.autograd.record():
    loss = loss_of(block(data), mx.nd.array([0, 1]))
loss.backward()
trainer.step(2)
print("trained", bool(np.isfinite(block(data).asnumpy()).all()))
"""


@pytest.mark.slow
def test_pip_install_in_a_fresh_environment(wheel, tmp_path):
    python = make_environment(tmp_path / "env")
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, f"glore-mxnet[cpu] @ file://{wheel}"], check=True)
    if sys.version_info >= (3, 13):
        subprocess.run([*install, "--no-deps", "mxnet==1.9.1"], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True
    ).stdout
    assert [x.split("==")[0] for x in listed.split() if x.startswith("opencv")] == ["opencv-python"]
    done = subprocess.run([python, "-c", USE_IT], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "trained True\n", done.stderr
    glore = tmp_path / "env" / "bin" / "glore"
    done = subprocess.run([glore, "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    code = "import network"
    assert subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True).returncode == 1


@pytest.mark.slow
def test_pip_install_without_an_extra_says_which_to_choose(wheel, tmp_path):
    python = make_environment(tmp_path / "env")
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    glore = tmp_path / "env" / "bin" / "glore"
    done = subprocess.run([glore, "train-kinetics"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MXNet is not installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_gpu_environment_loads_with_a_stub_of_the_driver(root, tmp_path):
    place = tmp_path / "checkout"
    copy_checkout(root, place)
    variables = {**os.environ, "GLORE_GPU": "1", "PYTHON": sys.executable}
    without = subprocess.run(
        ["./run_local.sh", "--dry-run"], cwd=place, env=variables, capture_output=True, text=True
    )
    assert without.returncode == 1
    assert "no NVIDIA driver" in without.stderr
    variables["LD_LIBRARY_PATH"] = str(build_stub(tmp_path))
    command = ["bash", "-c", 'set -eu; . ./env.sh; exec "$PYTHON" -m mxnet_compat']
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.9.1 (mxnet-cu117" in done.stdout
    assert "CUDA, CUDNN, NCCL" in done.stdout
    assert "Training works" in done.stdout
