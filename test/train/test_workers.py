"""Training by several workers: equal to one, whoever is killed, and nobody is left behind."""

import csv
import json
import os
import random
import re
import signal
import sys
import time

import dist_job
import numpy as np
import pytest
from dist_runs import ROOT, Launched, command_of, environment_of, marked
from train_runs import train_options

from checkpoint.params import CheckpointError
from checkpoint.store import task_lock, wait_for_checkpoint
from cluster import agent
from glore_common import UsageError, heartbeat_path
from mxnet_compat import mx
from train import workers as distributed
from train.heartbeat import Heartbeat
from train.optimizer import NesterovSGD
from train.report import TIME_COLUMNS
from train.server_side import FIGURES, Keys
from train.step import Learner, LossScaler


@pytest.fixture
def launch(tmp_path):
    """Return a function that launches test/dist_job.py: (launcher's options, its own)."""
    running = []

    def start(options, command=None, **own):
        own = {"model_dir": str(tmp_path / "models"), "kv_store": "dist_sync", **own}
        job = [
            sys.executable,
            os.path.join(ROOT, "test", "helpers", "dist_job.py"),
            json.dumps(own),
        ]
        env = {"PYTHONPATH": ROOT}
        running.append(Launched(tmp_path, *options, "--", *(command or job), env=env))
        return running[-1]

    yield start
    for launched in running:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.communicate()
        for pid in marked(launched.mark):
            agent.kill(pid)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("train.report.plot_history", lambda *_: None)


def alone(folder, **options):
    """Train in this process."""
    return dist_job.train(distributed.Group(), model_dir=str(folder), **options)


def last(folder, task="t"):
    """Return the parameters of the second epoch's checkpoint."""
    return {k: v.asnumpy() for k, v in mx.nd.load(str(folder / f"{task}_ep-0002.params")).items()}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


def history(folder):
    with open(folder / "t_history.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: float(v) for k, v in row.items() if k not in TIME_COLUMNS} for row in rows]


def listeners():
    """Return the (address, port, inode) of all listening TCP sockets of this machine."""
    found = []
    for family in ("tcp", "tcp6"):
        with open(f"/proc/net/{family}") as stream:
            rows = [line.split() for line in stream.readlines()[1:]]
        found += [(row[1].split(":")[0], row[9]) for row in rows if row[3] == "0A"]
    return found


def sockets_of(pids):
    """Return the inodes of the sockets of processes."""
    inodes = set()
    for pid in pids:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{entry}"))
            if match:
                inodes.add(match[1])
    return inodes


def test_two_workers_are_one_with_twice_the_batch(launch, tmp_path):
    launched = launch(("-n", 2, "-s", 2), pause=0.2)
    launched.wait_for_log("worker-0", "Step 2 ", 60)
    pids = [pid for pid in marked(launched.mark) if "dist_job" in command_of(pid)]
    pids += [pid for pid in marked(launched.mark) if "parameter_server" in command_of(pid)]
    own = sockets_of(pids)
    addresses = [address for address, inode in listeners() if inode in own]
    # The scheduler, two servers and two workers listen: on 127.0.0.1.
    assert len(addresses) >= 5
    assert set(addresses) == {"0100007F"}
    launched.finish(0, seconds=90)
    alone(tmp_path / "alone", batch=8)
    assert_close(last(tmp_path / "models"), last(tmp_path / "alone"))
    rows, expected = history(tmp_path / "models"), history(tmp_path / "alone")
    assert len(rows) == 2
    for row, wanted in zip(rows, expected):
        # Sums over all workers, validation (6 and 5 samples) included.
        assert row == pytest.approx(wanted, rel=1e-4)
    written = set(os.listdir(tmp_path / "models")) - {"t_curves.png"}
    assert written == set(os.listdir(tmp_path / "alone"))
    assert not os.path.exists(tmp_path / "exps")


def kill_role(launched, role, after):
    """Kill one process of a role once worker 0 has saved some steps."""
    launched.wait_for_log("worker-0", f"Step {after} ", 60)
    if role.startswith("worker"):
        fits = f"DMLC_TASK_ID={role[-1]}\0", "dist_job.py"
    else:
        fits = f"DMLC_ROLE={role}\0", "parameter_server"
    victims = [
        pid
        for pid in marked(launched.mark)
        if fits[0].encode() in environment_of(pid) and fits[1] in command_of(pid)
    ]
    assert len(victims) == 1, victims
    started = time.monotonic()
    agent.kill(victims[0], signal.SIGKILL)
    return started


def check_restart(launch, tmp_path, role, after):
    launched = launch(
        ("-n", 2, "-s", 1, "--max-restarts", 1), pause=0.05, save_every_steps=1, batches=8
    )
    killed = kill_role(launched, role, after)
    launched.wait_for_log("launcher", "was killed by signal 9", 30)
    assert time.monotonic() - killed < 30
    launched.finish(0, seconds=120)
    name = role if role.startswith("worker") else f"{role}( 0)?"
    name = re.sub(r"worker(\d)", r"worker \1", name)
    message = rf"ended after [\d.]+ s: {name} \(process \d+\) was killed by signal 9 \(SIGKILL\)"
    assert re.search(message, launched.err), launched.err
    assert "Restart 1 of 1" in launched.err
    resumed = re.search(r"Resumed from .*: step (\d+),", launched.log("worker-0"))
    assert int(resumed[1]) >= after - 1
    alone(tmp_path / "alone", batch=8, batches=8)
    assert_close(last(tmp_path / "models"), last(tmp_path / "alone"))


def test_a_job_whose_server_is_killed_starts_again(launch, tmp_path):
    check_restart(launch, tmp_path, "server", 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("role", ["scheduler", "server", "worker0", "worker1"])
def test_a_job_of_which_any_process_is_killed_starts_again(launch, tmp_path, role, seed):
    # Step lines come at every second step.
    after = 2 * random.Random(f"{role}{seed}").randint(1, 6)
    check_restart(launch, tmp_path, role, after if after < 8 else after - after % 8 % 2)


@pytest.mark.slow
def test_a_straggler_is_named(launch):
    launched = launch(("-n", 2, "-s", 1, "--stall-warning", 4), pause=0.1, batches=50)
    launched.wait_for_log("worker-0", "Step 4 ", 60)
    victims = [pid for pid in marked(launched.mark) if "dist_job" in command_of(pid)]
    victims = [pid for pid in victims if b"DMLC_TASK_ID=1\0" in environment_of(pid)]
    assert len(victims) == 1
    agent.kill(victims[0], signal.SIGSTOP)
    launched.wait_for_log("launcher", "The others wait for worker 1", 30)
    assert re.search(r"worker 0: step \d+, exchange for", launched.log("launcher"))
    launched.signal(signal.SIGINT)
    time.sleep(1)
    launched.signal(signal.SIGINT)
    launched.finish(130, seconds=30)


@pytest.mark.slow
def test_a_signal_saves_at_one_step_and_the_run_goes_on(launch, tmp_path):
    launched = launch(("-n", 2, "-s", 1), pause=0.1, batches=8)
    launched.wait_for_log("worker-0", "Step 4 ", 60)
    launched.signal(signal.SIGTERM)
    launched.finish(143, seconds=40)
    assert re.search(r"SIGTERM: stopped after step \d+, saved as", launched.log("worker-0"))
    steps = re.findall(r"stopped after step (\d+)", launched.log("worker-0"))
    steps += re.findall(r"stopped after step (\d+)", launched.log("worker-1"))
    assert len(set(steps)) == 1
    launch(("-n", 2, "-s", 1), batches=8, resume="auto").finish(0, seconds=90)
    alone(tmp_path / "alone", batch=8, batches=8)
    assert_close(last(tmp_path / "models"), last(tmp_path / "alone"))


@pytest.mark.slow
def test_servers_that_update_are_resumed_with_their_momentum(launch, tmp_path):
    options = {"update_on_kvstore": True, "batches": 8}
    launched = launch(("-n", 2, "-s", 2), pause=0.1, **options)
    launched.wait_for_log("worker-0", "Step 4 ", 60)
    launched.signal(signal.SIGTERM)
    launched.finish(143, seconds=40)
    launch(("-n", 2, "-s", 2), resume="auto", **options).finish(0, seconds=90)
    alone(tmp_path / "alone", batch=8, batches=8)
    assert_close(last(tmp_path / "models"), last(tmp_path / "alone"))
    # The state of what the servers did fits a run that updates by itself.
    states = mx.nd.load(str(tmp_path / "models" / "t_ep-0002.states"))
    expected = mx.nd.load(str(tmp_path / "alone" / "t_ep-0002.states"))
    assert_close(
        {k: v.asnumpy() for k, v in states.items()}, {k: v.asnumpy() for k, v in expected.items()}
    )


@pytest.mark.slow
def test_workers_that_do_not_wait(launch, tmp_path):
    launch(("-n", 2, "-s", 2), kv_store="dist_async", end_epoch=2, batches=30).finish(0, 120)
    rows = history(tmp_path / "models")
    assert [row["step"] for row in rows] == [30, 60]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    start = {k: p.data().asnumpy() for k, p in dist_job.network().collect_params().items()}
    for name, value in last(tmp_path / "models").items():
        assert np.abs(value - start[name.replace("arg:", "net_")]).max() > 1e-3


@pytest.mark.slow
def test_compressed_gradients(launch, tmp_path):
    options = {
        "gradient_compression": "2bit",
        "compression_threshold": 0.01,
        "batches": 20,
        "momentum": 0.0,
    }
    launch(("-n", 2, "-s", 2), **options).finish(0, seconds=120)
    rows = history(tmp_path / "models")
    # The figures travel uncompressed: of 160 samples, 11 for validation.
    assert rows[-1]["train_top1"] * 160 == pytest.approx(round(rows[-1]["train_top1"] * 160))
    assert rows[-1]["val_top1"] * 11 == pytest.approx(round(rows[-1]["val_top1"] * 11))
    alone(tmp_path / "alone", batch=8, batches=20, momentum=0.0)
    uncompressed = last(tmp_path / "alone")
    compressed = last(tmp_path / "models")
    # Each step moves a weight by 0, or by 1 or 2 times the threshold / 8 (decay aside).
    assert any(np.abs(compressed[k] - v).max() > 1e-4 for k, v in uncompressed.items())


@pytest.mark.slow
def test_train_kinetics_by_two_workers_and_by_two_devices(launch, tmp_path):
    from dataset import prepare_demo

    prepare_demo(str(tmp_path / "data"), clips_per_class=5, val_clips_per_class=1)
    script = [sys.executable, os.path.join(ROOT, "train_kinetics.py")]
    common = (
        f"--network TINY_GLORE --dataset Demo --data-root {tmp_path}/data --crop-size 32 "
        "--dropout 0 --batch-norm frozen --normalize --max-steps 20 --max-val-batches 1 "
        "--num-workers 1 --epoch-div-factor 1 --end-epoch 9 --lr-base 0.002"
    ).split()
    runs = {
        "one": (None, ["--gpus", "", "--batch-size", "8"]),
        "cpus": (None, ["--cpus", "2", "--batch-size", "8"]),
        "two": (2, ["--gpus", "", "--batch-size", "4", "--kv-store", "dist_sync"]),
    }
    found = {}
    for name, (workers, own) in runs.items():
        words = [*script, *common, *own, "--task-name", name]
        options = ("-n", workers or 1, "-s", 1 if workers else 0)
        launch(options, command=words).finish(0, seconds=200)
        path = tmp_path / "exps" / "models" / f"{name}_ep-0004.params"
        found[name] = {k: v.asnumpy() for k, v in mx.nd.load(str(path)).items()}
    assert_close(found["two"], found["one"])
    assert_close(found["cpus"], found["one"])


def test_train_classifier_by_two_workers(launch, tmp_path):
    from dataset import prepare_demo_images

    prepare_demo_images(tmp_path / "data", 8, 2, 3, jobs=1)
    script = [sys.executable, os.path.join(ROOT, "train_classifier.py")]
    common = (
        f"--dataset demo --data-root {tmp_path}/data --net-type resnet18_v1_slim --glore res4 "
        "--crop-size 32 --batch-norm frozen --lr 0.002 --epochs 2 --num-workers 0"
    ).split()
    runs = {
        "one": ((), ["--train-batch", "8"]),
        "two": (("-n", 2, "-s", 1), ["--train-batch", "4", "--kv-store", "dist_sync"]),
    }
    for name, (options, own) in runs.items():
        command = [*script, *common, "--gpu-id", "", *own, "--task-name", name]
        options = options or ("-n", 1, "-s", 0)
        launch(options, command=command).finish(0, seconds=120)
    folders = {name: tmp_path / "exps" / "classifier" / name for name in runs}
    found, expected = (last(folders[name] / "checkpoints", name) for name in ("two", "one"))
    assert_close(found, expected)
    # Worker 0 alone tests, and writes what one process would.
    tests = {}
    for name, folder in folders.items():
        with open(folder / "test.json") as stream:
            tests[name] = json.load(stream)
        assert (folder / "test_confusion.png").exists()
    assert tests["two"]["count"] == tests["one"]["count"] == 24
    assert tests["two"]["loss"] == pytest.approx(tests["one"]["loss"], rel=1e-4)


def test_two_devices_are_one(tmp_path):
    alone(tmp_path / "one", batch=8)
    two = {"batch": 8, "contexts": [mx.cpu(0), mx.cpu(1)]}
    alone(tmp_path / "two", **two)
    alone(tmp_path / "store", update_on_kvstore=True, **two)
    expected = last(tmp_path / "one")
    assert_close(last(tmp_path / "two"), expected)
    assert_close(last(tmp_path / "store"), expected)
    # Resumed in the middle, with the momentum that the store had.
    alone(tmp_path / "store2", update_on_kvstore=True, max_steps=3, save_every_steps=3, **two)
    alone(tmp_path / "store2", update_on_kvstore=True, resume="auto", **two)
    assert_close(last(tmp_path / "store2"), expected)


def test_a_group_of_one_needs_no_store():
    group = distributed.join("device")
    assert (group.rank, group.size, group.is_main, group.in_step) == (0, 1, True, False)
    np.testing.assert_array_equal(group.sum([1.5, 2]), [1.5, 2])
    assert group.broadcast_text("x") == "x"
    assert group.agree(7, 15) == (7, 15)
    group.check_equal("x", 3)


def test_a_store_that_does_not_fit_the_job_is_said(monkeypatch):
    monkeypatch.delenv("DMLC_PS_ROOT_URI", raising=False)
    with pytest.raises(UsageError, match="run_dist.sh -n WORKERS"):
        distributed.join("dist_sync")
    monkeypatch.setenv("DMLC_NUM_WORKER", "2")
    with pytest.raises(UsageError, match="one of 2 workers .* give --kv-store dist_sync"):
        distributed.join("device")


def test_figures_travel_as_bits(monkeypatch):
    workers = [distributed.Group(size=3, rank=rank) for rank in range(3)]
    values = [[1 / 3, -5.25e9, 0.0, 2.0], [1e-9, 2.0, -1.5, np.nan], [7.0, 1e12, -3.0, 1.0]]
    sent = []
    for worker, own in zip(workers, values):
        worker._unit = 0.5
        monkeypatch.setattr(worker, "exchange", lambda bits, _: sent.append(bits) or bits)
        worker.sum(own)
    assert set(np.unique(np.concatenate(sent))) == {0.0, 0.5}
    total = sum(sent)
    monkeypatch.setattr(workers[0], "exchange", lambda *_: total)
    found = workers[0].sum(values[0])
    np.testing.assert_allclose(found[:3], np.sum(values, axis=0)[:3], rtol=0, atol=1e-9)
    assert np.isnan(found[3])


def test_keys_reach_the_server_that_has_the_state():
    for servers in (1, 2, 3, 7, 64):
        keys = Keys(servers)
        for parameter in (0, 1, 999):
            for slot in (0, 1, 3):
                for kind in ("fetch", "restore"):
                    key = getattr(keys, kind)(parameter, slot)
                    assert keys.meaning(key) == (kind, parameter, slot)
                    assert key * 9973 % servers == parameter * 9973 % servers
                    assert parameter < key < FIGURES
        assert keys.meaning(5) == ("weight", 5, 0)
    with pytest.raises(UsageError, match="100000 servers"):
        Keys(100000)


def test_two_runs_do_not_share_a_task(tmp_path):
    message = rf"(?s)process {os.getpid()} on .*--share-task-name"
    with task_lock(str(tmp_path), "t"):
        with pytest.raises(CheckpointError, match=message), task_lock(str(tmp_path), "t", 0.2):
            pass
        with task_lock(str(tmp_path), "other", 0):
            pass
        with pytest.raises(CheckpointError, match="is writing checkpoints of t"):
            alone(tmp_path)
        alone(tmp_path, share_task_name=True, max_steps=1)
    with task_lock(str(tmp_path), "t", 0):
        pass


def test_readers_wait_for_the_rename(tmp_path):
    alone(tmp_path, max_steps=1)
    path = str(tmp_path / "t_step-0000001")
    whole = wait_for_checkpoint(path, seconds=0)
    assert whole.position.step == 1
    os.rename(f"{path}.json", f"{path}.later")
    with pytest.raises(CheckpointError, match="file system that all machines share"):
        wait_for_checkpoint(path, seconds=0.1)


def test_the_loss_scale_follows_overflows(tmp_path):
    block = dist_job.network()
    options = train_options(loss_scale="dynamic")
    learner = Learner(block, NesterovSGD(momentum=0.9), [mx.cpu()], options)
    batch = next(iter(dist_job.Share(8, 8, 0, 1)))
    plain = dist_job.network()
    reference = Learner(plain, NesterovSGD(momentum=0.9), [mx.cpu()], train_options())
    for step in (1, 2):
        learner.step([batch], 0.1, step)
        reference.step([batch], 0.1, step)
    assert learner.scaler.state() == [2.0**16, 2]

    def weights(some):
        return {k: p.data().asnumpy() for k, p in some.collect_params().items()}

    assert_close(weights(block), weights(plain), 1e-6)
    before = weights(block)
    learner.step([(batch[0] * np.inf, batch[1])], 0.1, 3)
    assert learner.scaler.state() == [2.0**15, 0]
    assert_close(weights(block), before, 0)
    assert learner.is_finite()
    scaler = LossScaler(4.0, True)
    for _ in range(LossScaler.STEPS):
        scaler.update(True)
    assert scaler.state() == [8.0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_compression": "2bit"}, "--kv-store dist_sync"),
        ({"kv_store": "dist_async", "precise_bn": True}, "precise BatchNorm"),
        ({"update_on_kvstore": True, "loss_scale": "dynamic"}, "dynamic loss scale"),
        ({"precise_bn_batches": (-1, 3)}, "0 or more batches"),
        ({"resume": "auto", "resume_epoch": 3}, "not both"),
    ],
)
def test_what_does_not_go_together_is_said(options, message):
    with pytest.raises(UsageError, match=message):
        train_options(**options).check()


def test_the_heartbeat_is_written_when_it_changes(tmp_path, caplog):
    def read():
        with open(heartbeat_path(str(tmp_path), 3)) as stream:
            return json.load(stream)

    heartbeat = Heartbeat(str(tmp_path), 3)
    assert read() == {"step": 0, "doing": "starting", "ticks": 0}
    heartbeat.tick("input", 5)
    with heartbeat.phase("exchange"):
        assert heartbeat.doing == "exchange"
    heartbeat.close()
    assert read() == {"step": 5, "doing": "input", "ticks": 3}
    assert caplog.text == ""


def test_without_a_folder_for_heartbeats_the_run_goes_on(tmp_path, caplog):
    heartbeat = Heartbeat(str(tmp_path / "none"), 0)
    heartbeat.tick("input", 1)
    heartbeat.close()
    assert caplog.text.count("cannot be told") == 1
    assert "log folder" in caplog.text
