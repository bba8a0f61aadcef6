"""evaluate.py on images: crops, own graphs and ours, against scores computed apart."""

import csv
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from image_runs import CLASSES, NETWORK, add_tiny_network, write_images

from checkpoint.graph import save
from data.image.loaders import get_image_val_loader
from data.image.options import ImageTestOptions
from data.image.source import open_image_source
from glore_common import GloReError, UsageError
from glore_options import parse
from jobs import evaluate
from jobs.options import EvaluateOptions
from mxnet_compat import mx
from network.builder import get_symbol
from network.initializer import initial_params
from train.scoring import average_scores

SIDE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Work in an empty folder, with a tiny network."""
    add_tiny_network(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of 9 images of different sizes."""
    folder = tmp_path_factory.mktemp("images") / "val"
    write_images(folder, 3, seed=1)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return prefixes of one set of weights, with our graph and with a released one's pooling."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        add_tiny_network(patch)
        for name, fixed in (("ours", False), ("fixed", True)):
            symbol, _ = get_symbol(NETWORK, 3, fixed_pool=fixed)
            params = initial_params(symbol, {"data": (1, 3, SIDE, SIDE)}, seed=5)
            save(str(folder / name), 0, symbol, *params)
    return folder


def run(weights, *options):
    """Score, and return what PREFIX.json holds."""
    fixed = ("--gpus", "", "--num-workers", "0", "--output", "result", "--crop-size", str(SIDE))
    evaluate.main([str(weights), *fixed, *map(str, options)])
    with open("result.json") as stream:
        return json.load(stream)


def scores_of_module(prefix, images, crops, resize, batch_size=1):
    """Return mean scores of what MXNet's own executor gives."""
    symbol, args, auxs = mx.model.load_checkpoint(str(prefix), 0)
    _, input_conf = get_symbol(NETWORK, 3)

    def predict(data):
        executor = symbol.simple_bind(mx.cpu(), "null", data=data.shape)
        executor.copy_params_from(args, auxs)
        # The softmax of the logarithms of probabilities are these probabilities.
        return np.log(executor.forward(data=data)[0].asnumpy())

    loader = get_image_val_loader(
        open_image_source(str(images)),
        ImageTestOptions(crop_size=SIDE, resize=resize, num_workers=0),
        mean=input_conf.mean,
        std=input_conf.std,
        batch_size=batch_size,
        crops=crops,
    )
    return average_scores(predict, loader)


@pytest.mark.parametrize(
    ("crops", "resize", "views", "options"),
    [
        ("centre", 73, 1, ()),
        ("ten", 73, 10, ("--batch-size", 20)),
        ("full", SIDE, 1, ("--batch-size", 4)),
        ("full", 80, 1, ("--resize", 80, "--network", NETWORK)),
    ],
)
def test_scores_equal_those_of_mxnets_executor(crops, resize, views, options, images, weights):
    result = run(weights / "ours", "--folder", images, "--crops", crops, *options)
    expected = scores_of_module(weights / "ours", images, crops, resize)
    assert result["count"] == len(result["predictions"]) == 9
    assert (result["crops"], result["resize"]) == (crops, resize)
    for row, score in zip(result["predictions"], expected.values()):
        label = score.label
        assert row["views"] == views
        assert row["label"] == label
        assert row["prediction"] == score.mean.argmax()
        assert row["score"] == pytest.approx(score.mean.max(), abs=2e-6)
        assert os.path.basename(os.path.dirname(row["image"])) == CLASSES[label]
    loss = np.mean([-np.log(score.mean[score.label]) for score in expected.values()])
    hits = [score.mean.argmax() == score.label for score in expected.values()]
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["top1"] == pytest.approx(np.mean(hits))
    assert result["top5"] == 1.0
    assert result["class_names"] == list(CLASSES)
    with open("result_confusion.png", "rb") as stream:
        assert stream.read(4) == b"\x89PNG"


def test_records_give_what_their_folder_gives(images, weights, root, tmp_path):
    for options in (("--list", "--recursive"), ("--pass-through",)):
        command = [sys.executable, "-m", "dataset.im2rec", *options, tmp_path / "packed"]
        subprocess.run([*command, images], check=True, cwd=root, capture_output=True)
    folder = run(weights / "ours", "--folder", images)
    packed = run(weights / "ours", "--rec", "packed.rec")
    native = run(
        weights / "ours", "--rec", "packed.rec", "--record-reader", "native", "--batch-size", 4
    )
    assert packed["loss"] == pytest.approx(folder["loss"], rel=1e-6)
    assert packed["top1"] == folder["top1"]
    # The pixels of MXNet's resizing differ a little.
    assert native["loss"] == pytest.approx(folder["loss"], rel=0.05)
    assert native["count"] == 9


def test_a_graph_of_fixed_pooling_scores_its_own_size_alone(images, weights):
    own = run(weights / "fixed", "--folder", images)
    ours = run(weights / "fixed", "--folder", images, "--network", NETWORK)
    assert own["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    assert (own["network"], ours["network"]) == (None, NETWORK)
    for options in (("--crop-size", 96), ("--crops", "full")):
        with pytest.raises(UsageError, match="--network NAME"):
            run(weights / "fixed", "--folder", images, *options)
        larger = run(weights / "fixed", "--folder", images, *options, "--network", NETWORK)
        assert larger["count"] == 9
    assert larger["crop_size"] is None


def test_the_classes_table(images, weights):
    result = run(weights / "ours", "--folder", images, "--per-class", "classes.csv")
    with open("classes.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == list(CLASSES)
    assert [row["count"] for row in rows] == ["3"] * 3
    for index, row in enumerate(rows):
        own = [line for line in result["predictions"] if line["label"] == index]
        hits = [line["prediction"] == index for line in own]
        assert float(row["top1"]) == pytest.approx(np.mean(hits))
        assert (row["confused_with"] == "") == all(hits)
    mean = np.mean([float(row["top1"]) for row in rows])
    assert result["mean_class_accuracy"] == pytest.approx(mean)


def test_the_published_figure_stands_beside_the_networks_own_form(
    images, weights, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(evaluate.PUBLISHED_TOP1, NETWORK, 12.3)
    named = ("--folder", images, "--network", NETWORK)
    assert run(weights / "ours", *named)["published_top1"] == 12.3
    assert "Published top-1 of this network: 12.3 %" in caplog.text
    assert run(weights / "ours", *named, "--normalize")["published_top1"] is None
    assert run(weights / "ours", "--folder", images)["published_top1"] is None


def test_an_unreadable_image_is_left_out_and_listed(images, weights, tmp_path, caplog):
    write_images(tmp_path / "data", 2)
    (tmp_path / "data" / "red" / "00.jpg").write_bytes(b"no image")
    result = run(weights / "ours", "--folder", "data")
    assert result["count"] == 5
    assert "data/red/00.jpg" in (tmp_path / "result_bad-files.tsv").read_text()
    with pytest.raises(GloReError, match=r"00\.jpg"):
        run(weights / "ours", "--folder", "data", "--strict-data")


def test_a_limit_of_images(images, weights):
    result = run(weights / "ours", "--folder", images, "--max-images", 4, "--batch-size", 3)
    assert result["count"] == 4


def test_many_classes_have_no_picture(images, tmp_path):
    symbol, _ = get_symbol(NETWORK, 201)
    save("many", 0, symbol, *initial_params(symbol, {"data": (1, 3, SIDE, SIDE)}))
    result = run("many", "--folder", images)
    assert result["class_names"] is None
    assert not (tmp_path / "result_confusion.png").exists()


def test_the_default_sizes(weights):
    def sizes(*words, crops="centre", network=None):
        options = parse(EvaluateOptions(), [str(weights / "ours"), *words], "Tests.")
        options.network.network = network
        model = evaluate.read_model(options)
        _, reading = evaluate.settle_images(model, options.data, crops)
        return reading.crop_size, reading.resize

    assert sizes() == (224, 256)
    assert sizes("--crop-size", "320") == (320, 366)
    assert sizes("--crop-size", "320", crops="full") == (320, 320)
    assert sizes(network=NETWORK) == (64, 73)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (("--glore", "2-3"), UsageError, "--network"),
        (("--network", "RESNET50_GLORE"), GloReError, "do not fit the network"),
        (("--resize", "40"), UsageError, "smaller than --crop-size"),
        (("--weights", "no/such"), GloReError, "no/such"),
        (("--network", "resnet18"), GloReError, "conv2_B02"),
        (("--folder", "no/folder"), GloReError, "no/folder"),
    ],
)
def test_mistakes_are_one_clear_message(options, error, text, images, weights):
    with pytest.raises(error, match=text):
        run(weights / "ours", "--folder", images, *options)


def test_weights_without_a_graph_need_a_network(images, weights, tmp_path):
    content = (weights / "ours-0000.params").read_bytes()
    (tmp_path / "alone.params").write_bytes(content)
    with pytest.raises(UsageError, match="--network"):
        run("alone.params", "--folder", images)
    assert run("alone.params", "--folder", images, "--network", NETWORK)["count"] == 9
    (tmp_path / "alone.params").write_bytes(content[: len(content) // 2])
    with pytest.raises(GloReError, match=r"alone\.params.*truncated"):
        run("alone.params", "--folder", images, "--network", NETWORK)
