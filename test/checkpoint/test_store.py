"""Checkpoints: round trip, MXNet's own readers, damage, choice and pruning."""

import glob
import json
import logging
import os
import resource
import threading
import time

import numpy as np
import pytest

from checkpoint import manifest
from checkpoint.manifest import Manifest, Position, read_manifest
from checkpoint.params import CheckpointError, SaveError, read_params, write_params
from checkpoint.store import CheckpointStore, read_checkpoint, task_lock, wait_for_checkpoint
from glore_common import UsageError, file_lock
from mxnet_compat import mx
from train.optimizer import NesterovSGD
from train.state import (
    named_parameters,
    optimizer_arrays,
    optimizer_name,
    parameter_arrays,
    restore_optimizer,
    restore_parameters,
    update_counts,
)

DATA = {"batches": 4, "workers": 1}


class SymbolNet(mx.gluon.SymbolBlock):
    """A SymbolBlock that knows its symbol, as the project's networks do."""

    def __init__(self, width=4):
        data = mx.sym.Variable("data")
        net = mx.sym.FullyConnected(data, num_hidden=width, name="fc1")
        net = mx.sym.BatchNorm(net, name="fc1_bn", fix_gamma=False)
        logits = mx.sym.FullyConnected(net, num_hidden=3, name="classifier")
        super().__init__(logits, data)
        self.symbol = mx.sym.SoftmaxOutput(logits, name="softmax")


def make(width=4, seed=0, context=None):
    mx.random.seed(seed)
    block = SymbolNet(width)
    block.initialize(mx.init.Normal(0.5), ctx=context or mx.cpu())
    optimizer = NesterovSGD(momentum=0.9, wd=1e-3, learning_rate=0.1)
    trainer = mx.gluon.Trainer(
        list(named_parameters(block).values()), optimizer, kvstore=None, update_on_kvstore=False
    )
    return block, trainer


def train(block, trainer, steps, seed=0):
    generator = np.random.RandomState(seed)
    for _ in range(steps):
        for context in trainer._contexts:
            data = mx.nd.array(generator.standard_normal((6, 5)), ctx=context)
            with mx.autograd.record():
                loss = (block(data) ** 2).sum()
            loss.backward()
        trainer.step(6)


def everything(block):
    return {name: p.data().asnumpy() for name, p in block.collect_params().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(str(tmp_path / "models"), "my.task")


def write(store, path, block, trainer, position):
    names = list(named_parameters(block))
    described = Manifest(
        position,
        model={"network": "tiny"},
        data=DATA,
        update_counts=update_counts(trainer, names),
        optimizer=optimizer_name(trainer),
    )
    states = optimizer_arrays(trainer, names)
    store.save(path, parameter_arrays(block), states, described, block.symbol)


def load(checkpoint, block, trainer):
    parameters, states = checkpoint.arrays()
    restore_parameters(block, parameters, checkpoint.path)
    named = named_parameters(block)
    restore_optimizer(trainer, named, states, checkpoint.manifest.update_counts)


def save(store, path, epoch=0, step=0, pair=None, **more):
    block, trainer = pair or make()
    if pair is None:
        train(block, trainer, 1)
    write(store, path, block, trainer, Position(step=step, epoch=epoch, **more))
    return path


def cut(path, size=None):
    with open(path, "r+b") as stream:
        stream.truncate(os.path.getsize(path) // 2 if size is None else size)


def test_round_trip_continues_bit_for_bit(store):
    block, trainer = make()
    train(block, trainer, 3)
    totals = {"samples": 3, "loss": 0.1 + 0.2, "top1": 1.0}
    history = [{"epoch": 1, "val_top1": None}]
    position = Position(3, 1, 2, "validate", totals, 1.5, 0.25, history)
    write(store, store.step_path(3), block, trainer, position)
    train(block, trainer, 3, seed=1)
    other, other_trainer = make(seed=9)
    checkpoint = read_checkpoint(store.step_path(3))
    assert checkpoint.position == position
    load(checkpoint, other, other_trainer)
    assert other_trainer.optimizer.num_update == 3
    assert set(other_trainer.optimizer._index_update_count.values()) == {3}
    train(other, other_trainer, 3, seed=1)
    assert_same(everything(other), everything(block))
    assert checkpoint.manifest.data == DATA


def test_momentum_is_part_of_it(store):
    """Without the optimiser's state the next steps differ: the test above could not pass."""
    block, trainer = make()
    train(block, trainer, 3)
    save(store, store.step_path(3), step=3, pair=(block, trainer))
    other, other_trainer = make(seed=9)
    load(read_checkpoint(store.step_path(3)), other, other_trainer)
    other_trainer._updaters[0].states.clear()
    train(block, trainer, 1, seed=1)
    train(other, other_trainer, 1, seed=1)
    assert not np.array_equal(everything(block)["fc1_weight"], everything(other)["fc1_weight"])


def test_two_devices_share_one_state(store):
    contexts = [mx.cpu(0), mx.cpu(1)]
    block, trainer = make()
    train(block, trainer, 2)
    save(store, store.epoch_path(1), 1, 2, pair=(block, trainer))
    other, other_trainer = make(seed=5, context=contexts)
    load(read_checkpoint(store.epoch_path(1)), other, other_trainer)
    expected = trainer._updaters[0].states[0].asnumpy()
    for updater, context in zip(other_trainer._updaters, contexts):
        assert updater.states[0].context == context
        np.testing.assert_array_equal(updater.states[0].asnumpy(), expected)


def test_mxnet_itself_reads_an_epoch_checkpoint(store):
    block, trainer = make()
    train(block, trainer, 1)
    save(store, store.epoch_path(3), epoch=3, pair=(block, trainer))
    prefix = os.path.join(store.model_dir, "my.task_ep")
    symbol, arguments, auxiliary = mx.model.load_checkpoint(prefix, 3)
    assert symbol.list_outputs() == ["softmax_output"]
    assert set(auxiliary) == {"fc1_bn_moving_mean", "fc1_bn_moving_var"}
    module = mx.mod.Module(symbol, context=mx.cpu())
    module.bind([("data", (2, 5))], [("softmax_label", (2,))], for_training=False)
    module.set_params(arguments, auxiliary)
    data = mx.nd.array(np.random.RandomState(0).standard_normal((2, 5)))
    module.forward(mx.io.DataBatch([data]), is_train=False)
    np.testing.assert_allclose(
        module.get_outputs()[0].asnumpy(), block(data).softmax().asnumpy(), rtol=1e-5
    )


@pytest.mark.parametrize("extension", [".params", ".states", ".json"])
def test_truncated_files_are_noticed(store, extension):
    path = save(store, store.epoch_path(1), epoch=1)
    read_checkpoint(path)
    cut(path + extension)
    with pytest.raises(CheckpointError, match=rf"ep-0001\{extension}"):
        read_checkpoint(path)


@pytest.mark.parametrize("extension", [".params", ".states", ".json"])
def test_one_flipped_bit_is_noticed(store, extension):
    path = save(store, store.epoch_path(1), epoch=1, step=1000)
    with open(path + extension, "r+b") as stream:
        content = bytearray(stream.read())
        place = content.index(b"1000") + 3 if extension == ".json" else len(content) // 2
        content[place] ^= 1
        stream.seek(0)
        stream.write(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path + extension)


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(store, caplog):
    save(store, store.epoch_path(1), epoch=1, step=4)
    save(store, store.step_path(6), epoch=1, step=6, batch=2)
    save(store, store.epoch_path(2), epoch=2, step=8)
    save(store, store.step_path(10), epoch=2, step=10, batch=2)
    assert store.choose("auto").path == store.step_path(10)
    cut(store.step_path(10) + ".params")
    os.remove(store.epoch_path(2) + ".json")
    with caplog.at_level(logging.WARNING):
        assert store.choose("auto").path == store.step_path(6)
    assert "step-0000010.params" in caplog.text
    assert "truncated" in caplog.text
    assert "ep-0002.json" in caplog.text


def test_nothing_whole_is_an_error_nothing_at_all_is_not(store):
    assert store.choose("auto") is None
    save(store, store.epoch_path(1), epoch=1)
    cut(store.epoch_path(1) + ".states")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.choose("auto")


def test_a_new_start_does_not_lose_an_old_run(store):
    save(store, store.epoch_path(1), epoch=1, step=4)
    save(store, store.epoch_path(2), epoch=2, step=8)
    with pytest.raises(CheckpointError, match="--resume auto"):
        store.choose("none")
    with pytest.raises(CheckpointError, match="1 checkpoint"):
        store.choose(store.epoch_path(1))
    assert store.choose(store.epoch_path(2)).position.step == 8
    store.overwrite(store.epoch_path(1) + ".params")
    assert store.paths() == [store.epoch_path(1)]
    store.overwrite("none")
    assert store.choose("none") is None
    with pytest.raises(UsageError):
        store.overwrite("auto")


def test_tasks_with_like_names_do_not_meet(store, tmp_path):
    other = CheckpointStore(store.model_dir, "my.task_ep-0001")
    save(other, other.epoch_path(2), epoch=2)
    save(CheckpointStore(store.model_dir, "myxtask"), store.epoch_path(7).replace("my.", "myx"))
    assert store.paths() == []


def test_pruning_keeps_the_last_and_the_best(store):
    store.keep = 2
    for epoch in range(1, 6):
        save(store, store.step_path(epoch), epoch=epoch - 1, step=epoch, batch=1)
        save(store, store.epoch_path(epoch), epoch=epoch, step=epoch)
        store.prune(store.epoch_path(epoch), best_epoch=1)
    assert store.paths() == [store.epoch_path(epoch) for epoch in (1, 4, 5)]
    leftovers = [name for name in os.listdir(store.model_dir) if "0002" in name or "step" in name]
    assert leftovers == []
    for step in (6, 7, 8):
        save(store, store.step_path(step), epoch=5, step=step, batch=step)
        store.prune(store.step_path(step))
    assert store.paths()[-2:] == [store.step_path(7), store.step_path(8)]
    assert len(store.paths()) == 5


def test_failed_write_leaves_the_others_alone(store, monkeypatch):
    save(store, store.epoch_path(1), epoch=1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(SaveError, match="disk full. Make room"):
        save(store, store.epoch_path(2), epoch=2)
    assert store.paths() == [store.epoch_path(1)]
    assert [name for name in os.listdir(store.model_dir) if "tmp" in name] == []


def test_other_network_is_refused_with_all_differences(store):
    save(store, store.epoch_path(1), epoch=1)
    block, trainer = make(width=6)
    block.collect_params()["fc1_weight"].shape = (6, 5)
    with pytest.raises(CheckpointError) as error:
        load(read_checkpoint(store.epoch_path(1)), block, trainer)
    assert "of another shape (1): fc1_weight is (4, 5), the network has (6, 5)" in str(error.value)


def test_states_are_no_pickle(store):
    path = save(store, store.epoch_path(1), epoch=1)
    arrays = mx.nd.load(path + ".states")
    assert "0:fc1_weight" in arrays
    assert arrays["0:fc1_weight"].shape == (4, 5)


def test_manifest_is_readable_by_others(store):
    path = save(store, store.epoch_path(1), epoch=1, step=5)
    with open(path + ".json") as stream:
        content = json.load(stream)
    assert content["position"]["step"] == 5
    assert content["optimizer"] == "NesterovSGD"
    assert set(content["files"]) == {".params", ".states"}


def test_auto_reads_no_more_files_than_it_has_to(store, monkeypatch):
    for epoch in range(1, 6):
        save(store, store.epoch_path(epoch), epoch=epoch, step=epoch)
    hashed = []
    sha256_of = manifest.sha256_of
    monkeypatch.setattr(
        manifest, "sha256_of", lambda path: hashed.append(os.path.basename(path)) or sha256_of(path)
    )
    assert store.choose("auto").path == store.epoch_path(5)
    assert hashed == ["my.task_ep-0005.params", "my.task_ep-0005.states"]
    del hashed[:]
    cut(store.epoch_path(5) + ".params")
    assert store.choose("auto").path == store.epoch_path(4)
    assert hashed == ["my.task_ep-0004.params", "my.task_ep-0004.states"]
    del hashed[:]
    with pytest.raises(CheckpointError, match="5 checkpoint"):
        store.choose("none")
    assert hashed == []


def test_manifests_of_the_first_format_are_read(store):
    path = save(store, store.epoch_path(1), epoch=1, step=4)
    with open(path + ".json") as stream:
        content = json.load(stream)
    kept = ("position", "update_counts", "optimizer", "files")
    old = {name: content[name] for name in kept}
    settings = {"network": "tiny", "overrides": {}, "seed": 3, "batches": 4, "lr_base": 0.1}
    old.update(format=1, settings=settings, mxnet="1.9.1")
    old["checksum"] = manifest._checksum(old)
    with open(path + ".json", "w") as stream:
        json.dump(old, stream)
    found = read_checkpoint(path).manifest
    assert (found.format, found.data) == (1, DATA)
    assert found.model == {"network": "tiny", "overrides": {}}
    expected = {"random_seed": 3, "lr_base": 0.1}
    assert found.options_of(["run", "schedule"]) == {"run": expected, "schedule": expected}
    old["format"] = 3
    old["checksum"] = manifest._checksum({k: v for k, v in old.items() if k != "checksum"})
    with open(path + ".json", "w") as stream:
        json.dump(old, stream)
    with pytest.raises(CheckpointError, match="format 3, this reads 1 to 2"):
        read_manifest(path)


@pytest.mark.parametrize("task", ["", "a/b", ".hidden"])
def test_bad_task_names(tmp_path, task):
    with pytest.raises(UsageError, match="task name"):
        CheckpointStore(str(tmp_path), task)


def test_params_are_the_bytes_that_mxnet_writes(tmp_path):
    generator = np.random.RandomState(0)
    arrays = {
        "arg:a_weight": mx.nd.array(generator.randn(3, 4, 1, 2)),
        "aux:b_moving_mean": mx.nd.array(generator.randn(5), dtype="float64"),
        "arg:half": mx.nd.array(generator.randn(2, 2), dtype="float16"),
        "arg:whole": mx.nd.array([[1, 2], [3, 4]], dtype="int32"),
        "arg:ä": mx.nd.ones((1,)),
    }
    mx.nd.save(str(tmp_path / "theirs"), arrays)
    write_params(str(tmp_path / "ours"), {**arrays, "arg:ä": np.ones(1, "float32")})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_params(str(tmp_path / "ours"), {})
    assert read_params(str(tmp_path / "ours")) == {}


def test_a_reached_limit_of_file_sizes_is_said_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "net.params"
    write_params(str(path), {"arg:w": np.ones(10, "float32")})
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        for size in (2000, 1100, 1010):
            with pytest.raises(SaveError, match=r"net\.params cannot be written.*ulimit -f"):
                write_params(str(path), {"arg:w": np.ones(size, "float32")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.params"]


def test_the_remains_of_a_killed_save_are_ignored_and_cleaned(store, caplog):
    save(store, store.epoch_path(1), epoch=1, step=4)
    os.remove(store.epoch_path(1) + ".json")
    for name in ("my.task_ep-0001", "my.task_step-0000003"):
        for extension in (".params", ".states", ".json"):
            part = f".{name}.0123456789abcdef.tmp{extension}"
            with open(os.path.join(store.model_dir, part), "w") as stream:
                stream.write("part")
    others = [
        ".other_ep-0001.0123456789abcdef.tmp.params",
        ".my.task.lock",
        "my.task_ep-symbol.json",
    ]
    for name in others:
        open(os.path.join(store.model_dir, name), "a").close()
    # A run that was killed in its very first save starts anew.
    assert store.choose("auto") is None
    assert store.choose("none") is None
    assert len(store.remains()) == 2 + 6
    with caplog.at_level(logging.WARNING):
        store.clean()
    assert "ep-0001.params, which an interrupted save left behind" in caplog.text
    assert sorted(os.listdir(store.model_dir)) == sorted(others)


def test_cleaning_leaves_whole_and_damaged_checkpoints_alone(store):
    save(store, store.epoch_path(1), epoch=1, step=4)
    save(store, store.epoch_path(2), epoch=2, step=8)
    cut(store.epoch_path(2) + ".params")
    store.clean()
    assert store.paths() == [store.epoch_path(1), store.epoch_path(2)]
    assert store.choose("auto").path == store.epoch_path(1)


def in_fork(work):
    """Run ``work`` in a copy of this process; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except SaveError:
            os._exit(3)
        except BaseException:
            os._exit(4)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1])


ARRAYS = {"arg:w": np.arange(3000, dtype="float32"), "aux:v": np.ones(4, "float32")}


def save_plain(store, epoch):
    store.save(store.epoch_path(epoch), ARRAYS, {"0:w": ARRAYS["arg:w"]}, Manifest(Position(epoch)))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_at_any_moment_of_a_save_loses_nothing_whole(store, monkeypatch, earlier):
    # At each place where a save changes the disk: the process ends there, and the next run begins.
    if earlier:
        save_plain(store, 1)
    count = [0]

    def dies_at(last, function):
        def called(*arguments, **options):
            count[0] += 1
            if count[0] == last:
                os._exit(9)
            return function(*arguments, **options)

        return called

    names = ("open", "replace", "fsync", "remove", "close", "rename")
    plain = {name: getattr(os, name) for name in names}
    survived = 0
    for last in range(1, 100):

        def work(last=last):
            for name, function in plain.items():
                monkeypatch.setattr(os, name, dies_at(last, function))
            save_plain(store, 2)

        status = in_fork(work)
        store.clean()
        newest = store.newest()
        survived += status == 9
        if status == 0:
            assert newest.path == store.epoch_path(2)
            break
        assert status == 9
        if newest is None or newest.path == store.epoch_path(1):
            assert (newest is not None) == earlier
            assert store.newer_than(newest) == []
        else:
            # Killed after all was in place.
            assert newest.path == store.epoch_path(2)
            store.remove(newest.path)
        assert not glob.glob(os.path.join(glob.escape(store.model_dir), ".*.tmp*"))
    assert survived > 15


@pytest.mark.parametrize("file", ["params", "states", "json"])
def test_a_file_that_is_cut_short_by_a_limit_never_counts(store, file):
    save_plain(store, 1)
    size = os.path.getsize(f"{store.epoch_path(1)}.{file}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Also in the last page, and at the last byte, which a buffer would hold back.
    for limit in (0, 1, 24, size // 2, size - 4097, size - 4096, size - 100, size - 1):
        if limit < 0:
            continue

        def work(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            save_plain(store, 2)

        assert in_fork(work) == 3, limit
        store.remove(store.epoch_path(2))
        assert store.newest().path == store.epoch_path(1)
        assert len(os.listdir(store.model_dir)) == 3


def test_parameters_are_the_bytes_of_mxnet(tmp_path):
    kinds = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool")
    arrays = {f"arg:{kind}": np.ones((2, 3), kind) for kind in kinds}
    write_params(str(tmp_path / "ours"), arrays)
    mx.nd.save(
        str(tmp_path / "theirs"),
        {name: mx.nd.array(value, dtype=value.dtype) for name, value in arrays.items()},
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_refused_run_leaves_no_file_and_a_lock_can_be_taken_back(tmp_path):
    folder = str(tmp_path / "new" / "models")
    with pytest.raises(CheckpointError, match="no"), task_lock(folder, "t"):
        raise CheckpointError("no")
    assert os.listdir(tmp_path) == []
    # Who waits for a lock that its holder takes back does not hold what nobody sees.
    path = str(tmp_path / "lock")
    waits = threading.Event()

    def second():
        waits.set()
        with file_lock(path, 30.0):
            assert os.path.exists(path)
            found.append(os.stat(path).st_ino)

    found = []
    thread = threading.Thread(target=second)
    with file_lock(path):
        thread.start()
        waits.wait()
        time.sleep(0.3)
        os.remove(path)
    thread.join()
    assert len(found) == 1


def test_a_checkpoint_is_waited_for_and_not_for_ever(store):
    save_plain(store, 1)
    path = store.epoch_path(1)
    os.rename(f"{path}.json", f"{path}.later")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="did not see whole within 0.5 s"):
        wait_for_checkpoint(path, 0.5)
    assert 0.5 <= time.monotonic() - began < 5
    thread = threading.Timer(0.5, os.rename, (f"{path}.later", f"{path}.json"))
    thread.start()
    began = time.monotonic()
    assert wait_for_checkpoint(path, 60).path == path
    assert 0.4 <= time.monotonic() - began < 30
    thread.join()


def test_keep_is_a_number_of_checkpoints(tmp_path):
    with pytest.raises(UsageError, match="0 .all. or more"):
        CheckpointStore(str(tmp_path), "t", -1)
    assert CheckpointStore(str(tmp_path), "t").keep == 0
