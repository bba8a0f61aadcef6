"""train_imagenet.py end to end on real (small) images, and its options one by one."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from image_runs import CLASSES, NETWORK, add_tiny_network, write_images

from checkpoint.graph import load
from checkpoint.params import read_params
from glore_common import UsageError
from glore_options import parse as parse_options
from jobs import train_imagenet
from jobs.options import ImagenetOptions
from jobs.run import Run
from jobs.train_image import get_network
from jobs.train_imagenet import main, settle
from mxnet_compat import mx
from network.builder import get_symbol
from train import trial
from train.optimizer import NesterovSGD, make_optimizer
from train.schedule import schedule_for
from train.workers import Group


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with train/ (24 images) and val/ (9), and train.rec of the former."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 8)
    write_images(folder / "val", 3, seed=1)
    for options in (("--list", "--recursive"), ("--pass-through",)):
        command = [sys.executable, "-m", "dataset.im2rec", *options, folder / "packed"]
        root = os.path.dirname(os.path.dirname(os.path.abspath(train_imagenet.__file__)))
        subprocess.run([*command, folder / "train"], check=True, cwd=root, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Work in an empty folder, with a tiny network, and without drawing curves."""
    add_tiny_network(monkeypatch)
    monkeypatch.setattr("train.report.plot_history", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def train(*options, batch_size=8, epochs=2, task="job"):
    main(
        [
            *("--network", NETWORK, "--gpus", "", "--num-workers", "0", "--lr", "0.02"),
            *("--batch-size", str(batch_size), "--num-epochs", str(epochs), "--task-name", task),
            *map(str, options),
        ]
    )


def params_of(task, epoch):
    return read_params(os.path.join("exps", "models", f"{task}_ep-{epoch:04d}.params"))


def assert_same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def parse(*words):
    options = parse_options(ImagenetOptions(), ["--network", NETWORK, *words], "Trains.")
    settle(options)
    return options


def network_of(options):
    block, _ = get_network(options, Run(options, Group(), [mx.cpu()], None), 3)
    return block


def test_learns_from_a_folder(images, caplog):
    train("--folder", images, "--save-frequency", 8, epochs=6)
    with open("exps/logs/job_history.csv") as stream:
        header, *rows = (line.rstrip("\n").split(",") for line in stream)
    last = dict(zip(header, rows[-1]))
    assert len(rows) == 6
    assert float(last["val_top1"]) == 1.0
    assert float(last["val_loss"]) < 0.5
    assert f"{images}/train: 24 images to train, 9 to validate, 3 classes" in caplog.text
    assert "64 x 64 pixels, augmentation reference (validation: shorter side 73" in caplog.text


def test_resumes_bit_for_bit_from_records(images):
    data = ("--data-train", images / "packed.rec", "--data-val", images / "val")
    recipe = ("--mixup", 0.2, "--label-smoothing", 0.1, "--dropout", 0.2, "--rotation", 10)
    train(*data, *recipe, task="whole")
    train(*data, *recipe, "--max-steps", 2, "--max-val-batches", 1)
    train(*data, *recipe, "--resume", "auto")
    assert_same(params_of("whole", 2), params_of("job", 2))


def test_mxnets_own_reader_trains(images, caplog):
    native = ("--data-train", images / "packed.rec", "--record-reader", "native")
    train(*native, "--data-val", images / "val", epochs=1)
    assert "Step 3" in caplog.text
    with pytest.raises(UsageError, match=r"\.rec"):
        train("--folder", images, "--record-reader", "native", task="other")


@pytest.mark.parametrize("optimizer", ["nag", "nesterov"])
def test_accumulated_gradients_resume_with_any_optimizer(images, optimizer):
    options = ("--data-train", images / "train", "--optimizer", optimizer, "--accumulate", 2)
    train(*options, batch_size=6, epochs=1, task="whole")
    train(*options, "--max-steps", 1, batch_size=6, epochs=1)
    train(*options, "--resume", "auto", batch_size=6, epochs=1)
    assert_same(params_of("whole", 1), params_of("job", 1))


def test_load_epoch_resumes_our_checkpoint_of_a_prefix(images, caplog):
    data = ("--data-train", images / "train", "--model-prefix", "here/net")
    train(*data, epochs=1, task="x")
    assert os.path.exists("here/net_ep-0001.params")
    train(*data, "--load-epoch", 1, epochs=2, task="x")
    assert "Resumed from here/net_ep-0001: step 3, logged epoch 2" in caplog.text


def test_load_epoch_starts_from_the_weights_of_a_module_job(images, caplog):
    symbol, _ = get_symbol(NETWORK, 3)
    module = mx.mod.Module(symbol)
    module.bind([("data", (2, 3, 64, 64))], [("softmax_label", (2,))])
    module.init_params(mx.init.Xavier())
    module.save_checkpoint("net", 7)
    before = read_params("net-0007.params")
    # A learning rate of next to nothing: the weights after one step are those of the file.
    options = ("--model-prefix", "net", "--load-epoch", 7, "--max-steps", 1, "--lr", 1e-12)
    train("--data-train", images / "train", *options, task="x")
    assert "net-0007.params has weights alone" in caplog.text
    after = read_params("net_step-0000001.params")
    for name, value in before.items():
        if name.startswith("arg:"):
            np.testing.assert_allclose(after[name], value, atol=1e-7, err_msg=name)


def test_dry_run_writes_nothing(images, caplog):
    train("--folder", images, "--dry-run")
    assert "Nothing was written" in caplog.text
    assert os.listdir(".") == []


def test_benchmark_needs_no_files(caplog):
    caplog.set_level(logging.INFO)
    main(["--network", NETWORK, "--gpus", "", "--benchmark", "--max-steps", "3"])
    assert "samples/s in training" in caplog.text
    assert "a step of 8, mean of 2 steps after 1 of warm-up" in caplog.text
    assert os.listdir(".") == []


def test_benchmark_divides_by_the_timed_steps_alone(monkeypatch):
    now = [0.0]

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

    class Learns:
        group = Group()
        accumulate, steps = 2, 0

        def step(self, batches, lr, seed, samples):
            assert samples == 8
            self.steps += 1
            # The first two of ten are slow.
            now[0] += 100.0 if self.steps <= 2 else 0.5
            return [([mx.nd.ones(4)], None, None) for _ in batches]

    monkeypatch.setattr(trial, "time", Clock)
    batch = (mx.nd.zeros((4, 1)), mx.nd.zeros(4))
    speed = trial.benchmark(Learns(), batch, lambda step: 0.1, 1, 10)
    assert speed == pytest.approx(4 * 2 / 0.5)


def test_mxnets_command_line_means_what_it_says():
    options = parse(
        *("--gpus", "0,1", "--kv-store", "local", "--batch-size", "64"),
        *("--lr", "0.2", "--lr-factor", "0.5", "--lr-step-epochs", "30,60", "--wd", "0.001"),
        *("--mom", "0.8", "--model-prefix", "a/b/net", "--load-epoch", "3"),
        *("--num-epochs", "90", "--disp-batches", "20", "--data-train", "t.rec"),
        *("--data-val", "v.rec", "--data-train-idx", "t.idx", "--rgb-mean", "123.68,116,103"),
        *("--rgb-std", "58", "--image-shape", "3,96,96", "--num-classes", "10"),
        *("--num-examples", "1000", "--top-k", "5", "--warmup-epochs", "2"),
    )
    recipe, checkpoints = options.schedule, options.checkpoints
    assert (recipe.lr_base, recipe.lr_factor, recipe.lr_step_epochs) == (0.2, 0.5, (30.0, 60.0))
    assert (recipe.lr_schedule, recipe.momentum, recipe.weight_decay) == ("step", 0.8, 0.001)
    assert (checkpoints.model_dir, checkpoints.task_name) == ("a/b", "net")
    assert checkpoints.resume_epoch == 3
    assert (options.run.end_epoch, options.logging.log_frequency) == (90, 20)
    assert (options.data.crop_size, options.data.num_workers) == (96, None)
    assert (options.devices.gpus, options.devices.kv_store) == ((0, 1), "local")
    mean, std = options.pixels.normalisation(*OWN)
    assert mean == pytest.approx((123.68 / 255, 116 / 255, 103 / 255))
    assert std == pytest.approx((58 / 255,) * 3)
    schedule = schedule_for(options, 100, 64)
    assert schedule(3000) == pytest.approx(0.2)
    assert schedule(3001) == pytest.approx(0.1)
    assert schedule(6001) == pytest.approx(0.05)
    # In the warm-up of 200 steps: from a tenth of the rate.
    assert schedule(100) == pytest.approx(0.2 * (1 + 9 * 0.5) / 10)


# A network's own mean and std.
OWN = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_normalisation_is_the_networks_own_unless_given():
    assert parse("--benchmark").pixels.normalisation(*OWN) == OWN
    _, std = parse("--benchmark", "--scale", "0.0167").pixels.normalisation(*OWN)
    assert std == pytest.approx((1 / (0.0167 * 255),) * 3)


def test_the_default_schedule_is_a_cosine_after_warm_up():
    options = parse("--benchmark", "--batch-size", "32")
    schedule = schedule_for(options, 10, 32)
    recipe = options.schedule
    assert (recipe.lr_schedule, recipe.warmup_epochs, recipe.optimizer) == ("cosine", 5.0, "sgd")
    assert schedule(50) == pytest.approx(0.1)
    assert schedule(25) == pytest.approx(0.1 * (1 + 9 * 0.5) / 10)
    assert schedule(525) == pytest.approx(0.05)
    assert schedule(1000) == pytest.approx(0.0, abs=1e-9)
    # Epochs count passes, also where a step takes several batches and an epoch is half a pass.
    options = parse(
        *("--benchmark", "--batch-size", "32", "--accumulate", "4", "--epoch-div-factor", "2"),
        *("--lr-schedule", "step", "--lr-step-epochs", "1", "--warmup-epochs", "0"),
    )
    # 10 batches in two parts of 5: two steps each, four in a pass.
    schedule = schedule_for(options, 10, 32)
    assert [schedule(step) for step in (4, 5)] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize(
    ("option", "undecayed"),
    [((), ("bias", "beta")), (("--no-decay-bn-bias",), ("bias", "beta", "gamma"))],
)
def test_what_decays(option, undecayed):
    block = network_of(parse("--benchmark", *option))
    for name, parameter in block.collect_params().items():
        if parameter.grad_req != "null":
            expected = 0.0 if name.endswith(undecayed) else 1.0
            assert parameter.wd_mult == expected, name


@pytest.mark.parametrize("on", [True, False])
def test_units_start_as_the_identity(on):
    block = network_of(parse("--benchmark", "--zero-init-units", str(on)))
    weight = block.collect_params()["conv4_B01_extra_fc-2_conv_weight"].data().asnumpy()
    assert (weight == 0).all() == on


# MXNet's NAG takes the decay of the momentum from the updated weight: left out here.
@pytest.mark.parametrize(("name", "decay"), [("sgd", 0.01), ("nag", 0.0)])
def test_mxnets_optimizers_multiply_the_rate_into_the_momentum(name, decay):
    optimizer = make_optimizer(name, 0.9, decay)
    updater = mx.optimizer.get_updater(optimizer)
    weight = mx.nd.array([1.0, -2.0])
    gradient = np.array([0.5, 0.25])
    expected, momentum = np.array([1.0, -2.0]), 0.0
    for rate in (0.1, 0.4, 0.2):
        optimizer.set_learning_rate(rate)
        updater(0, mx.nd.array(gradient), weight)
        change = rate * (gradient + decay * expected)
        momentum = 0.9 * momentum - change
        expected = expected + (momentum if name == "sgd" else 0.9 * momentum - change)
    np.testing.assert_allclose(weight.asnumpy(), expected, rtol=1e-5)


def test_optimizers_by_name():
    assert isinstance(make_optimizer("nesterov", 0.9, 0.0), NesterovSGD)
    assert make_optimizer("sgd", 0.9, 0.0).multi_precision
    with pytest.raises(UsageError, match="sgd"):
        make_optimizer("sdg", 0.9, 0.0)


def test_units_that_pretrained_weights_lack_start_afresh_only_when_asked(images, caplog):
    train("--data-train", images / "train", "--glore", "none", "--max-steps", 3, task="plain")
    start = ("--data-train", images / "train", "--pretrained", "exps/models/plain_ep-0001.params")
    with pytest.raises(Exception, match="conv4_B01_extra"):
        train(*start)
    train(*start, "--fresh-units", "--dry-run")
    assert "not in the file, start afresh: conv4_B01_extra" in caplog.text


def test_val_has_the_classes_of_train(images, tmp_path):
    write_images(tmp_path / "val", 1)
    os.rename(tmp_path / "val" / CLASSES[0], tmp_path / "val" / "azure")
    with pytest.raises(Exception, match="azure"):
        train("--data-train", images / "train", "--data-val", tmp_path / "val")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ((), UsageError, "--data-train FILE.rec"),
        (("--folder", "x", "--data-train", "y"), UsageError, "not both"),
        (("--data-train", "no/such"), Exception, "no/such"),
        (("--data-train", "a.rec", "--data-train-idx", "b.idx"), UsageError, "a.idx"),
        (("--benchmark", "--network", "RESNET50_GLORE"), UsageError, "reads clips"),
        (("--benchmark", "--network", "resnet5o"), UsageError, "Did you mean resnet50"),
        (("--benchmark", "--resize", "40"), UsageError, "smaller than the input, 64"),
        (("--benchmark", "--dtype", "float16"), UsageError, "float16 is for GPUs"),
        (("--benchmark", "--pretrained", "no/such"), Exception, "no/such"),
        (("--benchmark", "--pretrained"), UsageError, "no weights for tiny-2d"),
        (("--benchmark", "--model-prefix", "folder/"), UsageError, "ends in no name"),
    ],
)
def test_mistakes_are_one_clear_message(options, error, text):
    with pytest.raises(error) as raised:
        main(["--network", NETWORK, "--gpus", "", *options])
    assert text in str(raised.value)
    assert os.listdir(".") in ([], ["exps"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--lr-step-epochs", "30", "--lr-steps", "1e6"), "not allowed with"),
        (("--warmup-epochs", "5", "--warmup-steps", "10"), "not allowed with"),
        (("--image-shape", "1,28,28"), "no square colour image"),
        (("--image-shape", "3,28,32"), "no square colour image"),
        (("--rgb-mean", "1,2"), "not 3 (or 1)"),
        (("--kv-store", "dist_synch"), "invalid choice"),
        (("--top-k", "3"), "invalid choice"),
        (("--num-epoch", "3"), "--num-epochs"),
    ],
)
def test_wrong_options_end_with_code_2(options, text, capsys):
    with pytest.raises(SystemExit) as raised:
        parse_options(ImagenetOptions(), list(options), "Trains.")
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


def test_checkpoints_run_in_module_and_know_their_settings(images):
    train("--data-train", images / "train", epochs=1)
    symbol, arg_params, aux_params = load("exps/models/job_ep", 1)
    module = mx.mod.Module(symbol)
    module.bind([("data", (2, 3, 64, 64))], [("softmax_label", (2,))], for_training=False)
    module.set_params(arg_params, aux_params)
    module.forward(mx.io.DataBatch([mx.nd.ones((2, 3, 64, 64))], [mx.nd.zeros(2)]))
    np.testing.assert_allclose(module.get_outputs()[0].asnumpy().sum(1), 1, rtol=1e-5)
