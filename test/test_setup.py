"""The scripts' environment, and the wheel."""

import os
import shutil
import subprocess
import sys

import pytest

# Stands in for an interpreter: says whether it is a supported one, makes an "environment" that
# holds itself, and records what it is asked to install.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*) exit {unsupported} ;;
"-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-m pip") echo "$@" >> "{log}" ;;
"--version ") echo "Python {version}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path, root):
    """Return a folder with the set-up scripts, without an environment, and a bin folder."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("env.sh", "requirements.txt"):
        shutil.copy(os.path.join(root, name), folder)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "basename", "mkdir", "cp", "cmp", "flock"):
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


def test_environment_is_made_once_with_the_first_supported_python(checkout):
    add_python(checkout, "python3", "3.13.0", supported=False)
    add_python(checkout, "python3.10", "3.10.4", supported=True)
    first = source(checkout)
    assert first.returncode == 0, first.stderr
    assert "Python 3.10.4" in first.stderr
    assert first.stdout.strip() == str(checkout / ".venv/bin/python")
    assert len(pip_calls(checkout)) == 1
    assert f"--no-deps -r {checkout}/requirements.txt" in pip_calls(checkout)[0]
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
    add_python(checkout, "python3", "3.13.0", supported=False)
    done = source(checkout)
    assert done.returncode == 1
    assert "no Python 3.9 to 3.12 found (python3 is Python 3.13.0)" in done.stderr
    assert "uv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_chosen_python_that_does_not_fit_is_named(checkout):
    add_python(checkout, "python3", "3.11.2", supported=True)
    chosen = add_python(checkout, "mine", "3.8.1", supported=False)
    done = source(checkout, PYTHON=chosen)
    assert done.returncode == 1
    assert f"PYTHON={chosen} is not a Python 3.9 to 3.12" in done.stderr
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


def test_wheel_installs_everything_below_glore(root, tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".*", "exps", "raw", "test", "build", "*.egg-info")
    shutil.copytree(root, tree, ignore=ignore)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("glore_mxnet-*.whl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    top_level = {name for name in os.listdir(target) if "." not in name or name.endswith(".py")}
    assert top_level - {"__pycache__"} == {"glore", "glore_common.py", "mxnet_compat.py"}
    code = (
        "import glore.network, glore.data, glore.train, glore.dataset, sys\n"
        "symbol, conf = glore.network.get_symbol('TINY_GLORE')\n"
        "print(glore.network.__file__, 'network' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(target / "glore/network/__init__.py"), "False"], done.stderr
