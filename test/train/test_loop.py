"""The training loop: learning, epochs, resuming bit for bit, signals, broken numbers."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from train_runs import train_options

from checkpoint.manifest import read_manifest
from checkpoint.params import CheckpointError
from checkpoint.store import CheckpointStore
from glore_common import GloReError, UsageError
from mxnet_compat import mx
from train.batches import BatchStream, epoch_bounds, spread_batches
from train.interrupt import Interrupted
from train.loop import NonFiniteError, train_and_evaluate
from train.optimizer import NesterovSGD
from train.report import TIME_COLUMNS, Reporter
from train.schedule import ConstantScheduler, MultiFactorScheduler
from train.step import Learner, all_finite, derived_seed
from train.task import Classification

CLASSES = 4


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than training here; ``undo`` of the result brings it back."""
    monkeypatch.setattr("train.report.plot_history", lambda *_: None)
    return monkeypatch


class Batches:
    """Batches that are a function of (pass, batch), as the project's loaders give them.

    ``at(pass_index, batch)`` is called before each batch is given out.
    """

    def __init__(self, count=6, size=8, seed=0, at=None):
        self.count, self.size, self.seed, self.at = count, size, seed, at
        self.position = (0, 0)
        self.read = []

    def __len__(self):
        return self.count

    def set_position(self, pass_index, batch):
        self.position = (pass_index, batch)

    def __iter__(self):
        pass_index, first = self.position
        for batch in range(first, self.count):
            if self.at is not None:
                self.at(pass_index, batch)
            self.read.append((pass_index, batch))
            yield self.batch(pass_index, batch)

    def batch(self, pass_index, batch):
        generator = np.random.RandomState([self.seed, pass_index, batch])
        label = generator.randint(0, CLASSES, self.size)
        data = generator.normal(0, 1, (self.size, 8, 4, 4))
        data[np.arange(self.size), label] += 2.0
        return mx.nd.array(data), mx.nd.array(label)


def network(seed=0, dropout=0.5):
    block = mx.gluon.nn.HybridSequential(prefix="net_")
    with block.name_scope():
        block.add(
            mx.gluon.nn.Conv2D(8, 3, padding=1, use_bias=False),
            mx.gluon.nn.BatchNorm(),
            mx.gluon.nn.Activation("relu"),
            mx.gluon.nn.GlobalAvgPool2D(),
            mx.gluon.nn.Dropout(dropout),
            mx.gluon.nn.Dense(CLASSES),
        )
    mx.random.seed(seed)
    block.initialize(mx.init.Xavier())
    block.hybridize()
    return block


def run(folder, block=None, train=None, val=None, schedule=None, **options):
    contexts = options.pop("contexts", None)
    hook = options.pop("batch_hook", None)
    options = {"end_epoch": 2, "log_frequency": 2, "model_dir": str(folder), **options}
    block = block or network()
    if contexts:
        block.collect_params().reset_ctx(contexts)
    summary = train_and_evaluate(
        block,
        Batches() if train is None else train,
        val,
        train_options(**options),
        optimizer=NesterovSGD(momentum=0.9, wd=1e-4),
        schedule=schedule or ConstantScheduler(0.1, warmup_steps=3),
        task=Classification(hook),
        reporter=Reporter("t", str(folder)),
    )
    return summary, block


def everything(block):
    return {name: p.data().asnumpy() for name, p in block.collect_params().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in rows]


def history(folder):
    with open(os.path.join(str(folder), "t_history.csv"), newline="") as stream:
        return untimed(csv.DictReader(stream))


def test_learns_and_reports(tmp_path, caplog, no_curves):
    no_curves.undo()
    caplog.set_level("INFO")
    summary, _ = run(tmp_path, val=Batches(3, seed=9), end_epoch=6)
    assert summary.steps == 36
    assert summary.best["val_top1"] > 0.9
    assert summary.history[-1]["train_loss"] < summary.history[0]["train_loss"] / 2
    assert summary.history[0]["val_top5"] == 1.0  # four classes
    assert summary.checkpoint == str(tmp_path / "t_ep-0006")
    assert [row["epoch"] for row in history(tmp_path)] == list("123456")
    assert (tmp_path / "t_curves.png").exists()
    assert "Epoch [6] Batch [6/6] Step 36 lr 1.0000e-01 Speed" in caplog.text
    assert caplog.text.count("Batch [") == 18


def test_one_step_equals_numpy():
    """Loss, mean over the batch, learning rate: a linear network against the formula."""
    block = mx.gluon.nn.Dense(3, use_bias=False, in_units=2)
    block.initialize(mx.init.Normal(1))
    weight = block.weight.data().asnumpy().astype("float64")
    learner = Learner(block, NesterovSGD(momentum=0.9), [mx.cpu()], train_options())
    data, label = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 1.0]]), np.array([0, 2, 1])
    learner.step([(mx.nd.array(data), mx.nd.array(label))], 0.1, 0)
    logits = data @ weight.T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = (p - np.eye(3)[label]).T @ data / 3
    np.testing.assert_allclose(
        block.weight.data().asnumpy(), weight - 0.1 * 1.9 * gradient, rtol=1e-5
    )


@pytest.mark.parametrize(("batches", "div"), [(10, 4), (5, 4), (917, 4), (7, 1), (3, 3)])
def test_logged_epochs_cover_a_pass_once(batches, div):
    parts = [epoch_bounds(epoch, batches, div) for epoch in range(2 * div)]
    for number in (0, 1):
        covered = [b for n, first, last in parts if n == number for b in range(first, last)]
        assert covered == list(range(batches))
    sizes = [last - first for _, first, last in parts]
    assert max(sizes) == -(-batches // div)
    assert min(sizes) >= 1


@pytest.mark.parametrize(("batches", "div"), [(302, 4), (10, 4), (3, 4), (8, 1), (100, 3)])
def test_validation_takes_its_share_evenly(batches, div):
    runs = spread_batches(batches, div)
    chosen = [batch for start, stop in runs for batch in range(start, stop)]
    assert len(chosen) == len(set(chosen)) == -(-batches // div)
    assert 0 <= min(chosen) <= max(chosen) < batches
    if div > 1 and batches > 50:
        assert max(np.diff(chosen)) <= batches // 8 + 1


def test_epochs_divide_the_pass(tmp_path):
    train, val = Batches(6), Batches(8, seed=3)
    summary, _ = run(tmp_path, train=train, val=val, end_epoch=4, epoch_div_factor=3)
    assert train.read == [(0, batch) for batch in range(6)] + [(1, 0), (1, 1)]
    assert [row["step"] for row in summary.history] == [2, 4, 6, 8]
    assert len(val.read) == 4 * 3
    assert val.read[:3] == val.read[3:6]
    with pytest.raises(UsageError, match="cannot be divided"):
        run(tmp_path / "other", train=Batches(3), epoch_div_factor=4)


def test_plain_iterables_work(tmp_path):
    source = Batches(5)
    batches = [source.batch(0, index) for index in range(5)]
    plain, _ = run(tmp_path / "a", train=batches, end_epoch=3)
    again, _ = run(tmp_path / "b", train=batches, end_epoch=3, max_steps=7)
    again, _ = run(tmp_path / "b", train=batches, end_epoch=3, resume="auto")
    assert untimed(plain.history) == untimed(again.history)
    with pytest.raises(UsageError, match="no batch"):
        run(tmp_path / "c", train=[])


def test_stream_notices_a_short_pass():
    class Short(list):
        def __len__(self):
            return 3

    stream = BatchStream(Short([(1, 2)]), "training")
    stream.seek(0, 0)
    stream.read()
    with pytest.raises(GloReError, match="training data ended after 1 of 3"):
        stream.read()


class Holes(Batches):
    """Batches of which some hold nothing that can be read."""

    def __init__(self, holes, **more):
        super().__init__(**more)
        self.holes = holes

    def every_batch(self):
        first = self.position[1]
        for batch, content in enumerate(self, first):
            yield None if batch in self.holes else content


def test_validation_passes_over_batches_that_cannot_be_read(tmp_path, caplog):
    whole, _ = run(tmp_path / "a", val=Holes((2,), count=3, seed=1))
    assert all(np.isfinite(row["val_loss"]) for row in whole.history)
    run(tmp_path / "b", val=Holes((2,), count=3, seed=1), end_epoch=1)
    again, _ = run(tmp_path / "b", val=Holes((2,), count=3, seed=1), resume="auto")
    assert untimed(again.history) == untimed(whole.history)
    short = Batches(2, seed=1)
    fewer, _ = run(tmp_path / "c", val=short)
    assert untimed(fewer.history) == untimed(whole.history)
    none, _ = run(tmp_path / "d", val=Holes((0, 1, 2), count=3, seed=1))
    assert [row["val_top1"] for row in none.history] == [None, None]
    assert "none of its validation samples could be read" in caplog.text


def test_two_devices_equal_one(tmp_path):
    class NoNorm(Batches):
        def batch(self, pass_index, batch):
            data, label = super().batch(pass_index, batch)
            return data.reshape((self.size, -1)), label

    def linear():
        block = mx.gluon.nn.Dense(CLASSES, in_units=128, prefix="net_")
        mx.random.seed(3)
        block.initialize(mx.init.Xavier())
        return block

    one, first = run(tmp_path / "1", linear(), NoNorm(), NoNorm(2, size=1))
    two, second = run(
        tmp_path / "2", linear(), NoNorm(), NoNorm(2, size=1), contexts=[mx.cpu(0), mx.cpu(1)]
    )
    third, accumulated = run(
        tmp_path / "3", linear(), NoNorm(12, size=8), NoNorm(2, size=1), accumulate=2
    )
    for name, value in everything(first).items():
        np.testing.assert_allclose(
            second.collect_params()[name].data(mx.cpu(1)).asnumpy(), value, rtol=1e-4, atol=1e-6
        )
    assert one.history[1]["train_top1"] == two.history[1]["train_top1"]
    assert third.steps == one.steps
    with pytest.raises(UsageError, match="1 samples for 2 devices"):
        run(tmp_path / "4", linear(), NoNorm(size=1), contexts=[mx.cpu(0), mx.cpu(1)])


def test_accumulation_equals_a_larger_batch():
    def learner(accumulate):
        block = mx.gluon.nn.Dense(CLASSES, in_units=128, prefix="net_")
        mx.random.seed(3)
        block.initialize(mx.init.Xavier())
        options = train_options(accumulate=accumulate, loss_scale=4.0 if accumulate > 1 else 1.0)
        return Learner(block, NesterovSGD(momentum=0.9), [mx.cpu()], options)

    data, label = Batches(size=12).batch(0, 0)
    data = data.reshape((12, -1))
    whole, parts = learner(1), learner(3)
    for step in range(3):
        whole.step([(data, label)], 0.1, step)
        parts.step(
            [(data[:6], label[:6]), (data[6:11], label[6:11]), (data[11:], label[11:])], 0.1, 0
        )
    np.testing.assert_allclose(
        parts.block.weight.data().asnumpy(), whole.block.weight.data().asnumpy(), rtol=1e-4
    )


def test_batch_hook_is_reproducible(tmp_path):
    seen = []

    def hook(data, label, generator):
        seen.append(generator.rand())
        return data, mx.nd.one_hot(label, CLASSES)

    run(tmp_path / "a", batch_hook=hook, end_epoch=1)
    first, seen = seen[:], []
    run(tmp_path / "b", batch_hook=hook, end_epoch=1)
    assert first == seen
    assert len(set(first)) == 6


@pytest.mark.parametrize("precise", [None, (3, 8)])
@pytest.mark.parametrize("stop_at", [1, 4, 9, 12])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, precise, stop_at):
    options = {"end_epoch": 3, "epoch_div_factor": 2}
    if precise:
        options.update(precise_bn=True, precise_bn_batches=precise)
    data = {"train": Batches(9), "val": Batches(4, seed=5)}
    whole, block = run(tmp_path / "a", **data, **options)
    run(tmp_path / "b", **data, **options, max_steps=stop_at)
    resumed, other = run(tmp_path / "b", network(77), **data, **options, resume="auto")
    assert_same(everything(block), everything(other))
    assert untimed(whole.history) == untimed(resumed.history)
    assert history(tmp_path / "a") == history(tmp_path / "b")


class Signalled(Batches):
    """Sends this process a signal when a certain batch is asked for, once."""

    def __init__(self, number, place, **more):
        super().__init__(at=self.send, **more)
        self.number, self.place = number, place

    def send(self, pass_index, batch):
        if (pass_index, batch) == self.place:
            self.place = None
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["train", "precise_bn", "val"])
def test_signals_save_and_resume_bit_for_bit(tmp_path, number, where):
    options = {"precise_bn": True, "precise_bn_batches": (2, 3)}
    whole, block = run(tmp_path / "a", val=Batches(4, seed=5), **options)
    place = {"train": (0, 3), "precise_bn": (1_000_000, 1), "val": (0, 2)}[where]
    train = Batches() if where == "val" else Signalled(number, place)
    val = Signalled(number, place, count=4, seed=5) if where == "val" else Batches(4, seed=5)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        run(tmp_path / "b", train=train, val=val, **options)
    assert error.value.exit_code == 128 + number
    step = 4 if where == "train" else 6
    assert f"step {step}" in str(error.value)
    assert "--resume auto" in str(error.value)
    assert signal.getsignal(number) is before
    assert (tmp_path / "b" / f"t_step-000000{step}.json").exists()
    resumed, other = run(
        tmp_path / "b", network(5), val=Batches(4, seed=5), resume="auto", **options
    )
    assert_same(everything(block), everything(other))
    assert untimed(whole.history) == untimed(resumed.history)


SCRIPT = """
import os, sys
sys.path[:0] = sys.argv[1:4]
from train.report import log_to
from test_loop import Batches, everything, network, run

folder, kill_at, resume = sys.argv[4:]

def at(pass_index, batch):
    if f"{pass_index},{batch}" == kill_at:
        os.kill(os.getpid(), 9)

with log_to():
    run(folder, network(0), Batches(at=at), Batches(3, seed=5), end_epoch=3, save_every_steps=2,
        resume=resume)
"""


def test_kill_9_in_mid_epoch_then_resume_equals_uninterrupted(tmp_path, root):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(folder, kill_at="", resume="none"):
        paths = [root, *(os.path.join(root, "test", name) for name in ("train", "helpers"))]
        command = [sys.executable, str(script), *paths]
        command += [str(tmp_path / folder), kill_at, resume]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    whole = start("a")
    assert whole.returncode == 0, whole.stderr
    assert start("b", kill_at="1,3").returncode == -signal.SIGKILL
    assert len(history(tmp_path / "b")) == 1
    resumed = start("b", resume="auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "t_step-0000008" in resumed.stderr
    for ending in (".params", ".states"):
        first = mx.nd.load(str(tmp_path / "a" / f"t_ep-0003{ending}"))
        second = mx.nd.load(str(tmp_path / "b" / f"t_ep-0003{ending}"))
        assert_same(
            {name: value.asnumpy() for name, value in first.items()},
            {name: value.asnumpy() for name, value in second.items()},
        )
    assert history(tmp_path / "a") == history(tmp_path / "b")
    assert [row["epoch"] for row in history(tmp_path / "b")] == ["1", "2", "3"]


def test_second_signal_acts_as_usual(tmp_path):
    def twice(pass_index, batch):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train=Batches(at=twice))


def test_failing_input_saves_what_was_learnt(tmp_path):
    def fail(pass_index, batch):
        if batch == 3:
            raise GloReError("ten videos in a row could not be read")

    with pytest.raises(GloReError, match="ten videos"):
        run(tmp_path, train=Batches(at=fail))
    good, bad = CheckpointStore(str(tmp_path), "t").in_order()
    assert [checkpoint.position.step for checkpoint in good] == [3]
    assert bad == []


def test_old_run_is_not_lost(tmp_path):
    run(tmp_path, end_epoch=1)
    with pytest.raises(CheckpointError, match="--overwrite"):
        run(tmp_path, end_epoch=1)
    summary, _ = run(tmp_path, end_epoch=1, overwrite=True)
    assert summary.steps == 6


def test_complete_run_resumes_to_nothing(tmp_path, caplog):
    whole, block = run(tmp_path)
    caplog.set_level("INFO")
    again, other = run(tmp_path, network(4), resume="auto")
    assert "already complete" in caplog.text
    assert_same(everything(block), everything(other))
    assert again.history == whole.history


def test_settings_that_differ_are_named(tmp_path, caplog):
    run(tmp_path, max_steps=3)
    with pytest.raises(UsageError, match="lies within an epoch, where batches"):
        run(tmp_path, train=Batches(7), resume="auto")
    run(tmp_path, resume="auto", random_seed=2, max_steps=4)
    assert "seed: 1 -> 2" in caplog.text


def test_any_option_that_differs_is_named(tmp_path, caplog):
    run(tmp_path, max_steps=6)
    changed = {"end_epoch": 3, "warmup_factor": 0.5, "batch_norm": "frozen", "lr_steps": (7, 9)}
    run(tmp_path, train=Batches(7), resume="auto", max_steps=6, log_frequency=5, **changed)
    said = [line for line in caplog.text.splitlines() if "Not as when" in line]
    assert len(said) == 5
    for line in (
        "--end-epoch: 2 -> 3",
        "--warmup-factor: 0.1 -> 0.5",
        "--batch-norm: local -> frozen",
        "--lr-steps: [] -> [7, 9]",
        "batches: 6 -> 7",
    ):
        assert line in caplog.text


def test_a_manifest_describes_the_run(tmp_path):
    train_and_evaluate(
        network(),
        Batches(),
        None,
        train_options(model_dir=str(tmp_path), lr_base=0.25),
        optimizer=NesterovSGD(),
        schedule=ConstantScheduler(0.25),
        reporter=Reporter("t", str(tmp_path)),
        model={"network": "tiny", "input": {"mean": (0.5, 0.5, 0.5)}},
    )
    found = read_manifest(str(tmp_path / "t_ep-0001"))
    assert found.model == {"network": "tiny", "input": {"mean": [0.5, 0.5, 0.5]}}
    assert found.options["schedule"]["lr_base"] == 0.25
    assert found.options["run"]["end_epoch"] == 1
    assert found.data == {"batches": 6, "workers": 1}
    assert found.optimizer == "NesterovSGD"
    assert set(found.versions) == {"python", "numpy", "mxnet", "glore"}


def test_keep_and_frequency(tmp_path):
    run(tmp_path, end_epoch=5, keep=1, save_frequency=2, save_every_steps=4)
    names = [os.path.basename(path) for path in CheckpointStore(str(tmp_path), "t").paths()]
    assert names[-1] == "t_ep-0005"
    assert len(names) <= 2


def test_exploding_loss_stops_with_step_rate_and_checkpoint(tmp_path):
    steps = iter(range(1, 100))

    def poison(data, label, _):
        return data, mx.nd.one_hot(label, CLASSES) * (np.nan if next(steps) == 9 else 1)

    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, batch_hook=poison, schedule=MultiFactorScheduler(0.1, (7,), 0.1))
    message = str(error.value)
    assert "step 9" in message
    assert "learning rate 0.01)" in message
    assert "t_ep-0001" in message
    good, bad = CheckpointStore(str(tmp_path), "t").in_order()
    assert [checkpoint.position.epoch for checkpoint in good] == [1]
    assert bad == []


def test_hidden_nan_is_found_in_the_parameters(tmp_path):
    """oneDNN's relu turns NaN into 0: the loss stays healthy while weights are broken."""
    block = network()

    def poison(pass_index, batch):
        if batch == 4:
            weight = block[0].weight
            weight.set_data(weight.data() * np.nan)

    with pytest.raises(NonFiniteError, match="There is no checkpoint yet"):
        run(tmp_path, block, train=Batches(at=poison), save_every_steps=5, log_frequency=100)
    assert CheckpointStore(str(tmp_path), "t").paths() == []


def test_all_finite_takes_many_arrays():
    arrays = [mx.nd.ones((2, index + 1)) for index in range(330)]
    assert all_finite(arrays)
    arrays[250][1, 3] = np.inf
    assert not all_finite(arrays)


def test_all_finite_takes_arrays_of_several_types():
    arrays = [mx.nd.ones((3,), dtype=dtype) for dtype in ("float16", "float32", "float16")]
    assert all_finite(arrays)
    for array in arrays:
        array[1] = np.nan
        assert not all_finite(arrays)
        array[1] = 1


@pytest.mark.parametrize("loss_scale", [128.0, "dynamic"])
def test_float16_trains_and_resumes(tmp_path, loss_scale):
    """A block in float16 keeps BatchNorm's parameters in float32; all are checked and saved.

    MXNet multiplies no float16 matrices on a CPU, so there is no convolution in it.
    """

    class Scale(mx.gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.weight = self.params.get("weight", shape=(1, 8, 1, 1), init="ones")

        def hybrid_forward(self, F, data, weight):
            return F.broadcast_mul(data, weight)

    def half():
        block = mx.gluon.nn.HybridSequential(prefix="net_")
        with block.name_scope():
            block.add(mx.gluon.nn.BatchNorm(in_channels=8), Scale())
            block.add(mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Flatten())
        block.initialize()
        block.cast("float16")
        return block

    options = {"dtype": "float16", "loss_scale": loss_scale, "end_epoch": 3}
    whole, block = run(tmp_path / "a", half(), val=Batches(2, seed=5), **options)
    types = {parameter.dtype for parameter in block.collect_params().values()}
    assert {np.dtype(kind).name for kind in types} == {"float16", "float32"}
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"]
    run(tmp_path / "b", half(), val=Batches(2, seed=5), max_steps=8, **options)
    resumed, other = run(tmp_path / "b", half(), val=Batches(2, seed=5), resume="auto", **options)
    assert_same(everything(block), everything(other))
    assert untimed(whole.history) == untimed(resumed.history)


def test_derived_seeds_differ():
    seeds = {derived_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert derived_seed(1, 2) == derived_seed(1, 2)
    assert all(0 <= seed < 2**31 for seed in seeds)


class ReadsAhead(Batches):
    """Prepares batches before they are asked for, up to where it is told that reading ends."""

    def set_position(self, pass_index, batch, stop=None):
        super().set_position(pass_index, batch)
        self.stop = stop

    def __iter__(self):
        pass_index, first = self.position
        ready = [self.batch(pass_index, b) for b in range(first, self.count)[: self.ahead(first)]]
        self.read += [(pass_index, first + index) for index in range(len(ready))]
        yield from ready

    def ahead(self, first):
        return None if self.stop is None else self.stop - first


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (0, 10), (5, 5)])
def test_validation_prepares_only_what_it_reads(tmp_path, limit, expected):
    val = ReadsAhead(10, seed=2)
    run(tmp_path, val=val, end_epoch=1, max_val_batches=limit)
    assert len(val.read) == len(set(val.read)) == expected


def test_the_default_number_of_logged_epochs_follows_the_data():
    for given, batches, expected in [(None, 3, 3), (None, 9, 4), (None, 0, 1), (4, 3, 4)]:
        run_options = train_options(epoch_div_factor=given).run
        run_options.settle_epoch_div_factor(4, batches)
        assert run_options.epoch_div_factor == expected


def test_a_trial_of_a_few_steps_has_a_short_validation():
    for limit, steps, expected in [(None, None, 0), (None, 7, 7), (0, 7, 0), (3, 7, 3)]:
        options = train_options(max_val_batches=limit, max_steps=steps)
        assert options.run.val_batch_limit == expected


def test_max_val_batches(tmp_path):
    val = Batches(10, seed=2)
    run(tmp_path, val=val, end_epoch=1, max_val_batches=3)
    assert len(val.read) == 3
    assert len({batch for _, batch in val.read}) == 3


@pytest.mark.parametrize("field", ["end_epoch", "log_frequency", "accumulate", "max_steps"])
def test_options_are_checked_before_work_begins(tmp_path, field):
    with pytest.raises(UsageError, match=field):
        run(tmp_path, **{field: 0})
    assert os.listdir(tmp_path) == []
