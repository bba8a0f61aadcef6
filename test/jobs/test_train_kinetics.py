"""train_kinetics.py and evaluate.py end to end, on real (small) demo videos."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from torch_files import as_zip, p_tensor, whole

from checkpoint.params import read_params
from checkpoint.torch_names import to_torch_name
from dataset import prepare_demo
from glore_options import parse
from jobs.options import KineticsOptions
from jobs.train_kinetics import settle_with
from mxnet_compat import mx
from network import get_symbol

COMMON = ("--network", "TINY_GLORE", "--dataset", "Demo", "--crop-size", "32", "--gpus", "")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return a data root with 24 training and 8 validation videos."""
    root = tmp_path_factory.mktemp("data")
    prepare_demo(str(root), clips_per_class=3, val_clips_per_class=1)
    return str(root)


def command(root, script, *arguments):
    return [sys.executable, os.path.join(root, script), *map(str, arguments)]


def run(root, folder, script, *arguments, code=0):
    done = subprocess.run(
        command(root, script, *arguments), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert code == 0 or "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def trained(root, demo, tmp_path_factory):
    """Train for six steps, one epoch, without interruption; return the folder it happened in."""
    folder = tmp_path_factory.mktemp("trained")
    run(root, folder, "train_kinetics.py", *training(demo))
    return folder


def training(demo):
    return (
        *(*COMMON, "--data-root", demo, "--task-name", "job", "--batch-size", 4),
        *("--max-steps", 6, "--save-every-steps", 1, "--dropout", 0.3, "--keep", 9),
        # As many epochs as a warm-up of 20 steps wants; --max-steps ends the run.
        *("--end-epoch", 8),
    )


def params_of(folder):
    (path,) = (folder / "exps" / "models").glob("job_ep-0001.params")
    return read_params(str(path))


def test_a_killed_run_ends_with_the_parameters_of_an_undisturbed_one(root, demo, trained, tmp_path):
    arguments = training(demo)
    process = subprocess.Popen(
        command(root, "train_kinetics.py", *arguments), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    models = tmp_path / "exps" / "models"
    deadline = time.monotonic() + 120
    while not (models / "job_step-0000002.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (models / "job_ep-0001.params").exists(), "killed too late to show anything"
    resumed = run(root, tmp_path, "train_kinetics.py", *arguments, "--resume", "auto")
    assert "Resumed from" in resumed.stderr
    expected, found = params_of(trained), params_of(tmp_path)
    assert list(expected) == list(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_second_start_keeps_what_is_there(root, demo, trained):
    before = params_of(trained)
    done = run(root, trained, "train_kinetics.py", *training(demo), code=1)
    assert "--resume auto" in done.stderr
    assert "--task-name" in done.stderr
    for name, value in before.items():
        np.testing.assert_array_equal(params_of(trained)[name], value)


def test_evaluation_gives_the_validation_of_training(root, trained):
    done = run(
        *(root, trained, "test/test-single-clip.py", "--model-subpath", "job_ep-0001.params"),
        *("--output", "result", "--batch-size", 3, "--num-workers", 1),
    )
    result = json.loads((trained / "result.json").read_text())
    with open(trained / "exps" / "logs" / "job_history.csv") as stream:
        header, *rows = (line.rstrip("\n").split(",") for line in stream)
    history = dict(zip(header, rows[-1]))
    assert result["loss"] == pytest.approx(float(history["val_loss"]), rel=1e-4)
    assert result["top1"] == pytest.approx(float(history["val_top1"]))
    assert result["top5"] == pytest.approx(float(history["val_top5"]))
    assert result["videos"] == len(result["predictions"]) == 8
    hits = [entry["label"] == entry["prediction"] for entry in result["predictions"]]
    assert np.mean(hits) == pytest.approx(result["top1"])
    assert "8 videos, chance: 12.50 %" in done.stderr
    assert (trained / "result_confusion.png").read_bytes().startswith(b"\x89PNG")


def test_several_clips_and_crops_are_averaged(root, trained):
    options = ("exps/models/job_ep", "--num-clips", 2, "--num-crops", 3, "--batch-size", 12)
    run(root, trained, "evaluate.py", *options, "--output", "views")
    result = json.loads((trained / "views.json").read_text())
    assert [entry["views"] for entry in result["predictions"]] == [6] * 8


def test_pytorch_weights_give_the_same_result(root, demo, trained):
    params = params_of(trained)
    storages = {str(index): value for index, value in enumerate(params.values())}
    names = ("module." + to_torch_name(name.split(":", 1)[1]) for name in params)
    items = [(name, p_tensor(key, storages[key])) for name, key in zip(names, storages)]
    (trained / "released.pth").write_bytes(as_zip(whole(items), storages))
    network = ("--network", "TINY_GLORE", "--crop-size", 32, "--dataset", "Demo")
    options = ("--data-root", demo, "--gpus", "")
    run(root, trained, "evaluate.py", "released.pth", *network, *options, "--output", "torch")
    run(root, trained, "evaluate.py", "exps/models/job_ep", "--output", "mxnet")
    results = [json.loads((trained / f"{kind}.json").read_text()) for kind in ("torch", "mxnet")]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["predictions"] == results[1]["predictions"]


def test_checkpoint_runs_in_mxnets_own_module(trained):
    prefix = str(trained / "exps" / "models" / "job_ep")
    symbol, arg_params, aux_params = mx.model.load_checkpoint(prefix, 1)
    module = mx.mod.Module(symbol)
    module.bind([("data", (2, 3, 8, 32, 32))], [("softmax_label", (2,))], for_training=False)
    module.set_params(arg_params, aux_params)
    batch = mx.io.DataBatch([mx.nd.ones((2, 3, 8, 32, 32))], [mx.nd.zeros(2)])
    module.forward(batch)
    scores = module.get_outputs()[0].asnumpy()
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)


def test_pretrained_weights_with_another_classifier(root, demo, trained, tmp_path):
    symbol, _ = get_symbol("TINY_GLORE", 5, crop_size=32)
    weights = {name: mx.nd.array(value) for name, value in params_of(trained).items()}
    weights["arg:classifier_weight"] = mx.nd.ones((5, weights["arg:classifier_weight"].shape[1]))
    weights["arg:classifier_bias"] = mx.nd.ones(5)
    mx.nd.save(str(tmp_path / "five.params"), weights)
    arguments = (*COMMON, "--data-root", demo, "--batch-size", 4, "--end-epoch", 8, "--dry-run")
    done = run(
        root,
        tmp_path,
        "train_kinetics.py",
        *arguments,
        "--pretrained",
        "five.params",
        "--fine-tune",
    )
    assert "the classifier has 5 classes, the network 8" in done.stderr
    assert "Nothing was written" in done.stderr
    assert os.listdir(tmp_path) == ["five.params"]


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["--network", "RESNET5O_GLORE"], 2, ["Did you mean RESNET50_GLORE?"]),
        (["--network", "resnet50"], 2, ["reads single images"]),
        (["--dataset", "Kinetic"], 2, ["Kinetics"]),
        (["--lr-bse", "0.1"], 2, ["--lr-base"]),
        (["--glore", "9-9"], 2, ["glore"]),
        (["--gpus", "7"], 2, ["GPU 7"]),
        (["--pretrained", "no/such.params"], 1, ["no/such"]),
        (["--pretrained"], 2, ["no weights for TINY_GLORE"]),
    ],
)
def test_mistakes_are_one_clear_message(arguments, code, texts, root, demo, tmp_path):
    arguments = [*COMMON, "--data-root", demo, "--max-steps", 1, *arguments]
    done = run(root, tmp_path, "train_kinetics.py", *arguments, code=code)
    for text in texts:
        assert text in done.stderr


def test_missing_data_names_folders_lists_and_the_way_to_make_them(root, tmp_path):
    done = run(root, tmp_path, "train_kinetics.py", "--data-root", tmp_path, code=1)
    for text in (
        "Kinetics/raw/list_cvt/kinetics_train_avi.txt",
        "Kinetics/raw/data/val_avi-288p",
        "python -m dataset.prepare_videos --dataset Kinetics",
    ):
        assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "--model-subpath"),
        (["none_ep"], 1, "none_ep"),
        (["--model-subpath", "none.params"], 1, "none.params"),
    ],
)
def test_evaluation_says_what_is_missing(arguments, code, text, root, tmp_path):
    assert text in run(root, tmp_path, "evaluate.py", *arguments, code=code).stderr


def test_a_truncated_checkpoint_is_named(root, trained, tmp_path):
    whole = (trained / "exps" / "models" / "job_ep-0001.params").read_bytes()
    (tmp_path / "half.params").write_bytes(whole[: len(whole) // 2])
    arguments = ("--model-root", tmp_path, "--model-subpath", "half.params")
    done = run(root, tmp_path, "evaluate.py", *arguments, code=1)
    assert "half.params" in done.stderr


class Settings:
    """Just enough of a data set's configuration."""

    name = "Kinetics"
    clip_length, train_frame_interval, val_frame_interval = 8, 8, 8
    crop_size, augmentation, batch_size = 224, "full", 64
    lr_base, lr_schedule, lr_steps, warmup_steps = 0.05, "step", (1, 2), 1500
    end_epoch, epoch_div_factor = 400, 4
    is_own = False


def test_upstreams_command_line_means_what_it_says():
    words = [
        *("--network", "RESNET50_3D_GCN_X5", "--fine-tune", "False", "--precise-bn", "True"),
        *("--lr-steps", "45,65", "--gpus", "0,1", "--train-frame-interval", "4"),
        *("--backend", "nccl", "--world-size", "8", "--dist-url", "tcp://x"),
        *("--pretrained", "False"),
    ]
    options = parse(KineticsOptions(), words, "Trains.")
    settle_with(options, Settings)
    assert options.network.fine_tune is False
    assert options.network.pretrained == ""
    assert options.precise_bn.precise_bn is True
    assert options.schedule.lr_steps == (45, 65)
    assert options.devices.gpus == (0, 1)
    # Given on the command line, and left to the data set.
    data = options.data
    assert (data.train_frame_interval, data.val_frame_interval) == (4, 8)
    recipe = options.schedule
    assert (data.batch_size, recipe.lr_base, recipe.warmup_steps) == (64, 0.05, 1500)
    assert options.checkpoints.task_name == "Kinetics_RESNET50_GLORE"
    assert options.run.max_val_batches == 0


def test_a_run_from_the_file_of_another_ends_with_its_parameters(root, trained, tmp_path):
    options = ("--config", trained / "exps/models/job_options.yaml")
    done = run(root, tmp_path, "train_kinetics.py", *options)
    assert "Command    python train_kinetics.py --config" in done.stderr
    first, second = params_of(trained), params_of(tmp_path)
    assert list(first) == list(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_mean_and_std_of_the_training_are_those_of_testing(root, demo, tmp_path):
    pixels = ("--rgb-mean", "10,20,30", "--rgb-std", "50,60,70")
    options = (*COMMON, "--data-root", demo, "--batch-size", 8, "--task-name", "odd", *pixels)
    run(root, tmp_path, "train_kinetics.py", *options, "--max-steps", 3, "--end-epoch", 8)
    done = run(root, tmp_path, "evaluate.py", "exps/models/odd_ep", "--output", "odd")
    assert "RGB mean 10, 20, 30, std 50, 60, 70 of 255" in done.stderr
    assert "8 frames, one in 2, 32 x 32 pixels" in done.stderr
    assert "odd_ep-0001.json, its manifest" in done.stderr
    result = json.loads((tmp_path / "odd.json").read_text())
    with open(tmp_path / "exps" / "logs" / "odd_history.csv") as stream:
        header, row = (line.rstrip("\n").split(",") for line in stream)
    assert len(result["predictions"]) == 8
    assert result["loss"] == pytest.approx(float(dict(zip(header, row))["val_loss"]), rel=1e-4)


def test_a_small_data_set_is_not_divided_into_more_epochs_than_it_has_batches():
    options = parse(KineticsOptions(), [], "Trains.")
    settle_with(options, Settings)
    options.run.settle_epoch_div_factor(Settings.epoch_div_factor, 3)
    assert options.run.epoch_div_factor == 3
    # What was asked for stays, so that the loop can say that it is impossible.
    options = parse(KineticsOptions(), ["--epoch-div-factor", "4"], "Trains.")
    options.run.settle_epoch_div_factor(1, 3)
    assert options.run.epoch_div_factor == 4
