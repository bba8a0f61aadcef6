"""compare_released.py end to end: its exit codes, tables and figures."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest
from golden_weights import GOLDEN, seeded

from checkpoint.graph import read_symbol, save
from checkpoint.params import param_shapes, read_params
from glore_common import run_main
from jobs.compare_released import main
from mxnet_compat import mx
from network import get_symbol

RENAMED = "conv4_B03_extra_conv-state_conv_weight"
RESHAPED = "conv3_B02_conv-m1_bn_gamma"
REMOVED = "tail_bn_moving_var"
COMMON = ("--gpus", "", "--batch-size", "2")


def weights_of(symbol, size=224, change=None):
    """Return {arg:name or aux:name: NDArray} by the rule of the golden figures."""
    args, auxs = param_shapes(symbol, {"data": (1, 3, size, size)})
    found = {f"arg:{name}": seeded(name, shape) for name, shape in args.items()}
    found.update({f"aux:{name}": seeded(name, shape) for name, shape in auxs.items()})
    return {name: mx.nd.array(value) for name, value in {**found, **(change or {})}.items()}


def write(prefix, symbol, params):
    symbol.save(f"{prefix}-symbol.json")
    mx.nd.save(f"{prefix}-0000.params", params)
    return str(prefix)


def compare(folder, *arguments):
    """Run the script's main in this process; return (exit code, report or None)."""
    output = os.path.join(folder, "report")
    arguments = [*map(str, arguments), *COMMON, "--output", output]
    code = run_main(main, arguments)
    if not os.path.exists(f"{output}.json"):
        return code, None
    assert os.path.exists(f"{output}.md")
    with open(f"{output}.json") as stream:
        return code, json.load(stream)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return the prefix of a checkpoint of the released graph with seeded weights."""
    symbol = read_symbol(os.path.join(GOLDEN, "released_resnet50_w-glore_2-3-symbol.json"))
    return write(tmp_path_factory.mktemp("released") / "net", symbol, weights_of(symbol))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the prefix of a small network: 18 layers, one unit per stage, four classes."""
    symbol, _ = get_symbol("resnet18_w-glore_1-1", 4)
    return write(tmp_path_factory.mktemp("small") / "net", symbol, weights_of(symbol))


def test_released_graph_is_equal_through_the_script(released, root, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, os.path.join(root, "compare_released.py")),
            *("--checkpoint", released, *COMMON, "--output", "report"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "396 of 396 matched" in done.stdout
    assert "get_symbol('resnet50_w-glore_2-3', 1000, fixed_pool=True)" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equal"]
    assert report["outputs"]["largest_relative_difference"] < 1e-5
    assert report["outputs"]["largest_logit"] > 0.01
    assert report["outputs"]["top1_agreement"] == report["outputs"]["top5_agreement"] == 1
    assert report["published_top1"] == 78.2
    assert "396 of 396 matched" in (tmp_path / "report.md").read_text()


def test_renamed_reshaped_and_removed_parameters_are_named(released, tmp_path, capsys):
    params = {name: mx.nd.array(v) for name, v in read_params(f"{released}-0000.params").items()}
    params["arg:conv4_B03_extra_state_weight"] = params.pop(f"arg:{RENAMED}")
    params[f"arg:{RESHAPED}"] = mx.nd.ones(100)
    del params[f"aux:{REMOVED}"]
    prefix = write(tmp_path / "net", read_symbol(f"{released}-symbol.json"), params)
    code, report = compare(tmp_path, "--checkpoint", prefix)
    assert code == 1
    assert report["parameters"] == {
        "total": 396,
        "matched": 393,
        "missing": [REMOVED],
        "extra": [],
        "reshaped": {RESHAPED: {"checkpoint": [100], "network": [512]}},
        "renamed": {RENAMED: "conv4_B03_extra_state_weight"},
    }
    assert report["outputs"] is None
    assert not report["equal"]
    table = capsys.readouterr().out
    for name in (RENAMED, RESHAPED, REMOVED, "393 of 396 matched", "Result: different"):
        assert name in table


def halve(path):
    os.truncate(path, os.path.getsize(path) // 2)


def packed(prefix, folder):
    path = os.path.join(folder, "net.tar")
    with tarfile.open(path, "w") as archive:
        for ending in ("-symbol.json", "-0000.params"):
            archive.add(prefix + ending, f"net/net{ending}")
    return path


@pytest.mark.parametrize("ending", ["-0000.params", "-symbol.json", ".tar"])
def test_files_cut_in_half_are_one_message_and_exit_code_2(small, tmp_path, capsys, ending):
    for part in ("-0000.params", "-symbol.json"):
        shutil.copy(small + part, tmp_path / f"net{part}")
    packed(small, tmp_path)
    halve(tmp_path / f"net{ending}")
    source = tmp_path / ("net.tar" if ending == ".tar" else "net")
    code, report = compare(tmp_path, "--checkpoint", source, "--root", tmp_path / "root")
    assert (code, report) == (2, None)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"net{ending}" in message
    assert "truncated" in message


def test_tar_is_compared_as_its_content(small, tmp_path):
    tar = packed(small, tmp_path)
    code, report = compare(tmp_path, tar, "--root", tmp_path / "root", "--crop-size", 64)
    assert code == 0
    assert report["network"] == "resnet18_w-glore_1-1"
    assert report["num_classes"] == 4
    assert report["published_top1"] is None
    assert report["checkpoint"].startswith(str(tmp_path / "root" / "extracted" / "net-"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arg:fc1_weight": (4, 12), "arg:fc1_bias": (4,)}, "holds no network of this project"),
        (None, "there is neither a file"),
    ],
)
def test_foreign_and_absent_checkpoints_exit_with_2(tmp_path, capsys, content, message):
    if content:
        symbol = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=4, name="fc1")
        symbol = mx.sym.SoftmaxOutput(symbol, name="softmax")
        write(tmp_path / "net", symbol, {key: mx.nd.ones(size) for key, size in content.items()})
    assert compare(tmp_path, "--checkpoint", tmp_path / "net") == (2, None)
    assert message in capsys.readouterr().err


def test_a_checkpoint_must_be_named(tmp_path, capsys):
    assert compare(tmp_path) == (2, None)
    assert "name one checkpoint" in capsys.readouterr().err


def altered(prefix, folder, edit):
    """Write a copy of a checkpoint whose graph and names ``edit`` has changed as text."""
    with open(f"{prefix}-symbol.json") as stream:
        text = edit(stream.read())
    names = read_params(f"{prefix}-0000.params")
    params = {edit(name): mx.nd.array(value) for name, value in names.items()}
    return write(folder / "net", mx.sym.load_json(text), params)


def test_other_names_in_graph_and_file_are_renamed_and_run(small, tmp_path):
    prefix = altered(small, tmp_path, lambda text: text.replace("_B01_conv-m2_", "_B01_middle_"))
    code, report = compare(tmp_path, prefix, "--crop-size", 64, "--network", "resnet18_w-glore_1-1")
    assert code == 1
    # Four blocks, each with a convolution and a BatchNorm of four parameters.
    assert len(report["parameters"]["renamed"]) == 20
    assert (
        report["parameters"]["renamed"]["conv2_B01_conv-m2_bn_beta"] == "conv2_B01_middle_bn_beta"
    )
    assert report["parameters"]["missing"] == report["parameters"]["extra"] == []
    assert report["outputs"]["largest_relative_difference"] < 1e-5
    assert report["own_graph"] is None


def test_a_graph_that_computes_something_else_is_different(small, tmp_path):
    def edit(text):
        # One activation of the whole network.
        return re.sub(
            r'(\{[^{}]*"name": "conv3_B01_conv-m2_relu",[^{}]*"attrs": \{"act_type": )"relu"',
            r'\1"sigmoid"',
            text,
        )

    code, report = compare(tmp_path, altered(small, tmp_path, edit), "--crop-size", 64)
    assert code == 1
    assert report["parameters"]["matched"] == report["parameters"]["total"]
    assert report["outputs"]["largest_relative_difference"] > 1e-3
    assert not report["outputs"]["equal"]


def biased(label):
    """Return parameters whose network predicts one class whatever it sees."""
    bias = np.zeros(4, "f4")
    bias[label] = 1000
    return {"arg:classifier_bias": bias}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with 1, 2, 3 and 2 images of four classes."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.RandomState(0)
    for label, count in enumerate((1, 2, 3, 2)):
        os.makedirs(folder / f"class{label}")
        for index in range(count):
            pixels = draw.randint(0, 256, (80, 90, 3)).astype("u1")
            cv2.imwrite(str(folder / f"class{label}" / f"{index}.png"), pixels)
    return folder


def test_accuracy_distances_and_predictions_of_a_training_of_ones_own(images, tmp_path, capsys):
    symbol, _ = get_symbol("resnet18", 4)
    (tmp_path / "own").mkdir()
    base = weights_of(symbol, change=biased(2))
    theirs = write(tmp_path / "net", symbol, base)
    change = {
        **biased(1),
        "aux:tail_bn_moving_mean": base["aux:tail_bn_moving_mean"].asnumpy()
        + np.sqrt(base["aux:tail_bn_moving_var"].asnumpy()),
        "arg:conv1_conv_weight": -base["arg:conv1_conv_weight"].asnumpy(),
    }
    own = write(tmp_path / "own" / "run_ep", symbol, weights_of(symbol, change=change))
    code, report = compare(
        tmp_path,
        *("--checkpoint", theirs, "--ours", own, "--folder", images, "--resize", 70),
        *("--crop-size", 64, "--num-workers", 0),
    )
    # The exit code is about the checkpoint and our network, not about the user's training.
    assert code == 0
    figures = report["accuracy"]["figures"]
    assert figures["own graph"]["count"] == figures["your training"]["count"] == 8
    assert figures["own graph"]["top1"] == 3 / 8
    assert figures["your training"]["top1"] == 2 / 8
    assert figures["own graph"]["top5"] == 1
    predictions = report["accuracy"]["predictions"]
    assert predictions["right"] == {"both": 0, "released_only": 3, "ours_only": 2, "neither": 3}
    assert len(predictions["different"]) == 8
    assert predictions["different"][0] == {
        "image": str(images / "class0" / "0.png"),
        "label": 0,
        "released": 2,
        "ours": 1,
    }
    training = report["training"]
    weights = {row["layer"]: row for row in training["weights"]}
    assert weights["conv1_conv"]["relative_distance"] == pytest.approx(2)
    assert weights["conv1_conv"]["cosine"] == pytest.approx(-1)
    assert weights["conv2_B01_conv-m1_conv"]["relative_distance"] == 0
    statistics = {row["layer"]: row for row in training["statistics"]}
    assert statistics["tail_bn"]["mean_shift"] == pytest.approx(1, rel=1e-5)
    assert statistics["conv1_bn"]["mean_shift"] == 0
    assert training["outputs"]["top1_agreement"] == 0
    table = capsys.readouterr().out
    assert "| own graph | 8 | 37.50 | 100.00 |" in table
    assert "8 of 8 predictions differ. Right: both 0, the released only 3, yours only 2" in table


def test_images_are_the_input_when_given(small, images, tmp_path):
    files = [images / "class1" / "0.png", images / "class2" / "2.png", images / "class0" / "0.png"]
    code, report = compare(tmp_path, small, "--crop-size", 64, "--resize", 70, "--images", *files)
    assert code == 0
    assert report["input"] == [str(path) for path in files]
    assert report["outputs"]["inputs"] == 3
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "report.json").unlink()
    for bad in (tmp_path / "bad.png", tmp_path / "none.png"):
        assert compare(tmp_path, small, "--crop-size", 64, "--images", bad) == (2, None)


def test_trainings_that_do_not_fit_are_refused(small, tmp_path, capsys):
    symbol, input_conf = get_symbol("resnet18", 4)
    params = weights_of(symbol)
    own = write(tmp_path / "own", symbol, params)
    del params["arg:classifier_bias"]
    mx.nd.save(f"{own}-0000.params", params)
    code, report = compare(tmp_path, small, "--crop-size", 64, "--ours", own)
    assert (code, report) == (2, None)
    assert "missing (1): classifier_bias" in capsys.readouterr().err


def test_video_networks_are_compared_too(tmp_path):
    symbol, input_conf = get_symbol("TINY_GLORE")
    args, auxs = param_shapes(symbol, {"data": (1, *input_conf.data_shape)})
    own = {name: seeded(name, shape) for name, shape in args.items()}
    prefix = str(tmp_path / "net")
    save(prefix, 0, symbol, own, {name: seeded(name, shape) for name, shape in auxs.items()})
    code, report = compare(tmp_path, prefix)
    assert code == 0
    assert report["data_shape"] == [3, 8, 64, 64]
    assert compare(tmp_path / "other", prefix, "--images", "x.png")[0] == 2
