"""MXNet on today's NumPy, the GPU build's libraries and driver, and the report on a machine."""

import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from stub_cuda import build_stub

import mxnet_compat
import mxnet_gpu
from glore_common import UsageError
from jobs import doctor
from jobs.doctor import Finding
from mxnet_compat import mx
from mxnet_gpu import GPU, Driver
from train.devices import contexts_of
from train.options import DeviceOptions

ON_NUMPY_1 = int(np.__version__.split(".")[0]) < 2


def run_python(root, *arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """Return a folder with a ``libcuda.so.1`` whose driver has no GPU of its own."""
    return build_stub(tmp_path_factory.mktemp("stub"))


# --- NumPy


def test_numpy_is_as_before_once_mxnet_is_imported(root):
    code = (
        "import numpy, sys\n"
        "from numpy import ctypeslib, testing\n"  # submodules that MXNet loads
        "before, answer = dict(vars(numpy)), numpy.__getattr__\n"
        "import mxnet_compat\n"
        "changed = {n for n, v in vars(numpy).items() if n not in before or before[n] is not v}\n"
        "print(sorted(n for n in changed if not isinstance(getattr(numpy, n), type(sys))))\n"
        "print(numpy.__getattr__ is answer)"
    )
    done = run_python(root, "-c", code)
    assert done.stdout.splitlines() == ["['bool']" if ON_NUMPY_1 else "[]", "True"], done.stderr


def test_removed_names_are_answered_to_mxnet_only():
    with mxnet_compat._removed_numpy_names():
        names = {"np": np, "__name__": "mxnet.numpy.fallback"}
        exec("found = np.name_that_never_was", names)
        with pytest.raises(AttributeError, match="no numpy.name_that_never_was"):
            names["found"](1)
        if not ON_NUMPY_1:
            exec("found = np.NINF", names)
            assert names["found"] == -np.inf
        with pytest.raises(AttributeError):
            np.name_that_never_was  # noqa: B018


def test_shapes_with_numpy_integers_reach_the_library():
    two, three = np.array([2, 3])
    assert mx.nd.zeros(shape=(two, three)).shape == (2, 3)
    assert mx.nd.ones((6,)).reshape((two, three)).shape == (2, 3)
    symbol = mx.sym.reshape(mx.sym.var("data", shape=(np.int64(6),)), shape=(two, three))
    assert symbol.infer_shape()[1] == [(2, 3)]
    layer = mx.gluon.nn.Dense(4, in_units=np.prod((3, 1)))
    layer.initialize()
    layer.hybridize()
    assert layer(mx.nd.ones((2, 3))).shape == (2, 4)


def test_an_epochs_loss_is_added_up_in_double_precision():
    metric = mx.metric.Loss()
    for _ in range(2):  # after a reset too
        metric.update(None, [mx.nd.array([2.0**24])])
        metric.update(None, [mx.nd.array([1.0])])
        assert metric.sum_metric == metric.global_sum_metric == 2**24 + 1
        metric.reset()


def test_moveaxis_and_the_estimators_handlers_work_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mx.nd.moveaxis(mx.nd.ones((2, 3, 4)), 0, 2).shape == (3, 4, 2)
        handlers = mx.gluon.contrib.estimator.event_handler
        stopper = handlers.EarlyStoppingHandler(mx.metric.Loss(), mode="min")
        stopper.train_begin(None)
        assert stopper.best == np.inf


# --- what is installed


def test_two_builds_of_mxnet_are_refused(root, tmp_path):
    for name, version in (("mxnet", "1.9.1"), ("mxnet-cu117", "1.9.1")):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = "import glore_common, sys\nglore_common.run_main(lambda a: __import__('mxnet_compat'))"
    done = run_python(root, "-c", code, PYTHONPATH=tmp_path)
    assert "mxnet and mxnet-cu117 are installed, which overwrite each other" in done.stderr
    assert "pip uninstall -y mxnet mxnet-cu117" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "python", "expected"),
    [
        ("", (3, 11), "GLORE_GPU=1 ./run_local.sh"),
        ("glore", (3, 12), "pip install 'glore-mxnet[cpu]'"),
        ("glore", (3, 12), "pip install 'glore-mxnet[gpu]'"),
        ("glore", (3, 13), "pip install --no-deps mxnet==1.9.1"),
    ],
)
def test_without_mxnet_the_message_says_which_to_install(monkeypatch, package, python, expected):
    monkeypatch.setattr(mxnet_compat, "__package__", package)
    monkeypatch.setattr(
        mxnet_compat.importlib.util, "find_spec", lambda name: name != "mxnet" or None
    )
    monkeypatch.setattr(mxnet_compat.sys, "version_info", python)
    with pytest.raises(mxnet_compat.EnvironmentProblem, match="MXNet is not installed") as caught:
        mxnet_compat._check_builds()
    assert expected in str(caught.value)


# --- GPUs


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((3, 5), False),
        ((5, 2), True),
        ((6, 1), True),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), False),
        ((12, 0), False),
    ],
)
def test_which_gpus_have_kernels(capability, expected):
    assert GPU(0, "some", capability, 1).has_kernels == expected


@pytest.fixture
def ada_and_hopper(monkeypatch):
    """Pretend that MXNet's GPU build is installed, and that there are two GPUs."""
    gpus = (GPU(0, "Ada", (8, 9), 1), GPU(1, "Hopper", (9, 0), 1))
    monkeypatch.setattr(mxnet_gpu, "read_driver", lambda: Driver((12, 2), gpus, None))
    monkeypatch.setattr(mxnet_gpu, "installed_builds", lambda: ["mxnet-cu117"])
    monkeypatch.setattr(mx.runtime.Features, "is_enabled", lambda self, name: True)


@pytest.mark.usefixtures("ada_and_hopper")
def test_a_gpu_without_kernels_is_named_before_work_begins(caplog):
    assert contexts_of(DeviceOptions(gpus=(0,))) == [mx.gpu(0)]
    with pytest.raises(UsageError) as caught:
        contexts_of(DeviceOptions(gpus=(0, 1)))
    message = "GPU 1 (Hopper) has compute capability 9.0; MXNet 1.9.1 has kernels for 5.0"
    assert message in str(caught.value)
    assert contexts_of(DeviceOptions()) == [mx.gpu(0)]
    assert message in caplog.text


@pytest.mark.usefixtures("ada_and_hopper")
def test_of_a_users_own_build_nothing_is_known(monkeypatch):
    monkeypatch.setattr(mxnet_gpu, "installed_builds", lambda: ["mxnet"])
    assert contexts_of(DeviceOptions()) == [mx.gpu(0), mx.gpu(1)]


@pytest.mark.usefixtures("ada_and_hopper")
def test_a_broken_driver_leaves_the_cpu_and_is_told(monkeypatch, caplog):
    monkeypatch.setattr(mxnet_gpu, "read_driver", lambda: Driver(None, (), "it does not answer"))
    assert contexts_of(DeviceOptions()) == [mx.cpu()]
    assert "No GPU can be used: it does not answer" in caplog.text


def test_driver_and_gpus_are_read_from_the_driver(root, stub):
    code = "import mxnet_gpu; print(mxnet_gpu.read_driver())"
    without = run_python(root, "-c", code, LD_LIBRARY_PATH=stub)
    assert without.stdout == "Driver(cuda=(11, 8), gpus=(), problem=None)\n", without.stderr
    one = run_python(root, "-c", code, LD_LIBRARY_PATH=stub, GLORE_STUB_GPU=86)
    assert "gpus=(GPU(number=0, name='Stub', capability=(8, 6), memory=1073741824),)" in one.stdout


def test_an_old_driver_is_a_problem(root, stub):
    code = "import mxnet_gpu; print(mxnet_gpu.read_driver().problem)"
    done = run_python(root, "-c", code, LD_LIBRARY_PATH=stub, GLORE_STUB_DRIVER=10020)
    assert done.stdout == "the NVIDIA driver knows CUDA 10.2 only, MXNet needs 11.0: update it\n"


def test_libraries_come_from_the_wheels_unless_the_system_has_them(root, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    system = tmp_path / "cuda"
    system.mkdir()
    for name, wheel in mxnet_gpu.LIBRARIES:
        folder = tmp_path / "site" / "nvidia" / wheel / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", tmp_path / "empty.c", "-o"]
        subprocess.run([*command, folder / name], check=True)
    own = "libcudart.so.11.0"
    shutil.copy(tmp_path / "site/nvidia/cuda_runtime/lib" / own, system / own)
    code = (
        "import ctypes, mxnet_gpu\n"
        "print(*mxnet_gpu.load_libraries(), sep='\\n')\n"
        "ctypes.CDLL('libcudnn.so.8')\n"  # found by name from now on, as MXNet asks for it
        "print(mxnet_gpu.missing_libraries())"
    )
    done = run_python(
        root, "-c", code, PYTHONPATH=tmp_path / "site", LD_LIBRARY_PATH=system, PYTHONNOUSERSITE=1
    )
    *loaded, missing = done.stdout.splitlines()
    expected = [name for name, _ in mxnet_gpu.LIBRARIES if name != own]
    assert [os.path.basename(path) for path in loaded] == expected, done.stderr
    assert missing == "['libcuda.so.1']"


def test_the_gpu_build_without_a_driver_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(mxnet_gpu, "missing_libraries", lambda: ["libnccl.so.2", "libcuda.so.1"])
    message = mxnet_compat._library_problem(OSError("libnccl.so.2: no such file"), on_gpu=True)
    assert "needs the NVIDIA driver, and this machine has none" in message
    monkeypatch.setattr(mxnet_gpu, "missing_libraries", lambda: ["libnccl.so.2"])
    message = mxnet_compat._library_problem(OSError("libnccl.so.2: no such file"), on_gpu=True)
    assert "finds no libnccl.so.2" in message


# --- the report


def test_report_of_this_machine(root):
    done = run_python(root, "-m", "mxnet_compat")
    assert done.returncode == 0, done.stdout + done.stderr
    subjects = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert {"Python", "NumPy", "MXNet", "threads", "memory", "GPU", "OpenCV"} <= subjects
    assert {"decord", "PyAV"} <= subjects
    assert f"NumPy       {np.__version__}" in done.stdout
    assert "oneDNN" in done.stdout


def test_report_names_a_gpu_that_mxnet_cannot_use_and_one_that_it_could(root, stub):
    done = run_python(root, "-m", "mxnet_compat", LD_LIBRARY_PATH=stub, GLORE_STUB_GPU=90)
    assert "compute capability 9.0; MXNet 1.9.1 has kernels for" in done.stdout
    assert (done.returncode, "Training works; see" in done.stdout) == (0, True)
    done = run_python(root, "-m", "mxnet_compat", LD_LIBRARY_PATH=stub, GLORE_STUB_GPU=86)
    assert "this MXNet is built for the CPU" in done.stdout
    assert "GLORE_GPU=1 ./run_local.sh" in done.stdout


def test_report_of_an_environment_that_cannot_train(monkeypatch, capsys):
    def broken():
        return None, Finding("MXNet", "does not load", "say why", fatal=True)

    monkeypatch.setattr(doctor, "_mxnet", broken)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "  ! say why" in out
    assert out.endswith("Training cannot work here: MXNet\n")


@pytest.mark.parametrize("fatal", [False, True])
def test_a_folder_that_cannot_be_written_to_has_its_cure(fatal):
    finding = doctor._folder("results", "/proc/results", "use another", fatal)
    assert finding == Finding("results", "/proc/results", "not writable: use another", fatal)
